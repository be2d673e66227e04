"""Small random vision transformers in folders, and images made of words: what tests of backbones that see run on."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CLIPConfig, CLIPModel, Dinov2Config, Dinov2Model, PreTrainedTokenizerFast, ViTConfig, ViTModel

import small

SIDE, PATCH, WIDTH = 16, 4, 32
WORDS = ["<unk>", "</s>", "<s>", *small.GOOD, *small.BAD, *small.OTHER, "is", "not", "very", "photo", "of"]
SHAPE = {"num_hidden_layers": 3, "num_attention_heads": 4}


@dataclass(frozen=True)
class Seen:
    """An image made of a text: another text, another image, of another shape."""

    text: str

    def open(self) -> Image.Image:
        drawn = hashlib.shake_256(self.text.encode()).digest(2 + 3 * 64)
        image = Image.frombytes("RGB", (8, 8), drawn[2:])
        return image.resize((10 + drawn[0] % 30, 10 + drawn[1] % 30), Image.Resampling.BICUBIC)


def _processed(folder: Path, kind: str, cuts: bool) -> Path:
    """With an image processor: one that cuts the middle out of a larger image, or one that only resizes."""
    sizes: dict[str, Any] = {"size": {"height": SIDE, "width": SIDE}}
    if cuts:
        sizes = {
            "size": {"shortest_edge": SIDE + 4},
            "crop_size": {"height": SIDE, "width": SIDE},
            "do_center_crop": True,
        }
    told = {"image_processor_type": kind, "do_resize": True, "do_normalize": True, "do_rescale": True, "resample": 3}
    told |= {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.25, 0.3], **sizes}
    (folder / "preprocessor_config.json").write_text(json.dumps(told))
    return folder


def write_dinov2(folder: Path) -> Path:
    torch.manual_seed(5)
    config = Dinov2Config(
        hidden_size=WIDTH, mlp_ratio=2, image_size=SIDE, patch_size=PATCH, initializer_range=0.3, **SHAPE
    )
    Dinov2Model(config).save_pretrained(folder)
    return _processed(folder, "BitImageProcessor", cuts=True)


def write_vit(folder: Path, spread: float = 0.3) -> Path:
    torch.manual_seed(6)
    config = ViTConfig(
        hidden_size=WIDTH, intermediate_size=48, image_size=SIDE, patch_size=PATCH, initializer_range=spread, **SHAPE
    )
    ViTModel(config).save_pretrained(folder)
    return _processed(folder, "ViTImageProcessor", cuts=False)


def write_clip(folder: Path) -> Path:
    """Images and texts meet in 20 dimensions, where the image half has 32 and the text half 24."""
    torch.manual_seed(7)
    shape = {**SHAPE, "intermediate_size": 48}
    text = {**shape, "vocab_size": len(WORDS), "hidden_size": 24, "max_position_embeddings": 12, "bos_token_id": 2,
            "eos_token_id": 1, "pad_token_id": 1}  # fmt: skip
    vision = {**shape, "hidden_size": WIDTH, "image_size": SIDE, "patch_size": PATCH}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=20))
    for weight in model.parameters():  # else all texts are nearly one, and all images
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.3)
    model.save_pretrained(folder)
    pieces = Tokenizer(models.WordLevel({word: place for place, word in enumerate(WORDS)}, unk_token="<unk>"))
    pieces.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    pieces.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 2), ("</s>", 1)]
    )
    marks = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=pieces, **marks).save_pretrained(folder)
    return _processed(folder, "CLIPImageProcessor", cuts=True)
