"""Lightning's own ModelCheckpoint and EarlyStopping are the oracle of what is kept."""

from __future__ import annotations

import subprocess
import sys

import pytest
from pytorch_lightning import Callback
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint, WeightAveraging
from torch.distributed.fsdp import FullyShardedDataParallel

from keepbest.errors import ConfigError, MetricMismatchError, MissingMetricError, RunExistsError
from keepbest.integrations.lightning import BestCheckpoint
from tests.integrations.runs import METRIC, Peer, fit, kept, weights_of_checkpoint
from tests.kit.pool import run_ranks
from tests.kit.runs import ledger, refs, snapshots

VALUES = [5.0, 3.0, 4.0, 6.0, 3.5, 2.0, 7.0, 2.5]


def run(directory, strategy, settings):
    best = BestCheckpoint(METRIC, tolerances=[0, 1, 2], keep_top_k=3, **settings)
    peers = [Peer(directory / str(k), monitor=METRIC, save_top_k=k, filename="{epoch}") for k in (1, 3)]
    fit(directory, VALUES, [*peers, best], strategy=strategy)
    return best.keeper.state, {str(path): value.item() for path, value in peers[1].best_k_models.items()}


@pytest.mark.parametrize(
    ("strategy", "world_size", "settings"),
    [
        ("alone", 1, {}),
        ("ddp", 2, {}),
        ("ddp", 2, {"async_save": True, "format": "safetensors"}),
        ("fsdp2", 2, {}),
        ("fsdp2", 2, {"format": "dcp"}),
    ],
)
def test_best_and_top_k_are_those_of_model_checkpoint(strategy, world_size, settings, tmp_path):
    results = run_ranks(run, world_size, tmp_path, strategy, settings, init=world_size > 1)
    states, top = [result[0] for result in results], results[0][1]
    assert states == [states[0]] * world_size
    found = kept(tmp_path)
    [path] = (tmp_path / "1").iterdir()
    assert found[""] == ("E6_U12", 2.0, weights_of_checkpoint(path))
    ours = sorted(found[f".top={place}"][1:] for place in (1, 2, 3))
    assert ours == sorted((value, weights_of_checkpoint(path)) for path, value in top.items())
    assert len({str(weights) for _, weights in ours}) == 3


class Recorder(Callback):
    """The whole weights at the end of each validation, put together by FSDP1."""

    def __init__(self):
        self.weights = []

    def on_validation_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            with FullyShardedDataParallel.summon_full_params(trainer.model, writeback=False):
                self.weights.append([parameter.tolist() for parameter in pl_module.parameters()])


def run_fsdp1(directory):
    recorder = Recorder()
    # Nothing is compared with ModelCheckpoint: where there is no GPU, torch crashes when Lightning reads the weights.
    best = BestCheckpoint(METRIC, keep_top_k=3, model_names=["layers"])
    fit(directory, VALUES, [recorder, best], strategy="fsdp1", enable_checkpointing=False)
    return recorder.weights


def test_weights_of_fsdp1_are_kept_whole_and_under_plain_names(tmp_path):
    recorded = run_ranks(run_fsdp1, 2, tmp_path)[0]
    found = kept(tmp_path)
    for ref, epoch in {"": 6, ".top=1": 6, ".top=2": 8, ".top=3": 2}.items():
        iteration, value, weights = found[ref]
        assert (iteration, value) == (f"E{epoch}_U{2 * epoch}", VALUES[epoch - 1])
        parameters = [weight for name, weight in weights.items() if name.endswith(("weight", "bias"))]
        assert parameters == recorded[epoch - 1]


def stop_early(directory):
    """What ModelCheckpoint keeps in a run of its own for each patience."""
    found = {}
    for patience in (1, 2, 3):
        only = Peer(directory / str(patience), monitor=METRIC, save_top_k=1)
        trainer = fit(directory, VALUES, [only, EarlyStopping(METRIC, patience=patience)])
        found[patience] = trainer.current_epoch, only.best_model_path, only.best_model_score.item()
    return found


def test_tolerance_keeps_what_early_stopping_with_one_more_of_patience_would_have_kept(tmp_path):
    run_ranks(run, 2, tmp_path / "run", "ddp", {})
    stopped = run_ranks(stop_early, 2, tmp_path / "peer")[0]
    assert [epochs for epochs, *_ in stopped.values()] == [3, 4, 5]  # none of them saw the best of all
    found = kept(tmp_path / "run")
    for patience, (_, path, value) in stopped.items():
        assert found[f".tolerance={patience - 1}"] == ("E2_U4", value, weights_of_checkpoint(path))


def run_in_pieces(directory, pieces, settings):
    """Trains piece by piece, each from the last checkpoint of the one before; a piece may end in the middle."""
    state = None
    for number, (values, fails_at) in enumerate(pieces):
        best = BestCheckpoint(METRIC, tolerances=[0, 1, 2], keep_top_k=3, **settings.get("best", {}))
        last = ModelCheckpoint(directory / "last", **{"save_last": True, "filename": "any", **settings.get("last", {})})
        path = directory / "last" / "last.ckpt" if number else None
        arguments = {"ckpt_path": path, "fails_at": fails_at, **settings.get("fit", {})}
        if fails_at is None:
            fit(directory, values, [best, last], **arguments)
        else:
            with pytest.raises(ZeroDivisionError):
                fit(directory, values, [best, last], **arguments)
        state = best.keeper.state
    return state


@pytest.mark.parametrize(
    ("pieces", "settings"),
    [
        ([(VALUES[:3], None), (VALUES, None)], {"last": {"save_top_k": 0}}),  # writes when training has ended
        ([(VALUES[:5], None), (VALUES, None)], {"last": {"save_on_train_epoch_end": False}}),
        ([(VALUES, 4), (VALUES, 7), (VALUES, None)], {"best": {"async_save": True}}),
        ([(VALUES, 7), (VALUES, None)], {"last": {"every_n_epochs": 2}}),
        ([(VALUES[:3], None), (VALUES, None)], {"last": {"save_on_train_epoch_end": True}}),
        ([(VALUES, 5), (VALUES, None)], {"fit": {"strategy": "fsdp2"}}),
    ],
)
def test_run_that_goes_on_from_a_checkpoint_ends_like_one_that_was_never_stopped(pieces, settings, tmp_path):
    whole = run_ranks(run_in_pieces, 2, tmp_path / "whole", [(VALUES, None)], settings)
    resumed = run_ranks(run_in_pieces, 2, tmp_path / "resumed", pieces, settings)
    assert resumed == whole
    assert kept(tmp_path / "resumed") == kept(tmp_path / "whole")
    assert len(refs(tmp_path / "whole")) == 7


@pytest.mark.parametrize(
    "settings",
    [
        {"fit": {"val_check_interval": 1}, "last": {"save_on_train_epoch_end": False}},
        {"last": {"every_n_train_steps": 3}},
    ],
)
def test_run_that_goes_on_from_within_an_epoch_observes_what_one_that_was_never_stopped_does(settings, tmp_path):
    whole = run_ranks(run_in_pieces, 2, tmp_path / "whole", [(VALUES, None)], settings)
    resumed = run_ranks(run_in_pieces, 2, tmp_path / "resumed", [(VALUES, 5), (VALUES, None)], settings)
    assert resumed == whole

    def without_weights(directory):
        # Lightning reads the data of the epoch from its start again.
        return {ref: entry[:2] for ref, entry in kept(directory).items()}

    assert without_weights(tmp_path / "resumed") == without_weights(tmp_path / "whole")


def test_what_the_newest_checkpoint_names_is_there_though_a_better_one_came_later(tmp_path):
    last = ModelCheckpoint(tmp_path / "last", filename="any", every_n_epochs=2)
    with pytest.raises(ZeroDivisionError):
        fit(tmp_path, [5.0, 3.0, 2.0, 9.0], [BestCheckpoint(METRIC, tolerances=[1]), last], fails_at=4)
    assert (set(refs(tmp_path).values()), snapshots(tmp_path)) == ({"E3_U6"}, {"E2_U4", "E3_U6"})
    resumed = BestCheckpoint(METRIC, tolerances=[1])
    fit(tmp_path, [5.0, 3.0, 7.0, 7.0], [resumed], ckpt_path=last.best_model_path, enable_checkpointing=False)
    found = kept(tmp_path)
    assert found[".tolerance=1"] == ("E2_U4", 3.0, weights_of_checkpoint(last.best_model_path))
    assert found[""][:2] == ("E3_U6", 2.0)


def observed(directory):
    return [line["iteration"] for line in ledger(directory) if line["event"] == "observation"]


def test_validations_that_are_not_of_the_training_are_not_observed(tmp_path):
    best = BestCheckpoint(METRIC, directory=tmp_path / "best")
    trainer = fit(tmp_path, VALUES[:2], [best], num_sanity_val_steps=2)
    trainer.validate(trainer.lightning_module, trainer.val_dataloaders, verbose=False)
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    assert observed(tmp_path / "best") == ["E1_U2", "E2_U4"]
    fit(tmp_path / "dev", VALUES, [BestCheckpoint(METRIC)], fast_dev_run=True)
    assert not (tmp_path / "dev").exists()


def test_run_that_failed_is_left_as_it_was_and_never_overwritten(tmp_path):
    failing = BestCheckpoint(METRIC, tolerances=[5])
    with pytest.raises(ZeroDivisionError):
        fit(tmp_path, VALUES, [failing, ModelCheckpoint(tmp_path, "any", save_on_exception=True)], fails_at=3)
    before = ledger(tmp_path)
    assert (before[-1]["event"], list(refs(tmp_path))) == ("pin", ["best_model.loss.val"])
    with pytest.raises(RunExistsError, match="resume it"):
        fit(tmp_path, VALUES, [BestCheckpoint(METRIC)], enable_checkpointing=False)
    assert ledger(tmp_path) == before
    goes_on = BestCheckpoint(METRIC, tolerances=[5])
    fit(tmp_path, VALUES[:4], [goes_on], ckpt_path=tmp_path / "any.ckpt", enable_checkpointing=False)
    assert observed(tmp_path) == ["E1_U2", "E2_U4", "E3_U6", "E4_U8"]
    assert set(refs(tmp_path)) == {"best_model.loss.val", "best_model.loss.val.tolerance=5"}  # closed


def test_run_that_failed_before_its_first_checkpoint_may_start_over_in_its_folder(tmp_path):
    failing, whole = [BestCheckpoint(METRIC, tolerances=[0, 1], resume="ledger") for _ in range(2)]
    with pytest.raises(ZeroDivisionError):
        fit(tmp_path, VALUES, [failing], enable_checkpointing=False, fails_at=5)
    fit(tmp_path, VALUES, [whole], enable_checkpointing=False)
    assert {ref: entry[:2] for ref, entry in kept(tmp_path).items()} == {
        "": ("E6_U12", 2.0),
        ".tolerance=0": ("E2_U4", 3.0),
        ".tolerance=1": ("E2_U4", 3.0),
    }


def test_metric_that_was_not_logged_is_told_with_those_that_were(tmp_path):
    with pytest.raises(MissingMetricError, match="'acc/val' was not logged by the end of validation; logged: loss/val"):
        fit(tmp_path, VALUES, [BestCheckpoint("acc/val")], enable_checkpointing=False)


def run_unreduced(directory, reduction):
    best = BestCheckpoint(METRIC, metric_reduction=reduction)
    fit(directory, VALUES, [best], sync=False, enable_checkpointing=False)
    return best.keeper.best_metric_value


def test_values_that_lightning_did_not_reduce_are_reduced_or_refused(tmp_path):
    assert run_ranks(run_unreduced, 2, tmp_path / "mean", "mean") == [2.0, 2.0]
    with pytest.raises(MetricMismatchError, match=r"rank 0: -3\.0\n  rank 1: 13\.0"):
        run_ranks(run_unreduced, 2, tmp_path / "identical", "identical")


def test_two_of_one_metric_need_ids_and_have_states_of_their_own(tmp_path):
    with pytest.raises(RuntimeError, match="more than one stateful callback"):
        fit(tmp_path, VALUES, [BestCheckpoint(METRIC), BestCheckpoint(METRIC)])
    both = [BestCheckpoint(METRIC), BestCheckpoint(METRIC, id="b", min_delta=2.5)]
    fit(tmp_path, VALUES[:2], both, enable_checkpointing=False).save_checkpoint(tmp_path / "both.ckpt")
    both = [BestCheckpoint(METRIC), BestCheckpoint(METRIC, id="b", min_delta=2.5)]
    fit(tmp_path, VALUES[:6], both, ckpt_path=tmp_path / "both.ckpt", enable_checkpointing=False)
    assert refs(tmp_path) == {"best_model.loss.val": "E6_U12.r1", "best_model.loss.val.id=b": "E6_U12.r1"}
    assert [str(each.keeper.state.best) for each in both] == ["2.0 at E6_U12", "2.0 at E6_U12"]


def test_averaged_weights_that_were_validated_are_not_confused_with_those_in_training(tmp_path):
    with pytest.raises(ConfigError, match="WeightAveraging"):
        fit(tmp_path, VALUES, [BestCheckpoint(METRIC), WeightAveraging()], enable_checkpointing=False)


def test_lightning_is_imported_by_nobody_who_does_not_use_it():
    program = """
import pkgutil, sys, keepbest
for module in pkgutil.walk_packages(keepbest.__path__, "keepbest."):
    if module.name not in ("keepbest.__main__", "keepbest.integrations.lightning"):
        __import__(module.name)
print([name for name in sys.modules if "lightning" in name.split(".")[0]])
"""
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert loaded.stdout == "[]\n"
