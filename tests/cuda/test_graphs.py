"""Bests of models that are captured in CUDA graphs, or compiled into some."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import nn

from keepbest import BestKeeper, load
from keepbest.errors import ConfigError
from tests.cuda.device import DEVICE, assert_same, change, copied, keeper_of, wide, zero

REF = "best_model.loss"


@pytest.mark.usefixtures("needs_cuda")
def test_observe_inside_a_capture_is_refused(tmp_path, async_save):
    model, value = wide(8), torch.zeros(4, device=DEVICE)
    with BestKeeper(model, directory=tmp_path, metric_key="loss", async_save=async_save) as keeper:
        keeper.observe(3.0, epoch=1)
        keeper.flush()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            value.add_(1)
            with pytest.raises(ConfigError, match="graph"):
                keeper.observe(2.0, epoch=2)
        graph.replay()
        torch.cuda.synchronize()
        assert value.tolist() == [1.0] * 4
        change(model)
        expected = copied(model)
        keeper.observe(2.0, epoch=2)
        change(model)
    target = zero(deepcopy(model))
    load(tmp_path, REF, target)
    assert_same(copied(target), expected)


@pytest.mark.usefixtures("needs_cuda")
def test_weights_that_a_replayed_graph_trains(tmp_path, file_format, async_save):
    model = nn.Linear(256, 256, device=DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(1e-2, device=DEVICE), capturable=True)
    batch = torch.rand(32, 256, device=DEVICE)

    def step() -> None:
        optimizer.zero_grad(set_to_none=False)
        model(batch).square().mean().backward()
        optimizer.step()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    with keeper_of(model, tmp_path, file_format, async_save, training_state={"optimizer": optimizer}) as keeper:
        for epoch in range(1, 4):
            for _ in range(10):
                graph.replay()
            expected = copied(model)
            keeper.observe(-float(epoch), epoch=epoch)
            for _ in range(10):
                graph.replay()
    target = zero(nn.Linear(256, 256, device=DEVICE))
    load(tmp_path, REF, target)
    assert_same(copied(target), expected)


def test_model_that_is_compiled_into_graphs(tmp_path, async_save):
    pytest.importorskip("triton", reason="torch.compile needs triton on CUDA")
    model = nn.Linear(64, 64).to(DEVICE)
    compiled = (
        torch.compile(model, mode="reduce-overhead") if DEVICE.type == "cuda" else torch.compile(model, backend="eager")
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batch = torch.rand(8, 64, device=DEVICE)
    with BestKeeper(compiled, directory=tmp_path, metric_key="loss", async_save=async_save) as keeper:
        for epoch in range(1, 4):
            for _ in range(4):
                optimizer.zero_grad()
                compiled(batch).square().mean().backward()
                optimizer.step()
            expected = copied(model)
            keeper.observe(-float(epoch), epoch=epoch)
    target = zero(nn.Linear(64, 64).to(DEVICE))
    load(tmp_path, REF, target)
    assert_same(copied(target), expected)
