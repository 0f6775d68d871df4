"""Run folders from somebody else: nothing in them takes more space than its files do."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch

from keepbest import load
from keepbest.errors import KeepBestError
from keepbest.export import export
from keepbest.remote.verify import verify_run
from tests.faults import hostile_run as hostile
from tests.kit import cli_runs as runs


def save_packed(state, path: Path) -> None:
    torch.save(state, data := io.BytesIO())
    with zipfile.ZipFile(data) as plain, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))


LARGE = 4_000_000
one, few = torch.zeros(LARGE), torch.zeros(10_000)
BOMBS = {
    "a stride of 0": ({"w": torch.zeros(1).expand(LARGE)}, torch.save),
    "overlapping windows": ({"w": torch.zeros(4000).as_strided((2000, 2000), (1, 1))}, torch.save),
    "many views": ({str(i): few.view(*[1] * i, -1) for i in range(60)}, torch.save),
    "compressed records": ({"w": one}, save_packed),
}


@pytest.mark.parametrize("kind", BOMBS)
def test_file_that_would_grow_is_refused_everywhere(tmp_path, kind):
    hostile.make_run(run := tmp_path / "run")
    state, save = BOMBS[kind]
    hostile.forge(run, state, save=save)
    for to in ("o.pt", "o.safetensors", "folder"):
        with pytest.raises(KeepBestError, match=r"would grow|compressed"):
            export(run, hostile.BEST, tmp_path / to)
    assert "would grow" in (reason := hostile.refused_load(run)) or "compressed" in reason
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def forged_index(change):
    def make(run: Path) -> None:
        hostile.make_run(run, format="dcp")
        path = hostile.snapshot(run) / "model.dcp/.metadata"
        metadata = pickle.loads(path.read_bytes())
        change(metadata)
        path.write_bytes(pickle.dumps(metadata))
        hostile.record(run)

    return make


def first(metadata):
    return metadata.state_dict_metadata["0.weight"]


def place(metadata):
    return next(info for index, info in metadata.storage_data.items() if index.fqn == "0.weight")


def grow(metadata) -> None:
    first(metadata).size = first(metadata).chunks[0].sizes = torch.Size([1 << 20, 1 << 20])


def grow_the_whole(metadata) -> None:
    first(metadata).size = torch.Size([1 << 20, 1 << 20])


INDEXES = {
    "a huge shard": (grow, "do not hold"),
    "a huge whole": (grow_the_whole, "do not make the whole"),
    "a file elsewhere": (lambda metadata: setattr(place(metadata), "relative_path", "../../../x"), "no name of a file"),
    "a place behind the end": (lambda metadata: setattr(place(metadata), "offset", 1 << 40), "ends at byte"),
    "a place before the start": (lambda metadata: setattr(place(metadata), "offset", -1), "lies nowhere"),
    "two at one place": (lambda metadata: setattr(place(metadata), "offset", 1), "two values lie"),
    "a compressed value": (lambda metadata: setattr(place(metadata), "transform_descriptors", ["zstd"]), "compressed"),
    "shards that are shared": (
        lambda metadata: setattr(metadata.state_dict_metadata["0.bias"], "chunks", first(metadata).chunks),
        "the same shards",
    ),
    "a negative size": (lambda metadata: setattr(first(metadata), "size", torch.Size([-2, 3])), "number of elements"),
}


@pytest.mark.parametrize("kind", INDEXES)
def test_index_that_is_larger_than_its_files_is_refused(tmp_path, kind):
    change, reason = INDEXES[kind]
    forged_index(change)(run := tmp_path / "run")
    with pytest.raises(KeepBestError, match=reason):
        export(run, hostile.BEST, tmp_path / "o.pt")
    hostile.refused_load(run)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_header_of_safetensors_beyond_its_file_is_refused(tmp_path):
    hostile.make_run(run := tmp_path / "run", format="safetensors")
    path = hostile.snapshot(run) / "model.safetensors"
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    for old, new in ((b"[2]", b"[2000000]"), (b'"data_offsets": [', b'"data_offsets": [9')):
        header = data[8 : 8 + size].replace(old, new)
        path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + size :])
        hostile.record(run)
        assert "cannot be read as weights" in hostile.refused_load(run)


def test_object_of_a_copy_that_has_grown_is_not_brought(tmp_path):
    hostile.make_run(run := tmp_path / "run")
    os.truncate(hostile.snapshot(run) / "model.pt", 1 << 30)  # a hole: it takes no space here
    with pytest.raises(KeepBestError, match=r"model\.pt is damaged: it has 1073741824 bytes"):
        load(f"file://{run}", hostile.BEST, hostile.net(0.0))
    assert [fault.kind for fault in verify_run(f"file://{run}")] == ["damage"]


def test_top_k_that_nobody_keeps_is_shown_at_once(tmp_path):
    hostile.make_run(run := tmp_path / "run")
    entries = hostile.lines(run)
    entries[1]["policy"]["top_k"] = 10**18
    hostile.rewrite(run, entries)
    assert runs.keepbest("show", run).exit_code == 0
