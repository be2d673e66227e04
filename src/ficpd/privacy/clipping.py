"""Clipping: bounds the contribution of a record, a subject or a client to a sum, and the prompts of queries."""

from collections.abc import Iterable

import torch
from torch import Tensor

from ficpd.types import LORA, Prompt, Query

MARGIN = 1 - 1e-4
"""Rows are scaled to this share of the norm, because rounding might lengthen them.

In a forward of several records, the rounding of a row depends on the other rows. In float32 this margin covers it; in
bfloat16 it does not. At a real site no record changes another's row, to the last bit (`QueryEngine`, `exact`).
"""


def clipped_sum(rows_BN: Tensor, clip_norm: float) -> Tensor:
    """Sums clipped rows, Σ_b x_b · min(1, clip_norm/|x_b|): [B, N] to float64 [N].

    Abadi et al., CCS 2016, arXiv 1607.00133, algorithm 1.

    Guarantees: adding, removing or zeroing any one row moves the result by at most `clip_norm`. A row with a value that
    is not finite counts as zero. The bound also holds if all other rows together change by 1e-4 of it
    (`tests/privacy/test_clipping.py`).
    """
    finite_B = torch.isfinite(rows_BN).all(dim=1)
    if not finite_B.all():
        rows_BN = torch.where(finite_B[:, None], rows_BN, torch.zeros((), dtype=rows_BN.dtype, device=rows_BN.device))
    norm_B = torch.linalg.vector_norm(rows_BN, dim=1, dtype=torch.float64)
    factor_B = (MARGIN * clip_norm / norm_B.clamp(min=1e-300)).clamp(max=1.0)
    return factor_B @ rows_BN.double()


def sum_by_subject(rows_BN: Tensor, subject_B: Tensor) -> Tensor:
    """Sums each subject's rows, in ascending order of subjects: [B, N] to float64 [S, N].

    Guarantees: a row changes only the sum of its own subject, to the last bit (`tests/privacy/test_clipping.py`).
    """
    subjects, place_B = torch.unique(subject_B.to(rows_BN.device), return_inverse=True)
    sums_SN = rows_BN.new_zeros((len(subjects), rows_BN.shape[1]), dtype=torch.float64)
    return sums_SN.index_add_(0, place_B, rows_BN.double())


def clipped_subject_sum(chunks: Iterable[Tensor], subject_B: Tensor, kept_B: Tensor, clip_norm: float) -> Tensor:
    """Sums each subject's kept rows, clips the sums, and adds them up: chunks [b, N] to float64 [N].

    Keeps in memory only the sums of subjects with rows still to come.

    Guarantees: adding, removing or zeroing all rows of one subject moves the result by at most `clip_norm`, however the
    rows are divided into chunks (`tests/privacy/test_clipping.py`).
    """
    last = {subject: place for place, subject in enumerate(subject_B.tolist())}
    held: dict[int, Tensor] = {}
    total, end = None, 0
    for chunk in chunks:
        begin, end = end, end + len(chunk)
        of_b = subject_B[begin:end]
        if len(of_b) != len(chunk):
            break  # the caller refuses any other number of rows
        kept_b = kept_B[begin:end]
        sums = sum_by_subject(chunk[kept_b.to(chunk.device)], of_b[kept_b])
        for subject, row in zip(of_b[kept_b].unique().tolist(), sums, strict=True):
            held[subject] = held[subject] + row if subject in held else row
        done = [held.pop(subject) for subject in list(held) if last[subject] < end]
        summed = clipped_sum(torch.stack(done) if done else chunk.new_zeros(0, chunk.shape[1]), clip_norm)
        total = summed if total is None else total + summed
    assert total is not None, "a client has records"
    return total


def clip_scale(grad_scale: Tensor) -> Tensor:
    """Returns the factors [size] of a subspace's directions before clip and noise. 1/factors undoes them.

    With 1/√grad_scale the sum of the directions' relative errors under isotropic noise is smallest.
    """
    return (grad_scale.max() / grad_scale).sqrt()


def rescale(values_KB: Tensor, grad_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """Scales [K, B, ...] before the clip. Returns it, and the factors by which the mean is divided."""
    if grad_scale is None:
        return values_KB, torch.ones(())
    scale = clip_scale(grad_scale)
    return values_KB * scale.to(values_KB.device), scale


def clip_query(query: Query, start: Prompt) -> Query:
    """Scales rows of queried prompts down to `start.max_norm` if they are longer.

    Rounding errors grow for prompts far outside of the backbone's usual inputs. LoRA weights and token ids stay unchanged.
    """
    rows = query.prompts_KPD
    if start.enters_at == LORA or not rows.is_floating_point() or start.within_max_norm(rows):
        return query
    return query._replace(prompts_KPD=rows * (start.max_norm / rows.norm(dim=-1, keepdim=True)).clamp(max=1))
