"""What is clipped of a record depends on that record and the prompt alone, to the last bit.

That holds at a site, whose records have a forward pass each or share tried ones, through every optimizer, method and
subspace up to the mechanism."""

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

import small
from ficpd.backbones.query_engine import QueryEngine, run_queries
from ficpd.federation.compression import subspace
from ficpd.federation.execution import execute_assignment
from ficpd.interfaces import Task
from ficpd.methods.fedavg import FedAvg
from ficpd.privacy.none import NoPrivacy
from ficpd.types import Record

WIDTH = 64
COUNTS = (2, 9, 16)
"""So many records, and one less: kernels go by how many rows there are, and change over just below these."""


class Noting(NoPrivacy):
    """Every record takes part in every step, and what is given of each is noted."""

    unit = "record"

    def __init__(self):
        super().__init__()
        self.rows: list[Tensor] = []

    def sample(self, num_records: int, expected_batch: int, steps: int, noise: Any) -> list[Tensor]:
        return [torch.arange(num_records)] * steps

    def noisy_mean(self, values_KB: Tensor, expected_batch: int, noise: Any, grad_scale=None) -> Tensor:
        self.rows.append(values_KB.detach().clone())
        return torch.zeros_like(values_KB[:, 0]).float()

    def noisy_sum(self, name: str, chunks: Iterable[Tensor], noise: Any) -> Tensor:
        values_BN = torch.cat([*chunks])
        self.rows.append(values_BN.detach().clone()[None])
        return torch.zeros_like(values_BN[0]).float()


def rows(
    name: str, records: list[Record], task: Task, dtype: torch.dtype, dimension: int = 0, config: Any = None,
    tried: bool = False, **how: Any,
) -> list[Tensor]:  # fmt: skip
    """What one order gives to the mechanism, [K, B, ...] each. Its answers are zeros: all steps are at one prompt.

    tried: the second time, when rows share the forward passes that changed no bit."""
    model = QueryEngine(small.backbone(width=WIDTH, dtype=dtype), exact=True)
    training = small.LocalTrainingConfig(local_steps=1, batch_size=8, learning_rate=0.1, **how)
    method = small.method(name, training, **(config or {}))
    begin, compression = small.start(model, task), None
    if dimension:
        shape = 40, *begin.vectors_PD.shape
        gradients = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        compression = subspace.build(subspace.Config(dimension=dimension), begin, 0, lambda number: gradients)
    for _ in range(1 + tried):
        noting = Noting()
        (client,) = small.clients(model, method, 1, mechanism=noting, task=task, compression=compression).values()
        client.train = records
        state = small.first_state(method, {client.name: client}, readable=model)
        run_queries(model, execute_assignment(method, client, method.make_assignment(state, client.card, 1)))
    return noting.rows


def same_rows(*given: Any, records: list[Record], **how: Any) -> bool:
    """With one record less, every other's row is the same bits."""
    for count in COUNTS:
        kept = [place for place in range(count) if place != count // 2]
        whole = rows(given[0], records[:count], *given[1:], **how)
        less = rows(given[0], [records[place] for place in kept], *given[1:], **how)
        assert len(whole) == len(less) > 0
        if not all(torch.equal(a[:, kept], b) for a, b in zip(whole, less, strict=True)):
            return False
    return True


BY_GRADIENT = ("fedavg", "fedprox", "ficpd", "fpl", "dp_fpl", "prompt_dpsgd", "fedlora", "fedhpl")
CASES: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in (*BY_GRADIENT, "dp_zo", "dp_cma_es", "feddtpt", "analytic", "class_means")),
    *(("fedavg", {"optimizer": optimizer, "perturbation": 1e-5}) for optimizer in ("sgd", "spsa", "cma_es")),
    ("dp_zo", {"perturbation": 1e-5}),
    ("dp_cma_es", {"perturbation": 1e-5}),
    ("feddtpt", {"config": {"signal": "loss"}}),
    *((name, {"config": {"label_prior": True}}) for name in ("ficpd", "fpl")),
    *((name, {"dimension": 16}) for name in ("fedavg", "ficpd", "fpl", "prompt_dpsgd")),
    ("fedavg", {"dimension": 16, "optimizer": "cma_es", "perturbation": 1e-5}),
]


@pytest.mark.parametrize("tried", [False, True], ids=["alone", "tried"])
@pytest.mark.parametrize(("name", "how"), CASES, ids=[f"{name} {how}" for name, how in CASES])
def test_no_other_record_is_a_part_of_what_is_clipped(name, how, tried):
    assert same_rows(name, small.classes(), torch.float32, records=small.records(max(COUNTS)), tried=tried, **how)


@pytest.mark.parametrize("tried", [False, True], ids=["alone", "tried"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_nor_in_other_dtypes_nor_where_options_are_embedded_or_a_head_is_tuned(dtype, tried):
    assert same_rows("fedavg", small.classes(), dtype, records=small.records(max(COUNTS)), tried=tried)
    assert same_rows("fedavg", small.choices(), dtype, records=small.questions(max(COUNTS)), tried=tried)
    assert same_rows("fedavg", small.classes(tuned_head=True), dtype, records=small.records(max(COUNTS)), tried=tried)
    assert same_rows("fedavg", small.numbers(), dtype, records=small.records(max(COUNTS), real=True), tried=tried)


class MeansOverAll(FedAvg):
    """A method that centres its records' gradients: they are no longer their own."""

    def local_update(self, client, order):
        inner = super().local_update(client, order)
        answer = None
        try:
            while True:
                answer = yield inner.send(answer)
                answer = answer._replace(grad_KBPD=answer.grad_KBPD - answer.grad_KBPD.mean(1, keepdim=True))
        except StopIteration as end:
            return end.value


def test_a_method_that_mixes_records_is_found(monkeypatch):
    mixing = MeansOverAll(small.LocalTrainingConfig(local_steps=2, batch_size=8, learning_rate=0.1))
    monkeypatch.setattr(small, "method", lambda name, training, **config: mixing)
    assert not same_rows("fedavg", small.classes(), torch.float32, records=small.records(max(COUNTS)))
