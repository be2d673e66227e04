"""Sites on real sockets, and a Flower grid in this process that carries messages with the app's own client half."""

import json
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

import ficpd
import site_of
from ficpd.deployment.site.http import bind_socket, server_of
from ficpd.deployment.site.site import Site
from ficpd.experiments.build import ExperimentContext
from ficpd.federation.codec import UPDATE_HEADER
from remote import running
from site_of import signing_keys

APP = Path(ficpd.__file__).parent / "deployment" / "flower-app"


OPEN_SOCKETS = [
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
"""httpx does not close a socket that nobody answers."""


@contextmanager
def answering(site: Site) -> Iterator[Path]:
    """A site on its socket, in a thread."""
    try:
        with running(server_of(site), bind_socket(site.config.socket)):
            yield site.config.socket
    finally:
        site.close()


@contextmanager
def sites(context: ExperimentContext, signed: bool = False, **policy: Any) -> Iterator[dict[str, Site]]:
    """All clients of a context as sites on their sockets. `signed`: with keys for secure sums."""
    with short_folder() as folder, ExitStack() as stack:
        if signed:
            signing_keys(context.shards, folder)
        found = {name: site_of.site(context, name, folder, **policy) for name in context.shards}
        for one in found.values():
            stack.enter_context(answering(one))
        yield found


@contextmanager
def short_folder() -> Iterator[Path]:
    """A socket's path has at most 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="fs-") as folder:
        yield Path(folder)


def client_app() -> Any:
    """The handlers of the app that Flower runs at a site."""
    from flwr.supercore.task_identity import TaskIdentity

    TaskIdentity._run_id = TaskIdentity._node_id = TaskIdentity._task_id = 1  # outside of Flower nobody sets them
    if str(APP) not in sys.path:
        sys.path.insert(0, str(APP))
    import ficpd_carrier.client_app as carrier

    return carrier.app


@dataclass
class Loopback:
    """A grid of nodes with sockets. As a SuperNode does, each carries its messages one after the other, while the server
    waits; `gone` are not connected. `fates`: what befalls a node's n-th order, from 1.

    "lost": it never arrives. "unanswered": it arrives, and its answer is lost. "twice": both copies arrive, and both
    answers. "late": its answer comes with the node's next order. "after": it arrives once more, after the next order.

    `journal`: a file that says of every update that a site let out: node, round and body, one JSON line each.
    """

    sockets: Mapping[int, Path]
    fates: Mapping[tuple[int, int], str] = field(default_factory=dict)
    gone: set[int] = field(default_factory=set)
    journal: Path | None = None
    app: Any = field(default_factory=client_app)

    def __post_init__(self) -> None:
        self._orders: Counter[int] = Counter()
        self._nodes = {node: ThreadPoolExecutor(1) for node in self.sockets}
        self._lock = threading.Lock()
        self._under_way: list[Future[None]] = []
        self._replies: dict[str, list[Any]] = {}
        self._held: dict[int, list[Any]] = {node: [] for node in self.sockets}
        self._again: dict[int, list[Any]] = {node: [] for node in self.sockets}

    def get_node_ids(self) -> Iterable[int]:
        return [node for node in self.sockets if node not in self.gone]

    def push_messages(self, messages: Iterable[Any]) -> Iterable[str]:
        ids = []
        for message in messages:
            message.metadata._message_id = str(uuid4())
            ids.append(message.metadata.message_id)
            self._push(message, message.metadata.dst_node_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Any]:
        for carried in [one for one in self._under_way if one.done()]:
            self._under_way.remove(carried)
            carried.result()
        with self._lock:
            return [reply for id in message_ids for reply in self._replies.pop(id, [])]

    def _push(self, message: Any, node: int) -> None:
        if message.metadata.message_type != "train":
            self._submit(message, node, "")
            return
        self._orders[node] += 1
        fate = self.fates.get((node, self._orders[node]), "")
        held, self._held[node] = self._held[node], []
        again, self._again[node] = self._again[node], []
        self._arrive(held)
        self._submit(message, node, fate)
        for old in again:
            self._submit(old, node, "unanswered")

    def _submit(self, message: Any, node: int, fate: str) -> None:
        self._under_way.append(self._nodes[node].submit(self._carry, message, node, fate))

    def _carry(self, message: Any, node: int, fate: str) -> None:
        from flwr.app import Context, RecordDict

        if fate == "lost" or node in self.gone:
            return
        replies = []
        for _ in range(2 if fate == "twice" else 1):
            context = Context(1, node, {"socket": str(self.sockets[node])}, RecordDict(), {})
            replies.append(self.app(message, context))
            self._note(node, message, replies[-1])
        if fate == "after":
            self._again[node].append(message)
        if fate == "late":
            self._held[node] += replies
        elif fate != "unanswered":
            self._arrive(replies)

    def _arrive(self, replies: list[Any]) -> None:
        with self._lock:
            for reply in replies:
                self._replies.setdefault(reply.metadata.reply_to_message_id, []).append(reply)

    def _note(self, node: int, message: Any, reply: Any) -> None:
        answer = reply.content["answer"]
        if self.journal and message.metadata.message_type == "train" and answer["status"] == 200:
            body = bytes(answer["body"])
            line = json.dumps([node, UPDATE_HEADER.unpack_from(body)[2], body.hex()]) + "\n"
            with open(self.journal, "a") as file:
                file.write(line)
