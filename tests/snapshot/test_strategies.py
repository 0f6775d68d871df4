"""A snapshot is the same, bit for bit, however the model is wrapped, sharded and shared out among ranks."""

from __future__ import annotations

import os
from itertools import chain
from pathlib import Path

import pytest
import torch

from keepbest import BestKeeper, TrainingIteration, load
from keepbest.errors import SnapshotError
from keepbest.ranks import Ranks
from keepbest.snapshot import select_parts, take_snapshot
from tests.ranks.pool import run_ranks
from tests.snapshot.strategies import (
    WRAPS,
    expected_files,
    filled,
    models_for,
    same,
    same_bits,
    Odd,
    variants,
    whole_weights,
)

REF = "best_model.loss"
FOUR_RANKS = ("fsdp2_replicated", "tensor_parallel_fsdp2")


def fits(wrap, world_size):
    if wrap in FOUR_RANKS:
        return world_size == 4
    return wrap != "single" or world_size == 1


CASES = [(wrap, size) for wrap in WRAPS for size in (1, 2, 3, 4) if fits(wrap, size)]


def compare_snapshots(wrap):
    """What differs, for each model and variant of the strategy."""
    ranks, faults = Ranks.connect(), []
    for make in models_for(wrap):
        expected = expected_files(make(0)) if ranks.is_main else {}
        for variant, wrap_variant in variants(WRAPS[wrap]):
            model = wrap_variant(make(0))
            weights = take_snapshot(model, select_parts(model), save_frozen_weights=True, ranks=ranks)
            if weights.left_out or weights.files.keys() != expected.keys():
                faults.append((make.__name__, variant, list(weights.files)))
            faults += [
                (make.__name__, variant, name, list(weights.files[name]))
                for name, state in expected.items()
                if not same(weights.files[name], state)
            ]
    return faults


@pytest.mark.parametrize(("wrap", "world_size"), CASES)
def test_snapshot_equals_the_single_process_model(wrap, world_size):
    assert run_ranks(compare_snapshots, world_size, wrap) == [[]] * world_size


def another(wrap, world_size, make):
    """The next strategy in the list that takes the same model on as many ranks."""
    names = list(WRAPS)
    after = names.index(wrap) + 1
    return next(
        name for name in chain(names[after:], names) if fits(name, world_size) and make in models_for(name)
    )


def keep_and_load(wrap, directory):
    """What is wrong on the disk, and in the models that it is loaded into."""
    ranks, faults = Ranks.connect(), []
    for make in models_for(wrap):
        reference, run = make(0), directory / make.__name__
        with BestKeeper(WRAPS[wrap](make(0)), directory=run, metric_key="loss") as keeper:
            keeper.observe(1.0, TrainingIteration(update=1))
        if ranks.is_main:
            folder = run / "checkpoints" / REF
            found = {path.stem: torch.load(path, weights_only=True) for path in folder.glob("*.pt")}
            expected = expected_files(reference)
            if found.keys() != expected.keys() or not all(same(found[name], expected[name]) for name in expected):
                faults.append((make.__name__, "on disk", {name: list(state) for name, state in found.items()}))
        wanted = whole_weights(reference)
        other = another(wrap, ranks.world_size, make)
        into = {name: dict(variants(WRAPS[wrap]))[name] for name in ("alone", "compiled, checkpointed")}
        for name, target in [*into.items(), (other, WRAPS[other])]:
            model = target(make(1))
            before = whole_weights(model)
            loaded = load(run, REF, model)
            after = whole_weights(model)
            if (loaded.value, loaded.iteration) != (1.0, TrainingIteration(update=1)):
                faults.append((make.__name__, name, loaded))
            if all(map(same_bits, before, wanted)) or not all(map(same_bits, after, wanted)):
                faults.append((make.__name__, name, [i for i,(a,b) in enumerate(zip(after,wanted)) if not same_bits(a,b)], len(after), len(wanted)))
    return faults


@pytest.mark.parametrize(("wrap", "world_size"), CASES)
def test_kept_snapshot_loads_into_the_same_and_another_strategy(wrap, world_size, tmp_path):
    assert run_ranks(keep_and_load, world_size, wrap, tmp_path) == [[]] * world_size


def load_what_does_not_fit(wrap, directory):
    keeper = BestKeeper(filled(Odd(), 0), directory=directory, metric_key="loss")
    with keeper:
        keeper.observe(1.0, TrainingIteration(update=1))
    model = WRAPS[wrap](filled(Odd(width=4), 1))
    before = whole_weights(model)
    with pytest.raises(SnapshotError) as caught:
        load(directory, REF, model)
    return str(caught.value), all(map(same_bits, whole_weights(model), before))


@pytest.mark.parametrize(("wrap", "world_size"), [(wrap, size) for wrap, size in CASES if size in (1, 2)])
def test_snapshot_of_another_model_is_refused_on_every_rank_with_nothing_changed(wrap, world_size, tmp_path):
    outcomes = run_ranks(load_what_does_not_fit, world_size, wrap, tmp_path)
    for message, unchanged in outcomes:
        assert "shapes differ for down.bias, down.weight, module.weight. Nothing was loaded" in message
        assert unchanged
