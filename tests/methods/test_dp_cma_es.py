"""DP-CMA-ES: the search stays at the server; what leaves a client is one clipped and noised vector."""

from dataclasses import replace

import pytest
import torch

import small
from ficpd.federation import codec
from ficpd.federation.execution import personal_prompt
from ficpd.federation.rounds import RoundSchedule
from ficpd.methods.dp_cma_es import DpCmaEs
from ficpd.types import ClientUpdate, Query

TRAINING = small.TRAINING.model_copy(update={"population": 9, "search_dimension": 12, "seed": 3})


def method(**more) -> DpCmaEs:
    return small.method("dp_cma_es", TRAINING.model_copy(update=more))  # type: ignore[return-value]


def test_one_vector_goes_up_and_no_covariance_comes_down(model):
    of = method()
    members = small.clients(model, of)
    state, reports = small.rounds(of, members, model, RoundSchedule(3, 5, 0))
    header = len(codec.encode_update(ClientUpdate("site-0", {}), 1, model.backbone.fingerprint))
    assert [report.bytes_up for report in reports] == [5 * (header + 9 * 4)] * 3
    order = of.make_assignment(state, members["site-0"].card, 4)
    shapes = {name: tuple(array.shape) for name, array in order.arrays.items()}
    assert shapes == {"candidates_KN": (9, 12), "mean": (12,)}
    beyond = {**order.arrays, "mean": 40 * members["site-0"].start.vectors_PD.flatten()[:12]}
    small.refuses_all(of, members["site-0"].start, order, replace(order, arrays=beyond))
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
    last = of.make_assignment(state, members["site-0"].card, 31)
    assert torch.equal(personal_prompt(of, members["site-0"], last), of.global_prompt(state))


@pytest.mark.parametrize("changes", [
    ("compression.name=subspace", "compression.dimension=8", "training.population=8"),
    ("privacy.name=client_gaussian", "privacy.epsilon=8", "privacy.delta=1e-3", "privacy.placement=central"),
    ("method.robust={ rule = 'trimmed_mean', num_byzantine = 1 }",),
])  # fmt: skip
def test_whole_runs(tmp_path, changes):
    result = small.run(tmp_path, "dp_cma_es", *changes)
    assert result.dropped_updates == 0
    assert result.personalization.keys() == {"global"}
