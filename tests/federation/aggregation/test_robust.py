"""Robust means: what a few poisoned updates can do by each rule, in every method that averages, and that it is reported."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

import small
from ficpd import storage
from ficpd.errors import PrivacyError, RunError
from ficpd.experiments.config import parse
from ficpd.experiments.run_directory import RunDir
from ficpd.experiments.runner import run as run_experiment
from ficpd.federation.aggregation.mean import weighted_mean
from ficpd.federation.aggregation.robust import RobustAggregator, RobustConfig
from ficpd.federation.privacy_plan import privacy_config_for
from ficpd.federation.rounds import RoundSchedule
from ficpd.privacy.none import NoPrivacy
from ficpd.registry import load, names
from ficpd.types import ClientCard, ClientUpdate, Query, State

RULES = ("trimmed_mean", "norm_bound", "multi_krum")
APART = {"fedbpt", "feddtpt", "fedhpl", "prompt_dpsgd"}
"""What their clients send is a search's population, words, logits kept by client, nothing: no mean is taken of it."""
AVERAGING = [
    n
    for n in names("methods")
    if n not in APART and (m := small.method(n).capabilities).releases and not m.centralized and m.rounds != 1
]
POISONED = "site-3"


class Config(BaseModel):
    """This module is also a mechanism: no privacy, and one client that lies (`privacy.name` is its dotted name)."""


def build(config, plan):
    return Lying()


class Lying(NoPrivacy):
    """Lets everything through, but of one client fifty times the opposite."""

    def privatize_update(self, update, noise):
        factor = -50.0 if update.client == POISONED else 1.0
        return ClientUpdate(update.client, {n: factor * a for n, a in update.arrays.items()}, update.weight)


def updates(*values, weights=None) -> list[ClientUpdate]:
    arrays = [torch.as_tensor(value, dtype=torch.float32) for value in values]
    weights = weights or [1.0] * len(arrays)
    return [ClientUpdate(f"site-{i:02}", {"delta": a}, w) for i, (a, w) in enumerate(zip(arrays, weights, strict=True))]


def mean(rule: str, given: list[ClientUpdate], **config) -> tuple[torch.Tensor, dict]:
    means = RobustAggregator(RobustConfig(rule=rule, **config), given)  # type: ignore[arg-type]
    return means.mean_all(), means.facts


def honest(count: int = 9, size: int = 12) -> list[ClientUpdate]:
    random = torch.Generator().manual_seed(count)
    shared = torch.randn(size, generator=random)
    deltas = [shared + 0.5 * torch.randn(size, generator=random) for _ in range(count)]
    return updates(*deltas, weights=[1.0 + i for i in range(count)])


@st.composite
def rounds_with_poison(draw):
    """Honest updates [H, D], poisoned ones [f, D], and the weights that all of them claim."""
    poisoned, size = draw(st.integers(1, 3)), draw(st.integers(1, 5))
    number = draw(st.integers(2 * poisoned + 3, 2 * poisoned + 6))
    some, any_ = st.floats(-10, 10, width=32), st.floats(-(2.0**19), 2.0**19, width=32)
    row, honest = st.lists(some, min_size=size, max_size=size), number - poisoned
    good = draw(st.lists(row, min_size=honest, max_size=honest))
    bad = draw(st.lists(st.lists(any_, min_size=size, max_size=size), min_size=poisoned, max_size=poisoned))
    weights = draw(st.lists(st.floats(1e-3, 1e9), min_size=number, max_size=number))
    return good, bad, weights


@given(rounds_with_poison())
@settings(max_examples=60, deadline=None)
def test_whatever_the_poisoned_send_the_mean_stays_with_the_honest(drawn):
    good, bad, weights = drawn
    given, poisoned = updates(*good, *bad, weights=weights), len(bad)
    good = torch.tensor(good, dtype=torch.float64)
    trimmed, _ = mean("trimmed_mean", given, num_byzantine=poisoned)
    assert bool(((trimmed >= good.amin(0) - 1e-5) & (trimmed <= good.amax(0) + 1e-5)).all())
    # A poisoned update is chosen only if it scores no worse than some honest one, whose n - f - 2 nearest are no further
    # than the honest ones' diameter; and at least n - 2f - 1 of its own nearest are honest.
    krum, _ = mean("multi_krum", given, num_byzantine=poisoned)
    far = torch.cdist(good, good).max() * (1 + ((len(given) - poisoned - 2) / (len(given) - 2 * poisoned - 1)) ** 0.5)
    assert float((krum - good.mean(0)).norm()) <= float(far) + 1e-4
    bounded, _ = mean("norm_bound", given, num_byzantine=poisoned)
    assert float(bounded.norm()) <= 2 * float(good.norm(dim=1).max()) + 1e-4


@pytest.mark.parametrize("poison", [1e5, -1e5])
def test_one_update_moves_the_plain_mean_anywhere_and_no_robust_one(poison):
    given = honest()
    good = torch.stack([update.arrays["delta"] for update in given])
    lie = ClientUpdate("site-99", {"delta": torch.full((12,), poison)})
    assert float(mean("mean", [*given, lie])[0].abs().min()) > 1e3
    for rule in RULES:
        found, facts = mean(rule, [*given, lie])
        assert float((found - good.mean(0)).norm()) < float(good.mean(0).norm()), rule
        assert "site-99" in facts["excluded_updates"], rule
        assert rule == "norm_bound" or len(facts["excluded_updates"]) == 1
        assert facts["underfilled_means"] == {}


@pytest.mark.parametrize("rule", RULES)
def test_a_claimed_weight_buys_nothing(rule):
    given = honest()
    greedy = [ClientUpdate(u.client, u.arrays, 1e11 if u.client == "site-04" else 1.0) for u in given]
    assert small.close(mean("mean", greedy)[0], given[4].arrays["delta"], 1e-4)
    assert torch.equal(mean(rule, greedy)[0], mean(rule, given)[0])


def test_the_mean_is_the_weighted_mean_to_the_last_bit_and_says_nothing():
    found, facts = mean("mean", honest())
    assert torch.equal(found, weighted_mean(honest(), "delta"))
    assert facts == {}


@pytest.mark.parametrize("rule", ["mean", *RULES])
def test_the_order_of_updates_does_not_matter(rule):
    given = [*honest(), *updates(torch.zeros(12), torch.zeros(12))]
    given = [ClientUpdate(f"site-{i:02}", u.arrays, u.weight) for i, u in enumerate(given)]
    first = mean(rule, given, num_byzantine=3)
    for seed in range(4):
        again = mean(rule, small.shuffled(given, seed), num_byzantine=3)
        assert torch.equal(again[0], first[0])
        assert again[1] == first[1]


def test_of_two_that_are_equally_far_the_order_of_arrival_does_not_choose():
    tie = updates([-5.0], [0.0], [0.0], [0.0], [5.0])
    left_out = [mean("multi_krum", small.shuffled(tie, seed))[1]["excluded_updates"] for seed in range(6)]
    assert left_out == [{"site-04": "left out of global"}] * 6


def test_each_rule_by_hand():
    given = updates([0.0, 3.0], [1.0, 4.0], [2.0, 5.0], [3.0, -90.0], [100.0, 6.0], weights=[9.0, 1.0, 1.0, 1.0, 1.0])
    assert mean("trimmed_mean", given)[0].tolist() == [2.0, 4.0]
    assert mean("trimmed_mean", given, num_byzantine=2)[0].tolist() == [2.0, 4.0]
    five = updates([0.0], [1.0], [2.0], [3.0], [100.0])
    found, facts = mean("multi_krum", five)
    assert (found.tolist(), facts["excluded_updates"]) == ([1.5], {"site-04": "left out of global"})
    # by three nearest; two or four would leave the first out
    six = updates([0.0], [7.0], [8.0], [11.0], [19.0], [21.0])
    assert mean("multi_krum", six)[1]["excluded_updates"].keys() == {"site-05"}
    three = updates([3.0, 4.0], [0.3, 0.4], [0.6, 0.8])
    found, facts = mean("norm_bound", three)  # the median is 1, so that nobody is longer than 2
    assert small.close(found, torch.tensor([1.2 + 0.3 + 0.6, 1.6 + 0.4 + 0.8]) / 3)
    assert facts["excluded_updates"] == {"site-00": "cut from a norm of 5 to 2"}
    assert small.close(mean("norm_bound", three, max_norm=0.5)[0], torch.tensor([0.3, 0.4]))


def test_an_update_within_the_bound_is_not_touched():
    given = honest()
    means = RobustAggregator(RobustConfig(rule="norm_bound", max_norm=1e3), given)
    assert all(after is before for after, before in zip(means.updates, given, strict=True))
    assert means.facts == {"excluded_updates": {}, "underfilled_means": {}}


@pytest.mark.parametrize(
    ("rule", "count", "poisoned", "trimmed"),
    [("trimmed_mean", 1, 1, 0), ("trimmed_mean", 2, 1, 0), ("trimmed_mean", 4, 2, 1), ("multi_krum", 1, 1, 0),
     ("multi_krum", 4, 1, 1), ("multi_krum", 6, 2, 2), ("multi_krum", 4, 3, 1)],
)  # fmt: skip
def test_of_too_few_as_many_as_can_be_are_trimmed_and_it_is_said(rule, count, poisoned, trimmed):
    given = honest(count)
    found, facts = mean(rule, given, num_byzantine=poisoned)
    values = torch.stack([u.arrays["delta"].double() for u in given]).sort(0).values
    assert small.close(found, values[trimmed : count - trimmed].mean(0).float(), 1e-6)
    assert list(facts["underfilled_means"]) == ["global"]
    assert f"{count} came" in facts["underfilled_means"]["global"]
    assert f": {trimmed} trimmed" in facts["underfilled_means"]["global"]
    enough = 2 * poisoned + (3 if rule == "multi_krum" else 1)
    assert mean(rule, honest(enough), num_byzantine=poisoned)[1]["underfilled_means"] == {}


def test_every_method_that_averages_clients_has_the_option():
    assert [name for name in names("methods") if "robust" in load("methods", name).Config.model_fields] == AVERAGING
    assert {"fedavg", "fedprox", "fedlora", "ficpd", "fpl"} <= set(AVERAGING)


@pytest.fixture(params=AVERAGING)
def name(request) -> str:
    return request.param


def loss(method, members, state, model) -> float:
    """Of the global prompt, on the training records of those who do not lie."""
    clients = [client for n, client in members.items() if n != POISONED]
    answers = model.answer([Query(method.global_prompt(state)[None], client.encoded()) for client in clients])
    return float(torch.cat([answer.loss_KB for answer in answers], 1).mean())


@pytest.mark.parametrize("rule", RULES)
def test_one_poisoned_client_ruins_the_mean_and_not_the_robust_ones(model, name, rule):
    losses = {}
    for setting, mechanism in (("honest", NoPrivacy()), ("mean", Lying()), (rule, Lying())):
        method = small.method(name, robust={"rule": "mean" if setting == "honest" else setting})
        members = small.clients(model, method, 7, mechanism=mechanism)
        first = loss(method, members, small.first_state(method, members), model)
        state, reports = small.rounds(method, members, model, RoundSchedule(4, 7, 0))
        losses[setting] = loss(method, members, state, model)
        assert not any(report.dropped for report in reports)
        if setting == rule:
            assert all(POISONED in report.excluded_updates for report in reports)
            read, _ = storage.decode_state(storage.encode_state(state, {}))
            assert read.facts == state.facts
            sizes = method.update_spec(state).items()
            updates = [ClientUpdate(n, {k: torch.randn(s) for k, s in sizes}) for n in members]
            after = [method.aggregate(state, small.shuffled(updates, seed), 5, model) for seed in (0, 1)]
            assert small.same(after[0].arrays, after[1].arrays)
            assert after[0].facts == after[1].facts
        else:
            assert not any(report.excluded_updates or report.underfilled_means for report in reports)
    assert losses["mean"] > first > losses[rule]
    assert losses[rule] - losses["honest"] < 0.6 * (first - losses["honest"])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("name", "config"), [("ficpd", {"num_prototypes": 1}), ("fpl", {"clusters": "none"})])
def test_a_prototype_goes_by_the_rule_as_the_global_prompt_does(model, rule, name, config):
    method = small.method(name, robust={"rule": rule}, **config)
    members = small.clients(model, method, 7, mechanism=Lying())
    state, reports = small.rounds(method, members, model, RoundSchedule(3, 7, 0))
    assert small.close(method.library_prompts(state)["prototype-0"], method.global_prompt(state))
    assert rule == "norm_bound" or "prototype-0" in reports[-1].excluded_updates[POISONED]


def test_a_cluster_of_too_few_is_reported_by_name(model):
    method = small.method("fpl", clusters="given", by=("kind",), residual="none", robust={"rule": "multi_krum"})
    members = small.clients(model, method, 7)
    for place, client in enumerate(members.values()):
        client.card = ClientCard(client.card.name, {"kind": "ab"[place > 4]})
    _, reports = small.rounds(method, members, model)
    assert [list(report.underfilled_means) for report in reports] == [["prototype-1"]] * 2


def test_one_noised_sum_is_refused_by_all_rules_but_the_mean(name):
    central = {"name": "client_gaussian", "placement": "central"}
    for rule in RULES:
        with pytest.raises(PrivacyError, match=r"method.robust.rule = 'mean'"):
            privacy_config_for(small.method(name, robust={"rule": rule}), central)
    if name != "ficpd":
        assert privacy_config_for(small.method(name), central) == central


def test_a_run_names_the_client_that_lied(tmp_path):
    table = small.table(tmp_path / "records.csv", 140, 7)
    changes = ["privacy.name=federation.aggregation.test_robust", "method.robust.rule=multi_krum"]
    result = run_experiment(parse(small.toml(table), "small.toml", changes), tmp_path / "run")
    assert result.excluded_updates == {POISONED: 3}
    assert result.underfilled_means == {}
    lines = [json.loads(line) for line in (tmp_path / "run" / "rounds.jsonl").read_text().splitlines()]
    assert [line["excluded_updates"] for line in lines] == [{POISONED: "left out of global"}] * 3
    assert f"{POISONED} in 3" in small.page(tmp_path)


def test_a_checkpoint_of_another_version_is_refused(tmp_path):
    written = storage.encode_state(State({"prompt": torch.ones(2)}), {"totals": {}})
    (tmp_path / "checkpoint").write_bytes(written)
    unread = r"checkpoint cannot be read, or is of another version: .*Delete it to begin anew"
    with pytest.raises(RunError, match=unread):
        RunDir(tmp_path).load()
