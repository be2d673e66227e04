"""DP-ZO: what leaves is a few numbers, what is made of them is what the clients did, and what a record can do to them."""

from dataclasses import replace

import pytest
import torch

import small
from ficpd.federation import codec
from ficpd.federation.compression import subspace
from ficpd.federation.execution import execute_assignment, personal_prompt
from ficpd.federation.rounds import RoundSchedule
from ficpd.methods import dp_zo
from ficpd.methods.dp_zo import DpZo
from ficpd.types import Assignment, ClientUpdate, Query

TRAINING = small.TRAINING.model_copy(update={"directions": 4, "seed": 3})


def method(**more) -> DpZo:
    return small.method("dp_zo", TRAINING.model_copy(update=more))  # type: ignore[return-value]


def ran(model, of: DpZo, members, rounds: int):
    return small.rounds(of, members, model, RoundSchedule(rounds, len(members), 0))[0]


def test_tens_of_bytes_go_up_and_fewer_than_a_prompts_come_down(model):
    of = method()
    members = small.clients(model, of)
    _, reports = small.rounds(of, members, model, RoundSchedule(4, 5, 0))
    header = len(codec.encode_update(ClientUpdate("site-0", {}), 1, model.backbone.fingerprint))
    assert [report.bytes_up for report in reports] == [5 * (header + 2 * 4 * 4)] * 4
    assert header + 2 * 4 * 4 < 80
    empty = len(codec.encode_assignment(Assignment("dp_zo", 1, {"moves_TK": torch.zeros(0, 4)}), "x"))
    assert all(report.bytes_down / 5 < empty + 3 * 2 * 4 * 4 + 100 for report in reports)


def test_a_long_history_gives_way_to_the_prompt_and_nothing_changes(model):
    """48 numbers are tuned, and each round makes 8 of history."""
    of = method()
    members = small.clients(model, of)
    state, kinds = small.first_state(of, members, 9), []
    for round in range(1, 10):
        order = of.make_assignment(state, members["site-0"].card, round)
        kinds.append(*order.arrays)
        both = [replace(order, arrays={name: state.arrays[name]}) for name in ("moves_TK", "y")]
        at = [personal_prompt(of, members["site-0"], one) for one in both]
        assert torch.equal(*at)
        assert torch.equal(at[0], of.global_prompt(state))
        updates = small.updates(of, members.values(), state, model, round)
        state = of.aggregate(state, updates, round, model)
    assert kinds == ["moves_TK"] * 7 + ["y"] * 2


def test_a_round_without_answers_moves_nothing_and_the_next_is_replayed_right(model):
    of = method()
    members = small.clients(model, of)
    state = small.first_state(of, members, 5)
    for round in (1, 2, 4):  # nobody came in the third
        state = of.aggregate(state, small.updates(of, [members["site-2"]], state, model, round), round, model)
    replayed = personal_prompt(of, members["site-2"], Assignment("dp_zo", 5, {"moves_TK": state.arrays["moves_TK"]}))
    assert len(state.arrays["moves_TK"]) == 8
    assert torch.equal(state.arrays["moves_TK"][4:6], torch.zeros(2, 4))
    assert torch.equal(replayed, of.global_prompt(state))


class Watched(DpZo):
    """Notes where each client's last candidates lay: halfway between them is where it stood."""

    def local_update(self, client, order):
        work, answer = super().local_update(client, order), None
        try:
            while True:
                query = work.send(answer)  # type: ignore[arg-type]
                signs = self._signs(self._space(client.start), order.round, len(client.client_state.get("seen", ())))
                answer = yield query
                slopes = (answer.loss_KB[:4] - answer.loss_KB[4:]).mean(1) / (2 * order.facts["rate"] * 4**0.5)
                stood = (query.prompts_KPD[:4] + query.prompts_KPD[4:]).mean(0) / 2
                moved = stood.flatten() - order.facts["step"] * (slopes @ signs)
                seen = client.client_state.get("seen", moved[:0].view(0, len(moved)))
                client.client_state["seen"] = torch.cat([seen, moved[None]])
        except StopIteration as end:
            return end.value


def test_the_servers_replay_is_the_mean_of_the_clients_own_steps(model):
    of = Watched(dp_zo.Config(), TRAINING.model_copy(update={"batch_size": 99}))
    members = small.clients(model, of, 2)
    state = small.first_state(of, members, 4)
    for round in (1, 2, 3):
        for client in members.values():
            client.client_state = {}
        updates = small.updates(of, members.values(), state, model, round)
        state = of.aggregate(state, updates, round, model)
        if round > 1:  # in the first they do not know how far to go
            weights = torch.tensor([float(len(client.train)) for client in members.values()])
            stood = torch.stack([client.client_state["seen"][-1] for client in members.values()])
            mean = (weights / weights.sum()) @ stood
            assert small.close(of.global_prompt(state).flatten(), mean, 1e-5)


def test_it_learns(model):
    of = method(local_steps=5, directions=8, batch_size=16)
    members = small.clients(model, of)
    state = ran(model, of, members, 12)
    start = members["site-0"].start.vectors_PD
    both = torch.stack([start, of.global_prompt(state)])
    losses = torch.cat([model.answer([Query(both, client.encoded())])[0].loss_KB for client in members.values()], 1)
    first, last = losses.mean(1)
    assert last < 0.9 * first


def test_all_clients_try_the_same_directions(model):
    of = method()
    members = small.clients(model, of)
    state = small.first_state(of, members)
    orders = [(client, of.make_assignment(state, client.card, 1)) for client in members.values()]
    queries = [next(execute_assignment(of, *order)) for order in orders]
    assert all(torch.equal(queries[0].prompts_KPD, query.prompts_KPD) for query in queries)


@pytest.mark.parametrize("directions", ["gradient", "random"])
def test_in_a_subspace_both_halves_know_where_they_are(tmp_path, directions):
    changes = ("compression.name=subspace", "compression.dimension=8", f"compression.directions={directions}")
    result = small.run(tmp_path, "dp_zo", *changes, "training.directions=3")
    assert result.dropped_updates == 0
    assert result.personalization.keys() == {"global"}  # what clients rebuild is the server's prompt, bit for bit


def test_what_it_leaves_lies_in_the_subspace(model):
    task = small.classes()
    start = small.start(model, task)
    compression = subspace.build(subspace.Config(dimension=6, directions="random"), start, 0)
    of = method()
    of.bind(compression.subspace)
    members = small.clients(model, of, compression=compression)
    delta = of.global_prompt(ran(model, of, members, 3)) - start.vectors_PD
    assert float(delta.norm()) > 1e-3
    assert small.close(compression.subspace.lift(compression.subspace.project(delta)), delta, 1e-5)  # type: ignore[union-attr]


@pytest.mark.parametrize("how", ["local", "central"])
def test_client_level_noise(tmp_path, how):
    level = ("privacy.name=client_gaussian", "privacy.epsilon=8", "privacy.delta=1e-3", f"privacy.placement={how}")
    result = small.run(tmp_path, "dp_zo", *level)
    assert result.privacy.unit == "client"
    assert result.dropped_updates == 0
    assert 0.05 < result.privacy.clip_norm < 0.5  # slopes of 0.1 to 0.2 in two steps; a prompt's way would be 0.7


def test_a_site_takes_the_servers_own_orders_and_no_others(model):
    of = method()
    members = small.clients(model, of)
    start, state = members["site-0"].start, ran(model, of, members, 3)
    good = of.make_assignment(state, members["site-0"].card, 4)
    y, moves = state.arrays["y"], good.arrays["moves_TK"]
    small.refuses_all(
        of, start, good,
        replace(good, arrays={"y": y, "moves_TK": moves}),
        replace(good, arrays={"y": y[:-1]}),
        replace(good, arrays={"y": y.double()}),
        replace(good, arrays={"y": 40 * start.vectors_PD.flatten()}),
        replace(good, facts={**good.facts, "rate": 1e3}),
        replace(good, arrays={"moves_TK": torch.zeros(99, 4)}),
        replace(good, arrays={"moves_TK": torch.zeros(8)}),
        replace(good, facts={**good.facts, "rate": 0.0}),
        replace(good, facts={**good.facts, "rate": True}),
    )  # fmt: skip
