"""A site and a coordinator who means harm: what it asks for costs what it is worth, or is refused for nothing."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ficpd.deployment import run_spec
from ficpd.deployment.site.site import Site
from ficpd.errors import CodecError, PrivacyError
from ficpd.experiments.build import ExperimentContext
from site_of import NOISED, begun, context, site, train

SUMMED = (
    'privacy.name="client_gaussian"', 'privacy.placement="central"', "privacy.epsilon=1.0", "privacy.delta=1e-3",
    "privacy.clip_norm=0.5",
)  # fmt: skip
CENTRAL: dict[str, Any] = {"mechanisms": ["client_gaussian:central"], "delta": 1e-3}


@pytest.fixture
def opened() -> Iterator[Callable[..., Site]]:
    with ExitStack() as stack:
        yield lambda *given, **more: stack.enter_context(closing(site(*given, **more)))


@pytest.fixture
def noised(tmp_path: Path) -> ExperimentContext:
    return context(tmp_path, "fedavg", *NOISED)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("cohort", 0), ("cohort", -1), ("cohort", True), ("cohort", 1.5), ("cohort", None), ("cohort", 100),
        ("num_rounds", 0), ("num_rounds", True), ("num_rounds", 2.5), ("num_rounds", "3"),
        ("seed", None), ("seed", [1]), ("seed", True), ("seed", "1"),
        ("max_norm", "x"), ("max_norm", 0.0), ("max_norm", -1), ("max_norm", True), ("max_norm", None),
        ("everyone_first", 1), ("everyone_last", "yes"), ("accept_late", -1), ("accept_late", True),
    ],
)  # fmt: skip
def test_a_schedule_that_no_coordinator_makes_is_refused_by_its_setting(noised, tmp_path, opened, name, value):
    own, (orders, said) = opened(noised, "site-0", tmp_path), begun(noised)
    found = run_spec.decode(said)
    other = run_spec.encode(replace(found, schedule=replace(found.schedule, **{name: value})))
    with pytest.raises(CodecError, match=name):
        own.handle(train(orders[0], other))
    assert own.status()["runs"] == {}
    assert own.status()["epsilon"]["spent"] == 0
    own.handle(train(orders[0], said))


@pytest.mark.parametrize("names", [[], ["site-0", "site-0"], ["site-0", 1], ["site-0", ""], "site-0", None])
def test_names_that_no_clients_have_are_refused(noised, tmp_path, opened, names):
    own, (orders, said) = opened(noised, "site-0", tmp_path), begun(noised)
    found = run_spec.decode(said)
    body = run_spec.encode(replace(found, schedule=replace(found.schedule, cohort=1)))
    state, extra = run_spec.storage.decode_state(body)
    body = run_spec.storage.encode_state(replace(state, facts={**state.facts, "names": names}), extra)
    with pytest.raises(CodecError, match="names"):
        own.handle(train(orders[0], body))


@pytest.mark.filterwarnings("ignore:privacy.delta")
def test_a_sum_that_made_up_clients_make_cost_nothing_is_refused(tmp_path, opened):
    """One client of so many that all rounds together draw a real one less often than delta: epsilon is 0 without noise."""
    one = context(tmp_path, "fedavg", *SUMMED)
    own, (orders, said) = opened(one, "site-0", tmp_path, **CENTRAL), begun(one)
    found = run_spec.decode(said)
    crowd = [*found.names, *(f"made up {place}" for place in range(9000))]
    body = run_spec.encode(replace(found, names=crowd, schedule=replace(found.schedule, cohort=1, num_rounds=1)))
    with pytest.raises(PrivacyError, match="costs nothing"):
        own.handle(train(orders[0], body))
    assert own.status()["runs"] == {}
