"""Calls that cost nothing tell a coordinator nothing about the number of records, in runs with and without secure sums."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any

import pytest
import torch

import small
from ficpd.deployment.site.site import Site
from ficpd.errors import PolicyError, PrivacyError
from ficpd.experiments.build import ExperimentContext, build_context
from ficpd.experiments.config import parse
from ficpd.federation import codec
from ficpd.federation.secure_sum import PHASES, VECTOR
from ficpd.types import Assignment, ClientUpdate
from site_of import NOISED, begun, context, signing_keys, site, train

SHARED = (
    'privacy.name="shared_gaussian"', "privacy.epsilon=4.0", "privacy.delta=1e-3", "privacy.max_lost=1",
    "privacy.max_colluding=1", "training.local_steps=1",
)  # fmt: skip
BOTH: dict[str, Any] = {"mechanisms": ["record_gaussian", "shared_gaussian"]}
TINY = "tiny:16x2"
CALLS = ["train", *PHASES]


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Callable[..., Site]]:
    signing_keys([f"site-{i}" for i in range(4)], tmp_path)
    with ExitStack() as stack:
        yield lambda *given, **more: stack.enter_context(closing(site(*given, **{**BOTH, **more})))


def shared(folder: Path, least: int, *changes: str) -> ExperimentContext:
    """Four sites of twenty records each."""
    text = small.toml(small.table(folder / "shared.csv", 80, 4), "fedavg", 3)
    return build_context(parse(text, "small.toml", (*SHARED, f"privacy.least_records={least}", *changes)))


def message(call: str, order: bytes) -> bytes:
    """A call of one phase with nothing in it but the round; of `VECTOR` with an assignment, and no keys before it."""
    if call == "train":
        return order
    inner = {"assignment": torch.frombuffer(bytearray(order), dtype=torch.uint8)} if call == VECTOR else {}
    facts = {"parts": [""], "sizes": {"gradient": 48}, "shares": {}} if call == VECTOR else {}
    return codec.encode_assignment(Assignment(call, 1, inner, facts), TINY)


def heard(own: Site, call: str, asked: ExperimentContext, run: str) -> str:
    """What the coordinator hears: that there is an answer, or the words of an error."""
    orders, said = begun(asked)
    try:
        own.handle(train(message(call, orders[0]), said, run=run))
    except Exception as error:
        return own.public_error(error)
    return "an answer"


@pytest.mark.parametrize("call", CALLS)
def test_an_unpaid_call_does_not_tell_whether_a_site_has_so_many_records(tmp_path, opened, call):
    """Else `privacy.least_records` is bisected until the number of records is known."""
    number = len(shared(tmp_path, 6).shards["site-0"].train)
    own = opened(shared(tmp_path, 6), "site-0", tmp_path)
    few, many = (heard(own, call, shared(tmp_path, number + more), str(more) * 32) for more in (0, 1))
    assert few == many
    assert own.status()["epsilon"]["spent"] == 0


@pytest.mark.parametrize("method", ["fpl", "ficpd"])
def test_a_statistic_without_a_share_is_refused_before_a_plan_is_made(tmp_path, opened, method):
    one = context(tmp_path, method, *NOISED, "method.label_prior=true")
    own, (orders, said) = opened(one, "site-0", tmp_path), begun(one)
    with pytest.raises(PrivacyError, match=r"privacy\.statistics = \{ labels") as refused:
        own.handle(train(orders[0], said))
    assert isinstance(refused.value, PolicyError), "of the recipe, whatever the records are"


@pytest.mark.parametrize("how", ["it fails", "it releases nothing"])
def test_after_a_run_that_is_accepted_and_pays_nothing_no_other_is_answered(tmp_path, opened, how, monkeypatch):
    """Free acceptances, with some counted refusals, would bisect what the budget pays."""
    one = context(tmp_path, "fedavg", *NOISED)
    own, (orders, said) = opened(one, "site-0", tmp_path), begun(one)
    other = begun(context(tmp_path, "fedavg", *NOISED, "privacy.epsilon=3.9"))[1]

    def unpaid(*given: Any) -> Any:
        if how == "it fails":
            raise PrivacyError("an unsound method")
        yield from ()
        given[1].account.commit(1, "fedavg", (), b"")
        return ClientUpdate("site-0", {})

    with monkeypatch.context() as patch:
        patch.setattr("ficpd.deployment.site.site.execute_assignment", unpaid)
        for run in ("b" * 32, "c" * 32):  # the same spec again tells nothing new
            with suppress(PrivacyError):
                own.handle(train(orders[0], said, run=run))
    assert own.status()["epsilon"]["spent"] == 0
    for _ in range(2):
        with pytest.raises(PolicyError, match="has paid nothing"):
            own.handle(train(orders[0], other, run="d" * 32))
        own.close()
        own = opened(one, "site-0", tmp_path)
    own.handle(train(orders[0], said))
    own.handle(train(orders[0], other, run="d" * 32))


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("mechanism", ["record_gaussian", "shared_gaussian"])
def test_an_unpaid_call_does_not_tell_whether_the_budget_is_enough(tmp_path, opened, call, mechanism):
    """What earlier runs spent depends on the number of records, and so does what is left."""
    spending = context(tmp_path, "fedavg", *NOISED)
    own = opened(spending, "site-0", tmp_path, epsilon=6.0)
    orders, said = begun(spending)
    own.handle(train(orders[0], said))
    spent, found = own.status()["epsilon"]["spent"], []
    for place, epsilon in enumerate((0.5, 5.9)):
        changes = (f"privacy.epsilon={epsilon}",)
        one = shared(tmp_path, 6, *changes) if mechanism == "shared_gaussian" else context(
            tmp_path, "fedavg", *NOISED, *changes
        )  # fmt: skip
        found.append(heard(own, call, one, str(place + 1) * 32))
    paid = own.status()["epsilon"]["spent"] > spent
    assert (found[0] == found[1]) != paid, "what is not paid for does not say whether the plan fits"
    assert paid == (mechanism == "record_gaussian" and call == "train")
