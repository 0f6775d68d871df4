"""What a best takes of the memory of the device, and that it does without where there is none."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from keepbest import BestKeeper, load
from tests.cuda.device import DEVICE, MIB, assert_same, change, copied, keeper_of, wide, zero

REF = "best_model.loss"
MODEL = 256  # MiB
BLOCK = 2 * MIB  # torch takes memory in blocks of this size

pytestmark = pytest.mark.usefixtures("needs_cuda")


@contextmanager
def ballast(leaves: int) -> Iterator[None]:
    """Takes all memory of the device except so many MiB, or a few more."""
    torch.cuda.empty_cache()
    held = []
    try:
        # In pieces, since there may be no room for all of it in one. torch takes no less than 20 MiB for a smaller one.
        for piece in (1024, 64, 10):
            with contextlib.suppress(torch.OutOfMemoryError):  # what is left may be in smaller pieces yet
                while torch.cuda.mem_get_info()[0] >= (piece + leaves) * MIB:
                    held.append(torch.empty(piece * MIB, dtype=torch.uint8, device=DEVICE))
        yield
    finally:
        held.clear()
        torch.cuda.empty_cache()


class Growth:
    """The most memory that torch had in use, and had reserved, beyond that of now. In bytes."""

    def __init__(self) -> None:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        self._before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()

    @property
    def allocated(self) -> int:
        return torch.cuda.max_memory_allocated() - self._before[0]

    @property
    def reserved(self) -> int:
        return torch.cuda.max_memory_reserved() - self._before[1]

    @property
    def left(self) -> int:
        """What is still in use beyond that of before."""
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated() - self._before[0]


def keep_two(folder, model, **settings):
    """The weights of the second of two bests, with weights that change at once."""
    with BestKeeper(model, directory=folder, metric_key="loss", **settings) as keeper:
        for epoch in (1, 2):
            expected = copied(model)
            keeper.observe(-float(epoch), epoch=epoch)
            change(model)
            keeper.flush()
    return expected


def assert_kept(folder, model, expected):
    load(folder, REF, zero(model))
    assert_same(copied(model), expected)


def images() -> nn.Module:
    """Weights out of order in memory, which torch puts in order on the device before they come to the host."""
    model = nn.Sequential(*(nn.Conv2d(256, 512, 4, device=DEVICE) for _ in range(4)))
    return model.to(memory_format=torch.channels_last)


@pytest.mark.parametrize("leaves", [1, 160])
def test_no_room_to_put_weights_in_order(tmp_path, file_format, async_save, leaves):
    model = images()
    with ballast(leaves):
        expected = keep_two(tmp_path, model, format=file_format, async_save=async_save)
    assert_kept(tmp_path, model, expected)


def test_no_room_to_change_the_signs_of_weights(tmp_path, file_format, async_save):
    values = torch.randn(8 * MIB, dtype=torch.complex64, device=DEVICE).conj().imag
    expected = {"value": values.cpu().resolve_neg()}
    model, target = nn.Module(), nn.Module()
    model.register_buffer("value", values)
    target.register_buffer("value", torch.zeros(values.shape))
    with ballast(1), keeper_of(model, tmp_path, file_format, async_save) as keeper:
        keeper.observe(1.0, epoch=1)
    load(tmp_path, REF, target)
    assert_same(copied(target), expected)


class LoadsByItself(nn.Module):
    """What it has loaded is compared with what it was given, since it reports that as missing."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(8 * MIB, device=DEVICE))

    def _load_from_state_dict(self, state_dict, prefix, _metadata, _strict, missing, _unexpected, _errors):
        missing.append(f"{prefix}weight")
        with torch.no_grad():
            self.weight.copy_(state_dict[f"{prefix}weight"])


def test_no_room_to_compare_what_a_model_has_loaded(tmp_path, file_format):
    model = LoadsByItself()
    with keeper_of(model, tmp_path, file_format, async_save=False) as keeper:
        keeper.observe(1.0, epoch=1)
    expected = copied(model)
    with ballast(1):
        load(tmp_path, REF, zero(model))
    assert_same(copied(model), expected)


def test_host_memory_that_cannot_be_pinned(tmp_path, file_format, async_save, monkeypatch):
    runtime = torch.cuda.cudart()

    class Refusing:
        """CUDA as it is where no memory of the host may be locked."""

        def __getattr__(self, name):
            return getattr(runtime, name)

        def cudaHostRegister(self, _address, nbytes, flags):  # noqa: N802  # the name in CUDA
            return runtime.cudaHostRegister(0, nbytes, flags)

    monkeypatch.setattr(torch.cuda, "cudart", Refusing)
    model = wide(MODEL, count=4)
    expected = keep_two(tmp_path, model, format=file_format, async_save=async_save)
    assert_kept(tmp_path, model, expected)


@pytest.mark.parametrize("leaves", [8, 160])
def test_no_room_for_a_copy_of_the_weights(tmp_path, file_format, async_save, leaves):
    model = wide(MODEL, count=4)
    with ballast(leaves):
        growth, (free, _) = Growth(), torch.cuda.mem_get_info()
        expected = keep_two(tmp_path, model, format=file_format, async_save=async_save)
        assert growth.reserved <= free // 2 + BLOCK, f"{growth.reserved / MIB} of {free / MIB} MiB were reserved"
    assert_kept(tmp_path, model, expected)


def test_limit_of_the_process_leaves_no_room(tmp_path, file_format, async_save):
    model = wide(MODEL, count=4)
    torch.cuda.empty_cache()
    _, total = torch.cuda.mem_get_info()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 32 * MIB) / total)
    try:
        expected = keep_two(tmp_path, model, format=file_format, async_save=async_save)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert_kept(tmp_path, model, expected)


def test_share_of_zero_takes_no_memory(tmp_path, file_format, async_save):
    model = wide(MODEL, count=64)
    with keeper_of(model, tmp_path, file_format, async_save, staging_device_share=0.0) as keeper:
        growth = Growth()
        expected = copied(model)
        keeper.observe(1.0, epoch=1)
        change(model)
        keeper.flush()
        assert growth.allocated <= BLOCK, f"{growth.allocated / MIB} MiB were allocated"
    assert_kept(tmp_path, model, expected)


def test_share_bounds_what_is_taken(tmp_path, async_save):
    model = wide(MODEL, count=64)
    with ballast(leaves=2 * MODEL):
        free, _ = torch.cuda.mem_get_info()
        growth = Growth()
        expected = keep_two(tmp_path, model, async_save=async_save, staging_device_share=0.25)
        assert growth.reserved <= free // 4 + 20 * MIB, f"{growth.reserved / MIB} MiB were reserved"
    assert_kept(tmp_path, model, expected)


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan"), "half"])
def test_share_that_is_no_share_is_refused(tmp_path, share):
    with pytest.raises(ValueError, match="staging_device_share"):
        BestKeeper(wide(1), directory=tmp_path, metric_key="loss", staging_device_share=share)


def test_memory_is_given_back_when_a_best_is_saved(tmp_path, file_format, async_save):
    model = wide(MODEL, count=4)
    with BestKeeper(model, directory=tmp_path, metric_key="loss", format=file_format, async_save=async_save) as keeper:
        keeper.observe(3.0, epoch=1)
        keeper.flush()
        growth = Growth()
        free, _ = torch.cuda.mem_get_info()
        keeper.observe(2.0, epoch=2)
        keeper.flush()
        assert growth.left == 0, f"{growth.left / MIB} MiB are still in use"
        # As training may take all that was free. torch gives back what it has reserved when memory runs out.
        whole = torch.empty(free - 64 * MIB, dtype=torch.uint8, device=DEVICE)
        del whole


def test_small_tensors_of_training_break_no_memory_into_pieces(tmp_path):
    model, small = wide(MODEL, count=4), []
    with BestKeeper(model, directory=tmp_path, metric_key="loss", async_save=True) as keeper:
        keeper.observe(0.0, epoch=0)
        keeper.flush()  # what a thread prepares on the device from the start on is not measured
        growth = Growth()
        for epoch in range(1, 6):
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            keeper.observe(-float(epoch), epoch=epoch)
            copied_at_once = torch.cuda.max_memory_allocated() - before
            assert copied_at_once >= MODEL * MIB, f"{copied_at_once / MIB} MiB were copied on the device"
            keeper.flush()
            small.append(torch.empty(3 * MIB, dtype=torch.uint8, device=DEVICE))
        # torch takes 20 MiB for each that fits nowhere.
        limit = MODEL * MIB + len(small) * 20 * MIB + BLOCK
        assert growth.reserved <= limit, f"{growth.reserved / MIB} MiB were reserved"


def test_training_takes_all_memory_while_a_best_is_under_way(tmp_path):
    model = wide(MODEL, count=4)
    with BestKeeper(model, directory=tmp_path, metric_key="loss", async_save=True) as keeper:
        keeper.observe(2.0, epoch=1)
        keeper.flush()
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info()
        expected = copied(model)
        keeper.observe(1.0, epoch=2)
        change(model)
        whole = torch.empty(free - 64 * MIB, dtype=torch.uint8, device=DEVICE)  # torch waits for the copy first
        del whole
    assert_kept(tmp_path, model, expected)


def test_memory_does_not_grow_over_bests(tmp_path, file_format, async_save):
    model = wide(64, count=16)
    with BestKeeper(model, directory=tmp_path, metric_key="loss", format=file_format, async_save=async_save) as keeper:
        for epoch in range(1, 9):
            keeper.observe(-float(epoch), epoch=epoch)
            change(model)
            if epoch == 3:
                keeper.flush()
                growth = Growth()
        keeper.flush()
        assert growth.left == 0
