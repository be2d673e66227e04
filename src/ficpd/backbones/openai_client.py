"""Asks a model behind an OpenAI-compatible HTTP address, each question once.

The `openai` client retries a server that is down, slow or busy (408, 409, 429, 5xx) with backoff, or after the time in
`Retry-After` (RFC 9110, section 10.2.3; at most two minutes). Other refusals and malformed answers are errors at once.
Answers are kept in memory, never in a file, because they belong to records. A process does not send a question twice; a
resumed run sends the questions of its unfinished round again.
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
from threading import Event, Lock
from typing import Any, TypeVar

from ficpd.errors import BackboneError, needs

Value = TypeVar("Value")
Read = Callable[[Any, Sequence[str]], Sequence[Value]]
"""Maps a response's JSON and the sent texts to one value per text, or raises `BackboneError`."""
SHOWN = 300
"""The maximum characters of a server's message in an error."""
KEPT = 200_000
"""The maximum number of kept answers. The least recently used are dropped first."""


class EndpointUnavailableError(BackboneError):
    """The server was down or busy for too long. A later try may succeed."""


@dataclass(eq=False)
class CompletionClient:
    """A client of one address.

    key_from: the environment variable with the key, which is read for every question and never stored.
    timeout: the limit of one try, in seconds.
    answered: the number of answered questions.
    """

    url: str
    chat: bool
    key_from: str | None
    timeout: float
    tries: int
    workers: int
    answered: int = 0
    known: OrderedDict[str, Any] = field(default_factory=OrderedDict, repr=False)

    def __post_init__(self) -> None:
        with needs("an endpoint", "endpoint"):
            import openai
        # A redirect would send texts and the key elsewhere. The key comes only from `key_from`.
        http = openai.DefaultHttpxClient(follow_redirects=False)
        client = openai.OpenAI(
            api_key="-", base_url=self.url, timeout=self.timeout, max_retries=self.tries - 1, http_client=http
        )
        self._create = (client.chat.completions if self.chat else client.completions).with_raw_response.create
        self.url = f"{self.url.rstrip('/')}/{'chat/completions' if self.chat else 'completions'}"
        self._lock = Lock()
        weakref.finalize(self, http.close)

    def all(self, bodies: Sequence[Mapping[str, Any]], read: Read[Value]) -> list[Value]:
        """Returns one value per question, in order. Equal and known questions are not sent again.

        A body's `prompt` is a text, or a list of texts: several questions in one request. Raises `BackboneError` if a
        question gets no answer.
        """
        wanted = [_keys(body) for body in bodies]
        new = {keys: body for keys, body in zip(wanted, bodies, strict=True) if not self.known.keys() >= {*keys}}
        failed = Event()
        with ThreadPoolExecutor(self.workers) as pool:
            for asked in [pool.submit(self._asked, keys, body, read, failed) for keys, body in new.items()]:
                asked.result()
        used = [key for keys in wanted for key in keys]
        for key in {*used}:
            self.known.move_to_end(key)
        found = [self.known[key] for key in used]
        while len(self.known) > max(KEPT, len({*used})):
            self.known.popitem(last=False)
        return found

    def _asked(self, keys: Sequence[str], body: Mapping[str, Any], read: Read[Any], failed: Event) -> None:
        """Sends a body and keeps its answers, unless another question has failed."""
        if failed.is_set():
            return
        try:
            answers = read(self._json(body), _texts(body))
        except BaseException:
            failed.set()
            raise
        with self._lock:
            self.answered += sum(key not in self.known for key in set(keys))
            self.known.update(zip(keys, answers, strict=True))

    def _json(self, body: Mapping[str, Any]) -> Any:
        """Returns the JSON of the response. Raises `EndpointUnavailableError` after the last try, else `BackboneError`."""
        from openai import APIConnectionError, APIStatusError, omit

        key = f"Bearer {self._key()}" if self.key_from else omit
        headers = {"Authorization": key, "OpenAI-Organization": omit, "OpenAI-Project": omit}
        began = time.monotonic()
        try:
            response = self._create(**body, extra_headers={**headers, "Idempotency-Key": _digest(body)})
        except APIStatusError as error:
            given, status = self._shown(f"{error.status_code} {error.response.text}"), error.status_code
            if status not in (408, 409, 429) and status < 500:
                raise BackboneError(f"{self.url} refuses: {given}. {_advice(status, self.key_from)}") from None
            if rest := error.response.headers.get("retry-after"):
                given += f", Retry-After {rest}"
        except APIConnectionError as error:
            given = self._shown(f"{type(error.__cause__ or error).__name__}: {error.__cause__ or error}")
        else:
            try:
                return response.http_response.json()
            except ValueError as error:
                raise BackboneError(self.nonsense("a JSON object", response.text)) from error
        raise EndpointUnavailableError(
            f"{self.url} gave no answer (tries = {self.tries}, {time.monotonic() - began:.1f} s); the last: {given}. Check "
            "that the server runs and that the address is right (backbone.options.url), or raise timeout or tries; "
            "finished rounds are kept, and `ficpd run --resume` continues"
        )

    def nonsense(self, expected: str, given: Any) -> str:
        """Returns the message about a malformed answer."""
        return (
            f"{self.url} answered {self._shown(repr(given))} where {expected} was expected; it does not speak the "
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

    def _shown(self, text: str) -> str:
        """Returns a server's message, short, on one line, and without the key, which some servers repeat."""
        key = os.environ.get(self.key_from, "") if self.key_from else ""
        text = " ".join((text.replace(key, "***") if key else text).split())
        return text[:SHOWN] + ("..." if len(text) > SHOWN else "")


def _keys(body: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns one key per question of a body. It does not depend on the body's other questions."""
    return tuple(_digest({**body, "prompt": text}) for text in _texts(body))


def _texts(body: Mapping[str, Any]) -> list[str]:
    if "messages" in body:
        return [body["messages"][-1]["content"]]
    return body["prompt"] if isinstance(body["prompt"], list) else [body["prompt"]]


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _advice(status: int, key_from: str | None) -> str:
    if status in (401, 403):
        where = f"the key in {key_from}" if key_from else "backbone.options.key_from, the variable that holds a key"
        return f"Check {where}"
    if status in (404, 405) or status < 400:
        return "Check backbone.options.url (it ends in /v1 with most servers), model and api"
    return "Check backbone.options.model; a text may be longer than it reads (max_words)"
