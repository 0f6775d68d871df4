"""What is no weight, and what other ranks than 0 hold alone, such as the stages of a pipeline."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

from keepbest.capture.catalogue import Name
from keepbest.capture.union import Holding
from keepbest.modules.raw_bytes import brought_to_host, raw_bytes
from keepbest.ranks import Ranks
from keepbest.staging.slot import Slot


def own_data(data: Any, slot: Slot) -> Any:
    """An extra state, or what else is no weight, as it stays until it is written. **Rank-local**."""
    if slot.is_live:
        return data
    # The module may still change what it gave, and the tensors in it.
    torch.save(data, packed := io.BytesIO())
    packed.seek(0)
    return torch.load(packed, map_location="cpu", weights_only=True)


class ForeignTransfer:
    """Point-to-point transfers from the owner of each entry to rank 0. **Collective**: all ranks open the block.

    Rank 0 waits for all of them from the beginning, so an owner can send at any moment.
    Bytes travel, in messages that are numbered as the entries are.

    Args:
        ranks: Ranks of the model.
        wanted: Entries that rank 0 does not hold.
        rooms: On rank 0, a contiguous tensor for each of `wanted` that is a tensor; empty elsewhere.
    """

    def __init__(
        self, ranks: Ranks, wanted: Iterable[tuple[Name, Holding]], rooms: Mapping[Name, torch.Tensor]
    ) -> None:
        self._ranks = ranks
        self._wanted = dict(wanted)
        self._rooms = rooms
        self._group = ranks.patient_group() if self._wanted else None
        self._under_way: list[dist.Work | None] = []
        self._kept: list[torch.Tensor] = []
        self._sizes: dict[Name, torch.Tensor] = {}
        self.received: dict[Name, Any] = dict(rooms)

    def send(self, name: Name, value: Any) -> None:
        """Send the whole of an entry, which this rank owns. **Rank-local**; returns when a tensor has arrived."""
        number = self._wanted[name].number
        if not self._wanted[name].entry.form.is_packed:
            if value.numel():
                sent = raw_bytes(brought_to_host(value))
                if (work := dist.isend(sent, group=self._group, group_dst=0, tag=2 * number)) is not None:
                    work.wait()
            return
        torch.save(value, packed := io.BytesIO())
        data = torch.frombuffer(bytearray(packed.getbuffer()), dtype=torch.uint8)
        # Rank 0 receives the data after their size, at the end, and must not be waited for before.
        for message, tag in ((torch.tensor([data.numel()], device="cpu"), 2 * number), (data, 2 * number + 1)):
            self._kept.append(message)
            self._under_way.append(dist.isend(message, group=self._group, group_dst=0, tag=tag))

    def __enter__(self) -> ForeignTransfer:
        if self._ranks.is_main:
            for name, holding in self._wanted.items():
                if holding.entry.form.is_packed:
                    into = self._sizes[name] = torch.zeros(1, dtype=torch.int64, device="cpu")
                elif (into := raw_bytes(self._rooms[name])).numel() == 0:
                    continue
                self._under_way.append(
                    dist.irecv(into, group=self._group, group_src=holding.owner, tag=2 * holding.number)
                )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None:
            return
        for work in self._under_way:
            if work is not None:
                work.wait()
        for name, size in self._sizes.items():
            holding, data = self._wanted[name], torch.empty(int(size), dtype=torch.uint8, device="cpu")
            work = dist.irecv(data, group=self._group, group_src=holding.owner, tag=2 * holding.number + 1)
            if work is not None:
                work.wait()
            packed = io.BytesIO(data.numpy().tobytes())
            self.received[name] = torch.load(packed, map_location="cpu", weights_only=True)
