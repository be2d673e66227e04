"""Clients' states lie on disk: they come back as they were, after a kill too, and few of them are in memory."""

import stat
from pathlib import Path

import pytest
import torch

import small
from ficpd.errors import RunError
from ficpd.federation.client import ClientSession
from ficpd.federation.client_states import FILE, ClientStates, StoredState


def state(number: float) -> dict[str, torch.Tensor]:
    return {"prompt": torch.full((4, 8), number), "adam/step": torch.tensor(int(number))}


@pytest.fixture
def members(model):
    found = small.clients(model, small.method("local"))
    found["north/site 0"] = found.pop("site-0")
    return found


def resumed(folder: Path, model, rounds: int, number: int) -> dict:
    """The clients of a new process."""
    found = small.clients(model, small.method("local"))
    found["north/site 0"] = found.pop("site-0")
    ClientStates(folder, rounds, number).restore(found)
    return found


def test_states_come_back_and_clients_without_one_have_none(tmp_path, members, model):
    states = ClientStates(tmp_path, 0, 0)
    for place, name in enumerate(["north/site 0", "site-2"]):
        members[name].client_state = state(place)
    assert states.save(members, 1) == 2
    again = resumed(tmp_path, model, 1, 2)
    assert all(small.same(again[name].client_state, members[name].client_state) for name in members)
    assert small.same(dict(again["site-2"].client_state), state(1))
    assert [name for name, client in again.items() if client.client_state] == ["site-2", "north/site 0"]
    assert small.same(ClientSession(again["site-2"], 2).client_state, state(1))


def test_a_run_without_states_leaves_no_file(tmp_path, members):
    assert ClientStates(tmp_path, 0, 0).save(members, 1) == 0
    assert list(tmp_path.iterdir()) == []


def test_a_round_that_was_killed_before_its_checkpoint_begins_with_the_states_of_the_round_before(
    tmp_path, members, model
):
    states, client = ClientStates(tmp_path, 0, 0), members["site-1"]
    for round in (1, 2, 3, 4):
        client.client_state = state(round)
        members["site-3"].client_state = state(10) if round == 4 else {}
        number = states.save(members, round)
    assert number == 2
    again = resumed(tmp_path, model, 3, 1)
    assert small.same(again["site-1"].client_state, state(3))
    assert dict(again["site-3"].client_state) == {}


@pytest.mark.parametrize(("rounds", "number"), [(1, 1), (4, 3)])
def test_an_older_checkpoint_or_another_file_is_refused(tmp_path, members, model, rounds, number):
    states, client = ClientStates(tmp_path, 0, 0), members["site-1"]
    for round in (1, 2, 3, 4):
        client.client_state = state(round)
        states.save(members, round)
    with pytest.raises(RunError, match="Restore both from one copy"):
        resumed(tmp_path, model, rounds, number)


def test_what_was_used_longest_ago_is_on_disk_alone(tmp_path, members):
    each = sum(value.nbytes for value in state(0).values())
    states = ClientStates(tmp_path, 0, 0, memory=2 * each)
    for place, client in enumerate(members.values()):
        client.client_state = state(place)
    assert states.save(members, 1) == 5
    assert list(states.recent) == ["site-4", "north/site 0"]
    assert states.bytes == 2 * each
    assert all(isinstance(client.client_state, StoredState) for client in members.values())
    assert small.same(dict(members["site-1"].client_state), state(0))
    assert list(states.recent) == ["north/site 0", "site-1"]
    assert states.bytes == 2 * each


def test_a_state_that_did_not_change_is_not_written_again(tmp_path, members):
    states = ClientStates(tmp_path, 0, 0)
    members["site-1"].client_state = state(1)
    states.save(members, 1)
    states.save(members, 2)
    assert states.file is not None
    assert states.file.execute("select client, round from states").fetchall() == [("site-1", 1)]
    members["site-1"].client_state = {}
    states.save(members, 3)
    assert dict(members["site-1"].client_state) == {}


def test_the_folder_is_its_owners(tmp_path, members):
    members["site-1"].client_state = state(1)
    ClientStates(tmp_path, 0, 0).save(members, 1)
    assert FILE.parts[0] == "not-released"
    assert stat.S_IMODE((tmp_path / FILE).parent.stat().st_mode) == 0o700
