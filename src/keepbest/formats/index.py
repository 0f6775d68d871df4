"""Reads `.metadata`, the index of torch's distributed checkpoints. **Rank-local**.

It is a pickle, and anybody may have written it. So nothing that it names is imported or called: what it describes is
read as plain records, of the few kinds that torch writes there, and checked.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from keepbest.errors import SnapshotError
from keepbest.formats.records import Global, Record, read_records
from keepbest.run.names import is_safe
from keepbest.run.no_links import open_file

INDEX = ".metadata"
_MOST_DIMENSIONS = 64
_LARGEST = 1 << 62


class Place(NamedTuple):
    """Where a value lies, with the names that torch gives it.

    Attributes:
        relative_path: Name of the file in the folder.
        offset: Byte of the file at which it begins.
        length: Bytes that it takes there.
    """

    relative_path: str
    offset: int
    length: int


def read_index(folder: Path) -> Metadata:
    """What the index of `folder` says, where each value is a `Place` in a file of the folder. No code is run.

    Raises:
        SnapshotError: If it is no index, or names what is not in the files of the folder.
    """
    try:
        with open_file(folder / INDEX) as file:
            root = read_records(file.read())
        return _parse(root, folder)
    except Exception as error:
        raise SnapshotError(f"{folder} cannot be read as a distributed checkpoint: {error!r}") from error


_METADATA = "torch.distributed.checkpoint.metadata"
_BYTES, _TENSOR = Global(_METADATA, "BytesStorageMetadata"), Global(_METADATA, "TensorStorageMetadata")
_CHUNK, _PROPERTIES = Global(_METADATA, "ChunkStorageMetadata"), Global(_METADATA, "TensorProperties")
_INDEX_KEY, _PLACE = (
    Global(_METADATA, "MetadataIndex"),
    Global("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
)
_SIZE = Global("torch", "Size")


def _parse(root: object, folder: Path) -> Metadata:
    fields = _fields(root, Global(_METADATA, "Metadata"))
    places = {_parse_key(key): _parse_place(place) for key, place in _of(dict, fields["storage_data"]).items()}
    _check_files(folder, places.values())
    entries = _of(dict, fields["state_dict_metadata"])
    tensors = [entry for entry in entries.values() if _of(Record, entry).maker != _BYTES]
    # One list that is there many times would be read as often.
    if len({id(_of(list, _fields(entry, _TENSOR)["chunks"])) for entry in tensors}) < len(tensors):
        raise ValueError("two tensors have the same shards")
    return Metadata(
        {_text(key): _parse_entry(key, entry, places) for key, entry in entries.items()}, storage_data=places
    )


def _parse_key(key: object) -> MetadataIndex:
    fields = _fields(key, _INDEX_KEY)
    offset = fields.get("offset")
    return MetadataIndex(_text(fields["fqn"]), None if offset is None else _parse_size(offset))


def _parse_place(place: object) -> Place:
    fields = _fields(place, _PLACE)
    if fields.get("transform_descriptors"):
        raise ValueError("its values are compressed")
    name, offset, length = fields["relative_path"], fields["offset"], fields["length"]
    if type(offset) is not int or type(length) is not int or not 0 <= offset <= offset + length <= _LARGEST:
        raise ValueError("a value lies nowhere")
    return Place(_text(name), offset, length)


def _check_files(folder: Path, places: Iterable[Place]) -> None:
    """Check that each place lies in its file, and none upon another."""
    for name, there in itertools.groupby(sorted(places), lambda place: place.relative_path):
        if not is_safe(name):
            raise ValueError(f"{name!r} is no name of a file beside it")
        with open_file(folder / name) as file:
            size = file.seek(0, io.SEEK_END)
        end = 0
        for place in there:
            if place.offset < end:
                raise ValueError(f"two values lie at byte {place.offset} of {name!r}")
            end = place.offset + place.length
        if end > size:
            raise ValueError(f"{name!r} has {size} bytes, and a value ends at byte {end}")


def _parse_entry(
    key: str, entry: object, places: Mapping[MetadataIndex, Place]
) -> TensorStorageMetadata | BytesStorageMetadata:
    if _of(Record, entry).maker == _BYTES:
        return BytesStorageMetadata()
    fields = _fields(entry, _TENSOR)
    size = _parse_size(fields["size"])
    properties = _of(Record, fields["properties"])
    if properties.maker != _PROPERTIES:
        raise ValueError(f"{key!r} has no properties of a tensor")
    dtype = _parse_dtype(_of(tuple, properties.state)[0])
    chunks = [_parse_chunk(chunk, size) for chunk in fields["chunks"]]
    for chunk in chunks:
        bytes_held = chunk.sizes.numel() * dtype.itemsize
        place = places.get(MetadataIndex(key, chunk.offsets))
        if place is None and bytes_held:
            raise ValueError(f"a shard of {key!r} is nowhere")
        if place is not None and bytes_held > place.length:
            raise ValueError(f"a shard of {key!r} has {place.length} bytes, which do not hold {tuple(chunk.sizes)}")
    return TensorStorageMetadata(TensorProperties(dtype=dtype), size, chunks)


def _parse_dtype(dtype_name: object) -> torch.dtype:
    module, name = _of(Global, dtype_name)
    dtype = getattr(torch, name, None)
    if module != "torch" or not isinstance(dtype, torch.dtype):
        raise ValueError(f"{module}.{name} is no dtype")
    return dtype


def _parse_chunk(chunk: object, size: torch.Size) -> ChunkStorageMetadata:
    fields = _fields(chunk, _CHUNK)
    offsets, sizes = _parse_size(fields["offsets"]), _parse_size(fields["sizes"])
    for start, length, whole in zip(offsets, sizes, size, strict=True):
        if start + length > whole:
            raise ValueError("a shard lies outside of its tensor")
    return ChunkStorageMetadata(offsets, sizes)


def _parse_size(size: object) -> torch.Size:
    if type(size) is not Record or size.maker != _SIZE or type(size.arguments[0]) is not tuple:
        raise TypeError("expected the size of a tensor")
    numbers, product = size.arguments[0], 1
    for number in numbers:
        if type(number) is not int or number < 0:
            raise TypeError("expected a number of elements")
        product *= number or 1
        if product > _LARGEST:
            raise ValueError("a tensor is too large")
    if len(numbers) > _MOST_DIMENSIONS:
        raise ValueError("a tensor has too many dimensions")
    return torch.Size(numbers)


def _fields(record: object, maker: Global) -> dict[str, Any]:
    """The attributes of a record, which this must have made."""
    if type(record) is not Record or record.maker != maker or type(record.state) is not dict:
        raise TypeError(f"expected {maker.name}")
    return record.state


def _text(text: object) -> str:
    if type(text) is not str:
        raise TypeError("expected text")
    return text


def _of(kind: type[Any], value: object) -> Any:
    if type(value) is not kind:
        raise TypeError(f"expected {kind.__name__}, found {type(value).__name__}")
    return value
