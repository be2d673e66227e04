"""What is fastest here is decided by the least of several times: a machine that is busy for one of them decides nothing."""

import gc
import itertools
import json
import weakref

import pytest
import torch

import decoders
import families
from ficpd.backbones import autotune, causal_lm, weights
from ficpd.backbones.autotune import DTYPES, ExecutionConfig
from ficpd.backbones.loading import BackboneConfig, EngineConfig, load_backbone


def clock(monkeypatch, *seconds: float) -> None:
    """Each measured call takes the next of these, over and over."""
    ends = itertools.accumulate(itertools.cycle(seconds))
    times = (time for end, taken in zip(ends, itertools.cycle(seconds)) for time in (end - taken, end))
    monkeypatch.setattr(autotune.time, "perf_counter", times.__next__)


def test_the_least_time_counts_and_the_first_call_does_not(monkeypatch):
    clock(monkeypatch, 5.0, 1.0, 4.0)
    calls = []
    assert autotune.least_seconds(lambda: calls.append(None), 3) == 1.0
    assert len(calls) == 4


def test_one_interruption_does_not_change_the_dtype(monkeypatch):
    float32, bfloat16 = [4.0] * autotune.REPEATS, [1.0] * autotune.REPEATS
    for interrupted in range(autotune.REPEATS):
        slow = [100.0 if place == interrupted else value for place, value in enumerate(bfloat16)]
        clock(monkeypatch, *float32, *slow)
        assert autotune._bf16_pays(torch.device("cpu"))
    clock(monkeypatch, *bfloat16, *float32)
    assert not autotune._bf16_pays(torch.device("cpu"))


@pytest.fixture
def loads(tmp_path, monkeypatch):
    """Choices loaded so far, and (as `alive`) how many of the models are in memory."""
    monkeypatch.setenv("FICPD_CACHE", str(tmp_path / "cache"))
    folder, done, models = decoders.write(tmp_path / "llama"), [], []

    def load(choice: ExecutionConfig):
        assert not [model for model in models if model() is not None], "the last model is still in memory"
        source = weights.Weights(folder, "cd" * 32, "here")
        found = causal_lm.build(
            causal_lm.Config(), source, dtype=DTYPES[choice.dtype], attention=choice.attention, device=decoders.CPU,
            name="s",
        )  # fmt: skip
        done.append(choice)
        models.append(weakref.ref(found.model))
        return found

    load.done = done
    gc.disable()
    yield load
    gc.enable()


AUTO = ExecutionConfig("auto", "auto")


@pytest.mark.parametrize("fastest", [("float32", "eager"), ("float32", "sdpa"), ("bfloat16", "eager")])
def test_each_dtype_is_loaded_once_and_one_model_at_a_time_is_in_memory(loads, monkeypatch, fastest):
    def seconds(backbone) -> float:
        dtype = str(backbone.dtype).removeprefix("torch.")
        return 1.0 if (dtype, backbone.model.config._attn_implementation) == fastest else 2.0

    monkeypatch.setattr(autotune, "step_seconds", seconds)
    monkeypatch.setattr(autotune, "_bf16_pays", lambda device: True)
    choice, backbone = autotune.autotune(loads, "one", decoders.CPU, AUTO)
    assert choice == fastest
    assert loads.done == [("float32", "eager"), ("bfloat16", "eager")]
    assert (backbone is not None) == (fastest == ("bfloat16", "eager"))
    assert autotune.autotune(loads, "one", decoders.CPU, AUTO) == (fastest, None), "the choice is remembered"
    assert len(loads.done) == 2
    assert backbone is None or backbone.model.config._attn_implementation == "eager"


def test_an_attention_that_a_model_lacks_is_not_chosen(monkeypatch, tmp_path):
    monkeypatch.setenv("FICPD_CACHE", str(tmp_path))
    backbone = families.load(families.MASKED["DeBERTa-v3"])
    assert backbone.set_attention("eager")
    assert not backbone.set_attention("sdpa")
    choice, _ = autotune.autotune(lambda choice: backbone, "deberta", decoders.CPU, ExecutionConfig("float32", "auto"))
    assert choice.attention == "eager"


def test_a_backbone_is_loaded_with_the_choice_of_the_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("FICPD_CACHE", str(tmp_path / "cache"))
    folder = decoders.write(tmp_path / "llama")
    before = torch.get_num_threads()
    backbone, config = load_backbone(BackboneConfig(name=str(folder)), EngineConfig())
    torch.set_num_threads(before)
    assert (config.dtype, config.attention) == (
        str(backbone.dtype).removeprefix("torch."), backbone.model.config._attn_implementation
    )  # fmt: skip
    found = json.loads((tmp_path / "cache" / "speed.json").read_text())
    assert list(found.values()) == [[config.dtype, config.attention]]


KINDS = [
    ("Llama", families.DECODERS), ("BERT", families.SENTENCES), ("BERT", families.MASKED), ("BART", families.SEQ2SEQ),
    ("DINOv2", families.VISION), ("CLIP", families.VISION),
]  # fmt: skip


@pytest.mark.parametrize(("name", "group"), KINDS, ids=[f"{group[name].kind} {name}" for name, group in KINDS])
def test_a_model_that_nobody_needs_is_freed_at_once(name, group):
    """Without a cycle of references: the garbage collector may come after memory has run out."""
    gc.collect()
    gc.disable()
    try:
        backbone = families.load(group[name])
        (record,), image = backbone.synthetic_inputs(1, 0), backbone.modality == "image"
        item = backbone.preprocess_image(record, 3) if image else backbone.tokenize(record, None, "", None, 3)
        backbone.encode_prefix([item], backbone.depth - 1)
        del item
        autotune.step_seconds(backbone, repeats=1)
        model = weakref.ref(backbone.model)
        del backbone
        assert model() is None
    finally:
        gc.enable()
