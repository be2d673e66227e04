"""The main job on the real encoder and real sentences, short: it trains, and its library answers."""

from dataclasses import replace

import pytest
import torch

from ficpd.backbones.query_engine import QueryEngine
from ficpd.experiments.audit import audit_run
from ficpd.experiments.build import build_context
from ficpd.experiments.config import read
from ficpd.experiments.finished import FinishedRun
from ficpd.experiments.results import RunResult
from ficpd.experiments.runner import run
from ficpd.types import Query

pytestmark = pytest.mark.slow


def test_tuning_beats_zero_shot(minilm_run):
    """A short run of the centralised line gains at least three points on everyone's test records."""
    accuracy = {r.label: r.scores.global_prompt["accuracy"] for r in FinishedRun.load(minilm_run).results}
    assert accuracy["centralized, no privacy"] >= accuracy["zero_shot"] + 0.03


def test_what_a_run_says_of_itself(minilm_run):
    result = RunResult.load(minilm_run)
    assert result.backbone.fingerprint == "sentence_encoder:53aa51172d142c89:64400715"
    assert result.bytes.up_per_client_round < 300
    assert (result.privacy.unit, result.privacy.budget, result.privacy.delta) == ("record", 2.0, 1e-5)
    assert 1.9 < result.privacy.epsilon <= 2.0
    assert result.dropped_updates == 0


@pytest.mark.skipif(
    not getattr(torch.cpu, "_is_amx_tile_supported", bool)(), reason="the kernels of other processors are not known"
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("middle", [False, True])
def test_answer_in_a_lock_step_of_any_size_has_the_same_bits(dtype, middle):
    """Rows of 24 clients with three records each: together, alone, by fives, and in chunks of another size."""
    built = build_context(read("quickstart", [f"backbone.dtype={dtype}", "data.max_records=2000"]))
    backbone = built.model.backbone
    start = built.start if middle else replace(built.start, enters_at=0)
    pool = [record for shard in built.shards.values() for record in shard.train[:3]][:72]
    batch = built.task.encode(pool, backbone, start)
    queries = [Query(start.vectors_PD[None], batch.select(range(n, n + 3)), grad=True) for n in range(0, 72, 3)]

    def answered(size: int, chunk_tokens: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        engine = QueryEngine(backbone, chunk_tokens=chunk_tokens, reproducible=True)
        found = [a for n in range(0, len(queries), size) for a in engine.answer(queries[n : n + size])]
        return torch.cat([a.loss_KB for a in found]), torch.cat([a.grad_KBPD for a in found])

    together = answered(24)
    for other in (answered(1), answered(5), answered(24, 512), answered(24, 4096)):
        assert torch.equal(other[0], together[0])
        assert torch.equal(other[1], together[1])


def test_an_audit_finds_no_contradiction(minilm_run):
    """Against the real prompt of a private run: nobody is told apart, and no canary shows more than was stated."""
    found = audit_run(minilm_run, shadows=2, members=400, canaries=0)
    assert not found.alarm
    assert found.num_nonmembers >= 400
    assert found.advantage_interval[0] < 0.1
    assert (minilm_run / "audit.json").exists()


def test_an_audit_finds_a_canary_of_a_step_over_all_records(tmp_path):
    """The canary is in every run with it: 2,000 runs tell them from those without, by less than the run states."""
    changes = [
        "method.name=fedavg", "baselines=[]", "data.max_records=800", "partition.num_clients=4",
        "federation.num_rounds=1", "training.batch_size=400",
        "privacy.name=record_gaussian", "privacy.epsilon=4",
    ]  # fmt: skip
    run(read("quickstart", changes), tmp_path / "run")
    found = audit_run(tmp_path / "run", shadows=2, members=100, canaries=0)
    assert not found.alarm
    assert found.mechanism.runs == 2000
    assert found.mechanism.epsilon > 0.5
    assert found.mechanism.stated == pytest.approx(4.0, abs=0.04)


def test_the_start_is_chosen_where_it_trains(minilm_run):
    """`resolved.toml` states layer, learning rate, dtype and attention as they were chosen."""
    from ficpd.experiments.config import parse

    resolved = parse((minilm_run / "resolved.toml").read_text(), "resolved.toml")
    assert resolved.prompt.enters_at == 3
    assert resolved.training.learning_rate == pytest.approx(0.06 * 0.58, rel=0.1)
    assert "auto" not in (resolved.backbone.dtype, resolved.backbone.attention)
