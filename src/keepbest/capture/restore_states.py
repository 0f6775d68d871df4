"""Brings training states back: optimizers, and what else was kept beside the weights. **Collective**."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any

from torch import nn
from torch.optim import Optimizer

from keepbest.capture.contents import PartContents
from keepbest.capture.feed import Feed
from keepbest.capture.fsdp1_optimizer import is_of_units, unit_state_to_load
from keepbest.capture.optimizer import ParameterNames, is_groups
from keepbest.capture.optimizer_target import OptimizerTarget
from keepbest.capture.per_rank import PerRank, is_of_a_rank, key_of_rank
from keepbest.capture.schedule_kind import fault_of_schedule
from keepbest.capture.states import KIND, WHOLE, Stateful
from keepbest.errors import SnapshotError
from keepbest.listing import listed
from keepbest.modules.parts import Part
from keepbest.modules.sources import StateDict, list_sources, plain_state_dict
from keepbest.modules.wrappers import modules_along

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Found:
    """A training state that is to be loaded.

    Attributes:
        thing: Object of this rank.
        contents: What the snapshot has of it.
        data: What of that is no tensor of an optimizer, by its key.
        target: What an optimizer takes of it, once it was compared; `None` for all else.
    """

    thing: Stateful
    contents: PartContents
    data: Mapping[str, Any]
    target: OptimizerTarget | None = None

    def faults(self) -> list[str]:
        """What does not fit an object that is no optimizer."""
        fault = fault_of_schedule(self.thing, self.data.get(KIND), self.data.get(WHOLE))
        if fault is not None:
            return [fault]
        if any(map(is_of_a_rank, self.data)) if isinstance(self.thing, PerRank) else WHOLE in self.data:
            return []
        if any(map(is_groups, self.data)):
            return ["it was saved from an optimizer"]
        kind = "one for all ranks: pass it without PerRank" if WHOLE in self.data else "one for each rank: use PerRank"
        return [f"it was saved as {kind}"]


class StatesToLoad:
    """Training states that are to be loaded from a snapshot.

    Args:
        model: Model whose parameters the optimizers have.
        states: State dicts of what is loaded of the model, as `ParameterNames` takes them.
        contents: What the snapshot has of all that is read.
        feed: Where values come from, and the objects that take them.
    """

    def __init__(
        self,
        model: nn.Module,
        states: Mapping[str, Mapping[str, Any]],
        contents: Sequence[PartContents],
        feed: Feed,
    ) -> None:
        self._model, self._states, self._feed, self._ranks = model, states, feed, feed.ranks
        self._things = feed.stored.training_state
        self._contents = [each for each in contents if each.part.name in self._things]
        self._found: dict[str, _Found] = {}

    def compare(self) -> None:
        """Check that what was saved fits the objects of all ranks. **Collective**.

        Raises:
            SnapshotError: On every rank, if it does not. It names the training state and what is wrong.
            ConfigError: On every rank, if an optimizer has parameters that are not in the model.
        """
        for each in self._contents:
            # By what was saved, since ranks may hold different objects.
            is_of_optimizer = any(map(is_groups, each.kinds))
            keys = [key for key, kind in each.kinds.items() if kind.dtype is None or not is_of_optimizer]
            data = self._feed.bring(each, keys, dict.fromkeys(keys))
            self._found[each.part.name] = _Found(self._things[each.part.name], each, data)
        if not self._found:
            return
        found = self._ranks.gather_json("compare the training state with what was saved", self._compare)
        wrong: list[str] = []
        for name in self._found:
            faults, lacks, several = zip(*(each[name] for each in found), strict=True)  # each by rank
            messages: list[str] = [*chain.from_iterable(faults)]
            if nowhere := sorted(set.intersection(*map(set, lacks))):
                messages.append(f"it was saved with {listed(nowhere)}, which no model has")
            messages += self._differing(name, sorted({tuple(keys) for each in several for keys in each}))
            if messages:
                wrong.append(f"{name!r}: {'; '.join(dict.fromkeys(messages))}")
        if wrong:
            raise SnapshotError(f"the training state does not fit: {'. '.join(wrong)}. Nothing was loaded")

    def load(self) -> None:
        """Load all that was compared. **Collective**.

        Raises:
            RankFailedError: On every rank, if an object refuses its state. Others may be loaded then.
        """
        for name, found in self._found.items():
            brought: dict[str, Any] = {}
            if found.target is not None:
                keys = [key for key in found.contents.kinds if not is_groups(key)]
                brought = self._feed.bring(found.contents, keys, found.target.templates)
            step = f"load the training state {name}"
            if found.target is not None and is_of_units(found.thing):
                try:
                    state = self._of_units(found.target, brought)
                except BaseException as error:  # noqa: BLE001  # lose raises
                    self._ranks.lose(step, error)
                self._ranks.agree(step, partial(found.thing.load_state_dict, state))
            else:
                self._ranks.agree(step, partial(self._load, name, found, brought))

    def _of_units(self, target: OptimizerTarget, brought: Mapping[str, Any]) -> dict[str, Any]:
        """What an optimizer of FSDP1 units loads. **Collective**."""
        state = target.state_by_name(brought)
        found = unit_state_to_load(self._model, target.optimizer, state, target.groups, self._ranks)
        return {**copy.deepcopy(target.beside), **found}

    def _compare(self) -> dict[str, tuple[list[str], list[str], list[list[str]]]]:
        """For each state what does not fit, the parameters that are lacking, and keys of tensors for one place."""
        has_optimizer = any(isinstance(found.thing, Optimizer) for found in self._found.values())
        names = ParameterNames(self._model, {**self._unread(), **self._states}) if has_optimizer else None
        compared: dict[str, tuple[list[str], list[str], list[list[str]]]] = {}
        for name, found in self._found.items():
            if isinstance(found.thing, Optimizer) and names is not None:
                target = OptimizerTarget(found.thing, names)
                target.compare(found.contents, found.data)
                self._found[name] = replace(found, target=target)
                compared[name] = target.faults, target.lacks, target.several(found.contents)
            else:
                compared[name] = found.faults(), [], []
        return compared

    def _unread(self) -> dict[str, StateDict]:
        """The state dicts of other parts that were saved, since optimizers have the names in them too."""
        parts = [Part(*each) for each in self._feed.stored.manifest.saved_parts]
        here = [part for part in parts if modules_along(self._model, part.path) is not None]
        sources = list_sources(self._model, here, save_frozen_weights=True)
        others = (each for each in sources if each.path not in self._states and not each.holds_fsdp1)
        return {source.path: plain_state_dict(source) for source in others}

    def _differing(self, name: str, several: Sequence[tuple[str, ...]]) -> list[str]:
        """What is wrong with tensors that are for one place. **Collective**; the same on every rank.

        Args:
            name: Name of the training state.
            several: For each such place the keys of the tensors.
        """
        differing = self._feed.differing([[(name, key) for key in keys] for keys in several]) if several else []
        return [
            f"{' and '.join(several[number])} were saved with different values, and are for one parameter, which is "
            "tied here: untie it"
            for number in differing
        ]

    def _load(self, name: str, found: _Found, brought: Mapping[str, Any]) -> None:
        if found.target is not None:
            found.thing.load_state_dict(found.target.state_dict(brought))
            return
        key = key_of_rank(self._ranks.rank) if isinstance(found.thing, PerRank) else WHOLE
        if key in found.data:
            # A copy, since tensors that are read on rank 0 lie in the file.
            found.thing.load_state_dict(copy.deepcopy(found.data[key]))
        else:
            _logger.warning(
                "rank %d keeps its own %s: it was saved on %d ranks", self._ranks.rank, name, len(found.data)
            )
