"""A SuperLink with TLS and a SuperNode for each site, as `ficpd deploy demo` starts them, with every socket counted. The
sites answer from this process, one thread each."""

import json
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ficpd.backbones.loading import EngineConfig
from ficpd.deployment import demo
from ficpd.deployment.flower_cli import flwr_run, free_ports
from ficpd.deployment.provision import init
from ficpd.experiments.build import build_context
from ficpd.experiments.config import Experiment, to_toml
from watched import Counter

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import flower_simulation

LOOK = 0.02


@dataclass(frozen=True)
class Mark:
    """The end of a round: when, and what the SuperLink's port had taken in and given out until then."""

    at: float
    up: int
    down: int


@dataclass
class Ran:
    """A finished run. `sockets`: each site's counter, whose calls began at `first`. `marks`: the ends of its rounds."""

    rounds: list[dict[str, Any]]
    marks: list[Mark]
    sockets: list[Counter]
    first: float
    seconds: float
    begun: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        spans = [line["seconds_train"] + line["seconds_aggregate"] for line in self.rounds]
        self.begun = [mark.at - span for mark, span in zip(self.marks, spans, strict=True)]

    def calls(self, round: int) -> list:
        """The calls that trained in a round, from 0."""
        return [
            call
            for counter in self.sockets
            for call in counter.calls
            if call.first.startswith(b"POST /train") and self.begun[round] <= call.accepted <= self.marks[round].at
        ]


@dataclass
class Network:
    folder: Path
    home: Path
    sockets: dict[str, Counter]
    port: Counter

    def run(self, experiment: Experiment, out: Path, poll_seconds: float = 0.2) -> Ran:
        context = build_context(experiment)
        options = {
            "superlink": "ficpd",
            "sites": list(context.shards),
            "poll_seconds": poll_seconds,
            "wait_seconds": 200.0,
        }
        asked = flower_simulation.served(experiment).model_copy(
            update={"engine": EngineConfig(name="flower", options=options)}
        )
        places = self.folder / "sites"
        places.mkdir(exist_ok=True)
        for place, name in enumerate(context.shards):
            self.sockets[name].behind = str(places / f"{place}.sock")
        began, stop, marks = time.time(), threading.Event(), []
        with flower_simulation.answering(context, places, out.with_name(out.name + "-sites")):
            follower = threading.Thread(target=self._follow, args=(out / "rounds.jsonl", marks, stop))
            follower.start()
            status = flwr_run(to_toml(asked), "bench.toml", out, False, ["ficpd"], {"FLWR_HOME": str(self.home)})
            stop.set()
            follower.join()
        if status or not (out / "result.json").exists():
            raise RuntimeError(f"the run ended with {status}:\n{demo._tail(self.folder / 'superlink.log')}")
        rounds = [json.loads(line) for line in (out / "rounds.jsonl").read_text().splitlines()]
        return Ran(rounds, marks, list(self.sockets.values()), began, time.time() - began)

    def _follow(self, file: Path, marks: list[Mark], stop: threading.Event) -> None:
        """The file is written anew before the first round, and with a line more at the end of every round."""
        while not stop.wait(LOOK):
            if file.exists() and file.read_bytes().count(b"\n") > len(marks):
                marks.append(Mark(file.stat().st_mtime, *self.port.total()))


@contextmanager
def network(names: Sequence[str], folder: Path) -> Iterator[Network]:
    """All SuperNodes are connected. `folder` has a short path, for its sockets."""
    inner, outer, *ports = free_ports(2 + len(names))
    init(folder / "deploy", list(names), f"127.0.0.1:{outer}")
    home = demo._coordinator(folder, inner, rounds=1)
    ca = folder / "deploy" / "ca" / "ca.crt"
    with ExitStack() as running:
        command = demo._superlink(folder, inner)
        link = running.enter_context(demo._started("superlink", command, {"FLWR_HOME": str(home)}, folder))
        demo._wait(lambda: demo._listens(inner), link, folder / "superlink.log")
        port = running.enter_context(Counter(outer, inner))
        sockets = {}
        for name, own in zip(names, ports, strict=True):
            public = folder / "deploy" / "coordinator" / "sites" / f"{name}.pub"
            demo._flwr(home, "supernode", "register", "--name", name, str(public), "ficpd")
            sockets[name] = running.enter_context(Counter(str(folder / f"{name}.sock"), ""))
            here = {"FLWR_HOME": str(folder / f"flower-{name}")}
            command = demo._supernode(folder, name, ca, outer, own)
            running.enter_context(demo._started(f"supernode-{name}", command, here, folder))
        demo._wait(lambda: demo._online(home) == len(names), link, folder / "superlink.log")
        yield Network(folder, home, sockets, port)
