"""Checks a backbone from a module outside the package on two short rows, when it is loaded.

Guarantees: an unexpected shape or type, a row that depends on other rows, and a gradient for another row's prompt are
errors (`tests/test_own_mistakes.py`).
"""

from typing import Any

import torch
from torch import Tensor

from ficpd.backbones.guards import difference
from ficpd.errors import BackboneError
from ficpd.interfaces import Backbone
from ficpd.types import LENGTH_STEP, EncodedInput, ModelOutput

TOKENS = 4
"""The number of virtual tokens of the trial."""
TOLERANCE = 5e-2
"""The largest relative difference between a row alone and among others, for bfloat16 kernels."""
FIELDS = ("name", "fingerprint", "width", "depth", "max_tokens", "device")


def check_contract(backbone: Backbone, kind: str) -> None:
    """Raises `BackboneError`, naming the function, if the backbone breaks the contract of `Backbone`."""
    trial = _Trial(backbone, kind)
    for name in FIELDS:
        trial.require(hasattr(backbone, name), f"it has no `{name}`", ", ".join(FIELDS))
    items = trial.items()
    trial.check_readout(items[0])
    if backbone.supports_features:
        for layer in sorted({0, backbone.depth - 1}):
            trial.check_layer(items, layer)


class _Trial:
    def __init__(self, backbone: Backbone, kind: str):
        self.backbone, self.kind = backbone, kind

    def require(self, holds: bool, found: str, expected: str) -> None:
        if not holds:
            raise BackboneError(f"backbone.kind = {self.kind!r}: {found}; expected {expected}")

    def items(self) -> list[EncodedInput]:
        """Encodes two synthetic inputs: texts of different lengths, or images."""
        backbone = self.backbone
        long, short = backbone.synthetic_inputs(2, 0)
        if backbone.modality == "image":
            return [backbone.preprocess_image(image, TOKENS) for image in (long, short)]
        endless = self._encoded("word " * 2 * backbone.max_tokens)
        room = backbone.max_tokens - TOKENS
        self.require(endless.length <= room, f"tokenize gives {endless.length} tokens", f"max_tokens - room = {room}")
        padded = " ".join([long] * (LENGTH_STEP + 1))  # gives the short row more padding than it has alone
        return [self._encoded(padded), self._encoded(short.split()[0])]

    def _encoded(self, text: str, answer: str | None = None) -> EncodedInput:
        item: Any = self.backbone.tokenize(text, None, "", answer, TOKENS)
        self.require(isinstance(item, EncodedInput), f"tokenize gives a {type(item).__name__}", "an EncodedInput")
        return item

    def check_readout(self, item: EncodedInput) -> None:
        """Checks the readout of two answers, or without a readout the scored tokens of an answer."""
        backbone = self.backbone
        if not backbone.has_text_encoder:
            return
        rows_CD = backbone.readout("", ["good", "bad"])
        if rows_CD is not None:
            self._require_shape("readout", rows_CD, (2, backbone.width))
        elif backbone.modality == "text":
            scored = self._encoded("word", "good").scored
            self.require(scored > 0, "readout gives None, and tokenize an answer with scored = 0", "scored tokens")

    def check_layer(self, items: list[EncodedInput], layer: int) -> None:
        """Compares two rows with each row alone, and checks that a row has no gradient for the other's prompt."""
        backbone = self.backbone
        prompt_PD = backbone.init_prompt(None, TOKENS, layer, 0)
        self._require_shape("init_prompt", prompt_PD, (TOKENS, backbone.width))
        hidden = backbone.encode_prefix(items, layer)
        for states_TD, item in zip(hidden, items, strict=True):
            whole = item.length if backbone.modality == "text" else len(states_TD)
            self._require_shape("encode_prefix", states_TD, (whole, backbone.width))
        prompts_SPD = prompt_PD.expand(2, -1, -1).to(backbone.device, torch.float32).clone()
        with torch.enable_grad():
            prompts_SPD.requires_grad_(backbone.supports_gradients)
            rows_RD = self._features(prompts_SPD, hidden, items, layer)
            for row in range(2):
                one = slice(row, row + 1)
                alone_RD = self._features(prompts_SPD.detach()[one], hidden[one], items[one], layer)
                differs = difference(rows_RD[one], alone_RD.detach())
                self.require(
                    differs <= TOLERANCE, f"forward gives a row other features among others than alone ({differs:.2g})",
                    f"at most {TOLERANCE:g}: rows never see each other, padding is masked, and there is no dropout",
                )  # fmt: skip
                if backbone.supports_gradients:
                    self._check_gradient(rows_RD[row], prompts_SPD, row)

    def _features(self, prompts_SPD: Tensor, hidden: list[Tensor], items: list[EncodedInput], layer: int) -> Tensor:
        output: Any = self.backbone.forward(prompts_SPD, hidden, items, layer)
        self.require(isinstance(output, ModelOutput), f"forward gives a {type(output).__name__}", "a ModelOutput")
        self._require_shape("forward", output.features_RD, (len(items), self.backbone.width))
        kind = output.features_RD.dtype
        self.require(kind == torch.float32, f"forward gives {kind} features", "torch.float32")
        return output.features_RD

    def _check_gradient(self, features_D: Tensor, prompts_SPD: Tensor, row: int) -> None:
        weight_D = torch.linspace(-1, 1, len(features_D), device=features_D.device)  # a norm's plain sum is constant
        value = features_D @ weight_D
        self.require(value.requires_grad, "its features have no gradient for the prompt", "one; detach nothing")
        grad_SPD = torch.autograd.grad(value, prompts_SPD, retain_graph=True, allow_unused=True)[0]
        found = grad_SPD is not None and bool(grad_SPD[row].isfinite().all() and grad_SPD[row].any())
        self.require(found, "its features have no finite gradient for the prompt", "one in each row")
        assert grad_SPD is not None
        strange = float(grad_SPD[1 - row].abs().max())
        self.require(strange == 0, f"a row has a gradient of {strange:.2g} for another row's prompt", "0")

    def _require_shape(self, function: str, given: Any, shape: tuple[int, ...]) -> None:
        found = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
        names = "width" if shape[-1] == self.backbone.width else "rows"
        self.require(found == shape, f"{function} gives the shape {found}", f"{shape}, the last one its {names}")
        self.require(
            function == "forward" or not given.requires_grad, f"{function} gives values with a gradient",
            "none: call requires_grad_(False) on the weights",
        )  # fmt: skip
