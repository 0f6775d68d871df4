"""Every exception that keepbest raises on purpose.

    KeepBestError
    ├── ConfigError (ValueError)           an invalid setting, name or config
    ├── MetricError
    │   ├── MissingMetricError (KeyError)  a rank that needs the monitored metric does not have it
    │   ├── InvalidMetricError (ValueError)  not a number, bad weights, or NaN where that is refused
    │   └── MetricMismatchError            ranks hold different values, which `identical` refuses
    ├── IterationError (ValueError)        an iteration that does not increase or names other parts
    ├── RanksError (RuntimeError)
    │   ├── RankFailedError                at least one rank failed in a step; raised on every rank
    │   │   ├── StorageError               the same, where the file system refused
    │   │   └── RankLostError              contact with a rank was lost: its process has probably died
    │   ├── RankTimeoutError               ranks that did not arrive in time
    │   ├── DesyncError                    ranks that hold different states or run different steps
    │   └── PoisonedError                  an earlier failure left the ranks in different places
    ├── PreemptedError                     a signal asked training to stop, and what a resume needs is durable
    ├── RunExistsError (FileExistsError)   the folder holds another run, or a live process owns it
    ├── LedgerError                        a ledger that is damaged or of another format
    └── SnapshotError                      a snapshot that is missing, damaged, or of another model

Each of them is built from one message, so that a rank can raise again what another rank reported.
"""

from __future__ import annotations

from typing import ClassVar

from keepbest.printable import printable, without_passwords


class KeepBestError(Exception):
    """Base of all errors of this library. Its text is fit for a terminal, also where it quotes a file or a URL."""

    _keep: ClassVar[str] = "\n\t"

    def __init__(self, *args: object) -> None:
        super().__init__(*(without_passwords(each) if isinstance(each, str) else each for each in args))

    def __str__(self) -> str:
        # KeyError.__str__ would print the repr of the message, line breaks escaped.
        return printable(str(self.args[0]), keep=self._keep) if self.args else ""


class ConfigError(KeepBestError, ValueError):
    """A setting is invalid. This is found before any work starts."""


class MetricError(KeepBestError):
    """The monitored metric cannot be used."""


class MissingMetricError(MetricError, KeyError):
    """The monitored metric is absent on a rank that needs it."""


class InvalidMetricError(MetricError, ValueError):
    """The monitored metric or its weight is not a usable number."""


class MetricMismatchError(MetricError):
    """Ranks hold different values although `metric_reduction="identical"` promises equal ones."""


class IterationError(KeepBestError, ValueError):
    """A training iteration does not follow the one before it."""


class RanksError(KeepBestError, RuntimeError):
    """The ranks could not agree."""


class RankFailedError(RanksError):
    """At least one rank failed in a step in which every rank takes part."""


class PartlyLoadedError(RankFailedError):
    """A file was lost or damaged while it was loaded: some parts of the model are those of the snapshot, others not."""


class StorageError(RankFailedError):
    """The file system refused an operation of a rank, usually a write of rank 0."""


class RankLostError(RankFailedError):
    """Contact with a rank was lost. The ranks that were exchanging data with it raise this."""


class RankTimeoutError(RanksError):
    """At least one rank did not arrive at a step in time."""


class DesyncError(RanksError):
    """Ranks hold different states, or are not in the same step."""


class PoisonedError(RanksError):
    """An earlier failure left the ranks in different places, so no collective may run any more."""


class PreemptedError(KeepBestError):
    """A signal to one of the ranks asked training to stop. Everything that a resume needs is durable."""


class RunExistsError(KeepBestError, FileExistsError):
    """The run folder belongs to another run, or to a process that is alive."""


class LedgerError(KeepBestError):
    """The ledger is damaged or lost, or was written by another version."""

    _keep = ""  # it quotes what anybody may have written, which must not look like a line of ours


class SnapshotError(KeepBestError):
    """A snapshot is missing, damaged, or does not fit the model."""

    _keep = ""  # as above
