"""Memory of the host that CUDA pins, with a runtime of CUDA that only writes down what it was asked for."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import signal
import subprocess
import sys
import threading

import pytest
import torch

from keepbest.errors import RankFailedError
from keepbest.staging.memory import Memory, Size
from tests.kit.log import unreachable

PAGE = os.sysconf("SC_PAGESIZE")


class Runtime:
    """Attributes:
    answer: Error code of each registration.
    registered: Bytes by address.
    threads: Threads that registered, one for each call.
    may_end: Set while a registration ends as soon as it has begun.
    is_stale: Whether what lay at an address before is still registered.
    during: Called in each registration.
    """

    def __init__(self):
        self.answer, self.registered, self.threads = 0, {}, []
        self.may_end = threading.Event()
        self.may_end.set()
        self.is_stale, self.during = False, lambda: None

    def cudaHostRegister(self, address, nbytes, _flags):  # noqa: N802  # the name in CUDA
        self.threads.append(threading.current_thread())
        self.during()
        if self.is_stale:
            return 712  # cudaErrorHostMemoryAlreadyRegistered
        assert self.may_end.wait(30)
        if not self.answer:
            self.registered[address] = nbytes
        return self.answer

    def cudaHostUnregister(self, address):  # noqa: N802  # the name in CUDA
        if self.is_stale:
            self.is_stale = False
        else:
            del self.registered[address]
        return 0


@pytest.fixture
def runtime(monkeypatch):
    """There is no CUDA here."""
    runtime = Runtime()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "check_error", lambda code: None if code == 0 else pytest.fail(f"error {code}"))
    return runtime


def test_memory_is_pinned_by_whole_pages_until_it_is_freed(runtime):
    taken = Memory().take([Size(5 * PAGE + 1, is_pinned=True), Size(10, is_pinned=False)])
    assert list(runtime.registered.values()) == [5 * PAGE + 1]
    assert all(address % PAGE == 0 for address in runtime.registered)
    tensor = torch.from_numpy(taken[0])
    del taken
    gc.collect()
    assert runtime.registered
    del tensor
    gc.collect()
    assert not runtime.registered


@pytest.mark.parametrize("is_prepared", [False, True])
def test_memory_that_cannot_be_pinned_is_used_as_it_is(runtime, is_prepared, caplog):
    runtime.answer = 2  # cudaErrorMemoryAllocation
    memory, sizes = Memory(), [Size(PAGE, is_pinned=True)] * 3
    with caplog.at_level(logging.WARNING):
        if is_prepared:
            memory.prepare(sizes)
        taken = memory.take(sizes)
    assert [each.nbytes for each in taken] == [PAGE] * 3
    (warning,) = caplog.messages
    assert "not pinned" in warning
    # CUDA would report the failure once more to the thread that it happened on.
    assert not {thread for thread in runtime.threads if thread.is_alive()}
    assert threading.main_thread() not in runtime.threads


def test_log_that_is_out_of_reach_is_no_refusal_of_the_disk(runtime):
    """Where a save is waited for, the memory is taken in the step that writes the files."""
    runtime.answer = 2  # cudaErrorMemoryAllocation
    with unreachable("not pinned"), pytest.raises(RankFailedError, match="a handler of the log raised ConnectionError"):
        Memory().take([Size(PAGE, is_pinned=True)])


def test_memory_is_unpinned_though_nobody_waited_for_it(runtime):
    runtime.may_end.clear()
    threading.Timer(0.3, signal.pthread_kill, [threading.main_thread().ident, signal.SIGINT]).start()
    with pytest.raises(KeyboardInterrupt):
        Memory().take([Size(PAGE, is_pinned=True)])
    runtime.may_end.set()
    (thread,) = runtime.threads
    thread.join()
    gc.collect()
    assert not runtime.registered


def test_memory_is_pinned_where_an_interruption_left_something_pinned(runtime, caplog):
    runtime.is_stale = True
    (taken,) = Memory().take([Size(PAGE, is_pinned=True)])
    assert runtime.registered == {taken.ctypes.data: PAGE}
    assert not caplog.messages


def test_memory_that_becomes_garbage_while_it_is_pinned_stops_nobody(runtime):
    memory = [Memory()]
    thread = memory[0]

    def collect():
        memory.clear()
        gc.collect()

    runtime.during = collect
    thread.prepare([Size(PAGE, is_pinned=True)] * 3)
    ended = thread._thread
    del thread
    assert ended.close(timeout=30)


def test_memory_is_used_as_it_is_where_no_thread_can_pin_it(runtime, monkeypatch, caplog):
    def refuse(_):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    (taken,) = Memory().take([Size(PAGE, is_pinned=True)])
    assert taken.nbytes == PAGE
    assert "can't start new thread" in caplog.text
    assert not runtime.registered


def test_memory_is_prepared_where_a_device_cannot_get_ready(runtime):
    def get_ready():
        raise torch.OutOfMemoryError

    memory, sizes = Memory(), [Size(PAGE, is_pinned=True)] * 3
    memory.prepare(sizes, [get_ready])
    memory._thread.close()
    prepared = dict(runtime.registered)
    assert len(prepared) == 3
    taken = memory.take(sizes)
    assert sorted(each.ctypes.data for each in taken) == sorted(prepared)


IN_A_CHILD = """
import os
from keepbest.staging.memory import Size, allocate
memory = allocate(Size(1 << 20, is_pinned=False))
memory[:] = 7
child = os.fork()
if not child:
    is_without = not memory.any()
    del memory  # it was never given to the child, which must be able to free it all the same
    os._exit(0 if is_without else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert (memory == 7).all()
"""


CHILD_OF_A_BUSY_PARENT = """
import os, threading
from keepbest.staging import memory
from keepbest.errors import RankFailedError
from keepbest.staging.memory import Memory, Size
from tests.kit.log import unreachable
begun, may_end, allocate = threading.Event(), threading.Event(), memory.allocate

def allocate_slowly(size):
    begun.set()
    may_end.wait(30)
    return allocate(size)

memory.allocate = allocate_slowly
prepared = Memory()
prepared.prepare([Size(100, is_pinned=False)])
begun.wait()
child = os.fork()
if not child:
    prepared.end()
    del prepared
    raise SystemExit(7)  # with all that runs at exit
may_end.set()
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
"""


def test_child_does_not_wait_for_memory_that_its_parent_prepares():
    done = subprocess.run([sys.executable, "-c", CHILD_OF_A_BUSY_PARENT], check=False, timeout=60)
    assert done.returncode == 0


@pytest.mark.skipif(sys.platform != "linux", reason="other systems copy all memory to a child")
def test_child_process_gets_no_copy():
    subprocess.run([sys.executable, "-c", IN_A_CHILD], check=True, timeout=60)
