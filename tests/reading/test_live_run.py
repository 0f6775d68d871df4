"""What is read while the run that writes it exchanges its best for a better one."""

from __future__ import annotations

import shutil
import sys

import pytest
import torch
import torch.distributed as dist
from torch import nn

from keepbest import average, load
from keepbest.errors import PartlyLoadedError, SnapshotError
from keepbest.export import export
from keepbest.formats.sharded_part import ShardedPart
from keepbest.remote.verify import verify_run
from keepbest.run.reader import FoundSnapshot
from tests.kit.pool import run_ranks
from tests.kit.runs import Run, snapshots

BEST = "best_model.loss"


class LiveRun(Run):
    """Each of the next checks of a snapshot comes too late: the run has removed it for two better ones."""

    def __init__(self, directory, times: int, **settings):
        super().__init__(directory, **settings)
        self.observe(5.0, 4.0)
        self.updates = iter(range(10, 10 + 2 * times, 2))

    def exchange(self) -> None:
        for number in self.updates:
            self.observe(-number, -number - 1, first=number)
            self.keeper.flush()
            return

    def take_hold(self, monkeypatch) -> None:
        check = FoundSnapshot.check_files

        def check_too_late(found, *share, **parts):
            self.exchange()
            check(found, *share, **parts)

        monkeypatch.setattr(FoundSnapshot, "check_files", check_too_late)  # the moment between ledger and files

    def take_hold_of_verify(self, monkeypatch) -> None:
        check = sys.modules["keepbest.run.verify"].check_file

        def check_too_late(path, digest):
            self.exchange()
            check(path, digest)

        monkeypatch.setattr("keepbest.run.verify.check_file", check_too_late)  # the same moment


def test_run_that_exchanges_its_best_is_no_damage(tmp_path, monkeypatch):
    run = LiveRun(tmp_path, 1)
    run.take_hold_of_verify(monkeypatch)
    assert verify_run(tmp_path) == []
    assert next(run.updates, None) is None


def test_run_that_always_exchanges_its_best_is_no_damage(tmp_path, monkeypatch):
    run = LiveRun(tmp_path, 1000)
    run.take_hold_of_verify(monkeypatch)
    assert [fault for fault in verify_run(tmp_path) if fault.kind == "damage"] == []


@pytest.mark.parametrize("form", ["torch", "dcp"])
def test_best_that_is_exchanged_is_read_again(form, tmp_path, monkeypatch):
    run = LiveRun(tmp_path / "run", 2, format=form, keep_top_k=2)
    run.take_hold(monkeypatch)
    model = nn.Linear(1, 1)
    assert load(tmp_path / "run", BEST, model).value == -13.0
    assert (model.weight.item(), model.bias.item()) == (13.0, 13.0)

    run.updates = iter([20, 30])
    [path] = export(tmp_path / "run", BEST, tmp_path / "best.pt")
    assert torch.load(path, weights_only=True)["weight"].item() == 31.0

    run.updates = iter([40, 50])
    [path] = average(tmp_path / "run", tmp_path / "mean.pt", top=2)
    assert torch.load(path, weights_only=True)["weight"].item() == 50.5


@pytest.mark.parametrize("form", ["torch", "safetensors", "dcp"])
def test_best_that_is_exchanged_after_its_check_is_read_again(form, tmp_path, monkeypatch):
    run = LiveRun(tmp_path, 2, format=form)
    check = FoundSnapshot.check_files

    def check_too_early(found, *share, **parts):
        check(found, *share, **parts)
        run.exchange()

    monkeypatch.setattr(FoundSnapshot, "check_files", check_too_early)  # the moment between digest and tensors
    model = nn.Linear(1, 1)
    assert load(tmp_path, BEST, model).value == -13.0
    assert (model.weight.item(), model.bias.item()) == (13.0, 13.0)


def test_file_that_goes_while_it_is_read_is_said_to_be_missing(tmp_path, monkeypatch):
    run = LiveRun(tmp_path, 0)
    path = run.keeper.best_path / "model.pt"
    read = sys.modules["keepbest.formats.torch_file"].load_plain

    def read_and_remove(given):
        state = read(given)
        path.unlink()
        return state

    monkeypatch.setattr("keepbest.formats.torch_file.load_plain", read_and_remove)  # it is mapped, and has no name
    with pytest.raises(SnapshotError, match=r"model\.pt cannot be read"):
        load(tmp_path, BEST, nn.Linear(1, 1))


def load_on_ranks(directory, **settings):
    alone = [dist.new_group([rank]) for rank in range(2)][dist.get_rank()]
    model = nn.Linear(1, 1)
    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == 0:
            LiveRun(directory, 3, process_group=alone, **settings).take_hold(patch)
        dist.barrier()
        loaded = load(directory, BEST, model)
    return loaded.value, model.weight.item()


def test_all_ranks_read_again_together(tmp_path):
    assert run_ranks(load_on_ranks, 2, tmp_path) == [(-15.0, 15.0)] * 2


def test_damage_is_no_exchange_and_is_not_read_again(tmp_path, monkeypatch):
    run = LiveRun(tmp_path, 0)
    tries = []
    monkeypatch.setattr(run, "exchange", lambda: tries.append(None))
    run.take_hold(monkeypatch)
    path = run.keeper.best_path / "model.pt"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(SnapshotError, match=r"model\.pt is damaged"):
        load(tmp_path, BEST, run.model)
    with pytest.raises(SnapshotError, match=r"model\.pt is damaged"):
        export(tmp_path, BEST, tmp_path / "best.pt")
    assert len(tries) == 2


def test_best_that_is_always_exchanged_is_given_up(tmp_path, monkeypatch):
    run = LiveRun(tmp_path, 1000)
    run.take_hold(monkeypatch)
    with pytest.raises(SnapshotError, match=r"cannot be read|is missing"):
        load(tmp_path, BEST, nn.Linear(1, 1))
    with pytest.raises(SnapshotError, match=r"cannot be read|is missing"):
        export(tmp_path, BEST, tmp_path / "best.pt")
    assert len(snapshots(tmp_path)) == 1


def test_work_of_a_live_run_is_not_left_over(tmp_path):
    run = LiveRun(tmp_path, 0)
    begun = tmp_path / "checkpoints" / "snapshots" / ".tmp-U9"
    begun.mkdir()
    assert verify_run(tmp_path) == []
    run.keeper.abandon()
    begun.mkdir(exist_ok=True)
    [fault] = verify_run(tmp_path)
    assert (fault.kind, ".tmp-U9 is left over" in fault.message) == ("unfinished", True)


@pytest.mark.parametrize("follows", [True, False])
def test_snapshot_that_goes_between_two_parts_is_loaded_anew_or_said(follows, tmp_path, monkeypatch):
    def two_parts():
        return nn.ModuleDict({"a": nn.Linear(1, 1), "b": nn.Linear(1, 1)})

    run = Run(tmp_path, two_parts(), format="dcp", model_names=["a", "b"])
    run.observe(5.0)
    fill, calls = ShardedPart.fill, []

    def fill_too_late(part, wanted):
        calls.append(part)
        if len(calls) == 2 and follows:
            run.observe(4.0, first=2)
        elif len(calls) == 2:
            shutil.rmtree(run.keeper.best_path)
        fill(part, wanted)

    monkeypatch.setattr(ShardedPart, "fill", fill_too_late)  # the moment between two parts
    model = two_parts()
    if follows:
        assert load(tmp_path, BEST, model).value == 4.0
        assert {value for each in model.parameters() for value in each.flatten().tolist()} == {2.0}
    else:
        with pytest.raises(PartlyLoadedError, match="Parts of the model are loaded already: load all of it again"):
            load(tmp_path, BEST, model)


def test_training_state_that_goes_after_the_weights_is_said(tmp_path, monkeypatch):
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.ones(1, 1)).sum().backward()
    optimizer.step()
    run = Run(tmp_path, model, format="dcp", training_state={"optimizer": optimizer})
    run.observe(5.0)
    fill, calls = ShardedPart.fill, []

    def fill_too_late(part, wanted):
        calls.append(part)
        if len(calls) == 3:  # of what is no tensor, of the weights, and of the optimizer
            shutil.rmtree(run.keeper.best_path)
        fill(part, wanted)

    monkeypatch.setattr(ShardedPart, "fill", fill_too_late)  # the moment between weights and optimizer
    with pytest.raises(PartlyLoadedError, match="load all of it again"):
        load(tmp_path, BEST, model, training_state={"optimizer": optimizer})
