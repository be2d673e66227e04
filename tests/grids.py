"""Sites on real sockets, and a Flower grid in this process that carries messages with the app's own client half."""

import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

import ficpd
from ficpd.site.service import bound, server_of
from ficpd.site.site import Site

APP = Path(ficpd.__file__).parent / "deploy" / "flower"


@contextmanager
def answering(site: Site) -> Iterator[Path]:
    """A site on its socket, in a thread."""
    server, sock = server_of(site), bound(site.config.socket)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
    thread.start()
    while thread.is_alive() and not server.started:
        time.sleep(0.01)
    try:
        yield site.config.socket
    finally:
        server.should_exit = True
        thread.join(20)
        sock.close()
        site.close()


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
    """A grid of nodes with sockets. Messages are carried one at a time when replies are pulled; `lost` are dropped, `held`
    come at the pull after they were let go, `twice` come two times."""

    sockets: Mapping[int, Path]
    gone: set[int] = field(default_factory=set)
    held: set[int] = field(default_factory=set)
    twice: set[int] = field(default_factory=set)
    pushed: dict[str, Any] = field(default_factory=dict)
    carried: list[tuple[int, str]] = field(default_factory=list)
    app: Any = field(default_factory=client_app)

    def get_node_ids(self) -> Iterable[int]:
        return [node for node in self.sockets if node not in self.gone]

    def push_messages(self, messages: Iterable[Any]) -> Iterable[str]:
        ids = []
        for message in messages:
            message.metadata._message_id = str(uuid4())
            self.pushed[message.metadata.message_id] = message
            ids.append(message.metadata.message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Any]:
        from flwr.app import Context, RecordDict

        replies = []
        for id in message_ids:
            message = self.pushed.get(id)
            if message is None or message.metadata.dst_node_id in self.held | self.gone:
                continue
            del self.pushed[id]
            node = message.metadata.dst_node_id
            self.carried.append((node, message.metadata.message_type))
            for _ in range(2 if node in self.twice else 1):
                context = Context(1, node, {"socket": str(self.sockets[node])}, RecordDict(), {})
                replies.append(self.app(message, context))
        return replies
