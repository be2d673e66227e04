"""The memory formula against what autograd keeps and what torch allocates; chunks by it; memory that runs out for real."""

import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile

import families
import small
from ficpd.backbones import memory
from ficpd.backbones.devices import is_out_of_memory
from ficpd.backbones.lora import lora_of
from ficpd.backbones.memory import FEWEST_TOKENS, Footprint, choose_chunk, footprint, measure
from ficpd.backbones.query_engine import QueryEngine
from ficpd.errors import BackboneError, BackboneWarning
from ficpd.types import LORA, EncodedInput, Query

KEPT, PEAK = 1.2, 1.6
"""Factors within which the formula is above what is kept, and above the peak."""
WIDE = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 6, "max_position_embeddings": 256}
SIZES = {"GPT-2": {"n_embd": 128, "n_layer": 6, "n_positions": 256}}
CHECKED = [("Llama", families.DECODERS), ("GPT-2", families.DECODERS), ("BERT", families.SENTENCES)]
ROWS, TEXT, VIRTUAL = 6, 88, 8


def load(name: str, group: dict):
    return families.load(group[name], **SIZES.get(name, WIDE))


def forward(backbone, layer: int):
    """The forward of `ROWS` rows of `TEXT` tokens behind `VIRTUAL` others."""
    drawn = torch.Generator().manual_seed(0)
    items = [EncodedInput(torch.randint(5, 20, (TEXT,), generator=drawn), TEXT) for _ in range(ROWS)]
    hidden = backbone.encode_prefix(items, layer)

    def run() -> torch.Tensor:
        rows = torch.zeros(ROWS, VIRTUAL, backbone.width, requires_grad=torch.is_grad_enabled())
        return backbone.forward(rows, hidden, items, layer).features_RD

    return run


def peak(work) -> int:
    """The largest sum of bytes that torch holds meanwhile, by its own profiler."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = torch.tensor([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())])
    return int(held.cumsum(0).max())


@pytest.mark.slow
@pytest.mark.parametrize(("name", "group"), CHECKED, ids=[name for name, _ in CHECKED])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_the_formula_is_near_what_is_kept_and_above_the_peak(name, group, checkpointed):
    backbone = load(name, group)
    found = footprint(backbone)
    own = {part.untyped_storage()._cdata for part in (*backbone.model.parameters(), *backbone.model.buffers())}
    backbone.checkpoint_blocks(checkpointed)
    for layer in (0, 3):
        run = forward(backbone, layer)
        if not checkpointed:
            kept = memory._kept_bytes(run, own)
            expected = (6 - layer) / 6 * ROWS * ((TEXT + VIRTUAL) * found.position + (TEXT + VIRTUAL) ** 2 * found.pair)
            assert kept / KEPT < expected < KEPT * kept
        held = peak(lambda run=run: run().sum().backward())
        assert held < found.forward_bytes(ROWS, TEXT + VIRTUAL, layer, checkpointed=checkpointed) < PEAK * held
        with torch.no_grad():
            held = peak(run)
        assert held < found.forward_bytes(ROWS, TEXT + VIRTUAL, layer, grad=False) < PEAK * held


def test_weights_are_counted_once_and_logits_for_the_vocabulary():
    tied = families.load(families.DECODERS["Llama 3.2 (llama3 rope, tied)"])
    found, names = footprint(tied), {id(part): part for part in tied.model.parameters()}
    assert sum(part.nbytes for part in names.values()) <= found.weights < 1.01 * sum(p.nbytes for p in names.values())
    assert found.logits == families.VOCABULARY * 16
    assert footprint(families.load(families.SENTENCES["BERT"])).logits == 0


def test_eager_attention_keeps_pairs_of_positions_and_a_fused_one_does_not():
    backbone = load("Llama", families.DECODERS)
    fused = footprint(backbone)
    backbone.model.set_attn_implementation("eager")
    assert fused.pair == 0
    assert footprint(backbone).pair >= 6 * 4 * 4  # blocks, heads, bytes


def test_a_model_of_shapes_alone_is_measured_as_a_real_one():
    """What `bench/gpu.py` plans a model of 7 billion weights with: tensors that have no memory."""
    real = load("Llama", families.DECODERS)
    with FakeTensorMode():
        model = type(real.model)(real.model.config).requires_grad_(False)

        def run(virtual: int) -> torch.Tensor:
            states = torch.empty(1, virtual + 8, real.width, requires_grad=True)
            return model.model(inputs_embeds=states, use_cache=False).last_hidden_state

        found = measure(run, model, 8, 6, real.width)
    known = footprint(real)
    assert (found.state, found.logits, found.blocks) == (known.state, known.logits, known.blocks)
    expected = known.forward_bytes(ROWS, 96)  # without values a mask
    assert found.forward_bytes(ROWS, 96) == pytest.approx(expected, rel=0.1)
    assert found.weights == pytest.approx(known.weights, rel=0.01)


def chunk(monkeypatch, free: float, device: str = "cuda", **given) -> tuple[int, bool | None]:
    """What a device of so many free bytes is given, for a backbone that keeps 4 MiB of a position, as a 7 B does."""
    found = Footprint(14 << 30, 4 << 20, 0, 8 << 10, 0, 32)
    backbone = SimpleNamespace(
        device=torch.device(device), model=torch.nn.Linear(1, 1), width=4096, max_tokens=256, num_blocks=32,
        modality="text",
    )  # fmt: skip
    monkeypatch.setattr(memory, "footprint", lambda backbone: found)
    monkeypatch.setattr(memory, "free_bytes", lambda device: free)
    return choose_chunk(backbone, given.pop("workers", 1), 0, **given)


def test_a_gpu_takes_what_its_memory_holds_and_computes_blocks_again_where_that_is_too_little(monkeypatch):
    assert chunk(monkeypatch, 60 << 30) == (8192, False)
    assert chunk(monkeypatch, 16 << 30) == (2048, False)
    assert chunk(monkeypatch, 8 << 30) == (8192, True)
    assert chunk(monkeypatch, 8 << 30, checkpoint=False) == (1024, False)
    assert chunk(monkeypatch, 1 << 20) == (FEWEST_TOKENS, True)
    assert chunk(monkeypatch, 10**15) == (131072, False)


def test_a_cpu_keeps_its_chunk_unless_memory_would_run_out(monkeypatch):
    assert chunk(monkeypatch, 64 << 30, "cpu") == (512, None)
    assert chunk(monkeypatch, 4 << 30, "cpu") == (512, False)
    assert chunk(monkeypatch, 2 << 30, "cpu", workers=2) == (512, True)
    assert chunk(monkeypatch, 128 << 20, "cpu") == (128, True)


def test_a_backbone_that_runs_elsewhere_is_not_measured(monkeypatch):
    monkeypatch.setattr(memory, "footprint", None)
    elsewhere = SimpleNamespace(device=torch.device("cpu"), supports_features=False)
    assert QueryEngine(elsewhere).chunk_tokens == 512


def answer(backbone, enters_at: int, grad: bool = True):
    engine, task = QueryEngine(backbone), small.classes()
    start = small.start(engine, task, 3, max(enters_at, 0))
    if enters_at == LORA:
        rows = lora_of(backbone).start(1, 0)
        start = type(start)(rows + 0.01, backbone.fingerprint, LORA)
    batch = task.encode(small.records(5), backbone, start)
    return engine.answer([Query(torch.stack([start.vectors_PD, 1.1 * start.vectors_PD]), batch, grad=grad)])[0]


ALL = [
    (group, name)
    for name, group in (
        ("Llama", families.DECODERS), ("Gemma 2 (caps)", families.DECODERS), ("GPT-2", families.DECODERS),
        ("BERT", families.SENTENCES), ("ALBERT", families.MASKED), ("T5", families.SEQ2SEQ),
    )
]  # fmt: skip


@pytest.mark.parametrize("enters_at", [0, 1, LORA])
@pytest.mark.parametrize("kind", ["tiny", *ALL], ids=lambda kind: kind if isinstance(kind, str) else kind[1])
def test_blocks_that_are_computed_again_give_the_same_bits(kind, enters_at):
    backbone = small.backbone() if kind == "tiny" else families.load(kind[0][kind[1]])
    if enters_at >= backbone.depth:
        pytest.skip("the middle is closed")
    kept = answer(backbone, enters_at)
    backbone.checkpoint_blocks(True)
    again = answer(backbone, enters_at)
    assert torch.equal(kept.loss_KB, again.loss_KB)
    assert torch.equal(kept.grad_KBPD, again.grad_KBPD)
    assert kept.grad_KBPD.abs().max() > 0


def test_an_engine_is_told_to_compute_blocks_again():
    backbone = small.backbone()
    QueryEngine(backbone, checkpoint=True)
    assert backbone.checkpointed
    QueryEngine(backbone, chunk_tokens=64)
    assert backbone.checkpointed, "an engine that says nothing changes nothing"
    QueryEngine(backbone, chunk_tokens=64, checkpoint=False)
    assert not backbone.checkpointed


def running_out(backbone, monkeypatch, most: int) -> list[int]:
    """Lets forwards of more than `most` rows ask for an exbibyte, which no machine has; the rows of each try."""
    seen, own = [], backbone.forward

    def greedy(prompts_SPD, hidden, items, layer):
        seen.append(len(items))
        if len(items) > most:
            torch.empty(1 << 60, dtype=torch.uint8)
        return own(prompts_SPD, hidden, items, layer)

    monkeypatch.setattr(backbone, "forward", greedy)
    return seen


def query(engine: QueryEngine, count: int = 6) -> Query:
    task = small.classes()
    start = small.start(engine, task)
    batch = task.encode(small.records(count), engine.backbone, start)
    return Query(start.vectors_PD[None], batch, grad=True, outputs=True)


@pytest.mark.parametrize("exact", [False, True])
def test_rows_are_halved_until_they_fit_and_the_answer_is_the_same(monkeypatch, exact):
    engine = QueryEngine(small.backbone(), exact=exact)
    asked = query(engine)
    expected = engine.answer([asked])[0]
    engine = QueryEngine(engine.backbone, exact=exact)
    seen, before = running_out(engine.backbone, monkeypatch, 2), engine.chunk_tokens
    with pytest.warns(BackboneWarning, match="memory ran out in a forward of . rows, which are halved"):
        found = engine.answer([asked])[0]
    assert max(seen) > 2
    assert engine.chunk_tokens < before
    assert small.close(found.loss_KB, expected.loss_KB)
    assert small.close(found.grad_KBPD, expected.grad_KBPD)
    assert small.close(found.outputs_KB.features_RD, expected.outputs_KB.features_RD)


def test_one_record_that_does_not_fit_is_an_error_that_says_what_to_set(monkeypatch):
    engine = QueryEngine(small.backbone())
    asked = query(engine)
    running_out(engine.backbone, monkeypatch, 0)
    one = r"forward of one record, on tiny. Set engine.checkpoint = true"
    with pytest.warns(BackboneWarning, match="halved"), pytest.raises(BackboneError, match=one):
        engine.answer([asked])


def test_other_errors_are_not_taken_for_memory(monkeypatch):
    engine = QueryEngine(small.backbone())
    monkeypatch.setattr(engine.backbone, "forward", lambda *given: torch.ones(2, 3) @ torch.ones(2, 3))
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        engine.answer([query(engine)])


def test_the_errors_of_gpus_are_memory():
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 515.00 GiB"))
    assert is_out_of_memory(RuntimeError("MPS backend out of memory (MPS allocated: 17.00 GB)"))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_the_tensors_of_a_forward_that_did_not_fit_are_gone_before_the_halves_are_tried(monkeypatch):
    engine = QueryEngine(small.backbone())
    left: list = []
    own = engine.backbone.forward

    def greedy(prompts_SPD, hidden, items, layer):
        assert all(tensor() is None for tensor in left), "a forward that failed still holds its tensors"
        if len(items) > 2:
            large = torch.zeros(1000)
            left.append(weakref.ref(large))
            torch.empty(1 << 60, dtype=torch.uint8)
        return own(prompts_SPD, hidden, items, layer)

    monkeypatch.setattr(engine.backbone, "forward", greedy)
    gc.disable()
    try:
        with pytest.warns(BackboneWarning, match="halved"):
            engine.answer([query(engine)])
    finally:
        gc.enable()
    assert left
