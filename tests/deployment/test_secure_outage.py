"""Site processes are killed amid secure sums between Flower's real processes: what is saved, what is void, what is paid."""

import threading
from pathlib import Path

import pytest

pytest.importorskip("cryptography")
pytest.importorskip("flwr")
import federated
from federated import federation, lines

import processes
from ficpd.library.library import PromptLibrary
from processes import Place
from warm import Warm, kill

pytestmark = pytest.mark.slow

SITES = ["site-0", "site-1", "site-2", "site-3"]
MEMBER = "ficpd.federation.secure_sum.member:Member"
MASK, CONSENT = f"{MEMBER}.mask", f"{MEMBER}.consent"
SHARED = 'name = "shared_gaussian"\nleast_records = 16\nmax_lost = 1\nmax_colluding = 1\n'
TRAINED = 'local_steps = 1\noptimizer = "sgd"\n'
"""A step of gradient descent is as long as the sum: masks that remain would make it some 10^12."""
ROUNDS = 5


class Masked(federated.Federation):
    """Four sites as `deploy init --secure-aggregation` writes them; one may be lost. Each can be killed and restarted."""

    def begin(self, inside: tuple[str, ...] = ()) -> None:
        self.places: dict[str, Place] = {}
        self.warm = Warm()
        self.running.callback(self.warm.close)
        super().begin(inside)

    def start_site(self, name: str, file: Path) -> None:
        own = self.folder / "deploy" / "sites" / name
        keys = f'[secure_sum]\nkey = "{own / "signing.key"}"\nknown = "{own / "signing-keys"}"\n'
        file.write_text(file.read_text().replace('"record_gaussian"', '"shared_gaussian"') + keys)
        self.places[name] = place = Place(self.warm, file, len(self.places) + 1)
        self.running.callback(place.stop)
        place.start(*FAULTS.get(name, []))

    def killed(self, name: str) -> None:
        """Waits until a site has died of its fault."""
        status = Path(f"/proc/{self.places[name].pid}/stat")
        self.until(lambda: status.read_text().rpartition(")")[2].split()[0] == "Z", f"{name} is killed")


FAULTS = {
    "site-1": [kill(MASK, 2)],  # round 2: after its shares, before its vector
    "site-2": [kill(CONSENT, 3)],  # round 3: after its vector
    "site-0": [kill(CONSENT, 4)],  # round 4, where site-1 is killed, too
}


def test_a_masked_sum_is_recovered_or_void_when_sites_are_killed_and_nothing_is_spent_twice(tmp_path):
    """A site is killed before its vector in round 2, one after it in round 3, and in round 4 one of each."""
    out, recipe = tmp_path / "out", processes.recipe(ROUNDS).replace('name = "record_gaussian"\n', SHARED)
    with federation(kind=Masked, sites=SITES, secure=True) as made:
        made.begin()
        with made.submitted(out, ROUNDS, recipe=recipe.replace("local_steps = 2\n", TRAINED)) as run:
            for name, again in (("site-1", [kill(MASK, 2)]), ("site-2", []), ("site-1", []), ("site-0", [])):
                made.killed(name)
                made.places[name].restart(*again)
        assert isinstance(run, threading.Thread)
        assert made.status == 0, made.logs()
    rounds = lines(out)
    assert [line["updates"] for line in rounds[:4]] == [4, 3, 4, 0], "whole, without one, with one that died, void"
    assert "site-1" in rounds[1]["dropped"]
    assert "site-2" in rounds[2]["dropped"]
    assert all("void" in why or "no answer" in why for why in rounds[3]["dropped"].values())
    assert len(rounds[3]["dropped"]) == len(SITES)
    assert rounds[4]["updates"] >= 3, "the next round goes on"
    moved = PromptLibrary.load(out).candidates()["global"].vectors_PD
    assert float(moved.abs().max()) < 100, "no mask is left in a sum"
    expected = {"site-0": [1, 2, 3, 4, 5], "site-1": [1, 3, 5], "site-2": [1, 2, 3, 4, 5], "site-3": [1, 2, 3, 4, 5]}
    for name, (done, prices) in made.read.items():
        late = name == "site-0" and name in rounds[4]["dropped"]  # it may come back too late for the last round
        assert done == prices == expected[name][: -1 if late else None], "one price for each vector that left"
