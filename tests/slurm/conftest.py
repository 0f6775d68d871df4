from __future__ import annotations

import pytest

from tests.slurm.cluster import Cluster


@pytest.fixture(scope="session")
def cluster():
    with Cluster.start() as cluster:
        yield cluster


@pytest.fixture(scope="session")
def rounds(pytestconfig: pytest.Config) -> int:
    return pytestconfig.getoption("rounds")
