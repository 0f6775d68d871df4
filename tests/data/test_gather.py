from __future__ import annotations

import os
import signal
import time

import pytest
import torch

from keepbest.data import evaluation_indices, gather_in_dataset_order
from keepbest.errors import DesyncError, PoisonedError, RankFailedError
from keepbest.ranks import Ranks
from tests.kit.pool import run_ranks, start_ranks


def table(length):
    """Rows whose content tells their number, in several dtypes and shapes."""
    rows = torch.arange(length)
    return {
        "float64": rows.double() / 3,
        "bfloat16": rows.to(torch.bfloat16),
        "bool": rows % 3 == 0,
        "int16": rows.to(torch.int16)[:, None, None] + torch.arange(6, dtype=torch.int16).reshape(2, 3),
        "complex64": torch.complex(rows.float(), -rows.float()),
        "empty": torch.empty(length, 0),
        "transposed": (rows + torch.arange(4)[:, None]).double().t(),
    }


def gather_table(length):
    ranks = Ranks.connect()
    mine = evaluation_indices(length, rank=ranks.rank, world_size=ranks.world_size)
    share = {name: values[mine] for name, values in table(length).items()}
    whole = gather_in_dataset_order("gather a table", lambda: share, dataset_length=length, ranks=ranks)
    bare = gather_in_dataset_order("gather", lambda: share["float64"], dataset_length=length, ranks=ranks)
    return {**whole, "bare": bare}


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_every_rank_gets_all_rows_in_the_order_of_the_dataset(world_size):
    for length in (3, 10, 12):
        expected = table(length)
        expected["bare"] = expected["float64"]
        for whole in run_ranks(gather_table, world_size, length):
            assert whole.keys() == expected.keys()
            for name, values in expected.items():
                assert whole[name].dtype == values.dtype
                assert torch.equal(whole[name], values), name


def test_a_process_without_a_group_gets_its_own_rows():
    assert torch.equal(gather_table(5)["bare"], table(5)["float64"])


def gather_what_rank_1_cannot_give(fault):
    ranks = Ranks.connect()

    def work():
        if ranks.rank == 1:
            if fault == "error":
                raise OSError("sample 3 cannot be read")
            if fault == "rows":
                return torch.zeros(2)
            if fault == "dtype":
                return torch.zeros(3, dtype=torch.float64)
        return torch.zeros(3)

    try:
        gather_in_dataset_order("evaluate", work, dataset_length=6, ranks=ranks)
    except (RankFailedError, DesyncError) as error:
        return type(error), str(error)


@pytest.mark.parametrize(
    ("fault", "kind", "message"),
    [
        ("error", RankFailedError, "failed to evaluate on rank 1 of 2: OSError: sample 3 cannot be read"),
        ("rows", RankFailedError, "one row for each of this rank's 3 samples, found shape [2]"),
        ("dtype", DesyncError, "rank 0: torch.float32 [3]; rank 1: torch.float64 [3]"),
    ],
)
def test_a_fault_of_one_rank_is_raised_on_all(fault, kind, message):
    outcomes = run_ranks(gather_what_rank_1_cannot_give, 2, fault)
    assert len(set(outcomes)) == 1
    assert outcomes[0][0] is kind
    assert message in outcomes[0][1]


class PreemptedError(RuntimeError):
    """What a handler of a signal raises."""


def preempt(*_):
    raise PreemptedError


def gather_and_do(before_tensors_travel):
    """All have their results, and this rank does something else before it sends them."""
    ranks, join_tensors = Ranks.connect(), torch.cat

    def do_and_join(*arguments, **settings):
        before_tensors_travel()
        return join_tensors(*arguments, **settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "cat", do_and_join)
        gather_in_dataset_order("evaluate", lambda: torch.zeros(3), dataset_length=6, ranks=ranks)


def gather_from_a_rank_that_dies():
    is_dying = Ranks.connect().rank == 1
    with pytest.raises(RankFailedError) as caught:
        gather_and_do(lambda: os._exit(1) if is_dying else None)
    return str(caught.value)


def test_rank_that_dies_in_a_gather_is_noticed():
    with start_ranks(gather_from_a_rank_that_dies, 2) as ranks:
        [outcome] = ranks.collect(ranks=[0])
    assert "rank 0 of 2 lost contact with another rank while it gathered evaluation results" in outcome.result


def gather_until_a_signal_comes():
    ranks = Ranks.connect()
    if ranks.rank == 1:
        gather_and_do(lambda: time.sleep(0.6))  # longer than the signal takes
        return ""
    signal.signal(signal.SIGALRM, preempt)
    with pytest.raises(PreemptedError):
        gather_and_do(lambda: signal.setitimer(signal.ITIMER_REAL, 0.2))
    with pytest.raises(PoisonedError) as caught:
        ranks.agree("meet again", lambda: None)
    return str(caught.value)


def test_handler_that_cuts_off_a_gather_raises_its_own_error():
    message, _ = run_ranks(gather_until_a_signal_comes, 2)
    assert "a gather of evaluation results was cut off" in message
