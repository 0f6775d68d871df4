"""A snapshot is the same, bit for bit, however the model is wrapped, sharded and shared out among ranks."""

from __future__ import annotations

import json
import tempfile
from itertools import chain

import pytest
import safetensors.torch
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from keepbest import BestKeeper, TrainingIteration, load
from keepbest.errors import SnapshotError
from keepbest.ranks import Ranks
from tests.kit.capture import gather
from tests.kit.models import Odd, expected_files, filled, same, same_bits
from tests.kit.pool import run_ranks
from tests.kit.strategies import FAMILIES, WRAPS, fits, models_for, variants, whole_weights

REF = "best_model.loss"
EVERY_FAMILY = pytest.mark.parametrize("family", FAMILIES)


def for_each_wrap(family, check, *arguments):
    """What is wrong with each strategy of the family; they share the ranks because starting some costs the most."""
    wraps = [wrap for wrap in FAMILIES[family] if fits(wrap, Ranks.connect().world_size)]
    return [(wrap, *fault) for wrap in wraps for fault in check(wrap, *arguments)]


def compare_snapshots(wrap):
    ranks = Ranks.connect()
    for make in models_for(wrap):
        expected = expected_files(make(0)) if ranks.is_main else {}
        for variant, wrap_variant in variants(WRAPS[wrap], few=ranks.world_size % 2 == 1):
            model = wrap_variant(make(0))
            weights = gather(model)
            if weights.left_out or weights.files.keys() != expected.keys():
                yield make.__name__, variant, list(weights.files)
            for name in weights.files.keys() & expected.keys():
                if not same(weights.files[name], expected[name]):
                    yield make.__name__, variant, name, list(weights.files[name])


@pytest.mark.parametrize(
    ("family", "world_size"),
    [("replicated", 1), *((family, size) for family in FAMILIES for size in (2, 3)), ("mesh", 4)],
)
def test_snapshot_equals_the_single_process_model(family, world_size):
    assert run_ranks(for_each_wrap, world_size, family, compare_snapshots) == [[]] * world_size


def read_files(folder, file_format):
    """What the libraries of others find in a snapshot."""
    if file_format == "torch":
        return {path.stem: torch.load(path, weights_only=True) for path in folder.glob("*.pt")}
    if file_format == "safetensors":
        return {path.stem: read_safetensors(path) for path in folder.glob("*.safetensors")}
    files = {}
    for path in folder.glob("*.dcp"):
        with tempfile.NamedTemporaryFile() as file:
            dcp_to_torch_save(path, file.name)
            state = torch.load(file.name, weights_only=True)
        ties = path.with_suffix(".tied.json")
        tied = json.loads(ties.read_text()) if ties.exists() else {}
        files[path.stem] = {**state, **{name: state[first] for name, first in tied.items()}}
    return files


def read_safetensors(path):
    state = safetensors.torch.load_file(path)
    with safetensors.safe_open(path, framework="pt") as file:
        tied = json.loads(file.metadata().get("tied", "{}"))
    return {**state, **{name: state[first] for name, first in tied.items()}}


def compare_what_is_kept(wrap, directory, file_format):
    """What differs on the disk, and in models of the same and another strategy that it is loaded into."""
    ranks = Ranks.connect()
    for make in models_for(wrap):
        run = directory / wrap / make.__name__
        with BestKeeper(WRAPS[wrap](make(0)), directory=run, metric_key="loss", format=file_format) as keeper:
            keeper.observe(1.0, TrainingIteration(update=1))
        if ranks.is_main:
            expected = expected_files(make(0))
            files = read_files(keeper.best_path, file_format)
            if files.keys() != expected.keys() or not all(same(files[name], expected[name]) for name in files):
                yield make.__name__, "on disk", {name: list(state) for name, state in files.items()}
        wanted = whole_weights(make(0))
        other = next_wrap(wrap, make, ranks.world_size)
        for name, target in [*variants(WRAPS[wrap], few=True), (other, WRAPS[other])]:
            model = target(make(1))
            before, loaded, after = whole_weights(model), load(run, REF, model), whole_weights(model)
            if (loaded.value, loaded.iteration) != (1.0, TrainingIteration(update=1)):
                yield make.__name__, name, loaded
            if are_same(before, wanted) or not are_same(after, wanted):
                yield make.__name__, name, "loaded"


def next_wrap(wrap, make, world_size):
    """Another strategy that takes the same model on as many ranks; also of another family."""
    names = list(WRAPS)
    after = names.index(wrap) + 1
    return next(name for name in chain(names[after:], names) if fits(name, world_size) and make in models_for(name))


def are_same(found, expected):
    return len(found) == len(expected) and all(map(same_bits, found, expected))


@pytest.mark.parametrize(
    ("family", "world_size", "file_format"),
    [
        *((family, 3, "torch") for family in FAMILIES),
        ("mesh", 4, "torch"),
        *((family, 2, "dcp") for family in FAMILIES),
        ("mesh", 4, "dcp"),
        *((family, 1, "safetensors") for family in FAMILIES),
    ],
)
def test_kept_snapshot_loads_into_the_same_and_another_strategy(family, world_size, file_format, tmp_path):
    faults = run_ranks(for_each_wrap, world_size, family, compare_what_is_kept, tmp_path, file_format)
    assert faults == [[]] * world_size


def load_what_does_not_fit(wrap, directory, file_format):
    with BestKeeper(filled(Odd(), 0), directory=directory / wrap, metric_key="loss", format=file_format) as keeper:
        keeper.observe(1.0, TrainingIteration(update=1))
    model = WRAPS[wrap](filled(Odd(width=4), 1))
    before = whole_weights(model)
    with pytest.raises(SnapshotError) as caught:
        load(directory / wrap, REF, model)
    if "shapes differ for down.bias, down.weight, module.weight. Nothing was loaded" not in str(caught.value):
        yield (str(caught.value),)
    if not are_same(whole_weights(model), before):
        yield ("changed",)


@pytest.mark.parametrize(("world_size", "file_format"), [(1, "torch"), (2, "dcp")])
@EVERY_FAMILY
def test_snapshot_of_another_model_is_refused_on_every_rank(family, world_size, file_format, tmp_path):
    faults = run_ranks(for_each_wrap, world_size, family, load_what_does_not_fit, tmp_path, file_format)
    assert faults == [[]] * world_size


def write_with(wrap, directory, make, file_format):
    with BestKeeper(WRAPS[wrap](make(0)), directory=directory, metric_key="loss", format=file_format) as keeper:
        keeper.observe(1.0, TrainingIteration(update=1))


def read_with(wrap, directory, make):
    model = WRAPS[wrap](make(1))
    load(directory, REF, model)
    return are_same(whole_weights(model), whole_weights(make(0)))


@pytest.mark.parametrize(
    ("saved_by", "ranks_before", "loaded_by", "ranks_after"),
    [
        ("fsdp2_blocks", 3, "single", 1),
        ("single", 1, "fsdp2_nested", 3),
        ("fsdp1_nested", 2, "fsdp2", 4),
        ("tensor_parallel_fsdp2", 4, "fsdp1_flat_blocks", 3),
        ("fsdp1_flat_blocks", 4, "ddp", 2),
        ("ddp", 2, "tensor_parallel_fsdp2", 4),
    ],
)
@pytest.mark.parametrize("file_format", ["torch", "dcp"])
def test_snapshot_loads_on_another_number_of_ranks(
    saved_by, ranks_before, loaded_by, ranks_after, file_format, tmp_path
):
    make = next(make for make in models_for(loaded_by)[::-1] if make in models_for(saved_by))
    run_ranks(write_with, ranks_before, saved_by, tmp_path, make, file_format)
    assert run_ranks(read_with, ranks_after, loaded_by, tmp_path, make) == [True] * ranks_after
