"""Secure sums among real sites: the simulation's library, lost and restarted sites, and a server that lies."""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

import grids
import small
from ficpd.deployment import coordinator
from ficpd.deployment.site.site import Site
from ficpd.errors import BudgetError, CodecError, PolicyError, PrivacyError, SiteError
from ficpd.experiments.build import ExperimentContext, build_context
from ficpd.experiments.config import Experiment, parse
from ficpd.experiments.runner import run
from ficpd.federation import codec
from ficpd.federation.secure_sum import CONSENT, KEYS, MASKED, REVEAL, SHARES, VECTOR
from ficpd.federation.secure_sum.member import Member
from ficpd.federation.secure_sum.server import _Unmasking
from ficpd.interfaces import ReleaseKind
from ficpd.library.library import PromptLibrary
from ficpd.privacy.shared_gaussian import GRID, SharedGaussian
from ficpd.types import Assignment
from site_of import begun, recipe, signing_keys, site, train

pytest.importorskip("flwr")
pytestmark = grids.OPEN_SOCKETS
SHARED = (
    'privacy.name="shared_gaussian"', "privacy.epsilon=4.0", "privacy.delta=1e-3", "privacy.least_records=6",
    "privacy.max_lost=1", "privacy.max_colluding=1", "training.local_steps=1",
)  # fmt: skip
POLICY: dict[str, Any] = {"mechanisms": ["shared_gaussian"], "methods": ["fedavg", "fedprox", "ficpd"]}
TINY = "tiny:16x2"


def experiment(folder: Path, method: str, *changes: str, rounds: int = 3) -> Experiment:
    """Four sites of twenty records."""
    return parse(small.toml(small.table(folder / "records.csv", 80, 4), method, rounds), "small.toml", changes)


def sites(context: ExperimentContext, **policy: Any) -> AbstractContextManager[dict[str, Site]]:
    return grids.sites(context, True, **{**POLICY, **policy})


def served(context: ExperimentContext, found: Mapping[str, Site], out: Path, fates: Mapping[tuple[int, int], str]):
    from ficpd.deployment.flower_engine import Config, Flower

    grid = grids.Loopback({place: one.config.socket for place, one in enumerate(found.values(), 1)}, fates)
    config = Config(poll_seconds=0.01, wait_seconds=5, deadline_seconds=2.5, sites=tuple(found))
    engine = Flower(config, grid, "")  # type: ignore[arg-type]
    return coordinator.run_coordinator(recipe(context), "small.toml", out, engine, say=lambda line: None)


def rounds(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "rounds.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fedavg", "fedprox", "ficpd"])
def test_masked_sites_leave_the_library_of_a_simulation(tmp_path, method):
    asked = experiment(tmp_path, method, *SHARED, rounds=2)
    run(asked, tmp_path / "run")
    context, expected = build_context(asked), small.library(tmp_path)
    with sites(context) as found:
        result = served(context, found, tmp_path / "served", {})
        spent = {name: one.status()["epsilon"]["spent"] for name, one in found.items()}
    library = PromptLibrary.load(tmp_path / "served").candidates()
    assert library.keys() == expected.keys()
    assert all(small.close(prompt.vectors_PD, expected[name], 1e-5) for name, prompt in library.items())
    assert result.dropped_updates == 0
    assert "up to 1 of them together, with up to 1 lost" in result.privacy.mechanism
    assert len(set(spent.values())) == 1, "the noise, and so the cost, goes by least_records"
    assert 3.9 < next(iter(spent.values())) <= 4.0


ORDERS = {"before its shares": 2, "before its vector": 3, "after its vector": 3, "before consent": 4, "at the end": 5}


@pytest.mark.parametrize("when", ORDERS)
def test_a_lost_site_does_not_stop_the_round(tmp_path, when):
    context = build_context(experiment(tmp_path, "fedavg", *SHARED, rounds=1))
    fate = "unanswered" if when == "after its vector" else "lost"
    with sites(context) as found:
        result = served(context, found, tmp_path / "served", {(2, ORDERS[when]): fate})
        status = found["site-1"].status()
    (line,) = rounds(tmp_path / "served")
    assert result.num_rounds == 1
    assert line["updates"] == (3 if ORDERS[when] <= 3 else 4)
    assert "site-1" in line["dropped"]
    assert (status["epsilon"]["spent"] > 0) == (when not in ("before its shares", "before its vector"))
    moved = PromptLibrary.load(tmp_path / "served").candidates()["global"].vectors_PD
    assert 0 < float((moved - context.start.vectors_PD).norm()) < 10


@pytest.mark.slow
def test_with_too_few_sites_the_round_is_void_and_the_next_one_goes_on(tmp_path):
    context = build_context(experiment(tmp_path, "fedavg", *SHARED, rounds=2))
    with sites(context) as found:
        served(context, found, tmp_path / "served", {(2, 3): "unanswered", (3, 3): "lost"})
        spent = {name: one.status()["epsilon"]["spent"] for name, one in found.items()}
        done = {name: one.ledger.num_assignments() for name, one in found.items()}
    void, good = rounds(tmp_path / "served")
    assert (void["updates"], good["updates"]) == (0, 4)
    assert all(re.search(r"void|no reply", why) for why in void["dropped"].values())
    assert len(void["dropped"]) == 4
    assert done == {"site-0": 2, "site-1": 2, "site-2": 1, "site-3": 2}, "a void round has spent, once"
    assert max(spent.values()) <= 4.0


@pytest.mark.slow
def test_a_round_with_another_sites_key_is_void_names_it_and_costs_nothing(tmp_path, monkeypatch):
    context, advertise = build_context(experiment(tmp_path, "fedavg", *SHARED)), Member.advertise

    def with_another_key(member: Member, round: int) -> Any:
        own = member.identity
        if (member.name, round) == ("site-3", 2):
            member.identity = Ed25519PrivateKey.generate()
        found = advertise(member, round)
        member.identity = own
        return found

    monkeypatch.setattr(Member, "advertise", with_another_key)
    with sites(context) as found:
        result = served(context, found, tmp_path / "served", {})
        assert result.stopped is None
        done = {name: one.ledger.num_assignments() for name, one in found.items()}
    lines = rounds(tmp_path / "served")
    assert [line["updates"] for line in lines] == [4, 0, 4]
    assert "the keys of site-3 for round 2 are not signed by site-3" in lines[1]["dropped"]["site-0"]
    assert set(done.values()) == {2}, "rounds 1 and 3"


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    """Closes the sites that were called by hand."""
    yield
    while Server.opened:
        Server.opened.pop().close()


@pytest.fixture
def shared(tmp_path: Path) -> ExperimentContext:
    signing_keys([f"site-{i}" for i in range(4)], tmp_path)
    return build_context(experiment(tmp_path, "fedavg", *SHARED))


class Server:
    """A server that calls four sites by hand."""

    opened: ClassVar[list[Site]] = []

    def __init__(self, context: ExperimentContext, folder: Path):
        self.context, self.folder = context, folder
        self.orders, self.said = begun(context)
        self.sites = {name: self.open(name) for name in context.shards}

    def open(self, name: str) -> Site:
        self.opened.append(site(self.context, name, self.folder, **POLICY))
        return self.opened[-1]

    def ask(self, name: str, phase: str, round: int = 1, arrays: Any = None, **facts: Any) -> Assignment:
        body = codec.encode_assignment(Assignment(phase, round, arrays or {}, facts), TINY)
        return codec.decode_assignment(self.sites[name].handle(train(body, self.said)), TINY)

    def keys(self, round: int = 1) -> dict[str, Any]:
        return {name: self.ask(name, KEYS, round).facts["advert"] for name in self.sites}

    def shares(self, adverts: Any, round: int = 1) -> dict[str, Any]:
        return {name: self.ask(name, SHARES, round, adverts=adverts).facts["shares"] for name in self.sites}

    def vector(self, name: str, given: Any, round: int = 1, **more: Any) -> torch.Tensor:
        inner = torch.frombuffer(bytearray(self.orders[round - 1]), dtype=torch.uint8)
        others = {n: s[name] for n, s in given.items() if n != name}
        facts = {"parts": [""], "sizes": {"gradient": 48}, "shares": others}
        return self.ask(name, VECTOR, round, {"assignment": inner}, **{**facts, **more}).arrays[MASKED]

    def spent(self, name: str = "site-0") -> float:
        return self.sites[name].status()["epsilon"]["spent"]


def test_an_update_never_leaves_without_masks(shared, tmp_path):
    server = Server(shared, tmp_path)
    with pytest.raises(PolicyError, match="terms of a secure sum"):
        server.sites["site-0"].handle(train(server.orders[0], server.said))
    with pytest.raises(PolicyError, match="no keys of round 1"):
        server.vector("site-0", {})
    shares = server.shares(server.keys())
    with pytest.raises(PolicyError, match=r"1 of 4 sites are left"):
        server.vector("site-0", {})
    assert server.spent("site-1") == 0.0
    masked = server.vector("site-1", shares)
    assert (masked.double().abs() > 2.0**58).double().mean() > 0.5, "a term without masks is below 2^40"


def test_a_vector_beyond_the_budget_is_refused_when_it_is_asked_for(tmp_path):
    """Keys cost nothing, so they are made whether or not this site has `least_records`."""
    signing_keys([f"site-{i}" for i in range(4)], tmp_path)
    many = [change for change in SHARED if "least_records" not in change]
    server = Server(build_context(experiment(tmp_path, "fedavg", *many, "privacy.least_records=17")), tmp_path)
    shares = server.shares(server.keys())
    assert len(server.sites["site-0"].shard.train) == 16
    with pytest.raises(PrivacyError) as refused:
        server.vector("site-0", shares)
    assert isinstance(refused.value, BudgetError), "it is one of the refusals that are counted"
    assert server.spent() == 0.0


def test_sums_that_a_run_does_not_have_are_refused(shared, tmp_path):
    server = Server(shared, tmp_path)
    shares = server.shares(server.keys())
    with pytest.raises((CodecError, PolicyError), match=r"no sum of this run is 'other'"):
        server.vector("site-0", shares, sizes={"gradient": 48, "other": 1})
    assert server.spent() > 0.0, "it could be asked for once more, after another draw of records"


def test_the_ledger_has_its_line_before_a_vector_leaves_and_the_same_round_has_the_same_vector(shared, tmp_path):
    server = Server(shared, tmp_path)
    shares = server.shares(server.keys())
    first = server.vector("site-0", shares)
    spent = server.spent()
    assert spent > 0
    assert torch.equal(server.vector("site-0", shares), first)
    few = {name: given for name, given in shares.items() if name != "site-3"}
    assert torch.equal(server.vector("site-0", few), first), "other peers do not get another vector of the same records"
    assert server.spent() == spent


def test_a_site_that_restarts_is_lost_for_the_round_and_answers_the_next(shared, tmp_path):
    server = Server(shared, tmp_path)
    shares = server.shares(server.keys())
    first, spent = server.vector("site-0", shares), server.spent()
    server.sites["site-0"].close()
    server.sites["site-0"] = server.open("site-0")
    with pytest.raises(PolicyError, match="released round 1 already"):
        server.ask("site-0", KEYS)
    with pytest.raises(PolicyError, match="no keys of round 1"):
        server.ask("site-0", CONSENT, survivors=list(server.sites))
    assert torch.equal(server.vector("site-0", shares), first)
    server.vector("site-0", server.shares(server.keys(2), 2), 2)
    assert server.spent() > spent


def test_keys_of_the_server_are_refused(shared, tmp_path):
    server = Server(shared, tmp_path)
    adverts = server.keys()
    stranger = tmp_path / "server"
    stranger.mkdir()
    signing_keys(server.sites, stranger)
    other = Server(shared, stranger)
    with pytest.raises(PolicyError, match=r"site-3.*not signed"):
        server.ask("site-0", SHARES, adverts={**adverts, "site-3": other.keys()["site-3"]})
    assert server.spent() == 0.0


def test_sites_that_were_told_of_less_noise_are_not_in_ones_sum(shared, tmp_path):
    """A server sends three sites a recipe with a larger epsilon: their noise would not cover the fourth."""
    server = Server(shared, tmp_path)
    own = server.ask("site-0", KEYS).facts["advert"]
    server.said = begun(build_context(experiment(tmp_path, "fedavg", *SHARED, "privacy.epsilon=9.0")))[1]
    adverts = {name: server.ask(name, KEYS).facts["advert"] for name in server.sites if name != "site-0"}
    with pytest.raises(PolicyError, match=r"site-1.*another key, run, spec or round"):
        server.ask("site-0", SHARES, adverts={"site-0": own, **adverts})
    assert server.ask("site-1", KEYS).facts["advert"] == adverts["site-1"]
    assert server.spent() == 0.0


@pytest.mark.parametrize("told", [{}, {"classes": 48}], ids=["all alike", "others another layout"])
def test_sites_that_were_asked_for_other_sums_make_no_sum(shared, tmp_path, told, monkeypatch):
    """A server asks one site for a longer gradient, and the others for a sum there that has less noise."""
    server = Server(shared, tmp_path)
    adverts = server.keys()
    shares, names = server.shares(adverts), list(server.sites)
    one = {"gradient": 48 + len(told) * 48}
    asked = {name: one if name == "site-0" else {"gradient": 48, **told} for name in names}
    cost = SharedGaussian.cost
    total = lambda one, kind, name="": cost(one, ReleaseKind.STEP if name == "classes" else kind, name)  # noqa: E731
    monkeypatch.setattr(SharedGaussian, "cost", total)  # as if the method had it
    vectors = [server.vector(name, shares, sizes=asked[name]).numpy().view(np.uint64) for name in names]
    signed = {name: server.ask(name, CONSENT, survivors=names).facts["consent"][name] for name in names}
    revealed = {name: server.ask(name, REVEAL, signatures=signed).facts["revealed"] for name in names}
    unmask = _Unmasking("a" * 32, 1, adverts, names, names, revealed, 3)
    summed = (np.sum(vectors, axis=0, dtype=np.uint64) - unmask.masks(len(vectors[0]))).view(np.int64)
    assert (np.median(np.abs(summed / GRID)) > 1e6) == bool(told), "masks cancel between equal requests only"


def test_a_replayed_round_is_refused(shared, tmp_path):
    server = Server(shared, tmp_path)
    old = server.keys()
    server.keys(2)
    with pytest.raises(PolicyError, match="round 1 after round 2"):
        server.ask("site-0", KEYS)
    with pytest.raises(PolicyError, match="not signed"):
        server.ask("site-0", SHARES, 2, adverts={**server.keys(2), "site-3": old["site-3"]})
    for round in (0, 4, "1", True, None):
        with pytest.raises(PolicyError, match="not in the run's spec"):
            server.ask("site-0", KEYS, round)  # type: ignore[arg-type]


def test_bad_messages_cost_nothing(shared, tmp_path):
    server = Server(shared, tmp_path)
    adverts = server.keys()
    shares = server.shares(adverts)
    for facts in (
        {"sizes": {"gradient": 0}}, {"sizes": {"gradient": 1 << 25}}, {"sizes": {"gradient": True}}, {"sizes": []},
        {"parts": []}, {"parts": ["", ""]}, {"parts": [1]}, {"shares": []}, {"shares": {"site-1": 3}},
    ):  # fmt: skip
        with pytest.raises(CodecError):
            server.vector("site-0", shares, **facts)
    for phase, facts in (
        (SHARES, {}), (SHARES, {"adverts": {"site-0": {}}}), (SHARES, {"adverts": []}), (CONSENT, {}),
        (CONSENT, {"survivors": [1]}), (REVEAL, {}), (REVEAL, {"signatures": {"site-0": 1}}), ("secure_sum/other", {}),
    ):  # fmt: skip
        with pytest.raises((CodecError, PolicyError)):
            server.ask("site-0", phase, **facts)
    assert server.spent() == 0.0
    with pytest.raises(CodecError, match="48 numbers"):  # after the records were drawn: charged once
        server.vector("site-0", shares, sizes={"gradient": 47})


def test_what_is_revealed_needs_a_list_that_enough_sites_signed(shared, tmp_path):
    server = Server(shared, tmp_path)
    shares = server.shares(server.keys())
    for name in server.sites:
        server.vector(name, shares)
    names = list(server.sites)
    consents = {n: server.ask(n, CONSENT, survivors=names).facts["consent"][n] for n in names[:2]}
    with pytest.raises(PolicyError, match="2 sites have agreed"):
        server.ask("site-0", REVEAL, signatures=consents)
    with pytest.raises(PolicyError, match="another 'consent'"):
        server.ask("site-0", CONSENT, survivors=names[:3])


def test_a_policy_decides_how_many_sites_may_collude_and_how_noise_is_planned(tmp_path):
    signing_keys([f"site-{i}" for i in range(4)], tmp_path)
    careless = [change for change in SHARED if "colluding" not in change and "least_records" not in change]
    context = build_context(experiment(tmp_path, "fedavg", *careless, "privacy.max_colluding=0"))
    server = Server(context, tmp_path)
    limits = r"privacy.least_records is open.*max_colluding = 0.*least_colluding|at least 1"
    with pytest.raises(PolicyError, match=limits):
        server.ask("site-0", KEYS)


def test_a_site_without_signing_keys_says_what_to_do(tmp_path):
    context = build_context(experiment(tmp_path, "fedavg", *SHARED))
    server = Server(context, tmp_path)
    with pytest.raises(PolicyError, match="--secure-aggregation"):
        server.ask("site-0", KEYS)
    signing_keys(server.sites, tmp_path)
    (tmp_path / "keys" / "site-0.pub").write_bytes((tmp_path / "keys" / "site-1.pub").read_bytes())
    for one in server.sites.values():
        one.close()
    with pytest.raises(SiteError, match="public half"):
        Server(context, tmp_path).ask("site-0", KEYS)


def test_a_coordinator_needs_least_records(tmp_path):
    open_ = [change for change in SHARED if "least_records" not in change]
    context = build_context(experiment(tmp_path, "fedavg", *open_))
    with sites(context) as found, pytest.raises(PrivacyError, match=r"privacy.least_records is open"):
        served(context, found, tmp_path / "served", {})
