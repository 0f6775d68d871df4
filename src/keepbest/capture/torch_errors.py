"""Errors of torch's distributed checkpoints, which it raises on every rank."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch.distributed.checkpoint.api import CheckpointException

from keepbest.errors import RankFailedError, SnapshotError
from keepbest.modules.quiet import quiet
from keepbest.ranks import Ranks


@contextmanager
def one_error(step: str, ranks: Ranks, error_class: type[RankFailedError | SnapshotError]) -> Iterator[None]:
    """Turn what torch's checkpoints raise on every rank, which is not even an `Exception`, into an error of ours.

    Raises:
        KeepBestError: Of `error_class`, with the ranks and causes. As `Ranks.lose`, for what one rank raised alone.
    """
    try:
        with quiet():
            yield
    except CheckpointException as error:
        causes = "; ".join(f"rank {rank}: {cause[0]!r}" for rank, cause in sorted(error.failures.items()))
        raise error_class(f"could not {step}: {causes}") from error
    except BaseException as error:  # noqa: BLE001  # lose raises
        ranks.lose(step, error)
