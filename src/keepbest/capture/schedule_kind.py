"""What kind of schedule of the learning rate one is, so that the state of another is not loaded. **Rank-local**."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.optim.lr_scheduler import LRScheduler

_INSIDE = "_schedulers"  # of those that combine others, in their state dicts too
_OF_GROUPS = "base_lrs"


def kind_of_schedule(thing: object) -> str | None:
    """The name of the class of a schedule, as for optimizers, with those that it combines; `None` for all else."""
    schedule = _unwrapped(thing)
    if not isinstance(schedule, LRScheduler):
        return None
    kind = type(schedule)
    name = next((each.__name__ for each in kind.__mro__ if _is_of_torch(each)), kind.__name__)
    combined = vars(schedule).get(_INSIDE)
    if not isinstance(combined, list | tuple):  # a class of the user's own may use the name for something else
        return name
    inside = [kind_of_schedule(each) or type(each).__name__ for each in combined]
    return f"{name}({', '.join(inside)})" if inside else name


def fault_of_schedule(thing: object, kind: object, state: object) -> str | None:
    """Why a schedule cannot continue from what was saved.

    Args:
        thing: Schedule that is to load it, or another object, which takes anything.
        kind: What `kind_of_schedule` gave for the one that was saved; `None` where that was not recorded.
        state: State that was saved.
    """
    schedule = _unwrapped(thing)
    if not isinstance(schedule, LRScheduler):
        return None
    here = kind_of_schedule(schedule)
    if kind is not None and kind != here:
        return f"it was saved from {kind!r}, and is to be loaded into {here!r}. Make a schedule of the saved kind"
    return _fault_of_numbers(schedule.state_dict(), state)


def _fault_of_numbers(here: Mapping[str, Any], state: object) -> str | None:
    if not isinstance(state, Mapping):
        return None
    for key, what in ((_INSIDE, "its schedules"), (_OF_GROUPS, "its groups of parameters")):
        saved, own = state.get(key), here.get(key)
        if isinstance(saved, list | tuple) and isinstance(own, list | tuple) and len(saved) != len(own):
            return f"the number of {what} is {len(own)}, and was {len(saved)} when it was saved. Make it of as many"
    return None


def _unwrapped(thing: object) -> object:
    """What is inside of a wrapper such as that of Accelerate."""
    inside = getattr(thing, "scheduler", None)
    return inside if isinstance(inside, LRScheduler) and not isinstance(thing, LRScheduler) else thing


def _is_of_torch(kind: type) -> bool:
    is_schedule = kind is not LRScheduler and issubclass(kind, LRScheduler)
    return is_schedule and kind.__module__ == "torch.optim.lr_scheduler" and not kind.__name__.startswith("_")
