"""The server's half of FICPD on made-up updates: what moves a prototype, and what does not."""

import json

import pytest
import torch
from pydantic import ValidationError

import small
from ficpd.experiments.runner import run as run_experiment
from ficpd.federation import simulation
from ficpd.federation.rounds import RoundSchedule
from ficpd.library.library import PromptLibrary
from ficpd.methods import ficpd
from ficpd.optimizers import LocalTrainingConfig
from ficpd.types import ClientCard, ClientUpdate, FederationInfo, Prompt, State

NORTH, EAST = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
NAMES = ("a", "b", "c", "d")
SPACES = ("delta", "metadata")


def method(**config) -> ficpd.Ficpd:
    return ficpd.build(ficpd.Config(num_prototypes=2, **config), LocalTrainingConfig(learning_rate=0.1))


def begun(of: ficpd.Ficpd) -> State:
    """Two clients went north in the first round, two went east."""
    cards = [ClientCard(name, {"group": "north" if name in "ab" else "east"}) for name in NAMES]
    state = of.init(FederationInfo(Prompt(torch.zeros(1, 2), "none"), cards, 5, 4, 0))
    return after(of, state, 1, a=NORTH, b=NORTH, c=EAST, d=EAST)


def after(of: ficpd.Ficpd, state: State, round: int, **deltas: torch.Tensor) -> State:
    updates = [ClientUpdate(name, {"delta": delta}) for name, delta in sorted(deltas.items())]
    return of.aggregate(state, updates, round, None)  # type: ignore[arg-type]  # these spaces ask the model nothing


def prompt_of(of: ficpd.Ficpd, state: State, name: str) -> torch.Tensor:
    return of.make_assignment(state, ClientCard(name), 2).arrays["prompt"]


@pytest.mark.parametrize("space", SPACES)
def test_each_goes_on_from_what_its_own_kind_learned(space):
    of = method(space=space)
    state = begun(of)
    for name in NAMES:
        assert small.close(prompt_of(of, state, name), NORTH if name in "ab" else EAST)
    assert small.close(of.global_prompt(state), (NORTH + EAST) / 2)


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
    # off the global prompt of their round, (N + E) / 2, and of this one, (5 N + E) / 2
    stood = {"a": 3 * NORTH, "b": NORTH}
    now, then = of.global_prompt(state), (NORTH + EAST) / 2
    assert small.close(prompt_of(of, state, "b"), now + ((stood["a"] - now) + (stood["b"] - then)) / 2)


def test_a_small_cluster_is_drawn_back_by_the_noise_that_is_known():
    of = method()
    state = begun(of)
    noisy = State(state.arrays, {**state.facts, "noise": 0.5})
    alone, together = after(of, noisy, 2, a=NORTH), after(of, noisy, 2, a=NORTH, b=NORTH)
    for state, came in ((alone, 1), (together, 2)):
        offset = 2 * NORTH - of.global_prompt(state)
        drawn = 0.5 / came / float(offset.square().sum())
        assert small.close(prompt_of(of, state, "a"), of.global_prompt(state) + (1 - drawn) * offset)


def of_five(of: ficpd.Ficpd, ways: torch.Tensor, noise: float | None = 0.0) -> State:
    """After one round of four clients of one group and a fifth of another."""
    cards = [ClientCard(name, {"group": "east" if name == "e" else "north"}) for name in "abcde"]
    start = of.init(FederationInfo(Prompt(torch.zeros(1, 5), "none"), cards, 5, 5, 0))
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
    assert small.close(of.global_prompt(state), 0.8 * 2 * NORTHERN + 0.2 * WAYS[4])
    plain = method(space="metadata", shrinkage=0.0)
    assert small.close(prompt_of(plain, of_five(plain, WAYS), "a"), NORTHERN)
    assert small.close(of.global_prompt(of_five(of, WAYS, noise=None)), EVERYBODY)


@pytest.mark.parametrize(("shrinkage", "share"), [(0.2, 0.25), (0.5, 1.0), (1.0, 1.0)])
def test_the_global_prompt_goes_by_itself_as_far_as_prototypes_follow_it(shrinkage, share):
    of = farther(shrinkage=shrinkage)
    with_them = 0.8 * 2 * NORTHERN + 0.2 * WAYS[4]
    assert small.close(of.global_prompt(of_five(of, WAYS)), with_them + share * (2.5 * EVERYBODY - with_them))


def test_extrapolation_is_refused_with_rules_that_leave_out_updates():
    with pytest.raises(ValidationError, match="norm_bound"):
        method(server={"kind": "extrapolated"}, robust={"rule": "trimmed_mean"})


def wandering(stay: float) -> set[int]:
    """The prototypes that a client between two groups has had, which itself never moves again, while four others of
    either group are heard a little differently in every round and clusters are drawn anew."""
    of = method(space="offset", redraw_every=1, stay=stay, shrinkage=0.0)
    random = torch.Generator().manual_seed(0)
    cards = [ClientCard(name) for name in (*(f"n{i}" for i in range(4)), *(f"e{i}" for i in range(4)), "x")]
    state = of.init(FederationInfo(Prompt(torch.zeros(1, 2), "none"), cards, 20, 9, 0))
    had: set[int] = set()
    for round in range(1, 13):
        goals = {c.name: (NORTH if c.name[0] == "n" else EAST) for c in cards}
        deltas = {n: goal + 0.1 * torch.randn(1, 2, generator=random) - of._sent(state, n) for n, goal in goals.items()}
        deltas["x"] = NORTH + EAST - of._sent(state, "x")
        state = after(of, state, round, **deltas)
        clusters = state.facts["clusters"]
        had.add(clusters["x"] == clusters["n0"])
    return had


def test_a_client_that_never_moves_keeps_its_prototype_although_clusters_are_drawn_in_every_round():
    assert len(wandering(stay=0.2)) == 1
    assert len(wandering(stay=0.0)) == 2


def test_what_a_late_update_learned_is_added_to_the_prompt_that_its_client_would_be_sent_now():
    """d learned EAST from where it stood two rounds ago; its prototype has gone on without it."""
    of = method()
    state = after(of, begun(of), 2, c=NORTH)
    assert small.close(prompt_of(of, state, "d"), EAST + NORTH)
    state = after(of, state, 3, d=EAST)
    assert small.close(prompt_of(of, state, "d"), 2 * EAST + NORTH)
    assert state.facts["clusters"]["d"] == state.facts["clusters"]["c"]


@pytest.mark.parametrize("options", [{"lost": 0.4, "seed": 1}, {"late": 0.4, "seed": 1}])
def test_rounds_go_on_where_updates_are_lost_or_late(model, options):
    """Who is not heard in the round that gathers all has the global prompt, until it is heard."""
    of = small.method("ficpd", num_prototypes=2)
    members = small.clients(model, of)
    engine = simulation.build(simulation.Config(**options), of, members, model)
    patient = RoundSchedule(5, len(members), 0, everyone_first=True, accept_late=1)
    state, reports = small.rounds(of, members, model, patient, engine)
    assert min(report.updates for report in reports) < len(members)
    assert set(state.facts["clusters"]) == set(members)
    assert all(torch.isfinite(array).all() for array in state.arrays.values())
    basis = of.library_prompts(state)
    for name in members:
        assert any(torch.equal(prompt_of(of, state, name), prompt) for prompt in basis.values())


def test_all_are_heard_in_the_first_and_the_last_round_of_a_run(tmp_path):
    heard = {}
    for gather in ("true", "false"):
        (tmp_path / gather).mkdir()
        changes = ("federation.clients_per_round=1", f"method.gather={gather}", "method.num_prototypes=2")
        small.run(tmp_path / gather, "ficpd", *changes)
        lines = (tmp_path / gather / "run" / "rounds.jsonl").read_text().splitlines()
        heard[gather] = [json.loads(line)["updates"] for line in lines]
    assert heard == {"true": [3, 1, 3], "false": [1, 1, 3]}, "the last round learns a readout from all"


@pytest.mark.parametrize("kind", ["momentum", "adam"])
def test_the_servers_own_step_moves_the_global_prompt_of_a_run(tmp_path, kind):
    """Its moments are in the checkpoint: broken off and gone on with, a run ends where a whole one does."""
    found = {}
    changes = (f"method.server={{kind='{kind}',rate=0.5}}", "method.num_prototypes=2")
    for name, more in (("whole", changes), ("plain", changes[1:])):
        (tmp_path / name).mkdir()
        small.run(tmp_path / name, "ficpd", *more)
        found[name] = PromptLibrary.load(tmp_path / name / "run").prompts["global"].vectors_PD
    assert not torch.allclose(found["whole"], found["plain"], atol=1e-3)
    (tmp_path / "broken").mkdir()
    experiment = small.experiment(tmp_path / "broken", "ficpd", *changes)

    def stop(method: str, done: int, planned: int, figures: object) -> None:
        if method == "ficpd" and done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_experiment(experiment, tmp_path / "broken" / "run", progress=stop)
    run_experiment(experiment, tmp_path / "broken" / "run", resume=True)
    again = PromptLibrary.load(tmp_path / "broken" / "run").prompts["global"].vectors_PD
    assert torch.equal(again, found["whole"])


def test_clients_that_are_all_alike_have_one_prototype_and_nothing_to_agree_with(tmp_path):
    """More prototypes than clients are asked for, and every client has the very same records."""
    data = small.table(tmp_path / "records.csv", 20)
    texts = [line.rsplit(",", 1)[0] for line in data.read_text().splitlines()[1:]]
    lines = [f"{text},site-{site}" for text in texts for site in range(3)]
    experiment = small.experiment(tmp_path, "ficpd", "method.num_prototypes=20", "training.batch_size=64")
    data.write_text("text,target,site\n" + "\n".join(lines) + "\n")
    found = run_experiment(experiment, tmp_path / "run")
    assert 1 <= found.clusters.number <= 3
    assert found.clusters.adjusted_rand["site"] is None
    library = PromptLibrary.load(tmp_path / "run")
    assert len(library.prompts) == 1 + found.clusters.number
    assert "Agreement" not in small.page(tmp_path)
