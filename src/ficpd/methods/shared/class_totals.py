"""Class totals: sums over records by label, from which the server learns a readout in one round.

A record with feature f (at the public start) and label y gives the row

    z = (f - m) / c        row = onehot(y) ⊗ [κ, z], and with the Gram matrix also z zᵀ        all over `row_norm`

with a public centre m and scale c. Summed over clients, rows do not depend on who holds which record. With the Gram matrix
the readout is the ridge regression of one-hot labels on all records together (Analytic Federated Learning, He et al.,
CVPR 2025, arXiv 2405.16240; Fed3R, Fanì et al., ICML 2024, arXiv 2406.01116). Without it the readout is made of class
means (FedNCM, Legate et al., NeurIPS 2023, arXiv 2303.06972), shrunk towards the label texts by empirical Bayes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ficpd import rng
from ficpd.types import Readout

CLASSES = "classes"
"""Name of the statistic, and of its array in an update."""
COUNT_WEIGHT = 0.3
"""κ. With a small weight of the count, most of a row's norm is left to the feature."""
PENALTIES = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0)
"""Candidate penalties of the ridge regression. Generalised cross-validation chooses one."""
CAUTION = 0.5
"""Factor on the scale that is best for the totals, because other records score lower than training records."""
LEAST_LEFT = 0.02
"""Minimum of `left` (see `_best_scale`), for fewer records than features."""
DRAWS = 100
SURE = 2.0
"""Minimum number of records, in standard errors of the noise on their count."""
SCALES = 2.0 ** torch.arange(-2, 9, 0.5)
WIDEST_GRAM = 512
"""Maximum number of features for which the Gram matrix is sent."""
CHUNK_NUMBERS = 1 << 25
TINY = 1e-9


@dataclass(frozen=True, eq=False)
class PublicFeatures:
    """Standardises features by synthetic records at the start prompt.

    centre_D: m. scale: c, the longest distance of a synthetic feature from m. covariance_DD: of z.
    """

    centre_D: Tensor
    scale: float
    covariance_DD: Tensor

    @staticmethod
    def of(features_MD: Tensor) -> "PublicFeatures":
        features = features_MD.double().cpu()
        centre = features.mean(0)
        scale = max(float((features - centre).norm(dim=1).max()), TINY)
        covariance = torch.cov(((features - centre) / scale).T)
        return PublicFeatures(centre.float(), scale, covariance.float())


@dataclass(frozen=True, eq=False)
class ClassTotals:
    """counts_C, sums_CD of z, and the Gram matrix of z if it was sent. float64."""

    counts_C: Tensor
    sums_CD: Tensor
    gram_DD: Tensor | None

    def __add__(self, other: "ClassTotals") -> "ClassTotals":
        gram = None if self.gram_DD is None or other.gram_DD is None else self.gram_DD + other.gram_DD
        return ClassTotals(self.counts_C + other.counts_C, self.sums_CD + other.sums_CD, gram)


def row_norm(gram: bool) -> float:
    """Returns the norm of a row of a record with |z| = 1, by which rows are divided."""
    return (1 + COUNT_WEIGHT**2 + float(gram)) ** 0.5


def totals_size(num_labels: int, width: int, gram: bool) -> int:
    """Returns the size of the totals of this many labels and features."""
    return num_labels * (1 + width) + (width * (width + 1) // 2 if gram else 0)


def total_rows(
    features_BD: Tensor, targets_B: Tensor, centre_D: Tensor, scale: float, num_labels: int, gram: bool
) -> Tensor:
    """Returns [B, N], one row of each record. Its norm is at most 1 if |z| is."""
    z_BD = (features_BD.float().cpu() - centre_D) / scale
    parts = F.pad(z_BD, (1, 0), value=COUNT_WEIGHT)
    rows = [(F.one_hot(targets_B.cpu(), num_labels)[:, :, None] * parts[:, None]).flatten(1)]
    if gram:
        left, right = torch.triu_indices(z_BD.shape[1], z_BD.shape[1])
        rows.append(z_BD[:, left] * z_BD[:, right] * _triangle_weights(left, right))
    return torch.cat(rows, dim=1) / row_norm(gram)


def row_chunks(
    features_BD: Tensor, targets_B: Tensor, centre_D: Tensor, scale: float, num_labels: int, gram: bool
) -> Iterator[Tensor]:
    """Yields `total_rows` in chunks of `CHUNK_NUMBERS` values, because rows with a Gram matrix are long."""
    most = max(CHUNK_NUMBERS // totals_size(num_labels, features_BD.shape[1], gram), 1)
    for features, targets in zip(features_BD.split(most), targets_B.split(most), strict=True):
        yield total_rows(features, targets, centre_D, scale, num_labels, gram)


def padded_totals(summed_N: Tensor, num_labels: int, most_labels: int, width: int) -> Tensor:
    """Adds zeros for labels of other tasks, so that all updates of a round have the same size."""
    by_label = num_labels * (1 + width)
    missing = summed_N.new_zeros((most_labels - num_labels) * (1 + width))
    return torch.cat([summed_N[:by_label], missing, summed_N[by_label:]])


def split_totals(summed_N: Tensor, num_labels: int, most_labels: int, width: int, gram: bool) -> ClassTotals:
    """Returns the totals of a client whose task has `num_labels` of `most_labels`."""
    numbers = summed_N.double() * row_norm(gram)
    by_label = numbers[: most_labels * (1 + width)].view(most_labels, 1 + width)[:num_labels]
    gram_DD = None
    if gram:
        left, right = torch.triu_indices(width, width)
        upper = torch.zeros(width, width, dtype=torch.double)
        upper[left, right] = numbers[most_labels * (1 + width) :] / _triangle_weights(left, right)
        gram_DD = upper + upper.triu(1).T
    return ClassTotals(by_label[:, 0] / COUNT_WEIGHT, by_label[:, 1:], gram_DD)


def _triangle_weights(left: Tensor, right: Tensor) -> Tensor:
    """Returns √2 off the diagonal, so that the triangle has the norm of the matrix."""
    return torch.where(left == right, 1.0, 2.0**0.5)


def learn_readout(
    totals: Sequence[ClassTotals], text_CD: Tensor, public: PublicFeatures, noisy: bool = False, noise: float = 0.0
) -> Readout | None:
    """Learns the readout of one task key from its clients' totals. Returns None if they hold no records, or only noise.

    text_CD: the label texts' readout, kept by labels without records (zero: no prior).
    noisy: the totals have noise of a privacy mechanism.
    noise: its variance in each number of each sum sent, if it is public.
    """
    texts_CD, summed = _texts(text_CD, public), sum(totals[1:], totals[0])
    if not bool((summed.counts_C.sum() > 1) & torch.isfinite(summed.sums_CD).all()):
        return None
    if summed.gram_DD is not None:
        return _ridge(summed, texts_CD, public, _least_penalty(totals, noisy))[0]
    return _class_means(totals, texts_CD, public, noisy, noise * row_norm(False) ** 2)


def left_out_readouts(
    totals: Sequence[ClassTotals], text_CD: Tensor, public: PublicFeatures, noisy: bool = False
) -> list[Readout | None]:
    """Learns for each client the readout of the other clients' totals, by which its own records can be scored.

    With Gram matrices, all have the penalty and the scale of the readout of all totals: one solution a client.
    """
    others = [[*totals[:n], *totals[n + 1 :]] for n in range(len(totals))]
    if len(totals) < 2 or totals[0].gram_DD is None:
        return [learn_readout(of, text_CD, public, noisy) if of else None for of in others]
    texts_CD, least, summed = _texts(text_CD, public), _least_penalty(totals, noisy), sum(totals[1:], totals[0])
    _, settings = _ridge(summed, texts_CD, public, least)
    rest = [sum(of[1:], of[0]) for of in others]
    return [
        _ridge(one, texts_CD, public, least, settings)[0] if float(one.counts_C.sum()) > 1 else None for one in rest
    ]


def _texts(text_CD: Tensor, public: PublicFeatures) -> Tensor:
    """Returns the label texts' readout as rows of z."""
    if not text_CD.any():
        return torch.zeros_like(text_CD, dtype=torch.double)
    texts_CD = F.normalize(text_CD.double().cpu(), dim=1) - public.centre_D.double()
    return (texts_CD - texts_CD.mean(0)) / public.scale


def _least_penalty(totals: Sequence[ClassTotals], noisy: bool) -> float:
    """Returns 2 s √D, about the norm of a symmetric noise matrix of deviation s: no direction is then negative."""
    if not noisy:
        return 0.0
    grams = torch.stack([one.gram_DD for one in totals if one.gram_DD is not None])
    return 2 * (float(_scatter(grams).mean()) * grams.shape[-1]) ** 0.5


def ridge_rows(totals: ClassTotals, penalty: float, prior_CD: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Returns rows [C, D] and intercepts [C] of the ridge regression of one-hot labels on z, shrunk towards a prior.

    Equals the regression on all records together: centred cross products follow from counts, sums and Gram matrix.
    """
    records, mean_D, centred_DD, cross_CD = _centred(totals)
    shares_C = totals.counts_C / records
    prior = torch.zeros_like(cross_CD) if prior_CD is None else prior_CD
    ridge = centred_DD + penalty * torch.eye(len(mean_D), dtype=torch.double)
    rows_CD = prior + torch.linalg.solve(ridge, (cross_CD - prior @ centred_DD).T).T
    return rows_CD, shares_C - rows_CD @ mean_D


def _centred(totals: ClassTotals) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the number of records, the mean of z, and the centred Gram matrix and cross products with the labels."""
    assert totals.gram_DD is not None
    records = totals.counts_C.sum()
    mean_D = totals.sums_CD.sum(0) / records
    centred_DD = totals.gram_DD - records * mean_D[:, None] * mean_D
    return records, mean_D, centred_DD, totals.sums_CD - totals.counts_C[:, None] * mean_D


def ridge_penalty(totals: ClassTotals, prior_CD: Tensor, least: float = 0.0) -> float:
    """Returns the penalty, `least` added, of the least generalised cross-validation error of `ridge_rows`.

    Golub, Heath and Wahba, Technometrics 21, 1979. The error on all records follows from the totals.
    """
    records, _, centred_DD, cross_CD = _centred(totals)
    total = (totals.counts_C * (1 - totals.counts_C / records)).sum()
    values_D = torch.linalg.eigvalsh(centred_DD).clamp(min=0)

    def error(penalty: float) -> float:
        rows_CD, _ = ridge_rows(totals, penalty, prior_CD)
        squares = total - 2 * (rows_CD * cross_CD).sum() + ((rows_CD @ centred_DD) * rows_CD).sum()
        free = _degrees_of_freedom(values_D, penalty)
        return float(squares.clamp(min=0) / (records - free).clamp(min=TINY) ** 2)

    return min((least + penalty for penalty in PENALTIES), key=error)


def _degrees_of_freedom(values_D: Tensor, penalty: float) -> Tensor:
    """Returns those of a ridge regression with an intercept, from the eigenvalues of the centred Gram matrix."""
    return 1 + (values_D / (values_D + penalty)).sum()


def _ridge(
    totals: ClassTotals, texts_CD: Tensor, public: PublicFeatures, least: float,
    settings: tuple[float, float] | None = None,
) -> tuple[Readout, tuple[float, float]]:  # fmt: skip
    """Fits a ridge regression, shrunk towards the best multiple of the label texts' readout.

    Returns it with its penalty, `least` at least, and its scale; `settings`: both as given.
    """
    assert totals.gram_DD is not None
    records, _, centred_DD, cross_CD = _centred(totals)
    fit = (texts_CD * cross_CD).sum() / ((texts_CD @ centred_DD) * texts_CD).sum().clamp(min=TINY)
    prior_CD = fit.clamp(min=0) * texts_CD
    penalty, scale = settings or (ridge_penalty(totals, prior_CD, least), None)
    rows_CD, bias_C = ridge_rows(totals, penalty, prior_CD)
    shares_C = totals.counts_C / records
    if scale is None:
        means_CD = totals.sums_CD / totals.counts_C.clamp(min=1)[:, None]
        within = totals.gram_DD - (means_CD * totals.counts_C[:, None]).T @ means_CD
        within_DD = within / max(float(records) - len(means_CD), 1.0)
        free = _degrees_of_freedom(torch.linalg.eigvalsh(centred_DD).clamp(min=0), penalty)
        left = float((1 - free / records).clamp(min=LEAST_LEFT))
        scale = _best_scale(rows_CD, bias_C, means_CD, within_DD, shares_C, left)
    return _in_features(rows_CD, bias_C, shares_C, public, scale), (penalty, scale)


def _class_means(
    totals: Sequence[ClassTotals], texts_CD: Tensor, public: PublicFeatures, noisy: bool, noise: float
) -> Readout | None:
    """Scores by nearest class mean, each shrunk towards a multiple of its label text.

    Empirical Bayes (Efron and Morris, JASA 1973). The noise on the sums, of privacy and of sampling, is estimated from
    the scatter of the clients' sums around their counts times the mean. No private value is needed for it. Noise on
    counts is 1 / κ times as large. Returns None if it hides the number of records.
    """
    sums = torch.stack([one.sums_CD for one in totals])
    counts = torch.stack([one.counts_C for one in totals])
    clients, _, D = sums.shape
    means_CD = sums.sum(0) / counts.sum(0).clamp(min=1.0)[:, None]
    noise_C = _scatter(sums - counts[:, :, None] * means_CD).mean(1)
    if noise:  # a secure sum has one term of known noise; the rest of the variance is sampling
        noise_C = clients * noise + 2 * counts.sum(0).clamp(min=1.0) / D
    noise_C = 0.5 * (noise_C + noise_C.mean())
    known = torch.tensor(clients * noise) if noise else noise_C.mean()
    error = known / COUNT_WEIGHT**2 if noisy else torch.zeros(())
    if float(counts.sum()) < SURE * (float(error) * counts.shape[1]) ** 0.5:
        return None
    counts_C = _shrunk(counts.sum(0), error).clamp(min=1.0)
    mean_D = sums.sum((0, 1)) / counts_C.sum()
    offsets_CD = sums.sum(0) / counts_C[:, None] - mean_D
    error_C = noise_C / counts_C**2 if clients > 1 or noise else 2 / counts_C / D
    weight_C = 1 / (error_C + TINY)
    along, squared = ((t * weight_C[:, None]).sum() for t in (texts_CD * offsets_CD, texts_CD * texts_CD))
    prior_CD = (along / squared.clamp(min=TINY)).clamp(0.0, 1.5) * texts_CD
    spread = ((((offsets_CD - prior_CD) ** 2).mean(1) - error_C) * weight_C).sum() / weight_C.sum()
    kept_C = spread.clamp(min=0) / (spread.clamp(min=0) + error_C + TINY)
    means_CD = prior_CD + kept_C[:, None] * (offsets_CD - prior_CD)
    centre_D = _shrunk(mean_D, noise_C.sum() / counts_C.sum() ** 2, towards=0.0)
    bias_C = -0.5 * (means_CD**2).sum(1) - means_CD @ centre_D
    uncertain = (kept_C * error_C).mean() * torch.eye(D, dtype=torch.double)
    covariance = public.covariance_DD.double() + uncertain
    shares_C = counts_C / counts_C.sum()
    scale = _best_scale(means_CD, bias_C, means_CD + centre_D, covariance, shares_C)
    return _in_features(means_CD, bias_C, shares_C, public, scale)


def _scatter(of_clients: Tensor) -> Tensor:
    """Estimates the variance of a sum over clients from their terms [clients, ...]."""
    clients = len(of_clients)
    return ((of_clients - of_clients.mean(0)) ** 2).sum(0) * clients / max(clients - 1, 1)


def _shrunk(values: Tensor, error: Tensor, towards: float | None = None) -> Tensor:
    """Shrinks values towards their mean by their known error variance (James and Stein, 1961)."""
    centre = values.mean() if towards is None else towards
    spread = (((values - centre) ** 2).mean() - error).clamp(min=0)
    return centre + spread / (spread + error + TINY) * (values - centre)


def _in_features(rows_CD: Tensor, bias_C: Tensor, shares_C: Tensor, public: PublicFeatures, scale: float) -> Readout:
    """Turns scores of z, times `CAUTION` of the best scale, into logits of features."""
    rows = CAUTION * scale * rows_CD / public.scale
    bias_C = CAUTION * scale * bias_C - rows @ public.centre_D.double()
    return Readout(rows.float(), (bias_C - bias_C.mean()).float(), shares_C.float())


def _best_scale(
    rows_CD: Tensor, bias_C: Tensor, means_CD: Tensor, within_DD: Tensor, shares_C: Tensor, left: float = 1.0
) -> float:
    """Returns the factor of scores with the smallest log loss of records drawn around the class means.

    left: for a regression of one-hot labels on the same records, 1 less its degrees of freedom for each record. Residuals
        of records left out are 1 / left times as large (as in generalised cross-validation).
    """
    known = shares_C > 0
    spread = rows_CD @ within_DD @ rows_CD.T / left**2
    spread += (1e-4 * spread.diagonal().mean().clamp(min=1e-12)) * torch.eye(len(spread), dtype=torch.double)
    values, vectors = torch.linalg.eigh(spread)
    # symmetric, because signs depend on the machine
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    noise = torch.randn(DRAWS, len(spread), generator=rng.make_generator(0, "scale"), dtype=torch.double) @ root
    wanted_CC = torch.eye(len(spread), dtype=torch.double)
    scores_CC = wanted_CC - (wanted_CC - means_CD @ rows_CD.T - bias_C) / left
    scores_KNC = scores_CC[known][:, None] + noise
    labels = known.nonzero()[:, 0]
    weight_K = shares_C[known] / shares_C[known].sum()

    def loss(scale: float) -> float:
        picked = (scale * scores_KNC).log_softmax(-1)[torch.arange(len(labels)), :, labels]
        return float(-(picked.mean(1) * weight_K).sum())

    return min(SCALES.tolist(), key=loss)


def left_out_priors(
    targets_B: Tensor, shares_C: Tensor, strength: float, subject_B: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Returns the client's `relative_prior` [C], and that of each record [B, C], from the other records' labels.

    `strength` infinity: no prior. `subject_B`: a record's prior leaves out all records of its subject.
    """
    labels_BC = F.one_hot(targets_B, len(shares_C)).float()
    counts_C = labels_BC.sum(0)
    if strength == torch.inf:
        return torch.zeros_like(counts_C), torch.zeros_like(labels_BC)
    own_KC, kind_B = sum_over_subject(labels_BC, subject_B).unique(dim=0, return_inverse=True)
    others_KC = torch.stack([relative_prior(counts_C - own_C, shares_C, strength) for own_C in own_KC])
    return relative_prior(counts_C, shares_C, strength), others_KC[kind_B]


def sum_over_subject(values_BN: Tensor, subject_B: Tensor | None) -> Tensor:
    """Returns for each record the sum over its subject's records, [B, ...]. Without subjects: its own values."""
    if subject_B is None:
        return values_BN
    number = int(subject_B.max()) + 1 if len(subject_B) else 0
    return values_BN.new_zeros(number, *values_BN.shape[1:]).index_add(0, subject_B, values_BN)[subject_B]


def relative_prior(counts_C: Tensor, shares_C: Tensor, strength: float) -> Tensor:
    """Returns the log of a client's label shares over the federation's, [C], shrunk towards zero.

    For a client of n records, n_c / n is replaced by (n_c + strength · share_c) / (n + strength).
    """
    shares = shares_C.clamp(min=1e-6) / shares_C.clamp(min=1e-6).sum()
    counts = counts_C.clamp(min=0.0)
    return ((counts + strength * shares) / (counts.sum() + strength)).log() - shares.log()
