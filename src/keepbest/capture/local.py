"""From a model to what each rank holds of its weights: nothing is gathered."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence

import torch.distributed as dist
from torch import nn

from keepbest.capture.gathered import Weights, cut, listing
from keepbest.errors import ConfigError
from keepbest.modules.kinds import is_fsdp1
from keepbest.modules.parts import Part
from keepbest.modules.sources import Source, StateDict, list_sources, plain_state_dict
from keepbest.modules.wrappers import keys_of_wrappers, plain_key
from keepbest.ranks import Ranks


def take_shards(model: nn.Module, parts: Sequence[Part], *, save_frozen_weights: bool, ranks: Ranks) -> Weights:
    """The weights of `parts` as the ranks hold them. **Collective**.

    Sharded tensors stay sharded; what is not sharded is there on every rank. The tensors are those of the model, not
    copies (FSDP1: new shards, for which one unit at a time is gathered).

    Args:
        model: plain or wrapped.
        parts: of it.
        save_frozen_weights: whether parameters that do not require grad are among the weights.
        ranks: of the model.

    Raises:
        ConfigError: on every rank, if FSDP1 shards the model over a part of the ranks only.
        KeepBestError, RankFailedError: as `take_snapshot`.
    """

    def list_and_check() -> list[Source]:
        listed = list_sources(model, parts, save_frozen_weights=save_frozen_weights)
        for source in listed:
            _refuse_partly_sharded(source.module, ranks)
        return listed

    sources = ranks.agree("list the weights", list_and_check, state=lambda found: b"\n".join(map(listing, found)))
    files: dict[str, StateDict] = {}
    left_out: dict[str, list[str]] = {}
    try:
        for source in sources:
            state = sharded_state_dict(source)
            for part in source.parts:
                kept, left_out[part.name] = cut(source, part, state)
                if kept or not (left_out[part.name] or part.apart):
                    files[part.name] = kept
    except BaseException as error:  # noqa: BLE001  # lose raises
        ranks.lose("list the shards", error)
    return Weights(parts=tuple(parts), files=files, left_out={name: keys for name, keys in left_out.items() if keys})


def sharded_state_dict(source: Source) -> StateDict:
    """What this rank holds of a source's state dict, with plain keys. **Collective** where it holds FSDP1 units."""
    if not source.holds_fsdp1:
        return plain_state_dict(source.module)
    wrapping = keys_of_wrappers(source.module)
    with sharded_fsdp1_state(source.module):
        state = source.module.state_dict().items()
    return {plain_key(source.module, key): value for key, value in state if key not in wrapping}


@contextlib.contextmanager
def sharded_fsdp1_state(module: nn.Module) -> Iterator[None]:
    """State dicts of `module` hold shards in this block, also of the FSDP1 units in it."""
    from torch.distributed.fsdp import FullyShardedDataParallel, ShardedStateDictConfig, StateDictType

    with quiet():
        config = ShardedStateDictConfig(offload_to_cpu=False)
        with FullyShardedDataParallel.state_dict_type(module, StateDictType.SHARDED_STATE_DICT, config):
            yield


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without torch's warnings of what it does itself, and that there is one process, where that is meant."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        # FSDP1 is deprecated, and so are the shards that it gives; there is no other way to them.
        warnings.filterwarnings("ignore", r"FSDP\.state_dict_type", FutureWarning)
        warnings.filterwarnings("ignore", "Please use DTensor instead", FutureWarning)
        warnings.filterwarnings("ignore", "`_get_pg_default_device` will be deprecated", UserWarning)
        warnings.filterwarnings("ignore", "Multiple backends are registered", UserWarning)
        yield


def _refuse_partly_sharded(module: nn.Module, ranks: Ranks) -> None:
    for unit in module.modules():
        if is_fsdp1(unit) and isinstance(unit.process_group, dist.ProcessGroup):
            members = dist.get_process_group_ranks(unit.process_group)
            if members != ranks.members:
                raise ConfigError(
                    f"format 'dcp' cannot save FSDP1 units that are sharded over ranks {members} of {ranks.members}; "
                    "use format 'torch', or FSDP2"
                )
