"""What the slow tests of a deployment share: one SuperLink."""

from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture(scope="session")
def coordinator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """`superlink.Coordinator`, running."""
    pytest.importorskip("flwr")
    from superlink import coordinating

    with coordinating(tmp_path_factory.mktemp("coordinator")) as started:
        yield started
