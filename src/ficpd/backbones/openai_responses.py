"""Checks the answers of an OpenAI-compatible server, and finds the answer that a text names."""

import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError


class Message(BaseModel):
    content: str | None = None


class Logprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float | None]
    text_offset: list[int]


class Choice(BaseModel):
    index: int | None = None
    text: str | None = None
    message: Message | None = None
    logprobs: Logprobs | None = None


class Completion(BaseModel):
    choices: list[Choice]


Tokens = tuple[list[int], list[float]]
"""The offset of each token in the text, and its log-likelihood (0 for the first)."""


def choices(said: Any, number: int) -> list[Choice]:
    """Returns the choices in order. Raises `ValueError`, with the expected form, unless there are `number` of them."""
    try:
        found = Completion.model_validate(said).choices
    except ValidationError as error:
        where = ".".join(str(step) for step in error.errors()[0]["loc"])
        raise ValueError(f"an object with choices as the API has them ({where}: {error.errors()[0]['msg']})") from error
    places = [place if choice.index is None else choice.index for place, choice in enumerate(found)]
    if sorted(places) != list(range(number)):
        raise ValueError(f"{number} choices with the indices 0 to {number - 1}")
    return [choice for _, choice in sorted(zip(places, found, strict=True), key=lambda pair: pair[0])]


def text_of(choice: Choice, chat: bool) -> str:
    text = (choice.message.content if choice.message else None) if chat else choice.text
    if text is None:
        raise ValueError("a choice with " + ("a message's content" if chat else "a text"))
    return text


def tokens_of(choice: Choice, sent: str) -> Tokens:
    """Reads the tokens of a text sent with `echo` and `logprobs`. Raises `ValueError` if they do not cover it."""
    told = choice.logprobs
    if told is None:
        raise ValueError("logprobs")
    places, values = told.text_offset, told.token_logprobs
    if not len(places) == len(values) == len(told.tokens) or places != sorted(places):
        raise ValueError("one rising offset and one log-likelihood for each token")
    if len(places) < 2 or places[0] > 0 or places[-1] + len(told.tokens[-1]) < len(sent):
        raise ValueError(f"tokens for all {len(sent)} letters that were sent")
    behind = [value for value in values[1:] if value is not None and math.isfinite(value) and value <= 1e-3]
    if len(behind) < len(values) - 1:
        raise ValueError("log-likelihoods of 0 at most")
    return places, [0.0, *behind]


def span_logprob(tokens: Tokens, first: int, last: int) -> float:
    """Returns the mean log-likelihood of the tokens of the characters [first, last) of a text.

    It begins with the token of character `first`. A response has only the offsets of tokens, not their ends.

    >>> span_logprob(([0, 3, 8, 12], [0.0, -1.0, -2.0, -9.0]), 4, 12)
    -1.5
    """
    places, values = tokens
    begin = max(place for place in places if place <= first)
    own = [value for value, place in zip(values, places, strict=True) if begin <= place < last]
    return sum(own) / max(1, len(own))


def first_mentioned(text: str, answers: Sequence[str]) -> str | None:
    """Returns the answer that a text mentions first, the longest if several begin there; None without one.

    >>> first_mentioned("It is not good, I think", ["good", "not good", "bad"])
    'not good'
    """
    found = []
    for answer in answers:
        match = re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", text, re.IGNORECASE)
        if match:
            found.append((match.start(), -len(answer), answer))
    return min(found)[2] if found else None


def same_question_groups(befores: Sequence[str], answers: Sequence[str]) -> Iterator[list[int]]:
    """Yields the indices of each question's answers: neighbours with equal texts and different answers.

    >>> list(same_question_groups(["a", "a", "a", "a"], ["yes", "no", "yes", "no"]))
    [[0, 1], [2, 3]]
    """
    group: list[int] = []
    for place, (before, answer) in enumerate(zip(befores, answers, strict=True)):
        if group and (before != befores[group[0]] or answer in [answers[i] for i in group]):
            yield group
            group = []
        group.append(place)
    if group:
        yield group
