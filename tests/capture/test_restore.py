"""Loading goes through the model's own `load_state_dict`, in every format, or is refused with the model untouched."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from keepbest import BestKeeper, TrainingIteration, load
from keepbest.errors import SnapshotError
from tests.kit.models import filled, same_bits
from tests.kit.pool import run_ranks
from tests.kit.strategies import WRAPS, whole_weights

REF = "best_model.loss"
FORMATS = ["torch", "safetensors", "dcp"]
EVERY_FORMAT = pytest.mark.parametrize("file_format", FORMATS)


def keep(model, directory, file_format="torch"):
    with BestKeeper(model, directory=directory, metric_key="loss", format=file_format) as keeper:
        keeper.observe(1.0, TrainingIteration(update=1))


def equal(found, expected):
    return len(found) == len(expected) and all(map(same_bits, found, expected))


class Fused(nn.Module):
    """Fused in memory, saved as two."""

    def __init__(self):
        super().__init__()
        self.qk = nn.Parameter(torch.zeros(4, 4))
        self.register_state_dict_post_hook(split)
        self.register_load_state_dict_pre_hook(fuse)


def split(_module, state, prefix, _metadata):
    fused = state.pop(f"{prefix}qk")
    state[f"{prefix}q"], state[f"{prefix}k"] = fused[:2].clone(), fused[2:].clone()


def fuse(_module, state, prefix, *_others):
    if f"{prefix}q" in state:
        state[f"{prefix}qk"] = torch.cat([state.pop(f"{prefix}q"), state.pop(f"{prefix}k")])


class Transposed(nn.Module):
    """Saved under its own name in another layout, of the same shape."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, 4))

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        destination[f"{prefix}weight"] = self.weight.detach().t().contiguous()

    def _load_from_state_dict(self, state, prefix, *others):
        super()._load_from_state_dict(
            {**state, f"{prefix}weight": state[f"{prefix}weight"].t().contiguous()}, prefix, *others
        )


class Versioned(nn.Linear):
    """What has no version, or an old one, is converted when it is loaded."""

    _version = 2

    def _load_from_state_dict(self, state, prefix, metadata, *others):
        if metadata.get("version") != 2:
            state = {key: -value if isinstance(value, torch.Tensor) else value for key, value in state.items()}
        super()._load_from_state_dict(state, prefix, metadata, *others)


class Counting(nn.Linear):
    """With an override, as models have that check or rename what they are given."""

    loads = 0

    def load_state_dict(self, state_dict, strict=True, assign=False):
        self.loads += 1
        return super().load_state_dict(state_dict, strict=strict, assign=assign)


def make(kind):
    hooked = {"fused": Fused, "transposed": Transposed, "versioned": lambda: Versioned(4, 4)}[kind]()
    return nn.Sequential(hooked, nn.Linear(4, 2))


def load_hooked(directory, kind, file_format, wrap):
    model = WRAPS[wrap](filled(make(kind), 0))
    keep(model, directory, file_format)
    target = WRAPS[wrap](filled(make(kind), 1))
    load(directory, REF, target)
    return equal(whole_weights(target), whole_weights(model))


@EVERY_FORMAT
@pytest.mark.parametrize("kind", ["fused", "transposed", "versioned"])
@pytest.mark.parametrize(("wrap", "world_size"), [("single", 1), ("ddp", 2), ("fsdp2", 2)])
def test_hooks_run_in_every_format(kind, file_format, wrap, world_size, tmp_path):
    if (kind, wrap) == ("fused", "fsdp2"):
        pytest.skip("torch itself cannot cut and join what is sharded along that dimension")
    assert run_ranks(load_hooked, world_size, tmp_path, kind, file_format, wrap) == [True] * world_size


def load_overridden(directory, file_format, wrap):
    inner = filled(Counting(3, 2), 0)
    model = WRAPS[wrap](inner)
    keep(model, directory, file_format)
    wanted = whole_weights(model)
    filled(inner, 1) if wrap == "ddp" else None
    load(directory, REF, model)
    return inner.loads, equal(whole_weights(model), wanted)


@EVERY_FORMAT
@pytest.mark.parametrize("wrap", ["ddp", "fsdp2"])
def test_override_runs_also_inside_a_wrapper(file_format, wrap, tmp_path):
    assert run_ranks(load_overridden, 2, tmp_path, file_format, wrap) == [(1, True)] * 2


class Bare(nn.Linear):
    def state_dict(self):
        return nn.Module.state_dict(self)


class BareInPart(nn.Linear):
    def state_dict(self):
        return {key: value for key, value in nn.Module.state_dict(self).items() if key != "bias"}


class Prefixed(nn.Linear):
    def state_dict(self, destination=None, prefix=""):
        return nn.Module.state_dict(self, destination=destination, prefix=prefix)


class PrefixOnly(nn.Linear):
    def state_dict(self, prefix=""):
        return nn.Module.state_dict(self, prefix=prefix)


class WithoutStrict(nn.Linear):
    def load_state_dict(self, state):
        return nn.Module.load_state_dict(self, state)


def load_old_signature(directory, kind, file_format, wrap):
    model = WRAPS[wrap](filled(kind(3, 2), 0))
    keep(model, directory, file_format)
    target = WRAPS[wrap](filled(kind(3, 2), 1))
    loaded = load(directory, REF, target)
    weight, bias = (
        same_bits(found, saved) for found, saved in zip(whole_weights(target), whole_weights(model), strict=True)
    )
    return loaded.keys, weight, bias


@pytest.mark.parametrize("kind", [Bare, BareInPart, Prefixed, PrefixOnly, WithoutStrict])
@pytest.mark.parametrize(("wrap", "world_size"), [("single", 1), ("ddp", 2), ("fsdp1", 2), ("fsdp2", 2)])
@pytest.mark.parametrize("file_format", ["torch", "dcp"])
def test_signatures_of_old_work(kind, wrap, world_size, file_format, tmp_path):
    if (kind, wrap) == (BareInPart, "fsdp1"):
        pytest.skip("torch itself refuses a state dict without a weight of a unit")
    is_whole = kind is not BareInPart
    expected = (("bias", "weight") if is_whole else ("weight",), True, is_whole)
    assert run_ranks(load_old_signature, world_size, tmp_path, kind, file_format, wrap) == [expected] * world_size


class Forgetful(nn.Linear):
    """Gives more than it takes."""

    def state_dict(self, *arguments, prefix="", **settings):
        state = super().state_dict(*arguments, prefix=prefix, **settings)
        return {**state, f"{prefix}scale": torch.ones(1)}


class Dropping(nn.Linear):
    """Leaves out what it does not like."""

    def load_state_dict(self, state, strict=True):
        return super().load_state_dict({"weight": state["weight"]}, strict=False)


class TakingItself(nn.Linear):
    """Takes one weight on its own."""

    def load_state_dict(self, state, strict=True):
        self.bias.data.copy_(state["bias"])
        return super().load_state_dict({"weight": state["weight"]}, strict=False)


@EVERY_FORMAT
@pytest.mark.parametrize(("kind", "key"), [(Forgetful, "scale"), (Dropping, "bias")])
def test_weights_that_the_model_does_not_take_are_an_error(kind, key, file_format, tmp_path):
    keep(filled(kind(2, 2), 0), tmp_path, file_format)
    with pytest.raises(SnapshotError, match=f"load_state_dict of the model has no use for {key},"):
        load(tmp_path, REF, filled(kind(2, 2), 1))


@EVERY_FORMAT
def test_weights_that_an_override_takes_itself_are_loaded(file_format, tmp_path):
    keep(model := filled(TakingItself(2, 2), 0), tmp_path, file_format)
    load(tmp_path, REF, target := filled(TakingItself(2, 2), 1))
    assert equal(whole_weights(target), whole_weights(model))


def on_meta():
    with torch.device("meta"):
        return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))


def load_into_meta(directory, file_format, wrap):
    target = on_meta()
    if wrap == "fsdp2":
        fully_shard(target, mesh=init_device_mesh("cpu", (2,)))
    with pytest.raises(
        SnapshotError,
        match=r"model: the meta device has no room \(call to_empty\(device=...\) of the model before\) for 0",
    ):
        load(directory, REF, target)
    is_untouched = all(parameter.is_meta for parameter in target.parameters())
    target.to_empty(device="cpu")
    load(directory, REF, target)
    return is_untouched, whole_weights(target)


@EVERY_FORMAT
@pytest.mark.parametrize("wrap", ["plain", "fsdp2"])
def test_model_on_the_meta_device_is_refused_on_every_rank(file_format, wrap, tmp_path):
    model = filled(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), 0)
    keep(model, tmp_path, file_format)
    for is_untouched, found in run_ranks(load_into_meta, 2, tmp_path, file_format, wrap):
        assert is_untouched
        assert same_bits(found[0], model[0].weight)


@EVERY_FORMAT
def test_model_that_was_made_in_inference_mode_is_refused(file_format, tmp_path):
    keep(filled(nn.Linear(2, 2), 0), tmp_path, file_format)
    with torch.inference_mode():
        target = nn.Linear(2, 2)
    before = target.weight.clone()
    with pytest.raises(SnapshotError, match=r"inference_mode\(\).*outside\) for bias, weight"):
        load(tmp_path, REF, target)
    assert torch.equal(target.weight, before)


def lazy():
    return nn.Sequential(nn.LazyLinear(3), nn.ReLU(), nn.LazyBatchNorm1d(), nn.Linear(3, 1))


@EVERY_FORMAT
def test_lazy_model_is_materialized(file_format, tmp_path):
    model = lazy()
    model(torch.randn(4, 5))
    keep(model, tmp_path, file_format)
    load(tmp_path, REF, target := lazy())
    assert equal(whole_weights(target), whole_weights(model))
    assert equal([target(torch.ones(2, 5))], [model(torch.ones(2, 5))])


class Holder(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.register_buffer("value", value)


def as_csr(dense):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta", UserWarning)
        return dense.to_sparse_csr()


def quantized():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.quantize_per_tensor", UserWarning)
        return torch.quantize_per_tensor(torch.arange(3.0), 0.1, 0, torch.quint8)


FORMS = {
    "coo": lambda: torch.eye(3).to_sparse(),
    "csr": lambda: as_csr(torch.eye(3)),
    "conjugate": lambda: torch.tensor([0j, 1j, 2 + 1j]).conj(),
    "strides": lambda: torch.ones(10)[::2],
    "no elements": lambda: torch.zeros(0, 3),
    "channels last": lambda: torch.arange(48.0).view(1, 3, 4, 4).to(memory_format=torch.channels_last),
    "float8": lambda: torch.arange(4.0).to(torch.float8_e4m3fn),
    "quantized": quantized,
}


def emptied(kind):
    value = FORMS[kind]()
    if value.layout == torch.strided and not value.is_quantized:
        return torch.zeros(value.shape, dtype=torch.uint8).to(value.dtype)
    return value.to("cpu", copy=True).mul_(0) if not value.is_quantized else FORMS[kind]()


def load_form(directory, kind):
    load(directory, REF, target := Holder(emptied(kind)))
    found, saved = target.value, FORMS[kind]()
    if saved.is_quantized:
        found, saved = found.dequantize(), saved.dequantize()
    return found.layout == saved.layout and torch.equal(
        found.to_dense().to(torch.complex64), saved.to_dense().to(torch.complex64)
    )


@pytest.mark.parametrize("kind", FORMS)
def test_torch_file_holds_unusual_tensors_for_every_rank(kind, tmp_path):
    keep(Holder(FORMS[kind]()), tmp_path)
    assert run_ranks(load_form, 2, tmp_path, kind) == [True] * 2


@pytest.mark.parametrize(
    ("saved", "target", "message"),
    [
        ("coo", lambda: torch.eye(3), "the snapshot has sparse_coo tensors, the model has dense ones for value"),
        (
            "csr",
            lambda: as_csr(torch.ones(3, 3)),
            "sparse_csr with 3 elements tensors, the model has sparse_csr with 9",
        ),
        (
            "strides",
            lambda: torch.zeros(1).expand(5),
            "the model has a tensor whose elements share memory .* for value",
        ),
        ("conjugate", lambda: torch.zeros(3), "complex64 cannot become float32 without a loss for value"),
    ],
)
def test_tensor_of_another_form_is_refused(saved, target, message, tmp_path):
    keep(Holder(FORMS[saved]()), tmp_path)
    with pytest.raises(SnapshotError, match=message):
        load(tmp_path, REF, model := Holder(target()))
    assert torch.equal(model.value.to_dense(), target().to_dense())
