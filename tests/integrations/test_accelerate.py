"""The contract, and what only the keeper of Accelerate does."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch.distributed as dist
from accelerate.utils import DistributedType, ProjectConfiguration

from keepbest import TrainingIteration
from keepbest.errors import ConfigError, DesyncError
from keepbest.integrations.accelerate import AcceleratedKeeper
from tests.integrations.contract import Contract, assert_continues
from tests.integrations.faces.accelerate import Accelerate, Loop
from tests.integrations.faces.face import VALUES
from tests.integrations.faces.on_accelerate import Model
from tests.kit.pool import run_ranks

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


def test_abandoned_keeper_pins_nothing_and_loads_no_state(tmp_path):
    failed = FACE.train(tmp_path, VALUES, fails_at=5, save_every=2)
    loop = Loop(tmp_path, {})
    loop.keepers[0].abandon()
    loop.accelerator.save_state(tmp_path / "other")
    with pytest.raises(ConfigError, match="too late"):
        loop.accelerator.load_state(failed.checkpoint)


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
