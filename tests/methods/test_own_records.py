"""Methods of labels: `icl` and `linear_probe` use a client's own records and send nothing; other tasks are refused."""

import pytest

import small
from ficpd.errors import ConfigError
from ficpd.evaluation.evaluate import evaluate
from ficpd.experiments.runner import run

ALONE = ("icl", "linear_probe")
HEAD = "task.tuned_head=true"


@pytest.mark.parametrize("name", ALONE)
def test_a_client_learns_from_its_own_records_and_no_others(model, name):
    method, found = small.method(name), []
    for others in (1, 2):
        clients = small.clients(model, method, 2)
        clients["site-0"].train, clients["site-1"].train = small.records(30), small.records(30, others)
        found.append(evaluate(method, small.first_state(method, clients), clients, model, 1).predicted["site-0"])
    assert found[0] == found[1]


@pytest.mark.parametrize("name", ALONE)
def test_a_run_sends_nothing_and_is_scored_on_each_clients_own(tmp_path, name):
    result = small.run(tmp_path, name)
    assert (result.num_rounds, result.bytes.up_total, result.bytes.down_total) == (0, 0, 0)
    assert result.scores.global_prompt is None
    assert set(result.scores.per_client) == {"site-0", "site-1", "site-2"}
    assert result.scores.per_client_mean != result.scores.zero_shot
    assert result.privacy.epsilon == 0.0


@pytest.mark.parametrize(("name", "change", "words"), [
    ("icl", HEAD, "has no labels, or a head that is tuned"),
    ("icl", small.NUMBERS, "has no labels, or a head that is tuned"),
    ("linear_probe", HEAD, r"linear_probe: .*tuned_head"),
    ("linear_probe", small.NUMBERS, r"linear_probe: .*tuned_head"),
    ("fedhpl", small.NUMBERS, r"not every task here has labels \(regression\)"),
])  # fmt: skip
def test_another_task_is_refused_before_anything_is_written(tmp_path, name, change, words):
    given = small.experiment(tmp_path, name, change)
    if change == small.NUMBERS:
        small.numbered(tmp_path / "records.csv")
    with pytest.raises(ConfigError, match=words):
        run(given, tmp_path / "run")
    assert not (tmp_path / "run").exists()
