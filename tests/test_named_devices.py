"""What keepbest makes of its own names its device: the default one is the user's, and gloo and files need the CPU."""

from __future__ import annotations

import ast
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "src" / "keepbest"
MAKERS = {
    "arange",
    "as_tensor",
    "empty",
    "eye",
    "full",
    "linspace",
    "ones",
    "rand",
    "randint",
    "randn",
    "randperm",
    "scalar_tensor",
    "tensor",
    "zeros",
}


def makes_a_tensor(node: ast.AST) -> bool:
    """Whether this is a call of `torch.empty` and its like, which ask for the default device if they name none."""
    is_of_torch = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in MAKERS
    return is_of_torch and isinstance(node.func.value, ast.Name) and node.func.value.id == "torch"


def test_tensors_are_made_on_a_device_that_is_named():
    calls = {
        f"{path.relative_to(PACKAGE)}:{node.lineno}": {keyword.arg for keyword in node.keywords}
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if makes_a_tensor(node)
    }
    assert len(calls) > 20  # else they are no longer found
    assert [place for place, keywords in calls.items() if "device" not in keywords] == []
