"""FedHPL: what a client tells of its answers, what the server makes of it for each, and what both cost."""

from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError
from torch.nn import functional as F

import small
from contracts.test_leak import deaf
from ficpd import rng
from ficpd.backbones.query_engine import QueryEngine, run_queries
from ficpd.errors import CodecError, PrivacyError
from ficpd.evaluation.evaluate import evaluate
from ficpd.experiments.config import parse
from ficpd.experiments.runner import run as run_experiment
from ficpd.federation.client import ClientSession
from ficpd.federation.execution import execute_assignment, personal_prompt
from ficpd.federation.rounds import RoundSchedule
from ficpd.interfaces import ReleaseKind
from ficpd.methods import fedhpl
from ficpd.methods.fedhpl import KNOWN, LOGITS, TARGET, WEIGHT, Config
from ficpd.privacy import accountant, client_gaussian, record_gaussian
from ficpd.types import Batch, ClientCard, ClientUpdate, ClientWorkload, FederationInfo, ModelOutput, Query, Record
from test_groups import toml as groups_toml


def answered(logits: list[list[float]], targets: list[int]) -> tuple[ModelOutput, Batch]:
    """Three labels, and these logits of each record."""
    task = small.classification.build(small.classification.Config(labels={"a": "a", "b": "b", "c": "c"}))
    batch = Batch(task, ((),) * len(targets), torch.tensor(targets), torch.eye(3), 0)
    return ModelOutput(torch.tensor(logits)), batch


def test_a_row_is_one_and_the_centred_logits_of_a_record_that_is_right():
    rows = fedhpl.logit_sums(*answered([[6.0, 0.0, 0.0], [0.0, 3.0, 0.0], [9.0, 1.0, 2.0]], [0, 1, 2]), logit_norm=4.0)
    assert rows.shape == (3, 3, 4)
    half = 0.5**0.5
    assert small.close(rows[0], half * torch.tensor([[1.0, 1.0, -0.5, -0.5], [0.0] * 4, [0.0] * 4]))
    assert small.close(rows[1, 1], half * torch.tensor([1.0, -0.25, 0.5, -0.25]))
    assert rows[2].abs().max() == 0  # misclassified


@pytest.mark.parametrize("length", [0.5, 4.0])
def test_logits_up_to_the_stated_norm_and_the_one_have_together_norm_one(length):
    centred = F.normalize(torch.tensor([2.0, -1.0, -1.0]), dim=0) * length
    rows = fedhpl.logit_sums(*answered([centred.tolist()], [0]), logit_norm=4.0)
    assert float(rows.norm()) == pytest.approx((0.5 + 0.5 * (length / 4.0) ** 2) ** 0.5)
    assert float(rows.norm()) <= 1 + 1e-6


def test_an_update_has_counts_beside_sums_of_logits(model):
    method = small.method("fedhpl", logit_norm=0.01)
    client = small.clients(model, method, 1)["site-0"]
    state = small.first_state(method, {"site-0": client})
    sent = small.update(method, client, state, model).arrays[LOGITS]
    prompt, batch = client.client_state["prompt"], client.encoded()
    answer = model.answer([Query(prompt[None], batch, outputs=True)])[0]
    logits = batch.task.logits(answer.outputs_KB, batch)
    for label in (0, 1):
        right = (batch.targets == label) & (logits.argmax(1) == label)
        centred = logits[right] - logits[right].mean(1, keepdim=True)
        assert float(sent[label, 0]) == pytest.approx(float(right.sum()), abs=1e-4)
        assert small.close(sent[label, 1:], centred.sum(0), 1e-4)


def summed(*rows: tuple[float, list[float]]) -> torch.Tensor:
    """[C, 1 + C] of each class's count and mean logits."""
    return torch.tensor([[count, *(count * value for value in mean)] for count, mean in rows])


def test_others_are_weighed_by_counts_and_the_own_share_stands_apart():
    sent = {
        "a": summed((3.0, [2.0, -2.0]), (1.0, [-1.0, 1.0])),
        "b": summed((1.0, [6.0, -6.0]), (0.0, [0.0, 0.0])),
        "c": summed((2.0, [1.0, -1.0]), (0.0, [0.0, 0.0])),
    }
    logits, known = fedhpl.personalized_logits(sent, "b", 0.25)
    of_others = (3 * 2 + 2 * 1) / 5
    assert small.close(logits[0], torch.tensor([1.0, -1.0]) * (0.25 * 6 + 0.75 * of_others))
    assert small.close(logits[1], torch.tensor([-1.0, 1.0]))  # only others have answered for it
    assert known.tolist() == [1.0, 1.0]
    alone, _ = fedhpl.personalized_logits({"b": sent["b"]}, "b", 0.25)
    assert small.close(alone[0], torch.tensor([6.0, -6.0]))  # only it has
    stranger, _ = fedhpl.personalized_logits(sent, "z", 0.25)
    assert small.close(stranger[0], torch.tensor([1.0, -1.0]) * (3 * 2 + 6 + 2) / 6)


@pytest.mark.parametrize(
    "noise", [summed((0.2, [5.0, -5.0]), (4.0, [-1.0, 1.0])), summed((5.0, [-1.0, 2.0]), (4.0, [-1.0, 1.0]))]
)
def test_a_class_without_records_or_whose_logits_are_wrong_is_left_out(noise):
    """The mean of right answers is a right answer: what is none is noise."""
    logits, known = fedhpl.personalized_logits({"a": noise}, "b", 0.5)
    assert known.tolist() == [0.0, 1.0]
    assert logits[0].abs().max() == 0


def test_the_loss_is_the_tasks_and_what_is_between_softened_answers():
    outputs, batch = answered([[2.0, 0.0, -1.0], [2.0, 0.0, -1.0], [0.5, 0.0, 1.0]], [0, 0, 2])
    wanted, tau, gamma = torch.tensor([3.0, 1.0, -4.0]), 2.0, 0.7
    weights = torch.tensor([[gamma * tau**2, tau], [0.0, tau], [gamma * tau**2, tau]])
    batch = replace(batch, extra={TARGET: torch.stack([wanted, wanted, outputs.features_RD[2]]), WEIGHT: weights})
    loss, plain = fedhpl.distillation_loss(outputs, batch), batch.task.loss(outputs, batch)
    p, q = (wanted / tau).softmax(0), (outputs.features_RD[0] / tau).softmax(0)
    assert float(loss[0] - plain[0]) == pytest.approx(float(gamma * tau**2 * (p * (p / q).log()).sum()), rel=1e-4)
    assert loss[1] == plain[1]  # a class of which nothing is known
    assert float(loss[2] - plain[2]) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize(("weight", "rounds", "alike"), [(1.0, 1, True), (1.0, 2, False), (0.0, 3, True)])
def test_the_first_round_and_all_without_weight_are_local(model, weight, rounds, alike):
    """Every step sees all records, so that what two methods do can be compared."""
    kept, exact = [], small.LocalTrainingConfig(local_steps=3, batch_size=64, learning_rate=0.1)
    for method in (small.method("fedhpl", exact, weight=weight), small.method("local", exact)):
        members = small.clients(model, method)
        small.rounds(method, members, model, RoundSchedule(rounds, 5, 0))
        kept.append({n: c.client_state["prompt"] for n, c in members.items()})
    assert all(small.close(kept[0][name], prompt, 1e-4) == alike for name, prompt in kept[1].items())


def test_a_client_nobody_knew_is_sent_what_the_others_answer(model):
    method = small.method("fedhpl")
    state, _ = small.rounds(method, small.clients(model, method), model)
    order = method.make_assignment(state, ClientCard("new"), 3)
    assert order.arrays[LOGITS].shape == (2, 2)
    new = small.clients(model, method, 1)["site-0"]
    assert torch.equal(personal_prompt(method, new, order), new.start.vectors_PD)


MEANT = {"good": ["good", "fine"], "bad": ["bad", "dull"], "warm": ["warm", "sunny"], "cold": ["cold", "icy"]}


def skewed(shares: list[float], count: int, seed: str) -> list[Record]:
    """Short sentences of four labels, in these shares."""
    random, found = rng.make_generator("skewed", seed), []
    for place in range(count):
        label = list(MEANT)[int(torch.multinomial(torch.tensor(shares), 1, generator=random))]
        words = [small.OTHER[int(torch.randint(10, (1,), generator=random))] for _ in range(1 + place % 2)]
        words.insert(1, MEANT[label][int(torch.randint(2, (1,), generator=random))])
        found.append(Record(f"{seed} {place}", {"text": " ".join(words), "target": label}))
    return found


@pytest.mark.slow
def test_where_labels_are_skewed_it_is_better_than_everybody_alone():
    """Seven tenths of a client's records have one label; asked is about all alike."""
    labels = {label: " ".join(words) for label, words in MEANT.items()}
    task = small.classification.build(small.classification.Config(labels=labels, instruction="it was"))
    training = small.LocalTrainingConfig(local_steps=4, batch_size=8, learning_rate=0.3)
    model = QueryEngine(small.backbone(width=32))
    accuracy = {"local": 0.0, "fedhpl": 0.0}
    for name in accuracy:
        for seed in (0, 1, 2):
            method = small.method(name, training)
            members = small.clients(model, method, 8, seed=seed, task=task)
            for k, client in enumerate(members.values()):
                shares = [0.7 if label == k % 4 else 0.1 for label in range(4)]
                client.train = skewed(shares, 24, f"{seed} train {k}")
                client.test = skewed([0.25] * 4, 60, f"{seed} test {k}")
            state, _ = small.rounds(method, members, model, RoundSchedule(8, 8, seed))
            accuracy[name] += evaluate(method, state, members, model, 9).mean["accuracy"] / 3
    assert accuracy["fedhpl"] > accuracy["local"] + 0.015


def private(records: int, rounds: int, **more):
    plan = ClientWorkload(records, 4 / records, small.TRAINING.local_steps, rounds, 1, 1.0, rounds, {LOGITS: 0.25})
    return record_gaussian.build(record_gaussian.Config(epsilon=2.0, delta=1e-3, clip_norm=1.0, **more), plan)


def test_the_ledger_has_a_line_of_each_release_and_the_noise_that_was_added(model):
    method, mechanism = small.method("fedhpl"), private(12, 3)
    members = small.clients(model, method, 1, mechanism=mechanism)
    client = members["site-0"]
    client.train = small.records(12)
    noised, total = [], mechanism.noisy_sum

    def watched(name, values, noise):
        drawn = noise.add_gaussian
        noise.add_gaussian = lambda v, deviation: noised.append((name, deviation)) or drawn(v, deviation)
        try:
            return total(name, values, noise)
        finally:
            noise.add_gaussian = drawn

    mechanism.noisy_sum = watched
    small.rounds(method, members, model, RoundSchedule(3, 1, 0))
    price = mechanism.cost(ReleaseKind.STATISTIC, "logits")
    assert noised == [(LOGITS, price.noise_multiplier)] * 3
    assert price.count == 1
    spent = client.account.spent()
    assert spent == sorted(mechanism.planned_costs())
    assert [line for line in spent if line.name == LOGITS] == [price._replace(count=3)]
    assert 1.9 < accountant.epsilon(spent, 1e-3) <= 2.0


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_a_share_is_about_what_the_logits_take_of_the_budget(share):
    lines = {line.name: line for line in private(200, 10, statistics={LOGITS: share}).planned_costs()}
    cost = {n: line.count * (line.sampling_rate / line.noise_multiplier) ** 2 for n, line in lines.items()}
    assert cost[LOGITS] / sum(cost.values()) == pytest.approx(share)


def test_logits_are_those_of_a_prompt_that_is_private_itself(model):
    """Under a deaf mechanism all prompts that are asked about are the same, whoever's records they are: else one record
    would move everybody's logits through the prompt, and no clip of its own row could bound that."""
    heard = []
    for seed in (1, 2):
        method, listening = small.method("fedhpl"), small.Listening(model)
        list(small.alone(method, deaf(method, model, 12, seed), listening))
        heard.append(listening.asked)
    assert len(heard[0]) == 3 * (small.TRAINING.local_steps + 1)
    assert all(torch.equal(a, b) for a, b in zip(*heard, strict=True))


def test_client_level_privacy_is_refused():
    plan = ClientWorkload(9, 1.0, 1, 1, 40, 1.0, 1, {LOGITS: 0.5})
    with pytest.raises(PrivacyError, match="logits"):
        client_gaussian.build(client_gaussian.Config(epsilon=2.0, clip_norm=1.0), plan)


@pytest.mark.parametrize("shares", [{LOGITS: 0.5, "weight": 0.5}, {"weight": 0.8}])
def test_shares_that_leave_the_prompt_nothing_are_refused(shares):
    with pytest.raises(PrivacyError, match=r"together below 1"):
        private(12, 3, statistics=shares)


def test_clients_of_another_task_do_not_count(model):
    """Its answers lie in a corner of what is sent, as large as the task with most labels needs."""
    method, start = small.method("fedhpl"), small.start(model, small.classes())
    cards = [ClientCard(name, {"group": name[0]}) for name in ("a.1", "a.2", "b.1")]
    state = method.init(FederationInfo(start, cards, 3, 3, 0, {"a": 2, "b": 3}))
    assert dict(method.update_spec(state)) == {LOGITS: (3, 4)}
    of_a = F.pad(summed((2.0, [1.0, -1.0]), (2.0, [-3.0, 3.0])), (0, 1, 0, 1))
    of_b = summed((9.0, [8.0, -4.0, -4.0]), (9.0, [-4.0, 8.0, -4.0]), (9.0, [-4.0, -4.0, 8.0]))
    sent = {"a.1": of_a, "b.1": of_b}
    state = method.aggregate(state, [ClientUpdate(n, {LOGITS: array}) for n, array in sent.items()], 1, model)
    of_second = method.make_assignment(state, cards[1], 2).arrays
    assert torch.equal(of_second[LOGITS], torch.tensor([[1.0, -1.0], [-3.0, 3.0]]))
    assert method.make_assignment(state, cards[2], 2).arrays[LOGITS].shape == (3, 3)


def test_of_several_tasks_each_tells_its_own(tmp_path):
    text = groups_toml(tmp_path, "fedhpl", 2).replace('{ up = "bad dull",', '{ odd = "twice", up = "bad dull",')
    result = run_experiment(parse(text, "groups.toml"), tmp_path / "run")
    assert result.num_clients == 6
    assert result.dropped_updates == 0
    assert result.scores.global_prompt is None


@pytest.mark.parametrize(
    "bad", [{"weight": -1}, {"temperature": 0}, {"own_share": 1.1}, {"logit_norm": 0}, {"share": 0}, {"share": 1}]
)
def test_settings_that_mean_nothing_are_refused(bad):
    with pytest.raises(ValidationError):
        Config(**bad)


def test_a_site_takes_the_servers_own_orders_and_no_others(model):
    method = small.method("fedhpl")
    members = small.clients(model, method)
    start = members["site-0"].start
    state, _ = small.rounds(method, members, model, RoundSchedule(2, len(members), 0))
    good = method.make_assignment(state, members["site-0"].card, 3)
    assert {LOGITS, KNOWN} == good.arrays.keys()
    small.refuses_all(method, start, replace(good, arrays={}))
    small.refuses_all(
        method, start, good,
        replace(good, arrays={**good.arrays, LOGITS: good.arrays[LOGITS][1:]}),
        replace(good, arrays={**good.arrays, KNOWN: 2 * good.arrays[KNOWN] + 1}),
        replace(good, arrays={**good.arrays, LOGITS: good.arrays[LOGITS] + 1e7}),
        replace(good, facts={**good.facts, "most_labels": 1}),
        replace(good, facts={**good.facts, "most_labels": 10**9}),
        replace(good, facts={**good.facts, "most_labels": 2.0}),
    )  # fmt: skip


def test_logits_of_other_labels_are_refused_before_a_record_is_drawn(model, monkeypatch):
    """With fewer rows than the client has labels, whether it fails would tell which labels were drawn."""
    method = small.method("fedhpl")
    members = small.clients(model, method)
    client = members["site-0"]
    state, _ = small.rounds(method, members, model, RoundSchedule(1, len(members), 0))
    good = method.make_assignment(state, client.card, 2)
    fewer = {LOGITS: good.arrays[LOGITS][:1, :1], KNOWN: good.arrays[KNOWN][:1]}
    monkeypatch.setattr(ClientSession, "batches", lambda *asked: pytest.fail("records were drawn"))
    with pytest.raises(CodecError, match=r"logits of 1 labels, expected 2"):
        run_queries(model, execute_assignment(method, client, replace(good, arrays=fewer)))
