"""A rank of `run_ranks` as torchrun would have started it."""

from __future__ import annotations

import os

import torch.distributed as dist


def leave_for_torchrun(port: int) -> int:
    """Leaves the process group, and sets the variables of torchrun for one that meets at `port`. Returns the rank."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    dist.destroy_process_group()
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size}
    os.environ |= {name: str(value) for name, value in place.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return rank
