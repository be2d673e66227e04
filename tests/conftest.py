"""What all tests share: `small` (small federations) is importable, and nothing is written outside the test's folder."""

import pytest
import small

from ficpd.compute import Compute


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("FICPD_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def model() -> Compute:
    return Compute(small.backbone())
