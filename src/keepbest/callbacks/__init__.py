"""Callbacks of the trainer and their configs.

Other modules of keepbest import from the modules of this package, not from the package itself.
"""

from keepbest.callbacks.assemble import assemble_callbacks
from keepbest.callbacks.base import CallbackBase
from keepbest.callbacks.best_checkpoint import BestCheckpointCallback, BestCheckpointCallbackConfig
from keepbest.callbacks.checkpoint import CheckpointCallback, CheckpointCallbackConfig
from keepbest.callbacks.config import CallBackBaseConfig, Discriminated, RegisteredConfig
from keepbest.callbacks.data_iterator import PeriodicDataIteratorCallback, PeriodicDataIteratorCallbackConfig
from keepbest.callbacks.early_stop import MetricEarlyStopper, MetricEarlyStopperConfig
from keepbest.callbacks.offline_loss import OfflineLossCallback, OfflineLossCallbackConfig
from keepbest.callbacks.periodic import PeriodicCallback
from keepbest.callbacks.trainer_view import TrainerView

__all__ = [
    "BestCheckpointCallback",
    "BestCheckpointCallbackConfig",
    "CallBackBaseConfig",
    "CallbackBase",
    "CheckpointCallback",
    "CheckpointCallbackConfig",
    "Discriminated",
    "MetricEarlyStopper",
    "MetricEarlyStopperConfig",
    "OfflineLossCallback",
    "OfflineLossCallbackConfig",
    "PeriodicCallback",
    "PeriodicDataIteratorCallback",
    "PeriodicDataIteratorCallbackConfig",
    "RegisteredConfig",
    "TrainerView",
    "assemble_callbacks",
]
