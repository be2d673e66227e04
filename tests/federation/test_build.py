"""Methods outside the package: their results are checked, because checkpoints and real sites take no other."""

import pytest
import torch

import small
from ficpd.errors import RunError
from ficpd.federation.build import check_results
from ficpd.federation.validation import validate_facts, validate_prompts
from ficpd.methods.fedavg import FedAvg
from ficpd.registry import names
from ficpd.types import Assignment, Query, State


class Own(FedAvg):
    """FedAvg with further facts in the first state, the assignments and the later states."""

    name, at_first, sent, later = "own", {}, {}, {}

    def init(self, setup):
        state = super().init(setup)
        return State(state.arrays, {**state.facts, **self.at_first})

    def make_assignment(self, state, client, round):
        made = super().make_assignment(state, client, round)
        return Assignment(made.method, made.round, made.arrays, {**made.facts, **self.sent})

    def aggregate(self, state, updates, round, model):
        found = super().aggregate(state, updates, round, model)
        return State(found.arrays, {**found.facts, **self.later})


def run(model, **more) -> None:
    own = Own(small.TRAINING)
    for name, value in more.items():
        setattr(own, name, value)
    own = check_results(own)
    small.rounds(own, small.clients(model, own), model)


@pytest.mark.parametrize("where", ["at_first", "sent", "later"])
@pytest.mark.parametrize(
    "value", [{1: 0.5}, (1, 2), float("nan"), torch.ones(1), [{2: "b"}]], ids=["key", "tuple", "nan", "tensor", "inner"]
)
def test_a_fact_that_a_checkpoint_would_change_is_an_error(model, where, value):
    """A resumed run would read another state than an unbroken one."""
    function = {"at_first": "init", "sent": "make_assignment", "later": "aggregate"}[where]
    with pytest.raises(RunError, match=rf"own.*: {function} returned facts\['seen'\] = .*; expected JSON"):
        run(model, **{where: {"seen": value}}, validate_assignment=lambda *given: None)


@pytest.mark.parametrize("value", [None, True, 1, 0.5, "text", [1, [2.5]], {"a": {"b": None}}])
def test_a_fact_of_json_is_kept(model, value):
    run(model, at_first={"seen": value}, later={"seen": value})


@pytest.mark.parametrize(
    ("function", "found", "words"),
    [
        ("init", None, "init returned a NoneType; expected a ficpd.types.State"),
        ("init", State({"prompt": 3.0}), r"init returned arrays\['prompt'\] = 3.0; expected a tensor"),
        ("make_assignment", None, "round 1: make_assignment returned a NoneType; expected a ficpd.types.Assignment"),
        ("aggregate", None, "round 1: aggregate returned a NoneType; expected a ficpd.types.State"),
    ],
)
def test_a_result_of_another_kind_is_an_error(model, function, found, words):
    with pytest.raises(RunError, match=words):
        run(model, **{function: lambda *given: found})


@pytest.mark.parametrize(
    ("asked", "result", "words"),
    [
        (None, {}, "local_update returned a dict; expected a ficpd.types.ClientUpdate"),
        (lambda prompt, batch: prompt, {}, "local_update yielded a Tensor; expected a ficpd.types.Query"),
        (Query, {}, r"a Query with prompts [3, 16]; expected [K, P, D], such as prompt[None]"),
    ],
)
def test_a_mistake_of_the_client_half_is_told_to_the_client(model, asked, result, words):
    def local_update(client, assignment):
        for batch in client.batches(1, 4):
            if asked:
                yield asked(assignment.arrays["prompt"], batch)
        return result

    own = Own(small.TRAINING)
    own.local_update = local_update
    own = check_results(own)
    _, (first, _) = small.rounds(own, small.clients(model, own), model)
    assert len(first.dropped) == 5
    assert all(words in reason for reason in first.dropped.values())


def test_an_assignment_that_real_sites_would_refuse_is_told(model):
    with pytest.warns(
        UserWarning, match=r"own: real sites would refuse its assignments: .*'pull'.* validate_assignment"
    ):
        run(model, sent={"pull": 0.5})


def test_an_assignment_that_the_method_validates_is_not(model):
    def validate(assignment, start):
        validate_facts(assignment, {"rate": (float, int), "pull": (float,)})
        validate_prompts(assignment, start, ("prompt",))

    run(model, sent={"pull": 0.5}, validate_assignment=validate)


@pytest.mark.filterwarnings("ignore:.*real sites would refuse")
@pytest.mark.parametrize("name", names("methods"))
def test_the_package_s_methods_pass(model, name):
    """A method outside the package may extend any of them. Words and LoRA are for simulations, so a warning is right."""
    method = check_results(small.method(name))
    small.rounds(method, small.clients(model, method), model)
