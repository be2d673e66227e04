"""Sites that are closed when a test ends, and a small world with noise."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from ficpd.deployment.site.site import Site
from ficpd.experiments.build import ExperimentContext
from site_of import NOISED, context, site


@pytest.fixture
def opened() -> Iterator[Callable[..., Site]]:
    with ExitStack() as stack:
        yield lambda *given, **more: stack.enter_context(closing(site(*given, **more)))


@pytest.fixture
def noised(tmp_path: Path) -> ExperimentContext:
    return context(tmp_path, "fedavg", *NOISED)
