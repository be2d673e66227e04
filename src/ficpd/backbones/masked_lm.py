"""Masked language models (BERT, RoBERTa, DeBERTa, ModernBERT, ...): answers are words at a mask.

A text is read with a cloze behind it: the instruction with a mask, as in pattern-exploiting training (Schick and Schütze,
EACL 2021, arXiv 2001.07676). Answers of one token are scored by their rows of the language head. Other answers are read with
one mask for each of their tokens. Their score is the mean log-likelihood, with all masks filled at once (Schick and Schütze,
NAACL 2021, arXiv 2009.07118).
"""

import weakref
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForMaskedLM

from ficpd.backbones.devices import copy_to
from ficpd.backbones.pretrained import Loader, LoadingConfig, TextModel, require_weights
from ficpd.errors import BackboneError
from ficpd.types import EncodedInput, ModelOutput

MASK = "[MASK]"
"""The place of the answer in an instruction, for any tokeniser. Without it the answer is at the end."""


class Config(LoadingConfig):
    """max_tokens: the longest input in tokens, prompt included."""

    max_tokens: int = Field(default=256, ge=8)


def build(config: Config, weights: Any, *, dtype: torch.dtype, attention: str, device: torch.device, name: str):
    """Loads a masked language model from a `from_pretrained` folder.

    Raises `BackboneError` if it cannot be run on embeddings or its weights lack a part, such as the language head.
    """
    loader = Loader(Path(weights.folder), name, MaskedLM.about, config, device, dtype, attention)
    model, tokenizer, missing = loader.model_and_tokenizer(AutoModelForMaskedLM)
    require_weights(missing, name, "a masked language model")
    return MaskedLM(config, model, tokenizer, config.identity(weights), name)


class MaskedLM(TextModel):
    """A frozen masked language model with its head. Features are the input of the head's last product."""

    kind, about = "masked_lm", "a masked language model"

    def __init__(self, config: Config, model: Any, tokenizer: Any, identity: str, name: str):
        super().__init__(config.max_tokens, model, tokenizer, identity, name)
        marks = {"mask": tokenizer.mask_token_id, "cls": tokenizer.cls_token_id, "sep": tokenizer.sep_token_id}
        if lacking := [mark for mark, token in marks.items() if token is None]:
            raise BackboneError(
                f"backbone.name = {name!r}: its tokenizer has no {' and no '.join(lacking)} token; expected all of "
                f"{', '.join(marks)}. Use another model, or another backbone.kind."
            )
        self.separators = max(1, tokenizer.num_special_tokens_to_add(pair=True) - 2)
        self._segments = next(
            (part.weight for key, part in model.named_modules() if key.endswith("token_type_embeddings")), ()
        )
        self._unread = {*tokenizer.all_special_ids} - {tokenizer.unk_token_id}
        self.decoder = model.get_output_embeddings()
        self.scored_by_rows = self._find_bias()
        self.words.likely = partial(MaskedLM._likely, weakref.proxy(self))  # a reference cycle would keep the model
        some = range(0, len(self.decoder.weight), max(1, len(self.decoder.weight) // 1024))
        self._head_norm = float(self._rows([*some]).norm(dim=1).mean())

    @torch.no_grad()
    def _find_bias(self) -> bool:
        """Prepares `_rows`; returns whether features @ rows.T are the model's own logits.

        The output γ·n + β of a layer norm, where n has mean 0, has a constant component along 1/γ. Features have another
        constant there, which multiplies the vocabulary's bias. So a readout of the same width includes the bias exactly.
        """
        sample_TD, frozen = self.frozen.sample_TD, self.frozen
        norm, words_TE = frozen.last_norm(sample_TD), frozen.head_input(sample_TD)
        self._across_D, self._was, self._one = words_TE.new_zeros(words_TE.shape[1]).float(), 0.0, 1.0
        if norm is not None:
            weight = norm.weight.cpu()  # mps has no float64
            gamma, beta = weight.double(), weight.new_zeros(()) if norm.bias is None else norm.bias.cpu()
            across = F.normalize(1 / torch.where(gamma.abs() < 1e-9, 1e-9, gamma), dim=0)
            self._across_D, self._was = copy_to(across.float(), self.device), float((across * beta.double()).sum())
            self._one = float(gamma.square().mean().sqrt())  # as long as any other coordinate
        ids = [*range(0, len(self.decoder.weight), max(1, len(self.decoder.weight) // 64))]
        own_TN = frozen.logits(sample_TD)[:, ids].float()
        ours_TN = self._features(words_TE) @ self._rows(ids).T
        return bool((ours_TN - own_TN).abs().max() <= frozen.tolerance * own_TN.abs().max())

    def _features(self, words_ND: Tensor) -> Tensor:
        words_ND = words_ND.float()
        if not self._across_D.any():
            return words_ND
        along_N = self._one - words_ND @ self._across_D
        return words_ND + along_N[:, None] * self._across_D

    # ------------------------------------------------------------ text to items

    def tokenize(
        self, text: str, pair: str | None, instruction: str, answer: str | None, room: int, writes: int = 0
    ) -> EncodedInput:
        """Makes `[CLS] text cloze [SEP]`, or `[CLS] text [SEP] pair cloze [SEP]`.

        An answer's tokens follow the item's `length`, and the cloze has a mask for each of them. The text is cut first; a
        pair keeps up to half of the space."""
        if writes:
            raise self._cannot_write()
        tail = [] if answer is None else self._answer(answer)
        cloze, sep = self._ids(" " + self._cloze(instruction, max(1, len(tail)))), [self.tokenizer.sep_token_id]
        between = [] if pair is None else sep * self.separators
        space = self.max_tokens - room - len(cloze) - len(between) - 2
        if space < 1:
            raise BackboneError(
                f"{room} virtual tokens and {len(cloze)} of the instruction and its mask leave nothing of {self.name}'s "
                f"{self.max_tokens} tokens for the text; take fewer virtual tokens (prompt.num_tokens), a shorter "
                "instruction or a larger backbone.max_tokens"
            )
        words, line = self._plain(text), self._plain(pair or "")
        line = line[: max(space - len(words), space // 2)]
        ids = [self.tokenizer.cls_token_id, *words[: space - len(line)], *between, *line, *cloze, *sep]
        return EncodedInput(torch.tensor(ids + tail), len(ids), len(tail))

    def readout(self, instruction: str, answers: Sequence[str]) -> Tensor | None:
        """Returns each answer's row of the language head, [C, D].

        Returns None if an answer has several tokens, or the head has more than rows and a bias.
        """
        ids = [self._answer(answer) for answer in answers]
        for place, answer in enumerate(answers):
            if not set(self.tokenizer.all_special_ids).isdisjoint(ids[place]):
                raise BackboneError(
                    f"the answer text {answer!r} is {self._pieces(ids[place])} to {self.name}, which cannot stand at a "
                    "mask; choose a word that its vocabulary has, or a backbone made for this language"
                )
            if ids[place] in ids[:place]:
                raise BackboneError(
                    f"{self.name} reads the answers {answers[ids.index(ids[place])]!r} and {answer!r} as the same tokens "
                    f"({self._pieces(ids[place])}); choose another word for one"
                )
        return self._rows([i[0] for i in ids]) if self.scored_by_rows and all(len(i) == 1 for i in ids) else None

    def head_to_readout(self, rows_RCD: Tensor) -> Tensor:
        """Scales directions to the mean length of the language head's rows, to give a tuned head its scale."""
        return F.normalize(rows_RCD.float(), dim=-1) * self._head_norm

    def _cloze(self, instruction: str, masks: int) -> str:
        mask = self.tokenizer.mask_token
        parts = instruction.replace(MASK, mask).split(mask)
        if len(parts) > 2:
            raise BackboneError(f"the instruction {instruction!r} has {len(parts) - 1} masks; leave one of them")
        return f"{instruction} {mask * masks}" if len(parts) < 2 else parts[0] + mask * masks + parts[1]

    def _plain(self, text: str) -> list[int]:
        """Returns a text's tokens, without special tokens that are written in it."""
        return [i for i in self._ids(text) if i not in self._unread]

    def _answer(self, answer: str) -> list[int]:
        """Returns an answer's tokens inside a text: with a blank before it, unless the blank is a separate token."""
        ids = self._ids(f" {answer}") if answer.strip() else []
        if len(ids) > 1 and not self.tokenizer.decode(ids[:1]).strip():
            ids = ids[1:]
        if not ids:
            raise BackboneError(f"the answer text {answer!r} has no tokens for {self.name}; write it in words")
        return ids

    def _pieces(self, ids: Sequence[int]) -> str:
        return " ".join(self.tokenizer.convert_ids_to_tokens(ids))

    # ------------------------------------------------------------ layers

    def forward(
        self, prompts_SPD: Tensor, hidden: Sequence[Tensor], items: Sequence[EncodedInput], layer: int
    ) -> ModelOutput:
        """Returns features at the (first) mask, and scores: mean log-likelihoods of an answer's tokens at the masks."""
        states_STD, _ = self.frozen.run(prompts_SPD, hidden, layer)
        masks = [(i.content[: i.length] == self.tokenizer.mask_token_id).nonzero()[:, 0] for i in items]
        rows = torch.arange(len(items)).repeat_interleave(torch.tensor([len(places) for places in masks]))
        places = (torch.cat(masks) + prompts_SPD.shape[1]).to(self.device)
        states_ND = states_STD[rows.to(self.device), places]
        firsts = self._index([sum(len(places) for places in masks[:row]) for row in range(len(items))])
        features_SD = self._features(self.frozen.head_input(states_ND[firsts]))
        if not any(item.scored for item in items):
            return ModelOutput(features_SD)
        words = self.frozen.logits(states_ND).float().split([len(places) for places in masks])
        scores = [self._likelihood(word, item) for word, item in zip(words, items, strict=True)]
        return ModelOutput(features_SD, torch.stack(scores)[:, None])

    def _likelihood(self, logits_NV: Tensor, item: EncodedInput) -> Tensor:
        if not item.scored:
            return logits_NV.new_full((), -torch.inf)
        return -F.cross_entropy(logits_NV, item.content[item.length :].to(self.device))

    @torch.no_grad()
    def _likely(self, ids: Sequence[int], place: int) -> Tensor:
        """Returns the logits [V] of the tokens at a place of these ids."""
        mask = self.tokenizer.mask_token_id
        whole = [self.tokenizer.cls_token_id, *ids[:place], mask, *ids[place + 1 :], self.tokenizer.sep_token_id]
        item = EncodedInput(torch.tensor(whole), len(whole))
        none = torch.zeros(1, 0, self.width, device=self.device)
        states_STD, _ = self.frozen.run(none, self._word_vectors([item]), 0)
        return self.frozen.logits(states_STD[:, place + 1])[0]

    def _rows(self, ids: Sequence[int]) -> Tensor:
        """Returns rows [N, D] so that features @ rows.T are the head's logits of these tokens, with its bias."""
        rows_ND, bias = self.decoder.weight[ids].float(), getattr(self.decoder, "bias", None)
        bias_N = rows_ND.new_zeros(len(ids)) if bias is None else bias[ids].float()
        along_N = rows_ND @ self._across_D
        return rows_ND + ((along_N * (self._was - self._one) + bias_N) / self._one)[:, None] * self._across_D

    def _word_vectors(self, items: Sequence[EncodedInput]) -> Sequence[Tensor]:
        """Adds BERT's embedding of the second segment to that segment's words. A prompt is in the first segment."""
        rows, kinds = super()._word_vectors(items), self._segments
        if len(kinds) < 2:
            return rows
        ends = [item.content[: item.length] == self.tokenizer.sep_token_id for item in items]
        second_N = copy_to(torch.cat([(end_T.cumsum(0) - end_T.long()) > 0 for end_T in ends]), self.device)
        vectors_ND = torch.cat(list(rows)) + second_N[:, None] * (kinds[1] - kinds[0])
        return vectors_ND.split([item.length for item in items])
