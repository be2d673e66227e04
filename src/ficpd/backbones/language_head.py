"""Finds the rows of a language head whose products with features are its logits."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


class LanguageHead:
    """The head that maps features to logits of the vocabulary.

    scale: logits are features times `scale` times the rows of the output embedding; None with a soft cap or a bias.
    norm: the mean length of the rows.
    """

    def __init__(self, model: Any, features_TD: Tensor, logits: Mapping[int, Tensor], tolerance: float):
        """Compares the logits [T, V] of features times each factor with products: 100 shows caps, 0 shows biases."""
        outputs = model.get_output_embeddings()
        self.weight_VD, self.scale = (outputs if outputs is not None else model.get_input_embeddings()).weight, None
        if self.weight_VD.shape[1] == features_TD.shape[1]:
            self.scale = self._scale(features_TD, logits, tolerance)
        step = max(1, len(self.weight_VD) // 1024)
        self.norm = float((self.weight_VD[::step].float() * (self.scale or 1.0)).norm(dim=1).mean())

    def rows(self, ids: Sequence[int]) -> Tensor | None:
        """Returns rows [N, D] so that features @ rows.T are the logits of these tokens; None without `scale`."""
        return None if self.scale is None else self.weight_VD[list(ids)].float() * self.scale

    def _scale(self, features_TD: Tensor, logits: Mapping[int, Tensor], tolerance: float) -> float | None:
        some = slice(0, None, max(1, len(self.weight_VD) // 64))
        products_TN, own_TN = (features_TD @ self.weight_VD[some].T).float(), logits[1][:, some].float()
        scale = float((own_TN * products_TN).sum() / products_TN.square().sum().clamp_min(1e-12))
        scale = 1.0 if abs(scale - 1) < tolerance else scale
        wrong = [
            (values[:, some].float() - factor * scale * products_TN).abs().max() / max(1, factor)
            for factor, values in logits.items()
        ]
        return scale if max(wrong) <= tolerance * own_TN.abs().max() else None


def mean_likelihoods(logits_MV: Tensor, wanted: Sequence[Tensor]) -> Tensor:
    """Returns the mean log-likelihoods [N] of N texts, from the logits [M, V] of all their tokens in order."""
    losses_M = F.cross_entropy(logits_MV.float(), torch.cat(list(wanted)).to(logits_MV.device), reduction="none")
    return torch.stack([-part.mean() for part in losses_M.split([len(ids) for ids in wanted])])
