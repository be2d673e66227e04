"""Flower's own simulation runs the same app over the same sockets, and leaves the same library."""

from importlib.util import find_spec

import pytest

import flower_simulation
import small
from ficpd.experiments.results import RunResult
from ficpd.experiments.runner import run
from ficpd.library.library import PromptLibrary


@pytest.mark.slow
@pytest.mark.skipif(find_spec("ray") is None, reason="Flower's simulation needs ray: pip install 'flwr[simulation]'")
@pytest.mark.parametrize("method", ["fedavg", "ficpd", "fpl"])
def test_flowers_simulation_leaves_the_in_process_library(tmp_path, method):
    experiment = small.experiment(tmp_path, method, 'privacy.name="record_gaussian"', "privacy.epsilon=4.0")
    run(experiment, tmp_path / "run")
    result = flower_simulation.run(experiment, tmp_path / "flower", resume=False)
    assert (result.num_rounds, result.dropped_updates) == (3, 0)
    found = PromptLibrary.load(tmp_path / "flower").candidates()
    assert all(small.close(found[name].vectors_PD, vectors, 1e-4) for name, vectors in small.library(tmp_path).items())
    known = RunResult.load(tmp_path / "run").bytes
    assert (result.bytes.up_total, result.bytes.down_total) == (known.up_total, known.down_total)
