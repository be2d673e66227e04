"""Small random decoders of the Llama family with a tokeniser of whole words: what tests that read and write run on."""

from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from ficpd.backbones import causal_lm, weights
from ficpd.backbones.causal_lm import CausalLM, Config

CPU = torch.device("cpu")
WORDS = ["a", "the", "film", "was", "very", "good", "bad", "and", "long", "sentiment", "is", "positive", "negative"]
WORDS += ["not", "dull", "story", "but", "fine"]
SIZES = {
    "vocab_size": 4 + len(WORDS), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "initializer_range": 0.3,
}  # fmt: skip
FAMILY = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM, {}),
    "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM, {"sliding_window": 40}),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM, {}),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM, {}),
}


def write(folder: Path, family: str = "llama", begins: bool = False) -> Path:
    config, model, more = FAMILY[family]
    torch.manual_seed(3)
    model(config(**SIZES, **more)).save_pretrained(folder)
    names = ["<unk>", "<s>", "</s>", "\n", *WORDS]
    words = Tokenizer(models.WordLevel(dict(zip(names, range(99), strict=False)), unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Split(" ", "removed")]
    )
    if begins:
        words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)
    return folder


def load(folder: Path, attention: str = "eager", **config) -> CausalLM:
    source = weights.Weights(folder, "ab" * 32, "here")
    return causal_lm.build(Config(**config), source, dtype=torch.float32, attention=attention, device=CPU, name="small")
