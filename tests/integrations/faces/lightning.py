"""PyTorch Lightning: its ModelCheckpoint and EarlyStopping are the oracle."""

from __future__ import annotations

import logging
import warnings
from typing import ClassVar

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from pytorch_lightning.strategies import FSDPStrategy, ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.utils.data import DataLoader, TensorDataset

from keepbest.integrations.lightning import BestCheckpoint
from tests.integrations.faces import face

METRIC = "loss/val"


class Model(LightningModule):
    """Learns a little in each epoch, so that the weights of all differ; the mean of its metric over ranks is given."""

    def __init__(self, values=(), *, sync=True, fails_at=None):
        super().__init__()
        self.layers = face.network()
        self.values, self.sync, self.fails_at = values, sync, fails_at

    def training_step(self, batch, batch_idx):
        if (self.current_epoch + 1, batch_idx) == (self.fails_at, 1):
            raise ZeroDivisionError
        return self.layers(batch[0]).square().mean()

    def validation_step(self, batch, batch_idx):
        value = self.values[min(self.current_epoch, len(self.values) - 1)]
        self.log(METRIC, face.given(value), sync_dist=self.sync)

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

    def __init__(self, root, save_top_k):
        super().__init__(root / str(save_top_k), monitor=METRIC, save_top_k=save_top_k, filename="{epoch}")

    @property
    def state_key(self):
        return f"{super().state_key} {self.save_top_k}"

    def ours(self, framework):
        """[(value, weights)], best first."""
        found = sorted((value.item(), path) for path, value in self.best_k_models.items())
        return [(value, framework.weights_of_checkpoint(path)) for value, path in found]


class Recorder(Callback):
    """The whole weights of FSDP1 at the end of each validation."""

    def __init__(self):
        self.weights = []

    def on_validation_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            self.weights.append(face.whole_weights(trainer.model))


STRATEGIES = {
    "ddp": lambda: "ddp",
    "fsdp1": lambda: CPUFSDPStrategy(auto_wrap_policy={nn.Linear}, use_orig_params=True),
    "fsdp2": lambda: ModelParallelStrategy(
        data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=False
    ),
}


def fit(directory, values, callbacks, *, strategy="ddp", ckpt_path=None, model=None, sets=1, **settings):
    """Trains for as many epochs as there are values, on the ranks of the default process group or alone."""
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    model_settings = {name: settings.pop(name) for name in ("sync", "fails_at") if name in settings}
    ranks = face.use_ranks()
    model = (model or (ShardedModel if strategy == "fsdp2" else Model))(values, **model_settings)
    settings = {"max_epochs": len(values), "logger": False, "enable_progress_bar": False, **settings}
    if not any(isinstance(callback, ModelCheckpoint) for callback in callbacks):
        settings.setdefault("enable_checkpointing", False)
    trainer = Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy=STRATEGIES[strategy]() if ranks > 1 else "ddp_fork" if strategy == "fork" else "auto",
        default_root_dir=directory,
        callbacks=callbacks,
        enable_model_summary=False,
        **settings,
    )
    torch.manual_seed(1)
    data = TensorDataset(torch.randn(8 * ranks, 3))  # which Lightning shuffles where there are several ranks
    batches = DataLoader(data, batch_size=4, shuffle=False)
    validated = [DataLoader(data, batch_size=4) for _ in range(sets)]
    trainer.fit(model, batches, validated if sets > 1 else validated[0], ckpt_path=ckpt_path)
    return trainer


class Lightning(face.Face):
    """`framework` may have settings of its `checkpoint` and of its `trainer`."""

    ref = "best_model.loss.val"
    strategies = ("alone", "ddp", "fsdp1", "fsdp2")
    resumed_by = r"fit\(ckpt_path=...\), or resume='ledger' of BestCheckpoint"
    missing = "'accuracy' was not logged by the end of validation; logged: loss/val"
    updates = 2
    resumes: ClassVar = {
        "saved-at-the-end": {"ends_at": [3], "framework": {"checkpoint": {"save_top_k": 0}}},
        "saved-after-validation": {"ends_at": [5], "framework": {"checkpoint": {"save_on_train_epoch_end": False}}},
        "saved-after-the-epoch": {"ends_at": [3], "framework": {"checkpoint": {"save_on_train_epoch_end": True}}},
        "fsdp2": {"fails_at": [5], "strategy": "fsdp2"},
    }

    def model(self):
        return Model()

    def iteration(self, step):
        return f"{super().iteration(step)}_B{self.updates * step}"

    def construct(self, root, **settings):
        return BestCheckpoint(**{"metric_key": METRIC, **settings})

    def run(self, training, keepers):
        settings = {"checkpoint": {}, "trainer": {}, **training.framework}
        saves = {"filename": "any", "save_last": True, "every_n_epochs": training.save_every, **settings["checkpoint"]}
        folder = training.root / "last"
        callbacks = [] if training.save_every is None else [ModelCheckpoint(folder, **saves)]
        adapters = [self.construct(training.root, **each) for each in keepers]
        arguments = {"strategy": training.strategy, "ckpt_path": training.resume_from, "fails_at": training.fails_at}
        with face.failing(training.fails_at):
            fit(training.root, training.values, [*adapters, *callbacks], **arguments, **settings["trainer"])
        return face.Trained([adapter.keeper.state for adapter in adapters], folder / "last.ckpt")

    def compare(self, root, strategy, **settings):
        if strategy != "fsdp1":
            adapter, one, three = self.construct(root, **settings), Peer(root, 1), Peer(root, 3)
            fit(root, face.VALUES, [one, three, adapter], strategy=strategy)
            return face.Compared(adapter.keeper.state, three.ours(self), *one.ours(self))
        # There is no ModelCheckpoint: where there is no GPU, torch crashes when Lightning reads the weights.
        adapter, recorder = self.construct(root, model_names=["layers"], **settings), Recorder()
        fit(root, face.VALUES, [recorder, adapter], strategy=strategy)
        return face.Compared(adapter.keeper.state, face.best_three(lambda step: recorder.weights[step - 1]))

    def stop_early(self, root, values, patience, **settings):
        only = Peer(root, 1)
        adapters = [self.construct(root, **settings)] if settings else []
        trainer = fit(root, values, [*adapters, only, EarlyStopping(METRIC, patience=patience)])
        return trainer.current_epoch, *only.ours(self)[0]

    def weights_of_checkpoint(self, path):
        return face.weights_of(torch.load(path, weights_only=True)["state_dict"])
