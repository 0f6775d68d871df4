"""What pydantic finds wrong with settings, in the words that every face of keepbest uses."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable

from pydantic import ValidationError

Place = tuple[int | str, ...]

# What other libraries call a setting that keepbest has too.
_NAMES_ELSEWHERE = {
    "mode": "higher_is_better",
    "greater_is_better": "higher_is_better",
    "patience": "tolerances",
    "early_stopping_patience": "tolerances",
    "threshold": "min_delta",
    "early_stopping_threshold": "min_delta",
    "monitor": "metric_key",
    "metric_for_best_model": "metric_key",
    "save_top_k": "keep_top_k",
    "save_total_limit": "keep_top_k",
    "n_saved": "keep_top_k",
    "dirpath": "directory",
    "dirname": "directory",
    "output_dir": "directory",
}


# What pydantic calls by the name of a type of Python.
_IN_YAML = {
    "dict_type": "a mapping",
    "list_type": "a list",
    "path_type": "a path",
    "tuple_type": "a list",
}
_KEY = "[key]"  # what pydantic adds to the place of a key that is wrong itself


def describe(error: ValidationError, known: Callable[[Place], Iterable[str]], at: Place = ()) -> list[str]:
    """One line for each finding: the setting, what was expected, and what was found. **Rank-local**.

    Args:
        error: The findings.
        known: Function that returns the names of the settings that there are at a place.
        at: Place that the findings are relative to.
    """
    lines: list[str] = []
    for each in error.errors(include_url=False):
        place = (*at, *each["loc"])
        where = ".".join(map(str, place))
        cause = each.get("ctx", {}).get("error")
        expected = each["msg"]
        if isinstance(cause, ValidationError):
            lines += describe(cause, known, place)
        elif cause is not None:
            lines.append(f"{where}: {cause}" if where else str(cause))
        elif each["type"] == "extra_forbidden":
            parent = ".".join(map(str, place[:-1]))
            text = _unknown(str(place[-1]), list(known(place[:-1])))
            lines.append(f"{parent}: {text}" if parent else text)
        elif place[-1:] == (_KEY,) or each["type"] == "invalid_key":
            parent = ".".join(map(str, place[:-2] if place[-1] == _KEY else place[:-1]))
            text = f"a key must be a text, found {each['input']!r}; put it in quotes"
            lines.append(f"{parent}: {text}" if parent else text)
        elif each["type"] == "missing":
            lines.append(f"{where} is required")
        elif each["type"] == "model_type":
            holds = "with a kind" if each["ctx"]["class_name"] == "Component" else "of settings"
            lines.append(f"{where} must be a mapping {holds}, found {each['input']!r}")
        elif (kind := _IN_YAML.get(each["type"])) is not None:
            lines.append(f"{where} must be {kind}, found {each['input']!r}")
        elif expected.startswith("Input should be "):
            lines.append(f"{where} must be {expected.removeprefix('Input should be ')}, found {each['input']!r}")
        else:
            lines.append(f"{where}: {expected}, found {each['input']!r}")
    return lines


def _unknown(name: str, known: list[str]) -> str:
    elsewhere = _NAMES_ELSEWHERE.get(name)
    if elsewhere == "tolerances" and elsewhere not in known:
        elsewhere = "tolerance"  # of a callback that has one
    near = [elsewhere] if elsewhere in known else difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    return f"there is no setting {name!r}{hint} The settings are: {', '.join(known) or 'none'}"
