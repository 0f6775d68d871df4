"""Silences warnings of torch that concern torch alone."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator


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
        yield
