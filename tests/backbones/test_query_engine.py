"""One answer per question, whatever the chunks, the company and what is kept."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import small
from ficpd.backbones import memory, query_engine
from ficpd.backbones.chunks import UNBATCHED, HiddenStateCache, Shape, bucket_by_shape, shape_of
from ficpd.backbones.query_engine import QueryEngine, run_queries, run_queries_lockstep
from ficpd.backbones.query_rows import Row
from ficpd.errors import BackboneError
from ficpd.tasks.build import build_task
from ficpd.types import Answer, EncodedInput, ModelOutput, Query, Readout, Record, padded_length


def prompts(count: int, length: int = 3, seed: int = 0, width: int = 16) -> torch.Tensor:
    return torch.randn(count, length, width, generator=torch.Generator().manual_seed(seed))


def batch_of(model: QueryEngine, task, count: int = 6, seed: int = 0, enters_at: int = 1):
    name = task.to_config()["name"]
    made = (
        small.questions(count, seed)
        if name == "multiple_choice"
        else small.records(count, seed, real=name == "regression")
    )
    return task.encode(made, model.backbone, small.start(model, task, 3, enters_at))


def agree(left: Answer, right: Answer) -> bool:
    """Losses, gradients and outputs; NaN where the other has NaN."""
    pairs = [(left.loss_KB, right.loss_KB), (left.grad_KBPD, right.grad_KBPD)]
    if left.outputs_KB is not None and right.outputs_KB is not None:
        pairs += zip(left.outputs_KB.parts(), right.outputs_KB.parts(), strict=True)
    assert (left.outputs_KB is None) == (right.outputs_KB is None)
    return all(
        (a is None and b is None) or (a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=1e-5, equal_nan=True))
        for a, b in pairs
    )


def mixed(model: QueryEngine) -> list[Query]:
    """All that can differ between questions: task, prompt length, layer, candidates, head, gradients, outputs, loss."""
    classes, numbers, head = small.classes(), small.numbers(), small.classes(tuned_head=True)
    own = batch_of(model, classes, 3, 5)
    return [
        Query(prompts(2), batch_of(model, classes), grad=True),
        Query(prompts(1, 5), batch_of(model, classes, 4, 1), grad=True),
        Query(prompts(3), batch_of(model, numbers, 5), grad=True),
        Query(prompts(1), batch_of(model, classes, enters_at=0), grad=True),
        Query(prompts(1, 5), batch_of(model, head), grad=True, outputs=True),
        Query(prompts(2), batch_of(model, numbers), outputs=True),
        Query(prompts(1), batch_of(model, classes, 2, 3)),
        Query(prompts(1, 0), batch_of(model, classes, 2, 3), outputs=True),
        Query(prompts(2), own, grad=True, loss=lambda outputs, batch: outputs.features_RD[:, 0] * 3),
    ]


def test_mixed_questions_are_answered_as_each_alone(model):
    queries = mixed(model)
    together = model.answer(queries)
    for query, answer in zip(queries, together, strict=True):
        K, B, shape = len(query.prompts_KPD), len(query.batch), query.prompts_KPD.shape[1:]
        assert answer.loss_KB.shape == (K, B)
        assert query.grad == (answer.grad_KBPD is not None)
        assert not query.grad or answer.grad_KBPD.shape == (K, B, *shape)
        assert query.outputs == (answer.outputs_KB is not None)
        assert not query.outputs or answer.outputs_KB.features_RD.shape == (K * B, 16)
        assert agree(QueryEngine(model.backbone).answer([query])[0], answer)


def test_the_order_of_questions_only_orders_the_answers(model):
    queries = mixed(model)
    turned = model.answer(queries[::-1])[::-1]
    assert all(agree(ours, theirs) for ours, theirs in zip(model.answer(queries), turned, strict=True))


@pytest.mark.parametrize("chunk_tokens", [1, 20, 45, 10_000])
def test_chunks_do_not_change_the_answers(model, chunk_tokens):
    chunks = QueryEngine(model.backbone, chunk_tokens=chunk_tokens)
    pairs = zip(model.answer(mixed(model)), chunks.answer(mixed(model)), strict=True)
    assert all(agree(ours, theirs) for ours, theirs in pairs)


def test_a_forward_stays_within_its_tokens(model, monkeypatch):
    seen = []
    above = model.backbone.forward

    def watched(prompts_SPD, hidden, items, layer):
        seen.append((len(items), prompts_SPD.shape[1] + max(item.length for item in items)))
        return above(prompts_SPD, hidden, items, layer)

    query = Query(prompts(3), batch_of(model, small.classes(), 12), grad=True)
    monkeypatch.setattr(model.backbone, "forward", watched)
    QueryEngine(model.backbone, chunk_tokens=45).answer([query])
    assert sum(rows for rows, _ in seen) == 36
    assert all(rows * longest <= 45 for rows, longest in seen)
    assert len(seen) < 18
    seen.clear()
    QueryEngine(model.backbone, chunk_tokens=1).answer([query])
    assert [rows for rows, _ in seen] == [1] * 36


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("enters_at", [0, 1])
def test_a_row_that_is_alone_is_the_same_to_the_bit_whoever_else_is_asked_about(dtype, enters_at):
    """What a clip bounds at a site: a record's own row, of which no other record is a part."""
    backbone, task = small.backbone(width=64, dtype=dtype), small.classes()

    def rows(places: list[int]) -> torch.Tensor:
        model = QueryEngine(backbone, chunk_tokens=UNBATCHED)
        records = small.records(24)
        batch = task.encode([records[p] for p in places], backbone, small.start(model, task, 3, enters_at))
        answer = model.answer([Query(prompts(2, width=64), batch, grad=True)])[0]
        assert answer.grad_KBPD is not None
        return torch.cat([answer.loss_KB[..., None], answer.grad_KBPD.flatten(2)], dim=2)

    everybody, without = list(range(24)), [*range(23, 9, -1), *range(9)]
    assert torch.equal(rows(everybody)[:, without], rows(without))


def test_bucket_by_shape_mixed_lengths_gives_chunks_of_one_shape_and_loses_nothing():
    items = [EncodedInput(torch.zeros(n), n) for n in (1, 9, 8, 2, 20, 3, 8, 16)]
    parts = list(bucket_by_shape(items, lambda item: shape_of([item]), 20, overhead=1))
    assert [[i.length for i in part] for part in parts] == [[1, 2], [3], [8, 8], [9], [16], [20]]
    assert list(bucket_by_shape([], lambda item: shape_of([item]), 10)) == []


def widths(engine: QueryEngine, query: Query, monkeypatch) -> list[int]:
    """The number of sequences in each forward pass."""
    found, own = [], engine.backbone.forward
    with monkeypatch.context() as patch:
        patch.setattr(
            engine.backbone, "forward", lambda p, h, items, n: (found.append(len(items)), own(p, h, items, n))[1]
        )
        engine.answer([query])
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grad", [False, True])
def test_exact_independent_kernels_let_rows_share_a_forward_after_one_trial(dtype, grad, monkeypatch):
    engine = QueryEngine(small.backbone(width=64, dtype=dtype), exact=True)
    query = Query(prompts(2, width=64), batch_of(engine, small.classes()), grad=grad)
    assert sorted(widths(engine, query, monkeypatch)) == [1] * 12 + [12] * 2  # the trial, and the answer
    assert widths(engine, query, monkeypatch) == [12]
    assert max(widths(engine, query._replace(loss=query.batch.task.loss), monkeypatch)) == 1
    fewer = query._replace(batch=query.batch.select([0, 1, 2]))
    assert sorted(widths(engine, fewer, monkeypatch)) == [1] * 6 + [6] * 2
    assert sorted(widths(engine, query._replace(grad=not grad), monkeypatch)) == [1] * 12 + [12] * 2


def test_exact_rows_that_see_one_another_are_computed_alone(monkeypatch):
    engine = QueryEngine(small.backbone(width=64), exact=True)
    query, own = Query(prompts(2, width=64), batch_of(engine, small.classes()), outputs=True), engine.backbone.forward

    def mixing(prompts_SPD, hidden, items, layer):
        return ModelOutput(own(prompts_SPD, hidden, items, layer).features_RD + 1e-6 * (len(items) > 1))

    monkeypatch.setattr(engine.backbone, "forward", mixing)
    expected = QueryEngine(engine.backbone, chunk_tokens=UNBATCHED).answer([query])[0]
    for _ in range(2):
        assert torch.equal(engine.answer([query])[0].loss_KB, expected.loss_KB)
    assert max(widths(engine, query, monkeypatch)) == 1


@pytest.mark.parametrize("hidden", ["readout", "prior"])
@pytest.mark.parametrize("grad", [False, True])
def test_exact_a_trial_does_not_depend_on_what_a_server_sends(hidden, grad, monkeypatch):
    """A readout of zeros, or a prior that is far larger than any logit, makes all rows equal, alone and together."""
    engine = QueryEngine(small.backbone(width=64), exact=True)
    batch, own = batch_of(engine, small.classes()), engine.backbone.forward
    assert batch.readout_CD is not None
    labels = len(batch.readout_CD)
    zeros = Readout(torch.zeros(labels, 64), torch.zeros(labels), torch.full((labels,), 1 / labels))
    sent = batch.with_readout(zeros) if hidden == "readout" else batch.with_prior(torch.full((labels,), 1e12))

    def mixing(prompts_SPD, hidden, items, layer):
        return ModelOutput(own(prompts_SPD, hidden, items, layer).features_RD * (1 + 1e-5 * (len(items) > 1)))

    monkeypatch.setattr(engine.backbone, "forward", mixing)
    query = Query(prompts(2, width=64), batch, grad=grad)
    expected = QueryEngine(engine.backbone, chunk_tokens=UNBATCHED).answer([query])[0]
    engine.answer([query._replace(batch=sent)])
    found = engine.answer([query])[0]
    assert torch.equal(found.loss_KB, expected.loss_KB)
    assert not grad or torch.equal(found.grad_KBPD, expected.grad_KBPD)


def test_candidates_are_answered_in_their_order(model):
    batch, candidates = batch_of(model, small.classes()), prompts(4)
    answer = model.answer([Query(candidates, batch, grad=True, outputs=True)])[0]
    for k in range(4):
        alone = model.answer([Query(candidates[k : k + 1], batch, grad=True, outputs=True)])[0]
        assert small.close(answer.loss_KB[k], alone.loss_KB[0])
        assert small.close(answer.grad_KBPD[k], alone.grad_KBPD[0])
        assert small.close(answer.outputs_KB.features_RD[6 * k : 6 * k + 6], alone.outputs_KB.features_RD)


@pytest.fixture
def three_cores(monkeypatch):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(query_engine, "THREADS", 3)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("three_cores")
def test_answers_agree_on_any_number_of_cores(model):
    spread, alone = (QueryEngine(model.backbone, chunk_tokens=25) for _ in range(2))
    assert spread.workers == 3
    alone.workers = 1
    queries = [Query(prompts(3), batch_of(model, small.classes()), grad=True, outputs=True)]
    assert agree(spread.answer(queries)[0], alone.answer(queries)[0])


@pytest.mark.usefixtures("three_cores")
def test_a_backbone_somewhere_else_is_asked_by_one_thread(model):
    """It bounds its own questions, and would count twice what two threads ask at once."""
    elsewhere = SimpleNamespace(device=model.backbone.device, supports_features=False)
    assert QueryEngine(elsewhere).workers == 1


def test_a_record_asked_for_twice_is_answered_twice(model):
    batch, prompt = batch_of(model, small.classes()), prompts(1)
    answer = model.answer([Query(prompt, batch.select([2, 0, 2]), grad=True)])[0]
    whole = model.answer([Query(prompt, batch, grad=True)])[0]
    assert small.close(answer.loss_KB[0], whole.loss_KB[0, [2, 0, 2]])
    assert small.close(answer.grad_KBPD[0], whole.grad_KBPD[0, [2, 0, 2]])


def test_an_own_loss_sees_each_records_own_extra(model):
    task = small.classes()
    batch = batch_of(model, task, 6)
    teacher = torch.arange(12.0).view(6, 2)
    batch = type(batch)(task, batch.items, batch.targets, batch.readout_CD, batch.enters_at, {"teacher": teacher})

    def told(outputs, given):
        assert len(outputs.features_RD) == len(given) == len(given.extra["teacher"]) == len(given.targets)
        return given.extra["teacher"].sum(1) + 100 * given.targets

    expected = teacher.sum(1) + 100 * batch.targets
    for chunk_tokens in (1, 25, 10_000):
        model = QueryEngine(model.backbone, chunk_tokens=chunk_tokens)
        plain = Query(prompts(1), batch_of(model, task, 3, 7))
        parts = [plain, Query(prompts(2), batch, loss=told), Query(prompts(1), batch.select([5, 1]), loss=told)]
        answers = model.answer(parts)
        assert torch.equal(answers[1].loss_KB, expected.expand(2, 6))
        assert torch.equal(answers[2].loss_KB[0], expected[[5, 1]])
        assert small.close(answers[0].loss_KB, model.answer([plain])[0].loss_KB)


def test_an_own_loss_has_its_own_gradient(model):
    task = small.classes()
    batch, prompt = batch_of(model, task), prompts(1)
    scaled = Query(prompt, batch, grad=True, loss=lambda outputs, given: 2 * task.loss(outputs, given))
    twice, once = model.answer([scaled, Query(prompt, batch, grad=True)])
    assert small.close(twice.loss_KB, 2 * once.loss_KB)
    assert small.close(twice.grad_KBPD, 2 * once.grad_KBPD)


def test_an_own_loss_needs_no_target(model):
    bare = [Record("a", {"text": "the film was good"}), Record("b", {"text": "bad"})]
    batch = small.classes().encode(bare, model.backbone, small.start(model, small.classes()))
    query = Query(prompts(1), batch, grad=True, loss=lambda outputs, given: outputs.features_RD.sum(1))
    answer = model.answer([query])[0]
    assert torch.isfinite(answer.loss_KB).all()
    assert answer.grad_KBPD.abs().max() > 0


def writing(decoder: QueryEngine, enters_at: int = 1) -> list[Query]:
    """Questions that write, longer and shorter, several candidates, one with a head, beside one that does not."""
    labels = {"good": "positive", "bad": "negative"}
    head = build_task({"name": "classification", "labels": labels, "tuned_head": True})
    bare, sentences = build_task({"name": "classification", "labels": labels}), small.records(5)
    starts = {task: small.start(decoder, task, 4, enters_at) for task in (head, bare)}
    batches = {task: task.encode(sentences, decoder.backbone, start) for task, start in starts.items()}
    return [
        Query(prompts(3, 4, width=32), batches[bare], max_new_tokens=6),
        Query(prompts(1, 4, seed=1, width=32), batches[bare].select([4, 0]), max_new_tokens=6),
        Query(prompts(1, 4, width=32), batches[bare], max_new_tokens=2),
        Query(prompts(1, 4, width=32), batches[bare], outputs=True, max_new_tokens=6),
        Query(prompts(2, 6, width=32), batches[head], max_new_tokens=3),
        Query(prompts(2, 4, width=32), batches[bare], outputs=True),
        Query(prompts(1, 4, width=32), batches[bare], grad=True),
        Query(prompts(2, 0, width=32), batches[bare], max_new_tokens=6),
        Query(prompts(2, 4, width=32), batches[bare].select([]), max_new_tokens=6),
    ]


@pytest.mark.parametrize("chunk_tokens", [1, 60, 10_000])
def test_each_row_is_written_after_its_record_behind_its_own_prompt(decoder, chunk_tokens):
    queries = writing(decoder)
    answers = QueryEngine(decoder.backbone, chunk_tokens=chunk_tokens).answer(queries)
    for query, answer in zip(queries, answers, strict=True):
        assert (answer.texts_KB is None) == (query.max_new_tokens == 0)
        assert answer.loss_KB.shape == (len(query.prompts_KPD), len(query.batch))
        assert (answer.outputs_KB is None) == (not query.outputs)
        if answer.texts_KB is None:
            continue
        assert len(answer.texts_KB) == len(query.prompts_KPD)
        virtual = query.prompts_KPD.shape[1] - query.batch.task.head_rows
        for prompt, texts in zip(query.prompts_KPD[:, :virtual], answer.texts_KB, strict=True):
            write, most = decoder.backbone.generate_greedy, query.max_new_tokens
            alone = [write(prompt[None], [items[0]], 1, most)[0] for items in query.batch.items]
            assert texts == alone
    assert len({text for texts in answers[0].texts_KB for text in texts}) > 3
    assert answers[-1].texts_KB == [[], []]
    losses = decoder.answer([query._replace(max_new_tokens=0) for query in queries])
    assert all(small.close(ours.loss_KB, theirs.loss_KB) for ours, theirs in zip(answers, losses, strict=True))


def test_a_forward_that_writes_leaves_room_for_the_text(decoder, monkeypatch):
    seen, write = [], decoder.backbone.generate_greedy

    def watched(prompts_SPD, items, layer, max_tokens):
        seen.append(len(items) * (prompts_SPD.shape[1] + max(item.length for item in items) + max_tokens))
        return write(prompts_SPD, items, layer, max_tokens)

    monkeypatch.setattr(decoder.backbone, "generate_greedy", watched)
    QueryEngine(decoder.backbone, chunk_tokens=60).answer(writing(decoder)[:1])
    assert 1 < len(seen) < 15
    assert max(seen) <= 60


def test_writing_that_cannot_be_is_refused(model, decoder):
    query = Query(prompts(1), batch_of(model, small.classes()), max_new_tokens=4)
    with pytest.raises(BackboneError, match="tiny cannot write"):
        model.answer([query])
    with pytest.raises(BackboneError, match=r"gradients and for 4 written tokens.*ask twice"):
        decoder.answer([writing(decoder)[0]._replace(grad=True, max_new_tokens=4)])
    with pytest.raises(BackboneError, match="cannot write -1 tokens"):
        decoder.answer([writing(decoder)[0]._replace(max_new_tokens=-1)])


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside others"])
def test_an_empty_batch_has_empty_answers_of_the_right_shapes(model, beside):
    """A Poisson batch may hold nobody."""
    task = small.classes(tuned_head=True)
    whole = batch_of(model, task)
    for grad in (False, True):
        others = [Query(prompts(2, 5), whole, grad=grad)] if beside else []
        answer = model.answer([Query(prompts(3, 5), whole.select([]), grad=grad), *others])[0]
        assert answer.loss_KB.shape == (3, 0)
        assert (answer.grad_KBPD.shape == (3, 0, 5, 16)) if grad else answer.grad_KBPD is None


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside others"])
def test_an_empty_batch_has_empty_outputs(model, beside):
    task = small.classes()
    whole = batch_of(model, task)
    others = [Query(prompts(1), whole, outputs=True)] if beside else []
    answer = model.answer([Query(prompts(2), whole.select([]), outputs=True), *others])[0]
    assert answer.outputs_KB is not None
    assert answer.outputs_KB.features_RD.shape == (0, 16)
    assert task.predict(answer, whole.select([])) == []


def test_no_question_has_no_answer(model):
    assert model.answer([]) == []


def test_without_targets_the_loss_is_not_known_but_the_outputs_are(model):
    task = small.classes()
    bare = [Record(record.key, {"text": record.fields["text"]}) for record in small.records(6)]
    unknown = task.encode(bare, model.backbone, small.start(model, task))
    known = Query(prompts(2), batch_of(model, task), outputs=True)
    ours, theirs = model.answer([Query(prompts(2), unknown, outputs=True), known])
    assert torch.isnan(ours.loss_KB).all()
    assert torch.isfinite(theirs.loss_KB).all()
    assert small.close(ours.outputs_KB.features_RD, theirs.outputs_KB.features_RD)


def test_a_backbone_without_gradients_refuses_to_give_any(model, monkeypatch):
    batch = batch_of(model, small.classes())
    monkeypatch.setattr(model.backbone, "supports_gradients", False, raising=False)
    with pytest.raises(BackboneError, match=r"tiny gives no gradients; use a black-box optimizer"):
        model.answer([Query(prompts(1), batch, grad=True)])
    assert model.answer([Query(prompts(1), batch)])[0].loss_KB.shape == (1, 6)


def test_the_backbone_and_the_prompts_are_left_as_they_were(model):
    given = prompts(1)
    before, weights = given.clone(), [weight.clone() for weight in model.backbone.blocks.parameters()]
    model.answer([Query(given, batch_of(model, small.classes()), grad=True)])
    assert torch.equal(given, before)
    assert not given.requires_grad
    pairs = zip(weights, model.backbone.blocks.parameters(), strict=True)
    assert all(torch.equal(old, new) and new.grad is None for old, new in pairs)


def counted(backbone, monkeypatch) -> list[int]:
    calls: list[int] = []
    below = backbone.encode_prefix
    monkeypatch.setattr(backbone, "encode_prefix", lambda items, layer: calls.append(len(items)) or below(items, layer))
    return calls


def test_lower_layers_are_run_once_per_record_and_layer(model, monkeypatch):
    batch = batch_of(model, small.classes())
    calls = counted(model.backbone, monkeypatch)
    for seed in range(3):
        model.answer([Query(prompts(2, seed=seed), batch, grad=True), Query(prompts(1), batch.select([1, 1]))])
    assert sum(calls) == 6
    model.kept.fetch([items[0] for items in batch.items], 0, model.backbone)
    assert sum(calls) == 12


@pytest.mark.parametrize("limit", [0, 100, 900, 2000, 1 << 20])
def test_what_is_kept_stays_within_its_bytes_and_changes_nothing(model, limit):
    batch = batch_of(model, small.classes(), 12)
    items, kept = [records[0] for records in batch.items], HiddenStateCache(limit, 512)
    truth = {item: model.backbone.encode_prefix([item], 1)[0] for item in items}
    for seed in range(4):
        asked = small.shuffled(items, seed)[: 4 + seed]
        found = kept.fetch(asked, 1, model.backbone)
        assert all(small.close(state, truth[item]) for item, state in zip(asked, found, strict=True))
        states = [state for state, _ in kept.values.values()]
        assert kept.size == sum(state.nbytes for state in states) <= limit
        assert kept.size == sum(state.untyped_storage().nbytes() for state in states)
    assert (len(kept.values) == 0) == (limit <= 100)
    small_model = QueryEngine(model.backbone, keep_bytes=limit)
    for seed in range(2):
        query = Query(prompts(1, seed=seed), batch, grad=True)
        assert agree(small_model.answer([query])[0], model.answer([query])[0])


@pytest.mark.parametrize("task", [small.classes(), small.choices()], ids=["readout", "likelihoods"])
def test_answer_of_known_rows_has_their_bits_and_runs_new_ones_alone(model, monkeypatch, task):
    batch, asked = batch_of(model, task, 6), prompts(2)
    fresh = QueryEngine(model.backbone)
    fresh.outputs.limit = 0
    model.answer([Query(asked[:1], batch.select(range(4)), outputs=True)])
    rows, forward = [], model._forward
    monkeypatch.setattr(model, "_forward", lambda queries, part: rows.extend(part) or forward(queries, part))
    query = Query(asked, batch.select([5, 0, 4, 1, 1]), outputs=True)
    found, expected = model.answer([query])[0], fresh.answer([query])[0]
    assert len(rows) == 2 + 5, "of the first prompt two records, of the second all"
    assert torch.equal(found.loss_KB, expected.loss_KB)
    for one, other in zip(found.outputs_KB.parts(), expected.outputs_KB.parts(), strict=True):
        assert one is other is None or torch.equal(one, other)
    rows.clear()
    again = model.answer([query, Query(asked, batch, loss=lambda outputs, of: outputs.features_RD[:, 0], outputs=True)])
    assert len(rows) == 2, "of the second prompt the third and the fourth record"
    assert torch.equal(again[0].loss_KB, expected.loss_KB)


def test_outputs_are_kept_within_their_bytes_and_apart_by_layer_and_prompt(model):
    batch = batch_of(model, small.classes(), 6)
    one = model.answer([Query(prompts(1), batch, outputs=True)])[0].outputs_KB.features_RD
    other = model.answer([Query(prompts(1), replace(batch, enters_at=0), outputs=True)])[0].outputs_KB.features_RD
    assert not torch.equal(one, other)
    assert not torch.equal(
        one, model.answer([Query(prompts(1, seed=1), batch, outputs=True)])[0].outputs_KB.features_RD
    )
    assert model.outputs.size == sum(
        part.nbytes for row, _ in model.outputs.values.values() for part in row.parts()[:1]
    )
    model.outputs.limit = model.outputs.size // 2
    model.answer([Query(prompts(1, seed=2), batch, outputs=True)])
    assert 0 < model.outputs.size <= model.outputs.limit
    exact = QueryEngine(model.backbone, exact=True)
    exact.answer([Query(prompts(1), batch, outputs=True)])
    assert not exact.outputs.values, "a site's rows are computed each time"


def test_under_one_row_what_is_not_kept_is_computed_item_by_item(model, monkeypatch):
    """What else is missing goes by what other records have pushed out."""
    items = [records[0] for records in batch_of(model, small.classes()).items]
    below, asked = model.backbone.encode_prefix, []
    monkeypatch.setattr(
        model.backbone, "encode_prefix", lambda items, layer: asked.append(len(items)) or below(items, layer)
    )
    HiddenStateCache(1 << 20, UNBATCHED).fetch(items, 1, model.backbone)
    assert asked == [1] * len(items)


def test_the_least_recently_used_is_dropped_first(model, monkeypatch):
    items = [model.backbone.tokenize("the film", None, "", None, 3) for _ in range(4)]
    kept = HiddenStateCache(3 * 2 * 16 * 4, 512)
    kept.fetch(items[:3], 1, model.backbone)
    kept.fetch(items[:1], 1, model.backbone)
    kept.fetch(items[3:], 1, model.backbone)
    assert [item for item, _ in kept.values] == [items[2], items[0], items[3]]
    calls = counted(model.backbone, monkeypatch)
    kept.fetch(items, 1, model.backbone)
    assert calls == [1]


def asking(batch, times: int, fails: Exception | None = None):
    losses = []
    for seed in range(times):
        answer = yield Query(prompts(1, seed=seed), batch)
        losses.append(answer.loss_KB)
    if fails is not None:
        raise fails
    return torch.cat(losses)


def test_drive_returns_what_the_work_returns(model):
    batch = batch_of(model, small.classes())
    assert run_queries(model, asking(batch, 2)).shape == (2, 6)


def test_drive_many_takes_works_of_any_length_and_goes_on_after_errors(model):
    batch = batch_of(model, small.classes())
    broken = ValueError("a broken record")
    lengths = {"a": 3, "b": 1, "c": 2, "d": 3}
    works = {name: asking(batch, times, broken if name == "c" else None) for name, times in lengths.items()}
    order = list(run_queries_lockstep(model, works))
    assert [name for name, _ in order] == ["b", "c", "a", "d"]
    found = dict(order)
    assert found.pop("c") is broken
    assert all(small.close(found[name], run_queries(model, asking(batch, lengths[name]))) for name in found)
    assert list(run_queries_lockstep(model, {})) == []


def test_a_reproducible_engine_fills_small_chunks_and_answers_the_same(model, monkeypatch):
    """Its forwards have the positions of large products. The repeated rows are in no answer."""
    monkeypatch.setitem(memory.LEAST_TOKENS, torch.float32, (100, 200))
    plain, filled = QueryEngine(model.backbone), QueryEngine(model.backbone, reproducible=True)
    assert (plain.least_tokens, plain.kept.least_tokens) == (0, 0)
    seen, own = [], model.backbone.forward

    def forward(prompts_SPD, states, items, layer):
        longest = max(padded_length(item.length) for item in items)
        seen.append(len(items) * (prompts_SPD.shape[1] + longest))
        return own(prompts_SPD, states, items, layer)

    queries = mixed(model)
    expected = plain.answer(queries)
    with monkeypatch.context() as patched:
        patched.setattr(model.backbone, "forward", forward)
        found = filled.answer(queries)
    assert min(seen) >= 100
    assert all(agree(a, b) for a, b in zip(found, expected, strict=True))
    assert [a.loss_KB.shape for a in found] == [a.loss_KB.shape for a in expected]


def test_an_engine_with_small_chunks_or_an_exact_one_fills_none_beyond_them(model):
    assert QueryEngine(model.backbone, chunk_tokens=16, reproducible=True).least_tokens == 16
    exact = QueryEngine(model.backbone, exact=True, reproducible=True)
    assert (exact.least_tokens, exact.kept.least_tokens) == (0, 0)


def test_chunks_of_a_shape_have_no_small_rest():
    items = [EncodedInput(torch.zeros(8), 8)] * 9
    chunks = list(bucket_by_shape(items, lambda item: shape_of([item]), 32))
    assert [len(chunk) for chunk in chunks] == [3, 3, 3]


def test_few_rows_are_spread_over_the_cores_and_many_fill_their_chunks(model, three_cores):
    engine = QueryEngine(model.backbone, chunk_tokens=2048)
    row = Row(0, 0, 0, Shape(32, False, 1))
    assert [engine.tokens_per_chunk([row] * rows, 8) for rows in (1, 76, 90, 1000)] == [
        512,
        512,
        600,
        engine.chunk_tokens,
    ]
