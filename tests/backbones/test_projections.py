"""Query and value projections by their effect: PEFT's own lists, families of no list, and layers of any name."""

import copy

import peft
import pytest
import torch
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as PEFTS
from torch import nn

import families
from families import BASE, DEBERTA, EXPERTS, GPT2, GROUPED, LAYERS, T5, VOCABULARY, WIDTH, Family
from ficpd.backbones import lora
from ficpd.backbones.projections import find_projections
from ficpd.errors import BackboneError

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
OWN = {"deberta-v2": ["value_proj"]}
"""Shared with relative positions, its query projection reads rows of no sequence."""
LISTED = {
    **families.DECODERS, **families.MASKED, **families.SEQ2SEQ,
    "GPT-J": Family("causal_lm", "GPTJForCausalLM", "GPTJConfig", {**GPT2, "rotary_dim": 4}),
    "CodeGen": Family("causal_lm", "CodeGenForCausalLM", "CodeGenConfig", {**GPT2, "rotary_dim": 4}),
    "StarCoder": Family("causal_lm", "GPTBigCodeForCausalLM", "GPTBigCodeConfig", GPT2),
    "MPT": Family("causal_lm", "MptForCausalLM", "MptConfig", {
        "vocab_size": VOCABULARY, "d_model": WIDTH, "n_heads": 4, "n_layers": LAYERS, "max_seq_len": 64}),
    "DeBERTa": Family("masked_lm", "DebertaForMaskedLM", "DebertaConfig", DEBERTA),
    "LayoutLM": Family("masked_lm", "LayoutLMForMaskedLM", "LayoutLMConfig", BASE),
    "mT5": Family("seq2seq", "MT5ForConditionalGeneration", "MT5Config", T5),
}  # fmt: skip
COMPRESSED = {
    **BASE, "q_lora_rank": 12, "kv_lora_rank": 12, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "first_k_dense_replace": LAYERS,
}  # fmt: skip
UNLISTED = {
    "GPT-OSS": (Family("causal_lm", "GptOssForCausalLM", "GptOssConfig", {
        **GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2, "layer_types": ["full_attention"] * LAYERS}),
        ["q_proj", "v_proj"]),
    "Llama 4": (Family("causal_lm", "Llama4ForCausalLM", "Llama4TextConfig", {
        **GROUPED, "num_local_experts": 2, "intermediate_size_mlp": 48}), ["q_proj", "v_proj"]),
    "DeepSeek V3": (Family("causal_lm", "DeepseekV3ForCausalLM", "DeepseekV3Config", COMPRESSED),
                    ["kv_a_proj_with_mqa", "q_a_proj", "q_b_proj"]),
    "Afmoe": (Family("causal_lm", "AfmoeForCausalLM", "AfmoeConfig", {
        **GROUPED, **EXPERTS, "num_dense_layers": 1}), ["q_proj", "v_proj"]),
}  # fmt: skip


def ends(names: object) -> list[str]:
    return sorted({name.rpartition(".")[2] for name in names})  # type: ignore[attr-defined]


def listed() -> list[str]:
    types = {name: getattr(families.transformers, family.config).model_type for name, family in LISTED.items()}
    return [name for name, model_type in types.items() if model_type in PEFTS]


@pytest.mark.parametrize("name", listed())
def test_the_layers_are_those_of_pefts_list(name):
    backbone = families.load(LISTED[name])
    model_type = backbone.model.config.model_type
    expected = OWN.get(model_type, PEFTS[model_type])
    linear = [n for n, part in backbone.model.named_modules() if lora.linear_sizes(part)]
    assert [*backbone.adapters.modules] == [n for n in linear if n.rpartition(".")[2] in expected]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", UNLISTED)
def test_families_of_no_list_have_theirs(name, dtype):
    family, expected = UNLISTED[name]
    model, ids = families.build(family).to(dtype).requires_grad_(False), torch.arange(5, 23).view(2, 9)
    found = find_projections(model, lambda: model(input_ids=ids, use_cache=False))
    assert ends(found) == expected
    assert len(found) == LAYERS * len(expected)


@torch.no_grad()
def test_with_them_a_family_of_no_list_is_as_in_peft():
    family = UNLISTED["GPT-OSS"][0]
    off = families.lora_off(families.load(family), families.build(family))
    assert off is not None
    assert off < 1e-4


class Attention(nn.Module):
    """One head, with a residual and layers whose names and order say nothing."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third, self.fourth = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, states_STD: torch.Tensor) -> torch.Tensor:
        k_STD, v_STD, q_STD = self.first(states_STD), self.second(states_STD), self.third(states_STD)
        weight_STT = (q_STD @ k_STD.mT).softmax(-1)
        return states_STD + self.fourth(weight_STT @ v_STD)


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_names_and_sizes_do_not_matter(size):
    torch.manual_seed(0)
    model = nn.Sequential(Attention(), nn.Linear(WIDTH, WIDTH), Attention()).requires_grad_(False)
    for weight in model.parameters():
        weight *= size
    found = find_projections(model, lambda: model(torch.randn(2, 9, WIDTH)))
    assert [*found] == ["0.second", "0.third", "2.second", "2.third"]
    assert all(not part._forward_hooks and not part._forward_pre_hooks for part in model.modules())


@pytest.mark.parametrize("name", ["FNet", "ConvBert"])
def test_a_model_without_such_layers_has_no_lora(name):
    """FNet mixes by Fourier transforms. ConvBERT's queries and keys also are the weights of a convolution."""
    model, ids = families.build(Family("", f"{name}Model", f"{name}Config", BASE)), torch.arange(5, 23).view(2, 9)
    backbone = families.load(families.SENTENCES["BERT"])
    backbone.adapters = lora.Adapters(lambda: find_projections(model, lambda: model(input_ids=ids)), WIDTH)
    with pytest.raises(BackboneError, match="BertModel has no LoRA: no linear layer"):
        lora.lora_of(backbone)


def test_peft_changes_the_same_layers_though_others_end_in_the_same_name():
    model = nn.Sequential(Attention(), nn.ModuleDict({"second": nn.Linear(WIDTH, WIDTH)}))
    found = ["0.second", "0.third"]
    assert lora.short_names(model[:1], found) == ["second", "third"]
    assert lora.short_names(model, found) == found
    for part, names in ((model[:1], ["second", "third"]), (model, found)):
        theirs = peft.get_peft_model(copy.deepcopy(part), peft.LoraConfig(r=2, target_modules=names))
        assert theirs.base_model.targeted_module_names == found
