"""Computes next-token logits of a frozen decoder step by step, with a prompt that enters at any layer.

The layers below the prompt never see it, and the others always do. So there are two caches: of the text for the layers
below, and of prompt and text for the others. Rows are padded on the left. The first use of a layer compares this with whole
forwards. A model that gives other logits, or has no such cache, runs without a cache, which is slower.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from ficpd.backbones.decoding import Step
from ficpd.backbones.frozen import FrozenModel
from ficpd.backbones.guards import FAILURES, difference, parameters
from ficpd.types import HiddenStates

STEPS = 3
"""The number of steps in the comparison. The first step reads the text."""


class Writing:
    """Makes `decoding.Step` functions. `cached`: by layer, whether the caches give the logits of whole forwards."""

    def __init__(self, frozen: FrozenModel):
        self.frozen = frozen
        first = frozen.remembered("cache", frozen.identity, lambda: self._agrees(0))
        self.cached = {0: first}  # not at its first use, which may be with LoRA

    def steps(self, prompts_SPD: Tensor, rows: Sequence[Tensor], layer: int) -> Step:
        """Returns the step function for texts (embeddings [T, E] each). It maps the last tokens [S] to logits [S, V]."""
        if layer not in self.cached:
            self.cached[layer] = self._agrees(layer)
        return (self._with_cache if self.cached[layer] else self._whole)(prompts_SPD, rows, layer)

    def _whole(self, prompts_SPD: Tensor, rows: Sequence[Tensor], layer: int) -> Step:
        frozen, texts, lead = self.frozen, list(rows), prompts_SPD.shape[1]

        def step(ids_S: Tensor | None) -> Tensor:
            if ids_S is not None:
                texts[:] = [
                    torch.cat([text, new]) for text, new in zip(texts, frozen.embed(ids_S[:, None]), strict=True)
                ]
            states_STD, _ = frozen.run(prompts_SPD, frozen.encode(texts, layer), layer)
            lasts = [states[lead + len(text) - 1] for states, text in zip(states_STD, texts, strict=True)]
            return frozen.logits(torch.stack(lasts))

        return step

    def _with_cache(self, prompts_SPD: Tensor, rows: Sequence[Tensor], layer: int) -> Step:
        frozen, lead = self.frozen, prompts_SPD.shape[1]
        below, above = (DynamicCache(config=frozen.body.config.get_text_config(decoder=True)) for _ in range(2))
        lengths = [[len(row) + more for row in rows] for more in (0, lead)]
        masks = [HiddenStates.of([rows[0].new_zeros(n, 1) for n in part], left=True).mask_ST for part in lengths]

        def step(ids_S: Tensor | None) -> Tensor:
            if ids_S is None:
                text = HiddenStates.of(rows, left=True)
                lower = frozen.lower(layer, text.states_STD, self._given(masks[0], text.states_STD, below))
                whole = [
                    torch.cat([p, states[-len(r) :]]) for p, states, r in zip(prompts_SPD, lower, rows, strict=True)
                ]
                upper = HiddenStates.of(whole, left=True).states_STD
            else:
                masks[:] = [torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1) for mask in masks]
                new = frozen.embed(ids_S[:, None])
                upper = frozen.lower(layer, new, self._given(masks[0], new, below))
            return frozen.logits(frozen.upper(layer, upper, self._given(masks[1], upper, above))[:, -1])

        return step

    def _given(self, mask_SK: Tensor, states: Tensor, cache: Any) -> dict[str, Any]:
        """Returns the arguments of a forward over the last columns of a mask. Each row's first token has position 0."""
        given = {"attention_mask": mask_SK.long(), "past_key_values": cache, "use_cache": True}
        if "position_ids" in parameters(type(self.frozen.body)):
            given["position_ids"] = (mask_SK.cumsum(1) - 1).clamp(min=0)[:, -states.shape[1] :]
        return given

    @torch.no_grad()
    def _agrees(self, layer: int) -> bool:
        """Tells whether the caches give the logits of whole forwards, for two rows of different lengths."""
        frozen = self.frozen
        if "past_key_values" not in parameters(type(frozen.body)):
            return False
        ids = frozen.sample_ids()
        rows = [frozen.embed(row) for row in ids]
        prompts_SPD = torch.stack([states[:2] for states in frozen.encode(rows, layer)])
        chosen = [None, *torch.stack([row[:STEPS] for row in ids], dim=1)[: STEPS - 1]]
        try:
            fast, slow = (make(prompts_SPD, rows, layer) for make in (self._with_cache, self._whole))
            return all(difference(fast(new), slow(new)) <= frozen.tolerance for new in chosen)
        except FAILURES:
            return False
