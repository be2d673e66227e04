"""The ledger: what was released stands in it whatever happens, and nothing is released that it does not pay for."""

import json
import signal
import sqlite3
import subprocess
import sys

import pytest

from ficpd.errors import BudgetError, LedgerError
from ficpd.privacy import accountant
from ficpd.privacy.ledger import Book, Budget, Ledger
from ficpd.types import Spend

DELTA = 1e-5
FREE = Budget(None, DELTA)
STEPS = Spend("prompt", 0.1, 1.0, 2)
WEIGHT = Spend("weight", 1.0, 20.0)
RELEASE = Spend("update", 1.0, 2.0)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ledger.sqlite"


def budget(releases: float) -> Budget:
    """Enough for so many times `RELEASE`, a little more."""
    return Budget(1.001 * accountant.epsilon([RELEASE._replace(count=releases)], DELTA), DELTA)


def empty(book: Book) -> bool:
    return book.spent() == [] and book.lines() == "[]" and book.answered(1, "fedavg") is None


# ---------------------------------------------------------------- what is settled stays

KILLED = """
import os, signal, sys
from ficpd.privacy.ledger import Budget, Ledger
from ficpd.types import Spend

class Killing:
    def __init__(self, file, statement):
        self.file, self.statement = file, statement
    def execute(self, text, *rest):
        if text.startswith(self.statement):
            os.kill(os.getpid(), signal.SIGKILL)
        return self.file.execute(text, *rest)
    def executemany(self, text, rows):
        return self.file.executemany(text, rows)

def work(statement):
    ledger = Ledger(f"{sys.argv[1]}/{statement}", "a run")
    book = ledger.book("north", Budget(None, 1e-5))
    book.settle(1, "fedavg", [Spend("prompt", 0.1, 1.0, 2)], b"first")
    ledger.file = Killing(ledger.file, statement)
    book.afford([Spend("prompt", 0.1, 1.0, 2)])
    book.settle(2, "fedavg", [Spend("prompt", 0.1, 1.0, 2)], b"second")
    os.kill(os.getpid(), signal.SIGKILL)

ends = []
for statement in sys.argv[2:]:
    child = os.fork()
    if not child:
        work(statement)
    ends.append(os.waitpid(child, 0)[1])
print(*ends)
"""


def test_killed_before_the_commit_nothing_is_owed_and_after_it_all_is_there(tmp_path):
    before = ["begin", "insert into answers", "delete", "commit"]
    command = [sys.executable, "-c", KILLED, str(tmp_path), *before, "after"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == [str(int(signal.SIGKILL))] * 5, done.stderr
    for stage in before:
        book = Ledger(tmp_path / stage, "a run").book("north", FREE)
        assert book.spent() == [STEPS], stage
        assert (book.answered(1, "fedavg"), book.answered(2, "fedavg")) == (b"first", None), stage
    book = Ledger(tmp_path / "after", "a run").book("north", FREE)
    assert book.spent() == [STEPS._replace(count=4)]
    assert (book.answered(1, "fedavg"), book.answered(2, "fedavg")) == (None, b"second")


def test_a_ledger_is_found_again_as_it_was_left(path):
    ledger = Ledger(path, "a run")
    ledger.book("north", FREE).settle(1, "fedavg", [STEPS, WEIGHT], b"update")
    ledger.close()
    book = Ledger(str(path), "a run").book("north", FREE)
    assert book.spent() == [STEPS, WEIGHT]
    assert book.answered(1, "fedavg") == b"update"
    assert book.epsilon() == accountant.epsilon([STEPS, WEIGHT], DELTA)


def test_what_is_committed_is_on_the_disk(path):
    """Level 2, full: SQLite waits for the disk at every commit."""
    assert Ledger(path, "a run").file.execute("pragma synchronous").fetchone() == (2,)


def test_an_order_that_fails_while_it_is_written_leaves_no_line(path):
    book = Ledger(path, "a run").book("north", FREE)
    book.settle(1, "fedavg", [STEPS], b"first")
    with pytest.raises((LedgerError, sqlite3.IntegrityError)):
        book.settle(1, "fedavg", [WEIGHT], b"again")
    for seen in (book, Ledger(path, "a run").book("north", FREE)):
        assert seen.spent() == [STEPS]
        assert seen.answered(1, "fedavg") == b"first"
    book.settle(2, "fedavg", [WEIGHT], b"second")  # and the ledger goes on
    assert book.spent() == [STEPS, WEIGHT]


def test_equal_spends_are_one_line_and_nothing_spent_is_none(path):
    book = Ledger(path, "a run").book("north", FREE)
    book.settle(1, "fedavg", [STEPS, STEPS._replace(count=3)], b"")
    book.settle(2, "fedavg", [], b"free")
    assert book.spent() == [STEPS._replace(count=5)]
    assert (len(json.loads(book.lines())), book.answered(2, "fedavg")) == (1, b"free")


# ---------------------------------------------------------------- whose it is


def test_another_runs_ledger_is_refused_by_name_and_left_alone(path):
    Ledger(path, "run monday").book("north", FREE).settle(1, "fedavg", [STEPS], b"")
    with pytest.raises(LedgerError, match=r"is the ledger of run monday .*this is run tuesday"):
        Ledger(path, "run tuesday")
    assert Ledger(path, "run monday").book("north", FREE).spent() == [STEPS]


def test_another_versions_ledger_is_refused(path):
    Ledger(path, "run monday").file.execute("update meta set version = 99")
    with pytest.raises(LedgerError, match=r"version 99"):
        Ledger(path, "run monday")


@pytest.mark.parametrize("content", [b"no database " * 100, b"SQLite format 3\0" + bytes(200)])
def test_a_file_that_is_no_ledger_is_refused_and_left_alone(path, content):
    path.write_bytes(content)
    with pytest.raises(LedgerError, match=r"cannot be read as a ledger.*restore the file"):
        Ledger(path, "a run")
    assert path.read_bytes() == content


def test_a_place_where_no_file_can_be_is_refused(tmp_path):
    with pytest.raises(LedgerError, match="unable to open"):
        Ledger(tmp_path / "missing" / "ledger.sqlite", "a run")


def test_books_of_sites_do_not_mix(path):
    ledger = Ledger(path, "a run")
    north, south = (ledger.book(site, budget(1)) for site in ("north", "south"))
    north.settle(1, "fedavg", [RELEASE], b"from the north")
    assert empty(south)
    south.settle(1, "fedavg", [RELEASE], b"from the south")
    assert north.spent() == south.spent() == [RELEASE]
    south.settle(2, "fedavg", [], b"later")
    assert north.answered(1, "fedavg") == b"from the north"


# ---------------------------------------------------------------- answers


def test_the_last_answer_is_kept_and_those_of_earlier_rounds_are_forgotten(path):
    book = Ledger(path, "a run").book("north", FREE)
    for round in (1, 2, 5):
        book.settle(round, "fedavg", [STEPS], b"%d" % round)
    book.settle(1, "ficpd", [STEPS], b"another method")
    assert [book.answered(round, "fedavg") for round in (1, 2, 3, 5)] == [None, None, None, b"5"]
    assert book.answered(1, "ficpd") == b"another method"
    assert book.answered(5, "ficpd") is None
    assert book.spent() == [STEPS._replace(count=8)]  # lines are never forgotten


def test_lines_are_for_a_person_to_check(path):
    book = Ledger(path, "a run").book("north", FREE)
    assert book.lines() == "[]"
    book.settle(1, "fedavg", [WEIGHT, STEPS], b"")
    book.settle(2, "fedavg", [STEPS], b"")
    lines = json.loads(book.lines())
    assert [(line["round"], line["name"], line["count"]) for line in lines] == [
        (1, "prompt", 2), (1, "weight", 1), (2, "prompt", 2),
    ]  # fmt: skip
    assert lines[1].items() >= {"method": "fedavg", "sampling_rate": 1.0, "noise_multiplier": 20.0}.items()
    assert lines[0]["at"].endswith("+00:00")


# ---------------------------------------------------------------- the wall


def test_a_release_beyond_the_budget_is_refused_in_words_and_nothing_is_written(path):
    book = Ledger(path, "a run").book("north", budget(2))
    book.settle(1, "fedavg", [RELEASE, RELEASE], b"two")
    spent, allowed, after = book.epsilon(), book.budget.epsilon, accountant.epsilon([RELEASE._replace(count=3)], DELTA)
    words = f"north has spent epsilon = {spent:.4g} of {allowed:g} .*would make it {after:.4g}.*larger budget"
    for ask in (lambda: book.afford([RELEASE]), lambda: book.settle(2, "fedavg", [RELEASE], b"three")):
        with pytest.raises(BudgetError, match=words):
            ask()
        assert book.spent() == [RELEASE._replace(count=2)]
        assert (book.answered(1, "fedavg"), book.answered(2, "fedavg")) == (b"two", None)
    book.settle(2, "fedavg", [], b"free")  # what costs nothing goes on


def test_without_a_wall_all_is_written(path):
    book = Ledger(path, "a run").book("north", FREE)
    book.afford([Spend("update", 1.0, 1e-3, 1000)])
    book.settle(1, "fedavg", [Spend("update", 1.0, 1e-3, 1000)], b"")
    assert book.spent() == [Spend("update", 1.0, 1e-3, 1000)]


def test_a_certified_plan_needs_no_accountant_until_the_first_line_beyond_it(path, monkeypatch):
    allowed = budget(3)
    certified = Budget.of(allowed.epsilon, DELTA, [RELEASE._replace(count=3)])
    assert certified.certified == (RELEASE._replace(count=3),)

    def called(*_):
        raise AssertionError("the accountant was asked")

    book = Ledger(path, "a run").book("north", certified)
    with monkeypatch.context() as patch:
        patch.setattr(accountant, "epsilon", called)
        for round in (1, 2, 3):
            book.afford([RELEASE])
            book.settle(round, "fedavg", [RELEASE], b"")
        with pytest.raises(AssertionError, match="asked"):
            book.afford([RELEASE])
    with pytest.raises(BudgetError):
        book.settle(4, "fedavg", [RELEASE], b"")
    with pytest.raises(BudgetError):
        book.afford([Spend("other", 1.0, 1.0)])
    assert book.spent() == [RELEASE._replace(count=3)]


def test_a_plan_that_does_not_fit_is_not_certified():
    assert Budget.of(budget(2).epsilon, DELTA, [RELEASE._replace(count=3)]).certified == ()
    assert Budget.of(None, DELTA, [RELEASE]) == FREE


def test_two_that_both_could_afford_it_cannot_both_have_it(path):
    """The budget is checked once more under the lock: asked at the same time, the second is refused."""
    ours, theirs = (Ledger(path, "a run").book("north", budget(1)) for _ in range(2))
    ours.afford([RELEASE])
    theirs.afford([RELEASE])
    ours.settle(1, "fedavg", [RELEASE], b"ours")
    with pytest.raises(BudgetError):
        theirs.settle(2, "fedavg", [RELEASE], b"theirs")
    assert ours.spent() == theirs.spent() == [RELEASE]
    assert (theirs.answered(1, "fedavg"), theirs.answered(2, "fedavg")) == (b"ours", None)


def test_the_lock_is_held_while_the_budget_is_checked(path, monkeypatch):
    book, other = (Ledger(path, "a run").book("north", FREE) for _ in range(2))
    other.ledger.file.execute("pragma busy_timeout = 0")

    def check(spends):
        with pytest.raises(LedgerError, match="locked"):
            other.settle(2, "fedavg", [RELEASE], b"theirs")

    monkeypatch.setattr(book, "afford", check)
    book.settle(1, "fedavg", [RELEASE], b"ours")
    assert book.spent() == [RELEASE]
