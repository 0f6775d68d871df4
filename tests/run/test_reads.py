"""What is read of a snapshot: the files that are wanted, and no byte of them from the storage twice."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from keepbest import load
from keepbest.errors import ConfigError, SnapshotError
from keepbest.export import export
from keepbest.models import CompositeModel
from keepbest.remote.storage import Remote
from tests.kit.models import Bare
from tests.kit.pool import run_ranks
from tests.kit.runs import Run, set_weights

BEST = "best_model.loss"
FORMATS = ["torch", "safetensors", "dcp"]
WIDTH = 512
PART_BYTES = 4 * WIDTH * WIDTH


def net(width: int = 2) -> CompositeModel:
    return Bare({name: nn.Linear(width, width, bias=False) for name in ("encoder", "decoder", "encoder2")})


def adam(model: nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.Adam(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer


def keep(directory: Path, file_format: str, model: nn.Module) -> Path:
    run = Run(directory, model, format=file_format, training_state={"optimizer": adam(model)})
    with run.keeper:
        run.observe(1.0)
    return run.keeper.best_path


def damage_all_but(folder: Path, kept: str) -> None:
    for path in folder.rglob("*"):
        inside = path.relative_to(folder).parts[0]
        if path.is_file() and inside.partition(".")[0] != kept and inside != "snapshot.json":
            path.write_bytes(b"damaged")


def load_encoder(run: str | Path) -> tuple[float, tuple[str, ...], tuple[str, ...]]:
    set_weights(model := net(), 9)
    loaded = load(run, BEST, model, only="encoder.weight")
    return model.encoder.weight.unique().item(), loaded.keys, loaded.unused


@pytest.mark.parametrize("file_format", FORMATS)
def test_only_reads_the_files_of_its_parts(file_format, tmp_path):
    damage_all_but(keep(tmp_path / "run", file_format, net()), "encoder")
    expected = 1.0, ("encoder.weight",), ("decoder", "encoder2")
    assert load_encoder(tmp_path / "run") == expected
    for name, chosen in {"a.pt": {"only": "encoder"}, "b.safetensors": {"part": "encoder"}}.items():
        assert export(tmp_path / "run", BEST, tmp_path / name, **chosen) == [tmp_path / name]
    with pytest.raises(SnapshotError, match="is damaged"):
        load(tmp_path / "run", BEST, net())
    with pytest.raises(SnapshotError, match="is damaged"):
        export(tmp_path / "run", BEST, tmp_path / "c.pt")


def test_ranks_read_the_files_of_the_wanted_parts(tmp_path):
    damage_all_but(keep(tmp_path / "run", "dcp", net()), "encoder")
    expected = 1.0, ("encoder.weight",), ("decoder", "encoder2")
    assert run_ranks(load_encoder, 2, tmp_path / "run") == [expected] * 2


def test_path_that_no_part_has_is_refused_with_those_there(tmp_path):
    keep(tmp_path, "torch", net())
    with pytest.raises(ConfigError, match="nothing at 'enc'; there are: decoder, encoder, encoder2"):
        load(tmp_path, BEST, net(), only="enc")
    with pytest.raises(
        ConfigError, match=r"nothing at 'encoder\.bias'; there are: decoder, encoder, encoder2, encoder\.weight"
    ):
        load(tmp_path, BEST, net(), only="encoder.bias")


@pytest.mark.parametrize("file_format", FORMATS)
def test_files_that_are_not_wanted_are_not_downloaded(file_format, tmp_path, monkeypatch):
    keep(tmp_path / "run", file_format, model := net())
    url = f"file://{tmp_path / 'run'}"
    get, brought = Remote.get, set[str]()

    def note(remote: Remote, path: str, file: Path) -> None:
        brought.add(path.split("/")[2].partition(".")[0])
        get(remote, path, file)

    def brought_by(call) -> set[str]:
        brought.clear()
        call()
        return brought - {"snapshot"}

    monkeypatch.setattr(Remote, "get", note)
    parts = {"encoder", "decoder", "encoder2"}
    optimizer = {"optimizer": adam(model)}
    assert brought_by(lambda: load_encoder(url)) == {"encoder"}
    assert brought_by(lambda: load(url, BEST, model)) == parts
    assert brought_by(lambda: load(url, BEST, model, training_state=optimizer)) == {*parts, "optimizer"}
    assert brought_by(lambda: export(url, BEST, tmp_path / "a.pt")) == parts
    assert brought_by(lambda: export(url, BEST, tmp_path / "b.pt", part="decoder")) == {"decoder"}
    assert brought_by(lambda: export(url, BEST, tmp_path / "c.pt", only=["encoder2.weight"])) == {"encoder2"}


@pytest.mark.parametrize(("file_format", "times"), [("torch", 1), ("safetensors", 1), ("dcp", 2)])
def test_bytes_are_read_once_and_then_from_memory(file_format, times, tmp_path):
    # `dcp` copies from the page cache what the others map from there.
    keep(tmp_path / "run", file_format, model := net(WIDTH))
    load(tmp_path / "run", BEST, model)  # imports what it needs
    before = read_so_far()
    load(tmp_path / "run", BEST, model)
    assert times * 3 <= (read_so_far() - before) / PART_BYTES < times * 3 + 0.5
    before = read_so_far()
    load(tmp_path / "run", BEST, model, only="encoder")
    assert times <= (read_so_far() - before) / PART_BYTES < times + 0.5


def read_so_far() -> int:
    """Bytes that this process has asked the kernel to copy; what is mapped does not count."""
    return int(Path("/proc/self/io").read_text().split()[1])
