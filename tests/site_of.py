"""One client of a small world as a site of its own, and the orders that it would be sent."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import small
from ficpd.deployment import run_spec
from ficpd.deployment.certificates import create_signing_key
from ficpd.deployment.run_spec import RunSpec
from ficpd.deployment.site import config as settings
from ficpd.deployment.site.site import Site
from ficpd.experiments.build import ExperimentContext, build_context
from ficpd.experiments.config import to_toml
from ficpd.experiments.setup import build_method, build_schedule
from ficpd.federation import codec
from ficpd.federation.codec import SiteRequest
from ficpd.federation.privacy_plan import private_seed
from ficpd.types import ClientCard, FederationInfo

NOISED = ('privacy.name="record_gaussian"', "privacy.epsilon=4.0", "privacy.delta=1e-3")
POLICY: dict[str, Any] = {"epsilon": 10.0, "delta": 1e-3, "mechanisms": ["record_gaussian", "none"]}


def context(folder: Path, method: str = "fedavg", *changes: str) -> ExperimentContext:
    return build_context(small.experiment(folder, method, *changes))


def site(context: ExperimentContext, name: str, folder: Path, simulated: bool = True, **policy: Any) -> Site:
    """One of the world's clients as a site of its own."""
    experiment = context.experiment
    tree = {
        "name": name, "socket": folder / f"{name}.sock", "state": folder / name, "task": experiment.task,
        "data": experiment.data, "policy": POLICY | policy, "card": context.shards[name].metadata,
        "simulation": {"private_seed": private_seed(experiment.seed, name)} if simulated else None,
        "secure_sum": {"key": folder / f"{name}.key", "known": folder / "keys"} if (folder / "keys").exists() else None,
    }  # fmt: skip
    config = settings.SiteConfig.model_validate(tree)
    return Site(config, context.shards[name], context.task, context.model)


def signing_keys(names: Iterable[str], folder: Path) -> None:
    """Writes what `ficpd deploy init --secure-aggregation` hands to each site."""
    (folder / "keys").mkdir()
    for name in names:
        private, public = create_signing_key()
        (folder / f"{name}.key").write_bytes(private)
        (folder / "keys" / f"{name}.pub").write_bytes(public)


def recipe(context: ExperimentContext) -> str:
    """The experiment without records."""
    bare = context.experiment.model_copy(update={"data": None, "partition": None})
    return to_toml(bare)


def begun(context: ExperimentContext, rounds: int | None = None, run: str = "a" * 32) -> tuple[list[bytes], bytes]:
    """The orders of each round for site-0, from where everybody starts, and the run's terms."""
    method = build_method(context, context.experiment.method)
    schedule = build_schedule(context, method)
    cards = [ClientCard(name, shard.metadata) for name, shard in context.shards.items()]
    state = method.init(FederationInfo(context.start, cards, schedule.num_rounds, schedule.cohort, schedule.seed))
    fingerprint = context.model.backbone.fingerprint
    asked = [method.make_assignment(state, cards[0], round) for round in range(1, (rounds or schedule.num_rounds) + 1)]
    orders = [codec.encode_assignment(order, fingerprint) for order in asked]
    names, start = list(context.shards), context.start
    said = RunSpec(context.experiment, recipe(context), "small.toml", names, schedule, start, None)
    return orders, run_spec.encode(said)


def train(order: bytes, said: bytes = b"", run: str = "a" * 32) -> bytes:
    return codec.encode_call(SiteRequest("train", run, order, said))


class Nobody:
    """An engine that must not be waited for."""

    def gather(self, known):
        raise AssertionError("waits for sites")
