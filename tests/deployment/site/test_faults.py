"""Processes die, disks fill, clocks and messages go astray: rounds end, sites come back, and no update is paid for twice."""

import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from datetime import timedelta
from pathlib import Path

import pytest

import grids
import processes
from ficpd.deployment.site.site import LEDGER, WITNESS
from processes import Place, left, paid, recipe, rounds, served
from warm import Warm, clock, kill, slow

pytest.importorskip("flwr")
pytestmark = grids.OPEN_SOCKETS
SETTLE, SEND = "ficpd.privacy.ledger:Account.commit", "ficpd.deployment.site.site:Site._witness"


@pytest.fixture(scope="module")
def warm() -> Iterator[Warm]:
    made = Warm()
    yield made
    made.close()


@pytest.fixture
def places(warm: Warm) -> Iterator[list[Place]]:
    with processes.places(warm, 2) as found:
        yield found


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "run"


def ledgers(places: list[Place], out: Path) -> list[list[int]]:
    """What each has paid for, all stopped."""
    for place in places:
        place.stop()
    return [paid(place, out) for place in places]


def counted(out: Path) -> list[int]:
    return [done["updates"] for done in rounds(out)]


@pytest.mark.slow
@pytest.mark.parametrize(("moment", "owed"), [(SETTLE, [1, 3]), (SEND, [1, 2, 3])])
def test_a_site_that_is_killed_is_left_out_of_that_round_and_rejoins(places, out, moment, owed):
    """Before its ledger's commit nothing is owed; after it, what never left stays paid for, and nothing is paid again."""
    first, second = places
    first.start()
    second.start(kill(moment, 2))
    served(places, out, {"round 2/": second.restart})
    assert counted(out) == [2, 1, 2]
    (why,) = rounds(out)[1]["dropped"].values()
    assert "is ficpd-site running" in why
    assert ledgers(places, out) == [[1, 2, 3], owed]
    assert list(left(out, second.node)) == [1, 3]


def test_a_site_that_is_told_to_stop_finishes_the_order_under_way(places, out):
    first, second = places
    first.start()
    second.start(slow(SETTLE, 0.5, 2))
    ends: list[int] = []

    def stops() -> None:
        pid = second.pid
        subprocess.Popen(["sh", "-c", f"sleep 0.3; kill -TERM {pid}"])

    served(places, out, {"round 1/": stops, "round 2/": lambda: ends.append(second.ended())})
    assert ends == [0]
    assert not second.config.socket.exists()
    assert counted(out) == [2, 2, 1]
    assert ledgers(places, out) == [[1, 2, 3], [1, 2]]


@pytest.mark.parametrize(
    "moment",
    [
        kill("ficpd.experiments.run_directory:RunDir.save", 1),
        kill("ficpd.deployment.flower_engine:Flower._send", 2, after=True),
        kill("ficpd.experiments.run_directory:RunDir.save", 2),
        kill("os:fsync", 13),
        kill("ficpd.experiments.run_directory:RunDir.write_rounds", 2),
        kill("ficpd.experiments.run_directory:RunDir.save", 3, after=True),
        kill("ficpd.experiments.runner:Runner.finish", 1),
    ],
    ids=["first-round", "asked", "all-came", "half-written", "checkpoint", "last-saved", "no-result"],
)
def test_a_server_that_is_killed_goes_on_and_sites_repeat_the_round_from_store(warm, places, out, moment):
    for place in places:
        place.start()
    given = {"text": recipe(), "out": out, "sockets": {place.node: place.config.socket for place in places}}
    log = out.with_suffix(".log")
    assert warm.ended(warm.ask(coordinate=given, faults=[moment], log=log)) == -signal.SIGKILL
    assert not (out / "result.json").exists()
    assert warm.ended(warm.ask(coordinate=given | {"resume": True}, faults=[], log=log)) == 0, log.read_text()
    assert counted(out) == [2, 2, 2]
    assert [done["dropped"] for done in rounds(out)] == [{}, {}, {}]
    assert ledgers(places, out) == [[1, 2, 3], [1, 2, 3]]
    repeated = "save" in moment["at"] and not moment["after"]
    assert ("again, from store" in places[0].log.read_text()) >= repeated


@pytest.mark.slow
def test_a_site_as_its_owner_starts_it_is_killed_and_started_again(places, out):
    """`python -m ficpd site run`, no fork: the same ledger is found again, and the round from store."""
    first, second = places
    first.start()
    command = [sys.executable, "-m", "ficpd", "site", "run", str(second.file)]
    with open(second.log, "a") as log:

        def cold() -> subprocess.Popen:
            process = subprocess.Popen(command, stdout=log, stderr=log)
            while not second.answers():
                assert process.poll() is None, second.log.read_text()
                time.sleep(0.1)
            return process

        running = [cold()]

        def killed() -> None:
            running[-1].kill()
            running[-1].wait()

        try:
            at = {"round 1/": killed, "round 2/": lambda: running.append(cold())}
            served(places, out, at)
        finally:
            killed()
    assert counted(out) == [2, 1, 2]
    assert ledgers(places, out) == [[1, 2, 3], [1, 3]]


LATE = ["the update's round is 2, expected 3", "two of its updates came together"]
"""Why an update is dropped in the next round where late ones do not count, and where they do: one of a site counts."""


@pytest.mark.slow
@pytest.mark.parametrize("accept_late", [0, 1])
def test_what_comes_after_the_deadline_is_dropped_and_counted_or_counts(places, out, accept_late):
    for place in places:
        place.start()
    served(places, out, accept_late=accept_late, fates={(2, 2): "late"}, deadline_seconds=1.5)
    assert counted(out) == [2, 1, 2]
    *before, after = [done["dropped"] for done in rounds(out)]
    assert before == [{}, {"site-1": "no reply"}]
    assert LATE[accept_late] in after["site-1"]
    assert ledgers(places, out) == [[1, 2, 3], [1, 2, 3]]


@pytest.mark.slow
@pytest.mark.parametrize("accept_late", [0, 1])
def test_a_slow_site_is_waited_for_until_the_deadline(places, out, accept_late):
    first, second = places
    first.start()
    second.start(slow(SETTLE, 6.0, 2))
    served(places, out, accept_late=accept_late, deadline_seconds=4.0)
    assert counted(out) == [2, 1, 2]
    assert LATE[accept_late] in rounds(out)[2]["dropped"]["site-1"]
    assert 4.0 <= rounds(out)[1]["seconds_train"] < 6.0
    assert ledgers(places, out) == [[1, 2, 3], [1, 2, 3]]


@pytest.mark.slow
def test_a_site_whose_line_is_cut_is_left_out_and_found_again(places, out):
    """It is asked who it is while the other works on the third round, which takes long enough here."""
    first, second = places
    first.start(slow(SETTLE, 2.0, 3))
    second.start()
    gone: set[int] = set()
    served(places, out, {"round 1/": lambda: gone.add(2), "round 2/": gone.clear}, gone=gone)
    assert [done["dropped"] for done in rounds(out)] == [{}, {"site-1": "site-1 is not connected"}, {}]
    assert ledgers(places, out) == [[1, 2, 3], [1, 3]]


def test_a_node_whose_site_says_nothing_holds_nobody_up(places, out):
    """It is asked who it is, and the run neither waits for that before it begins nor in any round."""
    for place in places:
        place.start()
    sockets = {place.node: place.config.socket for place in places}
    with socket.socket(socket.AF_UNIX) as mute:
        path = places[0].config.socket.with_name("mute.sock")
        mute.bind(str(path))
        mute.listen()
        grid = grids.Loopback({**sockets, 9: path}, journal=processes.journal(out))
        options = {"wait_seconds": 3600.0, "deadline_seconds": 3600.0}
        given = (recipe(), out, sockets, False, print, grid)
        running = threading.Thread(target=processes.coordinate, args=given, kwargs=options)
        running.daemon = True
        running.start()
        running.join(60)
        assert not running.is_alive(), "the run waits for a node that says nothing"
    assert counted(out) == [2, 2, 2]


@pytest.mark.slow
def test_messages_that_come_twice_late_or_never_are_paid_for_once(places, out):
    """Site 0 gets two of its orders twice; site 1 an old one after the next one, and the last one never."""
    for place in places:
        place.start()
    served(places, out, fates={(1, 1): "twice", (2, 1): "after", (1, 3): "twice", (2, 3): "lost"}, deadline_seconds=1.5)
    assert counted(out) == [2, 2, 1]
    assert ledgers(places, out) == [[1, 2, 3], [1, 2]]
    assert "again, from store" in places[0].log.read_text()
    assert "round 1 of fedavg after round 2 was answered" in places[1].log.read_text()


@pytest.mark.slow
def test_an_answer_that_is_lost_is_paid_for_and_the_run_goes_on(places, out):
    for place in places:
        place.start()
    served(places, out, fates={(2, 2): "unanswered"}, deadline_seconds=1.5)
    assert counted(out) == [2, 1, 2]
    assert ledgers(places, out) == [[1, 2, 3], [1, 2, 3]]


@pytest.fixture
def tiny_disk(places: list[Place]) -> Iterator[Path]:
    """The second site's state on a disk of 1 MiB."""
    folder = places[1].config.state
    folder.mkdir(mode=0o700)
    command = ["mount", "-t", "tmpfs", "-o", "size=1m,mode=700", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("only root can mount a small disk, and not in every container")
    yield folder
    places[1].stop()
    subprocess.run(["umount", str(folder)], check=True)


def fill(folder: Path) -> None:
    with open(folder / "filling", "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(512))
        except OSError:
            return


@pytest.mark.parametrize("restarted", [False, True])
def test_a_site_whose_disk_is_full_releases_nothing_until_it_is_freed(places, out, tiny_disk, restarted):
    first, second = places
    first.start()
    second.start()

    def freed() -> None:
        (tiny_disk / "filling").unlink()
        if restarted:
            second.restart()

    served(places, out, {"round 1/": lambda: fill(tiny_disk), "round 2/": freed})
    assert counted(out) == [2, 1, 2]
    assert list(rounds(out)[1]["dropped"]) == ["site-1"]
    assert "database or disk is full" in second.log.read_text()
    assert ledgers(places, out) == [[1, 2, 3], [1, 3]]


@pytest.mark.parametrize(
    ("how", "broken", "words"),
    [
        (
            signal.SIGKILL,
            lambda state: os.truncate(state / f"{LEDGER}-wal", 20000),
            "assignments, and 3 were executed",
        ),
        (signal.SIGKILL, lambda state: (state / f"{LEDGER}-wal").unlink(), "assignments, and 3 were executed"),
        (
            signal.SIGTERM,
            lambda state: os.truncate(state / LEDGER, (state / LEDGER).stat().st_size // 2),
            "cannot be read as a ledger",
        ),
        (signal.SIGKILL, lambda state: (state / WITNESS).write_text(""), "expected a number"),
    ],
    ids=["half-a-wal", "no-wal", "half-a-file", "no-witness"],
)
def test_a_site_whose_ledger_is_half_written_does_not_start_until_it_is_restored(places, out, how, broken, words):
    first, second = places
    first.start()
    second.start()
    served(places, out)
    second.stop(how)
    state, copy = second.config.state, out.parent / "copy"
    shutil.copytree(state, copy)
    broken(state)
    with pytest.raises(AssertionError, match=words) as found:
        second.start()
    assert "Traceback" not in str(found.value)
    assert second.ended() == 1
    shutil.rmtree(state)
    shutil.copytree(copy, state)
    state.chmod(0o700)
    second.start()
    assert ledgers(places, out) == [[1, 2, 3], [1, 2, 3]]


def test_a_clock_that_is_a_day_off_changes_nothing_but_the_labels(places, out):
    """Nothing is decided by the calendar: waiting goes by a clock that nobody sets, and rounds by their number."""
    first, second = places
    day = 24 * 3600
    first.start()
    second.start(clock(day))
    served(places, out, {"round 1/": lambda: second.restart(clock(-day))})
    assert counted(out) == [2, 2, 2]
    assert ledgers(places, out) == [[1, 2, 3], [1, 2, 3]]
    assert labels(second)[0] > labels(second)[1], "the second order is labelled two days before the first"
    assert labels(first) == sorted(labels(first))


def labels(place: Place) -> list[str]:
    with closing(sqlite3.connect(place.config.state / LEDGER)) as file:
        return [at for (at,) in file.execute("select at from costs order by rowid")]


@pytest.mark.parametrize(("ahead", "refused"), [(-86400, False), (19 * 60, False), (21 * 60, True)])
def test_flower_takes_answers_while_a_clock_is_less_than_two_deadlines_ahead(monkeypatch, ahead, refused):
    """The one clock that counts: a deadline of ten minutes, and messages that live twice as long."""
    from flwr.app import Message, RecordDict
    from flwr.app.message import message as flowers
    from flwr.server.utils import validate_message

    from ficpd.deployment.flower_engine import Config, Flower
    from ficpd.federation.codec import SiteRequest

    grid = grids.Loopback({7: Path("none.sock")})
    order = Flower(Config(deadline_seconds=600), grid, "")._message(7, SiteRequest("hello"))  # type: ignore[arg-type]
    order.metadata._message_id = "order"
    now = flowers.now
    with monkeypatch.context() as patch:
        patch.setattr(flowers, "now", lambda: now() + timedelta(seconds=ahead))
        answer = Message(RecordDict(), reply_to=order)
    answer.metadata._message_id = "answer"
    assert any("ttl" in objection for objection in validate_message(answer, is_reply_message=True)) == refused
