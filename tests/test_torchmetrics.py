"""Metrics of torchmetrics, and functions, in the place of numbers."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torchmetrics
from torch import nn

from keepbest import BestKeeper
from keepbest.errors import DesyncError, InvalidMetricError, RankFailedError
from tests.kit.pool import run_ranks
from tests.kit.runs import update

# What the ranks hold: uneven, so that a mean of means, or a sum of sums, would be another number.
VALUES = [[1.0, 2.0, 6.0], [5.0]]


def observed(directory, make, reduction):
    rank = dist.get_rank() if dist.is_initialized() else 0
    metric = make()
    metric.update(torch.tensor(VALUES[rank]))
    settings = {"metric_key": "loss/mean", "metric_reduction": reduction}
    with BestKeeper(nn.Linear(1, 1), directory=directory, **settings) as keeper:
        return keeper.observe(metric, update(1)).value, keeper.observe(lambda: metric, update(2)).value


def mean():
    return torchmetrics.MeanMetric()


def total():
    return torchmetrics.SumMetric()


def unsynchronized():
    return torchmetrics.MeanMetric(sync_on_compute=False)


def collection():
    return torchmetrics.MetricCollection({"mean": torchmetrics.MeanMetric(), "sum": torchmetrics.SumMetric()})


@pytest.mark.parametrize("reduction", ["mean", "sum", "min", "max", "rank0", "identical"])
@pytest.mark.parametrize(("make", "expected"), [(mean, 3.5), (total, 14.0), (collection, 3.5)])
def test_ranks_are_synchronized_once_by_the_metric_itself(make, expected, reduction, tmp_path):
    assert run_ranks(observed, 2, tmp_path, make, reduction) == [(expected, expected)] * 2


@pytest.mark.parametrize(("reduction", "expected"), [("mean", 4.0), ("sum", 8.0), ("max", 5.0), ("rank0", 3.0)])
def test_unsynchronized_metric_is_reduced_by_the_keeper(reduction, expected, tmp_path):
    assert run_ranks(observed, 2, tmp_path, unsynchronized, reduction) == [(expected, expected)] * 2


def test_one_process_needs_no_ranks(tmp_path):
    assert observed(tmp_path, mean, "mean") == (3.0, 3.0)


def observed_by_one_as_a_metric_only(directory):
    metric = total()
    metric.update(torch.tensor(VALUES[dist.get_rank()]))
    keeper = BestKeeper(nn.Linear(1, 1), directory=directory, metric_key="loss", metric_reduction="sum")
    # Both take part in the sync of the metric; only one of them shows what it is.
    value = metric if dist.get_rank() == 0 else metric.compute
    with pytest.raises(DesyncError) as caught:
        keeper.observe(value, update(1))
    return str(caught.value)


def test_ranks_that_disagree_on_who_takes_the_sum_are_told_so(tmp_path):
    messages = run_ranks(observed_by_one_as_a_metric_only, 2, tmp_path)
    assert len(set(messages)) == 1
    assert "summed by the metric itself" in messages[0].splitlines()[1]
    assert "summed by the metric itself" not in messages[0].splitlines()[2]


def test_collection_without_the_metric_lists_those_it_has(tmp_path):
    metrics = collection()
    metrics.update(torch.tensor([1.0]))
    with BestKeeper(nn.Linear(1, 1), directory=tmp_path, metric_key="loss/median") as keeper:
        with pytest.raises(InvalidMetricError, match="no metric 'loss/median'; it has: mean, sum"):
            keeper.observe(metrics, update(1))
        with pytest.raises(
            RankFailedError, match="observe loss/median on rank 0 of 1: ZeroDivisionError: division by zero"
        ):
            keeper.observe(lambda: 1 / 0, update(1))
