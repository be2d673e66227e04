"""Tries whether a site's records may share forward passes."""

import torch

from ficpd.backbones.query_engine import QueryEngine
from ficpd.interfaces import Task
from ficpd.tasks import synthetic_lengths, with_synthetic_answers
from ficpd.types import Prompt, Query

PROMPTS = 8
"""Prompts of each synthetic record, so that chunks are full."""


def verify_rows(model: QueryEngine, task: Task, start: Prompt) -> str:
    """Verifies queries with and without gradients on synthetic records of all lengths (`QueryEngine.verify`).

    Returns the result in words. No record of the site is read.
    """
    backbone = model.backbone
    records = with_synthetic_answers(task, synthetic_lengths(backbone, 0))
    prompts_KPD = start.vectors_PD * torch.linspace(0.9, 1.1, PROMPTS)[:, None, None]
    query = Query(prompts_KPD, task.encode(records, backbone, start))
    found = [model.verify(query._replace(grad=grad)) for grad in sorted({False, backbone.supports_gradients})]
    if all(found):
        return "records share forward passes; on this processor none changes another's numbers, to the last bit"
    return "each record has a forward pass of its own, so that no other record changes its numbers"
