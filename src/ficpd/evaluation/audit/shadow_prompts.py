"""Trains shadow prompts like the attacked prompt, on the attacker's records.

They estimate the loss of a record that was not trained on (Shokri et al., S&P 2017, arXiv 1610.05820).
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ficpd import rng
from ficpd.backbones.query_engine import QueryEngine
from ficpd.errors import PrivacyError
from ficpd.evaluation.evaluate import run_all
from ficpd.federation.client import Client, ClientSession
from ficpd.interfaces import Compression, Task
from ficpd.optimizers import LocalTrainingConfig, tune
from ficpd.privacy.none import NoPrivacy
from ficpd.types import Assignment, ClientCard, Prompt, Query, Readout, Record


def shadow_prompts(
    model: QueryEngine, task: Task, start: Prompt, compression: Compression,
    training: LocalTrainingConfig, pool: Sequence[Record],
    size: int, steps: int, batch_size: int, number: int, seed: int,
) -> Tensor:  # fmt: skip
    """Tunes `number` prompts without privacy, each on `size` random records of the pool. Returns [S, P, D].

    The prompts are tuned in lock step. The pool is encoded once, so they share the outputs of the lower layers.
    """
    if number < 1 or not 1 <= size <= len(pool):
        raise PrivacyError(f"shadow prompts = {number}, records = {size} of {len(pool)}: expected at least one of each")
    encoded, works = task.encode(pool, model.backbone, start), {}
    assignment = Assignment("shadow", 1, {}, {"rate": training.rate(1, 1)})
    for name in map(str, range(number)):
        places = torch.randperm(len(pool), generator=rng.make_generator(seed, "shadow", name))[:size].tolist()
        mine, private = [pool[i] for i in places], rng.derive_seed(seed, "private", name)
        client = Client(ClientCard(name), mine, [], task, model.backbone, NoPrivacy(), compression, start, private)
        client.set_encoding("train", encoded.select(places))
        session = ClientSession(client, 1)
        works[name] = tune(
            training, session, assignment, start.vectors_PD, steps=steps, batch_size=min(batch_size, size)
        )
    tuned = run_all(model, works)
    return torch.stack([tuned[name] for name in works]).detach().cpu()


def losses(
    model: QueryEngine, task: Task, prompts_SPD: Tensor, records: Sequence[Record], start: Prompt, at_once: int = 256,
    readout: Readout | None = None,
) -> np.ndarray:  # fmt: skip
    """Returns every record's loss under every prompt, [S, N].

    at_once: the number of records per query, which bounds the memory.
    readout: a learned readout that replaces the task's.
    """
    batch = task.encode(records, model.backbone, start).with_readout(readout)
    parts = [batch.select(range(first, min(first + at_once, len(batch)))) for first in range(0, len(batch), at_once)]
    answers = [model.answer([Query(prompts_SPD, part)])[0].loss_KB.cpu() for part in parts]
    return torch.cat(answers, dim=1).double().numpy() if answers else np.zeros((len(prompts_SPD), 0))
