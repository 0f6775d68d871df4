"""Formats that keep one file for each part of the model, written by rank 0."""

from __future__ import annotations

import mmap
from abc import abstractmethod
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch

from keepbest.errors import SnapshotError
from keepbest.formats.format import Format, Receipt, StateDict, TensorKind, ToWrite
from keepbest.formats.tied import first_names
from keepbest.modules.kinds import is_dense
from keepbest.modules.state_dicts import with_versions
from keepbest.run.digest import Digest
from keepbest.run.files import Files
from keepbest.run.manifest import FileRecord
from keepbest.run.names import part_name


def can_be_mapped(path: Path) -> bool:
    """Whether a file can be mapped into memory, which some network file systems refuse. Raises `OSError`."""
    with path.open("rb") as file:
        try:
            mmap.mmap(file.fileno(), 1, access=mmap.ACCESS_READ).close()
        except OSError:
            return False
        except ValueError:  # an empty file, of which there is nothing to be mapped
            return True
    return True


class WholePart:
    """A part of a snapshot that one file holds: a `PartReader` of its state dict.

    Attributes:
        others: What is no dense tensor, by its key.
    """

    def __init__(self, state: StateDict) -> None:
        self._tensors: dict[str, torch.Tensor] = {key: value for key, value in state.items() if is_dense(value)}
        self.others = {key: value for key, value in state.items() if key not in self._tensors}

    @cached_property
    def tied(self) -> dict[str, str]:
        """Further names of stored tensors, and the key of each."""
        return first_names(self._tensors)

    @cached_property
    def kinds(self) -> dict[str, TensorKind]:
        """Shape and dtype of each tensor that is stored, by its key."""
        stored = (key for key in self._tensors if key not in self.tied)
        return {key: TensorKind(self._tensors[key].shape, self._tensors[key].dtype) for key in stored}

    def fetch(self, key: str) -> torch.Tensor:
        return self._tensors[key]

    def fill(self, wanted: Mapping[str, torch.Tensor]) -> None:
        for key, tensor in wanted.items():
            tensor.copy_(self._tensors[key])


class WholeFileFormat(Format):
    """A format with one file for each part.

    Attributes:
        ending: Ending of the files.
    """

    capture = "gathered"
    ending: ClassVar[str]

    @property
    def for_state(self) -> WholeFileFormat:
        return self

    @abstractmethod
    def write_file(self, files: Files, path: Path, state: StateDict, *, is_waited_for: bool) -> Digest:
        """Write a state dict durably to a new file, for which somebody waits or not. Raises as `write`."""

    @abstractmethod
    def read_file(self, path: Path) -> dict[str, Any]:
        """The state dict in a file; tensors that were tied are one again. Raises as `reader`."""

    def write(self, files: Files, folder: Path, share: ToWrite) -> Receipt:
        records = {}
        for part, state in share.files.items():
            is_state = part in share.training_state
            form = self.for_state if is_state else self
            name = f"{part_name(part)}{form.ending}"
            content = state if is_state else with_versions(state, share.versions.get(part, {}))
            digest = form.write_file(files, folder / name, content, is_waited_for=share.is_waited_for)
            records[name] = FileRecord(part, digest, sum(isinstance(value, torch.Tensor) for value in state.values()))
        return Receipt(records)

    def reader(self, folder: Path, files: Mapping[str, FileRecord], part: str) -> WholePart:
        names = [name for name, record in files.items() if record.part == part]
        if len(names) != 1:
            raise SnapshotError(f"{folder} has {len(names)} files of {part!r}; format {self.name!r} has one")
        form = self if names[0].endswith(self.ending) else self.for_state
        return WholePart(form.read_file(folder / names[0]))
