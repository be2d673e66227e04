"""Vision transformers (DINOv2, ViT, and CLIP with its text half): features are of the class token after the last norm.

The prompt's virtual tokens stand in front of class token and patches: visual prompt tuning (Jia et al., ECCV 2022, arXiv
2203.12119), which puts them between the two; attention does not see the difference, for they have no positions. All images
have one size, so that nothing is padded. DINOv2 and ViT know no words: a task on them tunes a head. CLIP's answers are its
embedded texts (Radford et al., ICML 2021, arXiv 2103.00020). Its images and texts meet in a space of N dimensions, and its
class token has D: with W [N, D] the visual projection, features are f / |W f| and a readout is scale · t W, of which the
product is CLIP's own logit, scale · t · W f / |W f|. So prompt, features and head rows all have the width D.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from pydantic import Field
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

from ficpd import rng
from ficpd.backbones.lora import Adapters
from ficpd.backbones.pretrained import quietly
from ficpd.errors import BackboneError
from ficpd.interfaces import Backbone
from ficpd.registry import FrozenConfig
from ficpd.types import EncodedInput, ModelOutput

MODELS = ("dinov2", "vit", "clip")
SCALE = 40.0
"""What cosines of features without a text half are multiplied by. DINOv2's are close together: on MNIST class means have a
loss of 1.40 with it and of 1.61 with the encoders' 20, and 75 steps end at 84.3 % where 20 ends at 79.0 % (one seed)."""
MOST = 1024
"""Virtual tokens, at most; nothing in the model bounds them."""
SIDE = 256
"""Pixels of a made-up image's side."""


class Config(FrozenConfig):
    """`image_size`: pixels of the square that images are brought to, a multiple of the patch size; None: as the model's own
    image processor does it. Smaller is faster; positions are interpolated as the model does."""

    image_size: int | None = Field(default=None, ge=1)


def build(config: Config, weights: Any, *, dtype: torch.dtype, attention: str, device: torch.device, name: str):
    """Load a vision transformer from a `from_pretrained` folder. Raises `BackboneError` if it is of no known family, or
    without its image processor (preprocessor_config.json)."""
    folder, options = Path(weights.folder), {"dtype": dtype, "attn_implementation": attention}
    try:
        with quietly(), torch.random.fork_rng(devices=[]):  # a part that a checkpoint lacks is drawn, and never used
            model = AutoModel.from_pretrained(folder, local_files_only=True, **options)
            processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True, backend="pil")
            words = model.config.model_type == "clip"
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True) if words else None
    except (OSError, ValueError, SafetensorError) as error:
        raise BackboneError(f"backbone {name!r}: {folder} cannot be read as a vision transformer: {error}") from error
    if model.config.model_type not in MODELS:
        raise BackboneError(
            f"backbone {name!r} is a {type(model).__name__}; the vision kind runs {', '.join(MODELS)}. Use one of those, or "
            "another kind"
        )
    return Vision(config, model.to(device), processor, tokenizer, weights.sha256, name)


@dataclass(frozen=True)
class RandomImage:
    """A made-up image: a smooth field of colours, coarse or fine, drawn from a seed."""

    seed: int

    def open(self) -> Image.Image:
        random = rng.make_generator(self.seed, "colours")
        fine = 2 ** int(torch.randint(1, 6, (1,), generator=random))
        drawn = torch.randint(256, (fine, fine, 3), generator=random, dtype=torch.uint8)
        return Image.fromarray(drawn.numpy()).resize((SIDE, SIDE), Image.Resampling.BICUBIC)


class Vision(Backbone):
    """A frozen vision transformer. At layer 0 the prompt joins the input of the first block (behind CLIP's first norm)."""

    modality, supports_gradients, about = "image", True, "a vision transformer"

    def __init__(self, config: Config, model: Any, processor: Any, tokenizer: Any, sha256: str, name: str):
        self.model, self.processor, self.tokenizer, self.name = (
            model.eval().requires_grad_(False), processor, tokenizer, name
        )  # fmt: skip
        self.tower = getattr(model, "vision_model", model)
        self.blocks: Any = next(part for part in self.tower.modules() if isinstance(part, nn.ModuleList))
        self.width, self.depth = self.tower.config.hidden_size, len(self.blocks)
        size, self.sizes = _sizes(processor, config.image_size, self.tower.config.patch_size, name)
        self.length = (size // self.tower.config.patch_size) ** 2 + 1
        self.max_tokens = self.length + MOST
        self.fingerprint = f"vision:{sha256[:16]}:{size}"
        self.device, self.dtype = model.device, model.dtype
        self.adapters = Adapters(self.tower, self.width)
        self.has_text_encoder = tokenizer is not None
        self.scale, self.projection_ND = SCALE, None
        if self.has_text_encoder:
            self.scale = float(model.logit_scale.float().exp())
            self.projection_ND = model.visual_projection.weight.float()

    # ------------------------------------------------------------ items and readouts

    def preprocess_image(self, image: Any, room: int) -> EncodedInput:
        """`length`: the patches and the class token."""
        if room + self.length > self.max_tokens:
            raise BackboneError(
                f"a prompt of {room} virtual tokens is longer than the {MOST} that {self.name} takes; take fewer "
                "(prompt.num_tokens)"
            )
        return EncodedInput(image, self.length)

    def tokenize(
        self, text: str, pair: str | None, instruction: str, answer: str | None, room: int, writes: int = 0
    ) -> EncodedInput:
        if writes:
            raise self._cannot_write()
        raise BackboneError(
            f"{self.name} sees images and reads no texts; use it for a classification or regression of images, or another "
            "backbone"
        )

    def readout(self, instruction: str, answers: Sequence[str]) -> Tensor:
        """[C, D] of the texts `instruction answer`, such as "a photo of a cat"; only CLIP has a text half."""
        if self.projection_ND is None:
            raise BackboneError(
                f"{self.name} knows no words to score answers by: set task.tuned_head = true, and prompt.head_examples to a "
                "few public labelled images that the head starts from (or use a CLIP)"
            )
        for answer in answers:
            if not answer.strip() or not self.tokenizer(answer, add_special_tokens=False)["input_ids"]:
                raise BackboneError(f"the answer text {answer!r} has no tokens for {self.name}; write it in words")
        texts, longest = [f"{instruction} {answer}".strip() for answer in answers], self.model.text_model.config
        read = self.tokenizer(
            texts, padding=True, truncation=True, max_length=longest.max_position_embeddings, return_tensors="pt"
        ).to(self.device)
        with torch.no_grad():
            pooled = self.model.text_model(**read).pooler_output
            embedded_CN = F.normalize(self.model.text_projection(pooled).float(), dim=-1)
        return self.scale * embedded_CN @ self.projection_ND

    def head_to_readout(self, rows_RCD: Tensor) -> Tensor:
        """Any row length means the same readout: only the direction counts. Those of a CLIP are as long as its texts' t W
        are in the root mean square; each of these is a little longer or shorter."""
        longer = 1.0 if self.projection_ND is None else self.projection_ND.norm() / len(self.projection_ND) ** 0.5
        return F.normalize(rows_RCD.float(), dim=-1) * self.scale * longer

    # ------------------------------------------------------------ starts

    def init_prompt(self, text: str | None, num_tokens: int, enters_at: int, seed: int) -> Tensor:
        """Patches of made-up images, as they are at the layer. The text says nothing here: what a vision transformer has
        within is no words, with a text half beside it or without."""
        items = [EncodedInput(image, self.length) for image in self.synthetic_inputs(8, seed)]
        states_TD = torch.cat([states[1:] for states in self.encode_prefix(items, enters_at)]).float().cpu()
        drawn = torch.randperm(len(states_TD), generator=rng.make_generator(seed, "patches"))
        return states_TD[drawn[torch.arange(num_tokens) % len(drawn)]]

    def synthetic_inputs(self, number: int, seed: int) -> list[RandomImage]:
        return [RandomImage(rng.derive_seed(seed, "nonsense", i)) for i in range(number)]

    # ------------------------------------------------------------ layers

    def encode_prefix(self, items: Sequence[EncodedInput], layer: int) -> list[Tensor]:
        with torch.no_grad():
            states_STD = self._run(self._embedded(self._pixels(items)), 0, layer)
        return [states_TD.clone() for states_TD in states_STD]

    def forward(
        self, prompts_SPD: Tensor, hidden: Sequence[Tensor], items: Sequence[EncodedInput], layer: int
    ) -> ModelOutput:
        states_STD = torch.cat([prompts_SPD.to(self.dtype), torch.stack(list(hidden))], dim=1)
        states_SD = self._run(states_STD, layer, self.depth)[:, prompts_SPD.shape[1]]
        norm = self.tower.post_layernorm if self.has_text_encoder else self.tower.layernorm
        states_SD = norm(states_SD).float()
        if self.projection_ND is None:
            return ModelOutput(F.normalize(states_SD, dim=-1))
        return ModelOutput(states_SD / (states_SD @ self.projection_ND.T).norm(dim=-1, keepdim=True).clamp_min(1e-12))

    def _pixels(self, items: Sequence[EncodedInput]) -> Tensor:
        """[S, 3, height, width]: decoded here and nowhere kept."""
        images = [item.content.open() for item in items]
        return self.processor(images, return_tensors="pt", **self.sizes)["pixel_values"].to(self.device, self.dtype)

    def _embedded(self, pixels: Tensor) -> Tensor:
        """[S, T, D]: class token and patches with their positions, as they enter the first block."""
        if self.model.config.model_type == "dinov2":
            return self.tower.embeddings(pixels)
        states_STD = self.tower.embeddings(pixels, interpolate_pos_encoding=True)
        return self.tower.pre_layrnorm(states_STD) if self.has_text_encoder else states_STD

    def _run(self, states_STD: Tensor, first: int, last: int) -> Tensor:
        for block in self.blocks[first:last]:
            states_STD = block(states_STD, None)
        return states_STD


def _sizes(processor: Any, wanted: int | None, patch: int, name: str) -> tuple[int, dict[str, Any]]:
    """The side of the square that the model sees, and what the image processor is told so that it makes one: where it cuts
    the middle out of a larger image, it goes on to cut out the same part."""
    cuts = bool(getattr(processor, "do_center_crop", False))
    whole = dict(processor.size)
    cut = dict(processor.crop_size) if cuts else whole
    own = cut.get("height")
    if own is None or cut.get("width") != own:
        raise BackboneError(
            f"backbone {name!r}: its image processor makes no squares of one size, but {cut}; mend preprocessor_config.json"
        )
    size = wanted or own
    if size % patch:
        raise BackboneError(
            f"backbone.options.image_size: {size} pixels are no multiple of {name}'s patches of {patch}; take "
            f"{max(1, size // patch) * patch} or {(size // patch + 1) * patch}"
        )
    sizes = {"do_resize": True, "size": {key: round(value * size / own) for key, value in whole.items()}}
    return size, sizes | ({"crop_size": {"height": size, "width": size}} if cuts else {})
