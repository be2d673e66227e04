"""Decoders (Llama, Qwen, Gemma, GPT-2, BLOOM, Mamba, ...): they read left to right, score words and write.

A text is read with its instruction behind it, so that the next word is the answer. Answers of one token are scored by their
rows of the language head, if its logits are features times rows. Other answers are scored by their mean log-likelihood per
token. The prompt is in front of the whole sequence.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM
from transformers.utils.logging import get_verbosity

from ficpd.backbones.chat import Chat, choose_chat
from ficpd.backbones.decoding import Pick, decode, greedy, row_generators, sampler
from ficpd.backbones.language_head import LanguageHead, mean_likelihoods
from ficpd.backbones.pretrained import Loader, LoadingConfig, TextModel, require_weights
from ficpd.backbones.writing import Writing
from ficpd.errors import BackboneError
from ficpd.types import EncodedInput, ModelOutput, Prompt

TOGETHER = 16
"""The number of texts that are continued together."""


class Config(LoadingConfig):
    """Sets the input length and the chat template.

    max_tokens: the longest input in tokens, prompt included.
    chat_template: reads a record as the user's turn and an answer as the assistant's; "auto": for instruct models only.
    system: the system text of the template; None: the template's default.
    """

    max_tokens: int = Field(default=256, ge=8)
    chat_template: bool | Literal["auto"] = "auto"
    system: str | None = None


def build(config: Config, weights: Any, *, dtype: torch.dtype, attention: str, device: torch.device, name: str):
    """Loads a decoder from a `from_pretrained` folder. `attention` is "eager" or "sdpa".

    Raises `BackboneError` if the weights cannot be read, or the model cannot be run on embeddings.
    """
    loader = Loader(Path(weights.folder), name, "a decoder", config, device, dtype, attention, get_verbosity())
    model, tokenizer, missing = loader.model_and_tokenizer(AutoModelForCausalLM)
    require_weights(missing, name, "a decoder with a language head")
    return CausalLM(config, model, tokenizer, config.identity(weights), name)


class CausalLM(TextModel):
    """A frozen decoder with its language head."""

    kind, causal, can_generate = "causal_lm", True, True
    chat: Chat | None = None

    def __init__(self, config: Any, model: Any, tokenizer: Any, identity: str, name: str):
        """Prepares the decoder. config: the `Config` of this kind, or of `seq2seq`, which has no chat templates."""
        super().__init__(config.max_tokens, model, tokenizer, identity, name)
        self.prepare()
        if isinstance(config, Config):
            self.chat = choose_chat(config.chat_template, config.system, tokenizer, self._ends().tolist(), name)
            self.chosen_options = {"chat_template": self.chat is not None}
        if self.chat:  # its tokens differ from those of plain texts
            self.fingerprint += f":{self.chat.identity()}"

    def prepare(self) -> None:
        """Finds the token at the beginning of every text, and whether rows of the language head score answers."""
        frozen, tokenizer = self.frozen, self.tokenizer
        with torch.no_grad():
            logits = {factor: frozen.logits(factor * frozen.sample_TD) for factor in (1, 100, 0)}
        self.head = LanguageHead(self.model, frozen.sample_TD, logits, frozen.tolerance)
        self.writing = Writing(frozen)
        begin = tokenizer.bos_token_id  # used only if the tokeniser adds it
        self._first = [begin] if begin is not None and tokenizer("a")["input_ids"][:1] == [begin] else []

    # ------------------------------------------------------------ text to items

    def tokenize(
        self, text: str, pair: str | None, instruction: str, answer: str | None, room: int, writes: int = 0
    ) -> EncodedInput:
        """Puts text, pair and instruction on a line each, then the answer, whose tokens are scored.

        With a chat template the lines are the user's turn. The text is cut first; a pair keeps up to half of the space.
        With `writes` the answer has an end token and at most `writes` tokens, for which space is reserved. Raises
        `BackboneError` if nothing is left of the text.
        """
        tail = [] if answer is None else self._answer(answer)
        if tail and writes:
            tail = [*tail, *self._end()][:writes]
        kept = room, writes or len(tail)
        ids = (self._turns if self.chat else self._lines)(text, pair, instruction, kept)
        if not ids:
            raise BackboneError(f"{self.name} was given an empty text and no instruction: there is nothing to read.")
        return EncodedInput(torch.tensor(ids + tail), len(ids) + len(tail), len(tail))

    def _lines(self, text: str, pair: str | None, instruction: str, kept: tuple[int, int]) -> list[int]:
        words, line = self._ids(text), [] if pair is None else self._after(f"\n{pair}")
        frame = self._after(f"\n{instruction}") if instruction else []
        space = self._space(kept, len(frame), len(self._first))
        line = line[: max(space - len(words), space // 2)]
        return [*self._first, *words[: space - len(line)], *line, *frame]

    def _turns(self, text: str, pair: str | None, instruction: str, kept: tuple[int, int]) -> list[int]:
        """Returns the tokens of the chat template up to the answer, with the text cut to fit."""
        assert self.chat is not None
        words, line, most = self._ids(text), self._ids(pair or ""), self.max_tokens - sum(kept)
        frame = len(self._ids(self.chat.render(f"\n{instruction}")))
        while True:
            space = self._space(kept, frame)
            second = line[: max(space - len(words), space // 2)]
            parts = [self._cut(text, words, space - len(second))]
            parts += [] if pair is None else [self._cut(pair, line, len(second))]
            ids = self._ids(self.chat.render("\n".join([*parts, *([instruction] if instruction else [])])))
            if len(ids) <= most:
                return ids
            frame += len(ids) - most  # the joined text may have more tokens than its parts

    def _cut(self, text: str, ids: Sequence[int], most: int) -> str:
        return text if len(ids) <= most else self.tokenizer.decode(ids[:most], clean_up_tokenization_spaces=False)

    def _space(self, kept: tuple[int, int], frame: int, first: int = 0) -> int:
        """Returns the number of tokens left for the text. kept: the tokens of the prompt and of the answer."""
        room, answer = kept
        if (space := self.max_tokens - room - first - frame - answer) < 1:
            raise BackboneError(
                f"a prompt length longer than the context: {room} virtual tokens, {frame} of the instruction and "
                f"{answer} of the answer leave nothing of {self.name}'s {self.max_tokens} tokens for the text. Take "
                f"fewer virtual tokens, a shorter instruction or a larger max_tokens (at most {self.context})."
            )
        return space

    def readout(self, instruction: str, answers: Sequence[str]) -> Tensor | None:
        """Returns each answer's row of the language head [C, D], if all are different single tokens.

        Returns None otherwise, and for a head with a cap or a bias. Answers are then scored by likelihood.
        """
        ids = [self._answer(answer) for answer in answers]
        if any(len(i) > 1 for i in ids) or len({i[0] for i in ids}) < len(ids):
            return None
        return self.head.rows([i[0] for i in ids])

    def head_to_readout(self, rows_RCD: Tensor) -> Tensor:
        """Scales directions to the mean length of the language head's rows, to give a tuned head its scale."""
        return F.normalize(rows_RCD.float(), dim=-1) * self.head.norm

    def _special(self) -> set[int]:
        return {*super()._special(), *self.tokenizer.added_tokens_decoder}

    def _after(self, text: str, before: str = "a") -> list[int]:
        """Returns a text's tokens behind the text `before`: some tokenisers begin every string with a blank."""
        whole, first = self._ids(before + text), self._ids(before)
        return whole[len(first) :] if whole[: len(first)] == first else self._ids(text)

    def _answer(self, answer: str) -> list[int]:
        ids = []
        if answer.strip():
            chat = self.chat
            ids = self._after(chat.blank + answer, chat.opening) if chat else self._after(f" {answer}")
        if not ids:
            raise BackboneError(f"the answer text {answer!r} has no tokens for {self.name}; write it in words")
        return ids

    def _end(self) -> list[int]:
        """Returns the token that ends an answer, if there is one: the chat template's, or the tokeniser's."""
        end = self.tokenizer.eos_token_id if self.chat is None else self.chat.end
        return [] if end is None else [end]

    # ------------------------------------------------------------ starts

    def init_prompt(self, text: str | None, num_tokens: int, enters_at: int, seed: int) -> Tensor:
        """Makes a prompt [num_tokens, D], float32 on the CPU. A text with fewer tokens is repeated.

        An extra token is put in front and dropped afterwards. Above the first layers a decoder's first position is an
        attention sink, with far larger activations than the others (Xiao et al., ICLR 2024, arXiv 2309.17453).
        """
        ids = self._vocabulary(seed) if text is None else self._start_ids(text)
        ids = (ids * -(-num_tokens // len(ids)))[:num_tokens]
        led = torch.tensor([*(self._first or ids[-1:]), *ids], dtype=torch.long)
        return self.encode_prefix([EncodedInput(led, len(led))], enters_at)[0][-num_tokens:].float().cpu()

    # ------------------------------------------------------------ layers

    def forward(
        self, prompts_SPD: Tensor, hidden: Sequence[Tensor], items: Sequence[EncodedInput], layer: int
    ) -> ModelOutput:
        """Returns the last position's state after the final norm, and the mean log-likelihoods of scored tokens."""
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
        """Writes greedily up to `max_tokens` tokens or an end token. Raises `BackboneError` if they do not fit."""
        self.frozen.check(layer)
        openings = [self._before(item) for item in items]
        if not openings:
            return []
        self._require_room(prompts_SPD.shape[1], max(item.length for item in openings), max_tokens)
        return self._texts(prompts_SPD, openings, layer, max_tokens, greedy)

    def _before(self, item: EncodedInput) -> EncodedInput:
        """Returns the item without its scored tail."""
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
        """Continues each text up to `max_tokens` tokens or an end token. A long text keeps its end.

        With a temperature, tokens are drawn from the likeliest `decoding.TOP_P`, by a separate stream for each text
        (`row_generators`).
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
        """Returns the tokens that end a text: those of the model, the tokeniser and the chat template."""
        own = getattr(self.model.generation_config, "eos_token_id", None)
        ends = [*(own if isinstance(own, list) else [own]), self.tokenizer.eos_token_id, *self._end()]
        return self._index([i for i in ends if i is not None])
