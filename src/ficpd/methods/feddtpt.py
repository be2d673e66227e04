"""FedDTPT: tunes prompts of discrete tokens by queries only (Wu et al., 2024, arXiv 2411.00985).

Client: each step proposes words for one position of the prompt, queries them on the batch, and keeps the best (the
paper's feedback loop). Accuracy is the default signal, for models that return text only. Server: see
`token_aggregation` (Eq. 6).

There is no published code. Our own specification: the backbone's masked language model draws the proposals, or they
are drawn uniformly from its whole words (the paper: a masked language model behind an API). Proposals and positions
come from a public seed, equal for all clients of a round. So clients with similar records can agree. No public
set is added to the records. Word vectors are the backbone's; a remote one needs `backbone.options.words`. The prompt
keeps its length.

Private form (ours): `ClientContext.private_mean` clips each record's vector of errors over the candidates, centred on
its mean, and noises the sum. A record with equal answers contributes zero. The best candidate is a noisy maximum with
Gaussian noise, so the ledger charges steps as for any method. Proposals depend on public seeds and released words
only, so the update is post-processing. Words cannot be noised, so client-level privacy is refused.
"""

from collections.abc import Generator, Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from ficpd import rng
from ficpd.backbones.vocabulary import token_prompt, validate_ids
from ficpd.errors import ConfigError
from ficpd.federation.method import Capabilities, Method
from ficpd.federation.validation import validate_arrays, validate_facts
from ficpd.interfaces import Backbone, ClientContext, Model
from ficpd.methods.shared.token_aggregation import aggregate_tokens
from ficpd.optimizers import LocalTrainingConfig
from ficpd.optimizers.cma_es import center_losses
from ficpd.registry import FrozenConfig
from ficpd.types import (
    TOKEN_DTYPE,
    Answer,
    ArraySpec,
    Assignment,
    Batch,
    ClientCard,
    ClientUpdate,
    FederationInfo,
    ModelOutput,
    Prompt,
    Query,
    State,
    UpdateSpec,
)


class Config(FrozenConfig):
    """candidates: proposals for a position, besides the current word (8 is ours).
    signal: "loss": the task's loss; the backbone must return one.
    clip_norm: of a record's vector of errors under record-level privacy."""

    candidates: int = Field(default=8, ge=1)
    signal: Literal["accuracy", "loss"] = "accuracy"
    clip_norm: float = Field(default=1.0, gt=0)


def build(config: Config, training: LocalTrainingConfig) -> "FedDtpt":
    return FedDtpt(config, training)


class FedDtpt(Method):
    name = "feddtpt"

    def __init__(self, config: Config, training: LocalTrainingConfig):
        super().__init__(training)
        self.config = config
        self.capabilities = Capabilities(
            private_units=("record",), prompt_type="tokens", record_clip_norm=config.clip_norm,
            not_private="its updates are words, which take no noise; use privacy.name = 'record_gaussian'",
        )  # fmt: skip

    def init_prompt(self, prompt: Prompt, backbone: Backbone, seed: int) -> Prompt:
        """Returns a prompt of words; vectors are replaced by as many words drawn from the seed."""
        if prompt.head_rows:
            raise ConfigError("task.tuned_head = true: feddtpt's prompts are words, without head rows; set it to false")
        if not prompt.vectors_PD.is_floating_point():
            return prompt
        words_P1 = token_prompt(backbone.vocabulary, backbone.name, None, prompt.num_virtual_tokens, seed)
        return Prompt(words_P1, backbone.fingerprint)

    def init(self, setup: FederationInfo) -> State:
        return State({"prompt": setup.start.vectors_PD}, {"seed": setup.seed})

    def make_assignment(self, state: State, client: ClientCard, round: int) -> Assignment:
        return Assignment(self.name, round, {"prompt": state.arrays["prompt"]}, {"seed": state.facts["seed"]})

    def validate_assignment(self, assignment: Assignment, start: Prompt) -> None:
        """Raises `CodecError` unless the assignment is the seed and a prompt of token ids."""
        validate_facts(assignment, {"seed": (int,)})
        validate_arrays(assignment, {"prompt": (start.num_virtual_tokens, 1)}, torch.int64)

    def local_update(self, client: ClientContext, assignment: Assignment) -> Generator[Query, Answer, ClientUpdate]:
        prompt_P1 = assignment.arrays["prompt"]
        validate_ids(prompt_P1, client.vocabulary.size)  # before any record is sampled
        steps, signal = self.training.local_steps, is_wrong if self.config.signal == "accuracy" else None
        for step, batch in enumerate(client.batches(steps, self.training.batch_size)):
            place = ((assignment.round - 1) * steps + step) % len(prompt_P1)
            seed = rng.derive_seed(assignment.facts["seed"], "words", assignment.round, step)
            words = client.vocabulary.proposals(prompt_P1[:, 0].tolist(), place, self.config.candidates, seed)
            tried_KP1 = prompt_P1.repeat(1 + len(words), 1, 1)
            tried_KP1[1:, place, 0] = torch.tensor(words)
            answer = yield Query(tried_KP1, batch, loss=signal)
            prompt_P1 = tried_KP1[argmin_first(client.private_mean(center_losses(answer.loss_KB)))]
        return ClientUpdate(client.id, {"words": prompt_P1[:, 0].to(TOKEN_DTYPE)}, client.weight)

    def update_spec(self, state: State) -> UpdateSpec:
        return {"words": ArraySpec((len(state.arrays["prompt"]),), TOKEN_DTYPE)}

    def aggregate(self, state: State, updates: Sequence[ClientUpdate], round: int, model: Model) -> State:
        """Aggregates the words, without updates that have invalid token ids. Each client counts once."""
        words = model.backbone.vocabulary
        assert words is not None, "checked by init_prompt"
        sent = {u.client: u.arrays["words"].long() for u in sorted(updates, key=lambda u: u.client)}
        bad = [name for name, ids in sent.items() if not bool(((ids >= 0) & (ids < words.size)).all())]
        good_KN = [ids for name, ids in sent.items() if name not in bad]
        aside = dict.fromkeys(bad, f"it sent ids that are no words (0 to {words.size - 1})")
        prompt_P1 = state.arrays["prompt"]
        if good_KN:
            ids_KN = torch.stack(good_KN)
            prompt_P1 = aggregate_tokens(ids_KN, words.vectors(ids_KN).cpu())[:, None]
        return State({"prompt": prompt_P1}, {**state.facts, "excluded_updates": aside})


def is_wrong(outputs: ModelOutput, batch: Batch) -> Tensor:
    """Returns [R]: 0 if only the right answer scores highest, else 1. Without logits: the task's loss."""
    logits_RC = batch.task.logits(outputs, batch)
    if logits_RC is None:
        return batch.task.loss(outputs, batch)
    assert batch.targets is not None
    right_R1 = logits_RC.gather(1, batch.targets[:, None])
    return ((logits_RC >= right_R1).sum(1) > 1).float()


def argmin_first(mean_K: Tensor) -> int:
    """Returns the index of the minimum. The first wins a tie, so the current word stays.

    >>> argmin_first(torch.tensor([0.25, 0.5, 0.25]))
    0
    """
    return int((mean_K == mean_K.min()).nonzero()[0])
