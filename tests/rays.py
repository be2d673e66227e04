"""Two Ray nodes on this machine."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from ficpd.deployment.flower_cli import free_ports
from ficpd.federation import ray_actors, ray_engine

NO_WARNINGS = pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning", "ignore::DeprecationWarning:ray"
)
"""Ray leaves files open."""


@contextmanager
def two_nodes() -> Iterator[Any]:
    """A cluster whose nodes have room for one actor each; `RAY_ADDRESS` names it."""
    os.environ.update(ray_actors.QUIET)
    import ray
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    made.add_node(num_cpus=1)
    os.environ["RAY_ADDRESS"] = made.address
    try:
        yield made
    finally:
        del os.environ["RAY_ADDRESS"]
        ray_engine.close()
        ray.shutdown()
        made.shutdown()


@contextmanager
def client_server(address: str) -> Iterator[str]:
    """Ray's client server in front of a cluster; its `ray://` address."""
    (port,) = free_ports(1)
    where = ["--address", address, "--host", "127.0.0.1", "--port", str(port), "--mode", "legacy"]
    server = subprocess.Popen([sys.executable, "-m", "ray.util.client.server", *where])
    try:
        yield f"ray://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(30)
