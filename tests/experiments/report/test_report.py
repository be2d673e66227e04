"""A run's own result beside baselines, one of which has its method's name."""

from pathlib import Path

import made_up
import pandas as pd
import pytest
from typer.testing import CliRunner

import small
from ficpd.cli import app
from ficpd.experiments.finished import FinishedRun
from ficpd.experiments.report.build import page_of, write_page, write_tables
from ficpd.experiments.report.summary import results_table
from ficpd.experiments.results import RunResult

OWN = "[method]\nname = 'fedavg'\n[method.robust]\nrule = 'trimmed_mean'\nnum_byzantine = 2\n"
PLAIN = "[method]\nname = 'fedavg'\n"
OTHER = "fedavg, default settings"


def left(folder: Path, recipe: str) -> Path:
    """A finished run of fedavg with 80 %, and fedavg (70 %) and local among its baselines."""
    names = [f"site-{i}" for i in range(4)]
    made_up.write_result(folder, made_up.result("fedavg", names, 0.8, 2.0))
    bare = made_up.result("fedavg", names, 0.7, None) | {"label": "fedavg, no privacy", "num_rounds": 2}
    again = made_up.result("fedavg", names, 0.7, 2.0) | {"num_rounds": 2}
    alone = made_up.result("local", names, 0.75, 0.0)
    for name, one in {"fedavg": again, "fedavg-none": bare, "local": alone}.items():
        made_up.write_result(folder / "baselines" / name, one)
    if recipe:
        (folder / "resolved.toml").write_text(recipe)
    return folder


def shown(folder: Path) -> dict[str, str]:
    """Label to the figure of the mean client, as the table has it."""
    return {line[0]: line[1] for line in results_table(FinishedRun.load(folder).results).cells}


@pytest.mark.parametrize("recipe", [OWN, "", "[method]\nname = 'fedavg'\nof_another_version = 1\n"])
def test_the_runs_own_row_stands_beside_a_baseline_of_its_name_with_other_settings(tmp_path, recipe):
    folder = left(tmp_path / "run", recipe)
    found = shown(folder)
    assert list(found) == ["local", OTHER, "fedavg, no privacy", "fedavg"]
    assert (found["fedavg"], found[OTHER]) == ("77.0", "67.0")


def test_a_baseline_that_is_the_run_once_more_is_left_out(tmp_path):
    found = shown(left(tmp_path / "run", PLAIN))
    assert list(found) == ["local", "fedavg, no privacy", "fedavg"]
    assert found["fedavg"] == "77.0"


def test_the_page_and_its_tables_tell_them_apart(tmp_path):
    folder = left(tmp_path / "run", OWN)
    run, labels = FinishedRun.load(folder), ["local", OTHER, "fedavg, no privacy", "fedavg"]
    (file,) = write_tables(folder, folder / "report.html", csv=True, latex=False).values()
    assert list(pd.read_csv(file)["method"]) == labels
    assert [line[0] for line in results_table(run.results).cells] == labels
    assert {label: len(lines) for label, lines in run.rounds.items()} == dict(zip(labels, (3, 2, 2, 3), strict=True))
    assert list(run.places) == ["fedavg", *labels[:-1]]
    assert run.results[-1] is run.result
    assert page_of(folder).headline.startswith("Joining pays 5.0 points over alone: together 77.0, alone 72.0")
    assert OTHER in write_page(folder).read_text()


def test_a_run_of_local_alone_is_not_compared_with_itself(tmp_path):
    folder = tmp_path / "run"
    made_up.write_result(folder, made_up.result("local", ["a", "b"], 0.8, 0.0))
    assert FinishedRun.load(folder).alone is None


def test_a_run_shows_its_own_settings_figures(tmp_path):
    """Through the command: the baseline of the same name has a row of its own, and the run's is the last. What is run
    without privacy beside it has the run's settings: the two tell what privacy costs."""
    recipe = tmp_path / "small.toml"
    recipe.write_text(small.toml(small.table(tmp_path / "records.csv"), rounds=1))
    changes = ["-s", "method.robust={rule='norm_bound',max_norm=1e-6}", "-s", "baselines=['fedavg','fedavg:none']"]
    done = CliRunner().invoke(app, ["run", str(recipe), *changes, "--out", str(tmp_path / "run")])
    assert done.exit_code == 0, done.output
    results = FinishedRun.load(tmp_path / "run").results
    assert [result.label for result in results] == ["zero_shot", OTHER, "fedavg, no privacy", "fedavg"]
    assert results[-1] == RunResult.load(tmp_path / "run")
    assert [bool(result.excluded_updates) for result in results[1:]] == [False, True, True]
    drawn = " ".join(done.output.split())
    assert "default" in drawn
