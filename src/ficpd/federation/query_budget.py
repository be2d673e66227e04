"""How much a run's clients ask: counted, kept within a budget, told. A query is one candidate prompt on one record, and no
matter how long the record is; one that asks for a gradient is counted apart, for no black box answers it.

The counts are a simulation's own view. At a real site they stay there: how many records a Poisson sample has is private.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from ficpd.errors import BudgetError
from ficpd.federation.client import Client
from ficpd.federation.method import Method
from ficpd.federation.rounds import Round
from ficpd.types import State

UNLIKELY = 6.0
"""Deviations above its mean that a Poisson sample of records is expected never to reach (once in a thousand million)."""


class QueryBudget:
    """`rounds`: those that were run; `most`: queries of both kinds that each client may ask in the whole run."""

    def __init__(
        self, method: Method, state: State, clients: Mapping[str, Client], rounds: Sequence[Round], most: int | None
    ):
        self.clients, self.most = clients, most
        self.steps, self.batch_size = method.local_workload(state)
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
        """Writes into the round's record what its clients asked."""
        done.queries.update(
            {
                name: list(c.query_counts[done.round])
                for name, c in sorted(self.clients.items())
                if done.round in c.query_counts
            }
        )
        self._add(done)

    def to_report(self) -> dict[str, Any]:
        """The result's `queries`."""
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
        """By what the method says, or by the round in which a client asked most about each of its records."""
        return round(max(self.candidates, self.largest) * self._records(name))

    def _records(self, name: str) -> float:
        """How many records an order can be about at most, one that comes in two steps counted twice."""
        client, number = self.clients[name], len(self.clients[name].train)
        expected = self.steps * min(self.batch_size, number)
        if client.mechanism.unit != "record":
            return expected
        return min(expected + UNLIKELY * expected**0.5, self.steps * number)
