"""Memory for snapshots: allocated before the first one, no more than is needed, and freed in the end."""

from __future__ import annotations

import gc
import signal
import subprocess
import sys
import threading
import weakref

import pytest
import torch
from torch import nn

from keepbest import BestKeeper
from keepbest.errors import ConfigError
from keepbest.staging import memory
from keepbest.staging.batch import Batch
from keepbest.staging.host import HostStaging
from keepbest.staging.memory import Memory, Size
from keepbest.staging.rooms import Rooms
from keepbest.staging.slot import Like, Needs
from tests.kit.pool import run_ranks
from tests.kit.runs import update
from tests.kit.strategies import WRAPS


class Layers(nn.Module):
    """Two dtypes, weights that are tied, and rows of which one is not enough for all."""

    def __init__(self):
        super().__init__()
        self.module = nn.Sequential(*(nn.Linear(3001, 2000) for _ in range(4)), nn.BatchNorm1d(50))
        self.tied = nn.Sequential(nn.Linear(3001, 2000), nn.Linear(30, 7))
        self.tied[0].weight = self.module[0].weight

    def forward(self, value):
        return value


class Counted:
    """Counts what is allocated, by thread."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.by_thread: dict[str, list[int]] = {}
        patch.setattr(memory, "allocate", self._allocate)
        self._original = allocate

    def _allocate(self, size):
        self.by_thread.setdefault(threading.current_thread().name, []).append(size.nbytes)
        return self._original(size)


allocate = memory.allocate


def keep_two_when_ready(model, **settings):
    """Observe two bests when everything for the first one is prepared."""
    with BestKeeper(model, metric_key="loss", **settings) as keeper:
        for thread in threading.enumerate():
            if thread.name == "keepbest-memory":
                thread.join()
        for number in (1, 2):
            keeper.observe(-number, update(number))
            keeper.flush()


def keep_two(directory, wrap, file_format, in_background):
    with pytest.MonkeyPatch.context() as patch:
        counted = Counted(patch)
        model = WRAPS[wrap](Layers())
        keep_two_when_ready(model, directory=directory, format=file_format, async_save=in_background)
    prepared = counted.by_thread.pop("keepbest-memory", [])
    return sum(prepared), counted.by_thread


WEIGHTS = 4 * (4 * 3002 * 2000 + 4 * 50 + 31 * 7 + 2000) + 8


@pytest.mark.parametrize(("wrap", "world_size"), [("single", 1), ("ddp", 2), ("fsdp2", 2), ("fsdp2", 3)])
@pytest.mark.parametrize("file_format", ["torch", "dcp"])
def test_prepared_memory_is_what_snapshots_need(wrap, world_size, file_format, tmp_path):
    found = run_ranks(keep_two, world_size, tmp_path, wrap, file_format, True)
    assert [later for _, later in found] == [{}] * world_size
    prepared = [each for each, _ in found]
    if file_format == "torch":
        assert prepared == [WEIGHTS] + [0] * (world_size - 1)
    else:
        assert sum(prepared) == WEIGHTS
        assert max(prepared) < WEIGHTS * 0.7 or world_size == 1


@pytest.mark.parametrize("file_format", ["torch", "safetensors"])
def test_rooms_of_the_first_snapshot_are_there_beforehand(file_format, tmp_path, monkeypatch):
    made_by, lay_out = [], Rooms._lay_out

    def note(*arguments):
        made_by.append(threading.current_thread().name)
        return lay_out(*arguments)

    monkeypatch.setattr(Rooms, "_lay_out", note)
    keep_two_when_ready(Layers(), directory=tmp_path, format=file_format, async_save=True)
    assert set(made_by) == {"keepbest-memory"}


def test_units_of_fsdp1_prepare_no_more_than_they_need(tmp_path):
    [(gathered, _), _] = run_ranks(keep_two, 2, tmp_path / "torch", "fsdp1_flat", "torch", True)
    assert gathered == WEIGHTS
    assert [prepared for prepared, _ in run_ranks(keep_two, 2, tmp_path / "dcp", "fsdp1", "dcp", True)] == [0, 0]


def test_saves_that_are_waited_for_need_no_memory(tmp_path):
    assert run_ranks(keep_two, 2, tmp_path, "ddp", "dcp", False) == [(0, {})] * 2


def float32(*shape):
    return Like(shape, torch.float32, "cpu")


def test_one_tensor_keeps_no_room_of_others_that_changed():
    staging = HostStaging(make_room=lambda: None)
    wanted = {str(number): float32(10, 1) for number in range(10)}
    for number in range(10):
        wanted[str(number)] = float32(10, 2)
        slot = staging.claim()
        slot.reserve(dict(wanted))
        rooms = [slot.room(key, like) for key, like in wanted.items()]
        assert [tuple(room.shape) for room in rooms] == [like.shape for like in wanted.values()]
        assert len(slot._rooms.rows) == 1  # else rows that are used in part would add up
        slot.release()


def test_memory_is_freed_when_it_is_not_taken(monkeypatch):
    memory_of, sizes = Memory(), [Size(1000, is_pinned=False), Size(2000, is_pinned=False)]
    counted = Counted(monkeypatch)
    memory_of.prepare(sizes)
    memory_of.end()
    assert memory_of.take([Size(3000, is_pinned=False)])[0].nbytes == 3000
    assert memory_of.take(sizes)[0].nbytes == 1000
    assert counted.by_thread["MainThread"] == [3000, 1000, 2000]


def test_memory_that_cannot_be_had_on_the_thread_is_asked_for_again(monkeypatch):
    def refuse(size):
        if threading.current_thread() is not threading.main_thread():
            raise MemoryError
        return allocate(size)

    monkeypatch.setattr(memory, "allocate", refuse)
    memory_of = Memory()
    memory_of.prepare([Size(8, is_pinned=False)])
    assert memory_of.take([Size(8, is_pinned=False)])[0].nbytes == 8


def test_thread_that_cannot_start_leaves_no_trace(monkeypatch):
    def refuse(_):
        raise RuntimeError("can't start new thread")

    memory_of = Memory()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(ConfigError, match="new thread"):
            memory_of.prepare([Size(8, is_pinned=False)])
    memory_of.end()
    assert memory_of.take([Size(8, is_pinned=False)])[0].nbytes == 8


def prepared_slowly(monkeypatch):
    """Events for a thread that prepares memory: that it may end what it has begun, and that it has; and the sizes."""
    may_end, begun, allocated = threading.Event(), threading.Event(), []

    def allocate_slowly(size):
        if threading.current_thread() is not threading.main_thread():
            begun.set()
            assert may_end.wait(30)
            allocated.append(size.nbytes)
        return allocate(size)

    monkeypatch.setattr(memory, "allocate", allocate_slowly)
    return may_end, begun, allocated


def test_interrupted_wait_leaves_the_rooms_to_one_thread(monkeypatch):
    may_end, begun, _ = prepared_slowly(monkeypatch)
    staging, wanted = HostStaging(make_room=lambda: None), {"weight": float32(1000)}
    staging.prepare(Needs(wanted, is_sure=True, devices=set()))
    assert begun.wait(30)
    threading.Timer(0.2, signal.pthread_kill, [threading.main_thread().ident, signal.SIGINT]).start()
    with pytest.raises(KeyboardInterrupt):
        staging.claim()
    threading.Timer(0.2, may_end.set).start()
    slot = staging.claim()
    slot.reserve(wanted)
    written = slot.put_all(Batch({"weight": torch.ones(1000)}))
    slot.seal()
    assert not [thread for thread in threading.enumerate() if thread.name == "keepbest-memory"]
    assert torch.equal(written["weight"], torch.ones(1000))


def test_rooms_that_nobody_needs_are_not_made(monkeypatch):
    may_end, begun, allocated = prepared_slowly(monkeypatch)
    staging = HostStaging(make_room=lambda: None)
    staging.prepare(Needs({str(number): float32(1 << 24) for number in range(4)}, is_sure=True, devices=set()))
    assert begun.wait(30)
    rooms = weakref.ref(staging._free[-1])
    del staging
    gc.collect()
    assert rooms() is None
    [thread] = [thread for thread in threading.enumerate() if thread.name == "keepbest-memory"]
    may_end.set()
    thread.join(timeout=30)
    assert not thread.is_alive()
    assert len(allocated) == 1


@pytest.mark.parametrize("file_format", ["torch", "dcp"])
def test_closed_keeper_keeps_neither_model_nor_memory(file_format, tmp_path):
    model = nn.Linear(3, 3)
    keeper = BestKeeper(model, directory=tmp_path, metric_key="loss", async_save=True, format=file_format)
    keeper.observe(1.0, update(1))
    staging, weight = weakref.ref(keeper._saver._staging), weakref.ref(model.weight)
    keeper.close()
    assert staging() is None
    del keeper, model
    gc.collect()
    assert weight() is None


ENDS_AT_ONCE = """
from keepbest.staging.memory import Memory, Size
memory = Memory()
memory.prepare([Size(300_000_000, is_pinned=False)] * 3)
"""


def test_program_that_ends_while_memory_is_prepared_does_not_abort():
    subprocess.run([sys.executable, "-c", ENDS_AT_ONCE], check=True, timeout=60)
