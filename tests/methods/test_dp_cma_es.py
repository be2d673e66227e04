"""DP-CMA-ES: the search stays at the server; what leaves a client is one clipped and noised vector."""

from dataclasses import replace

import pytest
import torch

import left_out
import small
from ficpd import storage
from ficpd.federation import codec
from ficpd.federation.execution import personal_prompt
from ficpd.federation.rounds import RoundSchedule
from ficpd.methods.dp_cma_es import DpCmaEs
from ficpd.optimizers import LocalTrainingConfig
from ficpd.types import ClientUpdate, Query
from left_out import CLIP

TRAINING = LocalTrainingConfig(
    local_steps=2, batch_size=4, learning_rate=0.1, population=9, search_dimension=12, seed=3
)
PRIVATE = ("privacy.name=record_gaussian", "privacy.epsilon=8", "privacy.delta=1e-3")


def method(**more) -> DpCmaEs:
    return small.method("dp_cma_es", TRAINING.model_copy(update=more))  # type: ignore[return-value]


def test_one_vector_goes_up_and_no_covariance_comes_down(model):
    of = method()
    members = small.clients(model, of)
    state, reports = small.rounds(of, members, model, RoundSchedule(3, 5, 0))
    header = len(codec.encode_update(ClientUpdate("site-0", {}), 1, model.backbone.fingerprint))
    assert [report.bytes_up for report in reports] == [5 * (header + 9 * 4)] * 3
    order = of.make_assignment(state, members["site-0"].card, 4)
    assert {name: tuple(array.shape) for name, array in order.arrays.items()} == {
        "candidates_KN": (9, 12),
        "mean": (12,),
    }
    assert state.arrays["search/shape"].shape == (12, 12)


def test_an_order_asks_once_about_all_its_records(model):
    of = method()
    client = small.clients(model, of)["site-4"]
    small.update(of, client, small.first_state(of, {"site-4": client}), model)
    assert client.query_counts == {1: [9 * 2 * 4, 0]}
    assert of.local_workload(small.first_state(of, {"site-4": client})) == (1, 8)


def test_it_learns(model):
    of = method(batch_size=8, population=16)
    members = small.clients(model, of)
    state, _ = small.rounds(of, members, model, RoundSchedule(30, 5, 0))
    both = torch.stack([members["site-0"].start.vectors_PD, of.global_prompt(state)])
    losses = torch.cat([model.answer([Query(both, client.encoded())])[0].loss_KB for client in members.values()], 1)
    first, last = losses.mean(1)
    assert last < 0.95 * first
    assert torch.equal(
        personal_prompt(of, members["site-0"], of.make_assignment(state, members["site-0"].card, 31)),
        of.global_prompt(state),
    )


def test_a_search_that_is_read_from_a_checkpoint_asks_what_it_would_have_asked(model):
    of, members = method(), small.clients(model, method())
    state = small.first_state(of, members)
    for round in (1, 2, 3):
        updates = small.updates(of, members.values(), state, model, round)
        read, _ = storage.decode_state(storage.encode_state(state, {}))
        state = of.aggregate(state, updates, round, model)
        again = method().aggregate(read, updates, round, model)  # another object, as after a restart
        assert small.same(state.arrays, again.arrays)


def farthest(model, monkeypatch) -> float:
    return left_out.farthest(method(local_steps=1, batch_size=left_out.NUMBER), "losses_1K", model, monkeypatch)


def test_one_record_more_or_less_moves_what_leaves_by_at_most_the_clip_norm_over_all_candidates(model, monkeypatch):
    assert 0.9 * CLIP < farthest(model, monkeypatch) <= CLIP * (1 + 1e-4)


def test_clipping_each_loss_by_itself_would_not_hold(model, monkeypatch):
    left_out.clip_each_number(monkeypatch)
    assert farthest(model, monkeypatch) > 1.2 * CLIP


def test_a_generation_is_paid_once(tmp_path):
    result = small.run(tmp_path, "dp_cma_es", *PRIVATE, "training.population=6")
    (line,) = result.privacy.lines
    assert (line.name, line.releases) == ("prompt", 3)
    assert 7.5 < result.privacy.epsilon <= 8
    assert result.dropped_updates == 0


@pytest.mark.parametrize("changes", [
    ("compression.name=subspace", "compression.dimension=8", "training.population=8"),
    ("privacy.name=client_gaussian", "privacy.epsilon=8", "privacy.delta=1e-3", "privacy.placement=central"),
    ("method.robust={ rule = 'trimmed_mean', num_byzantine = 1 }",),
])  # fmt: skip
def test_whole_runs(tmp_path, changes):
    result = small.run(tmp_path, "dp_cma_es", *changes)
    assert result.dropped_updates == 0
    assert result.personalization.keys() == {"global"}


def test_a_site_takes_the_servers_own_orders_and_no_others(model):
    of = method()
    members = small.clients(model, of)
    start, state = members["site-0"].start, small.first_state(of, members)
    good = of.make_assignment(state, members["site-0"].card, 1)
    candidates, mean = good.arrays["candidates_KN"], good.arrays["mean"]
    small.refuses_all(
        of, start, good,
        replace(good, arrays={}),
        replace(good, arrays={"prompt": start.vectors_PD}),
        replace(good, arrays={"candidates_KN": candidates}),
        replace(good, arrays={"candidates_KN": candidates[:-1], "mean": mean}),
        replace(good, arrays={"candidates_KN": candidates.double(), "mean": mean}),
        replace(good, arrays={"candidates_KN": candidates, "mean": 40 * start.vectors_PD.flatten()[: len(mean)]}),
        replace(good, facts={"rate": 0.1}),
    )  # fmt: skip
