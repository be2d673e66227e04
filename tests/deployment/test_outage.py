"""A SuperLink that dies amid a run, and a cut line: with Flower's real processes, TLS and keys.

The line is cut between network namespaces, which wants root and `ip`; where they are not to be had that test is skipped.
"""

import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import pytest

pytest.importorskip("cryptography")
pytest.importorskip("flwr")
from federated import CUT, INSIDE, OUTSIDE, SITES, federation, lines

from ficpd.deployment import demo

pytestmark = pytest.mark.slow


def test_a_superlink_that_is_killed_and_started_again(tmp_path):
    """The sites need not be touched: their SuperNodes come back by themselves. What was finished stays, and no ε is spent
    twice."""
    out, rounds = tmp_path / "out", 5
    with federation() as made:
        made.begin()
        with made.submitted(out, rounds):
            made.until(lambda: len(lines(out)) >= 2, "two rounds are done")
            made.kill_link()
        assert made.status != 0, "flwr run says that it lost the SuperLink"
        before = lines(out)
        assert 2 <= len(before) < rounds
        made.start_link()
        made.until(lambda: demo._online(made.home) == len(SITES), "the SuperNodes have come back")
        with made.submitted(out, rounds, resume=True):
            pass
        assert made.status == 0, made.logs()
        after = lines(out)
    assert after[: len(before)] == before
    assert [line["round"] for line in after] == list(range(1, rounds + 1))
    for name in SITES:
        orders, prices = made.read[name]
        assert prices == orders == sorted(set(orders)), "one price for each order"
        assert set(orders) == set(range(1, rounds + 1))


@contextmanager
def another_namespace() -> Iterator[Callable[[str], None]]:
    """A line between this machine's network and another's; yields what sets it "down" or "up"."""
    with ExitStack() as stack:
        _ip("netns", "add", CUT)
        stack.callback(_ip, "netns", "delete", CUT)
        _ip("link", "add", "ficpd0", "type", "veth", "peer", "name", "ficpd1", "netns", CUT)
        _ip("addr", "add", f"{OUTSIDE}/24", "dev", "ficpd0")
        _ip("link", "set", "ficpd0", "up")
        _ip("-n", CUT, "addr", "add", f"{INSIDE}/24", "dev", "ficpd1")
        _ip("-n", CUT, "link", "set", "ficpd1", "up")
        _ip("-n", CUT, "link", "set", "lo", "up")
        yield lambda how: _ip("link", "set", "ficpd0", how)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


def test_a_line_that_is_cut_and_mended(tmp_path):
    """The round ends without the site at its deadline; once the line is there again, the site is back by itself."""
    out, rounds = tmp_path / "out", 30
    with ExitStack() as stack:
        try:
            line = stack.enter_context(another_namespace())
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"no network namespaces here: {error}")
        made = stack.enter_context(federation(OUTSIDE))
        made.begin(inside=("site-1",))
        with made.submitted(out, rounds, deadline_seconds=15.0):
            made.until(lambda: len(lines(out)) >= 2, "two rounds are done")
            line("down")
            made.until(lambda: any(one["updates"] == 1 for one in lines(out)), "a round has ended without the site")
            line("up")
            gone = len(lines(out))
            made.until(lambda: any(one["updates"] == 2 for one in lines(out)[gone:]), "the site is back")
            made.kill_link()
        found = lines(out)
    assert all(one["updates"] == 2 for one in found[:2])
    (first, *_) = [one for one in found if one["updates"] == 1]
    assert "site-1" in first["dropped"]
    for name in SITES:
        orders, prices = made.read[name]
        assert prices == orders == sorted(set(orders)), "one price for each order"
