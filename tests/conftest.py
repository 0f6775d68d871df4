"""Settings of every test process, and of the rank processes that inherit its environment."""

from __future__ import annotations

import os

# Test processes and their ranks share few cores. Set before torch is imported, so that forked ranks have it too.
os.environ["OMP_NUM_THREADS"] = "1"

import torch
from hypothesis import settings

torch.set_num_threads(1)
# How long an example takes depends on what the other test process does.
settings.register_profile("keepbest", deadline=None)
settings.load_profile("keepbest")
