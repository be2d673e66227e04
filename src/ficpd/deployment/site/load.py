"""From a site's TOML file to a site: records read and divided, backbone loaded, labels checked."""

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
    """Task and records, once it is known that they fit. The division into train and test is the same at every start."""
    task = build_task(config.task)
    data = loading.load(config.data, 0)
    task.targets([*data.train, *data.test])
    return task, ClientData(list(data.train), list(data.test), dict(config.card))


def build_site(file: Path, say: Callable[[str], None]) -> Site:
    """Data first: a wrong column should not cost a download."""
    config = settings.read(file)
    task, shard = load_records(config)
    say(f"{config.name}: {len(shard.train)} records to learn from, {len(shard.test)} to test on")
    backbone, _ = load_backbone(config.backbone, config.engine)
    say(f"{config.name}: backbone {config.backbone.name}, {backbone.fingerprint}")
    here = backbone.supports_features  # an address batches by itself
    wide = config.chunk_tokens if here else config.engine.chunk_tokens
    model = QueryEngine(backbone, config.engine.keep_mb << 20, wide)
    return Site(config, shard, task, model, (file.read_text(encoding="utf-8"), file.name), say)
