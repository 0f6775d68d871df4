"""Shows a fault of torch that `get_model_state_dict` and `full_tensor()` meet on gloo, without keepbest.

    python -m benchmarks.gloo_double_free

The two threads of a gloo group note the name of what they completed last in one string without a lock
(`ProcessGroupGloo::runLoop`). ALLGATHER_COALESCED, longer than 15 characters, is on the heap, and now and then both
free it. Here many are under way at a time, in more processes than there are cores, so that it comes soon.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time

import torch
import torch.distributed as dist
from torch.distributed import _functional_collectives as collectives

_AT_A_TIME = 50
_SECONDS = 20.0
_PROCESSES_FOR_A_CORE = 3


def gather_all_the_time() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        shard, until = torch.ones(4), time.monotonic() + _SECONDS
        while time.monotonic() < until:
            group = dist.group.WORLD
            for gathered in [collectives.all_gather_tensor(shard, 0, group) for _ in range(_AT_A_TIME)]:
                collectives.wait_tensor(gathered)
        dist.destroy_process_group()


def main() -> None:
    command = [sys.executable, "-m", "benchmarks.gloo_double_free", "alone"]
    count = _PROCESSES_FOR_A_CORE * (os.cpu_count() or 1)
    processes = [subprocess.Popen(command, stderr=subprocess.DEVNULL) for _ in range(count)]
    killed = [-process.wait() for process in processes if process.wait() < 0]
    print(f"torch {torch.__version__}: {len(killed)} of {count} processes were ended by the signals {sorted(killed)}")


if __name__ == "__main__":
    gather_all_the_time() if sys.argv[1:] == ["alone"] else main()
