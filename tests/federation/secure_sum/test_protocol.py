"""The protocol alone: sums are exact, a client's vector looks uniform, and no liar makes an honest client reveal more."""

from collections.abc import Callable, Iterable

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from scipy.stats import kstest

from ficpd.errors import CodecError, PolicyError
from ficpd.federation.secure_sum import masks
from ficpd.federation.secure_sum.member import Member, consent_statement, own_key, pair_key
from ficpd.federation.secure_sum.server import VoidRoundError, _Unmasking
from ficpd.privacy.shared_gaussian import Tolerance

RUN, SIZE = "a" * 32, 64
KEYS = {f"site-{i}": Ed25519PrivateKey.generate() for i in range(6)}
KNOWN = {name: key.public_key().public_bytes_raw() for name, key in KEYS.items()}
ALLOWED = Tolerance(5, 1, 2)
NAMES = [f"site-{i}" for i in range(5)]


def members(run: str = RUN, allowed: Tolerance = ALLOWED) -> dict[str, Member]:
    return {n: Member(n, run, KEYS[n], KNOWN, lambda round: NAMES, lambda invited: allowed) for n in NAMES}


def advertised(people: dict[str, Member], round: int = 1):
    return {name: member.advertise(round) for name, member in people.items()}


def to(shares, name):
    return {peer: given[name] for peer, given in shares.items() if peer != name}


class Played:
    """A round among honest clients, of which some are lost before or after they have sent shares."""

    def __init__(self, vectors, before=(), after=(), round: int = 1, people=None):
        self.people, self.round = people or members(), round
        self.adverts = {n: a for n, a in advertised(self.people, round).items() if n not in before}
        here = {n: m for n, m in self.people.items() if n in self.adverts}
        self.shares = {n: m.share(round, self.adverts) for n, m in here.items()}
        left = [n for n in self.shares if n not in after]
        self.masked = {n: self.people[n].mask(round, to(self.shares, n), vectors[n]) for n in left}
        self.survivors = sorted(self.masked)

    def revealed(self, people=None):
        signed = {n: self.people[n].consent(self.round, self.survivors) for n in self.survivors}
        return {n: self.people[n].reveal(self.round, signed) for n in self.survivors}

    def sum(self, revealed=None):
        total = np.sum(list(self.masked.values()), axis=0, dtype=np.uint64)
        found = revealed or self.revealed()
        sent = sorted(self.shares)
        return total - _Unmasking(
            RUN, self.round, self.adverts, sent, self.survivors, found, ALLOWED.least
        ).masks(SIZE)  # fmt: skip


def drawn(seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {name: random.integers(0, 2**64, SIZE, dtype=np.uint64) for name in NAMES}


def plain(vectors, names):
    return np.sum([vectors[name] for name in names], axis=0, dtype=np.uint64)


def test_the_sum_of_all_is_exact():
    vectors = drawn()
    assert np.array_equal(Played(vectors).sum(), plain(vectors, NAMES))


@pytest.mark.parametrize("lost", NAMES)
def test_the_sum_without_a_client_lost_before_its_shares_is_exact(lost):
    vectors = drawn(1)
    assert np.array_equal(Played(vectors, before=[lost]).sum(), plain(vectors, [n for n in NAMES if n != lost]))


@pytest.mark.parametrize("lost", NAMES)
def test_the_sum_without_a_client_lost_after_its_shares_is_exact(lost):
    vectors = drawn(2)
    played = Played(vectors, after=[lost])
    with pytest.raises(AssertionError):
        assert np.array_equal(plain(played.masked, played.survivors), plain(vectors, played.survivors))
    assert np.array_equal(played.sum(), plain(vectors, played.survivors))


def test_fewer_clients_than_least_make_no_sum():
    with pytest.raises(PolicyError, match=r"3 of 5 sites are left.*max_lost"):
        Played(drawn(), before=NAMES[:2])
    with pytest.raises(PolicyError, match=r"3 of 5 sites are left"):
        Played(drawn(), after=NAMES[:2]).revealed()


def test_wrong_shares_of_one_client_do_not_change_the_sum_where_enough_others_came():
    vectors = drawn()
    played = Played(vectors)
    revealed = played.revealed()
    revealed["site-2"] = {name: bytes(32).hex() for name in revealed["site-2"]}
    assert np.array_equal(played.sum(revealed), plain(vectors, NAMES))
    revealed["site-3"] = {name: bytes(32).hex() for name in revealed["site-3"]}
    with pytest.raises(VoidRoundError, match="wrong ones"):
        played.sum(revealed)


def looks_uniform(vector: np.ndarray) -> bool:
    return kstest(vector.astype(np.float64) / 2.0**64, "uniform").pvalue > 1e-4


def many(change: Callable[[Member], None] = lambda member: None) -> np.ndarray:
    """The masked vectors of one client over rounds, whose own term is always the same small numbers."""
    people, same = members(), {name: np.full(SIZE, 3, np.uint64) for name in NAMES}
    change(people["site-1"])
    return np.concatenate([Played(same, round=r, people=people).masked["site-1"] for r in range(1, 31)])


def test_the_servers_view_of_one_client_is_uniform():
    seen = many()
    assert looks_uniform(seen)
    assert looks_uniform(seen << np.uint64(32))  # the low half
    assert len(np.unique(seen)) == len(seen)


def test_without_masks_the_test_of_uniformity_fails(monkeypatch):
    monkeypatch.setattr(masks, "mask", lambda key, size: np.zeros(size, np.uint64))
    assert not looks_uniform(many())


def without_pairs(played: Played, vector: np.ndarray, member: Member, peers: Iterable[str], round: int) -> np.ndarray:
    """A vector of site-1 without the masks that it has with some others."""
    state = member._round
    assert state is not None
    for peer in peers:
        public = bytes.fromhex(played.adverts[peer]["mask"])
        pair = masks.mask(pair_key(RUN, round, state.mask, "site-1", peer, public), SIZE)
        vector = vector - pair if peer > "site-1" else vector + pair
    return vector


@pytest.mark.parametrize("taken_for_lost", [False, True])
def test_mask_what_the_server_opens_with_its_helpers_leaves_the_vector_uniform(taken_for_lost):
    """The server opens the own mask of a client that came, or the pair masks of one that it takes for lost, never both.

    Its vector may still come late (CCS 2017, section 6.1). Colluding clients tell their pair masks besides.
    """
    people, seen = members(), []
    same = {name: np.full(SIZE, 3, np.uint64) for name in NAMES}
    others = set(NAMES) - {"site-1"}
    for round in range(1, 21):
        played = Played(same, round=round, people=people)
        state, vector = people["site-1"]._round, played.masked["site-1"]
        assert state is not None
        own = masks.mask(own_key(RUN, round, state.seed), SIZE)
        known = others if taken_for_lost else {"site-3", "site-4"}  # ALLOWED.colluding
        rest = without_pairs(played, vector if taken_for_lost else vector - own, people["site-1"], known, round)
        seen.append(rest)
        bare = without_pairs(played, rest - own if taken_for_lost else rest, people["site-1"], others - known, round)
        assert np.array_equal(bare, same["site-1"])
    assert looks_uniform(np.concatenate(seen))
    assert looks_uniform(np.concatenate(seen) << np.uint64(32))


def test_shares_of_fewer_than_least_clients_open_nothing():
    played = Played(drawn())
    few = {name: given for name, given in played.revealed().items() if name in NAMES[: ALLOWED.least - 1]}
    with pytest.raises(VoidRoundError):
        played.sum(few)


def test_of_a_client_that_came_only_the_seed_is_revealed_and_of_a_lost_one_only_the_key():
    played = Played(drawn(), after=["site-4"])
    revealed = played.revealed()
    for name, secret in (("site-0", "seed"), ("site-4", "mask")):
        shares = {place: bytes.fromhex(revealed[n][name]) for place, n in enumerate(NAMES, 1) if n in revealed}
        state = played.people[name]._round
        assert state is not None
        right = {"seed": state.seed, "mask": state.mask.private_bytes_raw()}
        for kind, value in right.items():
            opened = masks.combine(shares, ALLOWED.least, lambda found, value=value: found == value)
            assert (opened is not None) == (kind == secret)


def test_another_key_in_the_second_exchange_is_refused():
    people = members()
    adverts = advertised(people)
    other = members()["site-3"]
    other.identity = Ed25519PrivateKey.generate()  # the server's own key in the name of a site
    for replaced in (other.advertise(1), {**adverts["site-3"], "mask": adverts["site-2"]["mask"]}):
        with pytest.raises(PolicyError, match=r"site-3.*not signed"):
            people["site-0"].share(1, {**adverts, "site-3": replaced})


def test_a_site_that_signs_two_keys_makes_no_honest_client_agree_to_both():
    people, twin = members(), members()["site-3"]
    adverts = advertised(people)
    second = {**adverts, "site-3": twin.advertise(1)}
    shares = {n: m.share(1, second if n == "site-0" else adverts) for n, m in people.items() if n != "site-3"}
    shares["site-3"] = people["site-3"].share(1, adverts)
    for name, member in people.items():
        member.mask(1, to(shares, name), drawn()[name])
    signed = {n: m.consent(1, NAMES) for n, m in people.items()}
    content = consent_statement(RUN, 1, adverts, NAMES)
    assert [n for n in NAMES if not masks.is_signed(KNOWN[n], bytes.fromhex(signed[n]), content)] == ["site-0"]
    with pytest.raises(PolicyError, match="1 sites have agreed"):
        people["site-0"].reveal(1, signed)


@pytest.mark.parametrize(("run", "round"), [("b" * 32, 1), (RUN, 2)])
def test_keys_of_another_run_or_round_are_refused(run, round):
    old, people = advertised(members(run), 1), members()
    adverts = advertised(people, round) if run == RUN else advertised(people)
    with pytest.raises(PolicyError, match="not signed"):
        people["site-0"].share(round, {**adverts, "site-3": old["site-3"]})


def test_shares_of_another_round_open_nothing_and_the_sum_is_void():
    people = members()
    first = Played(drawn(), people=people)
    adverts = advertised(people, 2)
    shares = {n: m.share(2, adverts) for n, m in people.items()}
    given = {**to(shares, "site-0"), "site-1": first.shares["site-1"]["site-0"]}
    people["site-0"].mask(2, given, drawn()["site-0"])
    state = people["site-0"]._round
    assert state is not None
    assert "site-1" not in state.held
    assert {"site-0", "site-2", "site-3", "site-4"} == state.held.keys()


def test_a_replayed_round_is_refused():
    people = members()
    played = Played(drawn(), people=people, round=2)
    assert advertised(people, 2) == played.adverts  # the same question has the same answer
    assert people["site-0"].share(2, played.adverts) == played.shares["site-0"]
    with pytest.raises(PolicyError, match="masked its vector of round 2 already"):
        people["site-0"].mask(2, to(played.shares, "site-0"), drawn(5)["site-0"])
    with pytest.raises(PolicyError, match="round 1 after round 2"):
        people["site-0"].advertise(1)
    fewer = {n: a for n, a in played.adverts.items() if n != "site-4"}
    with pytest.raises(PolicyError, match="another 'shares'"):
        people["site-0"].share(2, fewer)


def test_a_client_agrees_to_one_list_in_a_round():
    played = Played(drawn())
    played.people["site-0"].consent(1, NAMES)
    with pytest.raises(PolicyError, match="another 'consent'"):
        played.people["site-0"].consent(1, NAMES[:4])


def test_without_enough_signatures_nothing_is_revealed():
    played = Played(drawn())
    signed = {n: played.people[n].consent(1, NAMES) for n in NAMES}
    for bad in (
        {n: signed[n] for n in NAMES[: ALLOWED.least - 1]},
        dict.fromkeys(NAMES, signed["site-0"]),
        {n: signed[n][:-2] for n in NAMES},
        {},
    ):
        with pytest.raises(PolicyError, match="nothing is revealed"):
            played.people["site-0"].reveal(1, bad)


def test_strangers_and_lists_without_oneself_are_refused():
    people = members()
    adverts = advertised(people)
    stranger = Member("site-5", RUN, KEYS["site-5"], KNOWN, lambda round: ["site-5"], lambda n: ALLOWED).advertise(1)
    with pytest.raises(PolicyError, match="site-5"):
        people["site-0"].share(1, {**adverts, "site-5": stranger})
    with pytest.raises(PolicyError, match="site-0 among them"):
        people["site-0"].share(1, {n: a for n, a in adverts.items() if n != "site-0"})
    with pytest.raises(PolicyError, match="knows no signing key of site-9"):
        Member("site-0", RUN, KEYS["site-0"], KNOWN, lambda r: [*NAMES, "site-9"], lambda n: ALLOWED).advertise(1)


def test_phases_out_of_order_are_refused():
    people = members()
    with pytest.raises(PolicyError, match="no keys of round 1"):
        people["site-0"].share(1, {})
    adverts = advertised(people)
    people["site-0"].share(1, adverts)
    with pytest.raises(PolicyError, match="phase 'vector'"):
        people["site-0"].consent(1, NAMES)
    with pytest.raises(PolicyError, match="phase 'consent'"):
        people["site-0"].reveal(1, {})


@pytest.mark.parametrize("liar", [1, 10, 20])
def test_one_wrong_share_of_twenty_does_not_hide_a_secret(liar):
    """Sets in the order of their numbers would all have share 1 for thousands of tries."""
    secret = bytes(range(32))
    shares = dict(enumerate(masks.split(secret, 15, 20), 1)) | {liar: bytes(32)}
    assert masks.combine(shares, 15, lambda found: found == secret) == secret


def test_a_secret_needs_its_threshold_of_shares():
    secret = bytes(range(32))
    shares = dict(enumerate(masks.split(secret, 3, 5), 1))
    assert masks.combine({n: shares[n] for n in (1, 4, 5)}, 3, lambda found: found == secret) == secret
    assert masks.combine({n: shares[n] for n in (1, 4)}, 2, lambda found: found == secret) is None


def test_a_key_of_low_order_is_refused():
    state = members()["site-0"]
    state.advertise(1)
    assert state._round is not None
    with pytest.raises(CodecError, match="public key is invalid"):
        masks.agreed_key(state._round.mask, bytes(32), "pair mask")


def test_statements_of_different_parts_differ():
    assert masks.statement("a", "bc") != masks.statement("ab", "c")
    assert masks.statement(1, 11) != masks.statement(11, 1)
