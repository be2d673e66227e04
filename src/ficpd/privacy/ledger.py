"""The ledger: records every release in SQLite before it is sent.

A simulated run has one file with an account for each client. A real site has one file with an account for each run, and
one budget for all of them.

An assignment's costs, its update and the client's state are committed in one transaction *before* the update is sent. A
process killed before the commit has released nothing. If it is killed after the commit, the same assignment is answered with
the stored bytes, at no further cost. So the ledger never states less than was released.
"""

import json
import os
import sqlite3
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from ficpd.errors import BudgetError, LedgerError
from ficpd.privacy import accountant
from ficpd.types import PrivacyCost

VERSION = 4
SCHEMA = """
create table if not exists meta (owner text not null, version integer not null);
create table if not exists costs (
    run text not null, site text not null, round integer not null, method text not null, name text not null,
    sampling_rate real not null, noise_multiplier real not null, count integer not null,
    unit text not null, max_records_per_subject integer, at text not null);
create index if not exists costs_of_site on costs (site);
create table if not exists assignments (
    run text not null, site text not null, round integer not null, method text not null, at text not null,
    primary key (run, site, round, method));
create table if not exists updates (
    run text not null, site text not null, round integer not null, method text not null, body blob not null,
    primary key (run, site, round, method));
"""


class Unit(NamedTuple):
    """Names the privacy unit of a cost: `record`, `subject` or `client` (`none`: nothing).

    max_records_per_subject: records of a subject in a step; None: the unit is not a subject.
    """

    name: str = "record"
    max_records_per_subject: int | None = None

    @staticmethod
    def of(guarantee: Mapping[str, Any]) -> "Unit":
        """Reads the unit from `Mechanism.guarantee`."""
        return Unit(guarantee["unit"], guarantee.get("max_records_per_subject"))


A_RECORD = Unit()


@dataclass(frozen=True)
class Budget:
    """`epsilon` None: unlimited. `certified`: a plan known to cost at most `epsilon`; its parts need no accounting."""

    epsilon: float | None
    delta: float
    certified: Sequence[PrivacyCost] = ()

    @staticmethod
    def of(epsilon: float | None, delta: float, planned: Sequence[PrivacyCost]) -> "Budget":
        """Certifies the plan if it costs at most `epsilon`."""
        fits = epsilon is not None and accountant.epsilon(planned, delta) <= epsilon
        return Budget(epsilon, delta, tuple(planned) if fits else ())


class Ledger:
    """`owner`: the run or site that the file belongs to. `rounds_paid`: the last round known to be released.

    Raises `LedgerError` for a file that is no ledger, of another owner or version, or older than `rounds_paid`.
    """

    def __init__(self, path: Path | str, owner: str, rounds_paid: int = 0):
        self.path, self.owner = path, owner
        if path != ":memory:":  # SQLite gives its other files the same mode
            with suppress(OSError):
                os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
                os.chmod(path, 0o600)
        with self.readable():
            self.file = sqlite3.connect(path, isolation_level=None, timeout=30, check_same_thread=False)
            try:
                self._open(rounds_paid)
            except BaseException:
                self.file.close()
                raise
        weakref.finalize(self, self.file.close)  # after a run that ended with an error

    def _open(self, rounds_paid: int) -> None:
        tables = {name for (name,) in self.file.execute("select name from sqlite_master where type = 'table'")}
        if tables and "meta" not in tables:
            raise LedgerError(
                f"{self.path} is no ledger, but a database with other tables ({', '.join(sorted(tables))})"
            )
        if tables:
            self._check_version()
        self.file.executescript("pragma journal_mode=wal; pragma synchronous=full;" + SCHEMA)
        with self.transaction():
            found = self.file.execute("select owner from meta").fetchone()
            if found is None:
                self.file.execute("insert into meta values (?, ?)", (self.owner, VERSION))
            elif found != (self.owner,):
                raise LedgerError(
                    f"{self.path} is the ledger of {found[0]}, this is {self.owner}. Put its own ledger there, or begin "
                    "in a new directory"
                )
        (last,) = self.file.execute("select coalesce(max(round), 0) from costs").fetchone()
        if last < rounds_paid:
            raise LedgerError(
                f"{self.path} ends with round {last}, and round {rounds_paid} was released: it is an older copy, or "
                "its -wal file is missing. Restore the newest copy of both, or begin in a new directory"
            )

    def _check_version(self) -> None:
        """Refuses a file of another format before anything is written to it."""
        columns = {row[1] for row in self.file.execute("pragma table_info(meta)")}
        found = self.file.execute("select version from meta").fetchone() if "version" in columns else (1,)
        if found is not None and found != (VERSION,):
            raise LedgerError(
                f"{self.path} is a ledger of format {found[0]}, and this ficpd reads format {VERSION}. Nothing was changed, "
                "and what was spent stays spent: go on with the ficpd that wrote it"
            )

    @contextmanager
    def readable(self) -> Iterator[None]:
        """Raises SQLite's errors as `LedgerError`."""
        try:
            yield
        except sqlite3.OperationalError as error:
            raise LedgerError(
                f"{self.path}: {error}. Nothing was released; free the file or the disk, and resume"
            ) from error
        except sqlite3.DatabaseError as error:
            raise LedgerError(
                f"{self.path} cannot be read as a ledger: {error}. The privacy cost is unknown: restore the file from a copy"
            ) from error

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Commits all or nothing; holds the write lock from the start.

        Rolls back if the commit itself fails, because this connection would read back what is not on the disk.
        """
        with self.readable():
            self.file.execute("begin immediate")
            try:
                yield
                self.file.execute("commit")
            except BaseException:
                if self.file.in_transaction:  # a full disk ends it
                    self.file.execute("rollback")
                raise

    def num_assignments(self) -> int:
        """Counts the completed assignments of all runs."""
        return self.value("select count(*) from assignments")

    def num_costs(self) -> int:
        """Counts the costs of all runs."""
        return self.value("select count(*) from costs")

    def value(self, query: str, *values: Any) -> Any:
        """Returns the first value that a query finds; None without one."""
        with self.readable():
            row = self.file.execute(query, values).fetchone()
        return row and row[0]

    def account(self, site: str, budget: Budget, run: str = "", unit: Unit = A_RECORD) -> "Account":
        """Opens an account. `run`: one of several runs in a site's ledger. `unit`: of its future costs."""
        return Account(self, site, budget, run, unit)

    def units(self, site: str) -> list[Unit]:
        """Lists the different units of a site's costs."""
        query = "select distinct unit, max_records_per_subject from costs where site = ? order by 1, 2"
        return [Unit(*row) for row in self.file.execute(query, (site,))]

    def check_unit(self, site: str, unit: str) -> None:
        """Raises `LedgerError` if a site's costs protect another unit, because costs of two units cannot be added."""
        if others := sorted({found.name for found in self.units(site)} - {unit}):
            raise LedgerError(
                f"the ledger of {site} counts what was spent for one {others[0]}, and this is for one {unit}: expected the "
                "same unit, because costs of two units cannot be added up. Go back to the earlier data.columns.subject and "
                "privacy.name, or begin a new folder with a budget of its own"
            )

    def close(self) -> None:
        self.file.close()


class Account:
    """One site's part of a ledger. The budget is for all of its runs; assignments and updates are of one run."""

    def __init__(self, ledger: Ledger, site: str, budget: Budget, run: str, unit: Unit):
        self.ledger, self.site, self.budget, self.run, self.unit = ledger, site, budget, run, unit

    def spent(self) -> list[PrivacyCost]:
        """Adds up the costs of this site in all runs."""
        return self._spent("")

    def spent_in_other_runs(self) -> list[PrivacyCost]:
        """Adds up the costs of this site in runs other than this one."""
        return self._spent(" and run <> ?", self.run)

    def _spent(self, condition: str, *values: str) -> list[PrivacyCost]:
        columns = "name, sampling_rate, noise_multiplier, sum(count)"
        query = f"select {columns} from costs where site = ?{condition} group by 1, 2, 3"
        return accountant.merge(PrivacyCost(*row) for row in self.ledger.file.execute(query, (self.site, *values)))

    def epsilon(self) -> float:
        return accountant.epsilon(self.spent(), self.budget.delta)

    def check_budget(self, costs: Iterable[PrivacyCost]) -> None:
        """Raises `BudgetError` if the spent costs and these together would exceed the budget."""
        if self.budget.epsilon is None:
            return
        together = [*self.spent(), *costs]
        if accountant.is_covered_by(self.budget.certified, together):
            return
        after = accountant.epsilon(together, self.budget.delta)
        if after > self.budget.epsilon:
            remedy = "Plan fewer rounds or steps, or agree on a larger budget"
            if self.budget.certified:
                remedy = "The planned releases fit, and these are more: state a method's steps in `local_workload`"
            raise BudgetError(
                f"{self.site} has spent epsilon = {self.epsilon():.4g} of {self.budget.epsilon:g} (delta = "
                f"{self.budget.delta:g}); this release would make it {after:.4g}. It does not take place. {remedy}"
            )

    def stored_update(self, round: int, method: str) -> bytes | None:
        """Returns the committed bytes of an assignment, if they are still stored."""
        query = "select body from updates where run = ? and site = ? and round = ? and method = ?"
        return self.ledger.value(query, self.run, self.site, round, method)

    def last_round(self, method: str) -> int:
        """Returns the last completed round of a method in this run, 0 without any."""
        query = "select coalesce(max(round), 0) from assignments where run = ? and site = ? and method = ?"
        return self.ledger.value(query, self.run, self.site, method)

    def num_assignments(self) -> int:
        """Counts the completed assignments of this run."""
        query = "select count(*) from assignments where run = ? and site = ?"
        return self.ledger.value(query, self.run, self.site)

    def last_assignment_at(self) -> str | None:
        """Returns the time of the newest completed assignment (ISO 8601, UTC)."""
        return self.ledger.value("select max(at) from assignments where run = ? and site = ?", self.run, self.site)

    def commit(self, round: int, method: str, costs: Iterable[PrivacyCost], body: bytes) -> None:
        """Commits an assignment's costs and its update in one transaction, and deletes updates of earlier rounds.

        Checks unit and budget again under the lock, since two processes may check them at the same time. Raises
        `LedgerError` if earlier costs protect another unit.
        """
        now = datetime.now(UTC).isoformat(timespec="seconds")
        costs, key = accountant.merge(costs), (self.run, self.site, round, method)
        with self.ledger.transaction():
            if costs:
                self.ledger.check_unit(self.site, self.unit.name)
            self.check_budget(costs)
            rows = [(*key, *cost, *self.unit, now) for cost in costs]
            self.ledger.file.executemany("insert into costs values (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", rows)
            self.ledger.file.execute("insert into assignments values (?, ?, ?, ?, ?)", (*key, now))
            self.ledger.file.execute("insert into updates values (?, ?, ?, ?, ?)", (*key, body))
            self.ledger.file.execute(
                "delete from updates where run = ? and site = ? and method = ? and round < ?",
                (self.run, self.site, method, round),
            )

    def costs_json(self) -> str:
        """Lists all costs as JSON."""
        names = ("run", "round", "method", *PrivacyCost._fields, "unit", "max_records_per_subject", "at")
        rows = self.ledger.file.execute(
            f"select {', '.join(names)} from costs where site = ? order by rowid", (self.site,)
        )
        return json.dumps([dict(zip(names, row, strict=True)) for row in rows])
