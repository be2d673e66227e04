"""Rows of queries: which queries share a forward pass, and how rows become batches and answers."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ficpd.backbones.chunks import Shape
from ficpd.backbones.devices import copy_to
from ficpd.errors import BackboneError
from ficpd.interfaces import Backbone
from ficpd.types import Answer, Batch, ModelOutput, Query


@dataclass(frozen=True, slots=True)
class Row:
    """One candidate on one record, by its numbers in the queries, and its shape."""

    query: int
    candidate: int
    record: int
    shape: Shape


def kind(query: Query) -> tuple:
    """Returns the key of queries that can share a forward pass: `computation` and requested results."""
    return *computation(query), query.outputs, query.max_new_tokens


def computation(query: Query) -> tuple:
    """Returns the key of a row's kernels, without its shape: layer, prompt length and type, head rows, gradients."""
    prompts = query.prompts_KPD.shape[1], query.prompts_KPD.is_floating_point()
    return query.batch.enters_at, *prompts, query.batch.task.head_rows, query.grad


def check_query(query: Query, backbone: Backbone) -> None:
    """Raises `BackboneError` for contradictory requests, and for prompts of words that the backbone cannot read."""
    if query.max_new_tokens < 0:
        raise BackboneError(f"a query cannot write {query.max_new_tokens} tokens; expected 0 or more")
    if query.max_new_tokens and query.grad:
        raise BackboneError(
            f"a query asks for gradients and for {query.max_new_tokens} written tokens, which have none; ask twice"
        )
    if query.prompts_KPD.is_floating_point():
        return
    if backbone.vocabulary is None:
        raise BackboneError(f"{backbone.name} has no vocabulary for prompts of words; use a backbone that reads texts")
    if query.grad or query.batch.enters_at != 0 or query.batch.task.head_rows or query.prompts_KPD.shape[-1] != 1:
        raise BackboneError(
            f"a prompt of words is [K, P, 1] and enters {backbone.name} at layer 0, without gradients or a tuned head; "
            f"given {tuple(query.prompts_KPD.shape)}, layer {query.batch.enters_at}, {query.batch.task.head_rows} head "
            f"rows, gradients {query.grad}"
        )


def loss_key(query: Query) -> tuple:
    readout = query.batch.readout_CD
    return id(query.batch.task), id(readout), id(query.loss), query.batch.targets is None, *sorted(query.batch.extra)


def merged(queries: list[Query], part: list[Row], device: torch.device) -> Batch:
    """Returns the records of these rows as one batch on the backbone's device."""
    first = queries[part[0].query].batch
    batches = [(queries[row.query].batch, row.record) for row in part]
    targets = [batch.targets[b] for batch, b in batches if batch.targets is not None]

    def rows(tensors: list[Tensor]) -> Tensor:
        return copy_to(torch.stack(tensors), device)

    return Batch(
        first.task,
        tuple(batch.items[b] for batch, b in batches),
        rows(targets) if targets else None,
        first.readout_CD,
        first.enters_at,
        {name: rows([batch.extra[name][b] for batch, b in batches]) for name in first.extra},
    )


def split(
    query: Query, first: int, loss_R: Tensor, grad_RPD: Tensor | None, outputs: ModelOutput | None, text_R: list[str]
) -> Answer:
    """Extracts one query's rows as [K, B, ...]."""
    K, B = len(query.prompts_KPD), len(query.batch)
    texts = [text_R[first + k * B : first + (k + 1) * B] for k in range(K)] if query.max_new_tokens else None
    rows = slice(first, first + K * B)
    return Answer(
        loss_R[rows].view(K, B),
        None if grad_RPD is None else grad_RPD[rows].view(K, B, *grad_RPD.shape[1:]),
        None if outputs is None or not query.outputs else outputs.select(torch.arange(first, first + K * B)),
        texts,
    )
