"""Clients on Ray actors: the run of one process, and what an actor costs that dies."""

import json
import os
import pickle
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import rays
import small
from ficpd.backbones.loading import BackboneConfig, EngineConfig
from ficpd.backbones.query_engine import QueryEngine
from ficpd.errors import BackboneError, ConfigError, LedgerError, RunError
from ficpd.experiments.runner import run as run_experiment
from ficpd.federation import codec, ray_engine
from ficpd.federation.client import Client
from ficpd.federation.method import Method
from ficpd.privacy import record_gaussian
from ficpd.registry import names
from ficpd.types import ClientWorkload, Reply

pytestmark = rays.NO_WARNINGS
BACKBONE = BackboneConfig(name="tiny", options={"width": 16}, dtype="float32", attention="eager")
MECHANISM = record_gaussian.build(
    record_gaussian.Config(noise_multiplier=2.0, clip_norm=0.5),
    ClientWorkload(9, 4 / 9, steps=2, participations=3, num_clients=3, cohort_rate=1.0, num_rounds=3),
)
PRIVATE = "privacy={name='record_gaussian',epsilon=8.0}"


def orders_for(method: Method, members: Mapping[str, Client], model: QueryEngine, round: int = 1) -> dict[str, bytes]:
    state = small.first_state(method, members)
    orders = {name: method.make_assignment(state, client.card, round) for name, client in members.items()}
    return {name: codec.encode_assignment(order, model.backbone.fingerprint) for name, order in orders.items()}


class Near:
    """An engine and an actor without Ray between them: everything travels as bytes."""

    def __init__(self, method: Method, members: Mapping[str, Client], model: QueryEngine):
        config = ray_engine.Config(lock_step=2)
        self.engine = ray_engine.RayEngine(config, method, members, model, None)  # type: ignore[arg-type]
        self.actor, self.method = ray_engine.Actor(), method
        self.actor.load([], BACKBONE, EngineConfig(), None)
        self.handle = ray_engine.Handle(self, None)

    def remote(self, *given: Any) -> Any:
        return pickle.loads(pickle.dumps(self.actor.run(*pickle.loads(pickle.dumps(given)))))

    @property
    def run(self) -> "Near":
        return self

    def exchange(self, orders: Mapping[str, bytes], round: int = 1) -> dict[str, Reply]:
        given = (round, self.method.name)
        calls = {name: self.engine._remote_assignment(name, order, *given) for name, order in orders.items()}
        came = self.engine._call(self.handle, calls)
        return {name: self.engine._settled(name, came[name]) for name in orders}


@pytest.mark.slow
@pytest.mark.parametrize("name", names("methods"))
def test_a_visit_gives_the_reply_and_the_state_of_the_process_itself(model, name):
    """In two rounds, so that the second one begins with the state and the records that the first one left."""
    method = small.method(name)
    ours, theirs = small.clients(model, method), small.clients(model, method)
    near, engine = Near(method, theirs, model), small.engine(method, ours, model)
    for round in (1, 2):
        orders = orders_for(method, ours, model, round)
        here = {reply.client: reply for reply in engine.exchange(orders)}
        assert near.exchange(orders, round) == here
        assert near.handle.met == set(orders)
        for client, other in zip(ours.values(), theirs.values(), strict=True):
            assert small.same(client.client_state, other.client_state)
            assert client.query_counts == other.query_counts


def test_the_ledger_commits_before_the_reply_is_passed_on(model):
    method = small.method("fedavg")
    members = small.clients(model, method, 3, mechanism=MECHANISM)
    members = {name: replace(client, train=small.records(9)) for name, client in members.items()}
    near, orders = Near(method, members, model), orders_for(method, members, model)
    accounts = {name: client.account for name, client in members.items()}
    calls = {n: near.engine._remote_assignment(n, o, 1, "fedavg") for n, o in orders.items()}
    came = near.engine._call(near.handle, calls)
    assert all(account is not None and account.spent() == [] for account in accounts.values())
    assert near.engine._settled("site-0", came["site-0"]).body
    assert [n for n, account in accounts.items() if account is not None and account.last_round("fedavg")] == ["site-0"]
    account = accounts["site-1"]
    assert account is not None
    account.commit = _full_disk
    reply = near.engine._settled("site-1", came["site-1"])
    assert reply.body is None
    assert "the disk is full" in str(reply.error)
    assert members["site-1"].client_state == {}
    lost = near.engine._settled("site-2", None)
    assert (lost.body, lost.error) == (None, "its actor ended before it answered")
    assert accounts["site-2"] is not None
    assert accounts["site-2"].spent() == []


def _full_disk(*given: Any) -> None:
    raise LedgerError("the disk is full")


def test_masks_are_refused_and_a_missing_ray_is_named(monkeypatch):
    with pytest.raises(ValueError, match="masks"):
        ray_engine.Config(masks=True)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"pip install 'ficpd\[ray\]'"):
        ray_engine.connect()


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    with rays.two_nodes() as made:
        yield made


def ledger(folder: Path) -> list[tuple]:
    columns = "site, round, method, name, sampling_rate, noise_multiplier, count"
    with closing(sqlite3.connect(folder / "run" / "ledger.sqlite")) as file:
        return file.execute(f"select {columns} from costs order by {columns}").fetchall()


def rounds(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "run" / "rounds.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize(("method", "privacy"), [
    ("ficpd", PRIVATE),
    ("fpl", "privacy={name='none'}"),
    ("fedavg", "privacy={name='client_gaussian',placement='local',epsilon=50.0}"),
    ("fedavg", "privacy={name='shared_gaussian',epsilon=50.0,max_lost=0,max_colluding=0}"),
])  # fmt: skip
def test_a_run_on_two_nodes_leaves_the_library_and_the_ledger_of_one_process(cluster, tmp_path, method, privacy):
    here = small.run(tmp_path / "here", method, privacy)
    there = small.run(tmp_path / "there", method, privacy, "engine.name=ray")
    assert {len(handle.met) for handle in ray_engine.CURRENT[0].handles} == {1, 2}
    ours, theirs = small.library(tmp_path / "here"), small.library(tmp_path / "there")
    assert ours.keys() == theirs.keys()
    assert all(small.close(ours[name], theirs[name], 1e-6) for name in ours)
    assert (here.privacy, here.queries, here.bytes) == (there.privacy, there.queries, there.bytes)
    if "none" not in privacy:
        assert ledger(tmp_path / "here") == ledger(tmp_path / "there")


@pytest.mark.slow
def test_the_command_reaches_a_cluster_by_its_address(cluster, tmp_path):
    """From another process, by Ray's client server."""
    ray_engine.close()  # the actors of earlier runs hold all cores
    small.run(tmp_path / "here")
    recipe = tmp_path / "small.toml"
    recipe.write_text(small.toml(tmp_path / "here" / "records.csv"))
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    with rays.client_server(cluster.address) as address:
        run = ["run", str(recipe), "--engine", address, "--out", str(tmp_path / "there" / "run")]
        command = [sys.executable, "-m", "ficpd", *run]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    ours, theirs = small.library(tmp_path / "here"), small.library(tmp_path / "there")
    assert all(small.close(ours[name], theirs[name], 1e-6) for name in ours)
    assert all(not line["dropped"] for line in rounds(tmp_path / "there"))


@pytest.mark.slow
def test_a_node_that_is_killed_costs_one_round_of_its_clients_and_comes_back(cluster, tmp_path):
    """Of six rounds: the node dies after the first one, the head does the third one alone, the node is back in the last."""

    def progress(method: str, done: int, planned: int, figures: dict[str, float]) -> None:
        actors = ray_engine.CURRENT[0]
        if done == 1:
            (node,) = [node for node in cluster.list_all_nodes() if not node.head]
            places = [actors.ray.get(handle.actor.__ray_call__.remote(_place)) for handle in actors.handles]
            (pid,) = [pid for place, pid in places if place == node.node_id]
            cluster.remove_node(node, allow_graceful=False)
            _until(lambda: not Path(f"/proc/{pid}").exists())
        if done == 3:
            cluster.add_node(num_cpus=1)
            _until(lambda: len(actors.ready()) == 2)

    experiment = small.experiment(tmp_path, "fedavg", PRIVATE, "engine.name=ray", rounds=6)
    result = run_experiment(experiment, tmp_path / "run", progress=progress)
    dropped = [done["dropped"] for done in rounds(tmp_path)]
    lost = dropped.pop(1)
    assert len(lost) in (1, 2)
    assert set(lost.values()) == {"its actor ended before it answered"}
    assert dropped == [{}] * 5
    paid = {(site, round) for site, round, *_ in ledger(tmp_path)}
    assert {(f"site-{i}", r) for i in range(3) for r in range(1, 7)} - paid == {(site, 2) for site in lost}
    assert result.dropped_updates == len(lost)


def _place(actor: Any) -> tuple[str, int]:
    import ray

    return ray.get_runtime_context().get_node_id(), os.getpid()


def _until(true: Any, seconds: float = 60.0) -> None:
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until
        time.sleep(0.2)


class Dying:
    """A method whose client `site-1` kills its process in the first round."""

    def __init__(self, method: Method):
        self.method = method

    def __getattr__(self, name: str) -> Any:
        if name == "method":  # while it is unpickled
            raise AttributeError(name)
        return getattr(self.method, name)

    def local_update(self, client: Any, order: Any) -> Any:
        if client.id == "site-1" and order.round == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return (yield from self.method.local_update(client, order))


@pytest.mark.slow
def test_an_actor_that_dies_in_a_round_takes_its_own_clients_and_is_replaced(cluster, model):
    method: Any = Dying(small.method("local"))
    members = small.clients(model, method)
    engine = ray_engine.build(ray_engine.Config(), method, members, model, BACKBONE, EngineConfig())
    first = {reply.client: reply for reply in engine.exchange(orders_for(method, members, model, 1))}
    gone = {name for name, reply in first.items() if reply.body is None}
    assert "site-1" in gone
    assert len(gone) in (2, 3)
    assert all(("prompt" in client.client_state) == (name not in gone) for name, client in members.items())
    second = list(engine.exchange(orders_for(method, members, model, 2)))
    assert sorted(reply.client for reply in second if reply.body) == sorted(members)


@pytest.mark.slow
def test_what_keeps_an_actor_from_starting_is_named(cluster, model):
    method = small.method("fedavg")
    members = small.clients(model, method)
    orders = orders_for(method, members, model)
    few = ray_engine.Config(actors=1, num_cpus=64, wait_seconds=2)
    with pytest.raises(RunError, match="num_cpus = 64"):
        list(ray_engine.build(few, method, members, model, BACKBONE, EngineConfig()).exchange(orders))
    wide = BACKBONE.model_copy(update={"options": {"width": 32}})
    with pytest.raises(BackboneError, match="tiny:32x2"):
        list(ray_engine.build(ray_engine.Config(), method, members, model, wide, EngineConfig()).exchange(orders))
    missing = BackboneConfig(name="no-such-folder/none")
    with pytest.raises(BackboneError, match="no-such-folder"):
        list(ray_engine.build(ray_engine.Config(), method, members, model, missing, EngineConfig()).exchange(orders))
