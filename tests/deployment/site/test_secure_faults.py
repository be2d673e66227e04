"""Processes of sites in a secure sum die amid a round: it is saved or void, and no vector is paid for twice."""

from collections.abc import Iterator
from pathlib import Path

import pytest

import grids
import processes
from processes import Place, rounds
from site_of import signing_keys
from warm import Warm, kill

pytest.importorskip("flwr")
pytestmark = [pytest.mark.slow, *grids.OPEN_SOCKETS]
MEMBER = "ficpd.federation.secure_sum.member:Member"
SHARED = 'name = "shared_gaussian"\nleast_records = 16\nmax_lost = 1\nmax_colluding = 1\n'


@pytest.fixture
def places() -> Iterator[list[Place]]:
    """Four sites with signing keys; one of them may be lost."""
    warm = Warm()
    with processes.places(warm, 4) as found:
        folder = found[0].file.parent
        signing_keys([place.file.stem for place in found], folder)
        for place in found:
            text = place.file.read_text().replace('"record_gaussian"', '"shared_gaussian"')
            keys = f'[secure_sum]\nkey = "{folder / place.file.stem}.key"\nknown = "{folder / "keys"}"\n'
            place.file.write_text(text + keys)
        yield found
    warm.close()


@pytest.mark.parametrize(("call", "killed", "updates", "paid"), [
    ("share", [1], 3, [1, 3]),  # before its shares leave
    ("mask", [1], 3, [1, 3]),  # after them, before its vector
    ("consent", [1], 4, [1, 2, 3]),  # after its vector
    ("reveal", [1], 4, [1, 2, 3]),
    ("mask", [1, 2], 0, [1, 3]),
    ("consent", [1, 2], 0, [1, 2, 3]),
])  # fmt: skip
def test_a_round_is_saved_or_void_whenever_sites_are_killed_and_nothing_is_spent_twice(
    places: list[Place], tmp_path: Path, call: str, killed: list[int], updates: int, paid: list[int]
):
    """Killed in the second of three rounds, and started again after it."""
    for number, place in enumerate(places):
        place.start(*([kill(f"{MEMBER}.{call}", 2)] if number in killed else []))
    text = processes.recipe(3).replace('name = "record_gaussian"\n', SHARED)
    grid = grids.Loopback({place.node: place.config.socket for place in places})

    def say(line: str) -> None:
        for number in killed if line.startswith("round 2/") else ():
            places[number].restart()

    processes.coordinate(text, tmp_path / "run", grid.sockets, say=say, grid=grid)
    assert [line["updates"] for line in rounds(tmp_path / "run")] == [4, updates, 4]
    assert all(f"site-{number}" in rounds(tmp_path / "run")[1]["dropped"] for number in killed)
    for number, place in enumerate(places):
        place.stop()
        done, costs = processes.ledger_of(place.config)
        expected = paid if number in killed else [1, 2, 3]  # a void round has spent, once
        assert done == [cost["round"] for cost in costs] == expected
