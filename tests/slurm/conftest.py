"""One cluster for all tests of this folder."""

from __future__ import annotations

import os

import pytest
from cluster import Cluster, missing


@pytest.fixture(scope="session")
def cluster():
    """Two nodes. Without SLURM on the machine: skips, or fails where ANONFW_SLURM=required (`make test-slurm`)."""
    if absent := missing():
        say = f"{', '.join(absent)} not found: apt-get install slurm-wlm munge"
        (pytest.fail if os.environ.get("ANONFW_SLURM") == "required" else pytest.skip)(say)
    with Cluster() as made:
        yield made
