"""From a snapshot of any format to one file, or a folder, that the libraries of others read."""

from __future__ import annotations

import json

import pytest
import safetensors.torch
import torch
from torch import nn

from keepbest import BestKeeper, TrainingIteration
from keepbest.errors import ConfigError, SnapshotError
from keepbest.export import export
from keepbest.run.files import Files
from tests.kit.models import clone, nested, odd, same
from tests.kit.pool import run_ranks
from tests.kit.strategies import WRAPS

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
def test_export_holds_the_weights_of_the_single_process_model_bit_for_bit(file_format, to, tmp_path):
    run_ranks(keep, 2, tmp_path / "run", file_format)
    written = export(tmp_path / "run", BEST, tmp_path / "out" / to)
    assert [path.is_relative_to(tmp_path / "out" / to) for path in written] == [True]
    assert same(read(written), clone(odd(0).state_dict()))
    assert not list((tmp_path / "out").rglob(".tmp*"))


@pytest.mark.parametrize("file_format", FORMATS)
def test_parts_come_together_under_the_keys_of_the_whole_model_or_alone_under_their_own(file_format, tmp_path):
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


@pytest.mark.parametrize("file_format", ["torch", "dcp"])
def test_large_folder_has_several_files_and_an_index_that_finds_each_tensor(file_format, tmp_path):
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


def test_folder_that_cannot_be_completed_is_left_as_it_was(tmp_path, monkeypatch):
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
        export(tmp_path / "run", BEST, tmp_path / "out", largest_file=200)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["config.json"]
