"""A real SLURM of two nodes: one for all tests of a session, emptied after each."""

from collections.abc import Iterator

import pytest

from tests.system.slurm.cluster import SlurmCluster, missing_programs


@pytest.fixture(scope="session")
def slurm_cluster() -> Iterator[SlurmCluster]:
    """The cluster; a test asks for `slurm` instead."""
    if missing := missing_programs():
        pytest.skip(f"{', '.join(missing)} not found: tests/system/slurm/install.sh")
    with SlurmCluster() as cluster:
        yield cluster


@pytest.fixture
def slurm(slurm_cluster: SlurmCluster) -> Iterator[SlurmCluster]:
    """The cluster with both nodes idle; whatever the test leaves in it is cancelled."""
    yield slurm_cluster
    slurm_cluster.cancel_all()
