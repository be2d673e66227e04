"""FPL: three levels of one prompt, and nothing of the third that leaves."""

import json
from collections.abc import Mapping
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import small
from contracts.test_leak import deaf
from ficpd.backbones.query_engine import run_queries
from ficpd.errors import ConfigError, PrivacyError
from ficpd.evaluation.evaluate import evaluate
from ficpd.evaluation.personalization import personalization_levels
from ficpd.experiments.setup import build_method
from ficpd.federation.client import MIN_HOLDOUT_RECORDS, Client, ClientSession
from ficpd.federation.execution import execute_assignment, personal_prompt
from ficpd.federation.rounds import RoundSchedule
from ficpd.methods.fpl import Fpl
from ficpd.methods.shared import residual
from ficpd.methods.shared.residual import TOWARDS, WEIGHT, ContrastiveConfig, contrastive_loss
from ficpd.privacy import record_gaussian
from ficpd.types import ClientCard, ClientUpdate, ClientWorkload, FederationInfo, ModelOutput, Query

EXACT = small.LocalTrainingConfig(local_steps=3, batch_size=64, learning_rate=0.1)
"""Every step sees all records, so that what two methods do can be compared."""


def members(model, method, count=5, cards: Mapping[str, Mapping] | None = None, **more) -> dict[str, Client]:
    found = small.clients(model, method, count, **more)
    for name, client in found.items():
        client.card = ClientCard(name, (cards or {}).get(name, {}))
    return found


def two_kinds(count=5) -> dict[str, dict[str, str]]:
    return {f"site-{i}": {"kind": "ab"[i % 2]} for i in range(count)}


def fpl(**config) -> Fpl:
    return small.method("fpl", EXACT, **config)


def test_without_clusters_and_residuals_it_is_fedavg(model):
    bare, plain = fpl(clusters="none", residual="none"), small.method("fedavg", EXACT)
    ours, _ = small.rounds(bare, members(model, bare), model, RoundSchedule(3, 5, 0))
    theirs, _ = small.rounds(plain, members(model, plain), model, RoundSchedule(3, 5, 0))
    assert small.close(bare.global_prompt(ours), plain.global_prompt(theirs))


def test_a_cluster_is_fedavg_of_its_members(model):
    method = fpl(residual="none")
    state, _ = small.rounds(method, members(model, method, cards=two_kinds()), model, RoundSchedule(3, 5, 0))
    plain = small.method("fedavg", EXACT)
    own = {n: c for n, c in members(model, plain).items() if int(n[-1]) % 2 == 0}
    alone, _ = small.rounds(plain, own, model, RoundSchedule(3, 3, 0))
    assert small.close(method.library_prompts(state)["prototype-0"], plain.global_prompt(alone))


def test_the_global_prompt_is_the_mean_over_members_of_clusters(model):
    method = fpl(residual="none")
    state, _ = small.rounds(method, members(model, method, cards=two_kinds()), model, RoundSchedule(2, 5, 0))
    three, two = method.library_prompts(state)["prototype-0"], method.library_prompts(state)["prototype-1"]
    assert small.close(method.global_prompt(state), 0.6 * three + 0.4 * two)


@pytest.mark.parametrize("residual", ["full", "low_rank"])
def test_a_personal_prompt_is_better_at_home(model, residual):
    method = fpl(residual=residual, clusters="none")
    own = members(model, method)
    state, _ = small.rounds(method, own, model, RoundSchedule(6, 5, 0))
    shared, personal = [], []
    for client in own.values():
        mine = personal_prompt(method, client, method.make_assignment(state, client.card, 7))
        asked = Query(torch.stack([method.global_prompt(state), mine]), client.encoded())
        at_shared, at_mine = model.answer([asked])[0].loss_KB.mean(1)
        shared.append(at_shared)
        personal.append(at_mine)
    assert sum(personal) < 0.9 * sum(shared)
    if residual == "low_rank":
        assert torch.linalg.matrix_rank(own["site-0"].client_state["residual"], atol=1e-5) <= 4


def test_a_low_rank_residual_tunes_its_factors_by_their_own_gradients(model):
    """The gradients of U and V, by the chain rule and by autograd."""
    client = small.clients(model, small.method("local"), 1)["site-0"]
    base, batch = client.start.vectors_PD, client.encoded()
    noise = torch.randn(2, sum(base.shape), generator=torch.Generator().manual_seed(0))
    factors = residual._factors(base, 2, "x") + 0.1 * noise

    def ask():
        answer = yield Query(factors[None], batch, grad=True)
        return answer.grad_KBPD[0].mean(0)

    found, free = run_queries(model, residual._multiplied(ask(), base)), factors.clone().requires_grad_()
    answer = model.answer([Query((base + residual._product(factors, len(base)))[None], batch, grad=True)])[0]
    (residual._product(free, len(base)) * answer.grad_KBPD[0].mean(0)).sum().backward()
    assert found.abs().max() > 1e-3
    assert small.close(found / found.abs().max(), free.grad / found.abs().max())


def test_the_shared_gradient_is_never_taken_at_a_residual(model):
    """A residual is a function of the records that no mechanism has seen: under a mechanism that is deaf to them, all that
    is asked before the update stands must be the same whoever's records they are."""

    heard = []
    for seed in (1, 2):
        method = small.method("fpl", contrast=ContrastiveConfig(weight=0.5, space="both"))
        client, listening = deaf(method, model, 12, seed), small.Listening(model)
        ends = [len(listening.asked) for _ in small.alone(method, client, listening)]
        heard.append([listening.asked[begin:end] for begin, end in zip([0, *ends], ends, strict=False)])
        assert client.client_state["residual"].abs().max() > 0
    steps = small.TRAINING.local_steps
    for first, second in zip(*heard, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(first[:steps], second[:steps], strict=True))
    assert not torch.equal(heard[0][2][-1], heard[1][2][-1])  # at home they differ


def test_what_is_tuned_at_home_costs_nothing_and_the_rest_what_fedavg_does(model):
    spent = {}
    for name in ("fpl", "fedavg"):
        method = small.method(name)
        plan = ClientWorkload(12, 1 / 3, small.TRAINING.local_steps, 2, 1, 1.0, 2)
        mechanism = record_gaussian.build(record_gaussian.Config(epsilon=8.0, clip_norm=1.0), plan)
        own = members(model, method, 1, mechanism=mechanism)
        own["site-0"].train = small.records(12)
        small.rounds(method, own, model)
        spent[name] = own["site-0"].account.spent()
        assert ("residual" in own["site-0"].client_state) == (name == "fpl")
    assert spent["fpl"] == spent["fedavg"]


def test_one_noised_sum_has_a_part_for_each_cluster_and_each_client_is_in_one(model):
    method = fpl()
    own = members(model, method, cards=two_kinds())
    state = small.first_state(method, own)
    delta = torch.ones_like(state.arrays["start"])
    placed = {n: method.in_cluster_sum(state, ClientUpdate(n, {"delta": delta})) for n in own}
    assert all(set(update.arrays) == set(method.cluster_sums(state)) for update in placed.values())
    summed = {part: sum(update.arrays[part] for update in placed.values()) for part in method.cluster_sums(state)}
    assert [float(total.mean()) for _, total in sorted(summed.items())] == [3.0, 2.0]
    mean = ClientUpdate("everybody", {part: total / len(own) for part, total in summed.items()})
    after = method.aggregate(state, [mean], 1, model)
    for prototype in after.arrays["prototypes_KPD"]:
        assert small.close(prototype, state.arrays["start"] + delta)


def test_a_small_cluster_is_drawn_back_by_the_noise_of_the_sum(model):
    method = fpl()
    state = small.first_state(method, members(model, method, 5, cards=two_kinds()))
    start, facts = state.arrays["start"], state.facts
    one = torch.ones_like(start)
    mean = ClientUpdate("everybody", {"delta/0": 0.6 * one, "delta/1": -0.4 * one})
    apart = {}
    for noise in (0.0, 40.0):
        noisy = type(state)(state.arrays, {**facts, "noise_of_sum": noise})
        after = method.aggregate(noisy, [mean], 1, model)
        apart[noise] = [(p - after.arrays["global"]).norm() for p in after.arrays["prototypes_KPD"]]
    for k, members_of in enumerate((3, 2)):
        kept = 1 - 40.0 / members_of**2 / apart[0.0][k] ** 2
        assert small.close(apart[40.0][k] / apart[0.0][k], kept)


def test_a_client_first_heard_in_round_seven(model):
    method = small.method("fpl", contrast=ContrastiveConfig(weight=0.1))
    own = members(model, method, cards=two_kinds())
    state = small.first_state(method, own, 9)
    early = [n for n in own if n != "site-4"]
    for round in range(1, 10):
        came = early if round < 7 else [*early, "site-4"]
        updates = small.updates(method, [own[n] for n in came], state, model, round)
        state = method.aggregate(state, updates, round, model)
    assert "start" not in method.make_assignment(state, own["site-4"].card, 10).arrays
    session = ClientSession(own["site-4"], 10).local_context()
    assert small.close(session.start, state.arrays["start"]), "what its contrast is counted from"
    assert not small.close(session.start, state.arrays["global"])


def test_a_site_takes_the_servers_own_orders_and_no_others(model):
    method = small.method("fpl", contrast=ContrastiveConfig(weight=0.1))
    own = members(model, method, cards=two_kinds())
    start, state = own["site-0"].start, small.first_state(method, own)
    good = method.make_assignment(state, own["site-0"].card, 1)
    prompt, others = good.arrays["prompt"], good.arrays["others_KPD"]
    small.refuses_all(
        method, start, good,
        replace(good, arrays={"global": prompt}),
        replace(good, arrays={**good.arrays, "residual": prompt}),
        replace(good, arrays={**good.arrays, "others_KPD": others[:, 1:]}),
        replace(good, arrays={**good.arrays, "others_KPD": others.repeat(2000, 1, 1)}),
        replace(good, arrays={**good.arrays, "global": 40 * prompt}),
        replace(good, arrays={**good.arrays, "prompt": prompt.double()}),
        replace(good, facts={**good.facts, "choosing": 1}),
    )  # fmt: skip


def test_a_client_nobody_knew_is_sent_the_prompt_of_the_nearest_card(model):
    method = fpl(residual="none")
    own = members(model, method, cards=two_kinds())
    state, _ = small.rounds(method, own, model, RoundSchedule(2, 5, 0))
    sent = method.make_assignment(state, ClientCard("new", {"kind": "b"}), 3).arrays["prompt"]
    assert torch.equal(sent, method.library_prompts(state)["prototype-1"])
    plain = fpl(clusters="none")
    state, _ = small.rounds(plain, members(model, plain), model, RoundSchedule(2, 5, 0))
    sent = plain.make_assignment(state, ClientCard("new", {"kind": "b"}), 3).arrays["prompt"]
    assert torch.equal(sent, plain.global_prompt(state))


def test_a_cluster_nobody_came_of_stays_where_it_is(model):
    method = fpl(residual="none")
    own = members(model, method, cards=two_kinds())
    state = small.first_state(method, own)
    updates = small.updates(method, [own["site-0"], own["site-2"]], state, model)
    after = method.aggregate(state, updates, 1, model)
    assert torch.equal(after.arrays["prototypes_KPD"][1], state.arrays["prototypes_KPD"][1])
    assert not torch.equal(after.arrays["prototypes_KPD"][0], state.arrays["prototypes_KPD"][0])


def test_a_step_goes_farther_where_the_clients_of_a_cluster_disagree(model):
    """Six of one cluster at right angles to one another (three times their mean), two of another who agree."""
    cards = {f"site-{i}": {"kind": "odd" if i > 5 else "even"} for i in range(8)}
    found = {}
    for kind in ("plain", "extrapolated"):
        method = fpl(residual="none", server={"kind": kind})
        assert method.capabilities.linear == (kind == "plain")
        state = small.first_state(method, members(model, method, 8, cards))
        start = state.arrays["global"]
        ways = torch.eye(start.numel()).view(-1, *start.shape)
        came = [ClientUpdate(f"site-{i}", {"delta": ways[min(i, 6)]}) for i in range(8)]
        after = method.aggregate(state, came, 1, model)
        found[kind] = after.arrays["prototypes_KPD"] - start, method.global_prompt(after) - start
    (plain, whole), (far, farther) = found["plain"], found["extrapolated"]
    assert small.close(far[0], 3 * plain[0])
    assert small.close(far[1], plain[1])
    assert small.close(whole, (6 * plain[0] + 2 * plain[1]) / 8)
    assert small.close(farther, (6 * far[0] + 2 * far[1]) / 8), "nothing would call it back from farther"


CENTRAL = [
    "privacy.name=client_gaussian", "privacy.placement=central", "privacy.epsilon=8.0", "privacy.clip_norm=0.5",
    "federation.clients_per_round=2",
]  # fmt: skip


def test_clusters_by_signatures_are_drawn_from_the_first_round(model):
    method = fpl(clusters="signatures", num_clusters=2, residual="none")
    assert method.capabilities.full_first_round
    assert not method.capabilities.linear
    state, _ = small.rounds(method, members(model, method), model, RoundSchedule(3, 5, 0))
    assert sorted(set(state.facts["clusters"].values())) == [0, 1]
    assert len(state.arrays["prototypes_KPD"]) == 2


def test_a_client_first_heard_after_clusters_were_drawn_joins_one_and_moves_none(model):
    method = fpl(clusters="signatures", num_clusters="auto", residual="none")
    own = members(model, method)
    state, one = small.first_state(method, own), torch.ones(small.start(model, small.classes()).vectors_PD.shape)
    sent = {"site-0": one, "site-1": one * 0.9, "site-2": -one, "site-3": -0.9 * one}
    state = method.aggregate(state, [ClientUpdate(n, {"delta": d}) for n, d in sent.items()], 1, model)
    before = state.arrays["prototypes_KPD"]
    assert len(before) == 2
    late = -one + 0.1 * torch.randn(one.shape, generator=torch.Generator().manual_seed(0))
    after = method.aggregate(state, [ClientUpdate("site-4", {"delta": late})], 2, model)
    clusters = after.facts["clusters"]
    assert clusters["site-4"] == clusters["site-2"] != clusters["site-0"]
    assert torch.equal(after.arrays["prototypes_KPD"][clusters["site-0"]], before[clusters["site-0"]])
    assert {n: clusters[n] for n in sent} == {n: state.facts["clusters"][n] for n in sent}


def test_the_contrast_pulls_to_the_own_prototype_and_pushes_from_others():
    random = torch.Generator().manual_seed(0)
    own, other, way = (torch.randn(3, 8, generator=random) for _ in range(3))
    step = way - 0.05 * residual._pull(way, own, other[None], 0.5)

    def cosine(a, b):
        return torch.cosine_similarity(a.flatten(), b.flatten(), dim=0)

    assert cosine(step, own) - cosine(step, other) > cosine(way, own) - cosine(way, other)
    assert residual._pull(torch.zeros(3, 8), own, other[None], 0.5).abs().max() == 0


def test_the_contrast_in_outputs_is_least_at_the_cluster_and_the_start(model):
    task = small.classes()
    batch = task.encode(small.records(2), model.backbone, small.start(model, task))
    own, start, other = torch.eye(3)
    extra = {TOWARDS: torch.stack([own, start, other]).repeat(2, 1, 1), WEIGHT: torch.tensor([[1.0, 0.1]] * 2)}

    class Silent:
        def loss(self, outputs, batch):
            return torch.zeros(2)

    quiet = replace(batch, extra=extra, task=Silent())
    near = contrastive_loss(ModelOutput(torch.stack([own + start, own + start])), quiet)
    far = contrastive_loss(ModelOutput(torch.stack([other, other])), quiet)
    assert near.max() < 0.1 < 5 < far.min()
    between = contrastive_loss(ModelOutput(torch.stack([own, own])), quiet)
    assert near.max() < between.min() < far.min()


def test_a_contrast_in_prompts_turns_personal_prompts_towards_their_cluster(model):
    """The cosine of the way from the start to the own prototype, less that to the other."""
    lead = {}
    for weight in (0.0, 5.0):
        method = fpl(contrast=ContrastiveConfig(weight=weight, space="prompt", temperature=0.2), held_back=0.0)
        own = members(model, method, cards=two_kinds())
        state, _ = small.rounds(method, own, model, RoundSchedule(4, 5, 0))
        ways = state.arrays["prototypes_KPD"] - state.arrays["start"]
        lead[weight] = 0.0
        for name, client in own.items():
            k = state.facts["clusters"][name]
            way = personal_prompt(method, client, method.make_assignment(state, client.card, 5)) - state.arrays["start"]
            cosines = torch.cosine_similarity(way.flatten()[None], ways.flatten(1))
            lead[weight] += float(cosines[k] - cosines[1 - k])
    assert lead[5.0] > lead[0.0] + 0.1


@pytest.mark.parametrize("space", ["output", "both"])
def test_a_contrast_in_outputs_is_part_of_what_is_tuned_at_home_and_of_nothing_else(model, space):
    left = {}
    for weight in (0.0, 1.0):
        method = fpl(contrast=ContrastiveConfig(weight=weight, space=space))
        own = members(model, method, cards=two_kinds())
        state, _ = small.rounds(method, own, model, RoundSchedule(3, 5, 0))
        left[weight] = (method.library_prompts(state), {n: c.client_state["residual"] for n, c in own.items()})
    assert small.same(left[0.0][0], left[1.0][0])
    assert not small.same(left[0.0][1], left[1.0][1])


def test_levels_at_home_and_elsewhere(model):
    method = fpl()
    own = members(model, method, cards=two_kinds())
    state, _ = small.rounds(method, own, model, RoundSchedule(3, 5, 0))
    found = personalization_levels(method, state, own, model, 4, 0)
    assert list(found) == ["personal", "cluster", "global"]
    assert all(score and 0 <= score["accuracy"] <= 1 for level in found.values() for score in level.values())
    plain = small.method("fedavg", EXACT)
    average = members(model, plain)
    state, _ = small.rounds(plain, average, model)
    assert list(personalization_levels(plain, state, average, model, 3, 0)) == ["global"]


def test_cards_of_words_and_numbers_make_a_state_that_can_be_kept(model):
    """Cards are public and may hold numbers; a state with them is JSON."""
    method = fpl()
    cards = [ClientCard("a", {"beds": 3, "country": "fr"}), ClientCard("b", {"beds": 90.5, "country": "fr"})]
    start = small.start(model, small.classes())
    json.dumps(method.init(FederationInfo(start, cards, 2, 2, 0)).facts)


def test_records_are_held_back_from_what_is_tuned_and_are_the_same_in_every_round(model):
    client = members(model, small.method("fpl"), 1)["site-0"]
    client.train = small.records(40)
    seen = []
    for round in (1, 2, 3):
        home = ClientSession(client, round, "fpl").local_context(0.25)
        held = set(home.holdout().items)
        learnt = {items for batch in home.batches(8, 10) for items in batch.items}
        assert len(held) == 10
        assert len(learnt) == 30
        assert not held & learnt
        seen.append(held)
    assert seen[0] == seen[1] == seen[2]
    assert len(ClientSession(client, 1, "fpl").local_context(0.0).holdout()) == 0
    client.train = small.records(MIN_HOLDOUT_RECORDS - 1)
    assert len(ClientSession(client, 1, "fpl").local_context(0.25).holdout()) == 0


def test_a_client_takes_the_most_common_of_what_is_as_good_on_what_it_held_back(model):
    """Global, cluster, a quarter, a half, all of the residual: the first that no other beats by a standard error. In the
    last third of the rounds the choice stays, and what was held back is learnt from."""
    training = small.LocalTrainingConfig(local_steps=4, batch_size=16, learning_rate=0.3)
    method = small.method("fpl", training, held_back=0.5)
    own = members(model, method, 4, cards=two_kinds(4))
    for place, client in enumerate(own.values()):
        client.train = small.records(40, place)
        if place == 3:  # here all labels are the wrong way round
            swap = {"good": "bad", "bad": "good"}
            client.train = [replace(r, fields={**r.fields, "target": swap[r.fields["target"]]}) for r in client.train]
    state, _ = small.rounds(method, own, model, RoundSchedule(5, 4, 0))
    state = replace(state, facts={**state.facts, "num_rounds": 9})
    chosen = {}
    for client in own.values():
        order = method.make_assignment(state, client.card, 6)
        run_queries(model, execute_assignment(method, client, order))
        kept, base = client.client_state, order.arrays["prompt"]
        tried = [order.arrays["global"]] + [base + share * kept["residual"] for share in (0.0, 0.25, 0.5, 1.0)]
        held = ClientSession(client, 6, "fpl").local_context(0.5).holdout()
        losses = model.answer([Query(torch.stack(tried), held)])[0].loss_KB.double()
        best = losses[losses.mean(1).argmin()]
        as_good = [i for i, x in enumerate(losses) if (x - best).mean() <= (x - best).std() / len(held) ** 0.5]
        assert torch.equal(personal_prompt(method, client, order), tried[as_good[0]])
        chosen[client.name] = as_good[0], kept["share"], kept["global"]
    assert len({place for place, *_ in chosen.values()}) > 1
    for client in own.values():
        before = client.client_state["residual"]
        order = method.make_assignment(state, client.card, 7)
        run_queries(model, execute_assignment(method, client, order))
        assert (client.client_state["share"], client.client_state["global"]) == chosen[client.name][1:]
        assert not torch.equal(client.client_state["residual"], before)
    late = members(model, method, 1, cards=two_kinds(1))["site-0"]
    late.train = small.records(40)
    order = method.make_assignment(state, late.card, 8)
    run_queries(model, execute_assignment(method, late, order))
    assert "share" in late.client_state


def test_a_run_with_noise_on_the_sum_pays_once_for_all_clusters(tmp_path):
    spent = {}
    for name, more in (("fpl", ['method.clusters="given"', 'method.by=["site"]']), ("fedavg", [])):
        result = small.run(tmp_path / name, name, *CENTRAL, *more)
        spent[name] = [(line.name, line.releases, line.noise_multiplier) for line in result.privacy.lines]
    assert spent["fpl"] == spent["fedavg"]
    assert spent["fpl"][0][:2] == ("sum", 3)


def skewed(model, method, count=4, **more) -> dict[str, Client]:
    """Clients of whose records nine in ten have one label, a different one at every other client."""
    found = members(model, method, count, **more)
    for place, client in enumerate(found.values()):
        some, label = small.records(80, place), ("good", "bad")[place % 2]
        often = [record for record in some if record.fields["target"] == label][:18]
        rare = [record for record in some if record.fields["target"] != label][:2]
        client.train = client.test = [*often, *rare]
    return found


def test_a_prompt_tuned_with_priors_favours_nobodys_label(model):
    """Eighteen good ones to two bad ones: a plain prompt learns that good is frequent, and with priors it need not."""
    favoured = {}
    for prior in (False, True):
        method = fpl(clusters="none", residual="none", label_prior=prior)
        own = dict(list(skewed(model, method).items())[:1])
        state, _ = small.rounds(method, own, model, RoundSchedule(6, 1, 0))
        batch = small.classes().encode(small.records(60, 9), model.backbone, next(iter(own.values())).start)
        answer = model.answer([Query(method.global_prompt(state)[None], batch, outputs=True)])[0]
        logits = batch.task.logits(answer.outputs_KB, batch)
        favoured[prior] = float((logits[:, 0] - logits[:, 1]).mean())
    assert favoured[False] > favoured[True] + 0.5


@pytest.mark.parametrize("name", ["fpl", "ficpd"])
def test_what_a_client_knows_of_its_labels_decides_where_the_prompt_does_not(model, name):
    method = small.method(name, EXACT, label_prior=True)
    own = skewed(model, method)
    state = method.init(FederationInfo(next(iter(own.values())).start, [c.card for c in own.values()], 1, 4, 0))
    evaluation = evaluate(method, state, own, model, 1)
    plain = evaluate(fpl(clusters="none", residual="none"), state, own, model, 1)
    assert evaluation.mean["accuracy"] > plain.mean["accuracy"] + 0.1
    assert evaluation.everyone == plain.everyone, "the prompt that all share knows no prior"
    found = personalization_levels(method, state, own, model, 1, seed=0)
    assert found["personal"]["own"]["accuracy"] > found["global"]["own"]["accuracy"]
    assert found["personal"]["others"]["accuracy"] <= found["global"]["others"]["accuracy"] + 0.1


def test_label_counts_are_a_noised_total_that_is_paid_once_and_exact_at_home(model):
    method = fpl(clusters="none", label_prior=True)
    plan = ClientWorkload(20, 1.0, EXACT.local_steps, 2, 1, 1.0, 2)
    config = record_gaussian.Config(epsilon=8.0, clip_norm=1.0, statistics={"labels": 0.1})
    own = dict(list(skewed(model, method, mechanism=record_gaussian.build(config, plan)).items())[:1])
    small.rounds(method, own, model, RoundSchedule(2, 1, 0))
    client = own["site-0"]
    assert [(line.name, line.count) for line in client.account.spent()] == [("labels", 1), ("prompt", 6)]
    exact = torch.tensor([18.5, 2.5]).log() - torch.tensor(21.0).log()
    session = ClientSession(client, 3, "fpl")
    assert small.close(session.local_context().label_prior, exact)
    assert not torch.allclose(session.label_prior, exact, atol=1e-3), "what enters an update is noised"
    assert torch.equal(session.label_prior, session.label_prior)
    assert not session.costs


@pytest.mark.slow
def test_label_priors_need_a_share_of_the_budget_and_labels(tmp_path):
    asked = ["privacy.name=record_gaussian", "privacy.epsilon=8.0", "privacy.clip_norm=0.5", "method.label_prior=true"]
    unstated = r"the statistic 'labels', which has no share .*statistics = \{ labels = 0.05 \}"
    with pytest.raises(PrivacyError, match=unstated):
        small.run(tmp_path / "a", "fpl", *asked)
    result = small.run(tmp_path / "b", "fpl", *asked, "privacy.statistics={ labels = 0.1 }")
    assert {line.name for line in result.privacy.lines} == {"prompt", "labels"}
    assert result.privacy.epsilon <= 8.0
    ratings = SimpleNamespace(tasks={"": small.numbers()}, experiment=SimpleNamespace(training=EXACT))
    with pytest.raises(ConfigError, match="label_prior = true needs labels, and its task has none"):
        build_method(ratings, {"name": "fpl", "label_prior": True})
