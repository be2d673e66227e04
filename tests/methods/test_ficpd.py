"""The server's half of FICPD on made-up updates: what moves a prototype, and what does not."""

import pytest
import torch
from pydantic import ValidationError

import small
from ficpd.methods import ficpd
from ficpd.tuners import Training
from ficpd.types import ClientCard, ClientUpdate, Prompt, Setup, State

NORTH, EAST = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
NAMES = ("a", "b", "c", "d")
SPACES = ("delta", "metadata")


def method(**config) -> ficpd.Ficpd:
    return ficpd.build(ficpd.Config(num_prototypes=2, **config), Training(learning_rate=0.1))


def begun(of: ficpd.Ficpd) -> State:
    """Two clients went north in the first round, two went east."""
    cards = [ClientCard(name, {"group": "north" if name in "ab" else "east"}) for name in NAMES]
    state = of.init(Setup(Prompt(torch.zeros(1, 2), "none"), cards, 5, 4, 0))
    return after(of, state, 1, a=NORTH, b=NORTH, c=EAST, d=EAST)


def after(of: ficpd.Ficpd, state: State, round: int, **deltas: torch.Tensor) -> State:
    updates = [ClientUpdate(name, {"delta": delta}) for name, delta in sorted(deltas.items())]
    return of.aggregate(state, updates, round, None)  # type: ignore[arg-type]  # these spaces ask the model nothing


def prompt_of(of: ficpd.Ficpd, state: State, name: str) -> torch.Tensor:
    return of.assign(state, ClientCard(name), 2).arrays["prompt"]


@pytest.mark.parametrize("space", SPACES)
def test_each_goes_on_from_what_its_own_kind_learned(space):
    of = method(space=space)
    state = begun(of)
    for name in NAMES:
        assert small.close(prompt_of(of, state, name), NORTH if name in "ab" else EAST)
    assert small.close(of.prompt(state), (NORTH + EAST) / 2)


@pytest.mark.parametrize("space", SPACES)
def test_a_prototype_is_moved_by_those_who_came_and_by_nobody_else(space):
    """b stays away: where it stood in the first round must not hold a back."""
    of = method(space=space)
    state = after(of, begun(of), 2, a=2 * NORTH)
    assert small.close(prompt_of(of, state, "b"), 3 * NORTH)
    assert small.close(prompt_of(of, state, "c"), EAST)


def test_where_clusters_are_drawn_anew_everybody_counts_as_last_heard():
    of = method(redraw_every=1, shrinkage=0.0)
    state = after(of, begun(of), 2, a=2 * NORTH)
    stood = {
        "a": 3 * NORTH,
        "b": NORTH,
    }  # off the global prompt of their round, (N + E) / 2, and of this one, (5 N + E) / 2
    now, then = of.prompt(state), (NORTH + EAST) / 2
    assert small.close(prompt_of(of, state, "b"), now + ((stood["a"] - now) + (stood["b"] - then)) / 2)


def test_a_small_cluster_is_drawn_back_by_the_noise_that_is_known():
    of = method()
    state = begun(of)
    noisy = State(state.arrays, {**state.facts, "noise": 0.5})
    alone, together = after(of, noisy, 2, a=NORTH), after(of, noisy, 2, a=NORTH, b=NORTH)
    for state, came in ((alone, 1), (together, 2)):
        offset = 2 * NORTH - of.prompt(state)
        drawn = 0.5 / came / float(offset.square().sum())
        assert small.close(prompt_of(of, state, "a"), of.prompt(state) + (1 - drawn) * offset)


def of_five(of: ficpd.Ficpd, ways: torch.Tensor, noise: float | None = 0.0) -> State:
    """After one round of four clients of one group and a fifth of another."""
    cards = [ClientCard(name, {"group": "east" if name == "e" else "north"}) for name in "abcde"]
    start = of.init(Setup(Prompt(torch.zeros(1, 5), "none"), cards, 5, 5, 0))
    return after(of, State(start.arrays, {**start.facts, "noise": noise}), 1, **dict(zip("abcde", ways, strict=True)))


def farther(**config) -> ficpd.Ficpd:
    return method(space="metadata", server={"kind": "extrapolated"}, **config)


WAYS, NORTHERN, EVERYBODY = torch.eye(5)[:, None], torch.tensor([[0.25] * 4 + [0.0]]), torch.full((1, 5), 0.2)


def test_a_prototype_goes_farther_where_its_clients_disagree_and_the_global_prompt_with_it():
    """Four at right angles to one another (twice their mean), one alone (as it went)."""
    of = farther(shrinkage=0.0)
    state = of_five(of, WAYS)
    assert small.close(prompt_of(of, state, "a"), 2 * NORTHERN)
    assert small.close(prompt_of(of, state, "e"), WAYS[4])
    assert small.close(of.prompt(state), 0.8 * 2 * NORTHERN + 0.2 * WAYS[4])
    plain = method(space="metadata", shrinkage=0.0)
    assert small.close(prompt_of(plain, of_five(plain, WAYS), "a"), NORTHERN)
    assert small.close(of.prompt(of_five(of, WAYS, noise=None)), EVERYBODY)


@pytest.mark.parametrize(("shrinkage", "share"), [(0.2, 0.25), (0.5, 1.0), (1.0, 1.0)])
def test_the_global_prompt_goes_by_itself_as_far_as_prototypes_follow_it(shrinkage, share):
    of = farther(shrinkage=shrinkage)
    with_them = 0.8 * 2 * NORTHERN + 0.2 * WAYS[4]
    assert small.close(of.prompt(of_five(of, WAYS)), with_them + share * (2.5 * EVERYBODY - with_them))


def test_extrapolation_is_refused_with_rules_that_leave_out_updates():
    with pytest.raises(ValidationError, match="norm_bound"):
        method(server={"kind": "extrapolated"}, robust={"rule": "trimmed_mean"})
