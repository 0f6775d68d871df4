"""What the faces of Accelerate and of the Trainer, which stands on it, share."""

from __future__ import annotations

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from torch import nn

# The root keeps weights of its own.
FSDP = {
    "auto_wrap_policy": "SIZE_BASED_WRAP",
    "min_num_params": 16,
    "state_dict_type": "SHARDED_STATE_DICT",
    "sync_module_states": False,
}


class Model(nn.Module):
    """Learns a little at each step, so that the weights of all differ; it counts its batches in training."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Dropout(0.2), nn.Linear(4, 1))
        self.register_buffer("batches", torch.zeros(1))

    def forward(self, inputs, labels):
        self.batches += self.training
        outputs = self.layers(inputs)
        return {"loss": (outputs - labels).square().mean(), "logits": outputs}


def examples(number):
    random = torch.Generator().manual_seed(1)
    return [
        {"inputs": torch.randn(3, generator=random), "labels": torch.randn(1, generator=random)} for _ in range(number)
    ]


def shard_on_cpu(accelerator, plugin):
    """Accelerate leaves its FSDP plugin aside where there is no GPU, but it works."""
    accelerator.state.fsdp_plugin = plugin
    for state in (PartialState(), accelerator.state):  # the first is copied to the second again and again
        state.distributed_type = DistributedType.FSDP
        state.device = torch.device("cpu")  # Accelerate calls it cpu:0
