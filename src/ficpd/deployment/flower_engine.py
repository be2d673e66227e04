"""Reaches clients at real sites through Flower, by one message per site and round to the site's socket.

Flower only transports messages and lists nodes. `run_rounds` has the round loop, its checks and its checkpoints. The engine
pulls replies itself, because `Grid.send_and_receive` sleeps between polls and drops late replies.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid
from pydantic import Field

from ficpd.errors import ConfigError, SiteError
from ficpd.federation.codec import SiteRequest, encode_call
from ficpd.registry import FrozenConfig
from ficpd.types import ClientCard, Reply

CALL, ANSWER = "call", "answer"
SPEC_MISSING, REFUSED = 428, 409


class Config(FrozenConfig):
    """Sets the connection to Flower and the times of a round, in seconds.

    superlink: the connection's name in Flower's configuration. `ficpd run` needs it.
    sites: sites that must connect before the run. Without names, the run starts when all connected nodes have answered.
    wait_seconds: maximum time to wait for sites.
    deadline_seconds: duration of a round. Later updates are dropped and counted, or kept (`federation.accept_late`).
        Messages expire after twice this time, so a site's clock must not be ahead by more.
    """

    superlink: str | None = None
    sites: tuple[str, ...] = ()
    wait_seconds: float = Field(default=60.0, gt=0)
    deadline_seconds: float = Field(default=600.0, gt=0)
    poll_seconds: float = Field(default=0.2, gt=0)


def build(config: Config, *_: Any) -> None:
    """Raises `ConfigError`: only Flower's server process can reach its sites."""
    raise ConfigError('engine.name = "flower" is run by `ficpd run RECIPE --engine flower`, not inside this process')


@dataclass
class PendingCall:
    """A call that is not answered yet."""

    site: str
    what: str
    at: float = field(default_factory=time.monotonic)


class Flower:
    """Exchanges calls with sites. `run`: the run's id. `spec_for`: returns a site's encoded run spec."""

    def __init__(self, config: Config, grid: Grid, run: str, say: Callable[[str], None] = lambda line: None):
        self.config, self.grid, self.run, self.say = config, grid, run, say
        self.spec_for: Callable[[str], bytes] = lambda site: b""
        self.node: dict[str, int] = {}
        self.cards: dict[str, ClientCard] = {}
        self.told: dict[str, dict[str, Any]] = {}
        self.underway: dict[str, PendingCall] = {}
        self._has_spec: set[str] = set()
        self._asked: set[int] = set()

    def clients(self) -> Sequence[ClientCard]:
        return [self.cards[name] for name in sorted(self.cards)]

    def rehearsed(self) -> list[str]:
        """Returns the sites whose noise comes from a seed in their file."""
        return sorted(name for name, hello in self.told.items() if hello.get("rehearsal"))

    def wait_for_sites(self, known: Mapping[str, ClientCard] | None = None) -> None:
        """Asks every node for its card until all wanted sites are connected.

        known: the cards of a resumed run. One of its sites is enough when the time is over.

        Raises `SiteError` for sites that do not connect in time, and for two nodes with one site name.
        """
        wanted = set(known or self.config.sites)
        until = time.monotonic() + self.config.wait_seconds
        while True:
            self._hello()
            self._meet(self._greeted(), time.monotonic())
            here = set(self.cards)
            late, unnamed = time.monotonic() > until, set(self.grid.get_node_ids()) - set(self.node.values())
            if (wanted <= here if wanted else here and (late or not unnamed)) or (known and late and here & wanted):
                break
            if late:
                raise SiteError(self._absent(wanted, here))
            time.sleep(self.config.poll_seconds)
        if wanted:
            self.cards = {name: self.cards[name] for name in here & wanted} | {
                name: card for name, card in (known or {}).items() if name not in here
            }

    def exchange(self, assignments: Mapping[str, bytes]) -> Iterator[Reply]:
        """Sends one call per site, the first with the run spec. Yields replies, also late ones of earlier rounds.

        Meanwhile greets new nodes; a late site joins the current round. If no site is connected, waits for one.
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
            elif status == SPEC_MISSING and sent.site in present:
                self._has_spec.discard(sent.site)
                waiting |= self._send("train", {sent.site: present[sent.site]})
            elif status == 200:
                self._has_spec.add(sent.site)
                yield Reply(sent.site, body)
            else:
                yield Reply(sent.site, None, _words(status, body), status == REFUSED)
        for name in assignments.keys() - present.keys():
            yield Reply(name, None, f"{name} is not connected")
        for id in waiting & self.underway.keys():
            self.say(f"{self.underway[id].site} has not answered within {self.config.deadline_seconds:g} s")

    def evaluate(self, assignments: Mapping[str, bytes]) -> dict[str, dict[str, Any]]:
        """Asks each site to score its test records; returns the scores that the sites' policies share."""
        waiting = self._send("evaluate", {name: body for name, body in assignments.items() if name in self.node})
        found = {}
        for sent, (status, body) in self._answers(waiting, time.monotonic() + self.config.deadline_seconds):
            if sent.what == "evaluate" and status == 200:
                found[sent.site] = json.loads(body)
        return found

    def _send(self, what: str, assignments: Mapping[str, bytes]) -> set[str]:
        """Pushes a call to each site; returns the ids of the messages."""
        messages = []
        for name, assignment in assignments.items():
            spec = b"" if name in self._has_spec else self.spec_for(name)
            messages.append(self._message(self.node[name], SiteRequest(what, self.run, assignment, spec)))
        return self._pushed(messages, [PendingCall(name, what) for name in assignments])

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
        """Yields answers, also to earlier calls, until all of `waiting` are answered or the time `until` is over."""
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
        """Returns the ids of the unanswered hello calls."""
        return {id for id, sent in self.underway.items() if sent.what == "hello"}

    def _hello(self) -> None:
        """Asks nodes for their cards if they are new or have not answered in time. Forgets nodes that are gone."""
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
        """Registers the site and returns its name. After an error returns None, and the node is asked again."""
        node = int(sent.site)
        if status != 200:
            self._asked.discard(node)
            self.say(f"node {node}: {_words(status, body)}")
            return None
        hello = json.loads(body)
        name = str(hello["name"])
        if name in self.node and self.node[name] != node:
            raise SiteError(
                f"two SuperNodes have the site name {name!r} (nodes {self.node[name]} and {node}); every site needs a "
                "unique name in its site.toml"
            )
        self.node[name], self.told[name] = node, hello
        self.cards.setdefault(name, ClientCard(name, hello["card"]))
        self.say(f"site {name} is connected")
        return name

    def _absent(self, wanted: set[str], here: set[str]) -> str:
        seconds, came = self.config.wait_seconds, ", ".join(sorted(here)) or "none"
        missing = f"site {', '.join(sorted(wanted - here))} has not" if wanted else "no site has"
        return (
            f"{missing} come within {seconds:g} s (here: {came}). Check that its SuperNode and `ficpd site run` are "
            "running and that engine.options.sites has its name, or set engine.options.wait_seconds higher"
        )


def _answer_of(message: Message) -> tuple[int, bytes]:
    """Returns status and body; 503 for an error of Flower (a node is gone, or a ClientApp raised)."""
    if message.has_error():
        return 503, json.dumps({"error": f"Flower: {message.error.reason or f'code {message.error.code}'}"}).encode()
    try:
        answer = message.content[ANSWER]
        return int(answer["status"]), bytes(answer["body"])  # type: ignore[arg-type, index]
    except (KeyError, TypeError, ValueError):
        return 503, b'{"error": "the site\'s ClientApp sent an invalid answer"}'


def _words(status: int, body: bytes) -> str:
    """Returns an untrusted answer's error, on one line of at most 500 characters."""
    try:
        error = str(json.loads(body)["error"])
    except (ValueError, KeyError, TypeError):
        error = f"status {status} without a reason"
    return " ".join(error.split())[:500]
