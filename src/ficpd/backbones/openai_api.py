"""Runs a model behind an OpenAI-compatible HTTP address: sends texts, receives likelihoods or texts.

Prompts are words: token ids of a small local model (`words`), whose word vectors a method's server compares. Their text is
sent. Soft prompts, gradients, features and tuned heads are not available. A question at construction finds the first of
two forms of answers that works:

likelihood   `/completions` with `echo` and `logprobs`: the mean log-likelihood of an answer's tokens behind the text
text         the answer that the model's continuation names first; a score is right or wrong. For a text without an answer,
             the question's hash draws one, which scores at chance level

The operator of the address sees every record of a question; no guarantee of FICPD covers that. Run the server where the
records may be. The fingerprint depends on the model's name and the words, not on the address, so a library stays valid when
a server moves. It cannot prove that the name has the same weights there.
"""

import hashlib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import torch
from pydantic import Field
from torch import Tensor

from ficpd.backbones import catalog, weights
from ficpd.backbones.openai_client import CompletionClient, EndpointUnavailableError
from ficpd.backbones.openai_responses import (
    Choice,
    choices,
    first_mentioned,
    same_question_groups,
    span_logprob,
    text_of,
    tokens_of,
)
from ficpd.backbones.vocabulary import TokenizerVocabulary, token_prompt
from ficpd.errors import BackboneError, LibraryError
from ficpd.interfaces import Backbone
from ficpd.registry import FrozenConfig, load
from ficpd.types import EncodedInput, ModelOutput, Prompt

WRONG_LOGPROB = -10.0
"""The log-likelihood of an answer that was not named. The named one has 0."""
PROBE = "One two three"
ANSWER_TOKENS = 8
"""The number of tokens that the model writes to name an answer."""
ENDPOINT_ENV = "FICPD_ENDPOINT"
"""The environment variable with the address of a library's model."""


class Config(FrozenConfig):
    """Sets the address of a model and the form of its requests.

    url: the address without the endpoint (`http://127.0.0.1:8000/v1`).
    key_from: the environment variable with the API key. The key itself must be in no file.
    api: "chat" for servers that return texts only.
    max_words: the longest text in words, prompt included.
    together: the number of texts in one request, for servers that accept lists.
    timeout: the limit of one try, in seconds.
    tries: the maximum number of tries per request, with backoff.
    """

    url: str
    model: str = Field(min_length=1)
    words: str = "minilm"
    api: Literal["completions", "chat"] = "completions"
    answers: Literal["auto", "likelihood", "text"] = "auto"
    key_from: str | None = None
    max_words: int = Field(default=300, ge=8)
    workers: int = Field(default=4, ge=1, le=64)
    together: int = Field(default=1, ge=1)
    timeout: float = Field(default=60.0, gt=0)
    tries: int = Field(default=6, ge=1)


def build(config: Config, found: Any, *, dtype: torch.dtype, attention: str, device: torch.device, name: str):
    """Builds the backbone; ignores `found`. Raises `BackboneError` for an invalid address, or one without an answer."""
    parts = urlsplit(config.url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise BackboneError(
            f"backbone.options.url = {config.url!r}: expected an address such as http://127.0.0.1:8000/v1"
        )
    if parts.username or parts.password or parts.query:
        raise BackboneError(
            f"backbone.options.url of {parts.hostname} holds a name, password or query, and would be written into results; "
            "put the key into an environment variable and name that (key_from)"
        )
    words, sha256 = load_local_vocabulary(config.words)
    return Endpoint(config, words, sha256, name)


def options_from_card(options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a library's options, with the address from `FICPD_ENDPOINT` if it is set.

    Raises `LibraryError` for another machine's address from the card: the author of a library must not choose where its
    users' texts and keys are sent.
    """
    url = os.environ.get(ENDPOINT_ENV) or str(options.get("url"))
    if ENDPOINT_ENV not in os.environ and urlsplit(url).hostname not in ("127.0.0.1", "::1", "localhost"):
        raise LibraryError(
            f"this library asks a model at {url}, and would send it your texts; if you trust that address, set "
            f"{ENDPOINT_ENV}={url}, else set it to one of your own that serves {options.get('model')!r}"
        )
    return {**options, "url": url}


def load_local_vocabulary(name: str) -> tuple[TokenizerVocabulary, str]:
    """Returns the vocabulary of a local model, and the hash of its weights."""
    named = catalog.NAMED.get(name)
    found = weights.resolve(named.weights if named else name)
    module = load("backbones", catalog.detect_kind(Path(found.folder)))
    cpu = torch.device("cpu")
    built = module.build(module.Config(), found, dtype=torch.float32, attention="eager", device=cpu, name=name)
    return built.vocabulary, found.sha256


class TextVocabulary(TokenizerVocabulary):
    """A vocabulary that does not embed words: a server accepts no vectors."""

    def embed_for_prompt(self, ids_RP: Tensor) -> Tensor:
        return ids_RP


@dataclass(frozen=True)
class PromptedQuestion:
    """The text before an answer, without the prompt, and the answer to score (None: no answer)."""

    before: str
    answer: str | None


class Endpoint(Backbone):
    supports_features, can_generate = False, True

    def __init__(self, config: Config, words: TokenizerVocabulary, sha256: str, name: str):
        self.config, self.name, self.max_tokens = config, name, config.max_words
        self.width, self.depth, self.device = 1, 1, torch.device("cpu")
        self.vocabulary = self.words = TextVocabulary(words.tokenizer, words.table, words.size, words.likely)
        self.fingerprint = f"endpoint:{hashlib.sha256(repr([config.model, sha256]).encode()).hexdigest()[:16]}"
        self.asking = CompletionClient(
            config.url, config.api == "chat", config.key_from, config.timeout, config.tries, config.workers
        )
        self.likelihoods = self._gives_likelihoods()

    # ------------------------------------------------------------ text to items

    def tokenize(
        self, text: str, pair: str | None, instruction: str, answer: str | None, room: int, writes: int = 0
    ) -> EncodedInput:
        """Puts text, pair and instruction on a line each. Cuts the text first; a pair keeps up to half of the space.

        The length is in words, like `max_tokens`."""
        frame = len(instruction.split()) + len((answer or "").split())
        space = self.max_tokens - room - frame
        if space < 1:
            raise BackboneError(
                f"{room} virtual tokens (words) and {frame} words of instruction and answer leave nothing of the "
                f"{self.max_tokens} words that {self.name} is sent; take fewer, or raise backbone.options.max_words"
            )
        if answer is not None and not answer.strip():
            raise BackboneError(f"the answer text {answer!r} has no tokens for {self.name}; write it in words")
        line = None if pair is None else cut(pair, max(space - len(text.split()), space // 2))
        lines = [cut(text, space - len((line or "").split())), *([] if line is None else [line]), instruction]
        before = "\n".join(part for part in lines if part)
        if not before.strip():
            raise BackboneError(f"{self.name} was given an empty text and no instruction: there is nothing to read.")
        question = PromptedQuestion(before, None if answer is None else answer.strip())
        return EncodedInput(question, len(f"{before} {answer or ''}".split()), int(answer is not None))

    def readout(self, instruction: str, answers: Sequence[str]) -> None:
        """Returns None: each answer is scored by a query."""

    def head_to_readout(self, rows_RCD: Tensor) -> Tensor:
        raise BackboneError(f"{self.name} gives no features for a head to read; set task.tuned_head = false")

    def init_prompt(self, text: str | None, num_tokens: int, enters_at: int, seed: int) -> Tensor:
        return token_prompt(self.words, self.name, text, num_tokens, seed)

    def synthetic_inputs(self, number: int, seed: int) -> list[str]:
        ids = self.words.proposals([-1], 0, 8 * number, seed)
        return [self.words.text([ids[(8 * i + j) % len(ids)] for j in range(8)]) for i in range(number)]

    # ------------------------------------------------------------ asking

    def encode_prefix(self, items: Sequence[EncodedInput], layer: int) -> list[Tensor]:
        """Returns empty states, because the server computes all layers."""
        return [torch.zeros(0, 1) for _ in items]

    def forward(
        self, prompts_SPD: Tensor, hidden: Sequence[Tensor], items: Sequence[EncodedInput], layer: int
    ) -> ModelOutput:
        """Returns the scores of scored items; features are zeros. Raises `BackboneError` for a soft prompt."""
        fronts, none = self._fronts(prompts_SPD), torch.zeros(len(items), 1)
        scored = [place for place, item in enumerate(items) if item.scored]
        if not scored:
            return ModelOutput(none)
        befores = [_joined(fronts[place], items[place].content.before) for place in scored]
        answers = [items[place].content.answer for place in scored]
        found = self._scores(befores, answers) if self.likelihoods else self._named(befores, answers)
        scores_S1 = torch.full((len(items), 1), -torch.inf)
        scores_S1[scored, 0] = torch.tensor(found)
        return ModelOutput(none, scores_S1)

    def generate_greedy(
        self, prompts_SPD: Tensor, items: Sequence[EncodedInput], layer: int, max_tokens: int
    ) -> list[str]:
        fronts = self._fronts(prompts_SPD)
        return self._texts([_joined(f, i.content.before) for f, i in zip(fronts, items, strict=True)], max_tokens)

    def generate(
        self, prompt: Prompt, texts: Sequence[str], max_tokens: int, temperature: float = 0.0, seed: int = 0
    ) -> list[str]:
        """Continues the texts. With a temperature the server samples, with this seed if it accepts one."""
        if prompt.backbone != self.fingerprint:
            raise BackboneError(f"the prompt is for {prompt.backbone}; {self.name} is {self.fingerprint}")
        if any(not text.strip() for text in texts):
            raise BackboneError(f"{self.name} was given an empty text: there is nothing to continue.")
        fronts = (
            self._fronts(self.words.embed_for_prompt(prompt.vectors_PD[..., 0])[None])
            if len(prompt.vectors_PD)
            else [""]
        )
        drawn = {"seed": seed % (1 << 31)} if temperature else {}
        befores = [_joined(fronts[0], text) for text in texts]
        return self._texts(befores, max_tokens, {"temperature": temperature, **drawn})

    def _fronts(self, prompts_SPD: Tensor) -> list[str]:
        """Returns each sequence's prompt as text."""
        if prompts_SPD.shape[1] and prompts_SPD.is_floating_point():
            raise BackboneError(
                f"{self.name} is reached over HTTP and takes words, no vectors: a soft prompt [{prompts_SPD.shape[1]}, "
                f'{prompts_SPD.shape[-1]}] cannot be sent. Use method.name = "feddtpt", or a backbone whose weights are here'
            )
        texts: dict[tuple[int, ...], str] = {}
        rows = [tuple(row) for row in prompts_SPD.flatten(1).tolist()]
        return [texts[row] if row in texts else texts.setdefault(row, self.words.text(row)) for row in rows]

    def _gives_likelihoods(self) -> bool:
        """Tells whether the server gives likelihoods. Raises `BackboneError` if it must but does not, or fails."""
        if self.config.api == "chat" and self.config.answers == "likelihood":
            raise BackboneError('backbone.options.answers = "likelihood" needs api = "completions"')
        if self.config.api == "completions" and self.config.answers != "text":
            try:
                self._scores([PROBE], ["four"])
                return True
            except EndpointUnavailableError:
                raise
            except BackboneError:
                if self.config.answers == "likelihood":
                    raise
        self._texts([PROBE], 1)
        return False

    def _scores(self, befores: Sequence[str], answers: Sequence[str]) -> list[float]:
        """Returns the mean log-likelihood of each answer's tokens behind its text.

        Requests one more token, because some servers read 0 as no limit."""
        texts = [f"{before} {answer}" for before, answer in zip(befores, answers, strict=True)]
        more = {"max_tokens": 1, "temperature": 0, "echo": True, "logprobs": 1}
        tokens = self._completed(texts, more, tokens_of)
        return [span_logprob(one, len(b) + 1, len(t)) for one, b, t in zip(tokens, befores, texts, strict=True)]

    def _named(self, befores: Sequence[str], answers: Sequence[str]) -> list[float]:
        """Scores answers by a written text: 0 for the answer named first, `WRONG_LOGPROB` for the others."""
        written, scores = self._texts(befores, ANSWER_TOKENS), []
        for group in same_question_groups(befores, answers):
            own = [answers[place] for place in group]
            right = first_mentioned(written[group[0]], own)
            if right is None and len(own) > 1:
                right = own[int(hashlib.sha256(befores[group[0]].encode()).hexdigest(), 16) % len(own)]
            scores += [0.0 if answer == right else WRONG_LOGPROB for answer in own]
        return scores

    def _texts(self, befores: Sequence[str], max_tokens: int, more: dict[str, Any] | None = None) -> list[str]:
        chat = self.config.api == "chat"
        asked = {"max_tokens": max_tokens, "temperature": 0, **(more or {})}
        return self._completed(befores, asked, lambda choice, sent: text_of(choice, chat))

    def _completed(self, texts: Sequence[str], more: dict[str, Any], read: Callable[[Choice, str], Any]) -> list[Any]:
        asked, unique = {"model": self.config.model, **more}, list(dict.fromkeys(texts))
        size = self.config.together
        if self.config.api == "chat":
            bodies = [{**asked, "messages": [{"role": "user", "content": text}]} for text in unique]
        elif size == 1:  # some servers accept no lists
            bodies = [{**asked, "prompt": text} for text in unique]
        else:
            bodies = [{**asked, "prompt": unique[first : first + size]} for first in range(0, len(unique), size)]

        def all_of(said: Any, sent: Sequence[str]) -> list[Any]:
            try:
                return [read(choice, text) for choice, text in zip(choices(said, len(sent)), sent, strict=True)]
            except ValueError as error:
                raise BackboneError(self.asking.nonsense(str(error), said)) from error

        found = dict(zip(unique, self.asking.all(bodies, all_of), strict=True))
        return [found[text] for text in texts]


def cut(text: str, words: int) -> str:
    """Returns the first `words` words of a text, with unchanged white space between them.

    >>> cut("a  b c", 2)
    'a  b'
    """
    ends = [match.end() for match in re.finditer(r"\S+", text)]
    return text if len(ends) <= words else text[: ends[words - 1]] if words > 0 else ""


def _joined(front: str, before: str) -> str:
    return f"{front}\n{before}" if front else before
