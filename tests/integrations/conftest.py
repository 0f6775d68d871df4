"""Readies the test processes for the frameworks."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from tests.kit import pool

# The contract holds tests but has no name that pytest knows, so its asserts would be reported without their values.
pytest.register_assert_rewrite("tests.integrations.contract")

# The import of a framework takes each rank longer than the training of a test.
FACES = {
    "accelerate": "accelerate",
    "ignite": "ignite",
    "lightning": "pytorch_lightning",
    "transformers": "transformers",
    "noether": "noether",
}

pool.preload(*(f"tests.integrations.faces.{name}" for name, package in FACES.items() if find_spec(package)))
