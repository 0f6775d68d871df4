"""Settings of every test process, and of the rank processes that inherit its environment."""

from __future__ import annotations

import os

# Several test processes and their ranks share few cores; set before torch is imported, so that forked ranks have it too.
os.environ["OMP_NUM_THREADS"] = "1"

import torch

torch.set_num_threads(1)
