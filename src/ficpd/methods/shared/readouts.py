"""Readouts in a federation: a round gathers class totals, and later assignments send each task key's readout.

A task key is a list of label texts. Clients of one key share a readout, whatever their clusters. Groups whose labels are
not scored from features (no labels, or likelihoods) have no key, and keep their task's readout.
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ficpd.errors import CodecError, ConfigError
from ficpd.federation.method import group_card
from ficpd.federation.validation import validate_facts
from ficpd.interfaces import Backbone, ClientContext, Task
from ficpd.methods.shared.class_totals import (
    CLASSES,
    WIDEST_GRAM,
    PublicFeatures,
    learn_readout,
    left_out_readouts,
    padded_totals,
    relative_prior,
    row_chunks,
    split_totals,
    totals_size,
)
from ficpd.optimizers import Result, map_queries
from ficpd.types import (
    Answer,
    Assignment,
    Batch,
    ClientCard,
    ClientUpdate,
    FederationInfo,
    ModelOutput,
    Query,
    Readout,
    State,
)

CENTRE, COVARIANCE, TEXT, ROWS, BIAS, SHARES = (
    "centre",
    "covariance",
    "text/",
    "readout",
    "readout_bias",
    "label_shares",
)
SCORING, SCORING_BIAS = "readout_scoring", "readout_scoring_bias"
"""The readout that scores a client's own records (`learn_readouts`); in a state, one for each client."""
NOISE_OF_TOTALS = "noise_of_totals"
"""Name of a state's fact: the variance of the noise on each number of a secure sum of totals."""
COUNTS = "label_counts"
"""The client's released label counts, in its state."""
MOST_LABELS = 10_000
MANY_RECORDS = 50
"""Records for each feature, above which a record's own part in its readout does not matter."""
MOST_SCORING = 1 << 23
"""Numbers of all clients' scoring readouts of a task key. Above it a state would be too large."""
ASKED: Mapping[str, tuple[type, ...]] = {"feature_scale": (float,), "most_labels": (int,), "gram": (bool,)}


# ---------------------------------------------------------------- server


def features_readout(task: Task, backbone: Backbone) -> Tensor | None:
    """Returns the label texts' readout [C, D] of a task whose labels are read from features; None for other tasks."""
    if not (task.num_labels and backbone.supports_features) or task.head_rows:
        return None
    return task.readout(backbone)


def check_features_readout(method: str, tasks: Sequence[Task], backbone: Backbone) -> None:
    """Raises `ConfigError` for tasks whose labels are not read from features."""
    unfit = [str(task.to_config()["name"]) for task in tasks if features_readout(task, backbone) is None]
    if unfit:
        raise ConfigError(
            f"{method}: {', '.join(unfit)} on {backbone.name} has no labels that are read from features. Use a "
            "classification with task.tuned_head = false on an encoder, or another method"
        )


def init_readouts(setup: FederationInfo, gram: bool | None = None, texts: bool = True) -> State:
    """Returns the readouts of a method's initial state; none if no group is read from features.

    gram: whether the Gram matrix is sent; None: without privacy, up to `WIDEST_GRAM` features. texts: whether readouts are
    shrunk towards the label texts. At the client level no totals are gathered, because they would fill the clip norm.
    """
    if setup.features_MD is None or not setup.texts or setup.unit == "client":
        return State({})
    public = PublicFeatures.of(setup.features_MD)
    keys: list[Tensor] = []
    of_group = {}
    for group, text_CD in sorted(setup.texts.items()):
        equal = [k for k, known in enumerate(keys) if known.shape == text_CD.shape and torch.equal(known, text_CD)]
        of_group[group] = equal[0] if equal else len(keys)
        if not equal:
            keys.append(text_CD.float().cpu())
    width, cards = setup.features_MD.shape[1], [*setup.clients, *map(group_card, of_group)]
    facts = {
        "key_of_group": of_group,
        "key_of_client": {c.name: of_group[g] for c in cards if (g := _group(c, of_group)) in of_group},
        "key_labels": [len(text_CD) for text_CD in keys],
        "feature_scale": public.scale,
        "gram": setup.unit == "none" and width <= WIDEST_GRAM if gram is None else gram,
        "noisy": setup.unit != "none",
        "gathers": True,
    }
    arrays = {CENTRE: public.centre_D, COVARIANCE: public.covariance_DD}
    rows = {f"{TEXT}{k}": text_CD if texts else torch.zeros_like(text_CD) for k, text_CD in enumerate(keys)}
    return State(arrays | rows, facts)


def gathers(state: State) -> bool:
    """Returns whether the next assignments ask for class totals."""
    return bool(state.facts.get("gathers"))


def totals_spec(state: State) -> dict[str, tuple[int, ...]]:
    """Returns the spec of the totals, in rounds that gather them."""
    if not gathers(state):
        return {}
    width = len(state.arrays[CENTRE])
    return {CLASSES: (totals_size(max(state.facts["key_labels"]), width, state.facts["gram"]),)}


def readout_assignment(state: State, client: ClientCard) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns the arrays and facts about readouts in a client's assignment."""
    arrays, asked, facts = {}, {}, state.facts
    if gathers(state):
        arrays = {CENTRE: state.arrays[CENTRE]}
        asked = {name: facts[name] for name in ("feature_scale", "gram")} | {"most_labels": max(facts["key_labels"])}
    if (readout := state_readout(state, client)) is not None:
        arrays |= {ROWS: readout.rows_CD, BIAS: readout.bias_C, SHARES: readout.shares_C}
        own = {part: f"{part}/{client.name}" for part in (SCORING, SCORING_BIAS)}
        arrays |= {part: state.arrays[name] for part, name in own.items() if name in state.arrays}
    return arrays, asked


def state_readout(state: State, client: ClientCard) -> Readout | None:
    """Returns the learned readout of a client's task key."""
    key = client_key(state, client)
    if f"{ROWS}/{key}" not in state.arrays:
        return None
    return Readout(*(state.arrays[f"{part}/{key}"] for part in (ROWS, BIAS, SHARES)))


def client_key(state: State, client: ClientCard) -> int | None:
    """Returns a client's task key, or its group's if it never took part. None: its labels are not read from features."""
    of_group = state.facts.get("key_of_group", {})
    return state.facts.get("key_of_client", {}).get(client.name, of_group.get(_group(client, of_group)))


def readout_arrays(state: State) -> dict[str, Tensor]:
    """Returns the arrays of a state that this module made."""
    return {
        name: a for name, a in state.arrays.items() if name.startswith((CENTRE, COVARIANCE, TEXT, ROWS, BIAS, SHARES))
    }


def learn_readouts(state: State, updates: Sequence[ClientUpdate], again: bool = False, scoring: bool = False) -> State:
    """Learns each key's readout from the updates of a gathering round. A key without totals keeps its readout.

    `again`: a later round gathers, too. `scoring`: each client gets a second readout, to score its own records by, because
    a readout fits the records that it was learned from better than others. It is the mean of the key's readout and of the
    readout without the client's totals, about as if half of its records were left out. There is none in a secure sum, for
    a single client, and none beyond `MANY_RECORDS` or `MOST_SCORING`.
    """
    if not gathers(state) or not updates:
        return state
    facts, public = state.facts, _public(state)
    most, width, found = max(facts["key_labels"]), len(public.centre_D), {}
    for update in updates:
        key = facts["key_of_client"].get(update.client)
        if key is not None:
            labels = facts["key_labels"][key]
            totals = split_totals(update.arrays[CLASSES], labels, most, width, facts["gram"])
            found.setdefault(key, {})[update.client] = totals
    over = (SCORING, *(() if again else (CENTRE, COVARIANCE, TEXT)))
    arrays = {name: a for name, a in state.arrays.items() if not name.startswith(over)}
    for key, of_client in sorted(found.items()):
        noise, text_CD, of_key = facts.get(NOISE_OF_TOTALS, 0.0), state.arrays[f"{TEXT}{key}"], list(of_client.values())
        readout = learn_readout(of_key, text_CD, public, facts["noisy"], noise)
        if readout is None:
            continue
        arrays |= {f"{ROWS}/{key}": readout.rows_CD, f"{BIAS}/{key}": readout.bias_C}
        arrays[f"{SHARES}/{key}"] = readout.shares_C
        records = sum(float(one.counts_C.sum()) for one in of_key)
        large = len(of_key) * readout.rows_CD.numel() > MOST_SCORING
        if not scoring or noise or large or records > MANY_RECORDS * width:
            continue
        without = left_out_readouts(of_key, text_CD, public, facts["noisy"])
        for client, rest in zip(of_client, without, strict=True):
            if rest is not None:
                arrays[f"{SCORING}/{client}"] = (readout.rows_CD + rest.rows_CD) / 2
                arrays[f"{SCORING_BIAS}/{client}"] = (readout.bias_C + rest.bias_C) / 2
    return State(arrays, {**facts, "gathers": False})


def without_totals(update: ClientUpdate) -> ClientUpdate:
    return ClientUpdate(update.client, {n: a for n, a in update.arrays.items() if n != CLASSES}, update.weight)


def _public(state: State) -> PublicFeatures:
    return PublicFeatures(state.arrays[CENTRE], state.facts["feature_scale"], state.arrays[COVARIANCE])


def _group(card: ClientCard, groups: Mapping[str, Any]) -> str:
    """Returns a client's group; "" in a federation of one task."""
    group = str(card.metadata.get("group", ""))
    return "" if "" in groups else group


# ---------------------------------------------------------------- client


def assigned_readout(assignment: Assignment) -> Readout | None:
    """Returns the readout that an assignment carries; None: the task's own."""
    if ROWS not in assignment.arrays:
        return None
    return Readout(*(assignment.arrays[name] for name in (ROWS, BIAS, SHARES)))


def scoring_readout(assignment: Assignment) -> Readout | None:
    """Returns the readout that scores the client's own records; None: the assigned one."""
    if SCORING not in assignment.arrays:
        return None
    return Readout(*(assignment.arrays[name] for name in (SCORING, SCORING_BIAS, SHARES)))


def validate_readout(assignment: Assignment, width: int, facts: Mapping[str, tuple[type, ...]]) -> Assignment:
    """Checks the arrays and facts about readouts; returns the assignment without these arrays.

    `facts`: the kinds of the method's own facts. Raises `CodecError`.
    """
    asked, read = CENTRE in assignment.arrays, ROWS in assignment.arrays
    validate_facts(assignment, {**facts, **(ASKED if asked else {})})
    if asked and not (1 <= assignment.facts["most_labels"] <= MOST_LABELS and assignment.facts["feature_scale"] > 0):
        raise CodecError(
            f"the assignment's 'most_labels' is {assignment.facts['most_labels']} and 'feature_scale' "
            f"{assignment.facts['feature_scale']}, expected 1 to {MOST_LABELS}, and above 0"
        )
    labels = len(assignment.arrays[ROWS]) if read else 0
    shapes = {CENTRE: (width,), ROWS: (labels, width), BIAS: (labels,), SHARES: (labels,)}
    shapes |= {SCORING: (labels, width), SCORING_BIAS: (labels,)}
    expected = ([CENTRE] if asked else []) + ([ROWS, BIAS, SHARES] if read else [])
    expected += [SCORING, SCORING_BIAS] if read and SCORING in assignment.arrays else []
    given = {n: tuple(a.shape) for n, a in assignment.arrays.items() if n in shapes}
    if given != {name: shapes[name] for name in expected}:
        wanted = {name: shapes[name] for name in expected}
        raise CodecError(f"the assignment's readout arrays are {given}, expected {wanted}")
    rest = {name: array for name, array in assignment.arrays.items() if name not in shapes}
    return Assignment(assignment.method, assignment.round, rest, assignment.facts)


def client_totals(
    client: ClientContext, assignment: Assignment, prompt_PD: Tensor | None = None
) -> Generator[Query, Answer, dict[str, Tensor]]:
    """Returns the client's released totals under a prompt (None: the start), if the assignment asks for them.

    Guarantees (`tests/methods/shared/test_readouts.py`): a record changes the sum by norm 1 at most (`private_sum` clips
    its row), and the ledger has one line for them. The features depend on the record and the prompt sent alone.
    """
    if CENTRE not in assignment.arrays:
        return {}
    batch, centre_D, facts = client.full_batch(), assignment.arrays[CENTRE], assignment.facts
    labels, most, width, gram = batch.task.num_labels, facts["most_labels"], len(centre_D), facts["gram"]
    if batch.readout_CD is None or batch.targets is None or labels > most:
        return {CLASSES: torch.zeros(totals_size(most, width, gram))}
    answer = yield Query((client.start if prompt_PD is None else prompt_PD)[None], batch, outputs=True)
    assert answer.outputs_KB is not None
    rows = row_chunks(
        answer.outputs_KB.features_RD, batch.targets.cpu(), centre_D, facts["feature_scale"], labels, gram
    )
    released = client.private_sum(CLASSES, rows)
    client.client_state[COUNTS] = split_totals(released, labels, labels, width, gram).counts_C.float()
    return {CLASSES: padded_totals(released, labels, most, width)}


def tuning_prior(client: ClientContext, readout: Readout | None) -> Tensor | None:
    """Returns the label prior [C] for shared gradients: the client's released shares over the federation's.

    Before the federation's shares are known they count as equal.
    """
    counts_C = client.client_state.get(COUNTS)
    if counts_C is None or (readout is not None and len(counts_C) != len(readout.shares_C)):
        return None
    labels = len(counts_C)
    shares_C = torch.full((labels,), 1 / labels) if readout is None else readout.shares_C
    return relative_prior(counts_C, shares_C, float(labels))


def read_as(batch: Batch, readout: Readout | None) -> Batch:
    """Returns a batch read by a learned readout, if it has the batch's labels. Raises `CodecError` for other labels."""
    if readout is not None and len(readout.rows_CD) != batch.task.num_labels:
        raise CodecError(
            f"the assignment's readout has {len(readout.rows_CD)} labels, expected {batch.task.num_labels}"
        )
    return batch.with_readout(readout)


def reading(readout: Readout | None, log_shares_C: Tensor | None) -> Callable[[ModelOutput, Batch], Tensor] | None:
    """Returns the logits function of a `Predictor`: by a readout and known label shares. None: by the task."""
    if readout is None and log_shares_C is None:
        return None

    def logits(outputs: ModelOutput, batch: Batch) -> Tensor:
        batch = read_as(batch, readout)
        found_RC = batch.task.logits(outputs, batch if log_shares_C is None else batch.with_prior(log_shares_C))
        assert found_RC is not None, "a task with labels"
        return found_RC

    return logits


def with_reading(
    work: Generator[Query, Answer, Result], readout: Readout | None, log_shares_C: Tensor | None
) -> Generator[Query, Answer, Result]:
    """Adds a learned readout and known label shares to a generator's queries (None: unchanged).

    Training under softmax(logits + log shares) removes the label shares from the prompt: logit adjustment (Menon et
    al., ICLR 2021, arXiv 2007.07314, eq. 10; over clients with their own shares, FedLC, Zhang et al., ICML 2022,
    arXiv 2209.00189, and balanced softmax, Ren et al., NeurIPS 2020, arXiv 2007.10740).
    """
    if readout is None and log_shares_C is None:
        return work

    def read(batch: Batch) -> Batch:
        batch = read_as(batch, readout)
        return batch if log_shares_C is None else batch.with_prior(log_shares_C)

    return map_queries(work, lambda query: query._replace(batch=read(query.batch)))
