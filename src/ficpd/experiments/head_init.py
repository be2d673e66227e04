"""Initializes a tuned head: from class means of public examples, from the answers' texts, or at random."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ficpd import rng
from ficpd.backbones.query_engine import QueryEngine
from ficpd.data import loading
from ficpd.errors import ConfigError, DataError
from ficpd.interfaces import Backbone, Task
from ficpd.types import Prompt, Query, Record

ROLES = ("text", "text_pair", "image", "target")


def init_head(task: Task, backbone: Backbone, examples: Sequence[Record] | None, seed: int) -> Tensor:
    """Returns [head_rows, D], each row of root mean square 1.

    Uses the class means of `examples` if given, else the answers' texts. A backbone without text encoder gets random rows.
    """
    if not task.head_rows:
        return torch.zeros(0, backbone.width)
    if examples is not None:
        rows_CD = class_means(task, backbone, examples)
    elif backbone.has_text_encoder:
        readout_CD = task.readout(backbone)
        if readout_CD is None:
            raise ConfigError(
                "task.tuned_head needs answers of one token each on this backbone. Choose shorter answer texts, or give "
                "prompt.head_examples"
            )
        rows_CD = readout_CD.float().cpu()
    else:
        rows_CD = torch.randn(task.head_rows, backbone.width, generator=rng.make_generator(seed, "head"))
    return rows_CD / rows_CD.square().mean(1, keepdim=True).sqrt()


def class_means(task: Task, backbone: Backbone, records: Sequence[Record]) -> Tensor:
    """Returns [C, D]: the mean feature of each label's examples, without a prompt.

    Nearest class mean: Snell et al., NeurIPS 2017, arXiv 1703.05175.

    Raises `ConfigError` for a task without labels, `DataError` for a label without an example.
    """
    labels = list(task.to_config().get("labels") or ())
    if not labels:
        raise ConfigError(
            f"prompt.head_examples: a {task.to_config()['name']} has no classes to take means of. Leave it out"
        )
    found = task.targets(records)
    if missing := [label for label in labels if label not in found]:
        raise DataError(
            f"prompt.head_examples: none of the {len(records)} records is {', '.join(missing)}. Give one or more of each"
        )
    nothing = Prompt(torch.zeros(task.head_rows, backbone.width), backbone.fingerprint, 0, task.head_rows)
    batch = replace(task.encode(records, backbone, nothing), targets=None)
    outputs = QueryEngine(backbone, 0).answer([Query(nothing.vectors_PD[None], batch, outputs=True)])[0].outputs_KB
    assert outputs is not None
    features_BD = outputs.features_RD.cpu()
    return torch.stack([features_BD[torch.tensor([one == label for one in found])].mean(0) for label in labels])


def examples(place: str, data: loading.Config) -> list[Record]:
    """Loads public labelled records with the clients' columns. Raises `ConfigError` for the clients' own records."""
    given, private = (Path(path).expanduser().resolve() for path in (place, data.source))
    if given.is_relative_to(private) or private.is_relative_to(given):
        raise ConfigError(
            f"prompt.head_examples = {place!r} has, or is in, data.source, the clients' private records. Keep public "
            "records apart from them"
        )
    columns = {role: column for role, column in data.columns.items() if role in ROLES}
    update = {"source": place, "columns": columns, "keep": (), "where": {}, "split_column": None, "dev_as_train": False}
    try:
        return loading.load_all(data.model_copy(update=update))
    except DataError as error:
        raise DataError(f"prompt.head_examples: {error}") from error
