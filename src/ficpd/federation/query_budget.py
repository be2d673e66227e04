"""Counts the queries of a run's clients and keeps them within a budget.

A query is one candidate prompt on one record of any length. Queries with a gradient are counted separately, because a
black-box API cannot answer them. Only a simulation sees the counts: the number of records in a Poisson sample is private.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from ficpd.errors import BudgetError
from ficpd.federation.client import Client
from ficpd.federation.method import Method
from ficpd.federation.rounds import Round
from ficpd.types import State

UNLIKELY = 6.0
"""Standard deviations above the mean. A Poisson sample of records exceeds this bound once in 1e9 times."""


class QueryBudget:
    """rounds: the completed ones. most: the maximum number of queries, of both kinds, of each client in the run."""

    def __init__(
        self, method: Method, state: State, clients: Mapping[str, Client], rounds: Sequence[Round], most: int | None
    ):
        self.clients, self.most = clients, most
        steps, self.batch_size = method.local_workload(state)
        self.steps = max(steps, 1)  # class totals query every record once
        self.candidates = method.capabilities.candidates or method.training.candidates
        self.asked = {name: [0, 0] for name in clients}
        self.largest = 0.0
        self.rounds = 0
        for done in rounds:
            self._add(done)

    def before(self, round: int, cohort: Sequence[str]) -> None:
        """Raises `BudgetError` if a client of this cohort could exceed `max_queries`.

        The estimate uses the candidates per record that the method, else its optimizer, declares. After round 1 it also
        uses the largest observed count.
        """
        if self.most is None:
            return
        for name in cohort:
            could, spent = self._could_ask(name), sum(self.asked[name])
            if spent + could > self.most:
                raise BudgetError(
                    f"round {round} does not take place: {name} has asked {spent:,} queries, the round could ask {could:,} "
                    f"more, and federation.max_queries = {self.most:,}"
                )

    def after(self, done: Round) -> None:
        """Adds the clients' counts to the round's record."""
        for name, client in sorted(self.clients.items()):
            if done.round in client.query_counts:
                done.queries[name] = list(client.query_counts[done.round])
        self._add(done)

    def to_report(self) -> dict[str, Any]:
        """Makes the `queries` block of the result."""
        forwards, gradients = (sum(asked[kind] for asked in self.asked.values()) for kind in (0, 1))
        return {
            "forward": forwards,
            "gradient": gradients,
            "per_client": {name: {"forward": f, "gradient": g} for name, (f, g) in self.asked.items()},
            "per_client_most": max((sum(asked) for asked in self.asked.values()), default=0),
            "per_client_round": (forwards + gradients) / max(self.rounds, 1),
            "budget_per_client": self.most,
        }

    def _add(self, done: Round) -> None:
        for name, (forwards, gradients) in done.queries.items():
            self.asked[name][0] += forwards
            self.asked[name][1] += gradients
            self.largest = max(self.largest, (forwards + gradients) / self._records(name))
            self.rounds += 1

    def _could_ask(self, name: str) -> int:
        """Bounds a round's queries by `candidates`, or by the largest count for each record so far."""
        return round(max(self.candidates, self.largest) * self._records(name))

    def _records(self, name: str) -> float:
        """Bounds the records of an assignment; a record in two steps counts twice."""
        client, number = self.clients[name], len(self.clients[name].train)
        expected = self.steps * min(self.batch_size, client.units.number)
        if client.mechanism.unit != "record":
            return expected
        each = client.units.largest
        return min((expected + UNLIKELY * expected**0.5) * each, self.steps * number)
