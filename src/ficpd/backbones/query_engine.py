"""Runs the backbone: answers queries with losses, gradients and outputs per record.

`QueryEngine.answer` batches the rows (candidate x record) of all queries into few forward passes. Each row has a copy of
its prompt, so one backward pass gives gradients per record. `run_queries` answers one client's generator;
`run_queries_lockstep` answers many, one query of each at a time.
"""

import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from itertools import groupby
from typing import TypeVar

import torch
from torch import Tensor

from ficpd.backbones.chunks import UNBATCHED, HiddenStateCache, bucket_by_shape, fill_chunk, shape_of
from ficpd.backbones.devices import copy_to, is_out_of_memory
from ficpd.backbones.lora import prompt_or_lora
from ficpd.backbones.memory import FEWEST_TOKENS, FULL_TOKENS, choose_chunk, least_tokens
from ficpd.backbones.output_cache import OUTPUT_BYTES, OutputCache, join_outputs
from ficpd.backbones.query_rows import Row, check_query, computation, kind, loss_key, merged, split
from ficpd.backbones.trials import Numbers, same_bits, with_random_numbers
from ficpd.errors import BackboneError, BackboneWarning, ConfigError
from ficpd.interfaces import Backbone
from ficpd.types import LORA, Answer, Batch, EncodedInput, ModelOutput, Query

Result = TypeVar("Result")
THREADS = torch.get_num_threads()
"""The number of torch threads at import."""


def set_single_threaded_forward() -> None:
    """Gives each forward pass on a CPU one thread; `QueryEngine` then runs `THREADS` of them in parallel.

    Chunks are small matrices, which gain little from threads. Their size does not depend on the number of cores. Call this
    before the first forward pass: torch keeps the kernels that it chose first.
    """
    torch.set_num_threads(1)


class QueryEngine:
    """Answers queries on one backbone.

    keep_bytes: the bytes of cached hidden states.
    chunk_tokens: the maximum positions of one forward pass; None: chosen by the free memory (`memory.choose_chunk`). If
        memory still runs out, the rows are halved and tried again.
    checkpoint: whether blocks are computed again in the backward; None: if memory is short.
    reproducible: on a CPU, a row's bits do not depend on the number of rows. Small chunks are filled up, because small
        products have other kernels. It takes time if queries have few rows.
    exact: a row has the same bits as in a separate forward pass. Rows of one shape share matrix products, and kernels
        differ in whether a row's bits depend on the number of rows. So each number of rows of a shape is compared once
        with separate passes, and rows share passes only if all bits agree (`trials`).

    On a CPU, outputs of rows are cached, unless `exact` (`OutputCache`).

    Guarantees: a row of an exact engine depends only on its record and prompt, as far as these trials show
    (`tests/backbones/test_query_engine.py`, `tests/contracts/test_alone.py`).
    """

    def __init__(
        self, backbone: Backbone, keep_bytes: int = 2 << 30, chunk_tokens: int | None = None, exact: bool = False,
        checkpoint: bool | None = None, reproducible: bool = False,
    ):  # fmt: skip
        self.backbone, self.exact, self.independent = backbone, exact, dict[tuple, bool]()
        local = backbone.device.type == "cpu" and backbone.supports_features  # remote backbones run in parallel anyway
        self.workers = THREADS if local and torch.get_num_threads() == 1 else 1
        if chunk_tokens is None:
            chunk_tokens, checkpoint = choose_chunk(backbone, self.workers, keep_bytes, checkpoint)
        if checkpoint is not None:
            backbone.checkpoint_blocks(checkpoint)
        least, below = least_tokens(backbone) if reproducible and not exact else (0, 0)
        self.chunk_tokens, self.checkpoint = chunk_tokens, checkpoint
        self.least_tokens = min(least, chunk_tokens)
        self.kept = HiddenStateCache(keep_bytes, UNBATCHED if exact else chunk_tokens, min(below, chunk_tokens))
        self.outputs = OutputCache(OUTPUT_BYTES if local and not exact else 0)

    def answer(self, queries: Sequence[Query]) -> list[Answer]:
        """Returns one `Answer` per query. Rows never see each other."""
        answers: dict[int, Answer] = {}
        kinds = sorted(range(len(queries)), key=lambda i: kind(queries[i]))
        for _, group in groupby(kinds, key=lambda i: kind(queries[i])):
            chosen = list(group)
            answers |= zip(chosen, self._answer_alike([queries[i] for i in chosen]), strict=True)
        return [answers[i] for i in range(len(queries))]

    def _answer_alike(self, queries: list[Query]) -> list[Answer]:
        """Answers queries of one prompt shape, layer and kind, in chunks of rows of one shape."""
        check_query(queries[0], self.backbone)
        if queries[0].grad and not self.backbone.supports_gradients:
            raise BackboneError(f"{self.backbone.name} gives no gradients; use a black-box optimizer (spsa, cma_es)")
        shapes = [[shape_of(items) for items in query.batch.items] for query in queries]
        rows = [
            Row(q, k, b, shape)
            for q, query in enumerate(queries)
            for k in range(len(query.prompts_KPD))
            for b, shape in enumerate(shapes[q])
        ]
        if not rows:  # a Poisson batch may be empty
            outputs = ModelOutput(torch.zeros(0, self.backbone.width))
            grads = [torch.zeros(0, *query.prompts_KPD.shape[1:]) if query.grad else None for query in queries]
            return [
                split(query, 0, torch.zeros(0), grad, outputs, []) for query, grad in zip(queries, grads, strict=True)
            ]
        heads = queries[0].batch.task.head_rows
        virtual = 0 if queries[0].batch.enters_at == LORA else queries[0].prompts_KPD.shape[1] - heads
        overhead = virtual + queries[0].max_new_tokens
        alone = self.exact and (queries[0].max_new_tokens > 0 or any(query.loss for query in queries))
        tokens = UNBATCHED if alone else self.tokens_per_chunk(rows, overhead)
        places, numbers = self._compute(queries, rows, tokens, overhead)
        losses, grads, outputs = zip(*numbers, strict=True)
        write = partial(self._written, queries)
        texts = [text for part in places for half in self._halved(write, [rows[r] for r in part]) for text in half]
        back = torch.tensor([r for part in places for r in part]).argsort()
        loss_R = torch.cat(losses)[back.to(losses[0].device)]
        grad_RPD = torch.cat(grads)[back.to(loss_R.device)] if queries[0].grad else None
        output_R = join_outputs(outputs).select(back) if queries[0].outputs else None
        text_R = [texts[place] for place in back.tolist()] if texts else []
        answers, first = [], 0
        for query in queries:
            answers.append(split(query, first, loss_R, grad_RPD, output_R, text_R))
            first += len(query.prompts_KPD) * len(query.batch)
        return answers

    def _compute(
        self, queries: list[Query], rows: list[Row], tokens: int, overhead: int
    ) -> tuple[list[list[int]], list[Numbers]]:
        """Returns the row indices of each chunk, and its numbers. The rows of cached outputs are the last chunk."""
        keys = self.outputs.keys(queries, [(row.query, row.candidate, row.record) for row in rows])
        known = self.outputs.find(keys)
        new = [r for r in range(len(rows)) if not known or keys[r] not in known]
        places = list(bucket_by_shape(new, lambda r: rows[r].shape, tokens, overhead))
        forward = partial(self._forward_exact if self.exact else self._forward_filled, queries, overhead=overhead)
        numbers = self._each(forward, [[rows[r] for r in part] for part in places], queries[0].batch)
        if keys and numbers:
            self.outputs.keep_rows([keys[r] for part in places for r in part], join_outputs([n[2] for n in numbers]))
        if known:
            places.append([r for r in range(len(rows)) if keys[r] in known])
            outputs = join_outputs([known[keys[r]] for r in places[-1]])
            with torch.no_grad():
                loss_R = self._losses(queries, [rows[r] for r in places[-1]], outputs)
            numbers.append((loss_R, None, outputs))
        return places, numbers

    def tokens_per_chunk(self, rows: list[Row], overhead: int) -> int:
        """Returns the maximum positions of a chunk. Few rows have smaller chunks, so that each worker has one."""
        if self.workers == 1:
            return self.chunk_tokens
        whole = sum(row.shape.positions(overhead) for row in rows)
        return min(self.chunk_tokens, max(FULL_TOKENS["cpu"], whole // (2 * self.workers)))

    def _each(self, work: Callable[[list[Row]], Result], parts: list[list[Row]], batch: Batch) -> list[Result]:
        """Runs `work` on all chunks, `workers` in parallel. LoRA chunks run one by one, because they change the model."""
        halved = partial(self._halved, work)
        if len(parts) == 1 or self.workers == 1 or batch.enters_at == LORA:
            return [result for part in parts for result in halved(part)]
        # the initializer applies torch's thread limit, which new threads would ignore
        with ThreadPoolExecutor(self.workers, initializer=torch.get_num_threads) as pool:
            return [result for results in pool.map(halved, parts) for result in results]

    def _halved(self, work: Callable[[list[Row]], Result], part: list[Row]) -> list[Result]:
        """Runs `work` on a chunk, or on its halves if memory runs out. Raises `BackboneError` if it does for one row."""
        try:
            return [work(part)]
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            if len(part) == 1:
                raise BackboneError(
                    f"engine.device = {str(self.backbone.device)!r}: memory ran out in a forward of one record, on "
                    f"{self.backbone.name}. Set engine.checkpoint = true, a smaller backbone.options.max_tokens or "
                    "another backbone"
                ) from error
        # outside of `except`: the error, which references the tensors of its frames, is freed
        half = len(part) // 2
        self.chunk_tokens = max(FEWEST_TOKENS, self.chunk_tokens // 2)
        warnings.warn(
            f"engine.device = {str(self.backbone.device)!r}: memory ran out in a forward of {len(part)} rows, which are "
            f"halved. Forwards now have {self.chunk_tokens} positions at most (engine.chunk_tokens)",
            BackboneWarning,
            stacklevel=2,
        )
        return self._halved(work, part[:half]) + self._halved(work, part[half:])

    def _forward_filled(self, queries: list[Query], part: list[Row], overhead: int) -> Numbers:
        """Runs one chunk with enough positions that a row's numbers do not depend on the number of rows."""
        whole = fill_chunk(part, part[0].shape, self.least_tokens, overhead)
        loss_R, grad_RPD, outputs = self._forward(queries, whole)
        if len(whole) == len(part):
            return loss_R, grad_RPD, outputs
        rows = torch.arange(len(part))
        return loss_R[rows], None if grad_RPD is None else grad_RPD[rows], outputs and outputs.select(rows)

    def _forward_exact(self, queries: list[Query], part: list[Row], overhead: int) -> Numbers:
        """Returns the numbers of one forward pass per row, or of a common pass with the same bits."""
        if len(part) > 1 and self._is_independent(queries, part):
            return self._forward(queries, part)
        return self._forward_alone(queries, part)

    def _is_independent(self, queries: list[Query], part: list[Row]) -> bool:
        """Tells whether rows of this shape and number have the same bits in a common pass. Tries it once."""
        kind = *computation(queries[0]), queries[0].batch.targets is None, part[0].shape, len(part)
        if kind not in self.independent:
            tried = [with_random_numbers(query) for query in queries]
            self.independent[kind] = same_bits(self._forward_alone(tried, part), self._forward(tried, part))
        return self.independent[kind]

    def _forward_alone(self, queries: list[Query], part: list[Row]) -> Numbers:
        losses, grads, outputs = zip(*(self._forward(queries, [row]) for row in part), strict=True)
        grad_RPD = torch.cat(grads) if queries[0].grad else None
        return torch.cat(losses), grad_RPD, join_outputs(outputs) if queries[0].outputs else None

    def _forward(self, queries: list[Query], part: list[Row]) -> Numbers:
        """Runs one chunk. Returns losses [R], and if requested gradients [R, P, D] and outputs."""
        grad = queries[0].grad
        prompts_RPD = self._prompts(queries, part).requires_grad_(grad)
        with torch.set_grad_enabled(grad), ExitStack() as until_backward:
            outputs = self._outputs(queries, part, prompts_RPD, until_backward)
            loss_R = self._losses(queries, part, outputs)
            if grad:
                loss_R.sum().backward()
        detached = ModelOutput(*(None if t is None else t.detach() for t in outputs.parts()))  # type: ignore[arg-type]
        return loss_R.detach(), prompts_RPD.grad, detached if queries[0].outputs else None

    def _prompts(self, queries: list[Query], part: list[Row]) -> Tensor:
        """Returns each row's copy of its prompt, [R, P, D], on the backbone's device; embeds prompts of words."""
        prompts_RPD = torch.stack([queries[row.query].prompts_KPD[row.candidate] for row in part]).detach()
        if not prompts_RPD.is_floating_point():
            assert self.backbone.vocabulary is not None, "check_query"
            return self.backbone.vocabulary.embed_for_prompt(prompts_RPD[..., 0])
        return copy_to(prompts_RPD, self.backbone.device, torch.float32)

    def _written(self, queries: list[Query], part: list[Row]) -> list[str]:
        """Generates the text after each record's first sequence; returns [] if the queries request none."""
        batch, tokens = queries[0].batch, queries[0].max_new_tokens
        if not tokens:
            return []
        prompts_RPD = self._prompts(queries, part)
        items = [queries[row.query].batch.items[row.record][0] for row in part]
        virtual = prompts_RPD.shape[1] - batch.task.head_rows
        with prompt_or_lora(self.backbone, prompts_RPD[:, :virtual], batch.enters_at) as (front_RPD, layer):
            return self.backbone.generate_greedy(front_RPD, items, layer, tokens)

    def _outputs(self, queries: list[Query], part: list[Row], prompts_RPD: Tensor, stack: ExitStack) -> ModelOutput:
        """Runs the backbone on each row's sequences and regroups the candidates of a record."""
        batch, device = queries[0].batch, self.backbone.device
        heads = batch.task.head_rows
        tokens_RPD = prompts_RPD[:, : prompts_RPD.shape[1] - heads]
        readout = self.backbone.head_to_readout(prompts_RPD[:, prompts_RPD.shape[1] - heads :]) if heads else None
        groups = [queries[row.query].batch.items[row.record] for row in part]
        items = [item for group in groups for item in group]
        if len(items) == len(part):
            outputs = self._run(tokens_RPD, items, batch.enters_at, stack)
            return ModelOutput(outputs.features_RD, outputs.scores_RN, readout)
        counts = torch.tensor([len(group) for group in groups], device=device)
        row_S = torch.arange(len(part), device=device).repeat_interleave(counts)
        outputs = self._run(tokens_RPD[row_S], items, batch.enters_at, stack)
        first_R = counts.cumsum(0) - counts
        scores = None
        if outputs.scores_RN is not None:
            column_S = torch.arange(len(items), device=device) - first_R[row_S]
            scores = outputs.scores_RN.new_full((len(part), int(counts.max())), -torch.inf)
            scores = scores.index_put((row_S, column_S), outputs.scores_RN[:, 0])
        return ModelOutput(outputs.features_RD[first_R], scores, readout)

    def _run(self, rows_SPD: Tensor, items: Sequence[EncodedInput], enters_at: int, stack: ExitStack) -> ModelOutput:
        """Runs the backbone on sequences, each with its virtual tokens or LoRA weights, which apply until `stack` ends."""
        front_SPD, layer = stack.enter_context(prompt_or_lora(self.backbone, rows_SPD, enters_at))
        return self.backbone.forward(front_SPD, self.kept.fetch(items, layer, self.backbone), items, layer)

    def _losses(self, queries: list[Query], part: list[Row], outputs: ModelOutput) -> Tensor:
        """Returns the losses [R] by each query's loss, else the task's; NaN without a target."""
        loss_R = outputs.features_RD.new_full((len(part),), torch.nan)
        by_loss: dict[tuple, list[int]] = {}
        for place, row in enumerate(part):
            by_loss.setdefault(loss_key(queries[row.query]), []).append(place)
        for places in by_loss.values():
            query = queries[part[places[0]].query]
            if query.batch.targets is None and query.loss is None:
                continue
            batch = merged(queries, [part[place] for place in places], self.backbone.device)
            chosen = torch.tensor(places, device=loss_R.device)
            whole = len(places) == len(part)
            loss = (query.loss or batch.task.loss)(outputs if whole else outputs.select(chosen), batch)
            name, shape = f"{type(batch.task).__name__}.loss", getattr(loss, "shape", None)
            if shape != (len(places),):
                given = f"a {type(loss).__name__}" if shape is None else f"the shape {tuple(shape)}"
                raise ConfigError(
                    f"{name} returned {given}; expected ({len(places)},): "
                    'one number a row, and no mean. Set reduction="none"'
                )
            if query.grad and not loss.requires_grad:
                raise ConfigError(
                    f"{name} has no gradient for the prompt; expected one. Use no detach, argmax or rounding"
                )
            loss_R = loss.float() if whole else loss_R.index_put((chosen,), loss.float())
        return loss_R


def run_queries(model: QueryEngine, work: Generator[Query, Answer, Result]) -> Result:
    """Answers one generator until it returns.

    Throws errors of the backbone into the generator, so that it can charge its ledger account.
    """
    try:
        query = next(work)
        while True:
            try:
                answer = model.answer([query])[0]
            except Exception as error:
                query = work.throw(error)
            else:
                query = work.send(answer)
    except StopIteration as end:
        return end.value


def run_queries_lockstep(
    model: QueryEngine, works: Mapping[str, Generator[Query, Answer, Result]]
) -> Iterator[tuple[str, Result | Exception]]:
    """Answers many generators in lock step, one query of each a turn; yields each result when it is ready.

    A generator's exception is its result, and the others continue. If the backbone raises, so does this function: the
    failing query cannot be attributed.
    """
    answers: dict[str, Answer | None] = dict.fromkeys(works)
    while answers:
        asked: dict[str, Query] = {}
        for name, answer in answers.items():
            try:
                asked[name] = works[name].send(answer)  # type: ignore[arg-type]  # None starts a generator
            except StopIteration as end:
                yield name, end.value
            except Exception as error:
                yield name, error
        answers = dict(zip(asked, model.answer(list(asked.values())), strict=True))
