"""How trainers of Lightning are used: within epochs, more than once, from either package."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from pytorch_lightning import Trainer
from pytorch_lightning.callbacks import Callback, EarlyStopping, LearningRateFinder, ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset

from keepbest import load
from keepbest.errors import ConfigError, MissingMetricError
from keepbest.integrations.lightning import BestCheckpoint
from tests.integrations.faces.face import VALUES, failing, weights_of
from tests.integrations.faces.lightning import METRIC, Lightning, Model, Peer, fit
from tests.integrations.test_lightning_best import note_what_is_tested
from tests.kit.runs import ledger, refs

FACE = Lightning()


class LogsSteps(Model):
    """Logs the next of its values in each batch of training."""

    def training_step(self, batch, batch_idx):
        self.log("loss/train", self.values[(2 * self.current_epoch + batch_idx) % len(self.values)])
        return super().training_step(batch, batch_idx)


# Ends of the interval that observes: every update, every third, and every second where an update takes two batches.
@pytest.mark.parametrize(
    ("every", "settings", "steps", "best"),
    [
        (1, {}, range(1, 9), "E3_U6_B6"),
        (3, {}, [3, 6], "E3_U6_B6"),
        (2, {"accumulate_grad_batches": 2, "max_epochs": 4}, [2, 4], "E4_U4_B8"),
    ],
)
def test_training_metric_is_observed_after_updates(every, settings, steps, best, tmp_path):
    adapter = BestCheckpoint("loss/train", every_n_train_steps=every, tolerances=[0])
    oracle = ModelCheckpoint(tmp_path, "best", monitor="loss/train", every_n_train_steps=every)
    settings = {"max_epochs": 4, "model": LogsSteps, **settings}
    # Lightning leaves a checkpoint at the last batch of an epoch to the validation that follows.
    trainer = fit(tmp_path, VALUES, [oracle, adapter], limit_val_batches=0, **settings)
    assert [entry["iteration"].split("_")[1] for entry in observations(tmp_path)] == [f"U{step}" for step in steps]
    [(ref, *_), *_] = refs(tmp_path).items()
    loaded = load(tmp_path, ref, model := Model())
    assert (str(loaded.iteration), loaded.value) == (best, oracle.best_model_score.item())
    assert weights_of(model.state_dict()) == FACE.weights_of_checkpoint(oracle.best_model_path)
    assert trainer.global_step >= max(steps)


def observations(directory):
    return [line for line in ledger(directory) if line["event"] == "observation"]


def test_validations_are_not_observed_beside_updates(tmp_path):
    fit(tmp_path, VALUES[:4], [BestCheckpoint("loss/train", every_n_train_steps=3)], model=LogsSteps)
    assert [line["iteration"] for line in observations(tmp_path)] == ["E2_U3_B3", "E3_U6_B6"]


def test_run_resumed_between_updates_observes_the_same(tmp_path):
    def train(name, fails_at=None, ckpt_path=None):
        adapter = BestCheckpoint("loss/train", every_n_train_steps=1, tolerances=[0, 1])
        saves = ModelCheckpoint(tmp_path / name / "saved", "any", every_n_train_steps=1, save_last=True)
        with failing(fails_at):
            resumed = {"fails_at": fails_at, "ckpt_path": ckpt_path}
            fit(tmp_path / name, VALUES, [adapter, saves], max_epochs=4, model=LogsSteps, **resumed)
        return adapter.keeper.state

    whole = train("whole")
    train("parts", fails_at=3)
    assert train("parts", ckpt_path=tmp_path / "parts" / "saved" / "last.ckpt") == whole
    ref = "best_model.loss.train"
    assert FACE.observed(tmp_path / "parts", ref) == FACE.observed(tmp_path / "whole", ref)


@pytest.mark.parametrize(
    ("every", "message"), [(5, "before update 5.*it makes 4 updates"), (0, "must be an integer of at least 1")]
)
def test_number_of_updates_that_never_comes_is_refused(every, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        fit(tmp_path, VALUES[:2], [BestCheckpoint("loss/train", every_n_train_steps=every)], model=LogsSteps)


def test_trainer_that_fits_again_continues_in_its_folder(tmp_path):
    whole, parts = (BestCheckpoint(METRIC, tolerances=[0, 5]) for _ in range(2))
    fit(tmp_path / "whole", VALUES, [whole])
    trainer = fit(tmp_path / "parts", VALUES, [parts], max_epochs=3)
    module, data = trainer.lightning_module, (trainer.train_dataloader, trainer.val_dataloaders)
    trainer.save_checkpoint(tmp_path / "older.ckpt")
    trainer.fit_loop.max_epochs = 4
    trainer.fit(module, *data)
    trainer.validate(module, data[1], ckpt_path=tmp_path / "older.ckpt", verbose=False)
    trainer.fit_loop.max_epochs = 8
    trainer.fit(module, *data)
    assert FACE.observed(tmp_path / "parts") == FACE.observed(tmp_path / "whole")
    assert parts.keeper.state == whole.keeper.state
    assert {ref: entry[:2] for ref, entry in FACE.kept(tmp_path / "parts").items()} == {
        ref: entry[:2] for ref, entry in FACE.kept(tmp_path / "whole").items()
    }


class LooksBetweenEpochs(LearningRateFinder):
    """Finds another learning rate before the third epoch, and restores what it has changed from a checkpoint."""

    def on_fit_start(self, trainer, pl_module):
        pass

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 2:
            self.lr_find(trainer, pl_module)


class HasRate(Model):
    lr = 0.1


def test_search_for_a_learning_rate_within_training(tmp_path):
    adapter, peer = BestCheckpoint(METRIC, tolerances=[0, 5]), Peer(tmp_path, 1)
    fit(tmp_path, VALUES, [adapter, peer, LooksBetweenEpochs(num_training_steps=9)], model=HasRate)
    fit(tmp_path / "without", VALUES, [without := BestCheckpoint(METRIC, tolerances=[0, 5])])
    assert adapter.keeper.state == without.keeper.state
    assert FACE.kept(tmp_path)[""][1:] == peer.ours(FACE)[0]


class LoadsAnother(Callback):
    def on_train_epoch_start(self, trainer, pl_module):
        [adapter] = [each for each in trainer.callbacks if isinstance(each, BestCheckpoint)]
        if trainer.current_epoch == 0:
            self.first = adapter.state_dict()
        else:
            adapter.load_state_dict(self.first)


def test_other_state_is_not_loaded_within_training(tmp_path):
    with pytest.raises(ConfigError, match=r"trains already.*another fit\(ckpt_path=...\)"):
        fit(tmp_path, VALUES, [BestCheckpoint(METRIC), LoadsAnother()])


QUIET = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def test_state_of_a_validated_checkpoint_is_not_continued(tmp_path):
    data = fit(tmp_path / "old", VALUES[:3], [BestCheckpoint(METRIC), ModelCheckpoint(tmp_path, "old")]).val_dataloaders
    best = BestCheckpoint(METRIC, directory=tmp_path / "new")
    trainer = Trainer(max_epochs=2, enable_checkpointing=False, callbacks=[best], **QUIET)
    trainer.validate(module := Model(VALUES), data, ckpt_path=tmp_path / "old.ckpt", verbose=False)
    trainer.fit(module, data, data)
    assert FACE.observed(tmp_path / "new") == [("E1_U2_B2", 5.0), ("E2_U4_B4", 3.0)]


class Fixed(Model):
    def configure_optimizers(self):
        return None

    def training_step(self, batch, batch_idx):
        return None


def test_module_without_an_optimizer_has_no_state_of_one(tmp_path):
    fit(tmp_path, VALUES[:2], [BestCheckpoint(METRIC, save_training_state=True)], model=Fixed)
    load(tmp_path, FACE.ref, model := Model())
    assert weights_of(model.state_dict()) == weights_of(Fixed().state_dict())


@pytest.mark.parametrize(
    ("wrong", "right"), [("directry", "directory"), ("dirpath", "directory"), ("mode", "higher_is")]
)
def test_arguments_of_the_callback_are_named_too(wrong, right):
    with pytest.raises(ConfigError, match=rf"there is no setting '{wrong}'; did you mean '{right}") as caught:
        BestCheckpoint(METRIC, **{wrong: "there"})
    assert "metric_key, directory, every_n_train_steps," in str(caught.value)


def test_barebones_trainer_that_logs_nothing_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="with barebones=True Lightning logs nothing"):
        fit(tmp_path, VALUES[:2], [BestCheckpoint(METRIC)], barebones=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("check_finite", [True, False])
def test_nan_counts_as_an_interval_and_ends_no_training(check_finite, tmp_path):
    values = [5.0, math.nan, 4.0, math.nan, 6.0, 3.0]
    fit(tmp_path, values, [BestCheckpoint(METRIC, tolerances=[0, 1])])
    found = {ref: entry[1] for ref, entry in FACE.kept(tmp_path).items()}
    assert found == {"": 3.0, ".tolerance=0": 5.0, ".tolerance=1": 4.0}
    stopper = EarlyStopping(METRIC, patience=2, check_finite=check_finite)
    trainer = fit(tmp_path / "stopped", values, [only := Peer(tmp_path, 1), stopper])
    # With it Lightning stops at the first NaN, with any patience. Without it, it stops as the tolerance says.
    assert trainer.current_epoch == (2 if check_finite else 5)
    assert only.best_model_score.item() == (5.0 if check_finite else 4.0)


def test_trainer_of_the_other_package_takes_the_callback(tmp_path):
    reason = "the package lightning is not installed"
    lightning = pytest.importorskip("lightning.pytorch", reason=reason, exc_type=ImportError)
    warnings.simplefilter("ignore")

    class Other(lightning.LightningModule):
        def __init__(self, width=3):
            super().__init__()
            self.save_hyperparameters()
            self.layer = torch.nn.Linear(width, 1)

        def training_step(self, batch, batch_idx):
            return self.layer(batch[0]).square().mean()

        def validation_step(self, batch, batch_idx):
            self.log(METRIC, VALUES[self.current_epoch])

        test_step = note_what_is_tested

        configure_optimizers = Model.configure_optimizers

    best = BestCheckpoint(METRIC, directory=tmp_path)
    trainer = lightning.Trainer(max_epochs=3, enable_checkpointing=False, callbacks=[best], **QUIET)
    batches = DataLoader(TensorDataset(torch.randn(4, 5)), batch_size=2)
    wrong = lightning.Trainer(callbacks=[BestCheckpoint("val/loss", directory=tmp_path / "wrong")], **QUIET)
    with pytest.raises(MissingMetricError, match=r"sanity check; .*did you mean 'loss/val'"):
        wrong.fit(Other(width=5), batches, batches)
    trainer.fit(module := Other(width=5), batches, batches)
    trainer.test(module, batches, ckpt_path="best", verbose=False)
    loaded = Other.load_from_checkpoint(best.best_model_path)
    assert weights_of(loaded.state_dict()) == module.tested
    assert refs(tmp_path) == {FACE.ref: "E2_U4_B4"}
