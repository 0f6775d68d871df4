"""Keep the best checkpoints of a distributed PyTorch run."""

from keepbest.average import average
from keepbest.capture.per_rank import PerRank
from keepbest.decision import Outcome
from keepbest.errors import KeepBestError
from keepbest.iteration import TrainingIteration
from keepbest.keeper import BestKeeper
from keepbest.load import LoadedSnapshot, load
from keepbest.metric_properties import MetricPropertyProvider
from keepbest.new_best import EveryRank
from keepbest.random_state import RandomState
from keepbest.reading.run import open_run
from keepbest.saving.open_run import abandon

__all__ = [
    "BestKeeper",
    "EveryRank",
    "KeepBestError",
    "LoadedSnapshot",
    "MetricPropertyProvider",
    "Outcome",
    "PerRank",
    "RandomState",
    "TrainingIteration",
    "abandon",
    "average",
    "load",
    "open_run",
]

__version__ = "0.1.0"
