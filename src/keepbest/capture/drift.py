"""Whether what ranks hold in common has come to differ while they trained."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from keepbest.capture.alike import refuse_unlike
from keepbest.capture.catalogue import Entry, Held, Name, Role
from keepbest.capture.fingerprint import fingerprint, fingerprints_of_samples
from keepbest.capture.optimizer import parameter_of
from keepbest.capture.share import Items
from keepbest.capture.union import Holding, Union, refuse_other_values
from keepbest.listing import listed
from keepbest.modules.kinds import local_of
from keepbest.modules.wrappers import PlainNames, walk
from keepbest.ranks import Ranks

_logger = logging.getLogger(__name__)

_SAMPLED = 64  # of the weights in DDP
_DRIFTED = (
    "They were equal when the keeper started, and nothing has kept them so. Exchange their gradients (call a model in "
    "DDP by its wrapper), or average or broadcast them before they are observed. If they should differ, give them "
    "names of their own, or each rank a keeper and a directory of its own (process_group)"
)
_EXACT = 1 << 53  # whole numbers below it are exact as float64


class _Print(NamedTuple):
    """Fingerprint of what other ranks hold too.

    Attributes:
        part: Part that it is in.
        key: Key there.
        piece: Which piece of it this is, among ranks that share it out, or that these are some values; empty for all.
        digest: Fingerprint of its values.
        must_be_equal: Whether it is a weight, of which other values are an error. Others are a warning.
    """

    part: str
    key: str
    piece: str
    digest: str
    must_be_equal: bool

    @property
    def name(self) -> Name:
        """The name of the entry."""
        return Name(self.part, self.key)


class Drift:
    """Compares, at each save, the values that nothing keeps equal.

    These are parameters outside of DDP, and those in it whose gradients it does not exchange. Until a warning, they are
    also buffers that DDP does not broadcast. Some values of some of the other weights show whether DDP was called, and
    some of what optimizers hold whole whether they were stepped alike.

    Args:
        items: What is saved.
        ranks: Ranks of the model.
    """

    def __init__(self, items: Items, ranks: Ranks) -> None:
        self._items, self._ranks = items, ranks
        # DDP exchanges the gradients of what trained when it was made, and never of what is unfrozen later.
        self._trained = _Synchronized(items, ranks.members).trained
        self._has_warned = False

    def balance(self, held: Held, union: Union) -> float:
        """A number of this rank. Where the ranks hold the same values, those of all ranks pass `is_balanced`.

        Of what n ranks hold, the lowest adds the fingerprint n - 1 times, and each of the others subtracts it once.
        **Rank-local**.
        """
        values = [
            (f"{part} {key} {piece} {digest}", holders)
            for (part, key, piece, digest, _), holders in (*self._prints(held, union), *self._states(held, union))
        ]
        values += [
            (json.dumps([name, alike], sort_keys=True), union.holdings[name].holders)
            for name, alike in held.alike.items()
        ]
        balance = 0
        for text, holders in values:
            found = hashlib.blake2b(text.encode(), digest_size=8).digest()
            balance += int.from_bytes(found, "big") * (len(holders) - 1 if holders[0] == self._ranks.rank else -1)
        return float(balance % _EXACT)

    def compare(self, step: str, held: Held, union: Union) -> None:
        """Refuse weights that have come to differ, and warn of other values that have. **Collective**.

        Raises:
            ConfigError: On every rank, if weights differ, or the state of optimizers beside shards does.
        """

        def mine() -> list[Any]:
            alike = {what: text for each in held.alike.values() for what, text in each.items()}
            for each, _ in self._states(held, union):
                name, key = parameter_of(each.key)
                alike[f"{key!r} of the optimizer {each.part!r} for {name!r}"] = each.digest
            return [[each for each, _ in self._prints(held, union)], alike]

        found = self._ranks.gather_json(step, mine)
        refuse_unlike([alike for _, alike in found])
        prints = [[_Print(*each) for each in printed] for printed, _ in found]
        weights = {each.name for mine in prints for each in mine if each.must_be_equal}
        refuse_other_values(
            [{each.name: (each.piece, each.digest) for each in mine if each.name in weights} for mine in prints],
            _DRIFTED,
        )
        digests: dict[Name, set[str]] = {}
        for each in (each for mine in prints for each in mine if each.name not in weights):
            digests.setdefault(each.name, set()).add(each.digest)
        if differing := [str(name) for name, each in digests.items() if len(each) > 1]:
            self._has_warned = True
            # Weights travel next, so what a handler of the log raises on rank 0 must be known to all.
            self._ranks.agree(step, lambda: _warn(differing) if self._ranks.is_main else None)

    def _prints(self, held: Held, union: Union) -> list[tuple[_Print, Sequence[int]]]:
        """Fingerprints, and the ranks of the keeper that hold the same."""
        if self._ranks.world_size == 1:
            return []
        synchronized = _Synchronized(self._items, self._ranks.members, self._trained)
        every = max(1, len(union.holdings) // _SAMPLED)
        known: dict[int, str] = {}  # a tensor may have several names, and a flat parameter has many entries
        prints, sampled = list[tuple[_Print, Sequence[int]]](), list[tuple[Name, torch.Tensor, bool, Sequence[int]]]()
        for name, holding in union.kept.items():
            if holding.entry.form.role in ("data", "state") or name not in held.values:
                continue
            piece, holders = self._piece(held.entries[name], holding)
            is_equal, must_be_equal = synchronized.find(name, holding.entry.form.role, holders)
            if len(holders) < 2 or (not must_be_equal and (is_equal or self._has_warned)):
                continue
            value: torch.Tensor = held.values[name]
            if is_equal:
                if holding.number % every == 0:
                    sampled.append((name, value, must_be_equal, holders))
                continue
            if id(value) not in known:
                known[id(value)] = fingerprint(local_of(value) if piece else value)
            prints.append((_Print(*name, piece, known[id(value)], must_be_equal), holders))
        return prints + _prints_of_samples(sampled)

    def _states(self, held: Held, union: Union) -> list[tuple[_Print, Sequence[int]]]:
        """Fingerprints of some values of what optimizers hold whole, and the ranks of the keeper that hold the same."""
        if self._ranks.world_size == 1 or not self._items.training_state:
            return []
        whole = [
            (name, holding.holders)
            for name, holding in union.kept.items()
            if holding.entry.form.role == "state" and not holding.entry.form.spread and "/" in name.key
        ]
        every = max(1, len(whole) // _SAMPLED)
        while math.gcd(every, 30) > 1:  # the state of a parameter has a few keys, and each of them is to have its turn
            every += 1
        return _prints_of_samples(
            [
                (name, held.values[name], True, holders)
                for name, holders in whole[::every]
                if len(holders) > 1 and name in held.values
            ]
        )

    def _piece(self, entry: Entry, holding: Holding) -> tuple[str, Sequence[int]]:
        """Which piece this rank holds, and the ranks of the keeper that nothing of torch keeps equal to it there."""
        if not entry.members:
            return "", holding.holders
        # Groups of equal form share out alike. What one group holds several times, torch keeps equal.
        members = self._ranks.members
        index = entry.members.index(members[self._ranks.rank])
        return str(index), sorted(members.index(group[index]) for group in holding.groups)


def _prints_of_samples(
    sampled: Sequence[tuple[Name, torch.Tensor, bool, Sequence[int]]],
) -> list[tuple[_Print, Sequence[int]]]:
    digests = fingerprints_of_samples([value for _, value, _, _ in sampled])
    return [
        (_Print(*name, "sample", digest, must_be_equal), holders)
        for (name, _, must_be_equal, holders), digest in zip(sampled, digests, strict=True)
    ]


def is_balanced(balances: Iterable[float]) -> bool:
    """Whether the balances of all ranks show that they hold the same values."""
    return sum(map(int, balances)) % _EXACT == 0


class _Synchronized:
    """What DDP keeps equal between the ranks.

    Args:
        items: What is saved.
        members: Ranks of the keeper in the default group.
        before: Names of the parameters in DDP that trained earlier; `None` if that is now.

    Attributes:
        trained: Names of the parameters in DDP that train now.
    """

    def __init__(self, items: Items, members: list[int], before: set[str] | None = None) -> None:
        self.trained: set[str] = set()
        self._members, self._before = members, before
        self._paths = {part.name: f"{part.path}." if part.path else "" for part in items.parts}
        self._frozen: set[str] = set()
        self._groups: dict[str, frozenset[int]] = {}
        for path, module in walk(items.model):
            if isinstance(module, DistributedDataParallel):
                self._add(f"{path}." if path else "", module)

    def find(self, name: Name, role: Role, holders: Iterable[int]) -> tuple[bool, bool]:
        """Whether a value is kept equal on these ranks of the keeper, and whether it is a weight that must be equal."""
        key = self._paths[name.part] + name.key
        group = self._groups.get(key)
        is_equal = group is not None and (
            group.issuperset(self._members) or group.issuperset(self._members[rank] for rank in holders)
        )
        # What is in DDP and does not train is updated by the module itself, as buffers are.
        return is_equal, role == "parameter" and key not in self._frozen

    def _add(self, path: str, module: DistributedDataParallel) -> None:
        inner, names = module.module, PlainNames(module.module)
        group = frozenset(dist.get_process_group_ranks(module.process_group))
        # A hook of the user's may exchange less than all gradients, or not at each step.
        is_plain = not module._comm_hooks  # noqa: SLF001  # torch has no public list of them
        for name, parameter in inner.named_parameters(remove_duplicate=False):
            key = path + names.plain(name)
            (self.trained if parameter.requires_grad else self._frozen).add(key)
            is_exchanged = is_plain and parameter.requires_grad and name not in module.parameters_to_ignore
            if is_exchanged and (self._before is None or key in self._before):
                self._groups[key] = group
        for name, _ in inner.named_buffers(remove_duplicate=False) if module.broadcast_buffers else ():
            if name not in module.parameters_to_ignore:
                self._groups[path + names.plain(name)] = group


def _warn(names: list[str]) -> None:
    _logger.warning(
        "buffers differ between the ranks: %s (what is frozen in DDP counts as a buffer). The snapshots have those "
        "of the lowest rank that holds them, so a model that is loaded from them may not reproduce the metric. "
        "Synchronize them: use torch.nn.SyncBatchNorm for BatchNorm, or broadcast or average the buffers before each "
        "evaluation",
        listed(names),
    )
