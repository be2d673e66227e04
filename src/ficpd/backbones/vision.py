"""Vision transformers (ViT, DeiT, BEiT, DINOv2, DINOv3, and CLIP and SigLIP with their text encoders).

Features are the class token after the last norm, or the model's own pooling (BEiT, SigLIP).

The prompt's virtual tokens are in front of class token and patches. Visual prompt tuning (Jia et al., ECCV 2022, arXiv
2203.12119) puts them between the two; they have no positions, so attention gives the same result. All images have one size,
so nothing is padded.

Most of these models read no words: a task on them tunes a head. For CLIP and SigLIP, answers are embedded texts (Radford et
al., ICML 2021, arXiv 2103.00020; Zhai et al., ICCV 2023, arXiv 2303.15343). CLIP maps the class token f [D] and a text
to N dimensions: to W f, with W [N, D], and t [N]. Features are f / |W f|, and a readout is scale · t W. Their product is
CLIP's logit, scale · t · W f / |W f|. So prompt, features and head rows all have the width D.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoImageProcessor, AutoModel

from ficpd import rng
from ficpd.backbones.devices import copy_to
from ficpd.backbones.guards import FAILURES, Guarded, difference, find_blocks, parameters, watch
from ficpd.backbones.lora import Adapters
from ficpd.backbones.pretrained import Loader, LoadingConfig
from ficpd.backbones.projections import find_projections
from ficpd.errors import BackboneError
from ficpd.interfaces import Backbone
from ficpd.types import EncodedInput, ModelOutput

SCALE = 40.0
"""The factor of cosines without a text encoder. DINOv2's cosines differ less than those of a sentence encoder."""
MOST = 1024
"""The maximum number of virtual tokens. The model itself has no limit."""
SIDE = 256
"""The side of a synthetic image in pixels."""


class Config(LoadingConfig):
    """Sets how images are resized.

    image_size: the side of the square in pixels, a multiple of the patch size; None: that of the model's image processor.
        Smaller images are faster. The model interpolates positions.
    """

    image_size: int | None = Field(default=None, ge=1)


def build(config: Config, weights: Any, *, dtype: torch.dtype, attention: str, device: torch.device, name: str):
    """Loads a vision transformer from a `from_pretrained` folder.

    Raises `BackboneError` if a prompt cannot enter it, or preprocessor_config.json is missing."""
    loader = Loader(Path(weights.folder), name, Vision.about, config, device, dtype, attention)
    processor = loader.read(AutoImageProcessor, "its image processor", backend="pil")
    model, _ = loader.model(AutoModel)
    tokenizer = loader.tokenizer() if hasattr(model, "text_model") else None
    return Vision(config, model, processor, tokenizer, config.identity(weights), name)


@dataclass(frozen=True)
class RandomImage:
    """A synthetic image from a seed: a smooth field of colours, coarse or fine."""

    seed: int

    def open(self) -> Image.Image:
        random = rng.make_generator(self.seed, "colours")
        fine = 2 ** int(torch.randint(1, 6, (1,), generator=random))
        drawn = torch.randint(256, (fine, fine, 3), generator=random, dtype=torch.uint8)
        return Image.fromarray(drawn.numpy()).resize((SIDE, SIDE), Image.Resampling.BICUBIC)


class FrozenTower(Guarded):
    """A frozen image encoder, run by its own forward, with vectors in front of the states of any block.

    size: the side of an image in pixels.
    width: the width of a patch's state.
    length: the number of states of an image.
    prefix: the number of these states that are not patches.
    """

    def __init__(self, tower: Any, name: str, size: int):
        super().__init__(tower, name)
        self.body, self.size, self.width = tower, size, tower.config.hidden_size
        noise = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
        self._noise, self._options = noise.to(self.device, self.dtype), {}
        if "interpolate_pos_encoding" in parameters(type(tower)):
            self._options = {"interpolate_pos_encoding": True}
        try:
            self._prepare()
        except FAILURES as error:
            raise BackboneError(
                f"backbone.name = {name!r}: a {type(tower).__name__} takes no prompt ({type(error).__name__}: "
                f"{str(error)[:200]}). Use another vision transformer."
            ) from error

    def look(self, pixels: Tensor) -> Any:
        return self.body(pixel_values=pixels, **self._options)

    @torch.no_grad()
    def encode(self, pixels: Tensor, layer: int) -> Tensor:
        """Returns the input of a block, [S, T, D], for images [S, 3, size, size]."""
        self.check(layer)
        return self.until(layer, lambda: self.look(pixels))

    def run(self, states_STD: Tensor, layer: int) -> Tensor:
        """Returns the last states for the input of a block. Pixels are not read."""
        self.check(layer)
        pixels = states_STD.new_zeros(len(states_STD), *self._noise.shape[1:])
        return self.entering(layer, states_STD, lambda: self.look(pixels)).last_hidden_state

    @torch.enable_grad()
    def _prepare(self) -> None:
        if getattr(self.body.config, "use_shared_relative_position_bias", False):
            raise ValueError("the relative positions that all its blocks share have no place for a prompt")
        if getattr(self.body.config, "use_relative_position_bias", False):  # BEiT
            self._options = {}
            for part in self.body.modules():
                if hasattr(part, "relative_position_bias_table"):
                    part.register_forward_hook(_room_for_prompt, with_kwargs=True)
        output, calls = watch(self.body, lambda: self.look(self._noise[:1]))
        self._alone = output.last_hidden_state[0]
        blocks, first = find_blocks(self.body, calls, self.width)
        if not blocks:
            raise ValueError("no list of blocks that are each called once, in order, on states of one shape")
        self.length = len(self._alone)
        self.prefix = self.length - (self.size // self.body.config.patch_size) ** 2
        self.guard_blocks(blocks, first)
        self.closed = self.why_closed()
        self.depth = 1 if self.closed else self.depth
        states_STD = self.encode(self._noise, 0)
        self.require(difference(self.run(states_STD, 0)[0], self._alone), "an image's states depend on its batch")
        leaf = torch.cat([states_STD[:, -2:], states_STD], dim=1).requires_grad_(True)
        last_STD = self.run(leaf, 0)
        weight_D = torch.linspace(-1, 1, self.width, device=self.device)
        for row in range(2):
            self.require_own_gradient(last_STD[row, 2].float() @ weight_D, leaf, row)

    @torch.no_grad()
    def differs(self, layer: int) -> str:
        def compare() -> float:
            states_STD = self.until(layer, lambda: self.look(self._noise[:1]))
            last = self.entering(layer, states_STD, lambda: self.look(self._noise[:1])).last_hidden_state
            return difference(last[0], self._alone)

        return self.why_not(layer, compare)


class Vision(Backbone):
    """A frozen vision transformer. At layer 0 the prompt joins the first block's input (behind CLIP's first norm)."""

    modality, supports_gradients, about = "image", True, "a vision transformer"

    def __init__(self, config: Config, model: Any, processor: Any, tokenizer: Any, identity: str, name: str):
        self.model, self.processor, self.tokenizer, self.name = (
            model.eval().requires_grad_(False), processor, tokenizer, name
        )  # fmt: skip
        self.tower = getattr(model, "vision_model", model)
        size, self.sizes = _sizes(processor, config.image_size, self.tower.config.patch_size, name)
        self.frozen = FrozenTower(self.tower, name, size)
        self.width, self.depth, self.length = self.frozen.width, self.frozen.depth, self.frozen.length
        self.num_blocks = self.frozen.num_blocks
        self.max_tokens = self.length + MOST
        self.fingerprint = f"vision:{identity}:{size}"
        self.device, self.dtype = model.device, model.dtype
        self.adapters = Adapters(partial(_projections, self.frozen), self.width)
        self.has_text_encoder = tokenizer is not None
        self.scale, self.projection_ND = SCALE, None
        if self.has_text_encoder:
            self.scale = float(model.logit_scale.float().exp())
        if hasattr(model, "visual_projection"):
            self.projection_ND = model.visual_projection.weight.float()

    def set_attention(self, attention: str) -> bool:
        return self.frozen.set_attention(attention)

    def checkpoint_blocks(self, on: bool) -> None:
        self.frozen.checkpoint_blocks(on)

    # ------------------------------------------------------------ items and readouts

    def preprocess_image(self, image: Any, room: int) -> EncodedInput:
        """Returns an item whose `length` counts all states of the image. Raises `BackboneError` for a long prompt."""
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
        """Returns the embedded texts `instruction answer`, [C, D]. Only CLIP and SigLIP have a text encoder."""
        if not self.has_text_encoder:
            raise BackboneError(
                f"{self.name} knows no words to score answers by: set task.tuned_head = true, and prompt.head_examples to a "
                "few public labelled images that the head starts from (or use a CLIP)"
            )
        for answer in answers:
            if not answer.strip() or not self.tokenizer(answer, add_special_tokens=False)["input_ids"]:
                raise BackboneError(f"the answer text {answer!r} has no tokens for {self.name}; write it in words")
        texts, longest = [f"{instruction} {answer}".strip() for answer in answers], self.model.text_model.config
        padding: Any = True if self.projection_ND is not None else "max_length"
        read = self.tokenizer(
            texts, padding=padding, truncation=True, max_length=longest.max_position_embeddings, return_tensors="pt"
        ).to(self.device)
        given = read if self.projection_ND is not None else {"input_ids": read["input_ids"]}  # SigLIP reads its padding
        with torch.no_grad():
            embedded_CN = self.model.text_model(**given).pooler_output
            if self.projection_ND is None:
                return self.scale * F.normalize(embedded_CN.float(), dim=-1)
            embedded_CN = F.normalize(self.model.text_projection(embedded_CN).float(), dim=-1)
        return self.scale * embedded_CN @ self.projection_ND

    def head_to_readout(self, rows_RCD: Tensor) -> Tensor:
        """Scales rows to a fixed length: only their directions matter. For CLIP it is the root mean square length of t W
        over unit vectors t."""
        longer = 1.0 if self.projection_ND is None else self.projection_ND.norm() / len(self.projection_ND) ** 0.5
        return F.normalize(rows_RCD.float(), dim=-1) * self.scale * longer

    # ------------------------------------------------------------ starts

    def init_prompt(self, text: str | None, num_tokens: int, enters_at: int, seed: int) -> Tensor:
        """Returns patches of synthetic images at the layer, [num_tokens, D]. The text is not used."""
        items = [EncodedInput(image, self.length) for image in self.synthetic_inputs(8, seed)]
        states_TD = (
            torch.cat([states[self.frozen.prefix :] for states in self.encode_prefix(items, enters_at)]).float().cpu()
        )
        drawn = torch.randperm(len(states_TD), generator=rng.make_generator(seed, "patches"))
        return states_TD[drawn[torch.arange(num_tokens) % len(drawn)]]

    def synthetic_inputs(self, number: int, seed: int) -> list[RandomImage]:
        return [RandomImage(rng.derive_seed(seed, "nonsense", i)) for i in range(number)]

    # ------------------------------------------------------------ layers

    def encode_prefix(self, items: Sequence[EncodedInput], layer: int) -> list[Tensor]:
        return [states_TD.clone() for states_TD in self.frozen.encode(self._pixels(items), layer)]

    def forward(
        self, prompts_SPD: Tensor, hidden: Sequence[Tensor], items: Sequence[EncodedInput], layer: int
    ) -> ModelOutput:
        states_STD = torch.cat([prompts_SPD.to(self.dtype), torch.stack(list(hidden))], dim=1)
        states_SD = self._pooled(self.frozen.run(states_STD, layer)[:, prompts_SPD.shape[1] :]).float()
        if self.projection_ND is None:
            return ModelOutput(F.normalize(states_SD, dim=-1))
        return ModelOutput(states_SD / (states_SD @ self.projection_ND.T).norm(dim=-1, keepdim=True).clamp_min(1e-12))

    def _pooled(self, states_STD: Tensor) -> Tensor:
        """Pools the images' last states, without the prompt's, to [S, D]."""
        if getattr(self.tower, "use_head", False):  # SigLIP
            return self.tower.head(states_STD)
        if getattr(self.tower.config, "use_mean_pooling", False):  # BEiT
            return self.tower.pooler(states_STD)
        return self.tower.post_layernorm(states_STD[:, 0]) if self.has_text_encoder else states_STD[:, 0]

    def _pixels(self, items: Sequence[EncodedInput]) -> Tensor:
        """Decodes images to [S, 3, height, width], and does not keep them."""
        images = [item.content.open() for item in items]
        pixels = self.processor(images, return_tensors="pt", **self.sizes)["pixel_values"]
        return copy_to(pixels, self.device, self.dtype)


def _projections(frozen: FrozenTower) -> dict[str, torch.nn.Module]:
    return find_projections(frozen.body, lambda: frozen.look(frozen._noise))


def _room_for_prompt(module: Any, args: Any, kwargs: Any, bias_1HTT: Tensor) -> Tensor:
    """Pads the bias of relative positions with zeros for the virtual tokens, which have no positions."""
    virtual = kwargs["dim_size"] - bias_1HTT.shape[-1]
    return F.pad(bias_1HTT, (virtual, 0, virtual, 0))


def _sizes(processor: Any, wanted: int | None, patch: int, name: str) -> tuple[int, dict[str, Any]]:
    """Returns the side of the model's input in pixels, and the image processor's sizes for it.

    A processor that crops the centre of a larger image keeps the same proportion.
    """
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
