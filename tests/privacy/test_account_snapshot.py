"""An account that travels: it refuses what the ledger refuses, and what it brings back is what the ledger would have."""

import pickle
from dataclasses import replace

import pytest

import small
from ficpd.backbones.query_engine import QueryEngine, run_queries
from ficpd.errors import BudgetError, PolicyError
from ficpd.federation.client import Client
from ficpd.federation.execution import execute_assignment
from ficpd.privacy import record_gaussian
from ficpd.privacy.account_snapshot import AccountSnapshot
from ficpd.privacy.ledger import Account, Budget, Ledger
from ficpd.types import Assignment, ClientWorkload, PrivacyCost

STEP = PrivacyCost("prompt", 0.5, 1.0, 1)
KEY = (1, "fedavg")
MECHANISM = record_gaussian.build(
    record_gaussian.Config(noise_multiplier=2.0, clip_norm=0.5),
    ClientWorkload(9, 4 / 9, steps=2, participations=3, num_clients=3, cohort_rate=1.0, num_rounds=3),
)


def account(epsilon: float | None = None) -> Account:
    return Ledger(":memory:", "a run").account("site-2", Budget(epsilon, 1e-5))


def travelled(copy: AccountSnapshot) -> AccountSnapshot:
    return pickle.loads(pickle.dumps(copy))


def lines(of: Account) -> list[tuple]:
    """The ledger's costs and updates, without their times."""
    columns = "site, round, method, name, sampling_rate, noise_multiplier, count"
    costs = of.ledger.file.execute(f"select {columns} from costs order by name").fetchall()
    return costs + of.ledger.file.execute("select site, round, method, body from updates").fetchall()


def visit(model: QueryEngine, client: Client, rounds: int = 1) -> None:
    method = small.method("fedavg")
    order = Assignment("fedavg", rounds, {"prompt": client.start.vectors_PD}, {"rate": 0.1})
    run_queries(model, execute_assignment(method, client, order))


def test_a_release_beyond_the_budget_is_refused_far_from_the_ledger():
    ours = account(epsilon=4.0)
    copy = travelled(AccountSnapshot(ours, *KEY))
    copy.check_budget([STEP])
    with pytest.raises(BudgetError, match="site-2"):
        copy.check_budget([STEP._replace(count=50)])
    with pytest.raises(BudgetError, match="site-2"):
        copy.commit(*KEY, [STEP._replace(count=50)], b"update")
    assert copy.kept is None


def test_what_was_spent_before_counts_far_from_the_ledger():
    ours = account(epsilon=4.0)
    ours.commit(1, "fedavg", [STEP], b"first")
    after = travelled(AccountSnapshot(ours, 2, "fedavg"))
    assert after.epsilon() == ours.epsilon() > 0
    with pytest.raises(BudgetError, match=r"has spent epsilon = 3\.5"):
        after.check_budget([STEP])


def test_the_ledger_gets_the_same_costs_and_bytes_over_an_actor(model):
    here, there = (small.clients(model, small.method("fedavg"), 3, mechanism=MECHANISM)["site-2"] for _ in range(2))
    visit(model, here)
    assert here.account is not None
    assert there.account is not None
    copy = travelled(AccountSnapshot(there.account, *KEY))
    far = replace(there, account=copy)
    visit(model, far)
    assert lines(there.account) == []
    kept = travelled(copy).kept
    assert kept is not None
    there.account.commit(*kept)
    assert lines(there.account) == lines(here.account)
    assert len(lines(here.account)) == 2
    assert small.same(far.client_state, here.client_state)


def test_a_completed_and_an_old_assignment_are_answered_as_by_the_account(model):
    client = small.clients(model, small.method("fedavg"), 3, mechanism=MECHANISM)["site-2"]
    visit(model, client)
    ours = client.account
    assert ours is not None
    again = replace(client, account=travelled(AccountSnapshot(ours, *KEY)))
    visit(model, again)
    assert again.account is not None
    assert again.account.kept is None  # type: ignore[attr-defined]
    ours.commit(2, "fedavg", [STEP], b"second")
    with pytest.raises(PolicyError, match="after round 2 was answered"):
        visit(model, replace(client, account=travelled(AccountSnapshot(ours, *KEY))))


def test_a_copy_serves_one_assignment():
    with pytest.raises(AssertionError):
        AccountSnapshot(account(), *KEY).commit(2, "fedavg", [STEP], b"update")
