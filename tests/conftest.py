"""What all tests share; this file's folder on the path makes `small` (small federations) importable from below it."""

import pytest

import small
from ficpd.compute import Compute


@pytest.fixture
def model() -> Compute:
    return Compute(small.backbone())
