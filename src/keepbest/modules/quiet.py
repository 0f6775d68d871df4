"""Silences what torch says of itself."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without torch's warnings about what it does itself, and about a single process, which is meant here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        # FSDP1 is deprecated, and so are the shards that it gives; there is no other way to them.
        warnings.filterwarnings("ignore", r"FSDP\.state_dict_type", FutureWarning)
        warnings.filterwarnings("ignore", "Please use DTensor instead", FutureWarning)
        warnings.filterwarnings("ignore", "`_get_pg_default_device` will be deprecated", UserWarning)
        warnings.filterwarnings("ignore", "Multiple backends are registered", UserWarning)
        warnings.filterwarnings("ignore", "TypedStorage is deprecated", UserWarning)
        yield


def use_up_warning_of_the_writer() -> None:
    """Have torch 2.10 warn now of what its writer does, which it does once in a process.

    Filters belong to all threads, so nothing can be silenced on the thread that writes.
    """
    if torch.__version__ < "2.11":
        with quiet():
            torch.empty(0, device="cpu").storage()  # type: ignore[no-untyped-call]  # torch gives it no types


@contextlib.contextmanager
def quiet_about_missing_shards() -> Iterator[None]:
    """Without a line of the log for each parameter in a unit of FSDP1 that is not to be loaded."""
    logger = logging.getLogger("torch.distributed.fsdp._state_dict_utils")

    def is_other(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("Did not find param")

    logger.addFilter(is_other)
    try:
        yield
    finally:
        logger.removeFilter(is_other)
