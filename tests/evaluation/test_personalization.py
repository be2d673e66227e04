"""The levels of a method's prompts, where some clients were never heard."""

import pytest
import torch

import small
from ficpd.evaluation import personalization as module
from ficpd.evaluation.personalization import personalization_levels
from ficpd.experiments.report.build import page_of
from ficpd.federation.rounds import RoundSchedule
from ficpd.types import Predictor

RARELY = ("method.gather=false", "method.num_prototypes=2", "federation.clients_per_round=1")


@pytest.mark.parametrize("seed", range(4))
def test_a_run_ends_where_some_clients_were_never_heard(tmp_path, seed):
    found = small.run(tmp_path, "ficpd", *RARELY, rounds=2, seed=seed)
    assert 1 <= len(found.clusters.member) < 3
    assert "global" in found.personalization
    assert page_of(tmp_path / "run").sections


def test_every_level_is_of_the_same_clients(model, monkeypatch):
    """A client that was never heard has no cluster's prompt, and is not left out of the clusters' figure for it."""
    method = small.method("ficpd", gather=False, num_prototypes=2, local_model="prototype")
    clients = small.clients(model, method)
    state, _ = small.rounds(method, clients, model, RoundSchedule(2, 2, 0))
    member = state.facts["clusters"]
    assert 2 <= len(member) < len(clients)
    sent = {n: method.make_assignment(state, client.card, 3).arrays["prompt"] for n, client in clients.items()}
    models = module._levels(method, state, clients, {n: [Predictor(prompt)] for n, prompt in sent.items()}, member)
    assert list(models) == ["cluster", "global"]
    assert all(of.keys() == clients.keys() for of in models.values())
    for name, (predictor,) in models["cluster"].items():
        assert torch.equal(predictor.prompt_PD, sent[name])
        assert name in member or torch.equal(predictor.prompt_PD, method.global_prompt(state))
    counted = []
    monkeypatch.setattr(module, "client_mean", lambda scores: counted.append(set(scores)) or {"accuracy": 1.0})
    personalization_levels(method, state, clients, model, 3, 0)
    assert counted[0] == counted[2] == clients.keys()
    assert counted[1] == counted[3]
