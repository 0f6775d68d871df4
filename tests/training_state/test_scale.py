"""Optimizers of many parameters and groups: the work is linear in their number."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn

from keepbest import load
from keepbest.capture import optimizer_target, plan
from keepbest.capture.contents import Kind, PartContents
from keepbest.capture.optimizer import ParameterNames, group_entries
from keepbest.modules.parts import Part
from tests.kit.runs import Run


def sgd_of_groups(count: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.ParameterList([nn.Parameter(torch.zeros(1)) for _ in range(count)])
    return model, torch.optim.SGD([{"params": [each], "lr": 0.1 * at} for at, each in enumerate(model.parameters())])


def lines_to_compare(count: int) -> int:
    """Lines of code that run while as many groups, saved by two ranks, are compared with an optimizer."""
    model, optimizer = sgd_of_groups(count)
    names = ParameterNames(model, {})
    [groups] = group_entries(optimizer, names).values()
    data = {"param_groups.1": groups, "param_groups.2": groups}
    target = optimizer_target.OptimizerTarget(optimizer, names)
    lines = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal lines
        if frame.f_code.co_filename != optimizer_target.__file__:
            return None
        lines += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        target.compare(PartContents(Part("optimizer", ""), dict.fromkeys(data, Kind()), {}), data)
    finally:
        sys.settrace(before)
    assert target.faults == []
    assert target.groups == groups["param_groups"]
    return lines


def test_groups_are_matched_in_linear_work():
    assert lines_to_compare(400) < 5 * lines_to_compare(100)


def test_groups_of_the_same_names_are_matched_in_order():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5)
    optimizer.add_param_group({"params": [], "lr": 0.25})
    optimizer.add_param_group({"params": [], "lr": 0.125})
    model = nn.ParameterList(optimizer.param_groups[0]["params"])
    names = ParameterNames(model, {})
    target = optimizer_target.OptimizerTarget(optimizer, names)
    data = group_entries(optimizer, names)
    for group in optimizer.param_groups:
        group["lr"] = 9.0
    target.compare(PartContents(Part("optimizer", ""), dict.fromkeys(data, Kind()), {}), data)
    assert [group["lr"] for group in target.groups] == [0.5, 0.25, 0.125]


@pytest.mark.parametrize("async_save", [False, True])
def test_shards_are_looked_up_in_one_state_for_each_part(async_save, tmp_path, monkeypatch):
    states: list[dict[str, Any]] = []  # which keeps them alive, so that no two have one id
    find = plan.find_state_dict_object

    def note(state: dict[str, Any], index: Any) -> Any:
        states.append(state)
        return find(state, index)

    monkeypatch.setattr(plan, "find_state_dict_object", note)
    model = nn.ParameterList([nn.Parameter(torch.zeros(2)) for _ in range(10)])
    optimizer = torch.optim.Adam(model.parameters())
    sum(each.sum() for each in model).backward()
    optimizer.step()
    settings = {"format": "dcp", "async_save": async_save, "training_state": {"optimizer": optimizer}}
    run = Run(tmp_path, model, **settings)
    with run.keeper:
        run.observe(1.0)
    assert len(states) == 10 + 3 * 10
    assert len(set(map(id, states))) == 2
    load(tmp_path, "best_model.loss", model, training_state={"optimizer": optimizer})
    assert all((each == 1).all() for each in model)
