"""Encoder-decoders (T5, FLAN-T5, BART, ...): the encoder reads a text with its instruction, the decoder answers.

The prompt is in front of the encoder's input. Answers are the decoder's first tokens. Answers of one token are scored by
rows of the language head, others by their mean log-likelihood per token.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForSeq2SeqLM
from transformers.modeling_outputs import BaseModelOutput

from ficpd.backbones.causal_lm import CausalLM
from ficpd.backbones.decoding import Pick, decode
from ficpd.backbones.language_head import LanguageHead
from ficpd.backbones.pretrained import Loader, LoadingConfig, TextModel, require_weights
from ficpd.errors import BackboneError
from ficpd.types import EncodedInput, ModelOutput


class Config(LoadingConfig):
    """max_tokens: the longest input of the encoder in tokens, prompt included."""

    max_tokens: int = Field(default=256, ge=8)


def build(config: Config, weights: Any, *, dtype: torch.dtype, attention: str, device: torch.device, name: str):
    """Loads an encoder-decoder from a `from_pretrained` folder.

    Raises `BackboneError` if its weights cannot be read or its encoder cannot be run on embeddings.
    """
    loader = Loader(Path(weights.folder), name, Seq2Seq.about, config, device, dtype, attention)
    model, tokenizer, missing = loader.model_and_tokenizer(AutoModelForSeq2SeqLM)
    require_weights(missing, name, "an encoder-decoder with a language head")
    return Seq2Seq(config, model, tokenizer, config.identity(weights), name)


class Seq2Seq(CausalLM):
    """A frozen encoder-decoder. A prompt enters layers of the encoder."""

    kind, about, causal = "seq2seq", "an encoder-decoder", False

    def layered(self, model: Any) -> Any:
        return model.get_encoder()

    def prepare(self) -> None:
        """Finds the special tokens around a text, the decoder's first tokens, and whether rows score answers."""
        plain, whole = self._ids("a"), self.tokenizer("a")["input_ids"]
        place = next(i for i in range(len(whole)) if whole[i : i + len(plain)] == plain)
        self._first, self._last = whole[:place], whole[place + len(plain) :]
        settings = self.model.generation_config
        forced, start = settings.forced_bos_token_id, settings.decoder_start_token_id
        start = self.model.config.decoder_start_token_id if start is None else start
        self._start = [start, *([forced] if forced is not None else self._first)]
        with torch.no_grad():
            states_STD, mask_ST = self.frozen.run(self.frozen.sample_TD[None, :0], [self.frozen.sample_TD], 0)
            logits, features = self._decode(states_STD, mask_ST, self.frozen.sample_ids()[0][None])
        self.head = LanguageHead(self.model, features[0], {1: logits[0]}, self.frozen.tolerance)

    # ------------------------------------------------------------ text to items

    def tokenize(
        self, text: str, pair: str | None, instruction: str, answer: str | None, room: int, writes: int = 0
    ) -> EncodedInput:
        """Puts text, pair and instruction on a line each. The answer's tokens follow the item's `length`.

        The text is cut first; a pair keeps up to half of the space.
        """
        line = [] if pair is None else self._ids(f"\n{pair}")
        frame = self._ids(f"\n{instruction}") if instruction else []
        tail = [] if answer is None else self._answer(answer)
        if tail and writes:
            tail = [*tail, *self._end()][:writes]
        words, space = self._ids(text), self.max_tokens - room - len(self._first) - len(self._last) - len(frame)
        if space < 1:
            raise BackboneError(
                f"a prompt length longer than the context: {room} virtual tokens and {len(frame)} of the instruction leave "
                f"nothing of {self.name}'s {self.max_tokens} tokens for the text. Take fewer virtual tokens, a shorter "
                f"instruction or a larger max_tokens (at most {self.context})."
            )
        line = line[: max(space - len(words), space // 2)]
        ids = [*self._first, *words[: space - len(line)], *line, *frame, *self._last]
        return EncodedInput(torch.tensor(ids + tail), len(ids), len(tail))

    def _answer(self, answer: str) -> list[int]:
        ids = self._ids(answer) if answer.strip() else []
        if not ids:
            raise BackboneError(f"the answer text {answer!r} has no tokens for {self.name}; write it in words")
        return ids

    def init_prompt(self, text: str | None, num_tokens: int, enters_at: int, seed: int) -> Tensor:
        return TextModel.init_prompt(self, text, num_tokens, enters_at, seed)

    # ------------------------------------------------------------ layers

    def forward(
        self, prompts_SPD: Tensor, hidden: Sequence[Tensor], items: Sequence[EncodedInput], layer: int
    ) -> ModelOutput:
        """Returns the decoder's last state at the first token of an answer, and the mean log-likelihoods of answers."""
        states_STD, mask_ST = self.frozen.run(prompts_SPD, hidden, layer)
        mask_ST = torch.cat([mask_ST.new_ones(prompts_SPD.shape[:2]), mask_ST], dim=1)
        tails = [item.content[item.length :].to(self.device) for item in items]
        start = self._index(self._start)
        given = [torch.cat([start, tail[:-1]]) for tail in tails]
        ids_SL = torch.nn.utils.rnn.pad_sequence(given, batch_first=True)  # padding is behind the tokens
        logits_SLV, states_SLD = self._decode(states_STD, mask_ST, ids_SL)
        features_SD = states_SLD[:, len(start) - 1].float()
        if not any(len(tail) for tail in tails):
            return ModelOutput(features_SD)
        scores = [
            -F.cross_entropy(row[len(start) - 1 : len(start) - 1 + len(tail)].float(), tail)
            if len(tail)
            else features_SD.new_full((), -torch.inf)
            for row, tail in zip(logits_SLV, tails, strict=True)
        ]
        return ModelOutput(features_SD, torch.stack(scores)[:, None])

    def _decode(self, states_STD: Tensor, mask_ST: Tensor, ids_SL: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the model's own logits [S, L, V] and the states [S, L, D] that its language head reads."""
        out = self.model(
            encoder_outputs=BaseModelOutput(last_hidden_state=states_STD), attention_mask=mask_ST.long(),
            decoder_input_ids=ids_SL, use_cache=False, output_hidden_states=True,
        )  # fmt: skip
        return out.logits, out.decoder_hidden_states[-1]

    # ------------------------------------------------------------ writing

    def _require_room(self, virtual: int, longest: int, max_tokens: int) -> None:
        """Checks nothing: the decoder has a separate context."""

    def _opening(self, text: str, room: int, max_tokens: int) -> EncodedInput:
        return self.tokenize(text, None, "", None, room)

    def _before(self, item: EncodedInput) -> EncodedInput:
        return EncodedInput(item.content[: item.length], item.length)

    def _texts(
        self, prompts_SPD: Tensor, items: Sequence[EncodedInput], layer: int, max_tokens: int, pick: Pick
    ) -> list[str]:
        states_STD, mask_ST = self.frozen.run(prompts_SPD, self.encode_prefix(items, layer), layer)
        mask_ST = torch.cat([mask_ST.new_ones(prompts_SPD.shape[:2]), mask_ST], dim=1).long()
        encoded, start, cache = BaseModelOutput(last_hidden_state=states_STD), self._index(self._start), None

        def step(ids_S: Tensor | None) -> Tensor:
            nonlocal cache
            ids = start.expand(len(items), -1) if ids_S is None else ids_S[:, None].to(self.device)
            out = self.model(
                encoder_outputs=encoded, attention_mask=mask_ST, decoder_input_ids=ids, past_key_values=cache,
                use_cache=True,
            )  # fmt: skip
            cache = out.past_key_values
            return out.logits[:, -1]

        return self.tokenizer.batch_decode(
            decode(step, pick, len(items), self._ends(), max_tokens), skip_special_tokens=True
        )
