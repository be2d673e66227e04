"""FedHPL: prompts stay at home, and what clients tell each other is what they answer (Ma et al., 2024, arXiv 2405.17267).

Only the paper's abstract could be read, so this is our own specification of what it describes, and no reproduction:

    client k   prompt p_k, tuned on   CE(f, y) + γ τ² KL(softmax(Ẑ_k^y / τ) ‖ softmax(f / τ)),   f the record's logits
    upload     of each class c the sum of the logits of k's correctly classified records, and their number n_k^c
    server     z̄_k^c = sum_k^c / n_k^c, everybody else's z̄^c = Σ_{j≠k} sum_j^c / Σ_{j≠k} n_j^c (weighted by counts), and
               Ẑ_k^c = α z̄_k^c + (1 - α) z̄^c: the own share stands apart, so Ẑ_k is for client k alone

A mean of less than one record, or one whose largest logit is another class's, is noise: the means of right answers are right
answers. Its class goes without. Logits are centred, for softmax does not see the difference and a clip does. In a federation
of several tasks, clients of one task tell each other.

With a record-level mechanism two things have to be private, not one. The sums that leave are totals over records
(`ClientSide.total`), clipped and noised in every round anew. But that bounds what one record does to a sum *at a given
prompt*, and the prompt is a function of all records: one record more moves it, and with it everybody's logits. So the
prompt is tuned by DP-SGD (`batches`, `mean`) although it never leaves; then it is as good as public, and the sums are one
release more (adaptive composition). A record's logits and the one that it adds to a count are clipped as one row.
"""

from collections.abc import Generator, Mapping, Sequence
from dataclasses import replace

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from ficpd.errors import CodecError, ConfigError
from ficpd.federation.method import Capabilities, Method
from ficpd.federation.validation import RATE, validate_arrays, validate_facts
from ficpd.interfaces import Backbone, ClientContext, Model, Task
from ficpd.optimizers import LocalTrainingConfig, map_queries, tune
from ficpd.registry import FrozenConfig
from ficpd.types import (
    Answer,
    Assignment,
    Batch,
    ClientCard,
    ClientUpdate,
    FederationInfo,
    ModelOutput,
    Prompt,
    Query,
    State,
)

LOGITS, KNOWN, SENT = "logits", "known", "sent/"
TARGET, WEIGHT = "distilled/target", "distilled/weight"
MOST_LABELS, LARGEST_LOGIT = 10_000, 1e6
"""More than noise adds to any mean; a site trusts no server."""
HALF = 0.5**0.5
"""Logits and count have half each of a row's squared norm."""


class Config(FrozenConfig):
    """`weight` is γ, `temperature` τ, `own_share` α; all defaults are ours. `logit_norm`: how long centred logits may be
    beside a count of one; a record with longer ones counts for less (without privacy it changes nothing). `share`: of a
    record-level mechanism's budget, what the sums of all rounds take; the prompt gets the rest."""

    weight: float = Field(default=1.0, ge=0)
    temperature: float = Field(default=4.0, gt=0)
    own_share: float = Field(default=0.25, ge=0, le=1)
    logit_norm: float = Field(default=10.0, gt=0)
    share: float = Field(default=0.25, gt=0, lt=1)


def build(config: Config, training: LocalTrainingConfig) -> "FedHpl":
    return FedHpl(config, training)


class FedHpl(Method):
    """Guarantees (`tests/methods/test_fedhpl.py`): every prompt that is asked about depends on the records only through
    `ClientSide.mean`; a record's row in the total, logits and count together, is as long as `logit_norm` says and clipped
    to norm 1; the ledger has a line of the logits for each round that the client answered."""

    name = "fedhpl"

    def __init__(self, config: Config, training: LocalTrainingConfig):
        super().__init__(training)
        self.config = config
        self.capabilities = Capabilities(
            private_units=("record",), statistics_per_round={LOGITS: config.share},
            not_private="its clients release totals over their records; use privacy.name = 'record_gaussian'",
        )  # fmt: skip

    def check_compatible(self, tasks: Sequence[Task], backbone: Backbone) -> None:
        if not all(task.num_labels for task in tasks):
            kinds = ", ".join(str(task.to_config()["name"]) for task in tasks)
            raise ConfigError(f"fedhpl compares logits label by label, and not every task here has labels ({kinds})")

    def init(self, setup: FederationInfo) -> State:
        facts = {"num_rounds": setup.num_rounds, "num_labels": dict(setup.num_labels)}
        facts["group"] = {card.name: _group(card) for card in setup.clients}
        return State({}, facts)

    def make_assignment(self, state: State, client: ClientCard, round: int) -> Assignment:
        """Logits as soon as there are any."""
        own, facts, arrays = _group(client), state.facts, {}
        known = {name.removeprefix(SENT): array for name, array in sorted(state.arrays.items())}
        if sent := {name: array for name, array in known.items() if facts["group"].get(name) == own}:
            number = facts["num_labels"][own]
            of_label = {name: array[:number, : number + 1] for name, array in sent.items()}
            arrays[LOGITS], arrays[KNOWN] = personalized_logits(of_label, client.name, self.config.own_share)
        rate = self.training.rate(round, facts["num_rounds"])
        return Assignment(self.name, round, arrays, {"rate": rate, "most_labels": max(facts["num_labels"].values())})

    def local_update(self, client: ClientContext, assignment: Assignment) -> Generator[Query, Answer, ClientUpdate]:
        records = client.full_batch()
        if LOGITS in assignment.arrays and len(assignment.arrays[LOGITS]) != records.task.num_labels:
            raise CodecError(
                f"the assignment has logits of {len(assignment.arrays[LOGITS])} labels, expected {records.task.num_labels}"
            )
        tuning = tune(
            self.training, client, assignment, self.personal_prompt(client, assignment), memory=client.client_state
        )
        client.client_state["prompt"] = yield from self._distilled(tuning, assignment)
        answer = yield Query(client.client_state["prompt"][None], records, outputs=True)
        assert answer.outputs_KB is not None
        rows_BCN = logit_sums(answer.outputs_KB, records, self.config.logit_norm)
        summed = client.private_sum(LOGITS, rows_BCN.flatten(1)).view(rows_BCN.shape[1:]) / HALF
        summed[:, 1:] *= self.config.logit_norm
        missing = assignment.facts["most_labels"] - len(summed)  # another task may have more labels
        return ClientUpdate(client.id, {LOGITS: F.pad(summed, (0, missing, 0, missing))})

    def _distilled(
        self, work: Generator[Query, Answer, Tensor], assignment: Assignment
    ) -> Generator[Query, Answer, Tensor]:
        """The optimizer's questions, each record's loss with its class's global logits to be like."""
        if LOGITS not in assignment.arrays or not self.config.weight:
            return work
        logits_CC, known_C, temperature = assignment.arrays[LOGITS], assignment.arrays[KNOWN], self.config.temperature

        def on_query(query: Query) -> Query:
            labels_B = query.batch.targets
            assert labels_B is not None
            weight_B = self.config.weight * temperature**2 * known_C[labels_B]
            weights_B2 = torch.stack([weight_B, torch.full_like(weight_B, temperature)], dim=1)
            extra = {**query.batch.extra, TARGET: logits_CC[labels_B], WEIGHT: weights_B2}
            return query._replace(batch=replace(query.batch, extra=extra), loss=distillation_loss)

        return map_queries(work, on_query)

    def update_spec(self, state: State) -> Mapping[str, tuple[int, ...]]:
        most = max(state.facts["num_labels"].values())
        return {LOGITS: (most, most + 1)}

    def aggregate(self, state: State, updates: Sequence[ClientUpdate], round: int, model: Model) -> State:
        """What each client sent last."""
        sent = {SENT + update.client: update.arrays[LOGITS] for update in updates}
        return State({**state.arrays, **sent}, state.facts)

    def personal_prompt(self, client: ClientContext, assignment: Assignment) -> Tensor:
        return client.client_state.get("prompt", client.start)

    def validate_assignment(self, assignment: Assignment, start: Prompt) -> None:
        """Raises `CodecError` unless it has a rate and, if any, logits that a mean of clipped ones could be. (Whether they
        are of this client's labels, `train` sees before a record is drawn.)"""
        validate_facts(assignment, {**RATE, "most_labels": (int,)})
        number = assignment.arrays[KNOWN].numel() if KNOWN in assignment.arrays else 0
        validate_arrays(assignment, {LOGITS: (number, number), KNOWN: (number,)} if assignment.arrays else {})
        most = assignment.facts["most_labels"]
        if not max(number, 1) <= most <= MOST_LABELS:
            raise CodecError(f"the order is of {most} labels at most, and has {number}; expected at most {MOST_LABELS}")
        if assignment.arrays and not torch.isin(assignment.arrays[KNOWN], torch.tensor([0.0, 1.0])).all():
            raise CodecError("the order says of a label neither that it is known nor that it is not")
        if assignment.arrays and not (assignment.arrays[LOGITS].abs() <= LARGEST_LOGIT).all():
            raise CodecError(f"the order has logits beyond {LARGEST_LOGIT:g}, which no mean of clipped ones comes to")


def logit_sums(outputs: ModelOutput, batch: Batch, logit_norm: float) -> Tensor:
    """[B, C, 1 + C]: in the row of its class, each correctly classified record's one and its centred logits over
    `logit_norm`, so that a record with logits of that length has norm 1; nothing of a record that is misclassified."""
    assert batch.targets is not None
    rows = []
    for b, target in enumerate(batch.targets.tolist()):  # one by one: all at once are rounded by how many there are
        logits_C = _logits(outputs.select(torch.tensor([b])), batch.select([b]))[0].float().cpu()
        row_CN = torch.zeros(len(logits_C), 1 + len(logits_C))
        if int(logits_C.argmax()) == target:
            row_CN[target] = HALF * F.pad((logits_C - logits_C.mean()) / logit_norm, (1, 0), value=1.0)
        rows.append(row_CN)
    return torch.stack(rows)


def personalized_logits(sent: Mapping[str, Tensor], client: str, own_share: float) -> tuple[Tensor, Tensor]:
    """Ẑ_k [C, C] and whether there is one of each class ([C], 1 or 0), of all clients' counts beside sums [C, 1 + C]. Of a
    class that only the client itself has answered for, or only the others, theirs counts whole."""
    nothing = torch.zeros_like(next(iter(sent.values())))
    own_CC, own_known_C = _means(sent.get(client, nothing))
    others = torch.stack([nothing, *(array for name, array in sorted(sent.items()) if name != client)])
    others_CC, others_known_C = _means(others.sum(0))
    share_C = torch.where(own_known_C & others_known_C, own_share, own_known_C.float())[:, None]
    return share_C * own_CC + (1 - share_C) * others_CC, (own_known_C | others_known_C).float()


def _means(summed_CN: Tensor) -> tuple[Tensor, Tensor]:
    """z̄ [C, C], zero where it is not known, and whether it is: there is a record, and its class has the largest logit."""
    count_C, classes_C = summed_CN[:, 0], torch.arange(len(summed_CN))
    means_CC = summed_CN[:, 1:] / count_C.clamp(min=1.0)[:, None]
    known_C = (count_C > 0.5) & (means_CC.argmax(1) == classes_C)
    return means_CC * known_C[:, None], known_C


def distillation_loss(outputs: ModelOutput, batch: Batch) -> Tensor:
    """[R]: the task's loss plus γ τ² KL(softmax(Ẑ/τ) ‖ softmax(f/τ)) (Hinton et al., 2015, arXiv 1503.02531, section 2: τ²
    keeps the gradient's size as τ changes)."""
    weight_R, temperature_R = batch.extra[WEIGHT].unbind(1)
    own_RC = (_logits(outputs, batch) / temperature_R[:, None]).log_softmax(1)
    wanted_RC = (batch.extra[TARGET] / temperature_R[:, None]).log_softmax(1)
    apart_R = F.kl_div(own_RC, wanted_RC, reduction="none", log_target=True).sum(1)
    return batch.task.loss(outputs, batch) + weight_R * apart_R


def _logits(outputs: ModelOutput, batch: Batch) -> Tensor:
    logits_RC = batch.task.logits(outputs, batch)
    assert logits_RC is not None, "checked before the run"
    return logits_RC


def _group(card: ClientCard) -> str:
    return str(card.metadata.get("group", ""))
