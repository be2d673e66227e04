"""FedBPT: a search at the clients, and one of what they found; its step sizes, its ratio of losses, its bytes."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest
import torch

import small
from ficpd.backbones.query_engine import run_queries
from ficpd.errors import BackboneError, ConfigError, PrivacyError
from ficpd.federation import codec
from ficpd.federation.client import Client, ClientSession
from ficpd.federation.rounds import RoundSchedule
from ficpd.methods.fedbpt import FedBpt
from ficpd.tasks import corrupt_words
from ficpd.types import Answer, ClientUpdate, Query


def method(**config) -> FedBpt:
    return small.method("fedbpt", **config)  # type: ignore[return-value]


class Bowls:
    """Stands where a backbone would. Half of the clients agree on where the bottom is; the others' labels are noise: their
    bottom is elsewhere, each its own, and their losses are high everywhere."""

    def __init__(self, model, members: Mapping[str, Client]):
        self.backbone = model.backbone
        self.owner = {items: name for name, client in members.items() for items in client.encoded().items}
        random = torch.Generator().manual_seed(0)
        self.bottom = dict.fromkeys(members, torch.full((48,), 2.0))
        self.height = dict.fromkeys(members, 1.0)
        for name in sorted(members)[::2]:
            self.bottom[name], self.height[name] = 4 * torch.randn(48, generator=random), 500.0

    def loss(self, prompts_KPD: torch.Tensor, name: str) -> torch.Tensor:
        return (prompts_KPD.flatten(1) - self.bottom[name]).square().sum(1) + self.height[name]

    def answer(self, queries: Sequence[Query]) -> list[Answer]:
        losses = [self.loss(query.prompts_KPD, self.owner[query.batch.items[0]]) for query in queries]
        return [Answer(loss_K[:, None].expand(-1, len(q.batch))) for loss_K, q in zip(losses, queries, strict=True)]


class Averages(FedBpt):
    """Its clients, and a server that does nothing but average what they found."""

    def aggregate(self, state, updates, round, model):
        mean = torch.stack([update.arrays["mean_1N"][0] for update in updates]).mean(0).double()
        return replace(state, arrays={**state.arrays, "search/mean": mean})


@pytest.mark.slow
def test_it_is_not_led_astray_by_clients_with_noisy_labels_as_plain_averages_are(model):
    """With the same queries: those whose losses are high are not among the parents of the next generation."""
    left = {}
    for kind in (FedBpt, Averages):
        of = kind(type(method().config)(ratio=False, dimension=48), small.TRAINING)
        members = small.clients(model, of, 6)
        bowls, state = Bowls(model, members), small.first_state(of, members, 40)
        for round in range(1, 41):
            state = of.aggregate(state, small.updates(of, members.values(), state, bowls, round), round, bowls)  # type: ignore[arg-type]
        left[kind] = float(bowls.loss(of.global_prompt(state)[None], "site-1")) - 1
    first = float(bowls.loss(members["site-0"].start.vectors_PD[None], "site-1")) - 1
    assert left[Averages] < first
    assert left[FedBpt] < 0.3 * left[Averages]


def updates_of(means: dict[str, float], losses: dict[str, float], sigmas: dict[str, list[float]], size: int):
    return [
        ClientUpdate(name, {
            "mean_1N": torch.full((1, size), means[name]), "loss": torch.tensor([losses[name]]),
            "sigmas": torch.tensor(sigmas[name]),
        })
        for name in means
    ]  # fmt: skip


def test_the_servers_step_size_is_that_of_the_better_half(model, monkeypatch):
    """Equation 6: 2 √(Σ over the better half, and their generations, of σ² / (clients · population))."""
    from ficpd.methods import fedbpt

    of, given = method(iterations=2, population=5, dimension=6), []
    original = fedbpt.CMAES
    monkeypatch.setattr(
        fedbpt, "CMAES", lambda state, *more: given.append(float(state["sigma"])) or original(state, *more)
    )
    state = small.first_state(of, small.clients(model, of))
    losses = {"a": 0.1, "b": 0.4, "c": 0.2, "d": 0.3}
    sigmas = {"a": [1.0, 2.0], "b": [50.0, 50.0], "c": [3.0, 4.0], "d": [60.0, 60.0]}
    after = of.aggregate(state, updates_of(dict.fromkeys(losses, 0.1), losses, sigmas, 6), 1, model)
    assert given == [pytest.approx(2 * ((1 + 4 + 9 + 16) / (4 * 5)) ** 0.5)]
    found = float(after.arrays["search/sigma"])
    assert after.facts["sigma"] == pytest.approx(state.facts["sigma"] * found / given[0])


def test_the_server_goes_to_where_losses_are_small(model):
    of = method(dimension=6)
    state = small.first_state(of, small.clients(model, of))
    losses = {"a": 0.1, "b": 0.9, "c": 0.2, "d": 0.8}
    means = {"a": 1.0, "b": -1.0, "c": 1.0, "d": -1.0}
    after = of.aggregate(state, updates_of(means, losses, dict.fromkeys(means, [0.5] * 8), 6), 1, model)
    assert small.close(after.arrays["search/mean"].float(), torch.ones(6), 1e-5)


def test_fewer_than_four_are_averaged(model):
    of = method(dimension=6)
    state = small.first_state(of, small.clients(model, of))
    means = {"a": 1.0, "b": 0.0, "c": 2.0}
    after = of.aggregate(state, updates_of(means, means, dict.fromkeys(means, [0.5] * 8), 6), 1, model)
    assert small.close(after.arrays["search/mean"].float(), torch.ones(6), 1e-5)
    assert after.facts["sigma"] == state.facts["sigma"]


def test_what_travels_is_counted_as_it_is_encoded(model):
    of = method(dimension=20)
    members = small.clients(model, of)
    _, (report, *_) = small.rounds(of, members, model, RoundSchedule(1, 5, 0))
    header = len(codec.encode_update(ClientUpdate("site-0", {}), 1, model.backbone.fingerprint))
    assert report.bytes_up == 5 * (header + 4 * (20 + 1 + 8))
    assert report.bytes_down > 5 * 4 * (20 + 20 * 21 // 2)


def test_the_fitness_is_the_loss_over_that_of_the_masked_twins(model):
    of = method(masked=0.6)
    client = small.clients(model, of)["site-4"]
    session = ClientSession(client, 1, "fedbpt")
    batch = next(iter(session.batches(1, 99)))
    prompts = torch.stack([client.start.vectors_PD, client.start.vectors_PD + 0.3])
    plain, twins = (model.answer([Query(prompts, b)])[0].loss_KB for b in (batch, session.corrupted_batch(0.6)))
    space = of._space(client.start.vectors_PD)
    candidates = torch.stack([torch.zeros(space.size), torch.full((space.size,), 0.3)])
    found = run_queries(model, of._fitness(session, candidates, batch))
    assert small.close(found, plain.mean(1) / twins.mean(1), 1e-4)
    assert not small.close(plain, twins, 1e-3)


def test_a_share_of_the_words_falls_each_by_itself(model):
    records = small.records(200, 3)
    twins = corrupt_words(records, 0.4, model.backbone, 7)
    pairs = [
        pair for one, two in zip(records, twins, strict=True)
        for pair in zip(one.fields["text"].split(), two.fields["text"].split(), strict=True)
    ]  # fmt: skip
    assert sum(one != two for one, two in pairs) / len(pairs) == pytest.approx(0.4, abs=0.05)
    assert [two.fields["target"] for two in twins] == [one.fields["target"] for one in records]
    assert corrupt_words(records, 0.4, model.backbone, 7) == twins
    assert corrupt_words(records, 0.4, model.backbone, 8) != twins


def test_twins_are_those_of_the_batch_and_the_same_all_through_an_order(model):
    session = ClientSession(small.clients(model, method())["site-4"], 1, "fedbpt")
    all_of_them = session.client.encoded()
    places = {items: place for place, items in enumerate(all_of_them.items)}
    seen: dict[int, object] = {}
    for batch in session.batches(3, 5):
        twins = session.corrupted_batch(0.5)
        assert torch.equal(twins.targets, batch.targets)  # type: ignore[arg-type]
        for items, twin in zip(batch.items, twins.items, strict=True):
            assert seen.setdefault(places[items], twin) is twin
    with pytest.raises(AssertionError, match="draw a batch first"):
        ClientSession(session.client, 1, "fedbpt").corrupted_batch(0.5)


def test_the_plain_loss_asks_half_as_much(model):
    counts = {}
    for ratio in (True, False):
        of = method(ratio=ratio, dimension=6)
        client = small.clients(model, of)["site-4"]
        small.update(of, client, small.first_state(of, {"site-4": client}), model)
        counts[ratio] = client.query_counts[1]
        assert client.query_counts[1][0] == round(of.capabilities.candidates * 9 * 13)
    assert counts == {True: [2 * 41 * 13, 0], False: [41 * 13, 0]}


def test_as_a_baseline_of_a_private_run_it_is_refused_before_anything_runs(tmp_path):
    private = ("privacy.name=record_gaussian", "privacy.epsilon=8", "privacy.delta=1e-3")
    with pytest.raises(PrivacyError, match="use dp_cma_es"):
        small.run(tmp_path, "fedavg", *private, 'baselines=["fedbpt"]')
    assert not (tmp_path / "run").exists()
    small.run(tmp_path, "fedavg", *private, 'baselines=["fedbpt:none"]')


def test_images_have_no_words_to_mask(model):
    model.backbone.modality = "image"
    with pytest.raises(ConfigError, match="set it to false"):
        method().check_compatible([small.classes()], model.backbone)
    with pytest.raises(BackboneError, match="only words can be masked"):
        corrupt_words(small.records(2), 0.5, model.backbone, 0)
    method(ratio=False).check_compatible([small.classes()], model.backbone)


def test_a_site_takes_the_servers_own_orders_and_no_others(model):
    of = method(dimension=6)
    members = small.clients(model, of)
    start, state = members["site-0"].start, small.first_state(of, members)
    good = of.make_assignment(state, members["site-0"].card, 1)
    small.refuses_all(
        of, start, good,
        replace(good, arrays={**good.arrays, "mean": torch.zeros(7)}),
        replace(good, facts={"sigma": 0.0}),
        replace(good, arrays={**good.arrays, "mean": good.arrays["mean"] + 1e6}),
    )  # fmt: skip


def test_a_better_half_that_never_moved_leaves_the_step_size_as_it_was(model):
    of = method(dimension=6)
    state = small.first_state(of, small.clients(model, of))
    still = {"mean_1N": torch.zeros(1, 6), "loss": torch.ones(1), "sigmas": torch.zeros(of.config.iterations)}
    after = of.aggregate(state, [ClientUpdate(f"site-{i}", dict(still)) for i in range(4)], 1, model)
    assert 0 < after.facts["sigma"] < float("inf")
    assert of.global_prompt(after).isfinite().all()
