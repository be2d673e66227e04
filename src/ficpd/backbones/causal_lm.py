"""Decoders of the Llama family (Llama, Mistral, Qwen2, Qwen3): they read left to right, score words and write.

A text is read with its instruction behind it, so that the next word would be the answer. Answers of one token each are
scored by their rows of the language head; longer ones by their mean log-likelihood per token. The prompt stands in
front of the whole sequence. Rotary positions count from the first real token of each row and skip the padding.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.utils.logging import get_verbosity

from ficpd.backbones import Tokenised
from ficpd.backbones.bert import load
from ficpd.backbones.decoding import Pick, Step, decode, greedy, row_generators, sampler
from ficpd.backbones.lora import Adapters
from ficpd.backbones.vocabulary import TokenizerVocabulary
from ficpd.errors import BackboneError
from ficpd.registry import FrozenConfig
from ficpd.types import EncodedInput, HiddenStates, ModelOutput, Prompt

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
TOGETHER = 16
"""How many texts are continued at once."""


class Config(FrozenConfig):
    """`max_tokens`: longest input, prompt included."""

    max_tokens: int = Field(default=256, ge=8)


def build(config: Config, weights: Any, *, dtype: torch.dtype, attention: str, device: torch.device, name: str):
    """Load a decoder from a `from_pretrained` folder. `attention` is "eager" or "sdpa".

    Raises `BackboneError` if the weights cannot be read or are not of the Llama family.
    """
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": attention, "level": get_verbosity()}
    model, tokenizer, _ = load(AutoModelForCausalLM, weights.folder, name, "a decoder", **options)
    if model.config.model_type not in FAMILIES:
        raise BackboneError(
            f"backbone {name!r} is a {type(model).__name__}; the causal_lm kind runs {', '.join(FAMILIES)}. "
            "Use one of those, or another kind."
        )
    return CausalLM(config, model.to(device), tokenizer, weights.sha256, name)


class CausalLM(Tokenised):
    """A frozen decoder. At layer 0 the prompt joins the word embeddings (ordinary prompt tuning, as in PEFT); at layer
    n it joins the input of the n-th block."""

    supports_gradients, can_generate = True, True

    def __init__(self, config: Config, model: Any, tokenizer: Any, sha256: str, name: str):
        self.model, self.tokenizer, self.name = model.eval().requires_grad_(False), tokenizer, name
        self.fingerprint = f"causal_lm:{sha256[:16]}"
        self.width, self.depth = model.config.hidden_size, model.config.num_hidden_layers
        # Within one sliding window, full attention and sliding attention are the same.
        self.context = min(
            model.config.max_position_embeddings, getattr(model.config, "sliding_window", None) or 1 << 40
        )
        self.max_tokens = min(config.max_tokens, self.context)
        self.device, self.dtype = model.device, model.dtype
        self.adapters = Adapters(model, self.width)
        self.vocabulary = TokenizerVocabulary(tokenizer, self._word_vectors, model.config.vocab_size)
        begin = tokenizer.bos_token_id  # begins every sequence, if the tokeniser sets one by itself
        self._first = [begin] if begin is not None and tokenizer("a")["input_ids"][:1] == [begin] else []
        known = inspect.signature(model.model.layers[0].forward).parameters
        self._cache_name = "cache" if "cache" in known else "past_key_values"  # renamed in transformers 5.24
        self._head_norm = float(
            model.lm_head.weight[:: max(1, model.config.vocab_size // 1024)].float().norm(dim=1).mean()
        )

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
        """[C, D]: the language head's row of each answer, if each is one token and no two are the same."""
        ids = [self._answer(answer) for answer in answers]
        if any(len(i) > 1 for i in ids) or len({i[0] for i in ids}) < len(ids):
            return None
        return self.model.lm_head.weight[[i[0] for i in ids]].float()

    def head_to_readout(self, rows_RCD: Tensor) -> Tensor:
        """Directions, at the mean length of the language head's own rows: the scale of a tuned head stays the model's."""
        return torch.nn.functional.normalize(rows_RCD.float(), dim=-1) * self._head_norm

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

    @torch.no_grad()
    def encode_prefix(self, items: Sequence[EncodedInput], layer: int) -> list[Tensor]:
        self._check(layer)
        embedded = [self._word_vectors(item.content) for item in items]
        if layer == 0:
            return embedded
        hidden = HiddenStates.of(embedded)
        states_STD = self._run(hidden.states_STD, hidden.mask_ST, 0, layer)
        return [states_TD[: item.length].clone() for states_TD, item in zip(states_STD, items, strict=True)]

    def _word_vectors(self, ids: Tensor) -> Tensor:
        return self.model.get_input_embeddings()(ids.to(self.device))

    def forward(
        self, prompts_SPD: Tensor, hidden: Sequence[Tensor], items: Sequence[EncodedInput], layer: int
    ) -> ModelOutput:
        """Features are the last position's state after the final norm; scores mean log-likelihoods of scored tokens."""
        self._check(layer)
        states, mask = HiddenStates.of(hidden, left=True).joined(prompts_SPD.to(self.device))
        states_STD = self._run(states, mask, layer, self.depth)
        features_SD = self.model.model.norm(states_STD[:, -1]).float()
        scored = [row for row, item in enumerate(items) if item.scored]
        if not scored:
            return ModelOutput(features_SD)
        likelihoods = [self._likelihood(states_STD[row], items[row]) for row in scored]
        scores_S = features_SD.new_full((len(items),), -torch.inf)
        return ModelOutput(features_SD, scores_S.index_put((self._index(scored),), torch.stack(likelihoods))[:, None])

    def _likelihood(self, states_TD: Tensor, item: EncodedInput) -> Tensor:
        """Each scored token is predicted at the position before it; the last of them stands in the last column."""
        logits = self.model.lm_head(self.model.model.norm(states_TD[-1 - item.scored : -1]))
        return -torch.nn.functional.cross_entropy(logits.float(), item.content[-item.scored :].to(self.device))

    def _run(self, states: Tensor, mask: Tensor, first: int, last: int, cache: DynamicCache | None = None) -> Tensor:
        """Layers [first, last) over the last columns of `mask` [S, K]; earlier columns are in the cache."""
        news, width = states.shape[1], mask.shape[1]
        columns = torch.arange(width, device=self.device)
        seen = mask[:, None, None, :] & (columns <= columns[width - news :, None])
        # Half of the lowest number: a row that sees nothing (padding) must give no NaN, nor overflow when added to.
        bias = torch.zeros(seen.shape, dtype=self.dtype, device=self.device)
        bias = bias.masked_fill(~seen, torch.finfo(self.dtype).min / 2)
        places = (mask.cumsum(1) - 1).clamp(min=0)[:, width - news :]
        rotations = self.model.model.rotary_emb(states, places)
        for block in self.model.model.layers[first:last]:
            states = block(
                states,
                attention_mask=bias,
                position_ids=places,
                position_embeddings=rotations,
                use_cache=cache is not None,
                **{self._cache_name: cache},
            )
        return states

    def _check(self, layer: int) -> None:
        if not 0 <= layer < self.depth:
            raise BackboneError(f"a prompt cannot enter {self.name} at layer {layer}: expected 0 to {self.depth - 1}.")

    def _index(self, ids: Sequence[int]) -> Tensor:
        return torch.tensor(ids, dtype=torch.long, device=self.device)

    # ------------------------------------------------------------ writing

    @torch.no_grad()
    def generate_greedy(
        self, prompts_SPD: Tensor, items: Sequence[EncodedInput], layer: int, max_tokens: int
    ) -> list[str]:
        """Greedy texts of up to `max_tokens` tokens or the end token. Raises `BackboneError` where they do not fit."""
        self._check(layer)
        openings = [EncodedInput(i.content[: i.length - i.scored], i.length - i.scored) for i in items]
        if not openings:
            return []
        longest = max(item.length for item in openings)
        if prompts_SPD.shape[1] + longest + max_tokens > self.context:
            raise BackboneError(
                f"a prompt length longer than the context: {prompts_SPD.shape[1]} virtual tokens, {longest} read and "
                f"{max_tokens} to write are more than {self.name}'s {self.context}; write fewer or read less."
            )
        return self._texts(prompts_SPD, openings, layer, max_tokens, greedy)

    @torch.no_grad()
    def generate(
        self, prompt: Prompt, texts: Sequence[str], max_tokens: int, temperature: float = 0.0, seed: int = 0
    ) -> list[str]:
        """Continuations of up to `max_tokens` tokens or the end token. Of a long text the end is kept.

        With a temperature each is drawn from the likeliest `decoding.TOP_P`, by a stream of its own (`streams`).
        """
        self._check(prompt.enters_at)
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
        ids = decode(self._steps(prompts_SPD, items, layer), pick, len(items), self._ends(), max_tokens)
        return self.tokenizer.batch_decode(ids, skip_special_tokens=True)

    def _steps(self, prompts_SPD: Tensor, items: Sequence[EncodedInput], layer: int) -> Step:
        """The layers below `layer` never see the prompt, those above always do: the cache's lengths differ by P."""
        embed, cache = self.model.get_input_embeddings(), DynamicCache()
        front = prompts_SPD.to(self.device, self.dtype)
        before = torch.ones(front.shape[:2], dtype=torch.bool, device=self.device)
        text = HiddenStates.of([embed(item.content.to(self.device)) for item in items], left=True)
        mask = text.mask_ST

        def step(ids_S: Tensor | None) -> Tensor:
            nonlocal mask
            if ids_S is None:
                states = torch.cat([front, self._run(text.states_STD, mask, 0, layer, cache)], dim=1)
            else:
                mask = torch.cat([mask, mask.new_ones(len(items), 1)], dim=1)
                states = self._run(embed(ids_S[:, None].to(self.device)), mask, 0, layer, cache)
            states = self._run(states, torch.cat([before, mask], dim=1), layer, self.depth, cache)
            return self.model.lm_head(self.model.model.norm(states[:, -1]))

        return step

    def _ends(self) -> Tensor:
        """Tokens that end a text: the model's own, and the tokeniser's."""
        own = self.model.generation_config.eos_token_id
        ends = [*(own if isinstance(own, list) else [own]), *self._end()]
        return torch.tensor([i for i in ends if i is not None], dtype=torch.long)
