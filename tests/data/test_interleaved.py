from __future__ import annotations

from itertools import chain, islice

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from keepbest.data import (
    BatchRequest,
    DataContainer,
    InterleavedSampler,
    SamplerConfig,
    build_loader,
    evaluation_indices,
)
from keepbest.errors import ConfigError
from keepbest.interval import Interval

EPOCH, UPDATE = Interval(every_n_epochs=1), Interval(every_n_updates=2)


def make_sampler(container=None, *, rank=0, world_size=1, **settings):
    container = container or DataContainer({"train": range(26), "val": range(5), "test": range(3)})
    defaults = {"train_key": "train", "batch_size": 12 // world_size, "seed": 3, "end_update": 4}
    return InterleavedSampler(container, rank=rank, world_size=world_size, **defaults | settings)


def global_batches(world_size, accumulation_steps=1):
    """The set of samples of each update, over all ranks."""
    per_rank = []
    for rank in range(world_size):
        sampler = make_sampler(
            rank=rank,
            world_size=world_size,
            batch_size=12 // world_size // accumulation_steps,
            accumulation_steps=accumulation_steps,
        )
        requests = list(sampler)
        assert len(sampler) == len(requests)
        assert all(len(request.indices) == 12 // world_size // accumulation_steps for request in requests)
        updates = [
            requests[start : start + accumulation_steps] for start in range(0, len(requests), accumulation_steps)
        ]
        per_rank.append([[index for micro in update for index in micro.indices] for update in updates])
    return [sorted(chain(*parts)) for parts in zip(*per_rank, strict=True)]


def test_samples_of_an_update_do_not_depend_on_the_ranks():
    expected = global_batches(1)
    assert len(expected) == 4
    # Two full batches of 12 fit into an epoch of 26 samples; within an epoch no sample comes twice.
    assert len({*expected[0], *expected[1]}) == len({*expected[2], *expected[3]}) == 24
    assert expected[:2] != expected[2:]
    for world_size in (2, 3, 4):
        assert global_batches(world_size) == expected
    assert global_batches(2, accumulation_steps=3) == expected
    assert global_batches(1, accumulation_steps=4) == expected


def test_epochs_are_shares_of_a_permutation_of_seed_and_epoch():
    whole = torch.randperm(26, generator=torch.Generator().manual_seed(3 + 1)).tolist()
    for rank in range(3):
        mine = [index for request in islice(make_sampler(rank=rank, world_size=3), 2, 4) for index in request.indices]
        assert mine == whole[rank:24:3]


def test_evaluations_follow_the_update_that_makes_them_due():
    configs = [
        SamplerConfig("val", EPOCH, batch_size=2),
        SamplerConfig("test", UPDATE),
        SamplerConfig("val", Interval(every_n_samples=24), batch_size=4),
    ]
    requests = list(make_sampler(configs=configs, end_update=3))
    train, evaluations = requests[:2], requests[2:-1]
    assert [request.dataset_key for request in train] == ["train", "train"]
    # After update 2: those of after_update in their order, then those of after_epoch.
    assert evaluations == [
        BatchRequest("test", [0, 1, 2]),
        BatchRequest("val", [0, 1, 2, 3]),
        BatchRequest("val", [4]),
        BatchRequest("val", [0, 1]),
        BatchRequest("val", [2, 3]),
        BatchRequest("val", [4]),
    ]
    assert requests[-1].dataset_key == "train"


@given(world_size=st.sampled_from([1, 2, 3, 4]), start=st.integers(0, 6), steps=st.sampled_from([1, 3]))
def test_resumed_sampler_goes_on_where_the_whole_one_would_be(world_size, start, steps):
    configs = [SamplerConfig("val", Interval(every_n_updates=3)), SamplerConfig("test", EPOCH, batch_size=1)]
    settings = {"batch_size": 12 // world_size // steps, "accumulation_steps": steps, "world_size": world_size}
    whole = make_sampler(configs=configs, end_update=7, **settings)
    before = make_sampler(configs=configs, end_update=start, **settings)
    after = make_sampler(configs=configs, start_update=start, end_update=7, **settings)
    assert list(before) + list(after) == list(whole)
    assert len(before) + len(after) == len(whole) == len(list(whole))


@given(length=st.integers(1, 30), world_size=st.integers(1, 6))
def test_ranks_evaluate_equal_shares_that_make_up_the_dataset(length, world_size):
    shares = [evaluation_indices(length, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert {len(share) for share in shares} == {-(-length // world_size)}
    interleaved = [index for row in zip(*shares, strict=True) for index in row]
    assert interleaved[:length] == list(range(length))


def test_a_training_set_without_one_full_update_is_refused():
    with pytest.raises(ConfigError, match="'train' has 26 samples, fewer than the effective batch of 28"):
        make_sampler(batch_size=7, accumulation_steps=2, world_size=2)
    with pytest.raises(ConfigError, match="no dataset 'vall'"):
        make_sampler(configs=[SamplerConfig("vall", EPOCH)])


def tell(samples):
    return "train", samples


def tell_val(samples):
    return "val", samples


@pytest.mark.parametrize("num_workers", [0, 1])
def test_loader_delivers_batches_in_order_by_their_collators(num_workers):
    container = DataContainer(
        {"train": range(100, 107), "val": range(3)}, {"train": tell, "val": tell_val}, num_workers=num_workers
    )
    sampler = make_sampler(container, batch_size=3, end_update=3, configs=[SamplerConfig("val", EPOCH, batch_size=2)])
    before = torch.get_rng_state()
    batches = list(build_loader(sampler))
    assert torch.equal(torch.get_rng_state(), before)
    expected = [(key, [index + 100 if key == "train" else index for index in indices]) for key, indices in sampler]
    assert batches == expected
    assert [key for key, _ in batches] == ["train", "train", "val", "val", "train"]
