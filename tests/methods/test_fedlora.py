"""Whole runs of FedAvg on LoRA weights: what they start from, cost in privacy, leave behind, and cannot be had with."""

import pytest
import torch

import small
from ficpd.errors import BackboneError, ConfigError, LibraryError
from ficpd.experiments.build import build_context
from ficpd.library.facts import library_facts
from ficpd.library.library import PromptLibrary
from ficpd.library.peft_distillation import Texts, distill_to_input
from ficpd.library.session import ZERO_SHOT, load_library
from ficpd.privacy import record_gaussian
from ficpd.types import LORA, ClientWorkload, Query

RECORD = ("privacy.name=record_gaussian", "privacy.epsilon=2", "privacy.delta=1e-3")
QUICK = "method.learning_rate=0.05"


def rows_of(folder) -> torch.Tensor:
    return PromptLibrary.load(folder / "run").prompts["global"].vectors_PD


@pytest.mark.parametrize("more", [(), ("task.tuned_head=true",)])
def test_a_run_learns_and_its_library_predicts_as_the_run_did(tmp_path, more):
    result = small.run(tmp_path, "fedlora", QUICK, *more, rounds=10)
    accuracy = result.scores.global_prompt["accuracy"]
    assert accuracy > result.scores.zero_shot["accuracy"] + 0.1
    heads = 2 if more else 0
    opened, context = load_library(tmp_path / "run"), build_context(small.experiment(tmp_path, "fedlora", QUICK, *more))
    assert (opened.library.start.enters_at, opened.library.start.num_virtual_tokens) == (LORA, 0)
    assert tuple(opened.library.start.vectors_PD.shape) == (64 + heads, 16)
    test = [record for shard in context.shards.values() for record in shard.test]
    found = opened.evaluate_prompts(test)
    assert found["global"]["accuracy"] == pytest.approx(accuracy)
    if not more:
        assert found[ZERO_SHOT]["accuracy"] == pytest.approx(result.scores.zero_shot["accuracy"])
    said = opened.predict(test)
    assert sum(a == b.fields["target"] for a, b in zip(said, test, strict=True)) / len(test) == pytest.approx(accuracy)


def test_what_a_run_says_of_its_weights(tmp_path):
    result = small.run(tmp_path, "fedlora")
    assert result.backbone.enters_at == LORA
    words = "LoRA weights (64 rows of width 16)"
    assert words in library_facts(tmp_path / "run")["shape"]
    assert words in (tmp_path / "run" / "library" / "README.md").read_text()
    assert "LoRA weights of all layers" in small.page(tmp_path)


def test_beside_prompts_each_has_its_own_start_rate_and_bytes(tmp_path):
    both = small.run(tmp_path / "a", "fedavg", 'baselines=["fedlora"]')
    alone = small.run(tmp_path / "b", "fedavg")
    assert both.bytes == alone.bytes
    assert both.scores == alone.scores
    lora = PromptLibrary.load(tmp_path / "a" / "run" / "baselines" / "fedlora")
    small.run(tmp_path / "c", "fedlora")
    assert torch.equal(lora.prompts["global"].vectors_PD, rows_of(tmp_path / "c"))
    assert lora.card["training"]["learning_rate"] == 3e-3


def test_a_rank_and_8_bits_are_what_travels(tmp_path):
    whole = small.run(tmp_path / "a", "fedlora", "method.rank=2").bytes.up_per_client_round
    few = small.run(tmp_path / "b", "fedlora", "method.rank=2", "compression.name=none", "compression.bits=8")
    assert len(rows_of(tmp_path / "a")) == 16
    assert whole - few.bytes.up_per_client_round == 3 * 16 * 16 - 4  # a float32 less 8 bits each, and the step


def test_records_are_clipped_to_a_norm_that_fits_lora_and_noised(tmp_path):
    given = small.experiment(tmp_path, "fedlora", *RECORD)
    context = build_context(given)
    begun = context.with_method(small.method("fedlora", context.experiment.training))
    stated = small.experiment(tmp_path, "fedlora", *RECORD, "privacy.clip_norm=1e-6")
    again = build_context(stated).with_method(small.method("fedlora", context.experiment.training))
    assert begun.experiment.privacy["clip_norm"] == again.experiment.privacy["clip_norm"] > 1e-3
    assert begun.experiment.privacy["clip_norm"] != pytest.approx(context.experiment.privacy["clip_norm"], rel=0.01)
    result = small.run(tmp_path, "fedlora", *RECORD)
    assert 1.9 < result.privacy.epsilon <= 2.0
    (line,) = result.privacy.lines
    assert (line.name, line.releases) == ("prompt", 6)
    small.run(tmp_path / "free", "fedlora")
    assert not small.close(rows_of(tmp_path), rows_of(tmp_path / "free"), 1e-3)


def test_a_records_gradient_is_clipped_by_itself(model):
    """The mean under a mechanism with next to no noise is that of the records' clipped gradients."""
    method = small.method("fedlora")
    member = small.clients(model, method, 1)["site-0"]
    batch, rows = member.encoded(), member.start.vectors_PD
    grad_KBPD = model.answer([Query(rows[None], batch, grad=True)])[0].grad_KBPD
    assert grad_KBPD is not None
    norms_B = grad_KBPD[0].flatten(1).norm(dim=1)
    clip = float(norms_B.median())
    config = record_gaussian.Config(noise_multiplier=1e-6, clip_norm=clip, delta=1e-3)
    mechanism = record_gaussian.build(config, ClientWorkload(len(batch), 1.0, 1, 1, 1, 1.0, 1))
    found = mechanism.noisy_mean(grad_KBPD, len(batch), member.noise_source("fedlora", 1))[0]
    expected = (grad_KBPD[0] * (clip / norms_B).clamp(max=1)[:, None, None]).mean(0)
    assert small.close(found / clip, expected / clip, 1e-4)
    assert len(set(norms_B.tolist())) == len(batch)


def test_somebodys_few_records_fit_it_as_they_fit_a_prompt(tmp_path):
    small.run(tmp_path, "fedlora")
    opened, shots = load_library(tmp_path / "run"), small.records(12, 3)
    opened.adapt(shots, how="tune").save(tmp_path / "mine")
    mine = PromptLibrary.load(tmp_path / "mine")
    assert not torch.equal(mine.prompts["adapted"].vectors_PD, mine.prompts["global"].vectors_PD)
    assert len(load_library(tmp_path / "mine").predict(shots)) == 12


def test_a_compression_for_prompts_is_refused_before_anything_is_written(tmp_path):
    for method in ("method.name=fedlora", 'baselines=["fedlora"]'):
        with pytest.raises(ConfigError, match=r"compression.name = 'subspace' is for prompts, and fedlora tunes"):
            small.run(tmp_path, "fedavg", method, "compression.name=subspace", "compression.dimension=8")
        assert not (tmp_path / "run").exists()


def test_a_backbone_without_lora_is_refused_by_name(tmp_path):
    context = build_context(small.experiment(tmp_path))
    del context.model.backbone.adapters  # type: ignore[attr-defined]
    with pytest.raises(BackboneError, match="tiny has no LoRA"):
        context.init_prompt_for(small.method("fedlora"))


def test_no_prompt_starts_from_lora_weights_nor_imitates_them(tmp_path):
    small.run(tmp_path, "fedlora")
    library = PromptLibrary.load(tmp_path / "run")
    with pytest.raises(ConfigError, match="holds LoRA weights"):
        small.run(tmp_path / "b", "fedavg", "prompt.init=library", f"prompt.library={tmp_path / 'run'}")
    opened = load_library(tmp_path / "run")
    with pytest.raises(LibraryError, match="LoRA weights cannot be distilled"):
        distill_to_input(library.prompts["global"], Texts(small.records(8), "texts"), opened.task, opened.model)
