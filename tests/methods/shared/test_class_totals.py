import pytest
import torch
from sklearn.linear_model import Ridge
from torch.nn import functional as F

from ficpd.methods.shared import class_totals
from ficpd.methods.shared.class_totals import ClassTotals, PublicFeatures, learn_readout

LABELS, WIDTH = 3, 5


def records(number: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit features around one mean for each label, and the labels."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.arange(number) % LABELS
    means = torch.eye(WIDTH)[:LABELS]
    return F.normalize(means[labels] + 0.3 * torch.randn(number, WIDTH, generator=random), dim=1), labels


def public() -> PublicFeatures:
    return PublicFeatures.of(F.normalize(torch.randn(64, WIDTH, generator=torch.Generator().manual_seed(9)), dim=1))


def totals(features: torch.Tensor, labels: torch.Tensor, gram: bool = True, known: PublicFeatures | None = None):
    known = known or public()
    rows = class_totals.total_rows(features, labels, known.centre_D, known.scale, LABELS, gram)
    return class_totals.split_totals(rows.double().sum(0), LABELS, LABELS, WIDTH, gram)


@pytest.mark.parametrize("parts", [1, 3, 30])
def test_the_ridge_regression_is_that_of_all_records_together_whatever_the_partition(parts):
    features, labels = records(90)
    known = public()
    of = [totals(features[place::parts], labels[place::parts], known=known) for place in range(parts)]
    rows, bias = class_totals.ridge_rows(sum(of[1:], of[0]), 2.0)
    z = ((features - known.centre_D) / known.scale).double().numpy()
    centralised = Ridge(alpha=2.0).fit(z, F.one_hot(labels, LABELS).double().numpy())
    assert torch.allclose(rows, torch.tensor(centralised.coef_), atol=1e-6)
    assert torch.allclose(bias, torch.tensor(centralised.intercept_), atol=1e-6)


def test_the_penalty_has_the_least_generalised_cross_validation_error_on_the_records_themselves():
    features, labels = records(60)
    known, summed = public(), totals(*records(60))
    prior = torch.randn(LABELS, WIDTH, generator=torch.Generator().manual_seed(4)).double() / 10
    z = ((features - known.centre_D) / known.scale).double()
    wanted, z = (values - values.mean(0) for values in (F.one_hot(labels, LABELS).double(), z))

    def error(penalty):
        hat = z @ torch.linalg.solve(z.T @ z + penalty * torch.eye(WIDTH).double(), z.T)
        rest = (torch.eye(60).double() - hat) @ (wanted - z @ prior.T)
        return float((rest**2).sum() / (60 - 1 - hat.trace()) ** 2)

    best = min(class_totals.PENALTIES, key=error)
    assert min(class_totals.PENALTIES) < best < max(class_totals.PENALTIES)
    assert class_totals.ridge_penalty(summed, prior) == best
    least = min(class_totals.PENALTIES, key=lambda p: error(7 + p))
    assert class_totals.ridge_penalty(summed, prior, 7.0) == 7.0 + least


@pytest.mark.parametrize("gram", [False, True])
def test_a_left_out_readout_is_that_of_the_other_clients(gram):
    features, labels = records(90)
    text = torch.randn(LABELS, WIDTH, generator=torch.Generator().manual_seed(4))
    of = [totals(features[place::3], labels[place::3], gram) for place in range(3)]
    for place, found in enumerate(class_totals.left_out_readouts(of, text, public())):
        others = learn_readout([one for n, one in enumerate(of) if n != place], text, public())
        assert found is not None
        assert others is not None
        assert torch.allclose(found.shares_C, others.shares_C)
        # the scale and the penalty are those of all totals where there is a Gram matrix
        angle = F.cosine_similarity(found.rows_CD.flatten(), others.rows_CD.flatten(), dim=0)
        assert float(angle) == pytest.approx(1.0, abs=1e-2 if gram else 1e-6)


def test_no_readout_is_left_out_for_a_single_client():
    assert class_totals.left_out_readouts([totals(*records(30))], torch.zeros(LABELS, WIDTH), public()) == [None]


@pytest.mark.parametrize("gram", [False, True])
def test_a_record_changes_the_totals_by_norm_one_at_most_where_its_feature_lies_within_the_public_scale(gram):
    features, labels = records(20)
    known = public()
    off = features - known.centre_D
    within = known.centre_D + off * known.scale / off.norm(dim=1)[:, None]
    rows = class_totals.total_rows(within, labels, known.centre_D, known.scale, LABELS, gram)
    assert torch.allclose(rows.norm(dim=1), torch.ones(20), atol=1e-5)
    assert rows.shape[1] == class_totals.totals_size(LABELS, WIDTH, gram)
    assert class_totals.row_norm(gram) == pytest.approx((1.09 + gram) ** 0.5)


@pytest.mark.parametrize("gram", [False, True])
def test_rows_in_chunks_are_the_same_rows_and_other_tasks_labels_are_zeros(gram, monkeypatch):
    features, labels = records(20)
    known = public()
    given = features, labels, known.centre_D, known.scale, LABELS, gram
    monkeypatch.setattr(class_totals, "CHUNK_NUMBERS", 3 * class_totals.totals_size(LABELS, WIDTH, gram))
    chunks = [*class_totals.row_chunks(*given)]
    assert [len(chunk) for chunk in chunks] == [3] * 6 + [2]
    whole = class_totals.total_rows(*given)
    assert torch.equal(torch.cat(chunks), whole)
    padded = class_totals.padded_totals(whole.sum(0), LABELS, 5, WIDTH)
    assert len(padded) == class_totals.totals_size(5, WIDTH, gram)
    found = class_totals.split_totals(padded, LABELS, 5, WIDTH, gram)
    expected = class_totals.split_totals(whole.sum(0), LABELS, LABELS, WIDTH, gram)
    assert torch.equal(found.sums_CD, expected.sums_CD)
    assert (found.gram_DD is None and not gram) or torch.equal(found.gram_DD, expected.gram_DD)


def test_totals_are_counts_sums_and_the_gram_matrix():
    features, labels = records(10)
    known = public()
    found = totals(features, labels, known=known)
    z = ((features - known.centre_D) / known.scale).double()
    assert torch.allclose(found.counts_C, torch.tensor([4.0, 3.0, 3.0], dtype=torch.double), atol=1e-5)
    assert torch.allclose(found.sums_CD, F.one_hot(labels, LABELS).double().T @ z, atol=1e-5)
    assert torch.allclose(found.gram_DD, z.T @ z, atol=1e-5)


@pytest.mark.parametrize("gram", [False, True])
def test_a_readout_reads_records_that_it_was_not_learned_from(gram):
    features, labels = records(300)
    readout = learn_readout([totals(features[p::4], labels[p::4], gram) for p in range(4)], torch.zeros(3, 5), public())
    others, truth = records(300, seed=1)
    logits = others @ readout.rows_CD.T + readout.bias_C
    assert float((logits.argmax(1) == truth).float().mean()) > 0.9
    assert float(F.cross_entropy(logits, truth)) < 0.8  # 1.1 for equal shares
    assert readout.shares_C.tolist() == pytest.approx([1 / 3] * 3, abs=0.01)


def test_the_scale_of_a_readout_fits_records_that_it_was_not_learned_from():
    """300 records of 200 features: their own scores are far more certain than those of others."""
    labels, width, random = 6, 200, torch.Generator().manual_seed(3)
    means = F.normalize(torch.randn(labels, width, generator=random), dim=1)

    def drawn(number: int) -> tuple[torch.Tensor, torch.Tensor]:
        of = torch.arange(number) % labels
        return F.normalize(means[of] + 0.3 * torch.randn(number, width, generator=random), dim=1), of

    known = PublicFeatures.of(drawn(64)[0])
    own, others = drawn(300), drawn(600)
    rows = class_totals.total_rows(*own, known.centre_D, known.scale, labels, True)
    summed = class_totals.split_totals(rows.double().sum(0), labels, labels, width, True)
    readout = learn_readout([summed], torch.zeros(labels, width), known)

    def losses(features: torch.Tensor, of: torch.Tensor) -> dict[float, float]:
        logits = features @ readout.rows_CD.T + readout.bias_C
        return {factor: float(F.cross_entropy(factor * logits, of)) for factor in (2.0**n for n in range(-6, 7))}

    found = losses(*others)
    assert found[1.0] < 2 * min(found.values())
    assert losses(*own)[4.0] < losses(*own)[1.0], "a scale that fits the own records is larger"


@pytest.mark.parametrize("gram", [False, True])
def test_a_label_without_records_keeps_its_text(gram):
    """The third label's text points the way of its records, which nobody has."""
    features, labels = records(300)
    seen = labels < 2
    of = [totals(features[seen][p::4], labels[seen][p::4], gram) for p in range(4)]
    readout = learn_readout(of, 20 * torch.eye(WIDTH)[:LABELS], public())
    others, truth = records(300, seed=1)
    third = truth == 2
    logits = others @ readout.rows_CD.T + readout.bias_C
    assert float(logits[third][:, 2].mean()) > float(logits[~third][:, 2].mean())
    assert torch.isfinite(readout.rows_CD).all()


@pytest.mark.parametrize("seed", range(5))
def test_totals_of_noise_alone_leave_the_label_texts(seed):
    """Class means shrink away where the clients' sums scatter as much as noise does."""
    random = torch.Generator().manual_seed(seed)
    texts = 20 * torch.eye(WIDTH)[:LABELS]
    features, labels = records(60)
    noisy = [
        ClassTotals(one.counts_C + 900 * torch.randn(LABELS, generator=random), one.sums_CD
                    + 300 * torch.randn(LABELS, WIDTH, generator=random), None)
        for one in (totals(features[p::6], labels[p::6], gram=False) for p in range(6))
    ]  # fmt: skip
    readout = learn_readout(noisy, texts, public(), noisy=True)
    rows, bias = (texts, torch.zeros(LABELS)) if readout is None else (readout.rows_CD, readout.bias_C)
    others, truth = records(300, seed=1)
    assert float(((others @ rows.T + bias).argmax(1) == truth).float().mean()) > 0.8


def test_clients_without_records_teach_nothing():
    empty = ClassTotals(torch.zeros(LABELS, dtype=torch.double), torch.zeros(LABELS, WIDTH, dtype=torch.double), None)
    assert learn_readout([empty, empty], torch.zeros(LABELS, WIDTH), public()) is None


def test_constant_features_make_no_readout_that_is_not_finite():
    features, labels = torch.ones(12, WIDTH) / WIDTH**0.5, torch.arange(12) % LABELS
    for gram in (False, True):
        readout = learn_readout([totals(features, labels, gram)] * 2, torch.zeros(LABELS, WIDTH), public())
        assert torch.isfinite(readout.rows_CD).all()


def test_a_label_prior_is_shrunk_towards_the_federations_shares():
    counts, shares = torch.tensor([9.0, 1.0]), torch.tensor([0.5, 0.5])
    weak, strong = class_totals.relative_prior(counts, shares, 1.0), class_totals.relative_prior(counts, shares, 1000.0)
    assert weak.exp().tolist() == pytest.approx([9.5 / 11 / 0.5, 1.5 / 11 / 0.5])
    assert strong.abs().max() < 0.02
    assert class_totals.relative_prior(torch.tensor([5.0, 5.0]), shares, 2.0).tolist() == pytest.approx(
        [0.0, 0.0], abs=1e-6
    )
