"""No method releases anything of a record but through `Mechanism.noisy_mean` and `Mechanism.noisy_sum`.

Every method runs under a mechanism that is deaf: its averages are the same whatever the records say. Then two clients
with different records must send the same bytes. A method that averages records by itself, sends a loss, or weighs by
a count does not.
"""

from typing import Any, Literal, get_args, get_origin

import pytest
import torch
from pydantic import ValidationError

import small
from ficpd.errors import ConfigError, PrivacyError
from ficpd.federation import codec
from ficpd.federation.client import LABELS, Client, ClientSession
from ficpd.methods.fedavg import FedAvg
from ficpd.privacy.none import NoPrivacy
from ficpd.registry import load, names
from ficpd.types import ClientUpdate, Query


class Deaf(NoPrivacy):
    """Averages are noise and nothing else; every client is asked about its first four records."""

    unit = "record"

    def sample(self, num_records, expected_batch, steps, noise):
        return [torch.arange(4) for _ in range(steps)]

    def noisy_mean(self, values_KB, expected_batch, noise, grad_scale=None):
        return noise.add_gaussian(torch.zeros(len(values_KB), *values_KB.shape[2:]), 1.0)

    def noisy_sum(self, name, chunks, noise):
        first, *_ = chunks
        return noise.add_gaussian(torch.zeros(first.shape[1:]), 1.0)


def deaf(method, model, count: int, seed: int) -> Client:
    """A lone client under the deaf mechanism, with records of this seed."""
    client = next(iter(small.clients(model, method, 1, mechanism=Deaf()).values()))
    client.train = small.records(count, seed)
    return client


def sent(method, model, count: int, seed: int) -> list[bytes]:
    """What one client sends in three rounds, as the server gets it."""
    client, bodies = deaf(method, model, count, seed), []
    state = small.first_state(method, {client.name: client}, 3, readable=model)
    for round in (1, 2, 3):
        update = small.update(method, client, state, model, round)
        bodies.append(codec.encode_update(update, round, model.backbone.fingerprint))
        state = method.aggregate(state, [update], round, model)
    return bodies


def leaks(method, model) -> bool:
    whole = sent(method, model, 12, seed=1)
    return any(sent(method, model, *other) != whole for other in ((12, 2), (15, 3), (9, 4)))


@pytest.mark.parametrize("name", names("methods"))
def test_a_method_lets_out_only_what_the_mechanism_averaged(name, model):
    assert not leaks(small.method(name), model)


def options(name: str) -> list[dict[str, Any]]:
    """Each switch and each choice of a method's settings that its default is not."""
    found = []
    for field, about in load("methods", name).Config.model_fields.items():
        kinds = [about.annotation, *get_args(about.annotation)]
        values = [value for kind in kinds if get_origin(kind) is Literal for value in get_args(kind)]
        values += [True, False] if bool in kinds else []
        found += [{field: value} for value in values if value != about.default and field != "name"]
    return found


def chosen(name: str, option: dict[str, Any]) -> Any:
    try:
        return small.method(name, **option)
    except (ConfigError, ValidationError, PrivacyError):
        return None


OPTIONS = [(name, option) for name in names("methods") for option in options(name) if chosen(name, option)]


@pytest.mark.parametrize(("name", "option"), OPTIONS, ids=lambda value: str(value))
def test_a_method_lets_out_no_more_with_any_of_its_options(name, option, model):
    assert not leaks(chosen(name, option), model)


def test_what_a_client_tells_its_method_of_all_records_comes_from_the_mechanism(model):
    """The prior goes into each record's gradient, and the weight to the server: exact ones would depend on all records."""
    told = []
    for count, seed in ((12, 1), (12, 2), (15, 3)):
        client = next(iter(small.clients(model, small.method("fedavg"), 1, mechanism=Deaf()).values()))
        client.train = small.records(count, seed)
        session = ClientSession(client, 1, "fedavg", [LABELS])
        told.append((session.label_prior.tolist(), session.weight))
    assert told == [told[0]] * 3


@pytest.mark.parametrize("name", names("methods"))
def test_a_method_that_says_nothing_leaves_sends_nothing(name, model):
    method = small.method(name)
    if not method.capabilities.releases:
        assert dict(method.update_spec(small.first_state(method, small.clients(model, method)))) == {}


class AveragesByItself(FedAvg):
    """The mean of the batch's gradients, past the mechanism."""

    def local_update(self, client, order):
        prompt = order.arrays["prompt"]
        for batch in client.batches(1, 4):
            answer = yield Query(prompt[None], batch, grad=True)
            client.private_mean(answer.grad_KBPD)
            return ClientUpdate(client.id, {"delta": -answer.grad_KBPD[0].mean(0)})


class SendsItsLoss(FedAvg):
    def local_update(self, client, order):
        update = yield from super().local_update(client, order)
        for batch in client.batches(1, 4):
            answer = yield Query(order.arrays["prompt"][None], batch)
            return ClientUpdate(client.id, {"delta": update.arrays["delta"] + answer.loss_KB.sum()})


class ScalesByCount(FedAvg):
    def local_update(self, client, order):
        update = yield from super().local_update(client, order)
        return ClientUpdate(client.id, {"delta": update.arrays["delta"] * len(client.client.train)})


class KeepsAndSendsLater(FedAvg):
    """What stays at the client may depend on records; what is sent of it later may not."""

    def local_update(self, client, order):
        kept = client.client_state.get("x", torch.zeros_like(order.arrays["prompt"]))
        for batch in client.batches(1, 4):
            answer = yield Query(order.arrays["prompt"][None], batch, grad=True)
            client.client_state["x"] = answer.grad_KBPD[0, 0]
        return ClientUpdate(client.id, {"delta": kept})


@pytest.mark.parametrize("bad", [AveragesByItself, SendsItsLoss, ScalesByCount, KeepsAndSendsLater])
def test_a_method_that_lets_records_out_is_found(bad, model):
    assert leaks(bad(small.TRAINING), model)


class WeighsByLoss(FedAvg):
    """The weight is the door's, whatever the method makes up."""

    def local_update(self, client, order):
        update = yield from super().local_update(client, order)
        for batch in client.batches(1, 4):
            answer = yield Query(order.arrays["prompt"][None], batch)
            return ClientUpdate(client.id, update.arrays, float(answer.loss_KB.sum()))


def test_a_weight_that_a_method_made_up_does_not_leave(model):
    assert not leaks(WeighsByLoss(small.TRAINING), model)
