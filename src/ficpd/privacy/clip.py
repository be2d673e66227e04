"""Clipping: the one step that bounds what a record, or a client, can do to a sum."""

import torch
from torch import Tensor

ROUNDING = 1 - 1e-6
"""Rows are scaled to this much of the norm, so that rounding never takes one past it."""


def clipped_sum(rows_BN: Tensor, clip_norm: float) -> Tensor:
    """[B, N] to float64 [N]: Σ_b x_b · min(1, clip_norm/|x_b|) (Abadi et al., CCS 2016, arXiv 1607.00133, algorithm 1).

    Guarantees: adding, removing or changing to zero one row moves the result by at most `clip_norm`, whatever the
    row holds: a row with a value that is not finite counts zero (`tests/privacy/test_clip.py`).
    """
    finite_B = torch.isfinite(rows_BN).all(dim=1)
    if not finite_B.all():
        rows_BN = torch.where(finite_B[:, None], rows_BN, torch.zeros((), dtype=rows_BN.dtype, device=rows_BN.device))
    norm_B = torch.linalg.vector_norm(rows_BN, dim=1, dtype=torch.float64)
    factor_B = (ROUNDING * clip_norm / norm_B.clamp(min=1e-300)).clamp(max=1.0)
    return factor_B @ rows_BN.double()
