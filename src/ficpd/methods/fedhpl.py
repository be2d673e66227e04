"""FedHPL: clients keep their prompts and exchange mean logits per label (Ma et al., 2024, arXiv 2405.17267).

This is our own specification after the paper's abstract, not a reproduction:

    client k   prompt p_k, tuned on   CE(f, y) + γ τ² KL(softmax(Ẑ_k^y / τ) ‖ softmax(f / τ)),   f the record's logits
    upload     of each class c the sum of the logits of k's correctly classified records, and their number n_k^c
    server     z̄_k^c = sum_k^c / n_k^c, the other clients' z̄^c = Σ_{j≠k} sum_j^c / Σ_{j≠k} n_j^c, and for client k
               Ẑ_k^c = α z̄_k^c + (1 - α) z̄^c

The server drops a class whose count is below one half or whose largest mean logit is another class's: that is noise.
Logits are centred, which softmax ignores and the clip norm does not. With several tasks, clients of one task share
logits.

Record-level privacy covers two releases. `ClientContext.private_sum` clips and noises the sums in every round. But
clipping bounds a record's effect on a sum *at a given prompt*, and the prompt depends on all records. So DP-SGD tunes
the prompt (`batches`, `private_mean`), although it is never sent: the prompt could then be published, and the sums
are one more release (adaptive composition). A record's logits and its count are clipped as one row.
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
HALF = 0.5**0.5  # logits and count each have half of a row's squared norm


class Config(FrozenConfig):
    """weight: γ, of the distillation loss. All defaults are ours.
    temperature: τ, of the distilled logits.
    own_share: α, of the client's own mean logits in its target.
    logit_norm: norm of a record's centred logits at which its row has norm 1. Without privacy it changes nothing.
    share: of a record-level budget for all sums; the prompt gets the rest."""

    weight: float = Field(default=1.0, ge=0)
    temperature: float = Field(default=4.0, gt=0)
    own_share: float = Field(default=0.25, ge=0, le=1)
    logit_norm: float = Field(default=10.0, gt=0)
    share: float = Field(default=0.25, gt=0, lt=1)


def build(config: Config, training: LocalTrainingConfig) -> "FedHpl":
    return FedHpl(config, training)


class FedHpl(Method):
    """Guarantees (`tests/methods/test_fedhpl.py`): queried prompts depend on the records only through
    `ClientContext.private_mean`. A record's row of logits and count is clipped to norm 1. The ledger has one entry for
    the logits of each round that the client took part in."""

    name = "fedhpl"

    def __init__(self, config: Config, training: LocalTrainingConfig):
        super().__init__(training)
        self.config = config
        self.capabilities = Capabilities(
            private_units=("record",), statistics_per_round={LOGITS: config.share},
            not_private="its clients release sums over their records; use privacy.name = 'record_gaussian'",
        )  # fmt: skip

    def check_compatible(self, tasks: Sequence[Task], backbone: Backbone) -> None:
        if not all(task.num_labels for task in tasks):
            kinds = ", ".join(str(task.to_config()["name"]) for task in tasks)
            raise ConfigError(f"fedhpl needs tasks with labels, and not every task here has labels ({kinds})")

    def init(self, setup: FederationInfo) -> State:
        facts = {"num_rounds": setup.num_rounds, "num_labels": dict(setup.num_labels)}
        facts["group"] = {card.name: _group(card) for card in setup.clients}
        return State({}, facts)

    def make_assignment(self, state: State, client: ClientCard, round: int) -> Assignment:
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
        client.client_state["prompt"] = yield from self._with_distillation(tuning, assignment)
        answer = yield Query(client.client_state["prompt"][None], records, outputs=True)
        assert answer.outputs_KB is not None
        rows_BCN = logit_sums(answer.outputs_KB, records, self.config.logit_norm)
        summed = client.private_sum(LOGITS, rows_BCN.flatten(1)).view(rows_BCN.shape[1:]) / HALF
        summed[:, 1:] *= self.config.logit_norm
        missing = assignment.facts["most_labels"] - len(summed)  # another task may have more labels
        return ClientUpdate(client.id, {LOGITS: F.pad(summed, (0, missing, 0, missing))})

    def _with_distillation(
        self, work: Generator[Query, Answer, Tensor], assignment: Assignment
    ) -> Generator[Query, Answer, Tensor]:
        """Adds the distillation loss to the optimizer's queries."""
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
        sent = {SENT + update.client: update.arrays[LOGITS] for update in updates}
        return State({**state.arrays, **sent}, state.facts)

    def personal_prompt(self, client: ClientContext, assignment: Assignment) -> Tensor:
        return client.client_state.get("prompt", client.start)

    def validate_assignment(self, assignment: Assignment, start: Prompt) -> None:
        """Raises `CodecError` unless the assignment is valid for some task; `local_update` checks the number of labels."""
        validate_facts(assignment, {**RATE, "most_labels": (int,)})
        number = assignment.arrays[KNOWN].numel() if KNOWN in assignment.arrays else 0
        validate_arrays(assignment, {LOGITS: (number, number), KNOWN: (number,)} if assignment.arrays else {})
        most = assignment.facts["most_labels"]
        if not max(number, 1) <= most <= MOST_LABELS:
            raise CodecError(f"the assignment's 'most_labels' is {most}, expected {max(number, 1)} to {MOST_LABELS}")
        if assignment.arrays and not torch.isin(assignment.arrays[KNOWN], torch.tensor([0.0, 1.0])).all():
            raise CodecError("the assignment's 'known' has other values than 0 and 1")
        if assignment.arrays and not (assignment.arrays[LOGITS].abs() <= LARGEST_LOGIT).all():
            raise CodecError(f"the assignment's 'logits' exceed {LARGEST_LOGIT:g}")


def logit_sums(outputs: ModelOutput, batch: Batch, logit_norm: float) -> Tensor:
    """Returns the rows [B, C, 1 + C] of the logit sums.

    A correctly classified record has a one and its centred logits over `logit_norm` in the row of its class. All else is
    zero.
    """
    assert batch.targets is not None
    rows = []
    for b, target in enumerate(batch.targets.tolist()):  # one by one, because rounding depends on the batch size
        logits_C = _logits(outputs.select(torch.tensor([b])), batch.select([b]))[0].float().cpu()
        row_CN = torch.zeros(len(logits_C), 1 + len(logits_C))
        if int(logits_C.argmax()) == target:
            row_CN[target] = HALF * F.pad((logits_C - logits_C.mean()) / logit_norm, (1, 0), value=1.0)
        rows.append(row_CN)
    return torch.stack(rows)


def personalized_logits(sent: Mapping[str, Tensor], client: str, own_share: float) -> tuple[Tensor, Tensor]:
    """Returns the personalised logits Ẑ_k [C, C], and the known classes ([C], 1 or 0).

    sent: [count, sums] of all clients, [C, 1 + C]. A class that only the client or only the others know takes that side's
    mean.
    """
    nothing = torch.zeros_like(next(iter(sent.values())))
    own_CC, own_known_C = _means(sent.get(client, nothing))
    others = torch.stack([nothing, *(array for name, array in sorted(sent.items()) if name != client)])
    others_CC, others_known_C = _means(others.sum(0))
    share_C = torch.where(own_known_C & others_known_C, own_share, own_known_C.float())[:, None]
    return share_C * own_CC + (1 - share_C) * others_CC, (own_known_C | others_known_C).float()


def _means(summed_CN: Tensor) -> tuple[Tensor, Tensor]:
    """Returns z̄ [C, C], zero for unknown classes, and the known classes: count above one half, argmax right."""
    count_C, classes_C = summed_CN[:, 0], torch.arange(len(summed_CN))
    means_CC = summed_CN[:, 1:] / count_C.clamp(min=1.0)[:, None]
    known_C = (count_C > 0.5) & (means_CC.argmax(1) == classes_C)
    return means_CC * known_C[:, None], known_C


def distillation_loss(outputs: ModelOutput, batch: Batch) -> Tensor:
    """Returns [R]: the task's loss plus γ τ² KL(softmax(Ẑ/τ) ‖ softmax(f/τ)) (Hinton et al., 2015, arXiv 1503.02531,
    section 2)."""
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
