"""A copy of a ledger account for a client that runs in another process of a simulation."""

from collections.abc import Iterable
from typing import NamedTuple

from ficpd.privacy.ledger import Account
from ficpd.types import PrivacyCost


class Commit(NamedTuple):
    """The arguments of an `Account.commit`."""

    round: int
    method: str
    costs: list[PrivacyCost]
    body: bytes


class AccountSnapshot(Account):
    """A copy of an account for one assignment. It checks the budget against the earlier costs.

    `commit` only keeps its arguments. The ledger's process passes them to the account's own `commit`, which checks the
    budget again, before the update is passed on. If the copy is lost, nothing was released and nothing is charged.

    Guarantees (`tests/privacy/test_account_snapshot.py`):

    - a release beyond the account's budget is refused by the copy, too;
    - the returned costs and bytes are those that the account would have committed;
    - a completed or an old assignment is answered as the account would answer it.
    """

    def __init__(self, account: Account, round: int, method: str):
        self.site, self.budget, self.run = account.site, account.budget, account.run
        self.before, self.key = account.spent(), (round, method)
        self.stored, self.newest = account.stored_update(round, method), account.last_round(method)
        self.kept: Commit | None = None

    def spent(self) -> list[PrivacyCost]:
        return self.before

    def stored_update(self, round: int, method: str) -> bytes | None:
        self._check(round, method)
        return self.stored

    def last_round(self, method: str) -> int:
        return self.newest

    def commit(self, round: int, method: str, costs: Iterable[PrivacyCost], body: bytes) -> None:
        """Keeps the costs and the update. Raises `BudgetError` if the budget does not allow them."""
        self._check(round, method)
        costs = list(costs)
        self.check_budget(costs)
        self.kept = Commit(round, method, costs, body)

    def _check(self, round: int, method: str) -> None:
        assert (round, method) == self.key, "the copy is for one assignment"
