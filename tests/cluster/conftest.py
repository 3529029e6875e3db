"""A Slurm cluster for the tests of this folder, which are skipped where none can run."""

from __future__ import annotations

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.cluster.cluster import Cluster, missing
from tests.cluster.product import Project, Run
from tests.cluster.scenarios import FAILED, INTERRUPTED, LONG, Outcome

CHECKOUT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def cluster():
    """Eight nodes with two fake GPUs each."""
    reason = missing()
    if reason is not None:
        pytest.skip(f"no Slurm cluster here: {reason}")
    with Cluster(nodes=8) as cluster:
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


@pytest.fixture(scope="session")
def project(cluster, job_environment, data_set, tmp_path_factory) -> Project:
    """`bd3` on the cluster's login node, with a data set and a folder for its runs."""
    return Project(cluster, data_set, tmp_path_factory.mktemp("runs"), job_environment)


@pytest.fixture(scope="session")
def undisturbed(project) -> dict[int, Run]:
    """What the long run is where nothing happens to it, by number of ranks."""
    return {ranks: project.torchrun(f"undisturbed{ranks}", ranks, recipe=LONG) for ranks in (1, 2)}


@pytest.fixture(scope="session")
def outcomes(project) -> dict[str, Outcome]:
    """What became of all runs of the scenarios, by name."""
    scenarios = [*INTERRUPTED, *FAILED]
    with ThreadPoolExecutor(len(scenarios)) as pool:
        started = {scenario.__name__: pool.submit(scenario, project) for scenario in scenarios}
    return {name: future.result() for name, future in started.items()}
