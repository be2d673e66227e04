"""One client of a small world as a site of its own, and the orders that it would be sent."""

from pathlib import Path
from typing import Any

import small
from ficpd.deployment import run_spec
from ficpd.deployment.run_spec import Terms
from ficpd.deployment.site import config as settings
from ficpd.deployment.site.site import Site
from ficpd.experiments.build import World, build_world
from ficpd.experiments.config import to_toml
from ficpd.experiments.setup import method_of, schedule_of
from ficpd.federation import codec
from ficpd.federation.codec import Call
from ficpd.federation.privacy_plan import private_seed
from ficpd.types import ClientCard, Setup

NOISED = ('privacy.name="record_gaussian"', "privacy.epsilon=4.0", "privacy.delta=1e-3")
POLICY: dict[str, Any] = {"epsilon": 10.0, "delta": 1e-3, "mechanisms": ["record_gaussian", "none"]}


def world(folder: Path, method: str = "fedavg", *changes: str) -> World:
    return build_world(small.experiment(folder, method, *changes))


def site(world: World, name: str, folder: Path, simulated: bool = True, **policy: Any) -> Site:
    """One of the world's clients as a site of its own."""
    experiment = world.experiment
    tree = {
        "name": name, "socket": folder / f"{name}.sock", "state": folder / name, "task": experiment.task,
        "data": experiment.data, "policy": POLICY | policy, "card": world.shards[name].metadata,
        "simulation": {"private_seed": private_seed(experiment.seed, name)} if simulated else None,
    }  # fmt: skip
    config = settings.SiteConfig.model_validate(tree)
    return Site(config, world.shards[name], world.task, world.model)


def recipe(world: World) -> str:
    """The experiment without records."""
    bare = world.experiment.model_copy(update={"data": None, "partition": None})
    return to_toml(bare)


def begun(world: World, rounds: int | None = None, run: str = "a" * 32) -> tuple[list[bytes], bytes]:
    """The orders of each round for site-0, from where everybody starts, and the run's terms."""
    method = method_of(world, world.experiment.method)
    schedule = schedule_of(world, method)
    cards = [ClientCard(name, shard.metadata) for name, shard in world.shards.items()]
    state = method.init(Setup(world.start, cards, schedule.num_rounds, schedule.cohort, schedule.seed))
    fingerprint = world.model.backbone.fingerprint
    orders = [
        codec.encode_assignment(method.assign(state, cards[0], round), fingerprint)
        for round in range(1, (rounds or schedule.num_rounds) + 1)
    ]
    said = Terms(world.experiment, recipe(world), "small.toml", list(world.shards), schedule, world.start, None)
    return orders, run_spec.encode(said)


def train(order: bytes, said: bytes = b"", run: str = "a" * 32) -> bytes:
    return codec.encode_call(Call("train", run, order, said))
