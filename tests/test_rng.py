"""Seeds are data: derived from names, equal on every machine, and no global random state is touched."""

import pickle
import random

import numpy as np
import pytest
import torch

import small
from ficpd import rng


def test_a_seed_is_the_same_on_every_machine():
    assert rng.derive_seed(7, "batches", "site-3", 2) == 820554559390153358
    assert min(rng.derive_seed(i) for i in range(200)) >= 0
    assert max(rng.derive_seed(i) for i in range(200)) < 2**63


def test_names_of_other_kinds_orders_and_cuts_give_other_seeds():
    names = [(1,), ("1",), (1.0,), (True,), (1, 1), (11,), ("1", 1), (1, "1"), ("a", "bc"), ("ab", "c"), ("abc",), ()]
    assert len({rng.derive_seed(*name) for name in names}) == len(names)


def test_equal_names_give_equal_streams_and_others_do_not():
    def draw(*names: object) -> list[float]:
        return torch.rand(5, generator=rng.make_generator(*names)).tolist()

    assert draw("noise", 3) == draw("noise", 3)
    assert draw("noise", 3) != draw("noise", 4)
    assert draw("noise", 3) != draw("cohort", 3)


def test_a_generator_is_ones_own():
    first, second = rng.make_generator("a"), rng.make_generator("a")
    torch.rand(3, generator=first)
    assert torch.rand(1, generator=second) == torch.rand(1, generator=rng.make_generator("a"))


def states() -> dict[str, bytes]:
    found = {"torch": torch.random.get_rng_state(), "numpy": np.random.get_state(), "random": random.getstate()}
    return {name: pickle.dumps(state.tolist() if name == "torch" else state) for name, state in found.items()}


@pytest.mark.parametrize("method", ["fedavg", "ficpd", "local"])
def test_a_whole_run_touches_no_global_random_state(tmp_path, method):
    before = states()
    small.run(tmp_path, method, seed=3)
    after = states()
    assert [name for name in before if before[name] != after[name]] == []


def test_a_run_does_not_depend_on_the_global_random_state(tmp_path):
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed), np.random.seed(seed), random.seed(seed)
        small.run(tmp_path / str(seed), "ficpd")
        found.append(small.library(tmp_path / str(seed)))
    assert small.same(*found)
