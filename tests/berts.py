"""Small random models of the BERT family that know letters of many scripts: what tests that fill masks run on."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForMaskedLM,
    PreTrainedTokenizerFast,
    XLMRobertaConfig,
    XLMRobertaForMaskedLM,
    XLMRobertaTokenizer,
)

import small
from ficpd.backbones import masked_lm
from ficpd.backbones.weights import Weights

SCRIPTS = {
    "Arabic": "كان الفيلم جيدا", "Hebrew": "הסרט היה טוב", "Urdu": "فلم اچھی تھی", "Thai": "ภาพยนตร์เรื่องนี้ดีมาก",
    "Chinese": "这部电影很好", "Japanese": "この映画は良かった",
}  # fmt: skip
WORDS = [*small.OTHER, *small.GOOD, *small.BAD, "yes", "no", "mend", "it"]
LETTERS = sorted({letter for text in [*SCRIPTS.values(), *WORDS] for letter in text.replace(" ", "")})
SIZES: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48, "initializer_range": 0.3,
}  # fmt: skip


def bert(folder: Path) -> Path:
    """WordPiece, lower case, two kinds of segments; it lacks Amharic letters."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces = dict.fromkeys([*special, *WORDS, "##ing", ".", *LETTERS, *(f"##{letter}" for letter in LETTERS)])
    words = Tokenizer(models.WordPiece(dict(zip(pieces, range(999), strict=False)), unk_token="[UNK]"))
    words.normalizer = normalizers.BertNormalizer(lowercase=True, strip_accents=False)
    words.pre_tokenizer, words.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), special, strict=True))
    given = ["input_ids", "token_type_ids", "attention_mask"]
    PreTrainedTokenizerFast(tokenizer_object=words, **names, model_input_names=given).save_pretrained(folder)
    return _saved(folder, BertForMaskedLM, BertConfig(vocab_size=len(pieces), max_position_embeddings=48, **SIZES))


def xlm_roberta(folder: Path) -> Path:
    """Unigram with a metaspace, as SentencePiece has it."""
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    pieces = [(piece, 0.0) for piece in special] + [(f"▁{word}", -2.0) for word in WORDS]
    pieces += [
        ("▁", -3.0), ("电影", -3.0), ("ing", -3.0), (".", -3.0), *((letter, -5.0) for letter in LETTERS),
        ("<mask>", 0.0),
    ]  # fmt: skip
    XLMRobertaTokenizer(vocab=pieces).save_pretrained(folder)
    more = {
        "max_position_embeddings": 50, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "type_vocab_size": 1,
    }  # fmt: skip
    return _saved(folder, XLMRobertaForMaskedLM, XLMRobertaConfig(vocab_size=len(pieces), **more, **SIZES))


FAMILIES = {"bert": bert, "xlm-roberta": xlm_roberta}


def _saved(folder: Path, kind: Any, config: Any) -> Path:
    """Every weight is drawn, so that a forgotten bias or norm shows."""
    torch.manual_seed(5)
    model = kind(config)
    for weight in model.parameters():
        if weight.dim() == 1:
            weight.data += 0.3 * torch.randn_like(weight)
    model.save_pretrained(folder)
    return folder


def load(folder: Path) -> masked_lm.MaskedLM:
    options: dict[str, Any] = {"dtype": torch.float32, "attention": "eager", "device": small.CPU, "name": "small"}
    return masked_lm.build(masked_lm.Config(), Weights(folder, "ab" * 32, "here"), **options)
