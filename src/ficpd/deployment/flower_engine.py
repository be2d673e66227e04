"""Reaches clients at real sites through Flower: one message a site and round, carried as bytes to the site's own socket.

Flower transports and lists the nodes; the round loop, its checks and its checkpoints are those of `federate`. Replies are
pulled here, because `Grid.send_and_receive` sleeps three seconds between polls and drops what comes after a deadline.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid
from pydantic import BaseModel, ConfigDict, Field

from ficpd.errors import ConfigError, SiteError
from ficpd.federation.codec import SiteRequest, encode_call
from ficpd.types import ClientCard, Reply

CALL, ANSWER = "call", "answer"
TERMS_WANTED, REFUSED = 428, 409


class Config(BaseModel):
    """`superlink`: the connection's name in Flower's configuration, which `ficpd run` needs.

    `sites`: who has to come before the run begins (none named: whoever comes within `wait_seconds`, `least_sites` at least).
    `deadline_seconds`: how long a round waits; what comes later is dropped and counted, or kept (`federation.accept_late`).
    Messages live twice as long, so no site's clock may be further ahead than that: Flower would call its answers expired.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    superlink: str | None = None
    sites: tuple[str, ...] = ()
    least_sites: int = Field(default=1, ge=1)
    wait_seconds: float = Field(default=60.0, gt=0)
    deadline_seconds: float = Field(default=600.0, gt=0)
    poll_seconds: float = Field(default=0.2, gt=0)


def build(config: Config, *_: Any) -> None:
    """Raises `ConfigError`: only Flower's own server process can reach its sites."""
    raise ConfigError('engine.name = "flower" is run by `ficpd run RECIPE --engine flower`, not inside this process')


@dataclass
class PendingCall:
    """A call under way."""

    site: str
    what: str
    at: float = field(default_factory=time.monotonic)


class Flower:
    """`run`: this run's id. `terms_of` maps a site's name to the terms that come with its first order, or when it asks."""

    def __init__(self, config: Config, grid: Grid, run: str, say: Callable[[str], None] = lambda line: None):
        self.config, self.grid, self.run, self.say = config, grid, run, say
        self.spec_for: Callable[[str], bytes] = lambda site: b""
        self.node: dict[str, int] = {}
        self.cards: dict[str, ClientCard] = {}
        self.told: dict[str, dict[str, Any]] = {}
        self.briefed: set[str] = set()
        self.underway: dict[str, PendingCall] = {}
        self._asked: set[int] = set()

    def clients(self) -> Sequence[ClientCard]:
        return [self.cards[name] for name in sorted(self.cards)]

    def wait_for_sites(self, known: Mapping[str, ClientCard] | None = None) -> None:
        """Asks every node for its card until all wanted sites have come.

        `known`: the cards of a resumed run, which goes on once one of its sites is there. Raises `SiteError` for sites that
        do not come in time.
        """
        wanted = set(known or self.config.sites)
        until, least = time.monotonic() + self.config.wait_seconds, len(wanted) or self.config.least_sites
        while True:
            self._hello()
            self._meet(self._greeted(), time.monotonic())
            here = set(self.cards)
            if (wanted and wanted <= here) or (not wanted and len(here) >= least and time.monotonic() > until):
                break
            unnamed = set(self.grid.get_node_ids()) - set(self.node.values())
            if not wanted and len(here) >= least and not unnamed:
                break
            if time.monotonic() > until:
                if known and here & wanted:
                    break
                raise SiteError(self._absent(wanted, here, least))
            time.sleep(self.config.poll_seconds)
        if wanted:
            self.cards = {name: self.cards[name] for name in here & wanted} | {
                name: card for name, card in (known or {}).items() if name not in here
            }

    def exchange(self, assignments: Mapping[str, bytes]) -> Iterator[Reply]:
        """Sends one call a site, the first with the run's terms, and yields the replies, late ones to earlier rounds too.

        New nodes are asked for their cards meanwhile, and a site that comes late joins the round. Without any site it waits
        for one.
        """
        until = time.monotonic() + self.config.deadline_seconds
        self.underway = {id: sent for id, sent in self.underway.items() if sent.what != "evaluate"}
        self._hello()
        if not any(name in self.node for name in assignments):
            self._meet(self._greeted(), min(until, time.monotonic() + self.config.wait_seconds))
        present = {name: assignment for name, assignment in assignments.items() if name in self.node}
        waiting = self._send("train", present)
        for sent, answer in self._answers(waiting, until):
            status, body = answer
            if sent.what == "hello":
                name = self._answered_hello(sent, status, body)
                if name is not None and name in assignments and name not in present:
                    present[name] = assignments[name]
                    waiting |= self._send("train", {name: assignments[name]})
            elif status == TERMS_WANTED and sent.site in present:
                self.briefed.discard(sent.site)
                waiting |= self._send("train", {sent.site: present[sent.site]})
            elif status == 200:
                self.briefed.add(sent.site)
                yield Reply(sent.site, body)
            else:
                yield Reply(sent.site, None, _words(status, body), status == REFUSED)
        for name in assignments.keys() - present.keys():
            yield Reply(name, None, f"{name} is not connected")
        for id in waiting & self.underway.keys():
            self.say(f"{self.underway[id].site} has not answered within {self.config.deadline_seconds:g} s")

    def evaluate(self, assignments: Mapping[str, bytes]) -> dict[str, dict[str, Any]]:
        """Has each site score its own test records. Scores come back where the site's policy shares them."""
        waiting = self._send(
            "evaluate", {name: assignment for name, assignment in assignments.items() if name in self.node}
        )
        found = {}
        for sent, (status, body) in self._answers(waiting, time.monotonic() + self.config.deadline_seconds):
            if sent.what == "evaluate" and status == 200:
                found[sent.site] = json.loads(body)
        return found

    def _send(self, what: str, assignments: Mapping[str, bytes]) -> set[str]:
        """Pushes a call to each site; returns the ids of the messages."""
        messages, names = [], list(assignments)
        for name in names:
            terms = b"" if name in self.briefed else self.spec_for(name)
            messages.append(self._message(self.node[name], SiteRequest(what, self.run, assignments[name], terms)))
        return self._pushed(messages, [PendingCall(name, what) for name in names])

    def _message(self, node: int, call: SiteRequest) -> Message:
        kind = "train" if call.what == "train" else "query"
        record = RecordDict({CALL: ConfigRecord({"body": encode_call(call)})})
        return Message(record, dst_node_id=node, message_type=kind, ttl=2 * self.config.deadline_seconds)

    def _pushed(self, messages: Sequence[Message], sent: Sequence[PendingCall]) -> set[str]:
        if not messages:
            return set()
        ids = list(self.grid.push_messages(messages))
        self.underway |= {id: one for id, one in zip(ids, sent, strict=True) if id}
        return {id for id in ids if id}

    def _answers(self, waiting: set[str], until: float) -> Iterator[tuple[PendingCall, tuple[int, bytes]]]:
        """Yields answers as they come, to earlier calls too, until all of `waiting` is answered or the time is over."""
        while waiting & self.underway.keys():
            for message in self.grid.pull_messages(list(self.underway)):
                sent = self.underway.pop(message.metadata.reply_to_message_id, None)
                if sent:
                    yield sent, _answer_of(message)
            if time.monotonic() > until:
                return
            if waiting & self.underway.keys():
                time.sleep(self.config.poll_seconds)

    def _greeted(self) -> set[str]:
        """Returns the ids of the hellos that have no answer yet."""
        return {id for id, sent in self.underway.items() if sent.what == "hello"}

    def _hello(self) -> None:
        """Asks nodes that are new, or have not answered for long, for their cards; forgets nodes that are gone."""
        here, now = set(self.grid.get_node_ids()), time.monotonic()
        unheard = {id for id in self._greeted() if now - self.underway[id].at > self.config.wait_seconds}
        self._asked = (self._asked & here) - {int(self.underway.pop(id).site) for id in unheard}
        self.node = {name: node for name, node in self.node.items() if node in here}
        new = sorted(here - self._asked)
        self._asked |= set(new)
        self._pushed([self._message(n, SiteRequest("hello")) for n in new], [PendingCall(str(n), "hello") for n in new])

    def _meet(self, hellos: set[str], until: float) -> None:
        for sent, (status, body) in self._answers(hellos, until):
            if sent.what == "hello":
                self._answered_hello(sent, status, body)

    def _answered_hello(self, sent: PendingCall, status: int, body: bytes) -> str | None:
        """Returns the site's name; None without an answer, and then the node is asked again: it may be starting."""
        if status == 200:
            return self._met(int(sent.site), json.loads(body))
        self._asked.discard(int(sent.site))
        self.say(f"node {sent.site}: {_words(status, body)}")
        return None

    def _met(self, node: int, told: dict[str, Any]) -> str:
        name = str(told["name"])
        if name in self.node and self.node[name] != node:
            raise SiteError(
                f"two SuperNodes say that they are site {name!r} (nodes {self.node[name]} and {node}); every site needs a "
                "name of its own in its site.toml"
            )
        self.node[name], self.told[name] = node, told
        self.cards.setdefault(name, ClientCard(name, told["card"]))
        self.say(f"site {name} is here")
        return name

    def _absent(self, wanted: set[str], here: set[str], least: int) -> str:
        seconds, came = self.config.wait_seconds, ", ".join(sorted(here)) or "none"
        missing = f"site {', '.join(sorted(wanted - here))} has" if wanted else f"{least} sites were wanted and have"
        return (
            f"{missing} not come within {seconds:g} s (here: {came}). Are its SuperNode and `ficpd site run` running, and "
            "is its name as in engine.options.sites? Start them, or set engine.options.wait_seconds higher"
        )


def _answer_of(message: Message) -> tuple[int, bytes]:
    """Returns status and body; 503 for Flower's own errors (a node that is gone, a ClientApp that raised)."""
    if message.has_error():
        return 503, json.dumps({"error": f"Flower: {message.error.reason or f'code {message.error.code}'}"}).encode()
    try:
        answer = message.content[ANSWER]
        return int(answer["status"]), bytes(answer["body"])  # type: ignore[arg-type, index]
    except (KeyError, TypeError, ValueError):
        return 503, b'{"error": "the site\'s ClientApp answered with something else"}'


def _words(status: int, body: bytes) -> str:
    """Returns an answer's error on one line and cut, because it comes from outside."""
    try:
        said = str(json.loads(body)["error"])
    except (ValueError, KeyError, TypeError):
        said = f"status {status} without a reason"
    return " ".join(said.split())[:500]
