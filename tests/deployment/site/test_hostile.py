"""A site and a coordinator who means harm: what it asks for costs what it is worth, or is refused for nothing."""

import time
from dataclasses import replace
from typing import Any

import pytest
import torch

from ficpd.deployment import run_spec
from ficpd.errors import BudgetError, CodecError, PolicyError, PrivacyError
from ficpd.federation import codec
from site_of import begun, context, train

SUMMED = (
    'privacy.name="client_gaussian"', 'privacy.placement="central"', "privacy.epsilon=1.0", "privacy.delta=1e-3",
    "privacy.clip_norm=0.5",
)  # fmt: skip
CENTRAL: dict[str, Any] = {"mechanisms": ["client_gaussian:central"], "delta": 1e-3}


@pytest.mark.parametrize(("name", "value"), [
    ("cohort", 0), ("cohort", -1), ("cohort", True), ("cohort", 1.5), ("cohort", None), ("cohort", 100),
    ("num_rounds", 0), ("num_rounds", True), ("num_rounds", 2.5), ("num_rounds", "3"),
    ("seed", None), ("seed", [1]), ("seed", True), ("seed", "1"),
    ("max_norm", "x"), ("max_norm", 0.0), ("max_norm", -1), ("max_norm", True), ("max_norm", None),
    ("everyone_first", 1), ("everyone_last", "yes"), ("accept_late", -1), ("accept_late", True),
])  # fmt: skip
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


def with_privacy(said: bytes, **more: Any) -> bytes:
    found = run_spec.decode(said)
    privacy = {**found.experiment.privacy, **more}
    return run_spec.encode(replace(found, experiment=found.experiment.model_copy(update={"privacy": privacy})))


@pytest.mark.parametrize("field", ["rate", "round", "arrays"])
@pytest.mark.parametrize("paid", [True, False])
def test_an_order_of_another_shape_is_answered_alike_whether_or_not_the_budget_pays_the_run(
    noised, tmp_path, opened, field, paid
):
    """Bisecting what the budget pays would tell how many records there are, for nothing."""
    own, (orders, said) = opened(noised, "site-0", tmp_path, epsilon=4.2), begun(noised)
    if not paid:
        own.handle(train(orders[0], said))
    spent, runs = own.status()["epsilon"]["spent"], len(own.status()["runs"])
    good = codec.decode_assignment(orders[0], noised.model.backbone.fingerprint)
    rate, late = replace(good, facts={"rate": -1.0}), replace(good, round=4)
    bad = {"rate": rate, "round": late, "arrays": replace(good, arrays={})}
    order = codec.encode_assignment(bad[field], noised.model.backbone.fingerprint)
    with pytest.raises((CodecError, PrivacyError), match=r"rate|round 4|no prompt"):
        own.handle(train(order, said, run="b" * 32))
    assert (own.status()["epsilon"]["spent"], len(own.status()["runs"])) == (spent, runs)


def test_a_recipe_has_the_sites_delta_and_at_most_its_epsilon(noised, tmp_path, opened):
    """Another delta, or a budget of its own, would make the price depend on the number of records."""
    own, (orders, said) = opened(noised, "site-0", tmp_path), begun(noised)
    for setting, value in (("delta", 1e-2), ("delta", 1e-4), ("epsilon", 11.0)):
        with pytest.raises(PolicyError, match=f"privacy.{setting}"):
            own.handle(train(orders[0], with_privacy(said, **{setting: value})))
    own.handle(train(orders[0], said))


def test_refusals_of_the_budget_are_counted_over_restarts_and_end(noised, tmp_path, opened):
    own, (orders, said) = opened(noised, "site-0", tmp_path, epsilon=4.2, max_refusals=3), begun(noised)
    own.handle(train(orders[0], said))
    own.close()
    for place, epsilon in enumerate((4.15, 4.1, 4.05)):
        own = opened(noised, "site-0", tmp_path, epsilon=4.2, max_refusals=3)
        for _ in range(2):  # a coordinator asks in each round: the same terms tell nothing new
            with pytest.raises(BudgetError):
                own.handle(train(orders[0], with_privacy(said, epsilon=epsilon), run=f"{place:032x}"))
        own.close()
    own = opened(noised, "site-0", tmp_path, epsilon=4.2, max_refusals=3)
    with pytest.raises((PolicyError, BudgetError)) as refused:
        own.handle(train(orders[0], with_privacy(said, epsilon=4.0), run="c" * 32))
    assert "max_refusals" in str(refused.value)
    assert list(own.status()["runs"]) == ["a" * 32]
    own.handle(train(orders[1], said))
    with pytest.raises(BudgetError):
        own.handle(train(orders[0], with_privacy(said, epsilon=4.0), run="c" * 32))


def test_terms_whose_first_order_is_not_paid_use_up_no_run(noised, tmp_path, opened, monkeypatch):
    own, (orders, said) = opened(noised, "site-0", tmp_path, max_runs=1), begun(noised)
    good = codec.decode_assignment(orders[0], noised.model.backbone.fingerprint)
    late = codec.encode_assignment(replace(good, round=4), noised.model.backbone.fingerprint)
    for place in range(3):
        with pytest.raises(PolicyError, match="round 4"):
            own.handle(train(late, said, run=f"{place:032x}"))

    def refused(*given):
        raise BudgetError("spent")

    with monkeypatch.context() as patch:
        patch.setattr("ficpd.deployment.site.site.execute_assignment", refused)
        with pytest.raises(BudgetError):
            own.handle(train(orders[0], said, run="b" * 32))
    assert not list((tmp_path / "site-0" / "runs").iterdir())
    own.handle(train(orders[0], said))


@pytest.mark.parametrize(
    "text",
    [
        "a." * 16_000 + "a = 1",
        "[" + "a." * 16_000 + "a]",
        "x = { " + '"a" . ' * 16_000 + "a = 1 }",
        "x = " + "[" * 16_000,
        "x = 1 # " + "long " * 100_000,
    ],
    ids=["key", "table", "inline table", "arrays", "length"],
)
def test_terms_that_take_long_to_parse_are_refused_before_they_are_parsed(noised, tmp_path, opened, text):
    """The parser needs time in the square of a key's parts: 19 s for 34 kB."""
    own, (orders, said) = opened(noised, "site-0", tmp_path), begun(noised)
    state, extra = run_spec.storage.decode_state(said)
    body = run_spec.storage.encode_state(replace(state, facts={**state.facts, "experiment": text}), extra)
    began = time.process_time()
    with pytest.raises(CodecError, match="not a run spec"):
        own.handle(train(orders[0], body))
    assert time.process_time() - began < 5
    own.handle(train(orders[0], said))


def test_more_directions_than_a_prompt_has_numbers_are_refused_before_they_are_multiplied(noised, tmp_path, opened):
    own, (orders, said) = opened(noised, "site-0", tmp_path), begun(noised)
    state, extra = run_spec.storage.decode_state(said)
    size = state.arrays["start"].numel()
    rows = {"rows": torch.zeros(size + 1, size), "grad_scale": torch.ones(size + 1)}
    body = run_spec.storage.encode_state(replace(state, arrays={**state.arrays, **rows}), extra)
    with pytest.raises(CodecError, match=rf"expected at most \({size}, {size}\)"):
        own.handle(train(orders[0], body))
