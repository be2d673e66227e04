"""What a prompt is worth: on everybody's records and on each client's own."""

import pytest
import torch

import small
from ficpd.evaluation.evaluate import client_mean, evaluate, score_prompt, worst_client
from ficpd.evaluation.metrics import main_metric
from ficpd.federation.execution import personal_prompt


def test_every_client_is_scored_on_its_own_records_with_its_own_prompt(model):
    method = small.method("local")
    members = small.clients(model, method)
    for place, client in enumerate(members.values()):
        client.test = small.records(4 + place, 50 + place)
    members["site-2"].test = []
    state, _ = small.rounds(method, members, model)
    found = evaluate(method, state, members, model, 3)
    assert found.everyone is None
    assert sorted(found.own) == ["site-0", "site-1", "site-3", "site-4"]
    for name, score in found.own.items():
        client = members[name]
        order = method.make_assignment(state, client.card, 3)
        prompt = personal_prompt(method, client, order)
        assert torch.equal(prompt, client.client_state["prompt"])
        targets = client.task.targets(client.test)
        assert score == score_prompt(client.task, prompt, client.encoded("test"), targets, model)
    assert (found.mean, found.worst) == (client_mean(found.own), worst_client(found.own))


@pytest.mark.parametrize("name", ["fedavg", "ficpd"])
def test_everyones_score_is_that_of_one_prompt_on_all_records(model, name):
    method = small.method(name)
    members = small.clients(model, method)
    for place, client in enumerate(members.values()):
        client.test = small.records(3 + place, 50 + place)
    state, _ = small.rounds(method, members, model)
    everyone = [record for client in members.values() for record in client.test]
    task, begin = members["site-0"].task, members["site-0"].start
    batch = task.encode(everyone, model.backbone, begin)
    alone = score_prompt(task, method.global_prompt(state), batch, task.targets(everyone), model)
    assert evaluate(method, state, members, model, 3).everyone == pytest.approx(alone)


def test_evaluating_changes_nothing_and_asks_no_training_record(model):
    method = small.method("local")
    members = small.clients(model, method)
    state = small.first_state(method, members)
    for client in members.values():
        client.train = []
    assert evaluate(method, state, members, model, 1).own.keys() == members.keys()
    assert all(client.client_state == {} for client in members.values())


def test_each_client_counts_once_and_the_worst_is_the_worst():
    scores = {"a": {"accuracy": 1.0, "f1": 0.5}, "b": {"accuracy": 0.5, "f1": 1.0}}
    assert client_mean(scores) == {"accuracy": 0.75, "f1": 0.75}
    assert worst_client(scores) == {"accuracy": 0.5, "f1": 0.5}
    numbers = {"a": {"rmse": 1.0, "pearson": 0.9}, "b": {"rmse": 3.0}, "c": {"rmse": 2.0, "pearson": -0.5}}
    assert client_mean(numbers) == {"rmse": 2.0, "pearson": pytest.approx(0.2)}
    assert worst_client(numbers) == {"rmse": 3.0, "pearson": -0.5}


@pytest.mark.parametrize(("score", "shown"), [
    ({"f1": 0.5, "accuracy": 0.8125}, "accuracy % 81.2"),
    ({"pearson": 0.1, "rmse": 0.8125}, "rmse 0.812"),
    ({"bleu": 41.26, "chrf": 60.0}, "bleu 41.3"),
    ({"regret": 0.5}, "regret 0.500"),
])  # fmt: skip
def test_a_task_is_known_by_its_main_figure(score, shown):
    main = main_metric(score)
    assert f"{main.name}{main.unit} {main.shown(score[main.name])}" == shown
