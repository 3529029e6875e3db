"""A Slurm cluster for the tests of this folder, which are skipped where none can run."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from tests.cluster.cluster import Cluster, missing

CHECKOUT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def cluster():
    """Four nodes with two fake GPUs each."""
    reason = missing()
    if reason is not None:
        pytest.skip(f"no Slurm cluster here: {reason}")
    with Cluster() as cluster:
        yield cluster


@pytest.fixture(autouse=True)
def tidied(request):
    """After each test that uses the cluster: no jobs, and all nodes idle."""
    yield
    if "cluster" in request.fixturenames:
        request.getfixturevalue("cluster").tidy()


@pytest.fixture(scope="session")
def job_environment() -> dict[str, str]:
    """Variables with which jobs find this checkout, ``bd3``, ``python`` and the changes of ``site/``."""
    scripts = Path(sys.executable).parent
    return {
        "PATH": f"{scripts}:{os.environ['PATH']}",
        "PYTHONPATH": f"{Path(__file__).parent / 'site'}:{CHECKOUT}",
        "OMP_NUM_THREADS": "1",
        "BD3_TEST_EAGER": "1",
    }
