"""The ledger: what has been released, in SQLite, written before it is sent. One file a run, one book a site.

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
from ficpd.types import Spend

VERSION = 1
SCHEMA = """
create table if not exists meta (run text not null, version integer not null);
create table if not exists lines (
    site text not null, round integer not null, method text not null, name text not null,
    sampling_rate real not null, noise_multiplier real not null, count integer not null, at text not null);
create table if not exists answers (
    site text not null, round integer not null, method text not null, body blob not null,
    primary key (site, round, method));
"""


@dataclass(frozen=True)
class Budget:
    """`epsilon` None: no wall. `certified`: a plan known to cost at most that, so that its parts need no accounting."""

    epsilon: float | None
    delta: float
    certified: Sequence[Spend] = ()

    @staticmethod
    def of(epsilon: float | None, delta: float, planned: Sequence[Spend]) -> "Budget":
        """The plan is certified if the accountant finds that it fits."""
        fits = epsilon is not None and accountant.epsilon(planned, delta) <= epsilon
        return Budget(epsilon, delta, tuple(planned) if fits else ())


class Ledger:
    """`rounds_paid`: the last round known to have released anything; a ledger that does not reach it has lost lines.

    Raises `LedgerError` for a file that is no ledger, another run's, or behind.
    """

    def __init__(self, path: Path | str, run: str, rounds_paid: int = 0):
        self.path, self.run = path, run
        with self.readable():
            self.file = sqlite3.connect(path, isolation_level=None, timeout=30)
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
        """The file is this run's, or becomes it if it is new."""
        with self.transaction():
            found = self.file.execute("select run, version from meta").fetchone()
            if found is None:
                self.file.execute("insert into meta values (?, ?)", (self.run, VERSION))
            elif found != (self.run, VERSION):
                raise LedgerError(
                    f"{self.path} is the ledger of run {found[0]} (version {found[1]}), this is run {self.run} (version "
                    f"{VERSION}); put this run's own ledger there, or begin in a new directory"
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

    def book(self, site: str, budget: Budget) -> "Book":
        return Book(self, site, budget)

    def close(self) -> None:
        self.file.close()


class Book:
    """One site's pages of a ledger, and its budget."""

    def __init__(self, ledger: Ledger, site: str, budget: Budget):
        self.ledger, self.site, self.budget = ledger, site, budget

    def spent(self) -> list[Spend]:
        """All that this site has released, equal lines added up."""
        rows = self.ledger.file.execute(
            "select name, sampling_rate, noise_multiplier, sum(count) from lines where site = ? group by 1, 2, 3",
            (self.site,),
        )
        return accountant.merged(Spend(*row) for row in rows)

    def epsilon(self) -> float:
        return accountant.epsilon(self.spent(), self.budget.delta)

    def afford(self, spends: Iterable[Spend]) -> None:
        """Raises `BudgetError` if these releases on top of what was spent would cross the budget."""
        if self.budget.epsilon is None:
            return
        together = [*self.spent(), *spends]
        if accountant.covers(self.budget.certified, together):
            return
        after = accountant.epsilon(together, self.budget.delta)
        if after > self.budget.epsilon:
            raise BudgetError(
                f"{self.site} has spent epsilon = {self.epsilon():.4g} of {self.budget.epsilon:g} (delta = "
                f"{self.budget.delta:g}); this release would make it {after:.4g}. It does not take place. Ask for "
                "fewer rounds or steps, or agree on a larger budget"
            )

    def answered(self, round: int, method: str) -> bytes | None:
        """The stored answer to an order that was carried out before."""
        row = self.ledger.file.execute(
            "select body from answers where site = ? and round = ? and method = ?", (self.site, round, method)
        ).fetchone()
        return row and row[0]

    def settle(self, round: int, method: str, spends: Iterable[Spend], body: bytes) -> None:
        """Commit an order's price and its answer together, then forget the answers of earlier rounds.

        Checks the budget once more under the lock, for two processes may have asked at the same time.
        """
        now = datetime.now(UTC).isoformat(timespec="seconds")
        spends = accountant.merged(spends)
        with self.ledger.transaction():
            self.afford(spends)
            self.ledger.file.executemany(
                "insert into lines values (?, ?, ?, ?, ?, ?, ?, ?)",
                [(self.site, round, method, *spend, now) for spend in spends],
            )
            self.ledger.file.execute("insert into answers values (?, ?, ?, ?)", (self.site, round, method, body))
            self.ledger.file.execute(
                "delete from answers where site = ? and method = ? and round < ?", (self.site, method, round)
            )

    def lines(self) -> str:
        """All lines as JSON, for a person who checks them."""
        names = ("round", "method", "name", "sampling_rate", "noise_multiplier", "count", "at")
        rows = self.ledger.file.execute(
            f"select {', '.join(names)} from lines where site = ? order by rowid", (self.site,)
        )
        return json.dumps([dict(zip(names, row, strict=True)) for row in rows])
