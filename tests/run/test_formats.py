"""What is particular to each format of snapshots."""

from __future__ import annotations

import errno
import json
import os
import pickle
import re
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.distributed as dist
from torch import nn

from keepbest import BestKeeper, TrainingIteration, load
from keepbest.errors import ConfigError, SnapshotError, StorageError
from keepbest.formats.registry import find_format
from keepbest.formats.shards import Shard, ShardReader
from keepbest.formats.torch_file import without_crc32
from keepbest.run.files import Files
from keepbest.run.verify import verify
from tests.kit.files import Operation, SteppedFiles, before
from tests.kit.models import odd, same
from tests.kit.pool import run_ranks
from tests.kit.runs import refs, snapshots, update
from tests.kit.seams import use
from tests.kit.strategies import WRAPS

BEST = "best_model.loss"


def keeper_of(model, directory, **settings):
    return BestKeeper(model, directory=directory, metric_key="loss", **settings)


class WithState(nn.Linear):
    def get_extra_state(self):
        return {"seen": 7}

    def set_extra_state(self, state):
        self.seen = state["seen"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"format": "pickle"}, "format must be 'torch', 'safetensors' or 'dcp', found 'pickle'"),
        ({"format": "safetensors"}, "'1._extra_state' in the state dict is a dict, and format 'safetensors' holds"),
    ],
)
def test_impossible_format_is_refused_at_construction(settings, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        keeper_of(nn.Sequential(nn.Linear(1, 1), WithState(1, 1)), tmp_path / "run", **settings).start()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("size", [10, 5_000_000], ids=["small", "large"])
@pytest.mark.parametrize("is_waited_for", [False, True])
def test_refused_write_of_a_torch_file_shows_its_cause(size, is_waited_for, tmp_path):
    def refuse(operation):
        if operation.name == "write":
            raise OSError(errno.ENOSPC, "No space left on device")

    files, state = SteppedFiles(before(refuse)), {"weight": torch.randn(size)}
    with pytest.raises(OSError, match="No space left on device"):
        find_format("torch").write_file(files, tmp_path / "a.pt", state, is_waited_for=is_waited_for)
    find_format("torch").write_file(Files(), tmp_path / "b.pt", state, is_waited_for=is_waited_for)
    assert torch.equal(torch.load(tmp_path / "b.pt", weights_only=True)["weight"], state["weight"])


def test_dtype_unknown_to_safetensors_is_refused_at_the_start(tmp_path):
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(2, 2, dtype=torch.complex128))
    with pytest.raises(ConfigError, match=r"'1\.weight' is torch\.complex128, which format 'safetensors' cannot hold"):
        keeper_of(model, tmp_path / "run", format="safetensors").start()
    assert not (tmp_path / "run").exists()


def test_tied_tensors_are_one_in_safetensors_and_when_loaded(tmp_path):
    with keeper_of(odd(0), tmp_path, format="safetensors") as keeper:
        keeper.observe(1.0, update(1))
    [file] = keeper.best_path.glob("*.safetensors")
    assert ("tied.first.weight" in (held := safetensors.torch.load_file(file))) != ("tied.second.weight" in held)
    with safetensors.safe_open(file, framework="pt") as opened:
        assert json.loads(opened.metadata()["tied"]) == {"tied.second.weight": "tied.first.weight"}
    load(tmp_path, BEST, model := odd(1))
    assert model.tied.first.weight is model.tied.second.weight
    assert torch.equal(model.tied.first.weight, odd(0).tied.first.weight)


@pytest.mark.parametrize("file_format", ["torch", "safetensors", "dcp"])
@pytest.mark.parametrize("async_save", [False, True])
def test_one_storage_in_two_dtypes_is_kept(file_format, async_save, tmp_path):
    model, other = nn.Linear(2, 2), nn.Linear(2, 2)
    for each, factor in ((model, 1.0), (other, 2.0)):
        turns = torch.polar(torch.ones(3), torch.arange(3.0) * factor)
        each.register_buffer("turns", turns)
        each.register_buffer("parts", torch.view_as_real(turns))
    with keeper_of(model, tmp_path, format=file_format, async_save=async_save) as keeper:
        keeper.observe(1.0, update(1))
    load(tmp_path, BEST, other)
    assert torch.equal(other.turns, model.turns)
    assert torch.equal(other.parts, model.parts)


def test_extra_state_survives_in_a_distributed_checkpoint(tmp_path):
    with keeper_of(WithState(2, 2), tmp_path, format="dcp") as keeper:
        keeper.observe(1.0, update(1))
    load(tmp_path, BEST, model := WithState(2, 2))
    assert model.seen == 7


SQUARE = torch.arange(4.0).view(2, 2)
SHARDS = [  # and whether the values alone are read
    *((torch.arange(6).to(dtype), True) for dtype in (torch.float32, torch.bfloat16, torch.bool, torch.float8_e4m3fn)),
    (torch.tensor(0xA5, dtype=torch.uint8), True),
    (SQUARE.add(1), True),
    (SQUARE.t(), False),
    (torch.complex(SQUARE, SQUARE).conj(), False),
    (torch.complex(SQUARE, SQUARE).conj().imag, False),
    (torch.empty(0, 2), False),
]


def read_shards(path, shards):
    """The shards that `torch.save` writes into one file, with how many of them `torch.load` reads."""
    places = []
    with path.open("wb") as file:
        for tensor in shards:
            start = file.tell()
            torch.save(tensor, file)
            places.append(Shard("key", path.name, start, file.tell() - start, tensor.shape, tensor.dtype))
    loads, reader = [], ShardReader()
    with pytest.MonkeyPatch.context() as patch, path.open("rb") as file:
        patch.setattr(torch, "load", lambda *arguments, **settings: loads.append(1) or LOAD(*arguments, **settings))
        return [reader.read(file, place) for place in reversed(places)][::-1], len(loads)


LOAD = torch.load


def resolved(tensors):
    return {number: tensor.resolve_conj().resolve_neg() for number, tensor in enumerate(tensors)}


def test_values_of_a_shard_are_read_alone_in_a_known_frame(tmp_path):
    tensors = [tensor for tensor, _ in SHARDS]
    with without_crc32():
        found, loads = read_shards(tmp_path / "shards", tensors)
    assert same(resolved(found), resolved(tensors))
    assert loads == sum(not is_read_alone for _, is_read_alone in SHARDS)
    found, loads = read_shards(tmp_path / "with checksums", tensors)  # as if another version of torch had written it
    assert same(resolved(found), resolved(tensors))
    assert loads == len(tensors)


class Hostile:
    def __reduce__(self):
        return Path("ran").touch, ()


def test_shard_that_would_run_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(Hostile(), "shard")
    shard = Shard("key", "shard", 0, Path("shard").stat().st_size, torch.Size([2]), torch.float32)
    with Path("shard").open("rb") as file, pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        ShardReader().read(file, shard)
    assert not Path("ran").exists()


def keep_two(directory, wrap):
    model = WRAPS[wrap](odd(0))
    settings = {"directory": directory, "metric_key": "loss"}
    keepers = [BestKeeper(model, **settings, format="dcp"), BestKeeper(model, **settings, format="dcp", id="b")]
    keepers.append(BestKeeper(model, **settings, id="c"))
    for number in (1, 2, 3):
        for keeper in keepers:
            keeper.observe(-float(number % 3), TrainingIteration(update=number))
    for keeper in keepers:
        keeper.close()


def test_keepers_share_a_snapshot_and_old_ones_are_removed(tmp_path):
    run_ranks(keep_two, 2, tmp_path, "fsdp2")
    found = refs(tmp_path)
    assert found[BEST] == found[f"{BEST}.id=b"] == "U2"
    assert found[f"{BEST}.id=c"].startswith("U2.")
    assert snapshots(tmp_path) == set(found.values())
    assert verify(tmp_path) == []
    shards = {path.name for path in (tmp_path / "checkpoints" / BEST / "model.dcp").iterdir()}
    assert shards == {".metadata", "__0_0.distcp", "__1_0.distcp"}


def keep_where_ranks_see_different_folders(directory):
    here = directory / str(dist.get_rank())
    here.mkdir()
    os.chdir(here)  # the same name means another folder on each rank, as on hosts with disks of their own
    keeper = keeper_of(WRAPS["fsdp2"](odd(0)), Path("run"), format="dcp")
    with pytest.raises(StorageError) as caught:
        keeper.observe(1.0, update(1))
    keeper.abandon()
    return str(caught.value)


def test_unshared_folder_is_reported_on_every_rank(tmp_path):
    messages = run_ranks(keep_where_ranks_see_different_folders, 3, tmp_path)
    assert len(set(messages)) == 1
    assert f"failed to open run for best_model.loss on rank 1 of 3: OSError: {tmp_path}/1/run" in messages[0]
    assert f"rank 2 of 3: OSError: {tmp_path}/2/run" in messages[0]
    assert "needs a run directory on a file system that all hosts share" in messages[0]
    assert not list((tmp_path / "0/run/checkpoints").iterdir())


def keep_where_a_rank_cannot_write(directory, on_save_error):
    rank = dist.get_rank()
    settings = {"format": "dcp", "on_save_error": on_save_error}
    keeper = keeper_of(WRAPS["fsdp2"](odd(0)), directory, **settings)
    keeper.observe(2.0, update(1))
    if rank == 1:
        original = torch.save
        torch.save = lambda *_arguments, **_settings: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    try:
        outcome = keeper.observe(1.0, update(2))
        failure = outcome.save_failed
    except StorageError as error:
        failure = str(error)
    if rank == 1:
        torch.save = original
    outcome = keeper.observe(1.5, update(3))
    keeper.close()
    return failure, outcome.is_new_best


def test_rank_that_cannot_write_fails_on_all_and_the_best_stays(tmp_path):
    results = run_ranks(keep_where_a_rank_cannot_write, 2, tmp_path / "raise", "raise")
    assert results[0] == results[1]
    assert (
        "failed to save the new best of loss at U2 on rank 1 of 2: OSError: [Errno 28] No space left on device"
        in results[0][0]
    )
    assert run_ranks(keep_where_a_rank_cannot_write, 2, tmp_path / "warn", "warn") == [(True, True)] * 2
    for directory in (tmp_path / "raise", tmp_path / "warn"):
        assert refs(directory)[BEST] == "U3"
        assert verify(directory) == []
        assert snapshots(directory) == {"U3"}


def keep_where_a_share_does_not_arrive_whole(directory):
    def cut(operation: Operation) -> None:
        if operation.name == "sync_folder" and operation.path.parent.name == ".tmp-U2":
            os.truncate(operation.path / "__1_0.distcp", 5)

    with use(directory, files=SteppedFiles(before(cut if dist.get_rank() == 1 else lambda _: None))):
        keeper = keeper_of(WRAPS["fsdp2"](odd(0)), directory, format="dcp")
        keeper.observe(2.0, update(1))
        with pytest.raises(StorageError) as caught:
            keeper.observe(1.0, update(2))
        keeper.abandon()
    return str(caught.value)


def test_share_that_does_not_arrive_whole_is_not_committed(tmp_path):
    messages = run_ranks(keep_where_a_share_does_not_arrive_whole, 2, tmp_path)
    assert messages[0] == messages[1]
    assert re.search(r"__1_0\.distcp has 5 bytes here; another rank wrote \d+", messages[0])
    assert refs(tmp_path) == {BEST: "U1"}
    assert verify(tmp_path) == []


def keep_on_a_disk_that_is_slow_for_one_rank(directory):
    settings = {"format": "dcp", "rank_timeout": 1.0, "save_timeout": 60.0}
    with keeper_of(WRAPS["fsdp2"](odd(0)), directory, **settings) as keeper:
        keeper.observe(2.0, update(1))
        save, slow = torch.save, dist.get_rank() == 1
        torch.save = lambda *arguments: (
            time.sleep(3.0 if slow else 0.0),  # is the slow disk
            setattr(torch, "save", save),
            save(*arguments),
        )
        outcome = keeper.observe(1.0, update(2))
        assert torch.save is save, "nothing was written by way of it"
    return outcome.is_new_best


def test_slow_disk_of_one_rank_trips_no_timeout(tmp_path):
    assert run_ranks(keep_on_a_disk_that_is_slow_for_one_rank, 2, tmp_path) == [True, True]
    assert refs(tmp_path) == {BEST: "U2"}


@pytest.mark.parametrize("name", ["__0_0.distcp", "__1_0.distcp", ".metadata"])
def test_flipped_byte_of_a_shard_is_found_on_each_reading_rank(name, tmp_path):
    run_ranks(keep_one, 2, tmp_path)
    path = tmp_path / "checkpoints" / BEST / "model.dcp" / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    [fault] = verify(tmp_path)
    assert (fault.kind, name in fault.message) == ("damage", True)
    messages = run_ranks(load_damaged, 3, tmp_path)
    assert len(set(messages)) == 1
    assert f"{name} is damaged" in messages[0]


def keep_one(directory):
    with keeper_of(WRAPS["fsdp2"](odd(0)), directory, format="dcp") as keeper:
        keeper.observe(1.0, update(1))


def load_damaged(directory):
    with pytest.raises(SnapshotError) as caught:
        load(directory, BEST, WRAPS["fsdp2"](odd(1)))
    return str(caught.value)
