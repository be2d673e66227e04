"""A SuperLink that is not there is said so before anything is submitted, and soon."""

import time

import pytest

import small
from ficpd.deployment.flower_cli import check_superlink, run_with_flower
from ficpd.errors import ConfigError, SiteError


def test_a_superlink_that_is_not_there_is_said_within_ten_seconds(tmp_path, monkeypatch):
    monkeypatch.setenv("FLWR_HOME", str(tmp_path))
    with pytest.raises(ConfigError, match="unknown superlink 'ficpd'"):
        check_superlink("ficpd")
    (tmp_path / "config.toml").write_text('[superlink.ficpd]\naddress = "127.0.0.1:1"\n')
    with pytest.raises(ConfigError, match="did you mean 'ficpd'"):
        check_superlink("ficpdd")
    began = time.monotonic()
    with pytest.raises(SiteError, match=r"127\.0\.0\.1:1"):
        check_superlink("ficpd")
    assert time.monotonic() - began < 10


def test_a_run_without_a_superlink_is_refused(tmp_path):
    pytest.importorskip("flwr")
    experiment = small.experiment(tmp_path, "fedavg", "engine.name=flower")
    with pytest.raises(ConfigError, match=r"engine\.options\.superlink.*set it, or leave the engine out"):
        run_with_flower(experiment, None, tmp_path / "run", resume=False)
    assert not (tmp_path / "run").exists()
