"""Clients at real sites, reached through Flower: one message a site and round, carried as bytes to the site's own socket.

Flower transports and says who is there; the round loop, its checks and its checkpoints are `federate`'s. Replies are pulled
here and not by `Grid.send_and_receive`, which sleeps three seconds between looks and forgets what comes after a deadline.
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
from ficpd.federation.codec import Call, encode_call
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
    """Only Flower's own server process can reach its sites; `ficpd run RECIPE --engine flower` starts it."""
    raise ConfigError('engine.name = "flower" is run by `ficpd run RECIPE --engine flower`, not inside this process')


@dataclass
class Sent:
    """A call under way."""

    site: str
    what: str
    at: float = field(default_factory=time.monotonic)


class Flower:
    """`run`: this run's id. `terms_of`: a site's name to what it is sent with its first order, or when it asks again."""

    def __init__(self, config: Config, grid: Grid, run: str, say: Callable[[str], None] = lambda line: None):
        self.config, self.grid, self.run, self.say = config, grid, run, say
        self.terms_of: Callable[[str], bytes] = lambda site: b""
        self.node: dict[str, int] = {}
        self.cards: dict[str, ClientCard] = {}
        self.told: dict[str, dict[str, Any]] = {}
        self.briefed: set[str] = set()
        self.underway: dict[str, Sent] = {}
        self._asked: set[int] = set()

    def clients(self) -> Sequence[ClientCard]:
        return [self.cards[name] for name in sorted(self.cards)]

    def gather(self, known: Mapping[str, ClientCard] | None = None) -> None:
        """Ask whoever is there for its card until all that are wanted have come. `known`: the cards of a run that goes on;
        it does so once one of its sites is there. Raises `SiteError` for those that do not come in time."""
        wanted = set(known or self.config.sites)
        until, least = time.monotonic() + self.config.wait_seconds, len(wanted) or self.config.least_sites
        while True:
            self._hello()
            self._meet(self._greeted(), time.monotonic())
            here = set(self.cards)
            if (wanted and wanted <= here) or (not wanted and len(here) >= least and time.monotonic() > until):
                break
            if not wanted and len(here) >= least and not self._strangers():
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

    def exchange(self, orders: Mapping[str, bytes]) -> Iterator[Reply]:
        """One call a site; its first one brings the run's terms. Late answers to earlier rounds come out as they arrive.
        New nodes are asked who they are beside it, and a site that was missed joins the round; where nobody is there yet,
        that is waited for."""
        until = time.monotonic() + self.config.deadline_seconds
        self.underway = {id: sent for id, sent in self.underway.items() if sent.what != "evaluate"}
        self._hello()
        if not any(name in self.node for name in orders):
            self._meet(self._greeted(), min(until, time.monotonic() + self.config.wait_seconds))
        present = {name: order for name, order in orders.items() if name in self.node}
        waiting = self._send("train", present)
        for sent, answer in self._answers(waiting, until):
            status, body = answer
            if sent.what == "hello":
                name = self._answered_hello(sent, status, body)
                if name is not None and name in orders and name not in present:
                    present[name] = orders[name]
                    waiting |= self._send("train", {name: orders[name]})
            elif status == TERMS_WANTED and sent.site in present:
                self.briefed.discard(sent.site)
                waiting |= self._send("train", {sent.site: present[sent.site]})
            elif status == 200:
                self.briefed.add(sent.site)
                yield Reply(sent.site, body)
            else:
                yield Reply(sent.site, None, _words(status, body), status == REFUSED)
        for name in orders.keys() - present.keys():
            yield Reply(name, None, f"{name} is not connected")
        for id in waiting & self.underway.keys():
            self.say(f"{self.underway[id].site} has not answered within {self.config.deadline_seconds:g} s")

    def evaluate(self, orders: Mapping[str, bytes]) -> dict[str, dict[str, Any]]:
        """Have each site look at how it is served. What its policy lets it tell comes back; most often that is nothing."""
        waiting = self._send("evaluate", {name: order for name, order in orders.items() if name in self.node})
        found = {}
        for sent, (status, body) in self._answers(waiting, time.monotonic() + self.config.deadline_seconds):
            if sent.what == "evaluate" and status == 200:
                found[sent.site] = json.loads(body)
        return found

    def _send(self, what: str, orders: Mapping[str, bytes]) -> set[str]:
        """Push a call to each site; the ids of the messages."""
        messages, names = [], list(orders)
        for name in names:
            terms = b"" if name in self.briefed else self.terms_of(name)
            messages.append(self._message(self.node[name], Call(what, self.run, orders[name], terms)))
        return self._pushed(messages, [Sent(name, what) for name in names])

    def _message(self, node: int, call: Call) -> Message:
        kind = "train" if call.what == "train" else "query"
        record = RecordDict({CALL: ConfigRecord({"body": encode_call(call)})})
        # One that has not been fetched by the end of a round is of no use to anybody: the next will be of another round.
        return Message(record, dst_node_id=node, message_type=kind, ttl=2 * self.config.deadline_seconds)

    def _pushed(self, messages: Sequence[Message], sent: Sequence[Sent]) -> set[str]:
        if not messages:
            return set()
        ids = list(self.grid.push_messages(messages))
        self.underway |= {id: one for id, one in zip(ids, sent, strict=True) if id}
        return {id for id in ids if id}

    def _answers(self, waiting: set[str], until: float) -> Iterator[tuple[Sent, tuple[int, bytes]]]:
        """As they come, also to what was asked earlier, until all of `waiting` is answered or the time is over."""
        while waiting & self.underway.keys():
            for message in self.grid.pull_messages(list(self.underway)):
                sent = self.underway.pop(message.metadata.reply_to_message_id, None)
                if sent:
                    yield sent, _answer_of(message)
            if time.monotonic() > until:
                return
            if waiting & self.underway.keys():
                time.sleep(self.config.poll_seconds)

    def _strangers(self) -> set[int]:
        """Nodes that are there and have not said who they are."""
        return set(self.grid.get_node_ids()) - set(self.node.values())

    def _greeted(self) -> set[str]:
        """The messages of those who have not said yet."""
        return {id for id, sent in self.underway.items() if sent.what == "hello"}

    def _hello(self) -> None:
        """Ask nodes that are new, or have not answered for long, who they are; forget those that are gone."""
        here, now = set(self.grid.get_node_ids()), time.monotonic()
        unheard = {id for id in self._greeted() if now - self.underway[id].at > self.config.wait_seconds}
        self._asked = (self._asked & here) - {int(self.underway.pop(id).site) for id in unheard}
        self.node = {name: node for name, node in self.node.items() if node in here}
        new = sorted(here - self._asked)
        self._asked |= set(new)
        self._pushed([self._message(n, Call("hello")) for n in new], [Sent(str(n), "hello") for n in new])

    def _meet(self, hellos: set[str], until: float) -> None:
        for sent, (status, body) in self._answers(hellos, until):
            if sent.what == "hello":
                self._answered_hello(sent, status, body)

    def _answered_hello(self, sent: Sent, status: int, body: bytes) -> str | None:
        """The site's name; None if it does not answer, and will be asked again: it may be starting."""
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
    """Status and body; Flower's own errors (a node that is gone, a ClientApp that raised) as one of 503."""
    if message.has_error():
        return 503, json.dumps({"error": f"Flower: {message.error.reason or f'code {message.error.code}'}"}).encode()
    try:
        answer = message.content[ANSWER]
        return int(answer["status"]), bytes(answer["body"])  # type: ignore[arg-type, index]
    except (KeyError, TypeError, ValueError):
        return 503, b'{"error": "the site\'s ClientApp answered with something else"}'


def _words(status: int, body: bytes) -> str:
    """What an answer that is no update says. It comes from outside: cut, and on one line."""
    try:
        said = str(json.loads(body)["error"])
    except (ValueError, KeyError, TypeError):
        said = f"status {status} without a reason"
    return " ".join(said.split())[:500]
