"""Shards in the background: every rank writes its share on a thread of its own, and rank 0 commits."""

from __future__ import annotations

import gc
import signal
import threading
import time
import weakref
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from keepbest import BestKeeper, load
from keepbest.capture import local
from keepbest.capture.catalogue import Entry, Form, Held, Name
from keepbest.capture.plan import plan_layout
from keepbest.capture.union import Union
from keepbest.errors import KeepBestError, PoisonedError, RankFailedError, RankLostError, StorageError
from keepbest.modules.kinds import local_of
from keepbest.ranks import Ranks, mailbox
from keepbest.run.verify import verify
from keepbest.staging.host import HostSlot, HostStaging
from keepbest.staging.live import LiveSlot
from keepbest.staging.slot import Like
from tests.capture.test_strategies import for_each_wrap, read_files
from tests.kit.child import announce
from tests.kit.files import Operation, SteppedFiles, before
from tests.kit.models import WithState, expected_files, same
from tests.kit.pool import run_ranks, start_ranks
from tests.kit.runs import Run, refs, set_weights, update
from tests.kit.seams import use
from tests.kit.strategies import FAMILIES, WRAPS, models_for
from tests.test_ranks import counted_collectives

REF = "best_model.loss"
DCP = {"format": "dcp", "async_save": True}


class Door:
    """Holds up a rank before it writes its share of some snapshots, until it is opened."""

    def __init__(self, *snapshots: str) -> None:
        self.snapshots = snapshots
        self.is_reached, self.is_open = threading.Event(), threading.Event()

    def __call__(self, operation: Operation) -> None:
        snapshot = operation.path.parent.name.removeprefix(".tmp-")
        is_share = operation.path.suffix == ".dcp" and operation.name == "make_folder"
        if is_share and (not self.snapshots or snapshot in self.snapshots):
            self.is_reached.set()
            assert self.is_open.wait(60)


def behind(directory: Path, door: Door):
    return use(directory, files=SteppedFiles(before(door)))


def keep_what_changes_at_once(wrap, directory):
    """What is not on the disk as it was when it was observed: with a layout that is new, and with one that is known."""
    for make in models_for(wrap):
        run, door = directory / wrap / make.__name__, Door()
        model = WRAPS[wrap](make(0))
        with behind(run, door), BestKeeper(model, directory=run, metric_key="loss", **DCP) as keeper:
            for number in (1, 2):
                keeper.observe(-number, update(number))
                for tensor in (*model.parameters(), *model.buffers()):
                    local_of(tensor).detach().zero_()
                door.is_open.set()
                keeper.flush()
                door.is_open.clear()
                if Ranks.connect().is_main:
                    expected, files = expected_files(make(0)), read_files(keeper.best_path, "dcp")
                    if files.keys() != expected.keys() or not all(same(files[name], expected[name]) for name in files):
                        yield make.__name__, number, {name: list(state) for name, state in files.items()}
                load(run, REF, model)
            door.is_open.set()


@pytest.mark.parametrize(
    ("family", "world_size"),
    [("replicated", 1), *((family, 2) for family in FAMILIES), ("fsdp2", 3), ("mesh", 4)],
)
def test_shards_are_kept_as_they_were_when_observed(family, world_size, tmp_path):
    assert run_ranks(for_each_wrap, world_size, family, keep_what_changes_at_once, tmp_path) == [[]] * world_size


def sharded() -> nn.Module:
    world_size = Ranks.connect().world_size
    return fully_shard(nn.Linear(4, 4, bias=False), mesh=init_device_mesh("cpu", (world_size,)))


def held(directory: Path, ref: str = REF) -> int:
    """The update whose weights a ref holds, loaded by one process."""
    model = nn.Linear(4, 4, bias=False)
    load(directory, ref, model)
    [value] = model.weight.unique().tolist()
    return int(value)


def count_collectives(directory):
    run = Run(directory, sharded(), **DCP)
    counts = []
    with run.keeper:
        for number in range(1, 5):
            with counted_collectives() as found:
                run.observe(-number, first=number)
                # Also those of the threads.
                run.keeper._run.worker.drain()
            counts.append(list(found))
        with counted_collectives() as quiet:
            run.observe(0.0, first=5)
    return counts[1:], list(quiet)


def test_new_best_of_a_known_layout_costs_one_collective_more(tmp_path):
    for bests, quiet in run_ranks(count_collectives, 2, tmp_path):
        assert bests == [quiet * 2] * 3
        assert quiet == ["exchange"]


def keep_all(directory, in_background):
    """States, refs and snapshots of two keepers with everything that a keeper has."""
    model = sharded()
    settings = {"format": "dcp", "async_save": in_background, "tolerances": [0, 1, 3], "keep_top_k": 3}
    keepers = [
        BestKeeper(model, directory=directory, metric_key=key, **settings) for key in ("loss/train", "loss/validation")
    ]
    states = []
    with keepers[0], keepers[1]:
        for number, value in enumerate([5.0, 3.0, 4.0, 3.5, 2.0, float("nan"), 6.0, 1.0, 1.5, 1.2], start=1):
            set_weights(model, number)
            outcomes = [
                keeper.observe(each, update(number)) for keeper, each in zip(keepers, (value, -value), strict=True)
            ]
            states.append([repr(outcome) for outcome in outcomes] + [str(keeper.state.to_json()) for keeper in keepers])
            if number == 5:
                keepers[0].flush(pin="mine")
    return states


def test_background_keeps_what_is_kept_when_waited_for(tmp_path):
    waited_for, in_background = tmp_path / "waited for", tmp_path / "in background"
    assert run_ranks(keep_all, 2, waited_for, False) == run_ranks(keep_all, 2, in_background, True)
    found = [{ref: (name, held(run, ref)) for ref, name in refs(run).items()} for run in (waited_for, in_background)]
    assert found[0] == found[1]
    assert len(found[0]) > 8
    assert verify(in_background) == []


def test_slot_keeps_no_room_that_its_last_snapshot_did_not_need():
    staging, like = HostStaging(make_room=lambda: None), Like((2,), torch.float32, "cpu")
    held = []
    for key in ("before", "after"):
        slot = staging.claim()
        held.append(weakref.ref(slot.room(key, like)))
        slot.release()
    assert held[0]() is None
    assert held[1]() is not None


def test_share_that_is_waited_for_needs_no_room(monkeypatch):
    union = Union({})
    layout = plan_layout(union, {"model": {"weight": torch.ones(2)}}, {"model": {}}, Ranks.connect(), "save")
    form = Form("parameter", (2,), "float32", "strided", "", is_frozen=False)
    slot, held = LiveSlot(), Held([], entries={Name("model", "weight"): Entry(form, (), "cpu", "")})
    rooms = []
    monkeypatch.setattr(torch, "empty", lambda *shape, **_: rooms.append(shape))
    layout.reserve(slot, held)
    assert rooms == []  # nobody would fill them


def lose_the_share_of(directory, rank, call):
    def refuse(operation: Operation) -> None:
        if operation.name == "sync_folder" and operation.path.parent.name == ".tmp-U2":
            raise OSError(28, "No space left on device")

    is_full = Ranks.connect().rank == rank
    with use(directory, files=SteppedFiles(before(refuse if is_full else lambda _: None))):
        run = Run(directory, sharded(), **DCP)
        run.observe(5.0)
        run.keeper.flush()
        assert run.observe(4.0, first=2)[0].is_new_best
        # The next interval after the failure; how soon that is, the thread decides.
        calls = {"flush": run.keeper.flush, "observe": lambda: run.observe(*[9.0] * 10_000, first=3)}
        with pytest.raises(StorageError) as caught:
            calls[call]()
        assert run.observe(4.5, first=20_000)[0].is_new_best
        run.keeper.close()
    return str(caught.value)


@pytest.mark.parametrize(("rank", "call"), [(0, "flush"), (1, "flush"), (1, "observe")])
def test_next_call_reports_a_share_that_failed(rank, call, tmp_path):
    messages = run_ranks(lose_the_share_of, 2, tmp_path, rank, call)
    assert len(set(messages)) == 1
    assert f"rank {rank} of 2: OSError: [Errno 28] No space left on device" in messages[0]
    assert held(tmp_path) == 20_000
    assert verify(tmp_path) == []


def linear(step):
    return WithState([1], 4, bias=False) if step == "list" else nn.Linear(4, 4, bias=False)


def fail_after_the_exchange(directory, rank, step):
    def out_of_memory(*_):
        raise MemoryError("no room")

    run = Run(directory, fully_shard(linear(step), mesh=init_device_mesh("cpu", (2,))), **DCP)
    run.observe(5.0)
    run.keeper.flush()
    if Ranks.connect().rank == rank:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                *AFTER_THE_EXCHANGE[step], out_of_memory
            )  # memory runs out of itself at no moment that could be named
            with pytest.raises(RankFailedError, match=f"rank {rank} of 2 failed to {step} the shards: MemoryError"):
                run.observe(4.0, first=2)
        with pytest.raises(PoisonedError):
            run.observe(3.0, first=3)
    else:
        run.observe(4.0, first=2)
    run.keeper.abandon()


AFTER_THE_EXCHANGE = {"copy": (HostSlot, "put"), "list": (local, "own_data")}


@pytest.mark.parametrize(("rank", "step"), [(0, "copy"), (1, "copy"), (0, "list")])
def test_rank_that_cannot_copy_its_share_costs_the_best(rank, step, tmp_path):
    began = time.monotonic()
    run_ranks(fail_after_the_exchange, 2, tmp_path, rank, step)
    assert time.monotonic() - began < 40  # the thread of the other rank does not wait for what never comes
    load(tmp_path, REF, model := linear(step))
    assert model.weight.unique().tolist() == [1.0]


def keep_while_a_rank_is_slow(directory):
    door = Door("U2")
    if Ranks.connect().rank == 0:
        door.is_open.set()
    with behind(directory, door):
        run = Run(directory, sharded(), rank_timeout=5.0, save_timeout=5.0, on_save_error="warn", **DCP)
        with run.keeper as keeper:
            run.observe(5.0, 4.0)
            keeper.flush()
            values = [keeper.best_metric_value]
            door.is_open.set()
            run.observe(4.5, first=3)
            values.append(keeper.best_metric_value)
    return values


def test_share_that_does_not_come_in_time_makes_the_best_lost(tmp_path, caplog):
    assert run_ranks(keep_while_a_rank_is_slow, 2, tmp_path) == [[5.0, 4.5]] * 2
    assert held(tmp_path) == 3
    assert verify(tmp_path) == []


def drop_while_a_rank_is_slow(directory):
    door = Door()
    if is_main := Ranks.connect().is_main:
        door.is_open.set()
    with behind(directory, door):
        run = Run(directory, sharded(), rank_timeout=2.0, **DCP)
        run.observe(5.0)
        [writer] = [thread for thread in threading.enumerate() if thread.name == "keepbest-writer"]
        if is_main:
            del run.keeper
            gc.collect()
            writer.join(10)
        dist.barrier()
        is_waiting = is_main and writer.is_alive()
        door.is_open.set()
        if not is_main:
            run.keeper.abandon()
    return is_waiting


def test_keeper_that_is_garbage_does_not_wait_for_long(tmp_path):
    assert run_ranks(drop_while_a_rank_is_slow, 2, tmp_path) == [False, False]


# What the other rank does, and so where it waits: in an exchange, for its thread, and for memory that the thread holds.
WAITS = {
    "exchange": lambda run: run.observe(4.5, first=3),
    "thread": lambda run: run.keeper.flush(),
    "slot": lambda run: run.observe(3.0, first=4),
}


def die_while_writing(directory, victim, wait):
    mailbox._AFTER_A_LOSS = 1.0  # the rank process ends after this
    door = Door("U2")
    is_victim = Ranks.connect().rank == victim
    if not is_victim:
        door.is_open.set()
    with behind(directory, door):
        run = Run(directory, sharded(), **DCP)
        try:
            with run.keeper:
                run.observe(5.0, 4.0)
                if wait == "slot":
                    run.observe(3.5, first=3)
                if is_victim:
                    assert door.is_reached.wait(60)
                announce("waiting")
                if is_victim and wait != "slot":
                    signal.pause()
                WAITS[wait](run)
        except KeepBestError as error:
            return type(error)
    return None


@pytest.mark.parametrize(
    ("victim", "wait"), [(0, "exchange"), (1, "exchange"), (1, "thread"), (0, "slot"), (1, "slot")]
)
def test_rank_that_dies_while_it_writes_costs_its_best_alone(victim, wait, tmp_path):
    with start_ranks(die_while_writing, 2, tmp_path, victim, wait) as ranks:
        for rank in (0, 1):
            ranks.wait_for(rank, "waiting", timeout=60)
        time.sleep(0.5)  # nothing reports that a rank has begun to wait
        began = time.monotonic()
        ranks.signal(victim, signal.SIGKILL)
        outcomes = ranks.collect(timeout=60)
    assert outcomes[1 - victim].result is RankLostError
    assert time.monotonic() - began < 30
    assert held(tmp_path) == 1
    assert verify(tmp_path) == [] or victim == 0
    with Run(tmp_path, nn.Linear(4, 4, bias=False), resume="ledger", format="dcp").keeper as keeper:
        assert keeper.best_metric_value == 5.0
    assert verify(tmp_path) == []


def test_extra_state_is_written_as_it_was_at_the_best(tmp_path):
    door = Door()
    with behind(tmp_path, door):
        run = Run(tmp_path, WithState({"scale": torch.ones(2), "steps": [1]}), **DCP)
        with run.keeper:
            run.observe(5.0)
            run.model.state["scale"].fill_(7.0)
            run.model.state["steps"].append(2)
            door.is_open.set()
    load(tmp_path, REF, other := WithState(None))
    assert (other.state["scale"].tolist(), other.state["steps"]) == ([1.0, 1.0], [1])
