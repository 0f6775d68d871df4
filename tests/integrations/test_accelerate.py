"""The contract, and what only the keeper of Accelerate does."""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import pytest
import torch.distributed as dist
from accelerate.utils import DistributedType, ProjectConfiguration

from keepbest import TrainingIteration
from keepbest.errors import ConfigError, DesyncError, RunExistsError
from keepbest.integrations.accelerate import AcceleratedKeeper
from tests.integrations.contract import Contract, assert_continues
from tests.integrations.faces.accelerate import Accelerate, Loop
from tests.integrations.faces.face import VALUES, failing
from tests.integrations.faces.on_accelerate import Model
from tests.kit.pool import run_ranks
from tests.kit.runs import snapshots

FACE = Accelerate()


class TestContract(Contract):
    face = FACE


def test_state_may_be_saved_before_the_start_and_after_the_end(tmp_path):
    loop = Loop(tmp_path / "best", {}, project=ProjectConfiguration(tmp_path, automatic_checkpoint_naming=True))
    loop.accelerator.save_state()
    loop.train(VALUES[:3], save_every=1)
    loop.accelerator.save_state()
    resumed = Loop(tmp_path / "best", {})
    resumed.train(resume_from=tmp_path / "checkpoints" / "checkpoint_4")
    assert FACE.observed(tmp_path / "best") == [(f"U{number}", value) for number, value in enumerate(VALUES, start=1)]


@pytest.mark.parametrize("accelerator", [Model(), None], ids=["model", "nothing"])
def test_what_is_no_accelerator_is_refused(accelerator, tmp_path):
    with pytest.raises(ConfigError, match="expected an Accelerator first, and then the model; found"):
        AcceleratedKeeper(accelerator, Model(), directory=tmp_path, metric_key="loss")


def test_optimizer_of_the_best_can_be_loaded(tmp_path):
    loop, fresh = Loop(tmp_path), Loop(tmp_path)
    for each in (loop, fresh):
        each.optimizer.param_groups[0]["momentum"] = 0.9
    loop.keepers = [loop.keeper(directory=tmp_path, training_state={"optimizer": loop.optimizer})]
    loop.train([3.0, 2.0])
    assert_continues(tmp_path, fresh.model, fresh.optimizer, like=loop.optimizer)


def test_folder_that_accelerate_tidies_up_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="give the keeper a directory of its own"):
        Loop(tmp_path, {}, project=ProjectConfiguration(str(tmp_path), automatic_checkpoint_naming=True, total_limit=1))


def test_keeper_of_a_cell_that_failed_makes_room_for_the_next(tmp_path):
    loop = Loop(tmp_path, {})
    with failing(4):
        loop.train(VALUES, save_every=1, fails_at=4, save_to=tmp_path / "state")
    left = loop.keepers.pop()
    assert snapshots(tmp_path) == {"U2"}
    loop.keepers.append(loop.keeper(directory=tmp_path))  # of the same accelerator, in the same process
    loop.train(VALUES, save_every=1, resume_from=tmp_path / "state", save_to=tmp_path / "state")
    assert FACE.observed(tmp_path) == [(f"U{number}", value) for number, value in enumerate(VALUES, start=1)]
    assert (left.best_metric_value, loop.keepers[0].best_metric_value) == (3.0, 2.0)


def test_second_training_of_an_accelerator_is_resumed_alone(tmp_path):
    first, state = tmp_path / "first", tmp_path / "state"
    loop = Loop(first, {})
    loop.train(VALUES[:2], save_every=1, save_to=state)
    loop.update, loop.keepers = 0, [loop.keeper(directory=tmp_path / "second")]
    loop.train(VALUES[2:5], save_every=1, save_to=state)
    (tmp_path / "second").rename(tmp_path / "moved")
    resumed = Loop(tmp_path / "moved", {})
    with pytest.raises(ConfigError, match=r"states of keepers in .*first, .*second, and this one is in .*moved"):
        resumed.accelerator.load_state(state)
    (tmp_path / "moved").rename(tmp_path / "second")
    resumed = Loop(tmp_path / "second", {})
    resumed.train(VALUES[2:], resume_from=state)
    assert [value for _, value in FACE.observed(tmp_path / "second")] == VALUES[2:]
    assert len(FACE.observed(first)) == 2


def test_directory_of_a_run_may_be_moved_before_it_is_resumed(tmp_path):
    failed = FACE.train(tmp_path / "first", VALUES, fails_at=5)
    (tmp_path / "first").rename(tmp_path / "moved")
    FACE.train(tmp_path / "moved", VALUES, resume_from=tmp_path / "moved" / failed.checkpoint.name)
    assert len(FACE.observed(tmp_path / "moved")) == len(VALUES)


def test_state_that_was_saved_without_the_keeper_is_loaded(tmp_path):
    loop = Loop(tmp_path)
    loop.train(VALUES[:2], save_every=2, save_to=tmp_path / "state")
    joined = Loop(tmp_path / "run", {})
    joined.train(VALUES, resume_from=tmp_path / "state")
    assert [name for name, _ in FACE.observed(tmp_path / "run")] == ["U3", "U4", "U5", "U6", "U7", "U8"]
    again = Loop(tmp_path / "run", {})
    with pytest.raises(RunExistsError, match=r"resume it \(resume='ledger', since .*state has no state of best_model"):
        again.train(VALUES, resume_from=tmp_path / "state")


def test_state_is_not_loaded_into_a_keeper_that_has_started(tmp_path):
    loop = Loop(tmp_path, {})
    with loop.keepers[0]:
        loop.accelerator.save_state(tmp_path / "state")
        with pytest.raises(ConfigError, match="load_state comes too late for the keeper of eval_score"):
            loop.accelerator.load_state(tmp_path / "state")
    loop.accelerator.load_state(tmp_path / "state")  # to evaluate it, after training


def test_save_that_was_cut_off_after_the_keeper_is_resumed(tmp_path):
    whole = Loop(tmp_path / "whole", {})
    whole.train(VALUES, save_every=1, save_to=tmp_path / "ignored")
    loop, state, older = Loop(tmp_path / "run", {}), tmp_path / "state", tmp_path / "older"
    with failing(4):
        loop.train(VALUES, save_every=1, fails_at=4, save_to=state)
    again = Loop(tmp_path / "run-of-two", {})
    with failing(3):
        again.train(VALUES, save_every=1, fails_at=3, save_to=older)
    for file in older.iterdir():  # all that is written after the keeper's state
        if not file.name.startswith("keepbest."):
            (state / file.name).write_bytes(file.read_bytes())
    resumed = Loop(tmp_path / "run", {})
    resumed.train(VALUES, resume_from=state)
    assert FACE.observed(tmp_path / "run") == FACE.observed(tmp_path / "whole")
    assert resumed.keepers[0].state == whole.keepers[0].state


def load_what_is_damaged(directory):
    loop = Loop(directory, {})
    loop.accelerator.save_state(directory / "state")
    if dist.get_rank() == 0:
        (directory / "state" / "keepbest.best_model.eval_score.json").write_text("{")
    dist.barrier()
    for use in (loop.accelerator.load_state, loop.accelerator.save_state):
        with pytest.raises(ConfigError, match=r"expected the states of keepers in .*eval_score.json, which is damaged"):
            use(directory / "state")
    return loop.update


def load_from_two_hosts(directory):
    saved, mine = directory / "state", directory / f"state-{dist.get_rank()}"
    loop = Loop(directory / "run", {})
    with failing(4):
        loop.train(VALUES, save_every=1, fails_at=4, save_to=saved)
    dist.barrier()
    left_out = shutil.ignore_patterns("keepbest.*") if dist.get_rank() else None
    shutil.copytree(saved, mine, ignore=left_out)
    resumed = Loop(directory / "run", {})
    resumed.train(VALUES, resume_from=mine)
    return resumed.keepers[0].best_metric_value


def test_rank_that_does_not_see_the_state_gets_it_from_rank_0(tmp_path):
    assert run_ranks(load_from_two_hosts, 2, tmp_path) == [2.0, 2.0]


def test_state_that_is_damaged_is_refused_on_every_rank(tmp_path):
    assert run_ranks(load_what_is_damaged, 2, tmp_path) == [0, 0]


def test_keeper_that_was_never_started_is_not_started_by_a_state(tmp_path):
    loop = Loop(tmp_path, {})
    loop.accelerator.save_state(tmp_path / "state")
    assert not (tmp_path / "checkpoints").exists()
    loop.keepers[0] = loop.keeper(directory=tmp_path)
    loop.train(VALUES, save_every=1, save_to=tmp_path / "state")
    assert loop.keepers[0].best_metric_value == 2.0


def test_keepers_of_two_metrics_are_saved_with_each_other(tmp_path):
    def loop_and_other():
        loop = Loop(tmp_path, {})
        return loop, loop.keeper(directory=tmp_path, metric_key="loss")

    loop, other = loop_and_other()
    with other:
        other.observe(1.0, TrainingIteration(update=1))
        loop.train(VALUES[:2], save_every=1, save_to=tmp_path / "state")
    loop, other = loop_and_other()
    loop.accelerator.load_state(tmp_path / "state")
    assert (loop.keepers[0].best_metric_value, other.best_metric_value) == (3.0, 1.0)


def give_wrong_settings(directory):
    """Then the accelerator saves and loads as if no keeper had been made."""
    rank = dist.get_rank()
    loop = Loop(directory)
    for settings, error, message in [
        ({"tolerence": [1]}, ConfigError, "did you mean 'tolerances'"),
        ({"tolerances": [1], "keep_top_k": 0 if rank else 1}, ConfigError, "on rank 1 of 2.*keep_top_k must be"),
        ({"tolerances": [rank]}, DesyncError, "check the settings of the keeper of eval_score"),
    ]:
        with pytest.raises(error, match=f"(?s){message}"):
            loop.keeper(directory=directory, **settings)
    loop.train(VALUES[:2], save_every=1, save_to=directory / "state")
    loop.accelerator.load_state(directory / "state")
    return sorted(path.name for path in (directory / "state").glob("custom*"))


def test_wrong_settings_are_refused_on_every_rank_and_leave_nothing(tmp_path):
    loops_own = ["custom_checkpoint_0.pkl"]
    assert run_ranks(give_wrong_settings, 2, tmp_path) == [loops_own, loops_own]
    assert not (tmp_path / "checkpoints").exists()


def test_library_that_holds_the_weights_itself_is_refused(tmp_path):
    accelerator = SimpleNamespace(distributed_type=DistributedType.MEGATRON_LM)
    with pytest.raises(ConfigError, match="one of Megatron-LM, whose weights keepbest cannot gather"):
        AcceleratedKeeper(accelerator, Model(), directory=tmp_path, metric_key="loss")
