"""FedDTPT: prompts of words, tuned by asking alone (Wu et al., 2024, arXiv 2411.00985).

Client. From the global words, step by step: for one place several other words are proposed, all are tried on the step's
records, and what is answered best stays (the paper's feedback loop; what was tried and how well it did is what the next
proposal starts from). Accuracy is the only signal, as where a model returns nothing but text.
Server. `server/tokens`: words weighed by what other clients sent (Eq. 6), clustered by their vectors, one kept of each.

Of the paper the text was read and no code is to be had. Our own specification is: proposals are drawn by the backbone's own
masked language model where it is one, else evenly from its whole words (the paper: a masked language model behind an API);
they, and the places in turn, come from a public seed that all clients share in a round, so that clients whose records agree
can agree on a word; no small public set is added to the records; word vectors are the backbone's own, of a remote one those
of `backbone.options.words`; the prompt keeps its length.

Private form (ours, too). Each record's vector of right and wrong over the candidates goes through `ClientSide.mean`, less
its own mean, which moves no candidate against another and makes it short: a record that every candidate answers alike weighs
nothing. The mechanism clips it as one vector, noises the sum, and the largest is taken: a noisy maximum whose noise is
Gaussian, so that the ledger prices it as the steps of any other method. Proposals go by public seeds and by words chosen so
far, so the words that leave are post-processing. Words cannot be noised themselves: client-level privacy is refused.
"""

from collections.abc import Generator, Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from ficpd import rng
from ficpd.backbones.vocabulary import token_prompt
from ficpd.errors import ConfigError
from ficpd.federation.method import Capabilities, Method
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
    """`candidates`: words that are tried for one place, beside the one that stands there (8 is ours: the paper's number was
    not to be read). `signal` "loss": the task's, where the backbone gives one. `clip_norm`: of a record's vector of right
    and wrong, under record-level privacy; at 1 one that tells a single candidate from the others counts whole."""

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
            not_private="it sends words, which take no noise; use privacy.name = 'record_gaussian'",
        )  # fmt: skip

    def init_prompt(self, prompt: Prompt, backbone: Backbone, seed: int) -> Prompt:
        """Words as they are; for vectors as many words, drawn by the seed."""
        if prompt.head_rows:
            raise ConfigError("task.tuned_head = true: a head is no words, and feddtpt's prompts are; leave it out")
        if not prompt.vectors_PD.is_floating_point():
            return prompt
        return Prompt(
            token_prompt(backbone.vocabulary, backbone.name, None, prompt.num_virtual_tokens, seed),
            backbone.fingerprint,
        )

    def init(self, setup: FederationInfo) -> State:
        return State({"prompt": setup.start.vectors_PD}, {"seed": setup.seed})

    def make_assignment(self, state: State, client: ClientCard, round: int) -> Assignment:
        return Assignment(self.name, round, {"prompt": state.arrays["prompt"]}, {"seed": state.facts["seed"]})

    def local_update(self, client: ClientContext, assignment: Assignment) -> Generator[Query, Answer, ClientUpdate]:
        prompt_P1 = assignment.arrays["prompt"]
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
        """An update with ids that are no words is set aside, by name; every other client counts once."""
        words = model.backbone.vocabulary
        assert words is not None, "it started from them"
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
    """[R]: 1 where another answer than the right one scores as high, else 0; of a task without answers to choose from the
    task's loss."""
    logits_RC = batch.task.logits(outputs, batch)
    if logits_RC is None:
        return batch.task.loss(outputs, batch)
    assert batch.targets is not None
    right_R1 = logits_RC.gather(1, batch.targets[:, None])
    return ((logits_RC >= right_R1).sum(1) > 1).float()


def argmin_first(mean_K: Tensor) -> int:
    """The place of the least, the first of several: what stands there stays unless another word is better.

    >>> argmin_first(torch.tensor([0.25, 0.5, 0.25]))
    0
    """
    return int((mean_K == mean_K.min()).nonzero()[0])
