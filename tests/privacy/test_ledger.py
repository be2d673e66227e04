"""The ledger: what was released stands in it whatever happens, and nothing is released that it does not pay for."""

import json
import resource
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing

import pytest

from ficpd.errors import BudgetError, LedgerError
from ficpd.privacy import accountant
from ficpd.privacy.ledger import Account, Budget, Ledger, Unit
from ficpd.types import PrivacyCost

DELTA = 1e-5
FREE = Budget(None, DELTA)
STEPS = PrivacyCost("prompt", 0.1, 1.0, 2)
WEIGHT = PrivacyCost("weight", 1.0, 20.0)
RELEASE = PrivacyCost("update", 1.0, 2.0)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ledger.sqlite"


def budget(releases: float) -> Budget:
    """Enough for so many times `RELEASE`, a little more."""
    return Budget(1.001 * accountant.epsilon([RELEASE._replace(count=releases)], DELTA), DELTA)


def empty(account: Account) -> bool:
    return account.spent() == [] and account.costs_json() == "[]" and account.stored_update(1, "fedavg") is None


KILLED = """
import os, signal, sys
from ficpd.privacy.ledger import Budget, Ledger
from ficpd.types import PrivacyCost

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
    book = ledger.account("north", Budget(None, 1e-5))
    book.commit(1, "fedavg", [PrivacyCost("prompt", 0.1, 1.0, 2)], b"first")
    ledger.file = Killing(ledger.file, statement)
    book.check_budget([PrivacyCost("prompt", 0.1, 1.0, 2)])
    book.commit(2, "fedavg", [PrivacyCost("prompt", 0.1, 1.0, 2)], b"second")
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
    before = ["begin", "insert into updates", "delete", "commit"]
    command = [sys.executable, "-c", KILLED, str(tmp_path), *before, "after"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == [str(int(signal.SIGKILL))] * 5, done.stderr
    for stage in before:
        account = Ledger(tmp_path / stage, "a run").account("north", FREE)
        assert account.spent() == [STEPS], stage
        assert (account.stored_update(1, "fedavg"), account.stored_update(2, "fedavg")) == (b"first", None), stage
    account = Ledger(tmp_path / "after", "a run").account("north", FREE)
    assert account.spent() == [STEPS._replace(count=4)]
    assert (account.stored_update(1, "fedavg"), account.stored_update(2, "fedavg")) == (None, b"second")


def test_a_ledger_is_found_again_as_it_was_left(path):
    ledger = Ledger(path, "a run")
    ledger.account("north", FREE).commit(1, "fedavg", [STEPS, WEIGHT], b"update")
    ledger.close()
    account = Ledger(str(path), "a run").account("north", FREE)
    assert account.spent() == [STEPS, WEIGHT]
    assert account.stored_update(1, "fedavg") == b"update"
    assert account.epsilon() == accountant.epsilon([STEPS, WEIGHT], DELTA)


def test_what_is_committed_is_on_the_disk(path):
    """Level 2, full: SQLite waits for the disk at every commit."""
    assert Ledger(path, "a run").file.execute("pragma synchronous").fetchone() == (2,)


def test_an_order_that_fails_while_it_is_written_leaves_no_line(path):
    account = Ledger(path, "a run").account("north", FREE)
    account.commit(1, "fedavg", [STEPS], b"first")
    with pytest.raises((LedgerError, sqlite3.IntegrityError)):
        account.commit(1, "fedavg", [WEIGHT], b"again")
    for seen in (account, Ledger(path, "a run").account("north", FREE)):
        assert seen.spent() == [STEPS]
        assert seen.stored_update(1, "fedavg") == b"first"
    account.commit(2, "fedavg", [WEIGHT], b"second")  # and the ledger goes on
    assert account.spent() == [STEPS, WEIGHT]


def test_a_commit_that_fails_leaves_no_answer_to_be_sent(path):
    """Without a write-ahead log (on some network disks), a reader makes the commit itself fail."""
    ledger = Ledger(path, "a run")
    assert ledger.file.execute("pragma journal_mode = delete").fetchone() == ("delete",)
    ledger.file.execute("pragma busy_timeout = 0")
    account = ledger.account("north", FREE)
    account.commit(1, "fedavg", [STEPS], b"first")
    reader = sqlite3.connect(path, isolation_level=None)
    reader.execute("begin")
    reader.execute("select * from costs").fetchone()
    with pytest.raises(LedgerError, match="database is locked"):
        account.commit(2, "fedavg", [WEIGHT], b"second")
    assert account.stored_update(2, "fedavg") is None
    assert account.spent() == [STEPS]
    reader.close()
    account.commit(2, "fedavg", [WEIGHT], b"second")  # and the ledger goes on
    assert account.spent() == [STEPS, WEIGHT]


def test_a_commit_beyond_the_disk_is_an_error_about_the_disk(path):
    """SQLite ends the transaction by itself then."""
    account = Ledger(path, "a run").account("north", FREE)
    account.commit(1, "fedavg", [STEPS], b"first")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 17, hard))
    try:
        with pytest.raises(LedgerError, match=r"disk I/O error|is full"):
            account.commit(2, "fedavg", [WEIGHT], bytes(3 << 20))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert account.stored_update(2, "fedavg") is None
    assert account.spent() == [STEPS]


def test_equal_spends_are_one_line_and_nothing_spent_is_none(path):
    account = Ledger(path, "a run").account("north", FREE)
    account.commit(1, "fedavg", [STEPS, STEPS._replace(count=3)], b"")
    account.commit(2, "fedavg", [], b"free")
    assert account.spent() == [STEPS._replace(count=5)]
    assert (len(json.loads(account.costs_json())), account.stored_update(2, "fedavg")) == (1, b"free")


def test_no_question_about_one_site_reads_the_costs_of_all(path):
    account, asked = Ledger(path, "a run").account("north", FREE), []
    account.ledger.file.set_trace_callback(asked.append)
    account.commit(1, "fedavg", [STEPS], b"")
    account.spent()
    account.spent_in_other_runs()
    account.costs_json()
    account.ledger.units("north")
    account.ledger.file.set_trace_callback(None)
    questions = [query for query in asked if " from costs where site = " in query]
    assert len(questions) >= 4
    for query in questions:
        steps = [row[3] for row in account.ledger.file.execute(f"explain query plan {query}")]
        assert "SEARCH costs USING INDEX costs_of_site (site=?)" in steps


def test_another_runs_ledger_is_refused_by_name_and_left_alone(path):
    Ledger(path, "run monday").account("north", FREE).commit(1, "fedavg", [STEPS], b"")
    with pytest.raises(LedgerError, match=r"is the ledger of run monday, this is run tuesday"):
        Ledger(path, "run tuesday")
    assert Ledger(path, "run monday").account("north", FREE).spent() == [STEPS]


@pytest.mark.parametrize(("columns", "row", "version"), [
    ("owner text, version integer", "('run monday', 3)", 3),
    ("site text, version integer", "('run monday', 2)", 2), ("owner text, version integer", "('run monday', 99)", 99),
    ("run text", "('run monday')", 1),
])  # fmt: skip
def test_another_formats_ledger_is_refused_and_left_alone(path, columns, row, version):
    with closing(sqlite3.connect(path)) as file:
        file.executescript(f"create table meta ({columns}); insert into meta values {row};")
    before = path.read_bytes()
    with pytest.raises(LedgerError, match=f"format {version},.* stays spent"):
        Ledger(path, "run monday")
    assert path.read_bytes() == before


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
    north, south = (ledger.account(site, budget(1)) for site in ("north", "south"))
    north.commit(1, "fedavg", [RELEASE], b"from the north")
    assert empty(south)
    south.commit(1, "fedavg", [RELEASE], b"from the south")
    assert north.spent() == south.spent() == [RELEASE]
    south.commit(2, "fedavg", [], b"later")
    assert north.stored_update(1, "fedavg") == b"from the north"


def test_the_last_answer_is_kept_and_those_of_earlier_rounds_are_forgotten(path):
    account = Ledger(path, "a run").account("north", FREE)
    for round in (1, 2, 5):
        account.commit(round, "fedavg", [STEPS], b"%d" % round)
    account.commit(1, "ficpd", [STEPS], b"another method")
    assert [account.stored_update(round, "fedavg") for round in (1, 2, 3, 5)] == [None, None, None, b"5"]
    assert account.stored_update(1, "ficpd") == b"another method"
    assert account.stored_update(5, "ficpd") is None
    assert account.spent() == [STEPS._replace(count=8)]  # lines are never forgotten


def test_lines_are_for_a_person_to_check(path):
    account = Ledger(path, "a run").account("north", FREE)
    assert account.costs_json() == "[]"
    account.commit(1, "fedavg", [WEIGHT, STEPS], b"")
    account.commit(2, "fedavg", [STEPS], b"")
    lines = json.loads(account.costs_json())
    assert [(line["round"], line["name"], line["count"]) for line in lines] == [
        (1, "prompt", 2), (1, "weight", 1), (2, "prompt", 2),
    ]  # fmt: skip
    assert lines[1].items() >= {"method": "fedavg", "sampling_rate": 1.0, "noise_multiplier": 20.0}.items()
    assert lines[0]["at"].endswith("+00:00")


@pytest.mark.parametrize("unit", [Unit(), Unit("subject", 8), Unit("client")])
def test_each_line_says_what_it_protects(path, unit):
    account = Ledger(path, "a run").account("north", FREE, unit=unit)
    account.commit(1, "fedavg", [STEPS, WEIGHT], b"")
    assert {(line["unit"], line["max_records_per_subject"]) for line in json.loads(account.costs_json())} == {unit}
    assert account.ledger.units("north") == [unit]
    assert account.ledger.units("south") == []


@pytest.mark.parametrize(("first", "second"), [("record", "subject"), ("subject", "record"), ("client", "record")])
def test_costs_of_two_units_do_not_come_into_one_ledger(path, first, second):
    ledger = Ledger(path, "a run")
    ledger.account("north", FREE, "one", Unit(first)).commit(1, "fedavg", [STEPS], b"")
    other = ledger.account("north", FREE, "two", Unit(second))
    said = f"north counts what was spent for one {first}, and this is for one {second}: "
    with pytest.raises(LedgerError, match=said):
        other.commit(1, "fedavg", [STEPS], b"")
    assert other.spent() == [STEPS]
    other.commit(1, "fedavg", [], b"free")
    ledger.account("south", FREE, "two", Unit(second)).commit(1, "fedavg", [STEPS], b"")
    ledger.account("north", FREE, "two", Unit(first, 4)).commit(2, "fedavg", [STEPS], b"")
    assert ledger.units("north") == [Unit(first), Unit(first, 4)]


def test_a_release_beyond_the_budget_is_refused_in_words_and_nothing_is_written(path):
    account = Ledger(path, "a run").account("north", budget(2))
    account.commit(1, "fedavg", [RELEASE, RELEASE], b"two")
    spent, allowed = account.epsilon(), account.budget.epsilon
    after = accountant.epsilon([RELEASE._replace(count=3)], DELTA)
    words = f"north has spent epsilon = {spent:.4g} of {allowed:g} .*would make it {after:.4g}.*larger budget"
    for ask in (lambda: account.check_budget([RELEASE]), lambda: account.commit(2, "fedavg", [RELEASE], b"three")):
        with pytest.raises(BudgetError, match=words):
            ask()
        assert account.spent() == [RELEASE._replace(count=2)]
        assert (account.stored_update(1, "fedavg"), account.stored_update(2, "fedavg")) == (b"two", None)
    account.commit(2, "fedavg", [], b"free")  # what costs nothing goes on


def test_without_a_wall_all_is_written(path):
    account = Ledger(path, "a run").account("north", FREE)
    account.check_budget([PrivacyCost("update", 1.0, 1e-3, 1000)])
    account.commit(1, "fedavg", [PrivacyCost("update", 1.0, 1e-3, 1000)], b"")
    assert account.spent() == [PrivacyCost("update", 1.0, 1e-3, 1000)]


def test_a_certified_plan_needs_no_accountant_until_the_first_line_beyond_it(path, monkeypatch):
    allowed = budget(3)
    certified = Budget.of(allowed.epsilon, DELTA, [RELEASE._replace(count=3)])
    assert certified.certified == (RELEASE._replace(count=3),)

    def called(*_):
        raise AssertionError("the accountant was asked")

    account = Ledger(path, "a run").account("north", certified)
    with monkeypatch.context() as patch:
        patch.setattr(accountant, "epsilon", called)
        for round in (1, 2, 3):
            account.check_budget([RELEASE])
            account.commit(round, "fedavg", [RELEASE], b"")
        with pytest.raises(AssertionError, match="asked"):
            account.check_budget([RELEASE])
    with pytest.raises(BudgetError):
        account.commit(4, "fedavg", [RELEASE], b"")
    with pytest.raises(BudgetError):
        account.check_budget([PrivacyCost("other", 1.0, 1.0)])
    assert account.spent() == [RELEASE._replace(count=3)]


def test_a_plan_that_does_not_fit_is_not_certified():
    assert Budget.of(budget(2).epsilon, DELTA, [RELEASE._replace(count=3)]).certified == ()
    assert Budget.of(None, DELTA, [RELEASE]) == FREE


def test_two_that_both_could_afford_it_cannot_both_have_it(path):
    """The budget is checked once more under the lock: asked at the same time, the second is refused."""
    ours, theirs = (Ledger(path, "a run").account("north", budget(1)) for _ in range(2))
    ours.check_budget([RELEASE])
    theirs.check_budget([RELEASE])
    ours.commit(1, "fedavg", [RELEASE], b"ours")
    with pytest.raises(BudgetError):
        theirs.commit(2, "fedavg", [RELEASE], b"theirs")
    assert ours.spent() == theirs.spent() == [RELEASE]
    assert (theirs.stored_update(1, "fedavg"), theirs.stored_update(2, "fedavg")) == (b"ours", None)


def test_the_lock_is_held_while_the_budget_is_checked(path, monkeypatch):
    account, other = (Ledger(path, "a run").account("north", FREE) for _ in range(2))
    other.ledger.file.execute("pragma busy_timeout = 0")

    def check(spends):
        with pytest.raises(LedgerError, match="locked"):
            other.commit(2, "fedavg", [RELEASE], b"theirs")

    monkeypatch.setattr(account, "check_budget", check)
    account.commit(1, "fedavg", [RELEASE], b"ours")
    assert account.spent() == [RELEASE]
