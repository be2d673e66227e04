"""Runs an experiment on Flower's simulation engine, to compare it with the in-process engine.

Every client is a site with a socket of its own in this process. The app is the one that real sites run.
"""

import os
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from ficpd.deployment.flower_cli import flwr_run, free_ports
from ficpd.deployment.site.config import Policy, Simulation, SiteConfig
from ficpd.deployment.site.http import bind_socket, server_of
from ficpd.deployment.site.policy import mechanism_name
from ficpd.deployment.site.site import Site
from ficpd.errors import RunError
from ficpd.experiments.build import ExperimentContext, build_context
from ficpd.experiments.config import Experiment, to_toml
from ficpd.experiments.run_directory import RunDir
from ficpd.federation.privacy_plan import private_seed

ENOUGH = 1e9
"""A simulated site's budget over all runs: only the run's own budget binds."""


def run(experiment: Experiment, out: Path, resume: bool) -> dict[str, Any]:
    """Returns the main method's result; baselines are not run. Raises `RunError` with Flower's exit status if it failed."""
    with RunDir(out).lock():
        RunDir(out).check(to_toml(served(experiment)), resume)
    context = build_context(experiment)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ficpd-")))
        sites = stack.enter_context(answering(context, folder, out.with_name(out.name + "-sites")))
        status = _flower(served(experiment), out, resume, folder, len(sites))
    found = RunDir(out).result()
    if status or found is None:
        raise RunError(f"Flower's run ended with status {status} and left no result in {out}; its log is above")
    return found


def served(experiment: Experiment) -> Experiment:
    """Returns the experiment as a coordinator runs it: without records and baselines."""
    none = {"data": None, "partition": None}
    groups = {name: group.model_copy(update=none) for name, group in experiment.groups.items()}
    return experiment.model_copy(update={**none, "groups": groups, "baselines": ()})


@contextmanager
def answering(context: ExperimentContext, sockets: Path, states: Path) -> Iterator[list[Site]]:
    """Starts every client as a site in a thread of its own. Sites share the backbone and compute one at a time."""
    turn = threading.Lock()
    sites = [
        _site(context, name, sockets / f"{place}.sock", states / name, turn)
        for place, name in enumerate(context.shards)
    ]
    with ExitStack() as stack:
        for site in sites:
            sock, server = bind_socket(site.config.socket), server_of(site)
            thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
            thread.start()
            stack.callback(site.close)
            stack.callback(sock.close)
            stack.callback(thread.join, 30)
            stack.callback(setattr, server, "should_exit", True)
        yield sites


def _site(context: ExperimentContext, name: str, place: Path, state: Path, turn: threading.Lock) -> Site:
    experiment = context.experiment
    party = experiment.all_groups[context.group_of[name]]
    policy = Policy(
        epsilon=ENOUGH, delta=experiment.privacy.get("delta", 1e-5), methods=(experiment.method["name"],),
        mechanisms=(mechanism_name(experiment.privacy),), max_local_steps=10**6, max_batch_size=10**6, max_rounds=10**6,
        share_metrics=True,
    )  # fmt: skip
    config = SiteConfig(
        name=name, socket=place, state=state, card=context.shards[name].metadata, backbone=experiment.backbone,
        task=party.task, data=party.data_and_partition[0], policy=policy, engine=experiment.engine,
        simulation=Simulation(private_seed=private_seed(experiment.seed, name)),
    )  # fmt: skip
    return Site(config, context.shards[name], context.task_of(name), context.model, lock=turn)


def _flower(experiment: Experiment, out: Path, resume: bool, folder: Path, clients: int) -> int:
    """Returns the exit status of `flwr run` on a local simulation with `clients` SuperNodes."""
    home = folder / "flower"
    more: dict[str, str] = {"FICPD_SOCKETS": str(folder), "FLWR_HOME": str(home)}
    more["RAY_TMPDIR"] = str(folder)  # else Flower's Ray joins the newest cluster of this machine, another test's
    ports = ("FLWR_LOCAL_SUPERLINK_HTTP_API_PORT", "FLWR_LOCAL_CONTROL_API_PORT")
    more |= dict(zip(ports, map(str, free_ports(2)), strict=True))
    federation = f"num-supernodes={clients} client-resources-num-cpus=1"
    try:
        more = (["--federation-config", federation], more)
        return flwr_run(to_toml(experiment), f"{experiment.name}.toml", out, resume, *more)
    finally:
        _stop(home)  # Flower leaves its local SuperLink running


def _stop(home: Path) -> None:
    """Ends every process that works with this Flower home."""
    mark = f"FLWR_HOME={home}".encode()
    for entry in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark in entry.read_bytes().split(b"\0") and int(entry.parent.name) != os.getpid():
                os.kill(int(entry.parent.name), signal.SIGTERM)
        except OSError:
            continue
