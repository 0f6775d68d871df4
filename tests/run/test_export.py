"""From a snapshot of any format to one file, or a folder, that the libraries of others read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader

from keepbest import BestKeeper, TrainingIteration, load
from keepbest.errors import ConfigError, SnapshotError
from keepbest.export import export
from keepbest.formats.registry import find_format
from keepbest.run.files import Files
from keepbest.run.manifest import FileRecord
from keepbest.run.verify import verify
from tests.kit.calls import count_calls
from tests.kit.models import clone, nested, odd, same
from tests.kit.pool import run_ranks
from tests.kit.strategies import WRAPS, whole_weights

BEST = "best_model.loss"
FORMATS = ["torch", "safetensors", "dcp"]


def keep(directory, file_format, make=odd, wrap="fsdp2_blocks"):
    model = WRAPS[wrap](make(0))
    with BestKeeper(model, directory=directory, metric_key="loss", format=file_format) as keeper:
        keeper.observe(1.0, TrainingIteration(update=1))


def read(paths):
    """What is in the files, and the tensors under the names that the header says are tied to others."""
    state = {}
    for path in paths:
        if path.suffix == ".pt":
            state.update(torch.load(path, weights_only=True))
        elif path.suffix == ".safetensors":
            state.update(safetensors.torch.load_file(path))
            with safetensors.safe_open(path, framework="pt") as file:
                metadata = file.metadata()
            assert metadata["format"] == "pt"
            state.update({name: state[first] for name, first in json.loads(metadata.get("tied", "{}")).items()})
    return state


@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize("to", ["model.pt", "model.safetensors", "folder"])
def test_export_equals_the_single_process_model_bit_for_bit(file_format, to, tmp_path):
    run_ranks(keep, 2, tmp_path / "run", file_format)
    written = export(tmp_path / "run", BEST, tmp_path / "out" / to)
    assert [path.is_relative_to(tmp_path / "out" / to) for path in written] == [True]
    assert same(read(written), clone(odd(0).state_dict()))
    assert not list((tmp_path / "out").rglob(".tmp*"))


@pytest.mark.parametrize("file_format", FORMATS)
def test_parts_are_exported_together_or_alone_by_their_own_keys(file_format, tmp_path):
    keep(tmp_path / "run", file_format, nested, "single")
    model = nested(0)
    parts = ["autoencoder.encoder", "autoencoder.decoder", "head"]
    expected = {
        f"{part}.{key}": value for part in parts for key, value in model.get_submodule(part).state_dict().items()
    }
    whole = export(tmp_path / "run", BEST, tmp_path / "whole.pt")
    assert same(read(whole), clone({**expected, "scale": model.scale}))
    [alone] = export(tmp_path / "run", BEST, tmp_path / "alone.safetensors", part="autoencoder.decoder")
    assert same(safetensors.torch.load_file(alone), clone(model.autoencoder.decoder.state_dict()))
    with pytest.raises(
        ConfigError, match=r"no part 'decoder'; there are: autoencoder\.decoder, autoencoder\.encoder, head"
    ):
        export(tmp_path / "run", BEST, tmp_path / "none.pt", part="decoder")


@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize("to", ["model.pt", "model.safetensors", "folder"])
def test_parts_that_overlap_are_exported_once(file_format, to, tmp_path):
    names, model = ["tied.second", "norm", "tied", "tied.first"], odd(0)  # the two inside are one tensor
    with BestKeeper(
        model, directory=tmp_path / "run", metric_key="loss", format=file_format, model_names=names
    ) as keeper:
        keeper.observe(1.0, TrainingIteration(update=1))
    written = export(tmp_path / "run", BEST, tmp_path / to)
    expected = {key: value for key, value in model.state_dict().items() if key.startswith(("tied.", "norm."))}
    assert same(read(written), clone(expected))


@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize("to", ["model.pt", "model.safetensors"])
def test_tensors_without_elements_are_exported(file_format, to, tmp_path):
    model = nn.Linear(2, 3)
    for dtype in (torch.float32, torch.bfloat16, torch.int8):
        model.register_buffer(f"of_{dtype.itemsize}_bytes", torch.zeros(0, 3, dtype=dtype))
    with BestKeeper(model, directory=tmp_path / "run", metric_key="loss", format=file_format) as keeper:
        keeper.observe(1.0, TrainingIteration(update=1))
    assert same(read(export(tmp_path / "run", BEST, tmp_path / to)), clone(model.state_dict()))


@pytest.mark.parametrize("file_format", ["torch", "dcp"])
def test_large_export_has_several_files_and_an_index(file_format, tmp_path):
    keep(tmp_path / "run", file_format, wrap="single")
    written = export(tmp_path / "run", BEST, tmp_path / "out", largest_file=200)
    *files, index = written
    names = [path.name for path in files]
    assert names == [f"model-{n:05}-of-{len(files):05}.safetensors" for n in range(1, len(files) + 1)]
    assert len(files) > 2
    assert same(read(files), clone(odd(0).state_dict()))
    content = json.loads(index.read_text())
    for key, name in content["weight_map"].items():
        assert key in safetensors.torch.load_file(tmp_path / "out" / name)
    held = [value for path in files for value in safetensors.torch.load_file(path).values()]
    assert content["metadata"]["total_size"] == sum(value.nbytes for value in held)


class WithState(nn.Linear):
    def get_extra_state(self):
        return {"seen": 7}

    def set_extra_state(self, state):
        self.seen = state["seen"]


@pytest.mark.parametrize("file_format", ["torch", "dcp"])
def test_what_is_no_tensor_goes_to_a_torch_file_only(file_format, tmp_path):
    with BestKeeper(WithState(2, 2), directory=tmp_path / "run", metric_key="loss", format=file_format) as keeper:
        keeper.observe(1.0, TrainingIteration(update=1))
    with pytest.raises(SnapshotError, match=r"tensors only, but the snapshot has _extra_state; export to a \.pt file"):
        export(tmp_path / "run", BEST, tmp_path / "out.safetensors")
    assert not list(tmp_path.glob("*out*"))
    model = WithState(2, 2)
    model.load_state_dict(torch.load(*export(tmp_path / "run", BEST, tmp_path / "out.pt"), weights_only=True))
    assert model.seen == 7


@pytest.mark.parametrize("to", ["model.pt", "model.safetensors", "folder"])
def test_nothing_is_overwritten_and_damage_is_not_passed_on(to, tmp_path):
    keep(tmp_path / "run", "dcp", wrap="single")
    export(tmp_path / "run", BEST, tmp_path / to)
    with pytest.raises(ConfigError, match="nothing is overwritten"):
        export(tmp_path / "run", BEST, tmp_path / to)
    [shard] = (tmp_path / "run").rglob("*.distcp")
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    with pytest.raises(SnapshotError, match="is damaged"):
        export(tmp_path / "run", BEST, tmp_path / "other" / to)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("name", ["model.PT", "model.SafeTensors"])
def test_ending_in_capitals_is_that_kind_of_file(name, tmp_path):
    keep(tmp_path / "run", "torch", wrap="single")
    assert export(tmp_path / "run", BEST, tmp_path / name) == [tmp_path / name]
    load_file = torch.load if name == "model.PT" else safetensors.torch.load_file
    assert load_file(tmp_path / name).keys() <= odd(0).state_dict().keys()
    with pytest.raises(ConfigError, match="is no kind of file"):
        export(tmp_path / "run", BEST, tmp_path / "model.BIN")


def test_export_among_checkpoints_is_refused(tmp_path):
    keep(tmp_path / "run", "torch", wrap="single")
    keep(tmp_path / "other", "torch", wrap="single")
    (tmp_path / "link").symlink_to(tmp_path / "other" / "checkpoints" / "snapshots" / "U1")
    for to in (tmp_path / "run" / "checkpoints" / BEST / "copy.pt", tmp_path / "link" / "copy.pt"):
        with pytest.raises(ConfigError, match="is among the checkpoints of the run"):
            export(tmp_path / "run", BEST, to)
    assert verify(tmp_path / "run") == verify(tmp_path / "other") == []


@pytest.mark.parametrize("to", ["out", "out/of/nothing"])
def test_folder_that_cannot_be_completed_is_left_as_it_was(to, tmp_path, monkeypatch):
    keep(tmp_path / "run", "torch", wrap="single")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("{}")
    create, created = Files.create, []

    def refuse_the_third(files, path):
        created.append(path)
        if len(created) == 3:
            raise OSError(28, "No space left on device")
        return create(files, path)

    monkeypatch.setattr(Files, "create", refuse_the_third)
    with pytest.raises(OSError, match="No space left"):
        export(tmp_path / "run", BEST, tmp_path / to, largest_file=200)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["config.json"]


@pytest.mark.parametrize("to", ["best.pt", "best.safetensors", "out"])
def test_file_whose_name_is_not_on_the_disk_is_not_left(to, tmp_path, monkeypatch):
    def refuse(files, path):
        raise OSError(5, "Input/output error")

    keep(tmp_path / "run", "torch", wrap="single")
    monkeypatch.setattr(Files, "sync_folder", refuse)
    with pytest.raises(OSError, match="Input/output error"):
        export(tmp_path / "run", BEST, tmp_path / to)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("has_links", [True, False])
@pytest.mark.parametrize("to", ["best.pt", "best.safetensors", "out/model.safetensors"])
def test_of_two_exports_to_one_path_the_first_is_whole(to, has_links, tmp_path, monkeypatch):
    def refuse(path, target):
        raise PermissionError(1, "no links here", str(path))

    def export_meanwhile(files, path):
        monkeypatch.setattr(Files, "create", create)
        file = create(files, path)
        found.update(read(export(tmp_path / "run", BEST, target)))
        return file

    keep(tmp_path / "run", "torch", wrap="single")
    if not has_links:
        monkeypatch.setattr(Path, "hardlink_to", refuse)
    expected = read(export(tmp_path / "run", BEST, tmp_path / "expected.pt"))
    target, create, found = tmp_path / to.partition("/")[0], Files.create, {}
    monkeypatch.setattr(Files, "create", export_meanwhile)
    with pytest.raises(ConfigError, match=f"{target} (exists|holds weights); nothing is overwritten"):
        export(tmp_path / "run", BEST, target)
    assert not list(tmp_path.rglob(".tmp-*"))
    assert found.keys() == expected.keys()
    assert same(read([tmp_path / to]), expected)


class Tied(nn.Module):
    """An embedding and a head that are one."""

    def __init__(self, value, *, is_tied=True):
        super().__init__()
        self.embedding = nn.Embedding(4, 3)
        self.norm = nn.LayerNorm(3)
        self.head = nn.Linear(3, 4, bias=False)
        if is_tied:
            self.head.weight = self.embedding.weight
        for parameter in self.parameters():
            nn.init.constant_(parameter, value)


def keep_and_load_tied(directory, wrap):
    keep(directory, "dcp", lambda _: Tied(7.0), wrap)
    models = [WRAPS[wrap](Tied(0.0)), Tied(0.0, is_tied=False)]
    for model in models:
        load(directory, BEST, model)
    return [{value for weight in whole_weights(model) for value in weight.flatten().tolist()} for model in models]


def test_tied_tensors_of_dcp_are_written_once_and_tied_again(tmp_path):
    for wrap, ranks in [("single", 1), ("ddp", 2), ("fsdp2", 2), ("fsdp1", 2), ("fsdp1_flat", 3)]:
        run = tmp_path / wrap
        assert run_ranks(keep_and_load_tied, ranks, run, wrap) == [[{7.0}] * 2] * ranks
        folder = run / "checkpoints" / BEST
        assert FileSystemReader(folder / "model.dcp").read_metadata().state_dict_metadata.keys() == {
            "embedding.weight", "norm.weight", "norm.bias",
        }  # fmt: skip
        assert json.loads((folder / "model.tied.json").read_text()) == {"head.weight": "embedding.weight"}
        [file] = export(run, BEST, tmp_path / f"{wrap}.safetensors")
        assert safetensors.torch.load_model(Tied(0.0), file) == (set(), [])
        state = torch.load(*export(run, BEST, tmp_path / f"{wrap}.pt"), weights_only=True)
        assert state["head.weight"].data_ptr() == state["embedding.weight"].data_ptr()
        assert verify(run) == []


def test_ties_that_name_what_is_not_there_are_refused(tmp_path):
    keep(tmp_path / "run", "dcp", wrap="single")
    folder = tmp_path / "run" / "checkpoints" / BEST
    manifest = json.loads((folder / "snapshot.json").read_text())
    files = {name: FileRecord.from_json(record) for name, record in manifest["files"].items()}
    for ties in (
        "[]",
        "{",
        '{"a": "none"}',
        '{"down.weight": "down.bias"}',
        '{"a": "b", "b": "down.bias"}',
        '{"a": 1}',
    ):
        (folder / "model.tied.json").write_text(ties)
        with pytest.raises(SnapshotError, match=r"model\.(dcp|tied\.json)"):
            find_format("dcp").reader(folder, files, "model")


@pytest.mark.parametrize("to", ["model.pt", "model.safetensors"])
def test_work_to_export_is_linear_and_of_one_size_in_all_formats(to, tmp_path):
    def work(file_format, size):
        run = tmp_path / f"{file_format}-{size}"
        keep(run, file_format, lambda _: nn.ParameterList([torch.zeros(1) for _ in range(size)]), "single")
        return count_calls(lambda: export(run, BEST, tmp_path / f"{run.name}-{to}"))

    small, large = ({each: work(each, size) for each in FORMATS} for size in (50, 200))
    assert [each for each in FORMATS if large[each] >= 5 * small[each]] == []
    assert large["dcp"] < 3 * large["torch"]


def test_export_of_dcp_plans_no_read_of_each_tensor(tmp_path, monkeypatch):
    keep(tmp_path / "run", "dcp", wrap="single")
    planned = []
    monkeypatch.setattr(DefaultLoadPlanner, "set_up_planner", lambda *arguments, **_: planned.append(arguments))
    export(tmp_path / "run", BEST, tmp_path / "model.pt")  # a plan looks at the index of all tensors
    assert planned == []


def test_export_maps_a_few_files_however_many_tensors_there_are(tmp_path, monkeypatch):
    maps = []

    def save(*arguments):
        maps.append(len(Path("/proc/self/maps").read_text().splitlines()))
        return torch_save(*arguments)

    torch_save = torch.save
    keep(tmp_path / "run", "torch", lambda _: nn.ParameterList([torch.zeros(1) for _ in range(1000)]), "single")
    before = len(Path("/proc/self/maps").read_text().splitlines())
    monkeypatch.setattr(torch, "save", save)
    [file] = export(tmp_path / "run", BEST, tmp_path / "model.pt")
    assert len(maps) == 1
    assert maps[0] < before + 100
    assert len(torch.load(file, weights_only=True)) == 1000
