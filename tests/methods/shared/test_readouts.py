from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import small
from ficpd.backbones.query_engine import run_queries
from ficpd.errors import CodecError
from ficpd.evaluation.evaluate import evaluate
from ficpd.federation.client import ClientSession
from ficpd.federation.execution import execute_assignment, local_model
from ficpd.federation.rounds import RoundSchedule
from ficpd.library.library import PromptLibrary
from ficpd.methods import ficpd
from ficpd.methods.shared import class_totals, readouts
from ficpd.methods.shared.class_totals import CLASSES, left_out_readouts, row_norm, split_totals
from ficpd.methods.shared.readouts import (
    CENTRE,
    COUNTS,
    NOISE_OF_TOTALS,
    ROWS,
    SCORING,
    TEXT,
    learn_readouts,
    totals_spec,
)
from ficpd.privacy import record_gaussian
from ficpd.types import ClientCard, ClientUpdate, ClientWorkload, FederationInfo, Record, State


def after_one_round(model, method, members, state=None, round=1, rounds=3):
    """The state, and each client's update of the round."""
    state, updates = state or small.first_state(method, members, rounds, readable=model), []
    for client in members.values():
        assignment = method.make_assignment(state, client.card, round)
        method.validate_assignment(assignment, client.start)
        updates.append(run_queries(model, execute_assignment(method, client, assignment)))
    return method.aggregate(state, updates, round, model), updates


@pytest.mark.parametrize("name", ["ficpd", "analytic", "class_means"])
def test_round_one_gathers_totals_and_later_assignments_carry_the_readout(model, name):
    method = small.method(name)
    members = small.clients(model, method)
    first = small.first_state(method, members, readable=model)
    client = members["site-0"]
    assert CENTRE in method.make_assignment(first, client.card, 1).arrays
    assert CLASSES in method.update_spec(first)
    state, updates = after_one_round(model, method, members)
    assert all(CLASSES in update.arrays for update in updates)
    assert CLASSES not in method.update_spec(state)
    later = method.make_assignment(state, client.card, 2)
    method.validate_assignment(later, client.start)
    assert later.arrays[ROWS].shape == (2, model.backbone.width)
    assert torch.equal(later.arrays[ROWS], readouts.state_readout(state, ClientCard("a newcomer")).rows_CD)
    counts = [sum(r.fields["target"] == label for r in client.train) for label in client.task.names]
    assert client.client_state[COUNTS].tolist() == pytest.approx(counts, abs=1e-4)


def test_the_last_round_tunes_nothing_and_learns_the_readout_under_the_prompts(model):
    method = small.method("ficpd")
    members = small.clients(model, method)
    first, _ = after_one_round(model, method, members, rounds=2)
    assert first.facts["closes"]
    assert first.facts["at_start"]
    assert method.readout(first, ClientCard("a newcomer")) is None, "the readout fits the start, not the prompts"
    asked = method.make_assignment(first, members["site-0"].card, 2)
    alone = small.method("ficpd", local_model="prototype", label_prior=False)
    (shown,) = run_queries(model, local_model(alone, members["site-0"], asked))
    assert shown.logits is None, "nor is a prototype read by it"
    last, updates = after_one_round(model, method, members, first, 2)
    assert all(update.arrays.keys() == {CLASSES} for update in updates)
    assert torch.equal(last.arrays["global"], first.arrays["global"])
    assert not torch.equal(last.arrays["global"], last.arrays["start"])
    assert not last.facts["at_start"]
    assert CLASSES not in method.update_spec(last)
    shared = readouts.state_readout(last, ClientCard("any"))
    assert torch.equal(method.readout(last, ClientCard("a newcomer")).rows_CD, shared.rows_CD)
    client = members["site-0"]
    asked = method.make_assignment(first, client.card, 2)
    for prompt, same in ((asked.arrays["prompt"], True), (client.start.vectors_PD, False)):
        totals = run_queries(model, readouts.client_totals(ClientSession(client, 2), asked, prompt))[CLASSES]
        assert small.close(totals, updates[0].arrays[CLASSES], 1e-5) == same


def test_each_client_scores_its_records_by_half_a_readout_without_them(model):
    method = small.method("ficpd")
    members = small.clients(model, method)
    state, updates = after_one_round(model, method, members, rounds=1)
    names = sorted(members)
    centre, width = first_arrays(model, method, members)[CENTRE], model.backbone.width
    public = class_totals.PublicFeatures(centre, state.facts["feature_scale"], torch.eye(width))
    of = [split_totals(u.arrays[CLASSES], 2, 2, model.backbone.width, state.facts["gram"]) for u in updates]
    text = first_arrays(model, method, members)[f"{TEXT}0"]
    without = left_out_readouts(of, text, public)
    for name, rest in zip([u.client for u in updates], without, strict=True):
        assignment = method.make_assignment(state, members[name].card, 2)
        method.validate_assignment(assignment, members[name].start)
        scoring = readouts.scoring_readout(assignment)
        assert torch.allclose(scoring.rows_CD, (assignment.arrays[ROWS] + rest.rows_CD) / 2, atol=1e-5)
    newcomer = method.make_assignment(state, ClientCard("a newcomer"), 2)
    assert readouts.scoring_readout(newcomer) is None
    broken = replace(newcomer, arrays=newcomer.arrays | {SCORING: newcomer.arrays[ROWS][:, :1]})
    with pytest.raises(CodecError, match="readout arrays"):
        method.validate_assignment(broken, members[names[0]].start)


def test_a_secure_sum_makes_no_readout_without_one_client(model):
    """Its noise is that of the whole sum, and none of a part."""
    method = small.method("ficpd")
    members = small.clients(model, method)
    first = small.first_state(method, members, readable=model)
    _, updates = after_one_round(model, method, members, first)
    found = {}
    for noise in (0.0, 1e-9):
        state = State(first.arrays, {**first.facts, "gram": False, NOISE_OF_TOTALS: noise})
        numbers = totals_spec(state)[CLASSES][0]
        sums = [ClientUpdate(u.client, {CLASSES: u.arrays[CLASSES][:numbers]}) for u in updates]
        found[noise] = {name.partition("/")[0] for name in learn_readouts(state, sums, scoring=True).arrays}
    assert ROWS in found[0.0] & found[1e-9]
    assert SCORING in found[0.0]
    assert SCORING not in found[1e-9]


@pytest.mark.parametrize("scored", [True, False])
def test_nearest_records_join_the_mixture_unless_a_readout_leaves_them_out(model, monkeypatch, scored):
    """Without such a readout, heads shrink towards one that knows the client's own records."""
    if not scored:
        monkeypatch.setattr(readouts, "MOST_SCORING", 0)
    monkeypatch.setattr(ficpd, "weigh_candidates", lambda client, candidates: found.extend(candidates) or ())
    method, found = small.method("ficpd"), []
    members = small.clients(model, method)
    state, _ = after_one_round(model, method, members, rounds=1)
    assignment = method.make_assignment(state, members["site-0"].card, 2)
    assert [*method.local_model(members["site-0"], assignment)] == []
    assert [candidate.neighbours for candidate in found] == [False, not scored]
    assert (found[0].scoring is not None) == scored


@pytest.mark.parametrize("limit", ["MANY_RECORDS", "MOST_SCORING"])
def test_large_federations_have_no_readout_for_each_client(model, monkeypatch, limit):
    monkeypatch.setattr(readouts, limit, 0)
    method = small.method("ficpd")
    members = small.clients(model, method)
    state, _ = after_one_round(model, method, members, rounds=1)
    assignment = method.make_assignment(state, members["site-0"].card, 2)
    assert ROWS in assignment.arrays
    assert readouts.scoring_readout(assignment) is None


def first_arrays(model, method, members):
    return small.first_state(method, members, 1, readable=model).arrays


def test_with_noise_totals_are_gathered_once(model):
    method = small.method("ficpd")
    noisy = small.clients(model, method, mechanism=SimpleNamespace(unit="record", subjects=False))
    state = small.first_state(method, noisy, 1, readable=model)
    assert state.facts["gathers"]
    assert not state.facts["closes"]
    alone = small.first_state(method, small.clients(model, method), 1, readable=model)
    assert alone.facts["closes"], "the only round is for the readout"


@pytest.mark.parametrize("clients", [1, 2, 5])
def test_the_analytic_readout_does_not_depend_on_who_holds_which_record(model, clients):
    method = small.method("analytic")
    everything = small.records(60)
    members = small.clients(model, method, clients)
    for place, client in enumerate(members.values()):
        client.train = everything[place::clients]
    state, _ = after_one_round(model, method, members)
    alone = small.clients(model, method, 1)
    alone["site-0"].train = everything
    whole, _ = after_one_round(model, method, alone)
    parted, together = (readouts.state_readout(of, ClientCard("any")) for of in (state, whole))
    assert small.close(parted.rows_CD, together.rows_CD, 1e-3)


def test_one_record_changes_the_released_totals_by_norm_one_and_the_ledger_has_their_line(model):
    method = small.method("class_means")
    plan = ClientWorkload(12, 1.0, 0, 1, 1, 1.0, 1, once={CLASSES: 0.5})
    mechanism = record_gaussian.build(record_gaussian.Config(epsilon=2.0, delta=1e-3, clip_norm=1.0), plan)
    summed = []

    class Noiseless:
        def __getattr__(self, name):
            return getattr(mechanism, name)

        def noisy_sum(self, name, chunks, noise):
            return mechanism.noisy_sum(name, chunks, Silent())

    class Silent:
        def add_gaussian(self, values, deviation):
            return values

    for records in (small.records(12), [*small.records(11), Record("far", {"text": "grey " * 30, "target": "good"})]):
        members = small.clients(model, method, 1, mechanism=Noiseless())
        client = members["site-0"]
        client.train = records[:11]
        without, _ = totals_of(model, method, members)
        client = small.clients(model, method, 1, mechanism=Noiseless())["site-0"]
        client.train = records
        whole, account = totals_of(model, method, {"site-0": client})
        summed.append(float((whole - without).norm()))
        assert [(line.name, line.count) for line in account.spent()] == [(CLASSES, 1)]
    assert max(summed) <= 1 + 1e-5
    assert min(summed) > 0.1 / row_norm(gram=False)


def totals_of(model, method, members):
    client = members["site-0"]
    asked = method.make_assignment(small.first_state(method, members, readable=model), client.card, 1)
    narrow = replace(asked, facts={**asked.facts, "feature_scale": 0.05})  # a server may send any scale
    update = run_queries(model, execute_assignment(method, client, narrow))
    return update.arrays[CLASSES], client.account


def test_a_readout_of_other_labels_is_refused(model):
    method = small.method("ficpd")
    members = small.clients(model, method)
    state, _ = after_one_round(model, method, members)
    client = members["site-0"]
    good = method.make_assignment(state, client.card, 2)
    arrays = {name: array[:1] if name != "prompt" else array for name, array in good.arrays.items()}
    asked = small.Listening(model)
    with pytest.raises(CodecError, match="readout has 1 labels, expected 2"):
        run_queries(asked, execute_assignment(method, client, replace(good, arrays=arrays)))
    assert not asked.asked, "no record was read, so nothing was charged"


@pytest.mark.parametrize(
    "broken", [{ROWS: torch.zeros(2, 3)}, {CENTRE: torch.zeros(16)}, {"label_shares": torch.zeros(5)}]
)
def test_readout_arrays_of_other_shapes_are_refused_before_a_record_is_read(model, broken):
    method = small.method("ficpd")
    members = small.clients(model, method)
    state, _ = after_one_round(model, method, members)
    good = method.make_assignment(state, members["site-0"].card, 2)
    with pytest.raises(CodecError):
        method.validate_assignment(replace(good, arrays={**good.arrays, **broken}), members["site-0"].start)


def test_a_task_that_is_not_read_from_features_keeps_its_reading(model):
    for task in (small.numbers(), small.choices()):
        method = small.method("ficpd")
        method.adapt_to([task], model.backbone)
        assert CLASSES not in method.capabilities.statistics_once
        assert not method.capabilities.learns_readout
    method = small.method("ficpd")
    method.adapt_to([small.numbers(), small.classes()], model.backbone)
    assert method.capabilities.learns_readout


def test_a_client_of_one_label_or_one_record_takes_part_and_is_served(model):
    method = small.method("ficpd")
    members = small.clients(model, method, 3)
    members["site-0"].train = [r for r in small.records(30) if r.fields["target"] == "good"]
    members["site-1"].train = small.records(1)
    state, _ = after_one_round(model, method, members)
    found = evaluate(method, state, members, model, 2)
    assert found.own.keys() == members.keys()
    assert all(0 <= score["accuracy"] <= 1 for score in found.own.values())


def test_a_mixture_weighs_by_the_clients_own_records_and_sends_nothing(model):
    method = small.method("ficpd")
    members = small.clients(model, method, 2)
    members["site-0"].train = small.records(40)
    state, _ = after_one_round(model, method, members)
    client = members["site-0"]
    before = {name: value.clone() for name, value in client.client_state.items()}
    found = run_queries(model, local_model(method, client, method.make_assignment(state, client.card, 3)))
    assert sum(one.weight for one in found) == pytest.approx(1.0, abs=1e-2)
    assert small.same(client.client_state, before)
    assert client.account is None


def test_a_run_keeps_the_readout_in_its_library_and_predicts_by_it(tmp_path, model):
    small.run(tmp_path, "ficpd", rounds=2)
    library = PromptLibrary.load(tmp_path / "run")
    (name,) = library.learned
    told = {k: v for k, v in library.card["tasks"][name].items() if k != "name"}
    task = small.classification.build(small.classification.Config(**told))
    readout = library.learned_readout(task)
    backwards = dict(reversed(task.config.labels.items()))
    turned = small.classification.build(task.config.model_copy(update={"labels": backwards}))
    assert torch.equal(library.learned_readout(turned).rows_CD, readout.rows_CD.flip(0))
    other = small.classification.build(task.config.model_copy(update={"labels": {"a": "a", "b": "b"}}))
    assert library.learned_readout(other) is None


def test_clients_of_a_task_share_a_prototype_of_it_even_if_they_never_came(model):
    method = small.method("ficpd", num_prototypes=2)
    cards = [ClientCard(f"{group}.{i}", {"group": group}) for group in "ab" for i in range(2)]
    start = small.start(model, small.classes())
    setup = FederationInfo(start, cards, 2, 4, 0, {"a": 2, "b": 2})
    state = method.init(setup)
    deltas = {"a.0": torch.ones_like(start.vectors_PD), "b.0": torch.ones_like(start.vectors_PD) * 1.01}
    updates = [ClientUpdate(name, {"delta": delta}) for name, delta in deltas.items()]
    state = method.aggregate(State(state.arrays, {**state.facts, "noise": 0.0}), updates, 1, model)
    assert state.facts["clusters"]["a.0"] != state.facts["clusters"]["b.0"]
    for group in "ab":
        cards = [ClientCard(f"{group}.{name}", {"group": group}) for name in (0, 1, "new")]
        known, never, unheard = (method.make_assignment(state, card, 2) for card in cards)
        assert torch.equal(known.arrays["prompt"], never.arrays["prompt"])
        assert torch.equal(known.arrays["prompt"], unheard.arrays["prompt"])


def test_the_schedule_of_one_round_is_enough(model):
    method = small.method("analytic")
    assert method.capabilities.rounds == 1
    members = small.clients(model, method)
    state, _ = small.rounds(method, members, model, RoundSchedule(1, len(members), 0))
    assert state.arrays


def test_only_clients_whose_labels_are_read_from_features_are_tuned_at_the_higher_rate(model):
    method = small.method("ficpd", rate_multiple=5.0)
    cards = [ClientCard(f"{group}.0", {"group": group}) for group in ("words", "numbers")]
    start = small.start(model, small.classes())
    texts = {"words": small.classes().readout(model.backbone)}
    features = torch.randn(32, model.backbone.width, generator=torch.Generator().manual_seed(0))
    state = method.init(FederationInfo(start, cards, 2, 2, 0, {"words": 2, "numbers": 0}, texts, features))
    rates = [method.make_assignment(state, card, 1).facts["rate"] for card in cards]
    assert rates[0] == pytest.approx(5 * rates[1])
    assert rates[1] == pytest.approx(method.training.rate(1, 2))
