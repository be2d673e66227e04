"""Clipping: the one step that bounds what a record, or a client, can do to a sum."""

import torch
from torch import Tensor

MARGIN = 1 - 1e-4
"""Rows are scaled to this much of the norm, so that rounding takes none past it: neither the scaling's own, nor the
model's. A model computes records side by side, and without one of them the others' rows are rounded otherwise: with 64
records on MiniLM in float32 by 6e-7 of the norm all together, and 9e-7 at ten times the start's length. What bfloat16
does is not covered. A real site gives each record a forward of its own (`compute.ONE_ROW`)."""


def clipped_sum(rows_BN: Tensor, clip_norm: float) -> Tensor:
    """[B, N] to float64 [N]: Σ_b x_b · min(1, clip_norm/|x_b|) (Abadi et al., CCS 2016, arXiv 1607.00133, algorithm 1).

    Guarantees: adding, removing or changing to zero one row moves the result by at most `clip_norm`, whatever the
    row holds: a row with a value that is not finite counts zero; also if all other rows change by 1e-4 of it together
    (`tests/privacy/test_clip.py`).
    """
    finite_B = torch.isfinite(rows_BN).all(dim=1)
    if not finite_B.all():
        rows_BN = torch.where(finite_B[:, None], rows_BN, torch.zeros((), dtype=rows_BN.dtype, device=rows_BN.device))
    norm_B = torch.linalg.vector_norm(rows_BN, dim=1, dtype=torch.float64)
    factor_B = (MARGIN * clip_norm / norm_B.clamp(min=1e-300)).clamp(max=1.0)
    return factor_B @ rows_BN.double()
