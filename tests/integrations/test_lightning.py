"""The contract, and what only the callback of Lightning does."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from pytorch_lightning import LightningModule
from pytorch_lightning.callbacks import ModelCheckpoint, StochasticWeightAveraging, WeightAveraging

from keepbest.errors import ConfigError, MetricMismatchError, MissingMetricError, RunExistsError
from keepbest.integrations.lightning import BestCheckpoint
from tests.integrations.contract import TrainerContract, assert_continues, train_with_and_without_interruption
from tests.integrations.faces import face
from tests.integrations.faces.face import VALUES, failing, weights_of
from tests.integrations.faces.lightning import METRIC, Lightning, Model, Recorder, fit
from tests.kit.pool import run_ranks
from tests.kit.runs import ledger, refs

FACE = Lightning()


class TestContract(TrainerContract):
    face = FACE


@pytest.mark.parametrize(
    "framework",
    [
        {"trainer": {"val_check_interval": 1}, "checkpoint": {"save_on_train_epoch_end": False}},
        {"checkpoint": {"every_n_epochs": None, "every_n_train_steps": 3}},
    ],
)
def test_run_resumed_within_an_epoch_observes_the_same(framework, tmp_path):
    train = partial(train_with_and_without_interruption, FACE, tmp_path, fails_at=[5], framework=framework)
    for whole, resumed in run_ranks(train, 2):
        assert resumed == whole

    def without_weights(directory):
        # Lightning reads the data of the epoch from its start again.
        return {ref: entry[:2] for ref, entry in FACE.kept(directory).items()}

    assert without_weights(tmp_path / "resumed") == without_weights(tmp_path / "whole")


def observed(directory):
    """Those of abandoned timelines too."""
    return [line["iteration"] for line in ledger(directory) if line["event"] == "observation"]


def test_validations_outside_the_training_are_not_observed(tmp_path):
    best = BestCheckpoint(METRIC, directory=tmp_path / "best")
    trainer = fit(tmp_path, VALUES[:2], [best], num_sanity_val_steps=2, enable_checkpointing=True)
    trainer.validate(trainer.lightning_module, trainer.val_dataloaders, verbose=False)
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    assert observed(tmp_path / "best") == ["E1_U2_B2", "E2_U4_B4"]
    fit(tmp_path / "dev", VALUES, [BestCheckpoint(METRIC)], fast_dev_run=True)
    assert not (tmp_path / "dev").exists()


def run_dry(directory, **settings):
    best = BestCheckpoint("loss/vall", directory=directory / "best", **settings)
    with pytest.raises(
        MissingMetricError, match=r"'loss/vall' was not logged by the end of validation; logged: loss/val"
    ):
        fit(directory, VALUES, [best], fast_dev_run=True)


def test_wrong_metric_is_found_by_a_dry_run_on_every_rank(tmp_path):
    run_ranks(run_dry, 2, tmp_path)
    assert not (tmp_path / "best").exists()


def fit_misspelt(directory):
    best = BestCheckpoint("loss/vall", directory=directory / "best", metric_reduction="rank0")
    expected = r"'loss/vall' .* sanity check; logged: loss/val; did you mean 'loss/val'\?.* num_sanity_val_steps=0"
    with pytest.raises(MissingMetricError, match=expected):
        fit(directory, VALUES, [best], num_sanity_val_steps=1, fails_at=1)  # training itself would end by another error


def test_misspelt_metric_ends_the_sanity_check_on_every_rank(tmp_path):
    run_ranks(fit_misspelt, 2, tmp_path)
    assert not (tmp_path / "best").exists()


def test_misspelt_metric_is_named_by_the_first_validation(tmp_path):
    with pytest.raises(MissingMetricError, match=r"of validation; logged: loss/val; did you mean 'loss/val'\?"):
        fit(tmp_path, VALUES, [BestCheckpoint("loss/vall")], num_sanity_val_steps=0, fails_at=2)


class LogsMoreInTraining(Model):
    """Computes a score that it does not compute in the sanity check."""

    def on_validation_epoch_end(self):
        if not self.trainer.sanity_checking:
            self.log("score/val/acc", -self.values[self.current_epoch], sync_dist=True)


def test_metric_that_the_sanity_check_lacks_is_warned_about(tmp_path, caplog):
    bests = [BestCheckpoint("score/val/acc"), BestCheckpoint(METRIC)]
    fit(tmp_path, VALUES[:2], bests, model=LogsMoreInTraining, num_sanity_val_steps=1)
    messages = [record.getMessage() for record in caplog.records if record.name == "keepbest.integrations.lightning"]
    assert messages == ["'score/val/acc' was not logged by the end of the sanity check; logged: loss/val"]
    assert [best.keeper.best_metric_value for best in bests] == [-min(VALUES[:2]), min(VALUES[:2])]


class ValidatesSets(Model):
    """Validates several sets, and logs the mean of all too."""

    def validation_step(self, batch, batch_idx, dataloader_idx):
        super().validation_step(batch, batch_idx)

    def on_validation_epoch_end(self):
        self.log("losses/val", 9.0, sync_dist=True)


def test_sanity_check_of_several_sets_judges_no_metric(tmp_path, caplog):
    best = BestCheckpoint(f"{METRIC}/dataloader_idx_1", directory=tmp_path)
    fit(tmp_path, [5.0, 3.0], [best], model=ValidatesSets, sets=2)
    assert not [record for record in caplog.records if record.name == "keepbest.integrations.lightning"]
    assert best.keeper.best_metric_value == 3.0


def test_checkpoint_of_an_exception_is_pinned_and_resumed(tmp_path):
    callbacks = [BestCheckpoint(METRIC), ModelCheckpoint(tmp_path, "any", save_on_exception=True)]
    with failing(3):
        fit(tmp_path, VALUES, callbacks, fails_at=3)
    assert ledger(tmp_path)[-1]["event"] == "pin"
    fit(tmp_path, VALUES[:4], [BestCheckpoint(METRIC)], ckpt_path=tmp_path / "any.ckpt")
    assert observed(tmp_path) == ["E1_U2_B2", "E2_U4_B4", "E3_U6_B6", "E4_U8_B8"]


class Scheduled(Model):
    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]


def test_optimizers_and_schedulers_of_the_best_can_be_loaded(tmp_path):
    trainer = fit(tmp_path, [3.0, 2.0], [BestCheckpoint(METRIC, save_training_state=True)], model=Scheduled)
    [optimizer], [scheduler] = (model := Scheduled()).configure_optimizers()
    assert_continues(tmp_path, model, optimizer, {"scheduler": scheduler}, like=trainer.optimizers[0])
    assert scheduler.last_epoch > 0


class ValuePerValidation(Model):
    """Validates with the next of its values each time."""

    def on_fit_start(self):
        self.left = iter(self.values)

    def validation_step(self, batch, batch_idx):
        if batch_idx == 0 and not self.trainer.sanity_checking:
            self.value = next(self.left)
        self.log(METRIC, self.value)


class StepsItself(ValuePerValidation):
    """Updates the weights past Lightning, which then counts no step."""

    def __init__(self, values, **settings):
        super().__init__(values, **settings)
        self.automatic_optimization = False

    def on_train_batch_end(self, outputs, batch, batch_idx):
        with torch.no_grad():
            self.layers[0].weight.add_(1.0)


@pytest.mark.parametrize(
    ("model", "updates", "settings"),
    [(ValuePerValidation, [0, 1], {"accumulate_grad_batches": 2}), (StepsItself, [0, 0], {})],
)
def test_two_validations_between_updates_are_both_observed(model, updates, settings, tmp_path):
    recorder = Recorder()
    settings |= {"max_epochs": 1, "val_check_interval": 1, "num_sanity_val_steps": 0, "model": model}
    fit(tmp_path, [3.0, 2.0], [recorder, BestCheckpoint(METRIC, tolerances=[0])], **settings)
    assert observed(tmp_path) == [f"E1_U{update}_B{batch}" for batch, update in enumerate(updates, start=1)]
    assert recorder.weights[0] != recorder.weights[1]
    assert FACE.kept(tmp_path)[""] == (f"E1_U{updates[1]}_B2", 2.0, recorder.weights[1])


class WithoutValidation(Model):
    """Logs in a step of training, as a mean of the epoch, or when the epoch is over."""

    validation_step = LightningModule.validation_step
    when = "step"

    def training_step(self, batch, batch_idx):
        value = self.values[min(self.current_epoch, len(self.values) - 1)]
        if self.when == "step":
            self.log(METRIC, value - 1 + 2 * batch_idx, on_step=False, on_epoch=True)
        return super().training_step(batch, batch_idx)

    def on_train_epoch_end(self):
        if self.when == "end":
            self.log(METRIC, self.values[min(self.current_epoch, len(self.values) - 1)])


class LogsAtTheEnd(WithoutValidation):
    when = "end"


@pytest.mark.parametrize("model", [WithoutValidation, LogsAtTheEnd])
def test_without_validation_each_training_epoch_is_observed(model, tmp_path):
    oracle = ModelCheckpoint(tmp_path, "best", monitor=METRIC)
    fit(tmp_path / "whole", VALUES, [BestCheckpoint(METRIC, tolerances=[1]), oracle], model=model)
    assert observed(tmp_path / "whole") == [f"E{step}_U{2 * step}_B{2 * step}" for step in range(1, 9)]
    assert FACE.kept(tmp_path / "whole")[""] == ("E6_U12_B12", 2.0, FACE.weights_of_checkpoint(tmp_path / "best.ckpt"))

    saved = ModelCheckpoint(tmp_path, "last", save_on_train_epoch_end=True)
    fit(tmp_path / "resumed", VALUES[:3], [saved, BestCheckpoint(METRIC, tolerances=[1])], model=model)
    resumed = BestCheckpoint(METRIC, tolerances=[1])
    fit(tmp_path / "resumed", VALUES, [resumed], model=model, ckpt_path=tmp_path / "last.ckpt")
    assert FACE.observed(tmp_path / "resumed") == FACE.observed(tmp_path / "whole")
    assert FACE.kept(tmp_path / "resumed") == FACE.kept(tmp_path / "whole")


def test_training_that_was_over_when_resumed_still_has_its_best(tmp_path):
    """A job may be started again for its test alone."""
    saved = ModelCheckpoint(tmp_path, "last", every_n_epochs=1)
    fit(tmp_path / "run", [3.0, 1.0, 2.0], [ended := BestCheckpoint(METRIC), saved])
    before = FACE.kept(tmp_path / "run")
    trainer = fit(tmp_path / "run", [3.0, 1.0, 2.0], [best := BestCheckpoint(METRIC)], ckpt_path=tmp_path / "last.ckpt")
    assert best.keeper.state == ended.keeper.state
    assert FACE.kept(tmp_path / "run") == before
    trainer.validate(module := trainer.lightning_module, trainer.val_dataloaders, ckpt_path="best", verbose=False)
    assert FACE.kept(tmp_path / "run")[""] == ("E2_U4_B4", 1.0, weights_of(module.state_dict()))


def test_checkpoint_without_a_state_is_not_named_as_the_way(tmp_path):
    fit(tmp_path / "plain", VALUES[:1], [ModelCheckpoint(tmp_path, "plain")])
    fit(tmp_path / "run", VALUES[:1], [BestCheckpoint(METRIC)])
    resume = (
        "resume it \\(resume='ledger' of BestCheckpoint, since the checkpoint has no state of best_model.loss.val\\)"
    )
    with pytest.raises(RunExistsError, match=resume):
        fit(tmp_path / "run", VALUES, [BestCheckpoint(METRIC)], ckpt_path=tmp_path / "plain.ckpt")


class EpochRecorder(Recorder):
    def on_train_epoch_end(self, trainer, pl_module):
        self.weights.append(face.whole_weights(trainer.model))


def test_epoch_is_kept_before_others_change_its_weights(tmp_path):
    """A callback that comes first puts an average into the model where training ends."""
    average, recorder = StochasticWeightAveraging(swa_lrs=0.1, swa_epoch_start=1), EpochRecorder()
    fit(tmp_path, [3, 2, 1], [average, BestCheckpoint(METRIC), recorder], model=WithoutValidation)
    assert FACE.kept(tmp_path)[""] == ("E3_U6_B6", 1.0, recorder.weights[2])


class InOddEpochs(WithoutValidation):
    """Logs in the first epoch and in each second one after it."""

    def training_step(self, batch, batch_idx):
        return Model.training_step(self, batch, batch_idx)

    def on_train_epoch_end(self):
        if self.current_epoch % 2 == 0:
            self.log(METRIC, self.values[self.current_epoch])


class InOddValidations(InOddEpochs):
    on_train_epoch_end = LightningModule.on_train_epoch_end

    def validation_step(self, batch, batch_idx):
        InOddEpochs.on_train_epoch_end(self)


class AfterEpochs(LogsAtTheEnd):
    def validation_step(self, batch, batch_idx):
        pass


@pytest.mark.parametrize(
    ("model", "settings", "trainer", "observed_before", "message"),
    [
        (InOddEpochs, {}, {}, ["E1_U2_B2"], "the training epoch"),
        (InOddValidations, {}, {}, ["E1_U2_B2"], "validation"),
        (AfterEpochs, {}, {"check_val_every_n_epoch": 2}, [], "validation"),
        (Model, {"every_n_train_steps": 3}, {}, [], "update 3"),
        (Model, {"every_n_train_steps": 2}, {"val_check_interval": 1}, [], "update 2"),
    ],
)
def test_value_of_other_weights_is_not_observed(model, settings, trainer, observed_before, message, tmp_path):
    """Lightning still has what was logged before."""
    best = BestCheckpoint(METRIC, **settings)
    with pytest.raises(MissingMetricError, match=f"logged before, but not again by the end of {message}"):
        fit(tmp_path, VALUES, [best], model=model, **trainer)
    assert observed(tmp_path) == observed_before


# What ends training, and when it is validated: in two epochs of two batches, or of one that was cut to an update.
@pytest.mark.parametrize(
    ("never", "once", "seen"),
    [
        ({"check_val_every_n_epoch": 3}, {"max_epochs": 3}, "E3_U6_B6"),
        ({"check_val_every_n_epoch": None, "val_check_interval": 5}, {"max_epochs": 3}, "E3_U5_B5"),
        ({"check_val_every_n_epoch": 2, "max_steps": 3}, {"max_steps": 4}, "E2_U4_B4"),
        ({"max_steps": 1}, {"val_check_interval": 1}, "E1_U1_B1"),
        ({"max_steps": 1}, {"accumulate_grad_batches": 2}, "E1_U1_B2"),
    ],
)
def test_validation_that_would_come_after_the_end_is_refused(tmp_path, never, once, seen):
    with pytest.raises(ConfigError, match=r"training ends before it is first validated.*max_epochs=2 and max_steps="):
        fit(tmp_path, VALUES[:2], [BestCheckpoint(METRIC)], **never)
    fit(tmp_path, VALUES[:2], [BestCheckpoint(METRIC)], **never | once)
    assert observed(tmp_path) == [seen]


def run_unreduced(directory):
    mean, identical = (BestCheckpoint(METRIC, metric_reduction=reduction) for reduction in ("mean", "identical"))
    fit(directory / "mean", VALUES, [mean], sync=False)
    with pytest.raises(MetricMismatchError, match=r"rank 0: -3\.0\n  rank 1: 13\.0"):
        fit(directory / "identical", VALUES, [identical], sync=False)
    return mean.keeper.best_metric_value


def test_values_not_reduced_by_lightning_are_reduced_or_refused(tmp_path):
    assert run_ranks(run_unreduced, 2, tmp_path) == [2.0, 2.0]


def test_two_of_one_metric_need_ids_and_have_states_of_their_own(tmp_path):
    with pytest.raises(RuntimeError, match="more than one stateful callback"):
        fit(tmp_path, VALUES, [BestCheckpoint(METRIC), BestCheckpoint(METRIC)], enable_checkpointing=True)
    both = [BestCheckpoint(METRIC), BestCheckpoint(METRIC, id="b", min_delta=2.5)]
    fit(tmp_path, VALUES[:2], both).save_checkpoint(tmp_path / "both.ckpt")
    both = [BestCheckpoint(METRIC), BestCheckpoint(METRIC, id="b", min_delta=2.5)]
    fit(tmp_path, VALUES[:6], both, ckpt_path=tmp_path / "both.ckpt")
    assert refs(tmp_path) == {"best_model.loss.val": "E6_U12_B12.r1", "best_model.loss.val.id=b": "E6_U12_B12.r1"}
    assert [str(each.keeper.state.best) for each in both] == ["2.0 at E6_U12_B12", "2.0 at E6_U12_B12"]


def test_weight_averaging_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="WeightAveraging"):
        fit(tmp_path, VALUES, [BestCheckpoint(METRIC), WeightAveraging()])
