"""Every exception that keepbest raises on purpose.

    KeepBestError
    ├── ConfigError (ValueError)           a setting, a name or a config that cannot be right
    ├── MetricError
    │   ├── MissingMetricError (KeyError)  a rank that needs the monitored metric does not have it
    │   ├── InvalidMetricError (ValueError)  not a number, bad weights, or NaN where that is refused
    │   └── MetricMismatchError            ranks hold different values and `identical` was asked for
    ├── IterationError (ValueError)        an iteration that goes back or names other parts
    ├── RanksError (RuntimeError)
    │   ├── RankFailedError                one or more ranks failed in a step; raised on every rank
    │   │   ├── StorageError               the same, where the file system refused
    │   │   └── RankLostError              contact with a rank was lost: its process has probably died
    │   ├── RankTimeoutError               ranks that did not arrive in time
    │   ├── DesyncError                    ranks that hold different states or run different steps
    │   └── PoisonedError                  an earlier failure left the ranks in different places
    ├── PreemptedError                     training was asked to stop, and what it needs to go on is durable
    ├── RunExistsError (FileExistsError)   the folder holds another run, or a live process owns it
    ├── LedgerError                        a ledger that is damaged or of another format
    └── SnapshotError                      a snapshot that is missing, damaged, or of another model

Each of them is built from one message, so that a rank can raise again what another rank reported.
"""

from __future__ import annotations


class KeepBestError(Exception):
    """Base of all errors of this library."""

    def __str__(self) -> str:
        # KeyError.__str__ would print the repr of the message, line breaks escaped.
        return str(self.args[0]) if self.args else ""


class ConfigError(KeepBestError, ValueError):
    """A setting that cannot be right, found before any work starts."""


class MetricError(KeepBestError):
    """The monitored metric cannot be used."""


class MissingMetricError(MetricError, KeyError):
    """The monitored metric is absent on a rank that needs it."""


class InvalidMetricError(MetricError, ValueError):
    """The monitored metric or its weight is not a usable number."""


class MetricMismatchError(MetricError):
    """Ranks hold different values although `metric_reduction="identical"` promises equal ones."""


class IterationError(KeepBestError, ValueError):
    """A training iteration that does not follow the one before it."""


class RanksError(KeepBestError, RuntimeError):
    """The ranks could not agree."""


class RankFailedError(RanksError):
    """At least one rank failed in a step that every rank takes part in."""


class StorageError(RankFailedError):
    """The file system refused something on a rank, usually a write of rank 0."""


class RankLostError(RankFailedError):
    """Contact with a rank was lost; raised on the ranks that were talking to it."""


class RankTimeoutError(RanksError):
    """At least one rank did not arrive at a step in time."""


class DesyncError(RanksError):
    """Ranks hold different states, or are not in the same step."""


class PoisonedError(RanksError):
    """An earlier failure left the ranks in different places; no collective may run any more."""


class PreemptedError(KeepBestError):
    """Training was asked to stop, by a signal to one of the ranks; all that is needed to go on later is durable."""


class RunExistsError(KeepBestError, FileExistsError):
    """The run folder belongs to another run, or to a process that is alive."""


class LedgerError(KeepBestError):
    """The ledger is damaged, or was written by a newer format."""


class SnapshotError(KeepBestError):
    """A snapshot is missing, damaged, or does not fit the model."""
