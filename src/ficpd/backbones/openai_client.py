"""Questions to a model behind an HTTP address: each is answered once, whatever has to be sent for it.

What a network does is waited for: a server that is down, slow or busy (429, 5xx) is asked again after a growing wait, or
after the time that it names (`Retry-After`, RFC 9110, section 10.2.3). What no waiting mends, a wrong key or an answer
that is none, is an error at once. Answers are kept in memory, never in a file, for they stand beside records' texts: a
process does not pay for the same question again; a run that goes on in a new one asks its unfinished round's again.
"""

import hashlib
import json
import os
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from threading import Event, Lock
from typing import Any, TypeVar

from ficpd.errors import BackboneError

Value = TypeVar("Value")
Read = Callable[[Any, Sequence[str]], Sequence[Value]]
"""Of a response's JSON and the texts that were sent: one value for each, or `BackboneError`."""
AGAIN = (408, 425, 429, 500, 502, 503, 504, 529)
SHOWN = 300
"""Letters of a server's own words in an error."""
KEPT = 200_000
"""Answers that are remembered, least recently used dropped first."""


class NoAnswerError(BackboneError):
    """Nobody was there, or busy for too long; what was asked may still have an answer."""


@dataclass(frozen=True)
class Patience:
    """`timeout` of one try; `tries` in all; the first wait, doubled each time; the longest wait, also where the server asks
    for a longer one. In seconds."""

    timeout: float
    tries: int
    first_wait: float
    longest_wait: float


@dataclass(eq=False)
class Asking:
    """`key_from`: the environment variable that holds the key, read for every request and never kept. `answered`: questions
    that have an answer; `sent`: requests, those that failed among them."""

    url: str
    key_from: str | None
    patience: Patience
    workers: int
    answered: int = 0
    sent: int = 0
    known: OrderedDict[str, Any] = field(default_factory=OrderedDict, repr=False)

    def __post_init__(self) -> None:
        httpx = _httpx()
        self._client = httpx.Client(timeout=self.patience.timeout, limits=httpx.Limits(max_connections=self.workers))
        self._lock = Lock()
        weakref.finalize(self, self._client.close)

    def all(self, bodies: Sequence[Mapping[str, Any]], read: Read[Value]) -> list[Value]:
        """One value per question, in order. A body's `prompt` is a text, or a list of texts that travel together and are a
        question each. Equal questions are asked once.

        Raises `BackboneError` if one of them gets no answer; those that had one by then are not asked again.
        """
        wanted = [_keys(body) for body in bodies]
        new: dict[tuple[str, ...], Mapping[str, Any]] = {}
        for keys, body in zip(wanted, bodies, strict=True):
            if any(key not in self.known for key in keys):
                new[keys] = body
        failed = Event()
        with ThreadPoolExecutor(self.workers) as pool:
            for asked in [pool.submit(self._asked, keys, body, read, failed) for keys, body in new.items()]:
                asked.result()
        found = [self.known[key] for keys in wanted for key in keys]
        self._forget({key for keys in wanted for key in keys})
        return found

    def _asked(self, keys: Sequence[str], body: Mapping[str, Any], read: Read[Any], failed: Event) -> None:
        """Asks and remembers; once one question has failed no other is begun."""
        if failed.is_set():
            return
        try:
            answers = read(self._json(self._sent(body)), _texts(body))
        except BaseException:
            failed.set()
            raise
        with self._lock:
            self.answered += sum(key not in self.known for key in set(keys))
            self.known.update(zip(keys, answers, strict=True))

    def _forget(self, used: set[str]) -> None:
        for key in used:
            self.known.move_to_end(key)
        while len(self.known) > max(KEPT, len(used)):
            self.known.popitem(last=False)

    def _sent(self, body: Mapping[str, Any]) -> Any:
        """The response to a body, however often it has to be sent."""
        began, told = time.monotonic(), ""
        for place in range(self.patience.tries):
            response, told = self._once(body)
            if response is not None and response.status_code < 300:
                return response
            if response is not None and response.status_code not in AGAIN:
                raise BackboneError(f"{self.url} refuses: {told}. {_advice(response.status_code, self.key_from)}")
            wait = max(self.patience.first_wait * 2**place, _named_wait(response))
            if wait > self.patience.longest_wait and _named_wait(response) >= wait:
                raise NoAnswerError(
                    f"{self.url} wants {wait:.0f} s of rest ({told}), more than longest_wait = "
                    f"{self.patience.longest_wait:g}; go on later, or raise backbone.options.longest_wait"
                )
            if place + 1 < self.patience.tries:
                time.sleep(min(wait, self.patience.longest_wait))
        raise NoAnswerError(
            f"{self.url} gave no answer in {self.patience.tries} tries over {time.monotonic() - began:.1f} s; the last: "
            f"{told}. Check that the server runs and that the address is right (backbone.options.url), or be more patient "
            "(timeout, tries, longest_wait); what was finished is kept, and `ficpd run --resume` goes on"
        )

    def _once(self, body: Mapping[str, Any]) -> tuple[Any, str]:
        """One request: its response, if there is one, and what to say of it."""
        httpx, headers = _httpx(), {"Idempotency-Key": _digest(body)}
        if self.key_from:
            headers["Authorization"] = f"Bearer {self._key()}"
        with self._lock:
            self.sent += 1
        try:
            response = self._client.post(self.url, json=body, headers=headers)
        except (httpx.RequestError, httpx.InvalidURL) as error:
            return None, self._said(f"{type(error).__name__}: {error}")
        return response, self._said(f"{response.status_code} {response.text}")

    def _json(self, response: Any) -> Any:
        try:
            return response.json()
        except ValueError as error:
            raise BackboneError(self.nonsense("a JSON object", self._said(response.text))) from error

    def nonsense(self, expected: str, given: Any) -> str:
        """The sentence for an answer that is none."""
        return (
            f"{self.url} answered {self._said(repr(given))} where {expected} was expected; it does not speak the "
            "OpenAI-compatible API that backbone.options.api names, or not for this model. Nothing was counted"
        )

    def _key(self) -> str:
        key = os.environ.get(self.key_from or "", "")
        if not key:
            raise BackboneError(
                f"the environment variable {self.key_from} is empty, and backbone.options.key_from says that the key for "
                f"{self.url} is in it; set it, or leave key_from out"
            )
        return key

    def _said(self, text: str) -> str:
        """A server's words, short, on one line, and without the key, which some of them repeat."""
        key = os.environ.get(self.key_from, "") if self.key_from else ""
        text = " ".join((text.replace(key, "***") if key else text).split())
        return text[:SHOWN] + ("..." if len(text) > SHOWN else "")


def _keys(body: Mapping[str, Any]) -> tuple[str, ...]:
    """One name for each question of a body: the same whichever others it travels with."""
    return tuple(_digest({**body, "prompt": text}) for text in _texts(body))


def _texts(body: Mapping[str, Any]) -> list[str]:
    """The texts of a body, each a question."""
    if "messages" in body:
        return [body["messages"][-1]["content"]]
    return body["prompt"] if isinstance(body["prompt"], list) else [body["prompt"]]


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _named_wait(response: Any) -> float:
    """The seconds that `Retry-After` names, as a number or a date; 0.0 if it names none."""
    named = response.headers.get("retry-after", "") if response is not None else ""
    try:
        return max(0.0, float(named))
    except ValueError:
        pass
    try:
        when = parsedate_to_datetime(named)
    except ValueError:
        return 0.0
    return max(0.0, (when - datetime.now(UTC if when.tzinfo else None)).total_seconds())


def _advice(status: int, key_from: str | None) -> str:
    if status in (401, 403):
        where = f"the key in {key_from}" if key_from else "backbone.options.key_from, the variable that holds a key"
        return f"Check {where}"
    if status in (404, 405) or status < 400:
        return "Check backbone.options.url (it ends in /v1 with most servers), model and api"
    return "Check backbone.options.model; a text may be longer than it reads (max_words)"


def _httpx() -> Any:
    try:
        import httpx
    except ModuleNotFoundError as error:
        raise BackboneError('an endpoint needs httpx: pip install "ficpd[endpoint]"') from error
    return httpx
