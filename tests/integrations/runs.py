"""Runs of Lightning's trainer on real ranks; what they leave, as a user would read it."""

from __future__ import annotations

import logging
import os
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.strategies import FSDPStrategy, ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.utils.data import DataLoader, TensorDataset

from keepbest import load
from tests.kit.runs import refs

METRIC = "loss/val"
BEST = "best_model.loss.val"
UPDATES = 2  # in each epoch, on each rank


class Model(LightningModule):
    """Learns a little in each epoch, so that the weights of all differ; its validation loss is given.

    The ranks log values around the given one, of which it is the mean.
    """

    def __init__(self, values, *, sync=True, fails_at=None):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
        self.values, self.sync, self.fails_at = values, sync, fails_at

    def training_step(self, batch, batch_idx):
        if (self.current_epoch + 1, batch_idx) == (self.fails_at, 1):
            raise ZeroDivisionError
        return self.layers(batch[0]).square().mean()

    def validation_step(self, batch, batch_idx):
        offset = [0.0] if self.trainer.world_size == 1 else [-8.0, 8.0]
        self.log(
            METRIC,
            self.values[min(self.current_epoch, len(self.values) - 1)] + offset[self.global_rank],
            sync_dist=self.sync,
        )

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class ShardedModel(Model):
    def configure_model(self):
        if not isinstance(self.layers, torch.distributed.fsdp.FSDPModule):
            fully_shard(self.layers, mesh=self.device_mesh["data_parallel"])


class CPUFSDPStrategy(FSDPStrategy):
    """Lightning refuses its own class without a GPU, and lets FSDP1 look for one; the rest works without."""

    def _setup_model(self, model):
        return FullyShardedDataParallel(model, device_id=torch.device("cpu"), **self.kwargs)


class Peer(ModelCheckpoint):
    """Several that differ in `save_top_k` alone."""

    @property
    def state_key(self):
        return f"{super().state_key} {self.save_top_k}"


STRATEGIES = {
    "ddp": lambda: "ddp",
    "fsdp1": lambda: CPUFSDPStrategy(auto_wrap_policy={nn.Linear}, use_orig_params=True),
    "fsdp2": lambda: ModelParallelStrategy(
        data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=False
    ),
}


def fit(directory, values, callbacks, *, strategy="ddp", ckpt_path=None, **settings):
    """Trains for as many epochs as there are values, on the ranks of the default process group or alone."""
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    model_settings = {name: settings.pop(name) for name in ("sync", "fails_at") if name in settings}
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    if ranks > 1:
        # As torchrun would have told them; the process group is there already.
        os.environ |= {"LOCAL_RANK": str(dist.get_rank()), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    model = (ShardedModel if strategy == "fsdp2" else Model)(values, **model_settings)
    settings = {"max_epochs": len(values), "logger": False, "enable_progress_bar": False, **settings}
    trainer = Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy=STRATEGIES[strategy]() if ranks > 1 else "auto",
        default_root_dir=directory,
        callbacks=callbacks,
        enable_model_summary=False,
        **settings,
    )
    torch.manual_seed(1)
    data = TensorDataset(torch.randn(UPDATES * 4 * ranks, 3))  # which Lightning shuffles where there are several ranks
    batches = DataLoader(data, batch_size=4, shuffle=False)
    trainer.fit(model, batches, DataLoader(data, batch_size=4), ckpt_path=ckpt_path)
    return trainer


def kept(directory):
    """{ref: (iteration, value, weights)} of what keepbest kept, loaded by its own loader into a fresh model."""
    found = {}
    for ref in refs(Path(directory)):
        model = Model([])
        loaded = load(directory, ref, model)
        found[ref.removeprefix(BEST)] = (str(loaded.iteration), loaded.value, weights_of(model.state_dict()))
    return found


def weights_of_checkpoint(path):
    return weights_of(torch.load(path, weights_only=True)["state_dict"])


def weights_of(state_dict):
    """Comparable with `==`."""
    return {name: tensor.tolist() for name, tensor in state_dict.items()}
