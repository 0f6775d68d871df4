"""A disk that is full, read-only or broken: every rank learns it at once, nothing kept is lost, and the run goes on."""

from __future__ import annotations

import errno
import json
import resource
import subprocess
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from keepbest.decision import Observation, fold
from keepbest.errors import StorageError
from keepbest.export import export
from keepbest.run.verify import verify
from tests.faults.disks import fill
from tests.faults.filled_run import (
    BEST,
    COMPLETE,
    POLICY,
    VALUES,
    damage,
    go_on,
    keeper_of,
    net,
    observations,
    recorded_state,
    refs_hold,
    refs_of,
)
from tests.kit.child import pause
from tests.kit.files import OPERATIONS, Fault, SteppedFiles, before
from tests.kit.pool import run_ranks, start_ranks
from tests.kit.seams import use


def refusing(directory: Path, fault: Fault):
    return use(directory, files=SteppedFiles(before(fault)))


# --- one process, each operation at each of its calls -----------------------------------------------------------------


def one_session(directory: Path, on_save_error: str) -> tuple[list[Observation], StorageError | None]:
    """Ends where the storage fails."""
    seen: list[Observation] = []
    model = net()
    try:
        with keeper_of(directory, model, on_save_error=on_save_error, resume="ledger") as keeper:
            for until in range(1, len(VALUES) + 1):
                seen += go_on(keeper, model, VALUES[:until])
                if until == 6:
                    keeper.flush(pin="resume")
    except StorageError as error:
        return seen, error
    return seen, None


# Two at once: a line that can be neither written nor cut, and a refused save that cannot be tidied up.
TWO_AT_ONCE = ("write+truncate", "sync+truncate", "create+remove", "rename+remove")
CASES = [
    *((operation, policy) for operation in OPERATIONS for policy in ("raise", "warn")),
    *((operations, "raise") for operations in TWO_AT_ONCE),
    ("write+truncate", "warn"),
]


@pytest.mark.parametrize("lasting", [False, True], ids=["once", "lasting"])
@pytest.mark.parametrize(("operation", "on_save_error"), CASES)
def test_run_goes_on_right_after_any_call_was_refused(operation, on_save_error, lasting, memory_folder, request):
    counter = Fault()
    with refusing(memory_folder / "whole", counter):
        one_session(memory_folder / "whole", "raise")
    calls = counter.calls[operation.partition("+")[0]]
    assert calls > 0
    most = 2 if request.config.getoption("--quick") else 30
    for number in range(1, calls + 1, 1 + calls // most):  # one file alone takes dozens of writes
        directory = memory_folder / str(number)
        fault = Fault(operation, number, 10**9 if lasting else number)
        with refusing(directory, fault):
            seen, error = one_session(directory, on_save_error)
            where = f"{operation} number {number}, of a run that ended with {error!r}"
            assert fault.refused, where
            assert error is None or "Input/output error" in str(error), where
            assert damage(directory) == [], where
            fault.end()
            seen_again, error = one_session(directory, on_save_error)
        assert error is None, where
        assert verify(directory) == [], where
        # What did not reach the disk in the first session was observed once more in the second.
        told = fold(POLICY, {entry.iteration: entry for entry in [*seen, *seen_again]}.values())
        state = told if on_save_error == "warn" else COMPLETE
        assert refs_hold(directory) == refs_of(state), where
        assert recorded_state(directory) == state, where


def test_flush_writes_what_was_refused_before(memory_folder):
    model = net()
    fault = Fault("write")
    with refusing(memory_folder, fault):
        keeper = keeper_of(memory_folder, model, on_save_error="warn")
        go_on(keeper, model, VALUES[:2])
        fault.calls.clear()
        fault.first = fault.last = 1
        go_on(keeper, model, VALUES[:3])
        assert fault.refused == 1
        keeper.flush()
        keeper.abandon()
    assert recorded_state(memory_folder) == fold(POLICY, observations()[:3])


# --- two ranks, each operation ----------------------------------------------------------------------------------------


def two_ranks_refused(folder: Path, operations: tuple[str, ...]) -> dict[str, str]:
    """What each operation's refusal led to on this rank, while saving the best at 5 or, where none runs then, later."""
    told = {}
    for operation in operations:
        model = net()
        fault = Fault(operation)
        with refusing(folder / operation, fault):
            keeper = keeper_of(folder / operation, model, resume="ledger", rank_timeout=20.0)
            go_on(keeper, model, VALUES[:4])
            if operation == "append":
                keeper.abandon()
                keeper = keeper_of(folder / operation, model, resume="ledger", rank_timeout=20.0)
            fault.first, fault.last = 1, 10**9
            fault.aim("sync+truncate" if operation == "truncate" else operation)  # it is cut after a refusal alone
            try:
                with keeper:
                    go_on(keeper, model)
                told[operation] = "ended"
            except StorageError as error:
                told[operation] = str(error)
    return told


def test_every_rank_raises_what_rank_0_was_refused(memory_folder):
    told = run_ranks(two_ranks_refused, 2, memory_folder, OPERATIONS)
    assert told[0] == told[1]
    # Refs and removals follow the ledger, which is right before them: the next session brings the folder up to it.
    assert (told[0].pop("link"), told[0].pop("remove")) == ("ended", "ended")
    for operation, message in told[0].items():
        assert "on rank 0 of 2: OSError: [Errno 5] Input/output error" in message, operation
        assert "Free or repair the storage" in message, operation
    for operation in OPERATIONS:
        assert damage(memory_folder / operation) == []
        assert one_session(memory_folder / operation, "raise")[1] is None
        assert verify(memory_folder / operation) == []
        assert refs_hold(memory_folder / operation) == refs_of(COMPLETE)


# --- real file systems ------------------------------------------------------------------------------------------------

WIDTH = 1 << 14  # 256 KiB a snapshot; two fit on the small disk beside each other, and no ballast then


def remount(path: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(path)], check=True)


def run_until(directory: Path, on_save_error: str, epochs: int, file_format: str):
    """Observes `epochs`, lets the test break the storage, and observes the rest or ends with the error."""
    model = net(WIDTH)
    settings = {"on_save_error": on_save_error, "rank_timeout": 20.0, "format": file_format}
    keeper = keeper_of(directory, model, **settings)
    seen = go_on(keeper, model, VALUES[:epochs])
    state = keeper.state_dict()
    pause("break it")
    started = time.monotonic()
    try:
        with keeper:
            seen += go_on(keeper, model, VALUES[: epochs + 1])
            pause("repair it")
            seen += go_on(keeper, model)
    except StorageError as error:
        return seen, state, str(error), started, time.monotonic()
    return seen, state, None, started, time.monotonic()


def resume(directory: Path, state) -> None:
    model = net(WIDTH)
    keeper = keeper_of(directory, model, resume="ledger" if state is None else None)
    if state is not None:
        keeper.load_state_dict(state)
    with keeper:
        go_on(keeper, model)


def break_and_repair(directory: Path, on_save_error: str, epochs: int, break_it, repair_it, file_format: str = "torch"):
    """(what both ranks saw, the state before, the error) of two ranks whose storage breaks after `epochs`."""
    with start_ranks(run_until, 2, directory, on_save_error, epochs, file_format) as ranks:
        for rank in range(2):
            ranks.wait_for(rank, "break it")
        break_it()
        for rank in range(2):
            ranks.resume(rank)
        if on_save_error == "warn":
            for rank in range(2):
                ranks.wait_for(rank, "repair it")
            repair_it()
            for rank in range(2):
                ranks.resume(rank)
        outcomes = [outcome.result for outcome in ranks.collect()]
    started = min(outcome[3] for outcome in outcomes)
    if on_save_error == "raise":
        assert all(outcome[4] - started < 5.0 for outcome in outcomes)
    assert outcomes[0][:3] == outcomes[1][:3]
    return outcomes[0][:3]


@pytest.mark.parametrize(
    ("resume_from", "file_format", "reported"),
    [
        ("state", "torch", "on rank 0 of 2: OSError: [Errno 28] No space left on device"),
        ("ledger", "torch", "on rank 0 of 2: OSError: [Errno 28] No space left on device"),
        ("state", "safetensors", "on rank 0 of 2: OSError: [Errno 28] No space left on device"),
        ("state", "dcp", "on rank 0 of 2: OSError: [Errno 28] No space left on device"),
    ],
)
def test_full_disk_is_reported_on_every_rank_and_resumable(small_disk, resume_from, file_format, reported):
    directory = small_disk / "run"
    _, state, error = break_and_repair(directory, "raise", 4, lambda: fill(small_disk), None, file_format)
    assert reported in error
    assert "save the new best of loss at E5" in error
    assert verify(directory) == []  # not even a half-written file is left to take up the little room
    assert refs_hold(directory, WIDTH) == {BEST: 2, f"{BEST}.tolerance=1": 2}
    (small_disk / "ballast").unlink()
    run_ranks(resume, 2, directory, state if resume_from == "state" else None)
    assert verify(directory) == []
    assert refs_hold(directory, WIDTH) == refs_of(COMPLETE)
    assert recorded_state(directory) == COMPLETE


@pytest.mark.parametrize("file_format", ["torch", "dcp"])
def test_full_disk_with_warn_loses_one_best_and_saves_the_next(small_disk, file_format):
    directory = small_disk / "run"
    repair = (small_disk / "ballast").unlink
    seen, _, error = break_and_repair(directory, "warn", 4, lambda: fill(small_disk), repair, file_format)
    assert error is None
    assert [entry.iteration.epoch for entry in seen if not entry.durable] == [5]
    # 3.5 at 6 is worse than the 3.0 that was lost, and better than the best on the disk: 4.0.
    state = fold(POLICY, seen)
    ledger = [json.loads(line) for line in (directory / "checkpoints/ledger.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in ledger if line.get("snapshot")] == ["E1", "E2", "E6", "E8"]
    assert [line["iteration"] for line in ledger if line.get("lost")] == ["E5"]
    assert verify(directory) == []
    assert (
        refs_hold(directory, WIDTH) == refs_of(state) == {BEST: 8, f"{BEST}.tolerance=1": 2, f"{BEST}.tolerance=5": 8}
    )
    assert recorded_state(directory) == state


def export_to(directory: Path, to: Path) -> int | None:
    try:
        export(directory, BEST, to)
    except OSError as error:
        return error.errno
    return None


@pytest.mark.parametrize("file_format", ["torch", "dcp"])
@pytest.mark.parametrize("to", ["folder/model.pt", "model.safetensors", "some/folder"])
@pytest.mark.parametrize("kilobytes", [600, 2000])  # the tensors, or the file of them, are too much for the disk
def test_export_to_a_full_disk_is_an_error_that_leaves_nothing(kilobytes, to, file_format, small_disk, tmp_path):
    model = net(kilobytes * 1000 // 16)
    with keeper_of(tmp_path / "run", model, format=file_format) as keeper:
        go_on(keeper, model, VALUES[:1])
    (small_disk / "ballast").write_bytes(bytes(100_000 if to.endswith(".pt") else 400_000))
    assert run_ranks(export_to, 1, tmp_path / "run", small_disk / to) == [errno.ENOSPC]
    assert [path.name for path in small_disk.iterdir()] == ["ballast"]


def test_read_only_disk_is_refused_at_the_start_and_readable(small_disk):
    directory = small_disk / "run"
    run_ranks(one_session_of_ranks, 2, directory, 6)
    remount(small_disk, "ro")
    held = {BEST: 5, f"{BEST}.tolerance=1": 2}
    assert damage(directory) == []
    assert {ref: held[ref] for ref in held} == {ref: refs_hold(directory, WIDTH)[ref] for ref in held}
    told = run_ranks(one_session_of_ranks, 2, directory, 9)
    assert told[0] == told[1]
    assert "on rank 0 of 2: OSError: [Errno 30] Read-only file system" in told[0]
    remount(small_disk, "rw")
    assert run_ranks(one_session_of_ranks, 2, directory, 9) == [None, None]
    assert verify(directory) == []
    assert refs_hold(directory, WIDTH) == refs_of(COMPLETE)


def one_session_of_ranks(directory: Path, epochs: int) -> str | None:
    model = net(WIDTH)
    try:
        with keeper_of(directory, model, resume="ledger", rank_timeout=20.0) as keeper:
            go_on(keeper, model, VALUES[:epochs])
    except StorageError as error:
        return str(error)
    return None


@pytest.mark.parametrize("on_save_error", ["raise", "warn"])
@pytest.mark.parametrize("part", ["snapshots", "."])
def test_folder_that_becomes_read_only_under_a_run(small_disk, part, on_save_error):
    # The open ledger can still be written, as with a file server that refuses only what is new.
    directory = small_disk / "run"
    folder = directory / "checkpoints" / part

    def make_read_only():
        subprocess.run(["mount", "--bind", str(folder), str(folder)], check=True)
        remount(folder, "bind,ro")

    def make_writable():
        subprocess.run(["umount", "--lazy", str(folder)], check=True)

    seen, _, error = break_and_repair(directory, on_save_error, 4, make_read_only, make_writable)
    if on_save_error == "raise":
        assert "on rank 0 of 2: OSError: [Errno 30] Read-only file system" in error
        assert damage(directory) == []
        make_writable()
        assert run_ranks(one_session_of_ranks, 2, directory, 9) == [None, None]
        seen = []
    state = fold(POLICY, seen) if seen else COMPLETE
    assert verify(directory) == []
    assert refs_hold(directory, WIDTH) == refs_of(state)
    assert recorded_state(directory) == state


def limit_file_size(directory: Path):
    """A limit that needs no rights: rank 0 may write no file of more than 64 KiB once it has saved two bests."""
    model = net(WIDTH)
    keeper = keeper_of(directory, model, rank_timeout=20.0)
    go_on(keeper, model, VALUES[:4])
    if dist.get_rank() == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, resource.RLIM_INFINITY))
    try:
        with keeper:
            go_on(keeper, model)
    except StorageError as error:
        return str(error)
    return None


def test_file_that_may_not_grow_reaches_every_rank(tmp_path):
    told = run_ranks(limit_file_size, 2, tmp_path)
    assert told[0] == told[1]
    assert f"on rank 0 of 2: OSError: [Errno {errno.EFBIG}] File too large" in told[0]
    assert damage(tmp_path) == []
    run_ranks(resume, 2, tmp_path, None)
    assert verify(tmp_path) == []
    assert refs_hold(tmp_path, WIDTH) == refs_of(COMPLETE)
