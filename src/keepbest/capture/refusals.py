"""What cannot be kept and loaded again, found before a weight moves. **Rank-local**."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from types import NoneType

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from keepbest.capture.catalogue import Form, Held
from keepbest.capture.fsdp1 import cut_in_other_order, is_flattened, other_ranks_of_units
from keepbest.capture.fsdp1_optimizer import is_of_units
from keepbest.errors import ConfigError
from keepbest.formats.format import Format
from keepbest.modules.kinds import PLAIN_CLASSES, has_shared_elements, is_dtensor, is_fake, kind_of_new, lacks_memory
from keepbest.modules.nested import leaves, spelled
from keepbest.ranks import Ranks

_IN_A_UNIT_AROUND = (
    "lies in a flat parameter of FSDP1, but the model of the keeper is not wrapped by FSDP1, so only a shard of it is "
    "seen. Make the keeper with the wrapped model, after it was wrapped"
)

_WITHOUT_VALUES = {getattr(torch, f"{kind}{bits}", None) for kind in ("int", "uint") for bits in range(1, 8)}
_QUANTIZED = {torch.qint8, torch.quint8, torch.qint32, torch.quint4x2, torch.quint2x4}
_LAYOUTS = {"strided", "quantized", "sparse_coo", "sparse_csr", "sparse_csc", "sparse_bsr", "sparse_bsc"}


def refuse_what_cannot_be_kept(held: Held, form: Format, ranks: Ranks, states: Mapping[str, object]) -> None:
    """Check that what this rank holds, and its training states, can be kept in a format, and loaded again.

    Raises:
        ConfigError: If not. It names the entry and the way out.
    """
    refuse_mode()
    gathered = set[tuple[object, ...]]()  # meshes and placements that are gathered right: thousands have the same
    for name, entry in held.entries.items():
        if entry.form.is_frozen:
            continue  # it is not saved
        fault = (
            _fault_of(held.values[name], entry.form, is_training_state=name.part in states)
            or _outside(entry.members, ranks)
            or (_gathered_wrongly(held.values[name], gathered) if form.capture == "gathered" else None)
            or (form.for_state if name.part in states else form).cannot_hold(name.key, held.values[name])
        )
        if fault is not None:
            raise ConfigError(f"{str(name)!r} {fault}")
    for source in held.sources if "torch.distributed.fsdp" in sys.modules else ():
        # Without original parameters FSDP1 takes the parameters out of their modules: they have no names any more.
        taken = (path for path, inside in source.module.named_modules() if _is_emptied_by_fsdp1(inside))
        if not source.holds_fsdp1 and (path := next(taken, None)) is not None:
            raise ConfigError(f"{path or 'model'!r} {_IN_A_UNIT_AROUND}")
    if form.capture == "local":
        for source in held.sources:
            if (members := other_ranks_of_units(source.module, ranks.members)) is not None:
                raise ConfigError(
                    f"shards of FSDP1 cannot be saved where units are sharded over ranks {members} of {ranks.members}; "
                    "use format 'torch' or 'safetensors', or FSDP2"
                )
            found = next(cut_in_other_order(source.module), None)
            if found is not None and any(map(is_of_units, states.values())):
                raise ConfigError(
                    "the state of an optimizer of FSDP1 cannot be saved as shards where a weight, such as "
                    f"{found.key!r}, does not lie in memory row by row, as with channels_last. Use format 'torch' or "
                    "'safetensors', or make the weight contiguous before FSDP1 takes it"
                )


def refuse_what_cannot_be_loaded(held: Held) -> None:
    """Check that torch can write into what this rank holds, as it must where a model like this one is loaded.

    What changes later is kept right all the same, and a model that is made anew takes it.

    Raises:
        ConfigError: If it cannot. It names the entry and the way out.
    """
    for name, entry in held.entries.items():
        value, form = held.values[name], entry.form
        is_weight = form.role in ("parameter", "buffer") and not form.is_frozen
        if is_weight and type(value) in PLAIN_CLASSES and has_shared_elements(value):
            raise ConfigError(
                f"{str(name)!r} has elements that share memory, as expand() makes them. torch writes into no such "
                "tensor, so what is kept could not be loaded into a model like this one. Register its clone() before "
                "the keeper starts; or, if it is made of other weights, register it with persistent=False"
            )


def refuse_mode() -> None:
    """Check that tensors that are made now have values. Raises `ConfigError` if a mode of torch changes that."""
    if (kind := kind_of_new()) is not None:
        raise ConfigError(
            f"a mode of torch is on, such as FakeTensorMode, in which each new tensor is a {kind}. So what is copied "
            "or read has no values. Leave the block of the mode first"
        )


def _fault_of(value: object, form: Form, *, is_training_state: bool) -> str | None:
    if isinstance(value, torch.Tensor) and form.role != "data":
        if form.layout not in _LAYOUTS:
            return f"is of layout {form.layout}, which is not supported. Register a dense or sparse tensor in its place"
        return _fault_of_tensor(value, is_in_unit=form.is_in_unit, is_training_state=is_training_state)
    if (strange := next((each for each in leaves(value) if not _is_plain(each[1])), None)) is None:
        return None
    where = f" at {spelled(strange[0])}" if strange[0] else ""
    if isinstance(strange[1], torch.Tensor) and (fault := _lost_memory(strange[1])) is not None:
        return f"in the state dict holds a tensor{where} that {fault}"
    source = "get_extra_state(), or state_dict()"
    if is_training_state:
        source = "state_dict() of the training state, or leave it out of training_state"
    return (
        f"in the state dict is a {type(strange[1]).__name__}{where}; only tensors, numbers, strings and containers of "
        f"them can be loaded without running code. Return one of these from {source}"
    )


def _fault_of_tensor(value: torch.Tensor, *, is_in_unit: bool, is_training_state: bool) -> str | None:
    if is_lazy(value):
        return "is not initialized yet. Run one batch through the lazy modules before the keeper starts"
    if is_in_unit:
        return None
    if is_flattened(value):
        return _IN_A_UNIT_AROUND
    if is_dtensor(value) and any(placement.is_partial() for placement in value.placements):
        return "is a DTensor with a Partial placement, of which no rank holds values. Redistribute it first"
    inside = value.to_local().detach() if is_dtensor(value) else value
    return _fault_of_values(inside, is_training_state=is_training_state)


def _fault_of_values(inside: torch.Tensor, *, is_training_state: bool) -> str | None:
    """What is wrong with the values that this rank has of a tensor."""
    if inside.is_meta:
        return "is on the meta device: it has no values that could be saved. Materialize it before the keeper starts"
    if is_fake(inside):
        return (
            "is a FakeTensor, which has no values that could be saved. Make the model outside of FakeTensorMode, or "
            "load its weights into a real one, before the keeper starts"
        )
    if type(inside) not in PLAIN_CLASSES:
        kind = f"{type(inside).__module__}.{type(inside).__qualname__}"
        remedy = "convert it with as_subclass(torch.Tensor), or leave it out (model_names, or save_frozen_weights)"
        if is_training_state:
            remedy = "or leave it out of training_state: the weights are kept without it"
        return (
            f"is a {kind}, a subclass of Tensor, which could not be read again without code of its own. Keep a plain "
            f"tensor, {remedy}"
        )
    if inside.dtype in _WITHOUT_VALUES:
        return f"is {inside.dtype}, which torch neither copies nor saves. Keep its bytes: view(torch.uint8)"
    if inside.dtype in _QUANTIZED and not inside.is_quantized:
        return f"is {inside.dtype} without a scale, which torch saves and cannot read again. Keep what it is a view of"
    return _lost_memory(inside)


def _lost_memory(value: torch.Tensor) -> str | None:
    if not lacks_memory(value):
        return None
    size = value.untyped_storage().nbytes()
    return (
        f"has no values: its storage has {size} bytes, too few for {value.numel()} elements of {value.dtype}. "
        "Something has freed it, as untyped_storage().resize_(0) does; give the tensor its values back first"
    )


def _outside(members: Iterable[int], ranks: Ranks) -> str | None:
    if outside := sorted(set(members) - set(ranks.members)):
        return (
            f"is sharded also over the global ranks {outside}, which are not in the process group of the keeper. Make "
            "the keeper on all ranks that hold the model"
        )
    return None


def _gathered_wrongly(value: object, known: set[tuple[object, ...]]) -> str | None:
    if not is_dtensor(value) or (kind := (id(value.device_mesh), value.placements)) in known:
        return None
    known.add(kind)
    ranks = value.device_mesh.mesh
    for dim, placement in enumerate(value.placements):
        if not placement.is_replicate() and bool((ranks.diff(dim=dim) < 0).any()):
            return (
                f"is a DTensor over the ranks {ranks.tolist()}, whose shards torch puts together in the order of the "
                "ranks, not of the mesh. Make the mesh of ascending ranks, or use format 'dcp'"
            )
    return None


def _is_emptied_by_fsdp1(module: nn.Module) -> bool:
    return getattr(module, "_fsdp_use_orig_params", None) is False


def is_plain_data(value: object) -> bool:
    """Whether a value is loaded again by `torch.load(weights_only=True)` as it is."""
    # Exact classes: one that is derived from them, such as a named tuple or numpy's float64, would not be read again.
    return all(_is_plain(each) for _, each in leaves(value))


def _is_plain(value: object) -> bool:
    if isinstance(value, torch.Tensor):
        return not is_dtensor(value) and _fault_of_tensor(value, is_in_unit=False, is_training_state=False) is None
    return type(value) in (NoneType, bool, int, float, complex, str, bytes)
