"""Runs assignments at a client, charges their costs, and answers repeated assignments from the ledger."""

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from ficpd import storage
from ficpd.errors import CodecError, LedgerError, PolicyError, PrivacyError
from ficpd.federation.client import STATISTIC, Client, ClientSession
from ficpd.federation.method import Method
from ficpd.interfaces import ReleaseKind
from ficpd.optimizers import map_queries
from ficpd.types import Answer, Assignment, ClientUpdate, Predictor, Query, State


def execute_assignment(
    method: Method, client: Client, assignment: Assignment,
    release: Callable[[ClientSession], ClientUpdate] | None = None,
) -> Generator[Query, Answer, ClientUpdate]:  # fmt: skip
    """Runs an assignment and returns the mechanism's release, after the ledger has committed its costs.

    `release`: makes the update from the terms of a secure sum, and ignores the method's own update. A `summed` mechanism
    needs it.

    A completed assignment is answered with the stored update. Updates of earlier rounds are deleted, and their assignments
    raise `PolicyError`. An assignment that fails after records were drawn is charged and not repeated, because the
    failure may depend on the records.
    """
    account, round = client.account, assignment.round
    if client.mechanism.summed != (release is not None):
        raise PolicyError(
            f"{client.name} sends {'terms of a secure sum' if release is None else 'updates'} in this run, as its mechanism "
            "says, and was asked for the other. Nothing was spent"
        )
    if account is not None:
        if (stored := account.stored_update(round, assignment.method)) is not None:
            return restore_update(client, stored, round)
        if round < (newest := account.last_round(assignment.method)):
            raise PolicyError(
                f"{client.name} got round {assignment.round} of {assignment.method} after round {newest} was answered: the "
                "old round is over, and nothing was spent on it. Send the next one"
            )
    declared = method.capabilities.statistics_per_round.keys() | set(method.capabilities.statistics_once)
    session = ClientSession(client, round, assignment.method, declared)
    counts = client.query_counts.setdefault(round, [0, 0])
    session.costs.extend(client.pending_costs)
    session.charge(ReleaseKind.UPDATE)

    def commit(update: ClientUpdate, client_state: dict[str, Tensor], failed: bool = False) -> None:
        if account is not None:
            body = _stored(update, client_state, counts, failed)
            account.commit(round, assignment.method, session.costs, body)
        client.client_state, client.pending_costs = client_state, ()

    try:
        update = yield from wrap_queries(method.local_update(session, assignment), client, counts)
        if update.arrays and not method.capabilities.releases:
            raise PrivacyError(f"{method.name} declares Capabilities.releases = False, and its update has arrays")
        if client.mechanism.unit != "none":  # the session's own weight, whatever the method returned
            update = replace(update, weight=session.weight)
        if release is not None:
            released = release(session)
        else:
            projected = replace(update, arrays=client.compression.project(update.arrays))
            released = client.mechanism.privatize_update(projected, session.noise)
            released = replace(released, arrays=client.compression.pack(released.arrays))
    except PrivacyError:  # too high a cost, or an unsound method: independent of the records
        raise
    except Exception:
        if account is not None and client.mechanism.unit != "none":
            commit(ClientUpdate(client.name, {}), {**client.client_state, **session.released}, failed=True)
        raise
    own = {name: value for name, value in session.client_state.items() if not name.startswith(STATISTIC)}
    if not all(value.isfinite().all() for value in own.values()):
        own = dict(client.client_state)  # it diverged: the server drops such an update, too
    commit(released, own | session.released)
    return released


def wrap_queries(
    work: Generator[Query, Answer, ClientUpdate], client: Client, counts: list[int]
) -> Generator[Query, Answer, ClientUpdate]:
    """Applies to each query of an assignment, in this order: the mechanism's clip, the count.

    `counts`: forward queries and gradients. A method's own wrappers (label prior, distillation) come before both.
    """

    def on_query(query: Query) -> Query:
        query = client.mechanism.bound_query(query, client.start)
        counts[query.grad] += len(query.prompts_KPD) * len(query.batch)
        return query

    return map_queries(work, on_query)


def _stored(update: ClientUpdate, client_state: Mapping[str, Tensor], counts: list[int], failed: bool) -> bytes:
    arrays = {f"update/{name}": array for name, array in update.arrays.items()}
    arrays |= {f"client_state/{name}": array for name, array in client_state.items()}
    return storage.encode_state(State(arrays), {"weight": update.weight, "failed": failed, "query_counts": counts})


def restore_update(client: Client, body: bytes, round: int | None = None) -> ClientUpdate:
    """Returns a stored update. Restores the client's state and the query counts of its `round`.

    Raises `PolicyError` for an assignment that failed, `LedgerError` for bytes that cannot be read.
    """
    try:
        state, extra = storage.decode_state(body, own=True)
    except CodecError as error:
        raise LedgerError(f"the stored update of {client.name} cannot be read: {error}") from error
    parts = {"update": {}, "client_state": {}}
    for path, array in state.arrays.items():
        part, _, name = path.partition("/")
        parts[part][name] = array
    client.client_state = parts["client_state"]
    if round is not None:
        client.query_counts[round] = list(extra["query_counts"])
    if extra["failed"]:
        raise PolicyError(f"this assignment failed at {client.name} and is not tried again. Send the next round")
    return ClientUpdate(client.name, parts["update"], extra["weight"])


def personal_prompt(method: Method, client: Client, assignment: Assignment) -> Tensor:
    """Returns this client's current prompt [P, D]. Nothing is released."""
    return method.personal_prompt(ClientSession(client, assignment.round), assignment)


def local_model(
    method: Method, client: Client, assignment: Assignment
) -> Generator[Query, Answer, Sequence[Predictor]]:
    """Builds the mixture that this client predicts with (`Method.local_model`). Nothing is released."""
    return method.local_model(ClientSession(client, assignment.round), assignment)
