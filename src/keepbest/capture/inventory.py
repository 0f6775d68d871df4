"""What the ranks hold together, agreed when a keeper starts and looked at again before each save."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from keepbest.capture.catalogue import Entry, Held, Name, extra_states, look, stored_tensors
from keepbest.capture.drift import Drift, is_balanced
from keepbest.capture.fingerprint import fingerprint, sample
from keepbest.capture.fsdp1 import check_own_state_dict, has_own_state_dict
from keepbest.capture.refusals import refuse_mode, refuse_what_cannot_be_kept, refuse_what_cannot_be_loaded
from keepbest.capture.share import Items
from keepbest.capture.states import add_states, marks_of_states
from keepbest.capture.union import (
    Report,
    Union,
    changes,
    describe_changes,
    refuse_other_parameters,
    same_everywhere,
    unite,
)
from keepbest.capture.whole_plan import WholePlan
from keepbest.errors import ConfigError
from keepbest.formats.format import Format
from keepbest.listing import listed
from keepbest.modules.kinds import is_dtensor, local_of
from keepbest.modules.sources import Source, StateDict, list_sources
from keepbest.modules.unchanged import Structure
from keepbest.ranks import Number, Ranks
from keepbest.staging.batch import Batch


@dataclass(frozen=True, slots=True)
class Agreed:
    """What the ranks agreed on before weights move.

    Attributes:
        held: What this rank holds.
        union: What all hold together.
    """

    held: Held
    union: Union


@dataclass(slots=True)
class _Seen:
    """What this rank held when it was looked at last, where it shows whether that is unchanged.

    Attributes:
        held: What it held.
        structure: By which a change is seen.
        is_checked: Whether it was found that all of it can be kept.
        batch: The tensors that are copied for a plan, and that plan.
    """

    held: Held
    structure: Structure
    is_checked: bool = False
    batch: tuple[WholePlan, Batch] | None = None


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
        self._plan: WholePlan | None = None
        self._seen: _Seen | None = None
        self.is_watched = False
        self.mark = ""
        self._drift = Drift(items, ranks)

    def take(self, step: str) -> None:
        """Look at what the ranks hold, and agree that it can be kept and loaded again. **Collective**.

        Raises:
            ConfigError: On every rank, if a rank holds something that cannot be kept, ranks hold different weights
                under one name, or nothing is left to save.
            RankLostError: If the ranks cannot be connected for what travels between them in a save.
        """

        def report() -> tuple[tuple[Held, Report], Number]:
            held = self.look()
            self._check(held)
            refuse_what_cannot_be_loaded(held)
            found = Report(held.entries, self._prints(held, held.entries), held.versions)
            return (held, found), Number(None, None, hashlib.blake2b(_text(found).encode(), digest_size=16).hexdigest())

        (held, found), digests = self.ranks.compare(f"look at the weights to {step}", report)
        if len({number.note for number in digests}) == 1:
            self._adopt(found, same_everywhere(found, self.ranks.world_size))
        else:
            self._adopt(found, unite(self._reports(step, found)))
        if self._format.capture == "local" or any(holding.owner != 0 for holding in self.union.kept.values()):
            # Now, and not at the first save: a rank that is being connected does not notice that another one dies.
            self.ranks.patient_group()
        if any(holding.entry.form.is_in_unit for holding in self.union.kept.values()):
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
        before, union = self._report, self.union
        step = f"list the weights to {step}"

        def look_again() -> tuple[Held, Number]:
            refuse_mode()
            held = self.look()
            self.mark = self.mark_now() if self.is_watched else ""
            changed = describe_changes(before.entries, held.entries)
            if self._seen is None or not self._seen.is_checked:
                try:
                    self._check(held)  # also what is as it was by its name, shape and dtype
                except ConfigError as error:
                    raise ConfigError(f"{error}. {_since(changed)}") from error
            if changed or held.versions != before.versions:
                return held, Number(None, None, changed or _OTHER_VERSIONS)
            claim(Agreed(held, union))
            return held, Number(self._drift.balance(held, union), None)

        held, numbers = self.ranks.compare(step, look_again, saving=saving)
        notes = {rank: number.note for rank, number in enumerate(numbers) if number.note}
        if notes:
            return self._agree_anew(step, held, notes, claim, saving=saving)
        if not is_balanced(number.value or 0.0 for number in numbers):
            self._drift.compare(step, held, union)
        return Agreed(held, union)

    def _agree_anew(
        self, step: str, held: Held, notes: Mapping[int, str], claim: Callable[[Agreed], None], *, saving: bool
    ) -> Agreed:
        """Agree on what the ranks hold after a change, if it can be kept right. **Collective**.

        Args:
            step: What is being done, in words.
            held: What this rank holds now.
            notes: What has changed, in words, by the rank that noticed it; the same on every rank.
            claim: As `settle` takes it.
            saving: As `settle` takes it.
        """
        before, union = self._report.entries, self.union
        # Also what is the same here, if another rank has remade it, or has it now for the first time.
        changed = changes(before, held.entries)
        mine = [name for name in changed if _is_remade(before.get(name), held.entries.get(name))]
        remade = {Name(*name): None for names in self.ranks.gather_json(step, lambda: mine) for name in names}
        prints = self.ranks.agree(step, lambda: self._prints(held, remade), saving=saving)
        try:
            found = Report(held.entries, prints, held.versions)
            united = unite(self._reports(step, found))
            refuse_other_parameters(union, united, self.ranks.world_size)
            self._adopt(found, united)
        except ConfigError as error:
            what = (f"on rank {rank}: {note}" for rank, note in notes.items())
            raise ConfigError(f"{error}. {_since(listed(what, separator='; '))}") from error
        agreed = Agreed(held, self.union)
        self._drift.compare(step, held, agreed.union)
        self.ranks.agree(step, lambda: claim(agreed), saving=saving)
        return agreed

    def mark_now(self) -> str:
        """What shows whether the weights of this rank were exchanged for others in the meantime. **Rank-local**."""
        items = self.items
        sources = list_sources(items.model, items.parts, save_frozen_weights=items.save_frozen_weights)
        tensors, data = list[torch.Tensor](), list[object]()
        for source in sources:
            tensors += stored_tensors(source.module, with_frozen=items.save_frozen_weights)
            data += extra_states(source.module)
        for value in marks_of_states(items):
            if isinstance(value, torch.Tensor):
                tensors.append(value)
            else:
                data.append(value)
        return sample(map(local_of, tensors), data)

    @property
    def plan(self) -> WholePlan:
        """Where on rank 0 what the ranks agreed to hold would stand."""
        if self._plan is None or self._plan.union is not self.union:
            self._plan = WholePlan.of(self.union, self.items)
        return self._plan

    def batch_of(self, held: Held) -> Batch:
        """The tensors that are copied, where rank 0 holds all of them whole. **Rank-local**."""
        plan, seen = self.plan, self._seen
        if seen is None or seen.held is not held:
            return _batch_of(held, plan)
        if seen.batch is None or seen.batch[0] is not plan:
            seen.batch = plan, _batch_of(held, plan)
        return seen.batch[1]

    def look(self) -> Held:
        """What this rank holds now: the same object as before where that is unchanged. **Rank-local**."""
        if self._seen is not None and self._seen.structure.is_unchanged():
            return self._seen.held
        held = look(self.items, self.ranks.members[self.ranks.rank])
        add_states(held, self.items, self.ranks)
        with_grad = not self.items.save_frozen_weights
        structure = None
        if not self.items.training_state:
            structure = Structure.of(self.items.model, held.values.values(), with_grad=with_grad)
        self._seen = None if structure is None else _Seen(held, structure)
        return held

    def forget(self) -> None:
        """Keep no weights that are no longer in the model. **Rank-local**."""
        self._seen = None

    def _check(self, held: Held) -> None:
        refuse_what_cannot_be_kept(held, self._format, self.ranks, self.items.training_state)
        if self._seen is not None:
            self._seen.is_checked = True

    def _adopt(self, report: Report, union: Union) -> None:
        weights = [name for name in union.holdings if name.part not in self.items.training_state]
        if not weights:
            raise ConfigError("what is selected to be saved has no weights on any rank: nothing to save")
        if union.kept.keys().isdisjoint(weights):
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

    @property
    def union(self) -> Union:
        """What the ranks agreed to hold when they looked last."""
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
            piece, has_copies = _piece_of(entry, value, me)
            if not has_copies and set(entry.members) == set(self.ranks.members):
                continue  # no other rank has the same piece
            if id(value) not in known:
                known[id(value)] = fingerprint(local_of(value))
            found[name] = (piece, known[id(value)])
        return found


_OTHER_VERSIONS = "modules have other versions"


def added_by_hooks(source: Source, state: StateDict, agreed: Agreed) -> dict[Name, Any]:
    """What of `state`, of a source with FSDP1 units, hooks of state_dict() have added. **Rank-local**."""
    found: dict[Name, Any] = {}
    for part in source.parts:
        for key, value in state.items():
            name = None if (inside := source.key_in(part, key)) is None else Name(part.name, inside)
            if name is not None and name not in agreed.union.holdings and not source.is_frozen(key, value):
                found[name] = value
    return found


def _batch_of(held: Held, plan: WholePlan) -> Batch:
    return Batch({room: held.values[name] for name, room in plan.copied})


def _piece_of(entry: Entry, value: torch.Tensor, rank: int) -> tuple[str, bool]:
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


def _text(report: Report) -> str:
    return json.dumps(report.to_json())
