"""The average of the best snapshots of a run, one tensor at a time. **Rank-local**."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch

from keepbest.capture.contents import is_extra_state
from keepbest.capture.selection import Selection
from keepbest.errors import ConfigError, SnapshotError
from keepbest.export import Contents, check_target, exported_files, verified_contents, write_contents
from keepbest.formats.entries import FileEntry
from keepbest.listing import listed
from keepbest.remote.live import read_snapshots
from keepbest.remote.storage import local_path
from keepbest.run.history import History
from keepbest.run.names import top_ref
from keepbest.run.reader import find_ref


def average(
    run: Path | str,
    to: Path | str,
    *,
    top: int | Sequence[int],
    keeper: str | None = None,
    part: str | None = None,
    only: str | Sequence[str] | None = None,
) -> list[Path]:
    """Write the average of the best snapshots of a run, after every file that is read was verified. **Rank-local**.

    The snapshots are those that `keep_top_k` keeps. Floats are summed in float32, those of 32 bits and more in float64,
    and rounded to the dtype of the best one. Everything else is that of the best one: integers, such as counters of
    batches, and what modules keep beside their weights (`_extra_state`). Memory holds a few copies of one tensor.

    Args:
        run: Directory of the run, or the URL of its remote copy.
        to: File that ends in `.pt` or `.safetensors`. Any other path is a folder of safetensors files with an index, as
            `from_pretrained` reads them.
        top: Number of best ones that are averaged, or their places, from 1.
        keeper: Name of the keeper, such as `best_model.loss.val.total`; `None` where one alone keeps several bests.
        part: Name of one part of the model; `None` is all of them.
        only: Dotted path in the whole model, or several, of what is averaged. `None` is everything.

    Returns:
        The files that were written.

    Raises:
        ConfigError: If fewer bests are kept than asked for, `keeper` is needed or unknown, something is there already,
            there is no such part or path, or a package that is needed is missing.
        SnapshotError: If there is no such run, a file is missing or damaged, or the snapshots have not the same names,
            shapes and kinds of numbers.
        OSError: Any refusal of the file system. Nothing is left at `to` then.
    """
    selection, path = Selection.of(only), local_path(to, "to")
    places = _places(top)

    def snapshots(history: History) -> set[str]:
        return {history.refs[ref] for ref in _refs(history, keeper, places)}

    files = partial(exported_files, part=part, selection=selection)

    def read(directory: Path, history: History) -> list[Path]:
        refs = _refs(history, keeper, places)
        check_target(path)
        contents = [verified_contents(find_ref(directory, history, ref), part, selection) for ref in refs]
        return write_contents(path, _averaged(refs, contents))

    return read_snapshots(run, snapshots, read, files=files)


def _places(top: object) -> list[int]:
    """The places, from 1, that a user asked for. Raises `ConfigError`."""
    asked = range(1, top + 1) if isinstance(top, int) else top if isinstance(top, Sequence) else ()
    places = [place for place in asked if type(place) is int and place > 0]
    if not places or len(set(places)) < len(asked):
        raise ConfigError(f"top must be a number of bests, or different places from 1, got {top!r}")
    return places


def _refs(history: History, keeper: str | None, places: Sequence[int]) -> list[str]:
    """The refs of these places among the best ones of a keeper."""
    several = {name: each.policy.top_k for name, each in history.keepers.items() if each.policy.top_k > 1}
    if keeper is not None and keeper not in history.keepers:
        raise ConfigError(f"the run has no keeper {keeper!r}; there are: {', '.join(history.keepers) or 'none yet'}")
    if keeper is None and len(several) > 1:
        raise ConfigError(f"{len(several)} keepers of the run keep several bests; choose one of: {', '.join(several)}")
    name = next(iter(several), None) if keeper is None else keeper
    if name not in several:
        raise ConfigError(
            "the best alone is kept, so there is nothing to average; train with keep_top_k=5, for example"
        )
    refs = [top_ref(name, place) for place in sorted(places)]
    if missing := [ref for ref in refs if ref not in history.refs]:
        if name not in history.refs:
            raise SnapshotError(f"{name} has no best yet, so there is nothing to average")
        there = sum(ref.startswith(f"{name}.top=") for ref in history.refs)
        raise ConfigError(
            f"expected {len(refs)} of the bests of {name}, up to place {max(places)}; it keeps {there} (keep_top_k is "
            f"{several[name]}), and has no {missing[0]}: ask for fewer"
        )
    return refs


def _averaged(refs: Sequence[str], contents: Sequence[Contents]) -> Contents:
    """What is written of several snapshots, the best one first. Raises `SnapshotError` if they are not of one model."""
    best, *others = contents
    by_key = [{entry.key: entry for entry in each.entries} for each in others]
    for ref, other, theirs in zip(refs[1:], others, by_key, strict=True):
        _refuse_another_model(f"{refs[0]} and {ref}", best, other, theirs)
    entries = []
    for entry in best.entries:
        is_averaged = (entry.dtype.is_floating_point or entry.dtype.is_complex) and not is_extra_state(entry.key)
        fetch = partial(_mean, [entry, *(each[entry.key] for each in by_key)]) if is_averaged else entry.fetch
        entries.append(entry._replace(fetch=fetch))
    return best._replace(entries=entries)


def _refuse_another_model(refs: str, best: Contents, other: Contents, theirs: Mapping[str, FileEntry]) -> None:
    mine = {entry.key for entry in best.entries}
    if different := sorted({*mine, *best.tied, *best.others} ^ {*theirs, *other.tied, *other.others}):
        raise SnapshotError(f"{refs} do not have the same names, so they cannot be averaged: {listed(different)}")
    if best.tied != other.tied or best.others.keys() != other.others.keys():
        raise SnapshotError(f"{refs} cannot be averaged: what is tied, or sparse, in one is not in the other")
    if special := sorted(key for key, value in best.others.items() if isinstance(value, torch.Tensor)):
        raise SnapshotError(f"{special[0]} cannot be averaged: it is sparse or quantized")
    if best.versions is not None and other.versions is not None and best.versions != other.versions:
        paths = sorted(path for path, _ in best.versions.items() ^ other.versions.items())
        raise SnapshotError(f"{refs} cannot be averaged: the class of {paths[0] or 'the model'} has another version")
    for entry in best.entries:
        found = theirs[entry.key]
        here, there = (f"{each.dtype} of shape {tuple(each.shape)}" for each in (entry, found))
        is_same = tuple(entry.shape) == tuple(found.shape) and _kind(entry.dtype) == _kind(found.dtype)
        if not is_same and not is_extra_state(entry.key):
            raise SnapshotError(f"{refs} cannot be averaged: {entry.key} is {here}, and {there}")


def _kind(dtype: torch.dtype) -> str:
    return "float" if dtype.is_floating_point else "complex" if dtype.is_complex else str(dtype)


def _mean(entries: Sequence[FileEntry]) -> torch.Tensor:
    """The mean of one tensor of several snapshots, of which one at a time is in memory beside the sum."""
    first = entries[0].dtype
    wide = torch.complex128 if first.is_complex else torch.float32 if first.itemsize < 4 else torch.float64
    try:
        total = entries[0].fetch().to(wide, copy=True)
        for entry in entries[1:]:
            total += entry.fetch().to(wide)
        return total.div_(len(entries)).to(first)
    except NotImplementedError as error:
        raise SnapshotError(
            f"{entries[0].key} cannot be averaged: it is {first}, with which torch cannot calculate"
        ) from error
