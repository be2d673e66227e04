"""Connects to Ray, starts actors, and replaces those that die."""

import logging
import os
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from ficpd.errors import ConfigError, RunError, needs

QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
"""No telemetry, and no notice about future changes of Ray."""


def connect(address: str | None = None) -> ModuleType:
    """Connects to Ray at `address`, else at `RAY_ADDRESS`, else starts it on this machine. Returns the module.

    Raises `ConfigError` if it is not installed or does not answer.
    """
    os.environ.update(QUIET)
    with needs("a run on Ray", "ray"):
        import ray
    if not ray.is_initialized():
        address = address or os.environ.get("RAY_ADDRESS") or "local"
        dashboard: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
        try:
            ray.init(address, log_to_driver=False, logging_level=logging.WARNING, **dashboard)
        except (ConnectionError, ValueError) as error:
            raise ConfigError(
                f"no Ray answers at {address!r} ({error}). Start it there, or leave the address out"
            ) from error
    return ray


@dataclass(frozen=True)
class Room:
    """actors: their number; None: as many as the cluster has room for. num_cpus, num_gpus: of each.

    wait_seconds: the longest wait for the first actor.
    """

    actors: int | None
    num_cpus: float
    num_gpus: float
    wait_seconds: float


@dataclass(eq=False)
class Handle:
    """A caller's reference to an actor. loaded: the result of `load`. met: the facts of `user` that it has."""

    actor: Any
    loaded: Any
    user: object = None
    met: set[str] = field(default_factory=set)


class Actors:
    """Actors of one class. Each calls `load` first, with this process's module folders and `given`.

    `most`: bounds their number.
    """

    def __init__(self, ray: ModuleType, kind: type, room: Room, *given: Any, most: int = sys.maxsize):
        self.ray, self.kind, self.room, self.given, self.most = ray, kind, room, given, most
        self.handles: list[Handle] = []
        self.began = False

    def ready(self) -> dict[Handle, Any]:
        """Starts missing actors. Returns the loaded ones with the results of `load`.

        Waits for one of them (the first time for all), at most `wait_seconds`. Raises `RunError` if none
        comes, and the exception of a `load`.
        """
        until, trouble = time.monotonic() + self.room.wait_seconds, "Ray has no room for it"
        while True:
            self.handles += [self._start() for _ in range(self._number() - len(self.handles))]
            pending = {handle.loaded: handle for handle in self.handles}
            wanted, self.began = 1 if self.began else len(pending), True
            self.ray.wait(list(pending), num_returns=wanted, timeout=max(until - time.monotonic(), 0.0))
            found = {}
            for ref in self.ray.wait(list(pending), num_returns=len(pending), timeout=0)[0]:
                try:
                    found[pending[ref]] = self.get(ref)
                except self.ray.exceptions.RayError as error:
                    self.drop(pending[ref])
                    trouble = str(error).strip().splitlines()[0]
            if found:
                return found
            if time.monotonic() > until:
                raise RunError(
                    f"no actor is ready after wait_seconds = {self.room.wait_seconds:g}: {trouble}. Ask for less "
                    f"(num_cpus = {self.room.num_cpus:g}, num_gpus = {self.room.num_gpus:g}), or resume later"
                )

    def get(self, ref: Any) -> Any:
        """Returns a call's result. Raises an exception of the call itself, and `RayError` for a lost actor."""
        try:
            return self.ray.get(ref)
        except self.ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, self.ray.exceptions.RayError):  # the actor cannot read its input
                raise RunError(f"an actor cannot run: {error}. Install there what is installed here") from error
            raise error.cause from error

    def drop(self, handle: Handle) -> None:
        """Ends an actor."""
        self.handles.remove(handle)
        with suppress(Exception):  # it may be gone already
            self.ray.kill(handle.actor)

    def close(self) -> None:
        while self.handles:
            self.drop(self.handles[0])

    def _start(self) -> Handle:
        options = {"num_cpus": self.room.num_cpus, "num_gpus": self.room.num_gpus, "scheduling_strategy": "SPREAD"}
        actor = self.ray.remote(self.kind).options(**options).remote()
        return Handle(actor, actor.load.remote(sys.path, *self.given))

    def _number(self) -> int:
        total, needed = self.ray.cluster_resources(), {"CPU": self.room.num_cpus, "GPU": self.room.num_gpus}
        fit = [int(total.get(kind, 0) // amount) for kind, amount in needed.items() if amount]
        return min(self.room.actors or max(min(fit), len(self.handles), 1), self.most)
