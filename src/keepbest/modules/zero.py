"""Models that DeepSpeed trains, and the parameters that its ZeRO-3 has divided among the ranks.

If nothing has imported DeepSpeed, no such model can exist.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

from torch import nn

from keepbest.errors import KeepBestError, PoisonedError, RankLostError, RankTimeoutError

_ALONE = (PoisonedError, RankLostError, RankTimeoutError)  # what need not be raised on every rank


def is_deepspeed_engine(module: object) -> bool:
    """Whether `module` is what `deepspeed.initialize` made of another one."""
    engine = sys.modules.get("deepspeed.runtime.engine")
    return engine is not None and isinstance(module, engine.DeepSpeedEngine)


@contextlib.contextmanager
def whole_parameters(model: nn.Module, *, writes: bool = False) -> Iterator[None]:
    """In the block, each rank holds all of each parameter that ZeRO-3 has divided. **Collective** if there are any.

    So they need room for the whole model. An error that the ranks agree on leaves it as it was before the block. After
    another one the model cannot train any more.

    Args:
        model: Any model, in any wrapper.
        writes: Whether the block writes into the parameters. Those of rank 0 count then, and the optimizer of an engine
            takes them up, since ZeRO has another copy of what it trains.
    """
    zero = sys.modules.get("deepspeed.runtime.zero.partition_parameters")
    divided = [] if zero is None else [each for each in model.parameters() if zero.is_zero_param(each)]
    if zero is None or not divided:
        yield
    else:
        with contextlib.ExitStack() as stack:
            stack.enter_context(zero.GatheredParameters(divided, modifier_rank=0 if writes else None))
            try:
                yield
            except BaseException as error:
                # The end of the gathering is collective, and the other ranks may never come there.
                if isinstance(error, _ALONE) or not isinstance(error, KeepBestError):
                    stack.pop_all()
                raise
    optimizer: Any = model.optimizer if writes and is_deepspeed_engine(model) else None
    if hasattr(optimizer, "refresh_fp32_params"):
        optimizer.refresh_fp32_params()
