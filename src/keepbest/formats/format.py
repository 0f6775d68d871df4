"""What a format of snapshots is: how weights become files, and how they are read again. All of it is **rank-local**."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import torch

from keepbest.modules.state_dicts import Version
from keepbest.run.files import Files
from keepbest.run.manifest import FileRecord

StateDict = Mapping[str, Any]


class TensorKind(NamedTuple):
    """Shape and dtype of a tensor that is not read yet."""

    shape: Sequence[int]
    dtype: torch.dtype


class ToWrite(Protocol):
    """What one rank writes of a snapshot.

    Attributes:
        files: For each part the state dict that this rank writes, without what `plans` has; empty on ranks that write
            nothing.
        training_state: Names of those parts that are no weights.
        plans: For each part what the capture has planned for the format, where it plans anything.
        versions: For each part the versions of modules that are recorded.
        is_waited_for: Whether training waits for the write.
    """

    @property
    def files(self) -> Mapping[str, StateDict]: ...
    @property
    def training_state(self) -> Collection[str]: ...
    @property
    def plans(self) -> Mapping[str, Any]: ...
    @property
    def versions(self) -> Mapping[str, Mapping[str, Version]]: ...
    @property
    def is_waited_for(self) -> bool: ...


class Receipt(NamedTuple):
    """What one rank has written.

    Attributes:
        files: Record of each file, by its path in the folder of the snapshot.
        note: What the format on rank 0 must know to complete the snapshot.
    """

    files: Mapping[str, FileRecord]
    note: str = ""

    def to_json(self) -> list[Any]:
        """JSON values only; `from_json` is the inverse."""
        return [{name: record.to_json() for name, record in self.files.items()}, self.note]

    @classmethod
    def from_json(cls, receipt: Sequence[Any]) -> Receipt:
        """The inverse of `to_json`."""
        files, note = receipt
        return cls({name: FileRecord.from_json(record) for name, record in files.items()}, note)


class PartReader(Protocol):
    """One part of a snapshot, open for reading.

    Attributes:
        kinds: Shape and dtype of each dense tensor that is stored, by its key.
        tied: Further names of stored tensors, and the key of each.
        others: What is no dense tensor, by its key.
    """

    @property
    def kinds(self) -> Mapping[str, TensorKind]: ...
    @property
    def tied(self) -> Mapping[str, str]: ...
    @property
    def others(self) -> StateDict: ...

    def fetch(self, key: str) -> torch.Tensor:
        """One whole tensor on the CPU. Raises `SnapshotError`."""

    def fill(self, wanted: Mapping[str, torch.Tensor]) -> None:
        """Read into the tensors of `wanted`, of which a sharded one gets this rank's shards.

        Args:
            wanted: Tensors by their keys, or by further names of these.

        Raises:
            SnapshotError: If they cannot be read.
        """


class Format(ABC):
    """A format of snapshots; the registry has one of each.

    Attributes:
        name: Name of the format, as users and manifests have it.
        capture: Whether rank 0 writes weights that were `gathered`, or every rank writes its `local` share.
    """

    name: ClassVar[str]
    capture: ClassVar[Literal["gathered", "local"]]

    @property
    def for_state(self) -> Format:
        """The format of the files of training states, which hold numbers and nested data."""
        return self

    def check(self) -> None:
        """Check that what the format needs is installed.

        Raises:
            ConfigError: If a package is missing.
        """
        return  # a format needs torch alone, unless it says otherwise

    def cannot_hold(self, key: str, value: object) -> str | None:
        """Why the format cannot hold a value of a state dict, and the way out; `None` if it can."""
        del key, value  # a format holds everything that torch saves, unless it says otherwise
        return None

    @abstractmethod
    def write(self, files: Files, folder: Path, share: ToWrite) -> Receipt:
        """Write this rank's share into the folder of a snapshot, durably.

        Raises:
            SnapshotError: If there is something in it that the format cannot hold.
            OSError: Any refusal of the file system.
        """

    def complete(
        self, files: Files, folder: Path, share: ToWrite, receipts: Sequence[Receipt]
    ) -> dict[str, FileRecord]:
        """On rank 0, when all ranks have written: write what describes the whole, and return the record of every file.

        Raises:
            OSError: Any refusal of the file system, or a file of another rank that cannot be seen here.
        """
        del files, folder, share
        return {name: record for receipt in receipts for name, record in receipt.files.items()}

    @abstractmethod
    def reader(self, folder: Path, files: Mapping[str, FileRecord], part: str) -> PartReader:
        """Open a part of the snapshot in `folder` whose files were verified.

        Raises:
            SnapshotError: If it holds anything but weights, or cannot be read.
            ConfigError: If a package that reads it is not installed.
        """


def special_kind(tensor: torch.Tensor) -> str:
    """What a tensor is whose values do not lie side by side in memory, or mean something else; empty if it is plain."""
    if tensor.is_quantized:
        return f"quantized ({tensor.dtype})"
    return "" if tensor.layout == torch.strided else f"sparse ({tensor.layout})"
