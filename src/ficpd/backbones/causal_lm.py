"""Decoders (Llama, Qwen, Gemma, GPT-2, BLOOM, Mamba, ...): they read left to right, score words and write.

A text is read with its instruction behind it, so that the next word would be the answer. Answers of one token each are
scored by their rows of the language head, where logits are features times rows; others by their mean log-likelihood per
token. The prompt stands in front of the whole sequence.
"""

from collections.abc import Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM
from transformers.utils.logging import get_verbosity

from ficpd.backbones.decoding import Pick, decode, greedy, row_generators, sampler
from ficpd.backbones.language_head import LanguageHead, mean_likelihoods
from ficpd.backbones.pretrained import TextModel, load, require_weights
from ficpd.backbones.writing import Writing
from ficpd.errors import BackboneError
from ficpd.registry import FrozenConfig
from ficpd.types import EncodedInput, ModelOutput, Prompt

TOGETHER = 16
"""How many texts are continued at once."""


class Config(FrozenConfig):
    """`max_tokens`: longest input, prompt included."""

    max_tokens: int = Field(default=256, ge=8)


def build(config: Config, weights: Any, *, dtype: torch.dtype, attention: str, device: torch.device, name: str):
    """Load a decoder from a `from_pretrained` folder. `attention` is "eager" or "sdpa".

    Raises `BackboneError` if the weights cannot be read, or the model cannot be run on embeddings.
    """
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": attention, "level": get_verbosity()}
    model, tokenizer, missing = load(AutoModelForCausalLM, weights.folder, name, "a decoder", **options)
    require_weights(missing, name, "a decoder with a language head")
    return CausalLM(config, model.to(device), tokenizer, weights.sha256, name)


class CausalLM(TextModel):
    """A frozen decoder with its language head."""

    kind, causal, can_generate = "causal_lm", True, True

    def __init__(self, config: Config, model: Any, tokenizer: Any, sha256: str, name: str):
        super().__init__(config.max_tokens, model, tokenizer, sha256, name)
        self.prepare()

    def prepare(self) -> None:
        """Finds the token that begins every text, and whether answers are scored by rows of the language head."""
        frozen, tokenizer = self.frozen, self.tokenizer
        with torch.no_grad():
            logits = {factor: frozen.logits(factor * frozen.sample_TD) for factor in (1, 100, 0)}
        self.head = LanguageHead(self.model, frozen.sample_TD, logits, frozen.tolerance)
        self.writing = Writing(frozen)
        begin = tokenizer.bos_token_id  # begins every sequence, if the tokeniser sets one by itself
        self._first = [begin] if begin is not None and tokenizer("a")["input_ids"][:1] == [begin] else []

    # ------------------------------------------------------------ text to items

    def tokenize(
        self, text: str, pair: str | None, instruction: str, answer: str | None, room: int, writes: int = 0
    ) -> EncodedInput:
        """`text`, `pair` and `instruction` on a line each, then the answer, whose tokens are the scored ones.

        The text is cut first, a pair only down to half of the space. With `writes` the end token closes the answer, which
        is cut to so many tokens, and the text is cut as if it had them all. Raises `BackboneError` if none of it is left.
        """
        words = self._ids(text)
        line = [] if pair is None else self._after(f"\n{pair}")
        frame = self._after(f"\n{instruction}") if instruction else []
        tail = [] if answer is None else self._answer(answer)
        if tail and writes:
            tail = [*tail, *self._end()][:writes]
        kept_free = writes or len(tail)
        space = self.max_tokens - room - len(self._first) - len(frame) - kept_free
        if space < 1:
            raise BackboneError(
                f"a prompt length longer than the context: {room} virtual tokens, {len(frame)} of the instruction and "
                f"{kept_free} of the answer leave nothing of {self.name}'s {self.max_tokens} tokens for the text. Take "
                f"fewer virtual tokens, a shorter instruction or a larger max_tokens (at most {self.context})."
            )
        line = line[: max(space - len(words), space // 2)]
        ids = [*self._first, *words[: space - len(line)], *line, *frame]
        if not ids:
            raise BackboneError(f"{self.name} was given an empty text and no instruction: there is nothing to read.")
        return EncodedInput(torch.tensor(ids + tail), len(ids) + len(tail), len(tail))

    def readout(self, instruction: str, answers: Sequence[str]) -> Tensor | None:
        """[C, D]: the language head's row of each answer, if each is one token and no two are the same.

        None too for a head that is more than its rows (a cap or a bias): answers are then scored by its own logits.
        """
        ids = [self._answer(answer) for answer in answers]
        if any(len(i) > 1 for i in ids) or len({i[0] for i in ids}) < len(ids):
            return None
        return self.head.rows([i[0] for i in ids])

    def head_to_readout(self, rows_RCD: Tensor) -> Tensor:
        """Directions, at the mean length of the language head's own rows: the scale of a tuned head stays the model's."""
        return F.normalize(rows_RCD.float(), dim=-1) * self.head.norm

    def _special(self) -> set[int]:
        return {*super()._special(), *self.tokenizer.added_tokens_decoder}

    def _after(self, text: str) -> list[int]:
        """The tokens of a text that goes on from another: some tokenisers begin every string with a blank."""
        return self._ids("a" + text)[len(self._ids("a")) :]

    def _answer(self, answer: str) -> list[int]:
        ids = self._after(f" {answer}") if answer.strip() else []
        if not ids:
            raise BackboneError(f"the answer text {answer!r} has no tokens for {self.name}; write it in words")
        return ids

    def _end(self) -> list[int]:
        """The token that ends a text, if the tokeniser has one."""
        end = self.tokenizer.eos_token_id
        return [] if end is None else [end]

    # ------------------------------------------------------------ starts

    def init_prompt(self, text: str | None, num_tokens: int, enters_at: int, seed: int) -> Tensor:
        """[num_tokens, D] float32, on the CPU. A text's tokens, or the drawn ones, are repeated if they are too few.

        A token stands before them and is dropped: above the first layers a decoder parks attention on its first
        position, whose activations are tens of times larger than any other's (Xiao et al., ICLR 2024, arXiv 2309.17453).
        """
        ids = self._vocabulary(seed) if text is None else self._start_ids(text)
        ids = (ids * -(-num_tokens // len(ids)))[:num_tokens]
        led = torch.tensor([*(self._first or ids[-1:]), *ids], dtype=torch.long)
        return self.encode_prefix([EncodedInput(led, len(led))], enters_at)[0][-num_tokens:].float().cpu()

    # ------------------------------------------------------------ layers

    def forward(
        self, prompts_SPD: Tensor, hidden: Sequence[Tensor], items: Sequence[EncodedInput], layer: int
    ) -> ModelOutput:
        """Features are the last position's state after the final norm; scores mean log-likelihoods of scored tokens."""
        states_STD, _ = self.frozen.run(prompts_SPD, hidden, layer)
        lasts = [prompts_SPD.shape[1] + item.length - 1 for item in items]
        features_SD = states_STD[torch.arange(len(items), device=self.device), self._index(lasts)].float()
        scored = [row for row, item in enumerate(items) if item.scored]
        if not scored:
            return ModelOutput(features_SD)
        before = [states_STD[row, lasts[row] - items[row].scored : lasts[row]] for row in scored]
        wanted = [items[row].content[-items[row].scored :] for row in scored]
        likelihoods_N = mean_likelihoods(self.frozen.logits(torch.cat(before)), wanted)
        scores_S = features_SD.new_full((len(items),), -torch.inf)
        return ModelOutput(features_SD, scores_S.index_put((self._index(scored),), likelihoods_N)[:, None])

    # ------------------------------------------------------------ writing

    @torch.no_grad()
    def generate_greedy(
        self, prompts_SPD: Tensor, items: Sequence[EncodedInput], layer: int, max_tokens: int
    ) -> list[str]:
        """Greedy texts of up to `max_tokens` tokens or the end token. Raises `BackboneError` where they do not fit."""
        self.frozen.check(layer)
        openings = [self._before(item) for item in items]
        if not openings:
            return []
        self._require_room(prompts_SPD.shape[1], max(item.length for item in openings), max_tokens)
        return self._texts(prompts_SPD, openings, layer, max_tokens, greedy)

    def _before(self, item: EncodedInput) -> EncodedInput:
        """The part that is read, without the scored tail."""
        return EncodedInput(item.content[: item.length - item.scored], item.length - item.scored)

    def _require_room(self, virtual: int, longest: int, max_tokens: int) -> None:
        if virtual + longest + max_tokens > self.context:
            raise BackboneError(
                f"a prompt length longer than the context: {virtual} virtual tokens, {longest} read and {max_tokens} to "
                f"write are more than {self.name}'s {self.context}; write fewer or read less."
            )

    @torch.no_grad()
    def generate(
        self, prompt: Prompt, texts: Sequence[str], max_tokens: int, temperature: float = 0.0, seed: int = 0
    ) -> list[str]:
        """Continuations of up to `max_tokens` tokens or the end token. Of a long text the end is kept.

        With a temperature each is drawn from the likeliest `decoding.TOP_P`, by a stream of its own (`streams`).
        """
        self.frozen.check(prompt.enters_at)
        tokens_PD = prompt.vectors_PD[: len(prompt.vectors_PD) - prompt.head_rows]
        if prompt.backbone != self.fingerprint or tokens_PD.shape[1] != self.width:
            raise BackboneError(
                f"the prompt is for {prompt.backbone}, width {tokens_PD.shape[1]}; "
                f"{self.name} is {self.fingerprint}, width {self.width}. Use the backbone that it was tuned on."
            )
        items = [self._opening(text, len(tokens_PD), max_tokens) for text in texts]
        drawn_from, written = row_generators(texts, seed), []
        for at in range(0, len(items), TOGETHER):
            part, pick = items[at : at + TOGETHER], sampler(drawn_from[at : at + TOGETHER], temperature)
            written += self._texts(tokens_PD.expand(len(part), -1, -1), part, prompt.enters_at, max_tokens, pick)
        return written

    def _opening(self, text: str, room: int, max_tokens: int) -> EncodedInput:
        space = min(self.max_tokens, self.context - max_tokens) - room - len(self._first)
        if space < 1:
            raise BackboneError(
                f"a prompt length longer than the context: {room} virtual tokens and {max_tokens} to write leave "
                f"nothing of {self.name}'s {self.max_tokens} tokens for the text (context: {self.context})."
            )
        ids = [*self._first, *self._ids(text)[-space:]]
        if not ids:
            raise BackboneError(f"{self.name} was given an empty text: there is nothing to continue.")
        return EncodedInput(torch.tensor(ids), len(ids))

    def _texts(
        self, prompts_SPD: Tensor, items: Sequence[EncodedInput], layer: int, max_tokens: int, pick: Pick
    ) -> list[str]:
        rows = self._word_vectors(items)
        steps = self.writing.steps(prompts_SPD.to(self.device, self.dtype), rows, layer)
        ids = decode(steps, pick, len(items), self._ends(), max_tokens)
        return self.tokenizer.batch_decode(ids, skip_special_tokens=True)

    def _ends(self) -> Tensor:
        """Tokens that end a text: the model's own, and the tokeniser's."""
        own = getattr(self.model.generation_config, "eos_token_id", None)
        ends = [*(own if isinstance(own, list) else [own]), *self._end()]
        return self._index([i for i in ends if i is not None])
