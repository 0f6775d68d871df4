"""Readies the test processes for the frameworks."""

from __future__ import annotations

import pytest

from tests.kit import pool

# The contract holds tests but has no name that pytest knows, so its asserts would be reported without their values.
pytest.register_assert_rewrite("tests.integrations.contract")

# The import of a framework takes each rank longer than the training of a test.
pool.preload(*(f"tests.integrations.faces.{name}" for name in ("accelerate", "ignite", "lightning", "transformers")))
