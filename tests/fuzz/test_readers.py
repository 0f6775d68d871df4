"""Readers are given files that are nearly right, for a bounded time. `make fuzz` takes longer.

FUZZ_SECONDS=600 make fuzz          FUZZ_SEED=7 repeats the inputs of an earlier run
"""

from __future__ import annotations

import os
import pickle
import random
import resource
import time
import warnings
from collections import Counter
from pathlib import Path

import pytest

from keepbest.errors import KeepBestError
from tests.fuzz.mutations import MARK, PAYLOAD, mutated
from tests.fuzz.readers import readers

SECONDS = float(os.environ.get("FUZZ_SECONDS", "5"))
SEED = int(os.environ.get("FUZZ_SEED", "0"))
_MOST_MEMORY = 3 << 30  # more than is there, so what asks for it is refused
_MOST_SECONDS = 5.0  # of one input


@pytest.fixture(autouse=True)
def little_memory():
    """What asks for much more than the files have is refused."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + _MOST_MEMORY, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def test_no_file_runs_leads_out_or_ends_in_a_traceback(tmp_path, monkeypatch, request):
    outside, inside = tmp_path / "outside", tmp_path / "outside/inside"
    inside.mkdir(parents=True)
    monkeypatch.chdir(outside)  # a payload leaves its mark here, and `../x` of the folder is here
    chance = random.Random(SEED)
    found = readers(tmp_path / "valid")
    counts: Counter[str] = Counter()
    seconds = 0.2 if request.config.getoption("--quick") else SECONDS
    end = time.monotonic() + seconds
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        while time.monotonic() < end:
            for name, reader in found.items():
                data = mutated(chance, chance.choice(reader.valid), chance.choice(reader.valid))
                folder = inside / str(sum(counts.values()) % 8)
                folder.mkdir(exist_ok=True)
                counts[f"{name}, {_end(reader, data, folder, name)}"] += 1
                assert [path.name for path in outside.iterdir()] == ["inside"], (name, data)
    print(f"\nseed {SEED}: {sum(counts.values())} inputs in {seconds:g} s")
    for name, count in sorted(counts.items()):
        print(f"  {name}: {count}")
    assert all(counts[f"{name}, refused"] for name in found)
    pickle.loads(PAYLOAD).close()
    assert (outside / MARK).exists()  # a payload that runs is seen


def _end(reader, data: bytes, folder: Path, name: str) -> str:
    start = time.monotonic()
    try:
        reader.read(data, folder)
    except (KeepBestError, OSError):
        return "refused"
    except BaseException as error:
        (folder / "input").write_bytes(data)
        raise AssertionError(f"seed {SEED}: {name} ended in {error!r}; the input is in {folder / 'input'}") from error
    finally:
        assert time.monotonic() - start < _MOST_SECONDS, (name, data)
    return "read"
