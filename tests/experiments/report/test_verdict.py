import made_up
import pytest

import small
from ficpd.experiments.finished import FinishedRun
from ficpd.experiments.report.summary import verdict, worse_off
from ficpd.experiments.results import RunResult
from ficpd.experiments.run_directory import RunDir
from ficpd.experiments.runner import run as run_experiment


def result(method, share, clients=4, epsilon=None, tests=100):
    """Client i of a method has `share` - 0.01 i; without noise unless `epsilon` is given."""
    names = [f"site-{i}" for i in range(clients)]
    given = made_up.result(method, names, share, epsilon)
    own = {name: {"accuracy": share - 0.01 * i} for i, name in enumerate(names)}
    mean = {"accuracy": sum(score["accuracy"] for score in own.values()) / clients}
    given["metrics"] |= {"per_client": own, "per_client_mean": mean, "test_records": dict.fromkeys(names, tests)}
    return RunResult.model_validate(given)


def test_verdict_compares_with_the_best_of_what_a_client_has_alone():
    beside = [result("zero_shot", 0.5), result("local", 0.7), result("linear_probe", 0.75), result("fedavg", 0.99)]
    said = verdict([*beside, result("ficpd", 0.8)])
    assert said[0] == (
        "Joining pays 5.0 points over a local linear probe: together 78.5, alone 68.5, a local linear probe 73.5, "
        "no prompt 48.5 (accuracy in %, mean of 4 clients' own tests)."
    )
    assert verdict([*beside, result("ficpd", 0.7)])[0].startswith("Joining does not pay: together 68.5, alone 68.5")
    assert verdict([*beside, result("ficpd", 0.75)])[0].startswith("Joining changes nothing: ")


def test_the_points_are_the_difference_of_the_figures_shown():
    """77.46 and 74.04 differ by 3.42 and are shown as 77.5 and 74.0."""
    said = verdict([result("local", 0.7404, clients=1), result("ficpd", 0.7746, clients=1)])[0]
    assert said.startswith("Joining pays 3.5 points over alone: together 77.5, alone 74.0 (")


def test_a_private_run_below_no_prompt_says_so_and_what_helps():
    beside = [result("zero_shot", 0.8)]
    said = " ".join(verdict([*beside, result("ficpd", 0.7, epsilon=2.0)]))
    assert "below no prompt" in said
    assert "compression.name = 'subspace'" in said
    assert "below no prompt" not in " ".join(verdict([*beside, result("ficpd", 0.7)]))
    assert "below no prompt" not in " ".join(verdict([*beside, result("ficpd", 0.9, epsilon=2.0)]))


@pytest.mark.parametrize("method", ["local", "linear_probe", "zero_shot", "centralized"])
def test_verdict_of_a_method_that_nobody_joins_is_its_figures(method):
    (said, *more) = verdict([result("fedavg", 0.5), result(method, 0.7)])
    assert said == f"{method} 68.5 (accuracy in %, mean of 4 clients' own tests)."
    assert not any("worse off" in one for one in more)


def test_a_client_is_worse_off_beyond_one_standard_error_of_its_own_score():
    own, home = result("ficpd", 0.8), result("local", 0.83).scores.per_client
    assert worse_off(own, [home]) == []  # 3 points, and the error is 4
    assert worse_off(own, [home, result("linear_probe", 0.85).scores.per_client]) == [f"site-{i}" for i in range(4)]
    assert worse_off(result("ficpd", 0.8, tests=10_000), [home]) == [f"site-{i}" for i in range(4)]


def test_the_standard_baselines_stand_beside_where_they_fit(tmp_path):
    small.run(tmp_path / "a", "fedavg", "baselines=auto", rounds=1)
    found = FinishedRun.load(tmp_path / "a" / "run").results
    assert {one.method for one in found} == {"zero_shot", "local", "linear_probe", "fedavg"}
    resolved = RunDir(tmp_path / "a" / "run").resolved(small.experiment(tmp_path / "b"))
    assert resolved.baselines == ("local", "linear_probe")
    assert "of 3 clients are worse off" in " ".join(verdict(found))
    given = small.experiment(tmp_path / "c", "fedavg", "baselines=auto", small.NUMBERS, rounds=1)
    small.numbered(tmp_path / "c" / "records.csv")
    run_experiment(given, tmp_path / "c" / "run")
    assert {one.method for one in FinishedRun.load(tmp_path / "c" / "run").results} == {"zero_shot", "local", "fedavg"}
    small.run(tmp_path / "d", "local", "baselines=auto", rounds=1)
    methods = {one.method for one in FinishedRun.load(tmp_path / "d" / "run").results}
    assert methods == {"zero_shot", "linear_probe", "local"}
