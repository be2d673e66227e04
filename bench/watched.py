"""Processes under watch: wall time and memory of all that a command starts; what passes through a socket."""

import os
import signal
import socket
import subprocess
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

MARK = "FICPD_BENCH"
EVERY = 1.5
"""Seconds between two looks at memory."""


def watched(command: Sequence[str], environment: Mapping[str, str], log: Path) -> dict:
    """Run it: seconds until it ends, seconds of CPU, the largest sum of proportional set sizes (MB) of it and whatever it
    started, and how many processes that were; `looks`: CPU seconds by time. What it leaves behind is ended. Raises
    `RuntimeError` if it fails."""
    mark, looks = uuid.uuid4().hex, [(time.time(), 0.0)]
    peak, most, began = 0.0, 0, time.perf_counter()
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, env={**environment, MARK: mark}, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            while process.poll() is None:
                here = marked(mark)
                sizes = [pss_mb(pid) for pid in here]
                looks.append((time.time(), max(looks[-1][1], sum(cpu_seconds(pid) for pid in here))))
                if sum(sizes) > peak:
                    peak, most = sum(sizes), len(sizes)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(EVERY)
            seconds = time.perf_counter() - began
        finally:
            end(mark)
    if process.returncode:
        raise RuntimeError(
            f"{' '.join(command)} ended with {process.returncode}:\n{log.read_text(encoding='utf-8')[-3000:]}"
        )
    cpu = round(looks[-1][1], 2)
    return {"seconds": round(seconds, 2), "cpu": cpu, "peak_mb": round(peak), "processes": most, "looks": looks}


def marked(mark: str) -> list[int]:
    """The processes that were started, by whomever, with this mark in their environment."""
    wanted, found = f"{MARK}={mark}".encode(), []
    for entry in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            if wanted in entry.read_bytes().split(b"\0"):
                found.append(int(entry.parent.name))
    return found


def end(mark: str) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        for pid in marked(mark):
            with suppress(OSError):
                os.kill(pid, number)
        until = time.monotonic() + 10
        while marked(mark) and time.monotonic() < until:
            time.sleep(0.2)


def pss_mb(pid: int) -> float:
    """Proportional set size: memory that several share counts once in their sum."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="utf-8").splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) / 1000
    return 0.0


def cpu_seconds(pid: int) -> float:
    """Of a process and of its children that have ended."""
    with suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
    return 0.0


@dataclass
class Call:
    """One connection. Times are seconds since the epoch; `started`: when the process that made it began (Unix sockets)."""

    accepted: float
    started: float = 0.0
    up: int = 0
    down: int = 0
    answered: float = 0.0
    first: bytes = b""


@dataclass
class Counter:
    """A socket that hands every connection on to another and counts bytes: `up` from whoever connects, `down` to it.

    Places are paths of Unix sockets, or ports of 127.0.0.1."""

    place: str | int
    behind: str | int
    calls: list[Call] = field(default_factory=list)

    def __enter__(self) -> "Counter":
        self.listening = _socket(self.place)
        if isinstance(self.place, str):
            self.listening.bind(self.place)
        else:
            self.listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self.listening.bind(("127.0.0.1", self.place))
        self.listening.listen(64)
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        with suppress(OSError):
            self.listening.shutdown(socket.SHUT_RDWR)
        self.listening.close()
        if isinstance(self.place, str):
            Path(self.place).unlink(missing_ok=True)

    def total(self) -> tuple[int, int]:
        return sum(call.up for call in self.calls), sum(call.down for call in self.calls)

    def _accept(self) -> None:
        while True:
            try:
                outer, _ = self.listening.accept()
            except OSError:
                return
            call = Call(time.time())
            if isinstance(self.place, str):
                pid = int.from_bytes(outer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)[:4], "little")
                call.started = started(pid)
            inner = _socket(self.behind)
            try:
                inner.connect(self.behind if isinstance(self.behind, str) else ("127.0.0.1", self.behind))
            except OSError:
                outer.close()
                continue
            self.calls.append(call)
            for source, sink, way in ((outer, inner, "up"), (inner, outer, "down")):
                threading.Thread(target=_pipe, args=(source, sink, call, way), daemon=True).start()


def _socket(place: str | int) -> socket.socket:
    return socket.socket(socket.AF_UNIX if isinstance(place, str) else socket.AF_INET)


def _pipe(source: socket.socket, sink: socket.socket, call: Call, way: str) -> None:
    with suppress(OSError):
        while part := source.recv(1 << 16):
            setattr(call, way, getattr(call, way) + len(part))
            if way == "up" and not call.first:
                call.first = part[:200]
            sink.sendall(part)
            if way == "down":
                call.answered = time.time()
    with suppress(OSError):
        sink.shutdown(socket.SHUT_WR)


def started(pid: int) -> float:
    """When a process began, in seconds since the epoch; to a hundredth."""
    with suppress(OSError):
        ticks = int(Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19])
        return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + ticks / os.sysconf("SC_CLK_TCK")
    return 0.0
