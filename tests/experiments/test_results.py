"""What is read of a run: the result as it was saved, and nothing of another version."""

import json

import pytest

import small
from ficpd.errors import RunError
from ficpd.experiments.results import FILE, RunResult


def test_a_result_is_read_as_it_was_saved(tmp_path):
    result = small.run(tmp_path, rounds=1)
    assert RunResult.load(tmp_path / "run") == result
    assert RunResult.load(result.save(tmp_path / "copy").parent) == result


def test_a_figure_that_is_no_number_can_be_read_again(tmp_path):
    result = small.run(tmp_path, rounds=0)
    scores = result.scores.model_copy(update={"per_client_mean": {"accuracy": float("nan")}})
    result.model_copy(update={"metrics": scores}).save(tmp_path)
    assert str(RunResult.load(tmp_path).scores.per_client_mean["accuracy"]) == "nan"


@pytest.mark.parametrize(("change", "why"), [
    ({"set_aside": {}}, "set_aside: Extra"),
    ({"privacy": {}}, r"privacy\.mechanism: Field required"),
    (None, "the file"),
])  # fmt: skip
def test_a_result_of_another_version_is_refused(tmp_path, change, why):
    small.run(tmp_path, rounds=0)
    file = tmp_path / "run" / FILE
    file.write_text(json.dumps(json.loads(file.read_text()) | change if change else []))
    with pytest.raises(RunError, match=rf"result\.json is of another version .*{why}"):
        RunResult.load(tmp_path / "run")


def test_every_field_whose_name_is_not_enough_is_described():
    described = RunResult.model_json_schema()["$defs"]["PrivacyReport"]["properties"]
    assert "own ledger" in described["at_most"]["description"]
