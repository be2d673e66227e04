"""The privacy plan of every method: what is refused and what a ledger is planned to hold. Nothing is guessed."""

from typing import Any

import pytest
import torch

import small
from ficpd.backbones.query_engine import run_queries
from ficpd.errors import PrivacyError
from ficpd.federation.execution import execute_assignment
from ficpd.federation.method import Capabilities, Method
from ficpd.federation.privacy_plan import NONE, plan_privacy
from ficpd.federation.rounds import RoundSchedule
from ficpd.methods.fedavg import FedAvg
from ficpd.methods.local import Local
from ficpd.privacy.none import NoPrivacy
from ficpd.registry import load, names, validated_section
from ficpd.types import Assignment, ClientData, ClientUpdate, State

LEVELS = {
    "none": NONE,
    "record": {"name": "record_gaussian"},
    "local": {"name": "client_gaussian", "placement": "local"},
    "central": {"name": "client_gaussian", "placement": "central"},
}
STATED = {"noise_multiplier": 3.0, "clip_norm": 1.0, "delta": 1e-3}
ROUNDS = 3


def planned(model: Any, folder: Any, level: str, method: Method, statistics: Any = None) -> Any:
    """The planned costs of the site with five records (name, sampling rate, count), or the class of the refusal."""
    members = small.clients(model, method)
    part = LEVELS[level]
    if level != "none":
        more = {"statistics": statistics} if level == "record" and statistics else {}
        part = validated_section("privacy", {**part, **STATED, **more}, "privacy")
    schedule = RoundSchedule(ROUNDS, len(members), 0)
    shards = {n: ClientData(list(client.train), [], {}) for n, client in members.items()}
    try:
        plan = plan_privacy(part, method, small.first_state(method, members), shards, schedule, 0, folder, "run", 0)
    except PrivacyError as error:
        return type(error)
    costs = [(c.name, round(c.sampling_rate, 3), c.count) for c in next(iter(plan.mechanisms.values())).planned_costs()]
    plan.close()
    assert plan.central is None or level == "central"
    return costs if plan.releases else None


SUM, UPDATE = [("sum", 1.0, 3)], [("update", 1.0, 3)]
STEPS = [("prompt", 0.8, 6)]
"""Two steps in each of three rounds, four of five records a step."""
SUMMED = [], STEPS, UPDATE, SUM
ONE_BY_ONE = [], STEPS, UPDATE, PrivacyError
RECORDS_ONLY = [], STEPS, PrivacyError, PrivacyError
PRIOR_UNSTATED = [], PrivacyError, UPDATE, PrivacyError
LABELS_ONCE = ("labels", 1.0, 1)
WITH_LABELS = [*STEPS, LABELS_ONCE]
WITH_CLASSES = [*STEPS, ("classes", 1.0, 1)]
TOTALS_ONLY = [], [("classes", 1.0, 1)], PrivacyError, PrivacyError
SILENT = (None,) * 4
"""Nothing is released, so there is nothing to plan."""
PLANS: dict[str, tuple] = {
    "analytic": TOTALS_ONLY,
    "centralized": ([], [("prompt", 0.711, 3)], [], []),
    "class_means": TOTALS_ONLY,
    "dp_cma_es": ([], [("prompt", 1.0, 3)], UPDATE, SUM),
    "dp_fpl": SUMMED,
    "dp_zo": SUMMED,
    "fedavg": SUMMED,
    "fedbpt": ([], PrivacyError, PrivacyError, PrivacyError),
    "feddtpt": RECORDS_ONLY,
    "fedhpl": ([], [*STEPS, ("logits", 1.0, 3)], PrivacyError, PrivacyError),
    "fedlora": SUMMED,
    "fedprox": SUMMED,
    "ficpd": ([], WITH_CLASSES, UPDATE, PrivacyError),
    "fpl": SUMMED,
    "icl": SILENT,
    "linear_probe": SILENT,
    "local": SILENT,
    "prompt_dpsgd": RECORDS_ONLY,
    "zero_shot": SILENT,
}
"""By method, at the levels none, record, local and central, with default settings."""
TRIMMED = {"robust": {"rule": "trimmed_mean"}}
BY_SETTING: list[tuple[str, dict[str, Any], Any, tuple]] = [
    *((name, TRIMMED, None, ONE_BY_ONE) for name in ("fedavg", "fedprox", "fedlora", "dp_fpl", "dp_zo", "fpl")),
    ("dp_cma_es", TRIMMED, None, ([], [("prompt", 1.0, 3)], UPDATE, PrivacyError)),
    ("fpl", {"clusters": "signatures"}, None, ONE_BY_ONE),
    ("ficpd", {"label_prior": True}, None, PRIOR_UNSTATED),
    ("fpl", {"label_prior": True}, None, ([], PrivacyError, UPDATE, SUM)),
    ("ficpd", {"class_totals": False}, None, ONE_BY_ONE),
    ("ficpd", {"label_prior": True}, {"labels": 0.1}, ([], [*WITH_CLASSES, LABELS_ONCE], UPDATE, PrivacyError)),
    ("fpl", {"label_prior": True}, {"labels": 0.1}, ([], WITH_LABELS, UPDATE, SUM)),
    ("fedhpl", {}, {"logits": 0.5}, PLANS["fedhpl"]),
    ("fedavg", {}, {"weight": 0.1}, ([], [*STEPS, ("weight", 1.0, 1)], UPDATE, SUM)),
]


def test_every_method_has_an_expected_plan():
    assert sorted(PLANS) == names("methods")


@pytest.mark.parametrize("name", names("methods"))
def test_the_plan_of_a_method(model, tmp_path, name):
    found = tuple(planned(model, tmp_path / level, level, small.method(name)) for level in LEVELS)
    assert found == PLANS[name]


@pytest.mark.parametrize(("name", "config", "statistics", "expected"), BY_SETTING)
def test_the_plan_depends_on_the_methods_settings(model, tmp_path, name, config, statistics, expected):
    method = small.method(name, **config)
    found = tuple(planned(model, tmp_path / level, level, method, statistics) for level in LEVELS)
    assert found == expected


class Undeclared(Method):
    """Declares nothing; its attributes have the names of the capabilities."""

    name, linear, releases, private_units, statistics_once = (
        "undeclared", True, False, ("record", "client"), ("labels",),
    )  # fmt: skip

    def local_update(self, client, assignment):
        client.private_sum("labels", torch.ones(len(client.full_batch()), 1))
        return ClientUpdate(client.id, {"delta": assignment.arrays["prompt"]})
        yield

    def aggregate(self, state, updates, round, model):
        return state


def test_a_method_that_declares_nothing_gets_the_strict_answers(model, tmp_path):
    method = Undeclared(small.TRAINING)
    found = tuple(planned(model, tmp_path / level, level, method) for level in LEVELS)
    assert found == ([], PrivacyError, PrivacyError, PrivacyError)


class Protected(NoPrivacy):
    unit = "record"


def test_an_undeclared_statistic_is_not_released(model):
    method = Undeclared(small.TRAINING)
    (client,) = small.clients(model, method, 1, mechanism=Protected()).values()
    assignment = Assignment("undeclared", 1, {"prompt": client.start.vectors_PD})
    with pytest.raises(PrivacyError, match="'labels' is not declared"):
        run_queries(model, execute_assignment(method, client, assignment))
    method.capabilities = Capabilities(private_units=("record",), statistics_once=("labels",))
    assert run_queries(model, execute_assignment(method, client, assignment)).arrays


def test_a_method_that_declares_no_release_sends_no_arrays(model):
    class Sending(Local):
        def local_update(self, client, assignment):
            return ClientUpdate(client.id, {"delta": client.start})
            yield

    method = Sending(small.TRAINING)
    (client,) = small.clients(model, method, 1).values()
    assignment = method.make_assignment(State({}, {"num_rounds": 1}), client.card, 1)
    with pytest.raises(PrivacyError, match="releases"):
        run_queries(model, execute_assignment(method, client, assignment))


def test_methods_inherit_from_the_base_class_and_at_most_one_sibling():
    for name in names("methods"):
        module = load("methods", name)
        line = type(module.build(module.Config(), small.TRAINING)).__mro__
        assert Method in line, name
        assert line.index(Method) <= 2, f"{name} is more than a sibling away from Method"
    assert FedAvg.__mro__.index(Method) == 1
