"""The ledger: what has been released, in SQLite, written before it is sent. A simulated run has one file with a book for
each client; a real site has one file with a book for each run, and pays for all of them from one budget.

An order's price, the released update and what the client keeps are committed in one transaction *before* the update
leaves. Killed before the commit, nothing has left and nothing is owed; killed after it, the same order is answered with
the stored bytes, which costs nothing again. So the ledger never states less than was released.
"""

import json
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from ficpd.errors import BudgetError, LedgerError
from ficpd.privacy import accountant
from ficpd.types import PrivacyCost

VERSION = 2
SCHEMA = """
create table if not exists meta (owner text not null, version integer not null);
create table if not exists lines (
    run text not null, site text not null, round integer not null, method text not null, name text not null,
    sampling_rate real not null, noise_multiplier real not null, count integer not null, at text not null);
create table if not exists orders (
    run text not null, site text not null, round integer not null, method text not null, at text not null,
    primary key (run, site, round, method));
create table if not exists answers (
    run text not null, site text not null, round integer not null, method text not null, body blob not null,
    primary key (run, site, round, method));
"""


@dataclass(frozen=True)
class Budget:
    """`epsilon` None: no wall. `certified`: a plan known to cost at most that, so that its parts need no accounting."""

    epsilon: float | None
    delta: float
    certified: Sequence[PrivacyCost] = ()

    @staticmethod
    def of(epsilon: float | None, delta: float, planned: Sequence[PrivacyCost]) -> "Budget":
        """The plan is certified if the accountant finds that it fits."""
        fits = epsilon is not None and accountant.epsilon(planned, delta) <= epsilon
        return Budget(epsilon, delta, tuple(planned) if fits else ())


class Ledger:
    """`owner`: the run or the site that it is the ledger of. `rounds_paid`: the last round known to have released
    anything; a ledger that does not reach it has lost lines.

    Raises `LedgerError` for a file that is no ledger, another owner's, or behind.
    """

    def __init__(self, path: Path | str, owner: str, rounds_paid: int = 0):
        self.path, self.owner = path, owner
        with self.readable():
            self.file = sqlite3.connect(path, isolation_level=None, timeout=30, check_same_thread=False)
            try:
                self._open(rounds_paid)
            except BaseException:
                self.file.close()
                raise

    def _open(self, rounds_paid: int) -> None:
        tables = {name for (name,) in self.file.execute("select name from sqlite_master where type = 'table'")}
        if tables and "meta" not in tables:
            raise LedgerError(f"{self.path} is a database of something else ({', '.join(sorted(tables))})")
        self.file.executescript("pragma journal_mode=wal; pragma synchronous=full;" + SCHEMA)
        self._claim()
        (last,) = self.file.execute("select coalesce(max(round), 0) from lines").fetchone()
        if last < rounds_paid:
            raise LedgerError(
                f"{self.path} ends with round {last}, and round {rounds_paid} was released: it is an older copy, or "
                "its -wal file is missing. Restore the newest copy of both, or begin in a new directory"
            )

    @contextmanager
    def readable(self) -> Iterator[None]:
        """SQLite's own errors in our words."""
        try:
            yield
        except sqlite3.OperationalError as error:
            raise LedgerError(
                f"{self.path}: {error}. Nothing was released; free the file or the disk, and resume"
            ) from error
        except sqlite3.DatabaseError as error:
            raise LedgerError(
                f"{self.path} cannot be read as a ledger: {error}. What was spent is not known: restore the file from a copy"
            ) from error

    def _claim(self) -> None:
        """The file is this owner's, or becomes it if it is new."""
        with self.transaction():
            columns = {name for _, name, *_ in self.file.execute("pragma table_info(meta)")}
            if "owner" not in columns:
                raise LedgerError(
                    f"{self.path} is a ledger of an earlier version, this is version {VERSION}: what was spent on it stays "
                    "spent; keep it, and begin in a new directory"
                )
            found = self.file.execute("select owner, version from meta").fetchone()
            if found is None:
                self.file.execute("insert into meta values (?, ?)", (self.owner, VERSION))
            elif found != (self.owner, VERSION):
                raise LedgerError(
                    f"{self.path} is the ledger of {found[0]} (version {found[1]}), this is {self.owner} (version "
                    f"{VERSION}); put its own ledger there, or begin in a new directory"
                )

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All or nothing, holding the write lock from the start."""
        with self.readable():
            self.file.execute("begin immediate")
            try:
                yield
            except BaseException:
                self.file.execute("rollback")
                raise
            self.file.execute("commit")

    def orders(self) -> int:
        """How many were carried out, in all."""
        with self.readable():
            (count,) = self.file.execute("select count(*) from orders").fetchone()
        return count

    def account(self, site: str, budget: Budget, run: str = "") -> "Account":
        """`run`: which of several runs, in a site's own ledger."""
        return Account(self, site, budget, run)

    def close(self) -> None:
        self.file.close()


class Account:
    """One site's pages of a ledger, and its budget. The budget is the site's, over all runs; answers are the run's."""

    def __init__(self, ledger: Ledger, site: str, budget: Budget, run: str = ""):
        self.ledger, self.site, self.budget, self.run = ledger, site, budget, run

    def spent(self) -> list[PrivacyCost]:
        """All that this site has released in any run, equal lines added up."""
        rows = self.ledger.file.execute(
            "select name, sampling_rate, noise_multiplier, sum(count) from lines where site = ? group by 1, 2, 3",
            (self.site,),
        )
        return accountant.merge(PrivacyCost(*row) for row in rows)

    def spent_in_other_runs(self) -> list[PrivacyCost]:
        """What this site has released in runs other than this one."""
        rows = self.ledger.file.execute(
            "select name, sampling_rate, noise_multiplier, sum(count) from lines where site = ? and run <> ? "
            "group by 1, 2, 3",
            (self.site, self.run),
        )
        return accountant.merge(PrivacyCost(*row) for row in rows)

    def epsilon(self) -> float:
        return accountant.epsilon(self.spent(), self.budget.delta)

    def check_budget(self, spends: Iterable[PrivacyCost]) -> None:
        """Raises `BudgetError` if these releases on top of what was spent would cross the budget."""
        if self.budget.epsilon is None:
            return
        together = [*self.spent(), *spends]
        if accountant.is_covered_by(self.budget.certified, together):
            return
        after = accountant.epsilon(together, self.budget.delta)
        if after > self.budget.epsilon:
            raise BudgetError(
                f"{self.site} has spent epsilon = {self.epsilon():.4g} of {self.budget.epsilon:g} (delta = "
                f"{self.budget.delta:g}); this release would make it {after:.4g}. It does not take place. Ask for "
                "fewer rounds or steps, or agree on a larger budget"
            )

    def stored_answer(self, round: int, method: str) -> bytes | None:
        """The stored answer to an order that was carried out before."""
        row = self.ledger.file.execute(
            "select body from answers where run = ? and site = ? and round = ? and method = ?",
            (self.run, self.site, round, method),
        ).fetchone()
        return row and row[0]

    def last_round(self, method: str) -> int:
        """The last round that was carried out; 0 if none was."""
        (round,) = self.ledger.file.execute(
            "select coalesce(max(round), 0) from orders where run = ? and site = ? and method = ?",
            (self.run, self.site, method),
        ).fetchone()
        return round

    def num_orders(self) -> int:
        """How many orders of this run."""
        (count,) = self.ledger.file.execute(
            "select count(*) from orders where run = ? and site = ?", (self.run, self.site)
        ).fetchone()
        return count

    def last_order(self) -> str | None:
        """When the newest was carried out (ISO 8601, UTC)."""
        return self.ledger.file.execute(
            "select max(at) from orders where run = ? and site = ?", (self.run, self.site)
        ).fetchone()[0]

    def commit(self, round: int, method: str, spends: Iterable[PrivacyCost], body: bytes) -> None:
        """Commit an order's price and its answer together, then forget the answers of earlier rounds.

        Checks the budget once more under the lock, for two processes may have asked at the same time.
        """
        now = datetime.now(UTC).isoformat(timespec="seconds")
        spends, order = accountant.merge(spends), (self.run, self.site, round, method)
        with self.ledger.transaction():
            self.check_budget(spends)
            self.ledger.file.executemany(
                "insert into lines values (?, ?, ?, ?, ?, ?, ?, ?, ?)", [(*order, *spend, now) for spend in spends]
            )
            self.ledger.file.execute("insert into orders values (?, ?, ?, ?, ?)", (*order, now))
            self.ledger.file.execute("insert into answers values (?, ?, ?, ?, ?)", (*order, body))
            self.ledger.file.execute(
                "delete from answers where run = ? and site = ? and method = ? and round < ?",
                (self.run, self.site, method, round),
            )

    def lines(self) -> str:
        """All lines as JSON, for a person who checks them."""
        names = ("run", "round", "method", "name", "sampling_rate", "noise_multiplier", "count", "at")
        rows = self.ledger.file.execute(
            f"select {', '.join(names)} from lines where site = ? order by rowid", (self.site,)
        )
        return json.dumps([dict(zip(names, row, strict=True)) for row in rows])
