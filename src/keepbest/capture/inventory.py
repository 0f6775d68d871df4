"""What the ranks hold together, agreed when a keeper starts and looked at again before each save."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from keepbest.capture.catalogue import Entry, Held, Name, look, stored_tensors
from keepbest.capture.fingerprint import fingerprint, sample
from keepbest.capture.fsdp1 import check_own_state_dict, has_own_state_dict
from keepbest.capture.refusals import refuse_what_cannot_be_kept
from keepbest.capture.share import Items
from keepbest.capture.union import (
    Report,
    Union,
    changes,
    describe,
    listed,
    refuse_other_parameters,
    refuse_other_values,
    same_everywhere,
    unite,
)
from keepbest.errors import ConfigError
from keepbest.formats.format import Format
from keepbest.modules.kinds import is_dtensor
from keepbest.modules.sources import Source, StateDict
from keepbest.modules.wrappers import walk
from keepbest.ranks import Number, Ranks

_logger = logging.getLogger(__name__)

_EXACT = 1 << 53  # whole numbers below it are exact as float64


@dataclass(frozen=True, slots=True)
class Agreed:
    """What the ranks agreed on before weights move.

    Attributes:
        held: What this rank holds.
        union: What all hold together.
    """

    held: Held
    union: Union


class Inventory:
    """The catalogue of every rank, and what follows from all of them.

    Args:
        items: What is saved.
        format: Format that it is saved in.
        ranks: Ranks of the model.

    Attributes:
        is_watched: Whether another keeper may want to know if the weights have changed since they were saved.
        mark: If so, the mark of this rank's weights when they were saved.
    """

    def __init__(self, items: Items, format: Format, ranks: Ranks) -> None:  # noqa: A002  # the word of the setting
        self.items = items
        self.ranks = ranks
        self._format = format
        self._report = Report({}, {})  # what this rank reported when the union was made
        self._union: Union | None = None
        self.is_watched = False
        self.mark = ""
        self._has_warned = ranks.world_size == 1

    def take(self, step: str) -> None:
        """Look at what the ranks hold, and agree that it can be kept and loaded again. **Collective**.

        Raises:
            ConfigError: On every rank, if a rank holds something that cannot be kept, ranks hold different weights
                under one name, or nothing is left to save.
        """

        def report() -> tuple[tuple[Held, Report], Number]:
            held = self._look()
            refuse_what_cannot_be_kept(held, held.entries, self._format, self.ranks)
            found = Report(held.entries, self._prints(held, held.entries))
            return (held, found), Number(None, None, hashlib.blake2b(_text(found).encode(), digest_size=16).hexdigest())

        (held, found), digests = self.ranks.compare(f"look at the weights to {step}", report)
        if len({number.note for number in digests}) == 1:
            self._adopt(found, same_everywhere(found.entries, self.ranks.world_size))
        else:
            self._adopt(found, unite(self._reports(step, found)))
        if any(holding.entry.form.is_in_unit for _, holding in self._union_now().kept()):
            self._check_state_dicts_of_units(held, f"look at the state dict to {step}")

    def settle(self, step: str, claim: Callable[[Agreed], None], *, saving: bool) -> Agreed:
        """Look at what the ranks hold now, and agree that it still can be kept. **Collective**.

        One exchange where nothing has changed.

        Args:
            step: What is being done, in words.
            claim: Function that makes room for what is moved to this rank. It is called again after a change.
            saving: Whether `claim` may wait for a write.

        Raises:
            ConfigError: On every rank, if something has changed since the keeper started so that it cannot be kept
                right. It names the change.
            KeepBestError: As `Ranks.agree`, if `claim` fails on a rank.
        """
        if self._union is None:
            self.take(step)
        before, union = self._report.entries, self._union
        step = f"list the weights to {step}"

        def look_again() -> tuple[Held, Number]:
            held = self._look()
            self.mark = self._mark_of(held) if self.is_watched else ""
            changed = changes(before, held.entries)
            data = [name for name, entry in held.entries.items() if entry.form.role == "data"]
            try:
                new = [name for name in changed if name in held.entries]
                refuse_what_cannot_be_kept(held, {*new, *data}, self._format, self.ranks)
            except ConfigError as error:
                raise ConfigError(f"{error}. {_since(describe(changed, before, held.entries))}") from error
            if changed or union is None:
                return held, Number(None, None, describe(changed, before, held.entries))
            claim(Agreed(held, union))
            return held, Number(self._balance(held, union), None)

        held, numbers = self.ranks.compare(step, look_again, saving=saving)
        notes = {rank: number.note for rank, number in enumerate(numbers) if number.note}
        if not notes and union is not None:
            agreed = Agreed(held, union)
            if sum(int(number.value or 0) for number in numbers) % _EXACT:
                self._compare_values(step, agreed)
            return agreed
        changed = changes(before, held.entries)
        # Also what is the same here, if another rank has remade it, or has it now for the first time.
        mine = [name for name in changed if _is_remade(before.get(name), held.entries.get(name))]
        remade = {Name(*name): None for names in self.ranks.gather_json(step, lambda: mine) for name in names}
        prints = self.ranks.agree(step, lambda: self._prints(held, remade), saving=saving)
        try:
            found = Report(held.entries, prints)
            united = unite(self._reports(step, found))
            if union is not None:
                refuse_other_parameters(union, united, self.ranks.world_size)
            self._adopt(found, united)
        except ConfigError as error:
            what = "; ".join(f"on rank {rank}: {note}" for rank, note in list(notes.items())[:4])
            raise ConfigError(f"{error}. {_since(what)}") from error
        agreed = Agreed(held, self._union_now())
        self._compare_values(step, agreed)
        self.ranks.agree(step, lambda: claim(agreed), saving=saving)
        return agreed

    def mark_now(self) -> str:
        """What shows whether the weights of this rank were exchanged for others in the meantime. **Rank-local**."""
        return self._mark_of(self._look())

    def _mark_of(self, held: Held) -> str:
        with_frozen = self.items.save_frozen_weights
        tensors = (stored_tensors(source.module, with_frozen=with_frozen) for source in held.sources)
        data = [held.values[name] for name, entry in held.entries.items() if entry.form.role == "data"]
        return sample((_local(tensor) for each in tensors for tensor in each), data)

    def _look(self) -> Held:
        return look(self.items, self.ranks.members[self.ranks.rank])

    def _adopt(self, report: Report, union: Union) -> None:
        if union.holdings and not any(True for _ in union.kept()):
            raise ConfigError(
                "everything that is selected to be saved is frozen, and save_frozen_weights is false: nothing to save"
            )
        self._report, self._union = report, union

    def _check_state_dicts_of_units(self, held: Held, step: str) -> None:
        """Check what modules around units of FSDP1 make of their state dicts, if one may change it. **Collective**."""
        # To look takes collectives. So all ranks look, or none.
        if not any(self.ranks.gather_json(step, lambda: any(map(has_own_state_dict, held.sources)))):
            return
        forms = {name: entry.form for name, entry in held.entries.items()}
        kept = [name for name, form in forms.items() if form.is_in_unit and not form.is_frozen]

        def check() -> None:
            for source in held.sources:
                inside = {part.name: source.path_of(part) for part in source.parts}
                check_own_state_dict(source, [inside[part] + key for part, key in kept if part in inside])

        self.ranks.agree(step, check)

    def _union_now(self) -> Union:
        if self._union is None:
            raise RuntimeError("the inventory was not taken")
        return self._union

    def _reports(self, step: str, mine: Report) -> list[Report]:
        return [Report.from_json(report) for report in self.ranks.gather_json(step, mine.to_json)]

    def _prints(self, held: Held, names: Iterable[Name]) -> dict[Name, tuple[str, str]]:
        """Fingerprints of those parameters that another rank may hold too, whole or the same shard of it."""
        if self.ranks.world_size == 1:
            return {}
        me, found = self.ranks.members[self.ranks.rank], dict[Name, tuple[str, str]]()
        known: dict[int, str] = {}  # a flat parameter has many entries
        for name in names:
            if name not in held.entries:
                continue
            entry, value = held.entries[name], held.values[name]
            if entry.form.role != "parameter" or entry.form.is_frozen:
                continue
            place, has_copies = _place_of(entry, value, me)
            if not has_copies and set(entry.members) == set(self.ranks.members):
                continue  # no other rank has the same piece
            if id(value) not in known:
                known[id(value)] = fingerprint(_local(value))
            found[name] = (place, known[id(value)])
        return found

    def _balance(self, held: Held, union: Union) -> float:
        """A number of this rank. Those of all ranks add up to a multiple of `_EXACT` where they hold the same values.

        Of what n ranks hold, the lowest adds the fingerprint n - 1 times, and each of the others subtracts it once.
        """
        balance = 0
        for part, key, digest in self._prints_of_values(held, union):
            holders = union.holdings[Name(part, key)].holders
            found = hashlib.blake2b(f"{part} {key} {digest}".encode(), digest_size=8).digest()
            balance += int.from_bytes(found, "big") * (len(holders) - 1 if holders[0] == self.ranks.rank else -1)
        return float(balance % _EXACT)

    def _prints_of_values(self, held: Held, union: Union) -> list[tuple[str, str, str]]:
        """Fingerprints, by part and key, of what other ranks hold too and nothing keeps equal.

        These are parameters that train outside of DDP, and, until a warning, buffers that DDP does not broadcast.
        """
        if self.ranks.world_size == 1:
            return []
        in_ddp, broadcast = list[str](), list[str]()
        for path, module in walk(self.items.model):
            if isinstance(module, DistributedDataParallel):
                in_ddp.append(f"{path}." if path else "")
                broadcast += in_ddp[-1:] if module.broadcast_buffers else []
        kept_equal = {"parameter": tuple(in_ddp), "buffer": tuple(broadcast)}
        paths = {part.name: f"{part.path}." if part.path else "" for part in self.items.parts}
        prints = []
        for name, holding in union.kept():
            role = holding.entry.form.role
            if role not in kept_equal or name not in held.values or holding.entry.members or len(holding.holders) == 1:
                continue
            value: torch.Tensor = held.values[name]
            is_everywhere = len(holding.holders) == self.ranks.world_size
            may_differ = value.requires_grad if role == "parameter" else is_everywhere and not self._has_warned
            if may_differ and not f"{paths[name.part]}{name.key}".startswith(kept_equal[role]):
                prints.append((*name, fingerprint(value)))
        return prints

    def _compare_values(self, step: str, agreed: Agreed) -> None:
        """Refuse parameters that have come to differ, and warn of buffers. **Collective**."""
        everybodys: list[list[tuple[str, str, str]]] = self.ranks.gather_json(
            step, lambda: self._prints_of_values(agreed.held, agreed.union)
        )
        prints = [{Name(part, key): ("", digest) for part, key, digest in each} for each in everybodys]
        holdings = agreed.union.holdings
        buffers = [name for name in prints[0] if holdings[name].entry.form.role == "buffer"]  # every rank has them
        refuse_other_values([{name: each[name] for name in each if name not in buffers} for each in prints])
        differing = [str(name) for name in buffers if len({each[name] for each in prints}) > 1]
        self._has_warned = self._has_warned or bool(differing)
        if differing and self.ranks.is_main:
            more = f" and {len(differing) - 4} more" if len(differing) > 4 else ""
            _logger.warning(
                "buffers differ between the ranks: %s%s. The snapshots have those of %s, so a model that is loaded "
                "from them may not reproduce the metric. Synchronize them: use torch.nn.SyncBatchNorm for BatchNorm, "
                "or broadcast or average the buffers before each evaluation",
                ", ".join(differing[:4]),
                more,
                listed([0]),
            )


def added_by_hooks(source: Source, state: StateDict, agreed: Agreed) -> dict[Name, Any]:
    """What of `state`, of a source with FSDP1 units, hooks of state_dict() have added. **Rank-local**."""
    found: dict[Name, Any] = {}
    for part in source.parts:
        for key, value in state.items():
            name = None if (inside := source.key_in(part, key)) is None else Name(part.name, inside)
            if name is not None and name not in agreed.union.holdings and not source.is_frozen(key):
                found[name] = value
    return found


def _place_of(entry: Entry, value: torch.Tensor, rank: int) -> tuple[str, bool]:
    """Which piece of an entry this rank holds, and whether other members hold the same piece."""
    if is_dtensor(value):
        where = list(value.device_mesh.get_coordinate() or ())
        split = [at for at, placement in zip(where, value.placements, strict=True) if not placement.is_replicate()]
        return str(split), len(split) < len(where)
    return (str(entry.members.index(rank)), False) if entry.members else ("", True)


def _is_remade(old: Entry | None, new: Entry | None) -> bool:
    """Whether what is under a name may have values that the ranks have not compared."""
    if old is None or new is None or old.members != new.members:
        return True
    was_frozen, is_frozen = old.form.is_frozen, new.form.is_frozen
    return old.form._replace(is_frozen=is_frozen) != new.form or (was_frozen and not is_frozen)


def _since(what: str) -> str:
    return f"Since the keeper started this has changed: {what}" if what else "Nothing in the names has changed"


def _local(value: torch.Tensor) -> torch.Tensor:
    return value.to_local().detach() if is_dtensor(value) else value


def _text(report: Report) -> str:
    return json.dumps(report.to_json())
