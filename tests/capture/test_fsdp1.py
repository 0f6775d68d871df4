"""What rank 0 holds while the units of an FSDP1 model are gathered one by one."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn

from keepbest.ranks import Ranks
from keepbest.staging.host import HostStaging
from tests.kit.capture import gather
from tests.kit.models import Bare, Odd, filled, same
from tests.kit.pool import run_ranks
from tests.kit.strategies import fsdp1, fsdp1_flat, whole_weights

WIDTH, UNITS = 64, 4


def live_bytes() -> int:
    """Of all memory that a tensor of this process points to."""
    gc.collect()
    sizes = dict[int, int]()
    for storage in [thing.untyped_storage() for thing in gc.get_objects() if isinstance(thing, torch.Tensor)]:
        # A row begins where its first tensor does.
        sizes[storage.data_ptr()] = max(storage.nbytes(), sizes.get(storage.data_ptr(), 0))
    return sum(sizes.values())


def bytes_beside_the_buffer(wrap, is_nested):
    """After each unit that was gathered on rank 0, how much more memory was held than before."""
    units = [wrap(nn.Linear(WIDTH, WIDTH, bias=False)) for _ in range(UNITS)]
    model = nn.Sequential(*units)
    model = wrap(model) if is_nested else model
    ranks, staging, held = Ranks.connect(), HostStaging(make_room=lambda: None), list[int]()

    def snapshot():
        return gather(model, staging=staging)

    snapshot().slot.release()  # the next one finds a slot that is there already
    before = live_bytes()
    for unit in units:  # FSDP1's own hook was first, so the unit is sharded again
        unit.register_state_dict_post_hook(lambda *_: held.append(live_bytes() - before))
    weights = snapshot()
    assert len(held) == 2 * UNITS  # since the units have hooks, what these make of shards is looked at first
    if ranks.is_main:
        expected = {f"{number}.weight": value for number, value in enumerate(whole_weights(model))}
        assert same(weights.files["model"], expected)
    else:
        whole_weights(model)
    return held[UNITS:]


@pytest.mark.parametrize(("wrap", "is_nested"), [(fsdp1, True), (fsdp1_flat, False)])
def test_no_gathered_unit_outlives_its_copy_into_the_buffer(wrap, is_nested):
    for held in run_ranks(bytes_beside_the_buffer, 2, wrap, is_nested):
        assert max(held) < WIDTH * WIDTH * 4 / 2  # not even one parameter


def shared_storages(wrap):
    model = wrap(Odd())
    ranks = Ranks.connect()
    weights = gather(model)
    state = weights.files["model"] if ranks.is_main else {}
    return {key for key in state if [value.data_ptr() for value in state.values()].count(state[key].data_ptr()) > 1}


@pytest.mark.parametrize("wrap", [fsdp1, fsdp1_flat])
def test_tied_weights_of_a_unit_stay_tied(wrap):
    assert run_ranks(shared_storages, 2, wrap) == [{"tied.first.weight", "tied.second.weight"}, set()]


def weights_of_one_part(wrap):
    tied = Bare({"encoder": nn.Linear(3, 3, bias=False), "decoder": nn.Linear(3, 3, bias=False)})
    tied.decoder.weight = tied.encoder.weight
    model, ranks = wrap(filled(tied, 0)), Ranks.connect()
    (weight,) = whole_weights(model)
    weights = gather(model, ["decoder"])
    return not ranks.is_main or (
        list(weights.files) == ["decoder"] and same(weights.files["decoder"], {"weight": weight})
    )


@pytest.mark.parametrize("wrap", [fsdp1, fsdp1_flat])
def test_weight_that_is_tied_to_one_of_a_part_left_out_is_kept(wrap):
    assert run_ranks(weights_of_one_part, 2, wrap) == [True, True]
