from __future__ import annotations

import contextlib

import pytest
import torch

from keepbest.staging.device import _stream_of
from tests.staging.pretended import GIB, Event, Pretended, Stream


@pytest.fixture
def device(monkeypatch):
    """There is no GPU here, so the calls of `torch.cuda` are answered by an object that writes them down."""
    pretended = Pretended()

    def synchronize():
        pretended.log.append("wait for all streams")
        for write in pretended.unfinished:
            write()

    def concatenate(pieces, *, out):
        pretended.log.append("clone")
        return cat(pieces, out=out)

    def only_native(answer):
        def ask(device):
            if pretended.backend != "native":
                raise RuntimeError(f"{pretended.backend} does not yet support this")
            return answer(device)

        return ask

    cat = torch.cat
    for name, replacement in {
        "device": lambda _: contextlib.nullcontext(),
        "stream": lambda _: contextlib.nullcontext(),
        "Stream": lambda _: Stream(pretended),
        "current_stream": lambda _: Stream(pretended),
        "current_device": lambda: 0,
        "Event": lambda **_: Event(pretended, "arrived"),
        "synchronize": synchronize,
        "mem_get_info": lambda _: (pretended.free, GIB),
        "get_allocator_backend": lambda: pretended.backend,
        "get_per_process_memory_fraction": only_native(lambda _: pretended.fraction),
        "memory_stats_as_nested_dict": only_native(
            lambda _: {
                "reserved_bytes": {
                    "all": {
                        "current": pretended.reserved,
                        "allocated": pretended.allocated + sum(pretended.taken),
                        "freed": pretended.given_back,
                    }
                }
            }
        ),
    }.items():
        monkeypatch.setattr(torch.cuda, name, replacement)
    monkeypatch.setattr(torch, "empty", pretended.empty)
    monkeypatch.setattr(torch, "cat", concatenate)
    _stream_of.cache_clear()
    yield pretended
    _stream_of.cache_clear()
