"""From the files of a snapshot into a model: the way back of a capture. **Collective**."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from keepbest.capture.catalogue import has_extra_state, state_beside
from keepbest.capture.compare import Comparison, refuse_losses, refuse_misfits
from keepbest.capture.contents import EXTRA_STATE, PartContents, whole_key
from keepbest.capture.feed import Feed, FromFiles, FromMain, Stored
from keepbest.capture.resized import resized
from keepbest.capture.restore_states import StatesToLoad
from keepbest.capture.selection import Selection, unread_parts
from keepbest.capture.versions import RecordedVersions, saved_versions
from keepbest.errors import PartlyLoadedError, SnapshotError
from keepbest.modules.kinds import is_dense, local_of
from keepbest.modules.parts import Part
from keepbest.modules.raw_bytes import brought_to_host, raw_bytes
from keepbest.modules.sources import Source, StateDict, list_sources, plain_state_dict
from keepbest.modules.state_dicts import load_state, loading_module
from keepbest.modules.wrappers import PlainNames, modules_along, walk
from keepbest.ranks import Ranks


class Restored(NamedTuple):
    """What became of the model of this rank.

    Attributes:
        parts: Names of the parts that were loaded.
        keys: Names in the model of what was loaded.
        left_alone: Names in the model of what was not.
        unused: Names of what the snapshot has beyond what was loaded, and of the parts that were not read.
    """

    parts: tuple[str, ...]
    keys: tuple[str, ...]
    left_alone: tuple[str, ...]
    unused: tuple[str, ...]


def restore_gathered(model: nn.Module, stored: Stored, ranks: Ranks, step: str) -> Restored:
    """Read a snapshot on rank 0, after every file that is read was verified, and hand it to the others. **Collective**.

    Each tensor travels once. Sharded models take their shard of it and drop the rest (FSDP1 holds the full weights of
    a unit while it loads).

    Args:
        model: Model, plain or wrapped. Another strategy and another number of ranks than saved it are fine.
        stored: Snapshot, found by rank 0.
        ranks: Ranks of the model.
        step: What is being done, in words.

    Raises:
        SnapshotError: On every rank, if a file is missing or damaged, or keys, shapes or dtypes do not fit the models
            of the ranks. They are then as they were. If a model does not take what was loaded, it is named.
        ConfigError: On every rank, if there is nothing in the snapshot that the selection names.
        RankFailedError: If a model itself refuses the weights on a rank, a rank is lost, or a file is while it is read.
            Parts may be loaded then.
    """
    return _restore(model, FromMain(stored, ranks, step))


def restore_local(model: nn.Module, stored: Stored, ranks: Ranks, step: str) -> Restored:
    """Read on each rank the shards that it holds. **Collective**. As `restore_gathered`, but found by every rank."""
    return _restore(model, FromFiles(stored, ranks, step))


@dataclass(frozen=True, slots=True)
class _Target:
    """The model of this rank.

    Attributes:
        model: Model.
        sources: Modules that are loaded.
        state: State dict of each source, with plain keys, by its path.
    """

    model: nn.Module
    sources: Sequence[Source]
    state: dict[str, StateDict]

    def present(self, part: Part, selection: Selection) -> dict[str, Any]:
        """What this model has in a part, as far as it is wanted, by its keys in the part."""
        for source in self.sources:
            if part in source.parts:
                entries = ((source.key_in(part, key), value) for key, value in self.state[source.path].items())
                return {
                    key: value for key, value in entries if key is not None and selection.holds(whole_key(part, key))
                }
        return {}

    def names(self) -> set[str]:
        """The names of everything in the model, also of what is in no source."""
        paths = [source.path for source in self.sources]
        names = {whole_key(source, key) for source in self.sources for key in self.state[source.path]}
        for path, module in walk(self.model):
            if not any(not each or path == each or path.startswith(f"{each}.") for each in paths):
                hidden = {"_flat_param", *module._non_persistent_buffers_set}  # noqa: SLF001  # torch has no other way
                own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
                inside = {name for name, _ in own} - hidden
                if has_extra_state(module):
                    inside.add(EXTRA_STATE)
                names.update(f"{path}.{name}" if path else name for name in inside)
        return names


def _restore(model: nn.Module, feed: Feed) -> Restored:
    read, stored, selection = feed.contents(), feed.stored, feed.stored.selection
    unread = unread_parts(stored.manifest, selection)
    everything = [each for each in read if each.part.name not in stored.training_state]
    names = {whole_key(each.part, key) for each in everything for key in each.names_to_keys}
    selection.check([*names, *(part.path for part in unread if part.path)])
    # A part that is empty is compared too, unless others were asked for.
    chosen = [each for each in everything if selection.paths is None or any(_wanted(each, selection))]
    target = _find(model, [each.part for each in chosen], feed)
    _compare(target, chosen, feed)
    beside = StatesToLoad(model, target.state, read, feed)
    beside.compare()
    keys_loaded = _load_parts(target, chosen, feed)
    try:
        beside.load()
    except SnapshotError as error:
        raise _partly_loaded(error) from error
    saved = names | {part.name for part in unread}
    return Restored(
        parts=tuple(each.part.name for each in chosen),
        keys=tuple(sorted(keys_loaded)),
        left_alone=tuple(sorted(target.names() - keys_loaded)),
        unused=tuple(sorted(saved - keys_loaded)),
    )


def _load_parts(target: _Target, chosen: Sequence[PartContents], feed: Feed) -> set[str]:
    """Bring and load one part after the other, and return the names in the model of what was loaded. **Collective**."""
    selection = feed.stored.selection
    loaded: dict[str, StateDict] = {source.path: {} for source in target.sources}
    for each in chosen:
        wanted = _wanted(each, selection)
        keys = [key for key, names in each.names.items() if not wanted.isdisjoint(names)]
        try:
            brought = feed.bring(each, keys, target.present(each.part, selection))
        except SnapshotError as error:
            if each is chosen[0]:
                raise
            raise _partly_loaded(error) from error
        for source in target.sources:
            if each.part in source.parts:
                loaded[source.path].update((source.path_of(each.part) + key, value) for key, value in brought.items())
        complete = [source for source in target.sources if source.parts[-1] == each.part]
        _load(complete, loaded, target, feed)
        for source in complete:  # the next ones need the memory; the names alone are reported
            loaded[source.path] = dict.fromkeys(loaded[source.path])
            target.state[source.path] = dict.fromkeys(target.state[source.path])
    return {whole_key(source, key) for source in target.sources for key in loaded[source.path]}


def _partly_loaded(error: SnapshotError) -> PartlyLoadedError:
    return PartlyLoadedError(f"{error}. Parts of the model are loaded already: load all of it again")


def _wanted(contents: PartContents, selection: Selection) -> set[str]:
    """The names in a part that are selected."""
    return {key for key in contents.names_to_keys if selection.holds(whole_key(contents.part, key))}


def _find(model: nn.Module, parts: Sequence[Part], feed: Feed) -> _Target:
    """Those of `parts` that the model of this rank has, and what they hold."""
    step = "find the saved parts in the model"

    def find() -> tuple[list[Source], dict[str, StateDict]]:
        here = [part for part in parts if modules_along(model, part.path) is not None]
        sources = list_sources(model, here, save_frozen_weights=True)
        for source in sources:
            if source.holds_fsdp1:
                state_beside(source)  # what fails in the modules themselves must not fail below, among collectives
        return sources, {source.path: plain_state_dict(source) for source in sources if not source.holds_fsdp1}

    sources, state = feed.ranks.agree(step, find)
    try:
        # Only torch knows the names and shapes of what lies in the flat parameters of FSDP1.
        state |= {source.path: feed.layout(source) for source in sources if source.holds_fsdp1}
    except BaseException as error:  # noqa: BLE001  # lose raises
        feed.ranks.lose(step, error)
    return _Target(model, sources, state)


def _compare(target: _Target, contents: Sequence[PartContents], feed: Feed) -> None:
    """Check that everything fits on all ranks, before anything is loaded. **Collective**."""
    manifest, selection = feed.stored.manifest, feed.stored.selection

    def compare() -> list[Any]:
        here = {part for source in target.sources for part in source.parts}
        comparison = Comparison(absent=[each.part.path for each in contents if each.part not in here])
        for each in contents:
            saved = {key: each.kinds[each.names_to_keys[key]] for key in _wanted(each, selection)}
            may_lack = set(manifest.left_out.get(each.part.name, ()))
            present, resizable = target.present(each.part, selection), set[str]()
            for source in target.sources:
                if each.part in source.parts:
                    resizable |= resized(source, each.part, saved, present, manifest.versions)
            comparison.add(each, saved, present, may_lack, resizable)
        return comparison.to_json()

    found = feed.ranks.gather_json("compare the saved weights with the model", compare)
    comparisons = [Comparison.from_json(each) for each in found]
    parts = [each.part for each in contents]
    refuse_misfits(parts, comparisons)
    _refuse_different_values({places for comparison in comparisons for places in comparison.tied}, contents, feed)
    if casts := sorted({cast for comparison in comparisons for cast in comparison.casts}):
        refuse_losses(feed.losses(casts), parts)


def _refuse_different_values(
    tied: Iterable[tuple[tuple[str, str], ...]], contents: Sequence[PartContents], feed: Feed
) -> None:
    """Check that values which are for one tensor of a model are the same. **Collective**.

    Args:
        tied: Parts and keys of the values for each such tensor; the same on every rank.
        contents: What there is.
        feed: Where values come from.

    Raises:
        SnapshotError: On every rank, if they are not.
    """
    groups = sorted(tied)
    if not groups:
        return
    parts = {each.part.name: each.part for each in contents}
    if differing := feed.differing(groups):
        names = " and ".join(whole_key(parts[part], key) for part, key in groups[differing[0]])
        raise SnapshotError(
            f"the snapshot does not fit the model: {names} have different values there, and are one tensor in the "
            "model, which is tied. Untie it. Nothing was loaded"
        )


def _load(sources: Sequence[Source], loaded: Mapping[str, StateDict], target: _Target, feed: Feed) -> None:
    """Load sources of which everything was brought. **Collective**, also where there is none on this rank."""
    step, versions = "load the weights", feed.stored.manifest.versions
    try:
        for source in sources:
            if source.holds_fsdp1:
                with feed.loading(source.module):
                    _load_source(source, loaded[source.path], {}, versions)
    except BaseException as error:  # noqa: BLE001  # lose raises
        feed.ranks.lose(step, error)

    def load_others() -> None:
        for source in sources:
            if not source.holds_fsdp1:
                _load_source(source, loaded[source.path], target.state[source.path], versions)

    feed.ranks.agree(step, load_others)


def _load_source(source: Source, loaded: StateDict, present: StateDict, versions: RecordedVersions) -> None:
    module = loading_module(source.module)
    names = PlainNames(module)
    state, others = ({names.key(key): value for key, value in entries.items()} for entries in (loaded, present))
    not_taken, missing = load_state(module, state, others, saved_versions(source, versions, loaded))
    if missing and not source.holds_fsdp1:
        # An override may have loaded them by itself, in its own way.
        now = {names.key(key): value for key, value in plain_state_dict(source).items()}
        not_taken += [key for key in missing if not _is_loaded(state[key], now.get(key))]
    if not_taken:
        raise SnapshotError(
            f"load_state_dict of {source.path or 'the model'} has no use for {', '.join(sorted(not_taken))}, which its "
            "state_dict gives: these weights are not loaded, all others are"
        )


def _is_loaded(value: Any, now: Any) -> bool:
    """Whether a module has a value that it was given, so far as that can be seen. **Rank-local**."""
    if not (isinstance(value, torch.Tensor) and isinstance(now, torch.Tensor) and is_dense(value) and is_dense(now)):
        return True
    value, now = local_of(value), local_of(now)
    return value.shape == now.shape and torch.equal(
        *map(raw_bytes, (brought_to_host(value).to(now.dtype), brought_to_host(now)))
    )
