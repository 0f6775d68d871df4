"""What is done where a device has no memory. **Rank-local**."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")


def unless_full(work: Callable[[], T], otherwise: Callable[[], T]) -> T:
    """What `work` returns. If a device has no memory for it, what `otherwise` returns.

    CUDA itself takes memory too, as for the code of a kernel that is used for the first time.
    """
    try:
        return work()
    except torch.OutOfMemoryError:
        pass
    except torch.AcceleratorError as error:
        if "out of memory" not in str(error):  # torch has no class of its own for a lack of memory in CUDA
            raise
    # Not while the error is handled, since it keeps alive what had been allocated.
    return otherwise()
