"""The manifest of a snapshot: what the snapshot holds, and what each of its files must be."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from keepbest.iteration import TrainingIteration
from keepbest.run.digest import Digest
from keepbest.run.events import VERSION
from keepbest.run.names import is_safe

# torch names the index of a distributed checkpoint like this; other hidden files are refused.
_INDEX = ".metadata"


class SavedPart(NamedTuple):
    """A part of the model that was selected to be saved.

    Attributes:
        name: Name of the part, which begins the names of its files.
        path: Plain dotted path of the module in the model; empty for the model itself.
        apart: Plain paths below it that are parts of their own.
    """

    name: str
    path: str
    apart: tuple[str, ...]


class FileRecord(NamedTuple):
    """What is recorded of a file.

    Attributes:
        part: Name of the part of the model, or of the training state, that it holds.
        digest: Size and digest of its bytes.
        tensors: Number of tensors in it, where one file holds a whole part.
    """

    part: str
    digest: Digest
    tensors: int | None = None

    def to_json(self) -> dict[str, Any]:
        """JSON values only; `from_json` is the inverse."""
        record = {"part": self.part, **self.digest._asdict()}
        return record if self.tensors is None else {**record, "tensors": self.tensors}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> FileRecord:
        """The inverse of `to_json`."""
        digest = Digest(record["bytes"], record["digest"], record["algorithm"])
        return cls(record["part"], digest, record.get("tensors"))


@dataclass(frozen=True, slots=True)
class Manifest:
    """What `snapshot.json` says.

    Attributes:
        run: Id of the run.
        iteration: Training iteration whose weights these are.
        keeper: Name of the keeper that took the snapshot; `None` for a resume checkpoint.
        metric_key: Metric of that keeper; `None` for a resume checkpoint.
        value: Value of the metric at the iteration; `None` for a resume checkpoint.
        format: Name of the format of the files.
        parts: Parts of the model that were selected, in order.
        training_state: Names of what is kept beside them, such as an optimizer.
        files: Record of each file, by its path in the folder of the snapshot.
        left_out: For each part the keys, relative to the part, that were frozen and not saved.
        ledger_bytes: Bytes of the ledger that were on the disk when the snapshot was complete. A ledger with fewer is
            an older one.
        versions: For each part the versions of the modules in it that are not 1, by their paths; parts without such
            modules are absent. `None` in a snapshot that was written before they were recorded.
    """

    run: str
    iteration: TrainingIteration
    keeper: str | None
    metric_key: str | None
    value: float | None
    format: str
    parts: tuple[SavedPart, ...]
    training_state: tuple[str, ...]
    files: Mapping[str, FileRecord]
    left_out: Mapping[str, Sequence[str]]
    ledger_bytes: int
    versions: Mapping[str, Mapping[str, int | float | str]] | None = None

    @property
    def total_bytes(self) -> int:
        """Bytes of all files."""
        return sum(record.digest.bytes for record in self.files.values())

    @property
    def saved_parts(self) -> tuple[SavedPart, ...]:
        """The parts that have a file; one that was frozen as a whole has none."""
        names = {record.part for record in self.files.values()}
        return tuple(part for part in self.parts if part.name in names)

    def files_in(self, parts: Container[str]) -> list[str]:
        """The names of the files of some parts."""
        return sorted(name for name, record in self.files.items() if record.part in parts)

    def to_bytes(self) -> bytes:
        """The content of `snapshot.json`; `from_bytes` is the inverse."""
        content = {
            "version": VERSION,
            "run": self.run,
            "iteration": str(self.iteration),
            "keeper": self.keeper,
            "metric_key": self.metric_key,
            "value": self.value,
            "format": self.format,
            "bytes": self.total_bytes,
            "parts": [list(part) for part in self.parts],
            "training_state": list(self.training_state),
            "files": {name: record.to_json() for name, record in self.files.items()},
            "left_out": self.left_out,
            "ledger_bytes": self.ledger_bytes,
        }
        if self.versions is not None:
            content["versions"] = self.versions
        return json.dumps(content, indent=1).encode()

    @classmethod
    def from_bytes(cls, text: bytes) -> Manifest:
        """The manifest in the bytes of a file that anybody may have written.

        Raises:
            ValueError, TypeError, LookupError, AttributeError, RecursionError: If it is no manifest of this version, or
                one that names files outside of its folder.
        """
        content = json.loads(text)
        if content["version"] != VERSION:
            raise ValueError(f"it is of version {content['version']!r}; this keepbest reads version {VERSION}")
        _check(content)
        return cls(
            run=content["run"],
            iteration=TrainingIteration.parse(content["iteration"]),
            keeper=content["keeper"],
            metric_key=content["metric_key"],
            value=content["value"],
            format=content["format"],
            parts=tuple(SavedPart(name, path, tuple(apart)) for name, path, apart in content["parts"]),
            training_state=tuple(content["training_state"]),
            files={name: FileRecord.from_json(record) for name, record in content["files"].items()},
            left_out={name: list(keys) for name, keys in content["left_out"].items()},
            ledger_bytes=content["ledger_bytes"],
            versions=content.get("versions"),
        )


def _check(content: Any) -> None:
    """Refuse what would not be what its type says, and files outside of the folder of the snapshot."""
    parts, states = {name for name, _, _ in content["parts"]}, list(content["training_state"])
    of_keeper = [content[key] for key in ("keeper", "metric_key", "value")]
    is_of_keeper = of_keeper != [None] * len(of_keeper)
    texts = [content["run"], content["format"], *(of_keeper[:-1] if is_of_keeper else [])]
    texts += [text for name, path, apart in content["parts"] for text in (name, path, *apart)]
    texts += states
    texts += [key for keys in content["left_out"].values() for key in keys]
    if strange := [text for text in texts if not isinstance(text, str)]:
        raise TypeError(f"expected text, found {strange[0]!r}")
    names = parts.union(states)
    if len(names) != len(content["parts"]) + len(states):
        raise ValueError(f"two parts, or training states, have one name: {sorted(names)}")
    if is_of_keeper and not isinstance(content["value"], float | int):
        raise TypeError(f"the value of the metric is {content['value']!r}")
    if type(content["ledger_bytes"]) is not int:
        raise TypeError(f"the ledger had {content['ledger_bytes']!r} bytes")
    if outside := [name for name in content["files"] if not _is_inside(name)]:
        raise ValueError(f"it names files outside of its folder: {', '.join(outside)}")
    for record in content["files"].values():
        size, digest = record["bytes"], record["digest"]
        if record["part"] not in names or not isinstance(digest, str) or type(size) is not int or size < 0:
            raise ValueError(f"this is no file of a snapshot: {record!r}")
    if unknown := content["left_out"].keys() - parts:
        raise ValueError(f"keys of parts that it does not have were left out: {', '.join(sorted(unknown))}")
    _check_versions(content.get("versions"), parts)


def _check_versions(versions: Any, parts: set[Any]) -> None:
    if versions is None:
        return
    if unknown := versions.keys() - parts:
        raise ValueError(f"it has versions of parts that it does not have: {', '.join(sorted(unknown))}")
    for version in (version for modules in versions.values() for version in modules.values()):
        if not isinstance(version, int | float | str):
            raise TypeError(f"the version of a module is {version!r}")


def manifest_digest(text: bytes) -> str:
    """Digest of a manifest, as the ledger records it."""
    return hashlib.blake2b(text, digest_size=16).hexdigest()


def _is_inside(name: str) -> bool:
    # Either a file of the snapshot, or one in the folder of a part.
    folder, slash, file = name.rpartition("/")
    return is_safe(file) if not slash else is_safe(folder) and (is_safe(file) or file == _INDEX)
