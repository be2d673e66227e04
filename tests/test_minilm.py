"""The main job on the real encoder and real sentences, short: it trains, and its library answers."""

import json

import pytest

from ficpd.report import rows

pytestmark = pytest.mark.slow


def test_tuning_beats_zero_shot(minilm_run):
    """A short run of the centralised line gains at least three points on everyone's test records."""
    accuracy = {r["method"]: r["metrics"]["global"]["accuracy"] for r in rows(minilm_run)}
    assert accuracy["centralized"] >= accuracy["zero_shot"] + 0.03


def test_what_a_run_says_of_itself(minilm_run):
    result = json.loads((minilm_run / "result.json").read_text())
    assert result["backbone"]["fingerprint"] == "encoder:53aa51172d142c89"
    assert result["bytes"]["up_per_client_round"] < 16_000
    assert result["privacy"] == {"mechanism": "none", "unit": "none", "epsilon": None, "delta": None, "noise": None}
    assert result["dropped_updates"] == 0


def test_the_start_is_chosen_where_it_trains(minilm_run):
    """`resolved.toml` states layer, learning rate, dtype and attention as they were chosen."""
    from ficpd.experiment import parse

    resolved = parse((minilm_run / "resolved.toml").read_text(), "resolved.toml")
    assert resolved.prompt.enters_at == 3
    assert resolved.training.learning_rate == pytest.approx(0.06 * 0.58, rel=0.1)
    assert "auto" not in (resolved.backbone.dtype, resolved.backbone.attention)
