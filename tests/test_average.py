"""The average of the best snapshots, beside the same mean taken by hand."""

from __future__ import annotations

import weakref

import pytest
import safetensors.torch
import torch
from torch import nn

from keepbest import BestKeeper, average
from keepbest.errors import ConfigError, SnapshotError
from keepbest.formats.sharded_part import ShardedPart
from tests.kit import cli_runs as runs

BEST = "best_model.loss"
VALUES = [4.0, 1.0, 2.0, 9.0, 3.0]  # the best are the second, the third, the fifth and the first


class Net(nn.Module):
    """Weights of three dtypes, of which two are one, and a counter."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 3, bias=False)
        self.second = nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.norm = nn.BatchNorm1d(3)
        self.small = nn.Parameter(torch.zeros(4, dtype=torch.bfloat16))
        self.large = nn.Parameter(torch.zeros(2, dtype=torch.float64))


def weights_at(number):
    """The weights of an update, in which each sum of bfloat16 would be rounded."""
    generator = torch.Generator().manual_seed(number)
    net = Net()
    with torch.no_grad():
        for tensor in (*net.parameters(), *net.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=torch.float64) + 100 * number)
            else:
                tensor.fill_(number)
    return net


def keep(directory, values=VALUES, make=weights_at, **settings):
    net = make(1)
    with BestKeeper(net, directory=directory, metric_key="loss", **{"keep_top_k": 4, **settings}) as keeper:
        for number, value in enumerate(values, start=1):
            net.load_state_dict(make(number).state_dict())
            keeper.observe(value, update=number)


def by_hand(*updates):
    states = [weights_at(number).state_dict() for number in updates]
    return {
        key: (sum(state[key].double() for state in states) / len(states)).to(best.dtype)
        if best.is_floating_point()
        else best
        for key, best in states[0].items()
    }


def read(paths):
    [path] = paths
    if path.suffix == ".pt":
        return torch.load(path, weights_only=True)
    state = safetensors.torch.load_file(path)
    return {**state, "second.weight": state["first.weight"]}  # a file of them has each tensor once


@pytest.mark.parametrize("file_format", ["torch", "safetensors", "dcp"])
@pytest.mark.parametrize("to", ["avg.pt", "avg.safetensors", "folder"])
def test_average_of_the_best_is_that_by_hand(file_format, to, tmp_path):
    keep(tmp_path / "run", format=file_format)
    found = read(average(tmp_path / "run", tmp_path / to, top=3))
    expected = by_hand(2, 3, 5)
    assert found.keys() == expected.keys()
    assert {key: value.dtype for key, value in found.items()} == {key: value.dtype for key, value in expected.items()}
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=0 if value.dtype == torch.bfloat16 else 1e-7, atol=0)
    assert found["norm.num_batches_tracked"] == 2


def test_command_averages_the_places_that_it_names(tmp_path):
    keep(tmp_path / "run")
    for number, (which, updates) in enumerate([("top=2..3", (3, 5)), (f"{BEST}.top=1,4", (2, 1))]):
        to = tmp_path / f"{number}.safetensors"
        ended = runs.keepbest("average", tmp_path / "run", which, "--to", to)
        assert (ended.output, ended.exit_code) == (f"{to}: {to.stat().st_size:,} bytes\n", 0)
        torch.testing.assert_close(safetensors.torch.load_file(to)["large"], by_hand(*updates)["large"])
    for which in ("1..3", "top=", "top=0..2", "other.top=1..2"):
        ended = runs.keepbest("average", tmp_path / "run", which, "--to", tmp_path / "no.pt")
        assert (ended.exit_code, ended.stderr.startswith("error: ")) == (1, True)
    assert not (tmp_path / "no.pt").exists()


@pytest.mark.parametrize("top", [0, [], [1, 1], 1.5, "12", [1.0]])
def test_top_that_is_no_places_is_refused(top, tmp_path):
    with pytest.raises(ConfigError, match="top must be a number of bests, or different places"):
        average(tmp_path, tmp_path / "mean.pt", top=top)


def test_fewer_bests_than_asked_for_are_refused(tmp_path):
    keep(tmp_path / "run", [2.0, 1.0])
    with pytest.raises(
        ConfigError, match=r"expected 3 of the bests of best_model\.loss, .* it keeps 2 \(keep_top_k is 4\)"
    ):
        average(tmp_path / "run", tmp_path / "avg.pt", top=3)
    keep(tmp_path / "alone", keep_top_k=1)
    with pytest.raises(ConfigError, match="best alone is kept, so there is nothing to average; train with keep_top_k"):
        average(tmp_path / "alone", tmp_path / "avg.pt", top=2)
    with pytest.raises(ConfigError, match=r"no keeper 'loss'; there are: best_model\.loss"):
        average(tmp_path / "run", tmp_path / "avg.pt", top=2, keeper="loss")
    keep(tmp_path / "none", values=[])
    with pytest.raises(SnapshotError, match="has no best yet"):
        average(tmp_path / "none", tmp_path / "avg.pt", top=1)
    assert not (tmp_path / "avg.pt").exists()


def resized(number):
    return nn.Sequential(nn.Linear(number, 1, bias=False))


def renamed(number):
    return nn.Sequential(nn.Linear(2, 1, bias=number == 1))


def retyped(number):
    layer = nn.Module()
    layer.register_buffer("0", torch.ones(2, dtype=torch.float32 if number == 1 else torch.int64))
    return layer


def sparse(number):
    layer = nn.Module()
    layer.register_buffer("0", torch.eye(2).to_sparse() * number)
    return layer


def of_four_bits(number):
    layer = nn.Module()
    layer.register_buffer("0", torch.full((2,), number, dtype=torch.uint8).view(torch.float4_e2m1fn_x2))
    return layer


HAS_FOUR_BITS = pytest.mark.skipif(not hasattr(torch, "float4_e2m1fn_x2"), reason="torch knows no such floats")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        pytest.param(of_four_bits, "0 cannot be averaged: it is torch.float4_e2m1fn_x2, with", marks=HAS_FOUR_BITS),
        (resized, r"best_model\.loss\.top=1 and .*top=2 .* 0\.weight is .*shape \(1, 1\), and .*shape \(1, 2\)"),
        (renamed, r"do not have the same names, so they cannot be averaged: 0\.bias"),
        (retyped, r"0 is torch\.float32 of shape \(2,\), and torch\.int64"),
        (sparse, "0 cannot be averaged: it is sparse"),
    ],
)
def test_snapshots_of_other_models_are_refused(make, message, tmp_path):
    for number in (1, 2):  # each with the model that training had then
        settings = {"keep_top_k": 2, "resume": "ledger" if number == 2 else None}
        with BestKeeper(make(number), directory=tmp_path / "run", metric_key="loss", **settings) as keeper:
            keeper.observe(float(number), update=number)
    with pytest.raises(SnapshotError, match=message):
        average(tmp_path / "run", tmp_path / "avg.pt", top=2)
    assert not list(tmp_path.glob("*avg*"))


def test_damage_of_any_is_found_and_nothing_is_overwritten(tmp_path):
    keep(tmp_path / "run")
    average(tmp_path / "run", tmp_path / "avg.pt", top=2)
    with pytest.raises(ConfigError, match="nothing is overwritten"):
        average(tmp_path / "run", tmp_path / "avg.pt", top=2)
    path = tmp_path / "run" / "checkpoints" / f"{BEST}.top=2" / "model.pt"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(SnapshotError, match="is damaged"):
        average(tmp_path / "run", tmp_path / "other.pt", top=2)
    assert not (tmp_path / "other.pt").exists()


def test_one_tensor_of_one_snapshot_is_in_memory_at_a_time(tmp_path, monkeypatch):
    keep(tmp_path / "run", format="dcp")
    fetch, fetched, alive = ShardedPart.fetch, [], []

    def watched(part, key):
        alive.append(sum(each() is not None for each in fetched))
        fetched.append(weakref.ref(found := fetch(part, key)))
        return found

    monkeypatch.setattr(ShardedPart, "fetch", watched)
    average(tmp_path / "run", tmp_path / "avg.safetensors", top=4)
    assert len(alive) == 4 * 8 + 1  # eight tensors of floats in each, and of the best a counter
    assert max(alive) <= 1
