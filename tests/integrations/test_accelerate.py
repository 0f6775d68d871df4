"""What Accelerate itself puts together and saves is the oracle of what is kept."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from accelerate.utils import DistributedType, ProjectConfiguration

from keepbest import TrainingIteration
from keepbest.errors import ConfigError, RunExistsError
from keepbest.integrations.accelerate import AcceleratedKeeper
from tests.integrations.accelerate_runs import Loop, run_in_pieces
from tests.integrations.trainer_runs import VALUES, Model, kept, observed, weights_of_checkpoint
from tests.kit.pool import run_ranks
from tests.kit.runs import refs, snapshots


def run(directory, strategy, settings):
    loop = Loop(directory, strategy, tolerances=[0, 1, 2], keep_top_k=3, **settings)
    loop.train()
    return loop.keeper.state, loop.weights


@pytest.mark.parametrize(
    ("strategy", "world_size", "settings"),
    [
        ("ddp", 1, {}),
        ("ddp", 2, {"async_save": True}),
        ("fsdp1", 2, {}),
        ("fsdp2", 2, {}),
        ("fsdp2", 2, {"format": "dcp"}),
    ],
)
def test_what_is_kept_has_the_weights_that_the_model_had_then(strategy, world_size, settings, tmp_path):
    results = run_ranks(run, world_size, tmp_path, strategy, settings, init=world_size > 1)
    assert [state for state, _ in results] == [results[0][0]] * world_size
    found, weights = kept(tmp_path), results[0][1]
    steps = {"": 6, ".top=1": 6, ".top=2": 8, ".top=3": 2, ".tolerance=0": 2, ".tolerance=1": 2, ".tolerance=2": 2}
    assert found == {ref: (f"U{step}", VALUES[step - 1], weights[step]) for ref, step in steps.items()}
    assert len({str(each) for each in weights.values()}) == len(VALUES)


def run_whole_and_in_pieces(directory, pieces, settings):
    whole = run_in_pieces(directory / "whole", [(None, pieces[-1][1])], settings)
    return whole, run_in_pieces(directory / "resumed", pieces, settings)


@pytest.mark.parametrize(
    ("pieces", "settings"),
    [
        ([(4, 1), (7, 1), (None, 1)], {"async_save": True}),
        ([(6, 2), (None, 2)], {}),
        ([(6, 2), (None, 2)], {"strategy": "fsdp1"}),
        ([(6, 2), (None, 2)], {"strategy": "fsdp2"}),
    ],
)
def test_run_that_goes_on_from_a_saved_state_ends_like_one_that_was_never_stopped(pieces, settings, tmp_path):
    results = run_ranks(run_whole_and_in_pieces, 2, tmp_path, pieces, settings)
    for whole, resumed in results:
        assert resumed == whole == results[0][0]
    assert kept(tmp_path / "resumed") == kept(tmp_path / "whole")
    assert observed(tmp_path / "resumed") == observed(tmp_path / "whole") != []
    assert len(refs(tmp_path / "whole")) == 7


def keep_then_fail(directory, values, fails_at, resume_from=None):
    loop = Loop(directory, tolerances=[1])
    arguments = {"values": values, "save_every": 2, "save_to": directory / "state", "resume_from": resume_from}
    if fails_at is None:
        loop.train(**arguments)
    else:
        with pytest.raises(ZeroDivisionError):
            loop.train(fails_at=fails_at, **arguments)
    return loop


def test_what_the_newest_state_names_is_there_though_a_better_one_came_later(tmp_path):
    keep_then_fail(tmp_path, [5.0, 3.0, 2.0, 9.0], 4)
    assert (set(refs(tmp_path).values()), snapshots(tmp_path)) == ({"U3"}, {"U2", "U3"})
    of_accelerate = weights_of_checkpoint(tmp_path / "state")
    keep_then_fail(tmp_path, [5.0, 3.0, 7.0, 7.0], None, tmp_path / "state")
    found = kept(tmp_path)
    assert found[".tolerance=1"] == ("U2", 3.0, of_accelerate)
    assert found[""][:2] == ("U3", 2.0)


def test_state_may_be_saved_before_the_start_and_after_the_end(tmp_path):
    loop = Loop(tmp_path / "best", project=ProjectConfiguration(tmp_path, automatic_checkpoint_naming=True))
    loop.accelerator.save_state()
    loop.train(VALUES[:3], save_every=1)
    loop.accelerator.save_state()
    resumed = Loop(tmp_path / "best")
    resumed.train(resume_from=tmp_path / "checkpoints" / "checkpoint_4")
    assert observed(tmp_path / "best") == [(f"U{number}", value) for number, value in enumerate(VALUES, start=1)]


def test_folder_that_accelerate_tidies_up_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="give the keeper a directory of its own"):
        Loop(tmp_path, project=ProjectConfiguration(str(tmp_path), automatic_checkpoint_naming=True, total_limit=1))


def test_run_that_is_not_resumed_is_never_overwritten(tmp_path):
    keep_then_fail(tmp_path, VALUES, 5)
    with pytest.raises(RunExistsError, match="resume it"):
        Loop(tmp_path).train()
    loop = Loop(tmp_path)
    loop.keeper.abandon()
    loop.accelerator.save_state(tmp_path / "other")  # nothing is pinned for a run that was left
    with pytest.raises(ConfigError, match="too late"):
        loop.accelerator.load_state(tmp_path / "state")


def test_keepers_of_two_metrics_are_saved_with_each_other(tmp_path):
    loop = Loop(tmp_path)
    other = AcceleratedKeeper(loop.accelerator, loop.model, directory=tmp_path, metric_key="loss")
    with other:
        other.observe(1.0, TrainingIteration(update=1))
        loop.train(VALUES[:2], save_every=1, save_to=tmp_path / "state")
    loop = Loop(tmp_path)
    other = AcceleratedKeeper(loop.accelerator, loop.model, directory=tmp_path, metric_key="loss")
    loop.accelerator.load_state(tmp_path / "state")
    assert (loop.keeper.best_metric_value, other.best_metric_value) == (3.0, 1.0)


@pytest.mark.parametrize("kind", [DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM])
def test_libraries_that_have_the_weights_to_themselves_are_refused(kind, tmp_path):
    with pytest.raises(ConfigError, match=f"one of {kind.value}, whose weights keepbest cannot gather"):
        AcceleratedKeeper(SimpleNamespace(distributed_type=kind), Model(), directory=tmp_path, metric_key="loss")
