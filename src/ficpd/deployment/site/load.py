"""Builds a site from its TOML file: loads and splits records, checks labels, loads the backbone."""

from collections.abc import Callable
from pathlib import Path

from ficpd.backbones.loading import load_backbone
from ficpd.backbones.query_engine import QueryEngine
from ficpd.data import loading
from ficpd.deployment.site import config as settings
from ficpd.deployment.site.site import Site
from ficpd.interfaces import Task
from ficpd.tasks.build import build_task
from ficpd.types import ClientData


def load_records(config: settings.SiteConfig) -> tuple[Task, ClientData]:
    """Loads task and records, and checks that the labels fit. The train/test split is the same at every start."""
    task = build_task(config.task)
    data = loading.load(config.data, 0)
    task.targets([*data.train, *data.test])
    return task, ClientData(list(data.train), list(data.test), dict(config.card))


def build_site(file: Path, say: Callable[[str], None], rehearsal: bool = False) -> Site:
    """Builds the site. Loads the data before the backbone, so that a wrong column is found before a download.

    Raises `SiteError` for a site file with a private seed, unless this is a `rehearsal`.
    """
    config = settings.read(file)
    settings.check_rehearsal(config, file, rehearsal)
    if config.simulation:
        say(settings.rehearsal_warning([config.name]))
    task, shard = load_records(config)
    say(f"{config.name}: {len(shard.train)} records to learn from, {len(shard.test)} to test on")
    backbone, _ = load_backbone(config.backbone, config.engine)
    say(f"{config.name}: backbone {config.backbone.name}, {backbone.fingerprint}")
    exact = config.exact and backbone.supports_features  # a remote backbone chooses its batches
    engine = config.engine
    model = QueryEngine(backbone, engine.keep_mb << 20, engine.chunk_tokens, exact, engine.checkpoint)
    return Site(config, shard, task, model, (file.read_text(encoding="utf-8"), file.name), say)
