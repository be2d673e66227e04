"""PromptDPSGD: `local` with a mechanism: what a user of the prompt may learn is paid for, though nothing leaves."""

from dataclasses import replace

import pytest
import torch

import small
from contracts.test_leak import deaf
from ficpd.errors import PrivacyError
from ficpd.federation.execution import personal_prompt
from ficpd.federation.rounds import RoundSchedule
from ficpd.methods.prompt_dpsgd import PromptDpsgd
from ficpd.privacy import record_gaussian
from ficpd.types import ClientWorkload, Query

STRONG = small.LocalTrainingConfig(local_steps=4, batch_size=8, learning_rate=0.1)
CLIENT = ("privacy.name=client_gaussian", "privacy.epsilon=8", "privacy.delta=1e-3", "privacy.clip_norm=1")


def prompts(method, state, members) -> dict[str, torch.Tensor]:
    return {n: personal_prompt(method, c, method.make_assignment(state, c.card, 9)) for n, c in members.items()}


def test_without_privacy_it_is_local(model):
    """Every step sees all records: the two methods draw them in orders of their own."""
    found = []
    for name in ("prompt_dpsgd", "local"):
        method = small.method(name, small.LocalTrainingConfig(local_steps=3, batch_size=64, learning_rate=0.1))
        members = small.clients(model, method, 3)
        state, _ = small.rounds(method, members, model, RoundSchedule(3, 3, 0))
        found.append(prompts(method, state, members))
    assert all(small.close(found[0][name], prompt) for name, prompt in found[1].items())


def test_all_that_is_tuned_is_deaf_under_a_deaf_mechanism(model):
    """The prompt and what the optimizer remembers, whoever's records they are."""
    kept = []
    for seed in (1, 2):
        method = small.method("prompt_dpsgd", STRONG)
        client = deaf(method, model, 12, seed)
        assert all(update.arrays == {} for update in small.alone(method, client, model))
        kept.append(client.client_state)
    assert small.same(*kept)
    assert not small.close(kept[0]["prompt"], client.start.vectors_PD, 1e-3)


def private(number: int, records: int, rounds: int, epsilon: float = 2.0):
    plan = ClientWorkload(records, min(8, records) / records, STRONG.local_steps, rounds, number, 1.0, rounds)
    return record_gaussian.build(record_gaussian.Config(epsilon=epsilon, delta=1e-3, clip_norm=1.0), plan)


def test_each_step_is_paid_for_and_the_plan_is_what_is_spent(model):
    mechanism = private(1, 5, 3)
    method = small.method("prompt_dpsgd", STRONG)
    members = small.clients(model, method, 1, mechanism=mechanism)
    small.rounds(method, members, model, RoundSchedule(3, 1, 0))
    spent = members["site-0"].account.spent()
    assert spent == list(mechanism.planned_costs())
    assert spent[0].count == 3 * STRONG.local_steps


def test_a_small_epsilon_costs_what_was_learned_and_a_large_one_leaves_some(model):
    """On the clients' own records, from the start: without privacy it is learned, at ε = 0.2 it is not."""
    gained = {}
    for epsilon in (None, 20.0, 0.2):
        mechanism = private(3, 40, 8, epsilon) if epsilon else None
        method = small.method("prompt_dpsgd", STRONG)
        members = small.clients(model, method, 3, mechanism=mechanism)
        for place, client in enumerate(members.values()):
            client.train = small.records(40, place)
        state, _ = small.rounds(method, members, model, RoundSchedule(8, 3, 0))
        losses = []
        for name, prompt in prompts(method, state, members).items():
            asked = Query(torch.stack([members[name].start.vectors_PD, prompt]), members[name].encoded())
            losses.append(model.answer([asked])[0].loss_KB)
        before, after = torch.cat(losses, 1).mean(1).tolist()
        gained[epsilon] = before - after
    assert gained[None] > 0.15
    assert gained[0.2] < 0.5 * gained[20.0]
    assert gained[20.0] < gained[None]


@pytest.mark.parametrize("placement", ["local", "central"])
def test_client_level_noise_has_nothing_to_be_added_to(tmp_path, placement, monkeypatch):
    """Neither as the method declares itself, nor where it declares a form that it does not have."""
    declared = replace(PromptDpsgd.capabilities, private_units=("record", "client"), linear=True)
    for capabilities in (PromptDpsgd.capabilities, declared):
        monkeypatch.setattr(PromptDpsgd, "capabilities", capabilities)
        with pytest.raises(PrivacyError, match="record_gaussian"):
            small.run(tmp_path, "prompt_dpsgd", *CLIENT, f"privacy.placement={placement}")


@pytest.mark.parametrize("name", ["prompt_dpsgd", "local"])
def test_a_site_takes_the_servers_own_orders_and_no_others(model, name):
    method = small.method(name)
    members = small.clients(model, method)
    start, state = members["site-0"].start, small.first_state(method, members)
    good = method.make_assignment(state, members["site-0"].card, 1)
    small.refuses_all(
        method, start, good,
        replace(good, arrays={"prompt": start.vectors_PD}),
    )  # fmt: skip
