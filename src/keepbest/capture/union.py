"""From what each rank holds to the one model that is kept: every name, and the rank that it is taken from. Pure."""

from __future__ import annotations

from bisect import insort
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

from keepbest.capture.catalogue import Entry, Form, Name
from keepbest.capture.optimizer import is_groups
from keepbest.capture.share import Items
from keepbest.errors import ConfigError
from keepbest.listing import listed, listed_ranks
from keepbest.modules.state_dicts import Version

_WAYS_OUT = (
    "A snapshot has one tensor for each name, so it would hold the weights of one rank and lose the others. Weights "
    "that belong to a rank alone (experts, hand-made tensor parallelism) need names of their own, or have to be "
    "DTensors over all ranks; or give each rank a keeper and a directory of its own (process_group), or leave them out "
    "(model_names). If they should be equal, broadcast them from rank 0 before the keeper starts"
)


class Report(NamedTuple):
    """What one rank reports of its entries.

    Attributes:
        entries: What it holds.
        prints: Fingerprints of parameters that other ranks may hold too: which piece of it this rank holds, and the
            digest of the piece.
        versions: Versions of its modules that are recorded.
    """

    entries: Mapping[Name, Entry]
    prints: Mapping[Name, tuple[str, str]]
    versions: Mapping[Name, Version] = MappingProxyType({})

    def to_json(self) -> list[Any]:
        """JSON values only; `from_json` is the inverse."""
        entries = [[*name, entry, self.prints.get(name)] for name, entry in self.entries.items()]
        return [entries, [[*name, version] for name, version in self.versions.items()]]

    @classmethod
    def from_json(cls, report: Sequence[Any]) -> Report:
        """The inverse of `to_json`."""
        entries: dict[Name, Entry] = {}
        prints: dict[Name, tuple[str, str]] = {}
        listed, versions = report
        for part, key, ((role, shape, *rest), members, device, first), found in listed:
            name = Name(part, key)
            entries[name] = Entry(Form(role, tuple(shape), *rest), tuple(members), device, first)
            if found is not None:
                prints[name] = (found[0], found[1])
        return cls(entries, prints, {Name(part, path): version for part, path, version in versions})


@dataclass(frozen=True, slots=True)
class Holding:
    """An entry of the model that is kept.

    Attributes:
        number: Place among all entries, the same on every rank. Transfers are matched by it.
        entry: Entry as the owner holds it.
        holders: Ranks of the keeper that hold it, the lowest first.
        groups: Where several groups of ranks share it out, each for itself, the ranks in the default group of each.
    """

    number: int
    entry: Entry
    holders: Sequence[int]
    groups: Sequence[tuple[int, ...]] = ()

    @property
    def owner(self) -> int:
        """The lowest rank that holds it. The snapshot has what that rank sees."""
        return self.holders[0]


class Union:
    """Everything that the ranks hold together.

    Args:
        holdings: Entries by name, in the same order on every rank.
        versions: Versions of modules that are recorded.

    Attributes:
        holdings: As passed.
        kept: Those of them that are saved.
        left_out: For each part the keys that are not saved since they are frozen; parts without such are absent.
        versions: For each part the versions, by the path of the module in it.
    """

    def __init__(
        self, holdings: Mapping[Name, Holding], versions: Mapping[Name, Version] = MappingProxyType({})
    ) -> None:
        self.holdings = holdings
        self.versions: dict[str, dict[str, Version]] = {}
        for name, version in versions.items():
            self.versions.setdefault(name.part, {})[name.key] = version
        forms = [(name.part, holding.entry.form) for name, holding in holdings.items()]
        # A part whose parameters are frozen is left out with its buffers, unless it has something else.
        frozen = {part for part, form in forms if form.is_frozen}
        frozen -= {part for part, form in forms if not form.is_frozen and form.role != "buffer"}
        self.kept: dict[Name, Holding] = {}
        self.left_out: dict[str, list[str]] = {}
        for name, holding in holdings.items():
            if name.part in frozen or holding.entry.form.is_frozen:
                insort(self.left_out.setdefault(name.part, []), name.key)
            else:
                self.kept[name] = holding

    def apart(self, world_size: int) -> list[Name]:
        """The parameters that not every rank holds."""
        return [
            name
            for name, holding in self.holdings.items()
            if holding.entry.form.role == "parameter" and len(holding.holders) < world_size
        ]

    def files_of(self, items: Items) -> list[str]:
        """The parts and training states of `items` that have a file. A part that is frozen as a whole has none."""
        written = {name.part for name in self.kept}
        # What a composite has beside its submodels may be nothing. All else has a file, also where it has no weights.
        written |= {part.name for part in items.parts if not (part.name in self.left_out or part.apart)}
        return [name for name in items.names if name in written]


def same_everywhere(report: Report, world_size: int) -> Union:
    """The union where every rank reports the same."""
    ranks = range(world_size)
    holdings = {name: Holding(number, entry, ranks) for number, (name, entry) in enumerate(report.entries.items())}
    return Union(holdings, report.versions)


def unite(reports: Sequence[Report]) -> Union:
    """The union of what the ranks report, by rank.

    Raises:
        ConfigError: If ranks hold different things under one name. The same on every rank.
    """
    holders: dict[Name, list[int]] = {}
    for rank, report in enumerate(reports):
        for name in report.entries:
            holders.setdefault(name, []).append(rank)
    _refuse_other_forms(reports, holders)
    _refuse_other_states(reports, holders)
    refuse_other_values([report.prints for report in reports])
    holdings: dict[Name, Holding] = {}
    for number, (name, ranks) in enumerate(holders.items()):
        entry = reports[ranks[0]].entries[name]
        first = holdings.get(Name(name.part, entry.first))  # the names of lower ranks come first
        if first is not None:
            # Parameters were compared. A buffer of another rank may have other values than this rank's.
            is_same = first.owner == ranks[0] or first.entry.form.role == "parameter"
            entry = entry._replace(first=first.entry.first or entry.first if is_same else "")
        groups = tuple(dict.fromkeys(reports[rank].entries[name].members for rank in ranks))
        holdings[name] = Holding(number, entry, ranks, groups if len(groups) > 1 else ())
    # That of the lowest rank that records one: a stage may have a mere placeholder where another has the module.
    return Union(holdings, {name: each for report in reversed(reports) for name, each in report.versions.items()})


def _refuse_other_forms(reports: Sequence[Report], holders: Mapping[Name, Sequence[int]]) -> None:
    for name, ranks in holders.items():
        forms: dict[Form, list[int]] = {}
        for rank in ranks:
            forms.setdefault(reports[rank].entries[name].form, []).append(rank)
        if len(forms) > 1:
            found = "; ".join(f"{form} on {listed_ranks(of)}" for form, of in forms.items())
            if len({form._replace(is_frozen=False) for form in forms}) == 1:
                raise ConfigError(
                    f"the ranks do not agree on whether {str(name)!r} is frozen, and save_frozen_weights is false: "
                    f"{found}. Set its requires_grad alike on every rank, or save_frozen_weights=True"
                )
            raise ConfigError(f"the ranks hold different things under the name {str(name)!r}: {found}. {_WAYS_OUT}")


def _refuse_other_states(reports: Sequence[Report], holders: Mapping[Name, Sequence[int]]) -> None:
    """Check that ranks whose optimizers have the same parameters hold the same tensors of them."""
    peers = {(name.part, rank): ranks for name, ranks in holders.items() if is_groups(name.key) for rank in ranks}
    for name, ranks in holders.items():
        if reports[ranks[0]].entries[name].form.role == "state":
            among = {rank for each in ranks for rank in peers.get((name.part, each), ())}
            if lacking := sorted(among.difference(ranks)):
                raise ConfigError(
                    f"{str(name)!r} is on {listed_ranks(ranks)}, and not on {listed_ranks(lacking)}, whose optimizers "
                    "have the same parameters. Step the optimizer on every rank alike"
                )


def refuse_other_values(prints: Sequence[Mapping[Name, tuple[str, str]]], ways_out: str = _WAYS_OUT) -> None:
    """Check that ranks that hold the same piece of a parameter hold the same values.

    Args:
        prints: What each rank holds, by name: which piece, and its fingerprint.
        ways_out: What the user can do.

    Raises:
        ConfigError: If they do not. The same on every rank.
    """
    differing: dict[str, set[int]] = {}
    seen: dict[tuple[Name, str], tuple[str, int]] = {}
    for rank, each in enumerate(prints):
        for name, (piece, digest) in each.items():
            known, first = seen.setdefault((name, piece), (digest, rank))
            if known != digest:
                differing.setdefault(str(name), set()).update((first, rank))
    if differing:
        ranks = listed_ranks(sorted(set().union(*differing.values())))
        raise ConfigError(f"{ranks} hold different weights under the same name: {listed(differing)}. {ways_out}")


def refuse_other_parameters(before: Union, now: Union, world_size: int) -> None:
    """Check that ranks that all had the same parameters still have the same.

    Ranks that have different ones from the start are one model. A change of one rank alone, such as an adapter or a
    parametrization, would make a snapshot that no rank can load.

    Raises:
        ConfigError: If they do not. The same on every rank.
    """
    if before.apart(world_size) or not (apart := now.apart(world_size)):
        return
    found = (f"{str(name)!r} on {listed_ranks(now.holdings[name].holders)}" for name in apart)
    raise ConfigError(
        f"the ranks had the same parameters, and now some have others: {listed(found, separator='; ')}. "
        "Change the model on every rank alike, or start a keeper after the change"
    )


def changes(before: Mapping[Name, Entry], now: Mapping[Name, Entry]) -> list[Name]:
    """Names whose entries came, went or became others."""
    if before is now:
        return []
    return [name for name in {**before, **now} if before.get(name) != now.get(name)]


def describe_changes(before: Mapping[Name, Entry], now: Mapping[Name, Entry]) -> str:
    """The `changes` in words, the first few of them; empty if there are none."""
    lines = (f"{str(name)!r} {_change(before.get(name), now.get(name))}" for name in changes(before, now))
    return listed(lines, separator="; ")


def _change(before: Entry | None, now: Entry | None) -> str:
    if before is None or now is None:
        return f"is new: {now.form}" if now is not None else "is gone"
    if before.form._replace(is_frozen=False) == now.form._replace(is_frozen=False) and before.form != now.form:
        return "was frozen" if now.form.is_frozen else "is no longer frozen"
    if before.form == now.form:
        there, here = (f"{each.device}{_among(each.members)}" for each in (before, now))
        return f"was on {there}, and is on {here}"
    return f"was {before.form}, and is {now.form}"


def _among(members: Sequence[int]) -> str:
    return f" and shared out among {listed_ranks(members)}" if members else ""
