"""A best on the disk has the bits that the weights on the device had when they were observed."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import nn

from keepbest import BestKeeper, load
from keepbest.export import export
from tests.cuda.device import (
    DEVICE,
    Weights,
    another_stream,
    assert_same,
    change,
    copied,
    keep_busy,
    keeper_of,
    wide,
    zero,
)

REF = "best_model.loss"


def kept(folder, model, ref=REF):
    """What `load` brings into a model like this one."""
    target = zero(deepcopy(model))
    load(folder, ref, target)
    return copied(target)


def odd() -> Weights:
    """Tensors of all kinds, one of each."""
    tensors = {
        f"of_{dtype.itemsize}_{number}": torch.randn(7, 5, device=DEVICE).to(dtype)
        for number, dtype in enumerate(
            (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn)
        )
    }
    tensors["of_int64"] = torch.arange(11, device=DEVICE)
    tensors["of_int32"] = torch.arange(3, dtype=torch.int32, device=DEVICE)
    tensors["of_bool"] = torch.tensor([True, False, True], device=DEVICE)
    tensors["scalar"] = torch.tensor(3.5, device=DEVICE)
    tensors["steps"] = torch.tensor(3, device=DEVICE)
    tensors["empty"] = torch.empty(0, 4, device=DEVICE)
    tensors["transposed"] = torch.randn(6, 4, device=DEVICE).t()
    tensors["strided"] = torch.randn(9, 8, device=DEVICE)[:, ::2]
    tensors["inside"] = torch.randn(100, device=DEVICE)[30:43]
    tensors["channels_last"] = torch.randn(2, 3, 4, 5, device=DEVICE).to(memory_format=torch.channels_last)
    tensors["complex"] = torch.randn(3, 4, dtype=torch.complex64, device=DEVICE)
    return Weights(tensors)


def many(count: int = 5000) -> Weights:
    """So many tensors of 64 KiB, of several dtypes in turn."""
    dtypes = (torch.float32, torch.bfloat16, torch.int64, torch.float32, torch.float16)
    values = torch.randint(-1000, 1000, (64 * 1024,), device=DEVICE)
    tensors = {}
    for number in range(count):
        dtype = dtypes[number % len(dtypes)]
        tensors[f"t{number}"] = (values[: 65536 // dtype.itemsize] + number).to(dtype)
    return Weights(tensors)


def test_two_bests_in_quick_succession(tmp_path, file_format, async_save):
    model, expected = odd(), []
    with BestKeeper(
        model, directory=tmp_path, metric_key="loss", format=file_format, async_save=async_save, keep_top_k=2
    ) as keeper:
        for epoch in (1, 2):
            expected.append(copied(model))
            keeper.observe(-float(epoch), epoch=epoch)
            change(model)
            if epoch == 1:
                keeper.flush()  # else the second may replace the first in the queue
    assert_same(kept(tmp_path, model), expected[1])
    assert_same(kept(tmp_path, model, f"{REF}.top=2"), expected[0])


def views(conjugated, negated) -> nn.Module:
    model = nn.Module()
    model.register_buffer("conjugated", conjugated)
    model.register_buffer("negated", negated)
    return model


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_conjugated_and_negated_views(tmp_path, async_save, share):
    values = torch.randn(2000, 300, dtype=torch.complex64, device=DEVICE)
    model = views(values.conj(), values.conj().imag)
    expected = {name: value.resolve_conj().resolve_neg() for name, value in copied(model).items()}
    with keeper_of(model, tmp_path, "torch", async_save, staging_device_share=share) as keeper:
        for epoch in (1, 2):
            keeper.observe(-float(epoch), epoch=epoch)
            keeper.flush()
    target = views(torch.zeros_like(values), torch.zeros(values.shape, device=DEVICE))
    load(tmp_path, REF, target)
    assert_same(copied(target), expected)


def test_bests_without_a_pause(tmp_path, file_format):
    model = wide(32, count=8)
    with BestKeeper(model, directory=tmp_path, metric_key="loss", format=file_format, async_save=True) as keeper:
        for epoch in range(1, 6):
            expected = copied(model)
            keeper.observe(-float(epoch), epoch=epoch)
            change(model)
    assert_same(kept(tmp_path, model), expected)


def test_many_small_tensors(tmp_path, async_save):
    model = many()
    expected = copied(model)
    with BestKeeper(model, directory=tmp_path, metric_key="loss", async_save=async_save) as keeper:
        keeper.observe(1.0, epoch=1)
        change(model)
    assert_same(kept(tmp_path, model), expected)


def test_another_stream_changes_weights_after_observe(tmp_path, file_format, async_save):
    model = wide(256, count=4)
    expected = copied(model)
    with BestKeeper(model, directory=tmp_path, metric_key="loss", format=file_format, async_save=async_save) as keeper:
        keeper.observe(1.0, epoch=1)
        with another_stream():
            change(model)
    assert_same(kept(tmp_path, model), expected)


def test_another_stream_still_writes_at_observe(tmp_path, file_format, async_save):
    model = wide(64, count=4)
    new = [torch.rand_like(value) for value in model.parameters()]
    with BestKeeper(model, directory=tmp_path, metric_key="loss", format=file_format, async_save=async_save) as keeper:
        keeper.observe(2.0, epoch=1)  # the buffers are there for the second best
        copied(model)
        with another_stream(), torch.no_grad():
            keep_busy()
            for value, its in zip(model.parameters(), new, strict=True):
                value.copy_(its)
        keeper.observe(1.0, epoch=2)
        expected = copied(model)
        change(model)
    assert_same(expected, {name: its.cpu() for name, its in zip(expected, new, strict=True)})
    assert_same(kept(tmp_path, model), expected)


def test_stream_of_observe_is_still_busy(tmp_path, async_save):
    model = wide(64, count=4)
    expected = {name: value + 1 for name, value in copied(model).items()}
    with (
        BestKeeper(model, directory=tmp_path, metric_key="loss", async_save=async_save) as keeper,
        another_stream(),
    ):
        keep_busy()
        change(model)
        keeper.observe(1.0, epoch=1)
        change(model)
    assert_same(kept(tmp_path, model), expected)


def test_tied_and_expanded_weights(tmp_path, file_format, async_save):
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)).to(DEVICE)
    model[1].weight = model[0].weight
    expected = copied(model)
    with BestKeeper(model, directory=tmp_path, metric_key="loss", format=file_format, async_save=async_save) as keeper:
        keeper.observe(1.0, epoch=1)
        change(model)
    target = zero(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)).to(DEVICE))
    target[1].weight = target[0].weight
    load(tmp_path, REF, target)
    assert_same(copied(target), expected)
    expanded = Weights({"w": torch.rand(3, device=DEVICE)})
    expanded.register_buffer("rows", torch.rand(1, 4, device=DEVICE).repeat(5, 1))
    rows = copied(expanded)
    run = tmp_path / "expanded"
    with BestKeeper(expanded, directory=run, metric_key="loss", format=file_format, async_save=async_save) as keeper:
        expanded.rows = expanded.rows[:1].expand(5, 4)
        keeper.observe(1.0, epoch=1)
        change_one(expanded)
    plain = Weights({"w": torch.zeros(3, device=DEVICE)})
    plain.register_buffer("rows", torch.zeros(5, 4, device=DEVICE))
    load(run, REF, plain)
    assert_same(copied(plain), rows)


def change_one(model: Weights) -> None:
    with torch.no_grad():
        model.w.add_(1)
        model.rows[:1, :].select(0, 0).add_(1)


def test_parts_on_the_cpu(tmp_path, file_format, async_save):
    model = nn.ModuleDict({"here": nn.Linear(64, 64), "there": nn.Linear(64, 64).to(DEVICE)})
    expected = copied(model)
    with BestKeeper(model, directory=tmp_path, metric_key="loss", format=file_format, async_save=async_save) as keeper:
        keeper.observe(1.0, epoch=1)
        change(model)
    assert_same(kept(tmp_path, model), expected)


def test_weights_move_between_bests(tmp_path, async_save):
    model = nn.Linear(64, 64)
    with BestKeeper(model, directory=tmp_path, metric_key="loss", async_save=async_save) as keeper:
        for epoch, place in ((1, "cpu"), (2, DEVICE), (3, "cpu"), (4, DEVICE)):
            model.to(place)
            expected = copied(model)
            keeper.observe(-float(epoch), epoch=epoch)
            change(model)
            keeper.flush()
            assert_same(kept(tmp_path, model), expected)


def test_two_keepers_with_tolerances(tmp_path, async_save):
    model, seen = wide(8), {}
    options = {"directory": tmp_path, "tolerances": [1], "keep_top_k": 2, "async_save": async_save}
    with (
        BestKeeper(model, metric_key="loss", **options) as first,
        BestKeeper(model, metric_key="accuracy", **options) as second,
    ):
        for epoch, (loss, accuracy) in enumerate([(3, 1), (2, 4), (4, 3), (5, 2), (1, 5)], start=1):
            seen[epoch] = copied(model)
            first.observe(float(loss), epoch=epoch)
            second.observe(float(accuracy), epoch=epoch)
            change(model)
    for metric, top in (("loss", [5, 2]), ("accuracy", [5, 2])):
        assert_same(kept(tmp_path, model, f"best_model.{metric}"), seen[top[0]])
        assert_same(kept(tmp_path, model, f"best_model.{metric}.top=2"), seen[top[1]])
        assert_same(kept(tmp_path, model, f"best_model.{metric}.tolerance=1"), seen[2])


def test_load_between_devices_and_export(tmp_path, file_format):
    model = nn.Sequential(nn.Linear(32, 32), nn.BatchNorm1d(32)).to(DEVICE)
    expected = copied(model)
    with BestKeeper(model, directory=tmp_path / "a", metric_key="loss", format=file_format) as keeper:
        keeper.observe(1.0, epoch=1)
        change(model)
        keeper.restore_best()
        assert_same(copied(model), expected)
    on_cpu = zero(deepcopy(model).cpu())
    load(tmp_path / "a", REF, on_cpu)
    assert_same(copied(on_cpu), expected)
    assert {value.device.type for value in on_cpu.state_dict().values()} == {"cpu"}
    with BestKeeper(on_cpu, directory=tmp_path / "b", metric_key="loss", format=file_format) as keeper:
        keeper.observe(1.0, epoch=1)
    target = zero(deepcopy(model))
    load(tmp_path / "b", REF, target)
    assert_same(copied(target), expected)
    assert {value.device.type for value in target.state_dict().values()} == {DEVICE.type}
    export(tmp_path / "a", REF, tmp_path / "model.pt")
    found = torch.load(tmp_path / "model.pt", weights_only=True)
    assert {value.device.type for value in found.values()} == {"cpu"}
    assert_same({name: found[name] for name in expected}, expected)


def test_training_state_of_adamw(tmp_path, file_format, async_save):
    options = {"fused": True} if DEVICE.type == "cpu" else {"fused": True, "capturable": True}
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 8)).to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, **options)

    def step() -> None:
        optimizer.zero_grad()
        model(torch.ones(4, 32, device=DEVICE)).square().sum().backward()
        optimizer.step()

    step()
    with keeper_of(model, tmp_path, file_format, async_save, training_state={"optimizer": optimizer}) as keeper:
        keeper.observe(1.0, epoch=1)
        weights, state = copied(model), states(optimizer)
        step()
        after = copied(model)
    load(tmp_path, REF, model, training_state={"optimizer": optimizer})
    assert_same(copied(model), weights)
    assert_same(states(optimizer), state)
    step()
    assert_same(copied(model), after)


def states(optimizer):
    found = optimizer.state_dict()["state"]
    return {f"{number}.{name}": value.cpu().clone() for number, each in found.items() for name, value in each.items()}
