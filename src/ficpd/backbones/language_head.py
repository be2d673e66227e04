"""The language head of a frozen model: its own logits, and rows that give the same where it has no caps and biases."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ficpd.backbones.frozen import FrozenModel

SOME = 64
"""Tokens whose logits are compared."""


class LanguageHead:
    """`scale`: logits are features times `scale` times the rows of the output embedding, as compared at loading; None for a
    head that is not so, for example one with a soft cap or a bias. `norm`: mean length of the rows."""

    def __init__(self, frozen: FrozenModel):
        self.frozen = frozen
        outputs = frozen.model.get_output_embeddings()
        self.weight_VD = outputs.weight if outputs is not None else frozen.table.weight
        self.scale = self._scale()
        step = max(1, len(self.weight_VD) // 1024)
        self.norm = float((self.weight_VD[::step].float() * (self.scale or 1.0)).norm(dim=1).mean())

    def rows(self, ids: Sequence[int]) -> Tensor | None:
        """[N, D] so that features @ rows.T are the logits of these tokens; None where no rows are."""
        if self.scale is None:
            return None
        rows_ND = self.weight_VD[list(ids)].float()
        return rows_ND if self.scale == 1 else rows_ND * self.scale

    def likelihoods(self, before: Sequence[Tensor], wanted: Sequence[Tensor]) -> Tensor:
        """[N]: mean log-likelihoods of tokens [k], each predicted from its state [k, D], by the model's own logits."""
        ids_M = torch.cat(list(wanted)).to(self.frozen.device)
        losses_M = F.cross_entropy(self.frozen.logits(torch.cat(list(before))).float(), ids_M, reduction="none")
        return torch.stack([-part.mean() for part in losses_M.split([len(ids) for ids in wanted])])

    @torch.no_grad()
    def _scale(self) -> float | None:
        """Compares logits with products: at the sample's states, at 100 times them (caps), and at zero (biases)."""
        sample_TD, frozen = self.frozen.sample_TD, self.frozen
        if self.weight_VD.shape[1] != sample_TD.shape[1]:
            return None
        ids = torch.arange(0, len(self.weight_VD), max(1, len(self.weight_VD) // SOME), device=frozen.device)
        products_TN = (sample_TD @ self.weight_VD[ids].T).float()
        own, far, zero = (frozen.logits(sample_TD * times)[:, ids].float() for times in (1, 100, 0))
        scale = float((own * products_TN).sum() / products_TN.square().sum().clamp_min(1e-12))
        scale = 1.0 if abs(scale - 1) < frozen.tolerance else scale
        wrong = max(
            (own - scale * products_TN).abs().max(), (far / 100 - scale * products_TN).abs().max(), zero.abs().max()
        )
        return scale if wrong <= frozen.tolerance * own.abs().max() else None
