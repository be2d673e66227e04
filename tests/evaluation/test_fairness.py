"""Over clients and over groups: by hand, against fairlearn, and in a whole run."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from fairlearn.metrics import MetricFrame, demographic_parity_difference, equalized_odds_difference
from sklearn.metrics import accuracy_score

import small
from ficpd.errors import ConfigError, DataError
from ficpd.evaluation.evaluate import evaluate
from ficpd.evaluation.fairness import group_gaps, groups_of, over_clients, over_groups, share_worse_off
from ficpd.experiments.config import parse
from ficpd.experiments.results import RunResult
from ficpd.experiments.runner import run as run_experiment
from ficpd.types import Record


def test_the_spread_over_clients_by_hand():
    scores = {f"c{i:02}": {"accuracy": i / 20} for i in range(1, 13)}
    found = over_clients(scores, 0)["accuracy"]
    assert found["clients"] == 12
    assert found["mean"] == pytest.approx(0.325)
    assert found["deviation"] == pytest.approx(np.sqrt(13) / 20)  # of 1..n it is sqrt(n(n+1)/12)
    assert (found["worst"], found["worst_client"], found["best"]) == (0.05, "c01", 0.6)
    assert found["worst_tenth"] == pytest.approx(0.075)  # two of twelve
    low, high = found["mean_interval"]
    assert low == pytest.approx(0.325 - 1.96 * found["deviation"] / np.sqrt(12), abs=0.015)
    assert high == pytest.approx(0.325 + 1.96 * found["deviation"] / np.sqrt(12), abs=0.015)
    assert 0.05 <= found["worst_tenth_interval"][0] <= 0.075 <= found["worst_tenth_interval"][1] < found["mean"]


@pytest.mark.parametrize(("number", "tenth"), [(10, 1), (11, 2), (20, 2), (30, 3)])
def test_the_worst_tenth_is_rounded_up_to_whole_clients(number, tenth):
    scores = {f"c{i}": {"accuracy": i / 100, "rmse": float(i)} for i in range(number)}
    found = over_clients(scores, 0)
    assert found["accuracy"]["worst_tenth"] == pytest.approx(np.arange(tenth).mean() / 100)
    assert found["rmse"]["worst_tenth"] == pytest.approx(np.arange(number - tenth, number).mean())


def test_of_an_error_the_most_is_the_worst():
    numbers = {"a": {"rmse": 1.0, "pearson": 0.9}, "b": {"rmse": 3.0}, "c": {"rmse": 2.0, "pearson": -0.5}}
    found = over_clients(numbers, 0)
    assert (found["rmse"]["worst"], found["rmse"]["worst_client"], found["rmse"]["best"]) == (3.0, "b", 1.0)
    assert found["rmse"]["worst_tenth"] == 3.0
    assert found["rmse"]["worst_tenth_interval"][1] == 3.0
    assert (found["pearson"]["clients"], found["pearson"]["worst_client"]) == (2, "c")


def test_one_client_has_no_spread_and_equal_ones_have_none_to_speak_of():
    one = over_clients({"a": {"accuracy": 0.7}}, 0)["accuracy"]
    assert (one["mean"], one["worst"], one["best"], one["worst_tenth"]) == (0.7, 0.7, 0.7, 0.7)
    assert one["deviation"] is one["mean_interval"] is one["worst_tenth_interval"] is None
    alike = over_clients({name: {"accuracy": 0.5} for name in "abcd"}, 0)["accuracy"]
    assert (alike["mean"], alike["deviation"], alike["mean_interval"]) == (0.5, 0.0, [0.5, 0.5])


def test_equal_seeds_draw_equal_intervals():
    scores = {f"c{i}": {"accuracy": (i * 7 % 11) / 11} for i in range(11)}
    first, again, other = (over_clients(scores, seed)["accuracy"]["mean_interval"] for seed in (1, 1, 2))
    assert first == again != other


def test_the_mean_lies_in_its_interval_about_as_often_as_is_said():
    random = np.random.default_rng(0)
    held = 0
    for seed in range(100):
        drawn = random.normal(0.7, 0.1, 40)
        figures = {str(i): {"accuracy": v} for i, v in enumerate(drawn)}
        low, high = over_clients(figures, seed)["accuracy"]["mean_interval"]
        held += low <= 0.7 <= high
    assert 87 <= held <= 99


def test_worse_off_than_alone_is_strictly_worse_in_the_metrics_own_direction():
    own = {
        "a": {"accuracy": 0.7, "rmse": 1.0}, "b": {"accuracy": 0.5, "rmse": 2.0}, "c": {"accuracy": 0.6},
        "d": {"accuracy": 0.1},
    }  # fmt: skip
    alone = {"a": {"accuracy": 0.6, "rmse": 0.9}, "b": {"accuracy": 0.6, "rmse": 2.0}, "c": {"accuracy": 0.6}}
    found = share_worse_off(own, alone)
    assert found["accuracy"]["worse"] == ["b"]
    assert (found["accuracy"]["clients"], found["accuracy"]["share"]) == (3, pytest.approx(1 / 3))
    assert (found["rmse"]["worse"], found["rmse"]["clients"]) == (["a"], 2)
    halves = {str(i): {"accuracy": 0.5} for i in range(20)}
    none = share_worse_off(halves, dict(halves))
    assert none["accuracy"]["share"] == 0.0
    assert none["accuracy"]["interval"] == [0.0, pytest.approx(1.96**2 / (20 + 1.96**2), abs=1e-3)]  # Wilson's, by hand
    assert share_worse_off(own, {}) == {}


def drawn(labels: list[str], groups: list[str], number: int, seed: int = 0) -> tuple[list[str], list[str], list[str]]:
    """Answers, truths and groups; the later the group, the more often it is answered with the first label."""
    random = np.random.default_rng(seed)
    of = random.integers(len(groups), size=number)
    truths = random.choice(labels, number)
    wrong = random.random(number) < 0.1 + 0.15 * of
    answers = [labels[0] if w else str(t) for w, t in zip(wrong, truths, strict=True)]
    return answers, truths.tolist(), [groups[i] for i in of]


def test_the_gaps_by_hand():
    #            women: 4 of 5 right, 3 of 5 told "ill"          men: 2 of 4 right, 1 of 4 told "ill"
    answers = ["ill", "ill", "ill", "well", "well", "ill", "well", "well", "well"]
    truths = ["ill", "ill", "well", "well", "well", "well", "ill", "well", "well"]
    found = group_gaps(answers, truths, ["f"] * 5 + ["m"] * 4, 0)
    figures = {name: (g["records"], g["accuracy"]) for name, g in found["groups"].items()}
    assert figures == {"f": (5, 0.8), "m": (4, 0.5)}
    assert found["few"] == ["f", "m"]
    assert found["groups"]["f"]["interval"][0] < 0.5 < found["groups"]["m"]["interval"][1]
    assert (found["accuracy"]["gap"], found["accuracy"]["between"]) == (pytest.approx(0.3), ["f", "m"])
    parity = found["demographic_parity"]
    assert (parity["gap"], parity["label"], parity["between"]) == (pytest.approx(0.6 - 0.25), "ill", ["f", "m"])
    odds = found["equalised_odds"]  # of the ill, all women are told so, and no man
    assert (odds["gap"], odds["label"], odds["among"], odds["records"]) == (1.0, "ill", "those it is true of", [2, 1])
    assert found["accuracy"]["interval"] is odds["interval"] is None


def test_two_labels_agree_with_fairlearn():
    answers, truths, groups = drawn(["no", "yes"], ["a", "b", "c"], 300)
    found = group_gaps(answers, truths, groups, 0)
    told, true = ([text == "yes" for text in texts] for texts in (answers, truths))
    expected = demographic_parity_difference(true, told, sensitive_features=groups)
    assert found["demographic_parity"]["gap"] == pytest.approx(expected)
    expected = equalized_odds_difference(true, told, sensitive_features=groups)
    assert found["equalised_odds"]["gap"] == pytest.approx(expected)
    frame = MetricFrame(metrics=accuracy_score, y_true=truths, y_pred=answers, sensitive_features=groups)
    assert {name: g["accuracy"] for name, g in found["groups"].items()} == pytest.approx(frame.by_group.to_dict())
    assert found["accuracy"]["gap"] == pytest.approx(frame.difference())
    for gap in ("accuracy", "demographic_parity", "equalised_odds"):
        low, high = found[gap]["interval"]
        assert low < found[gap]["gap"] < high


def test_of_many_labels_the_one_with_the_largest_gap_is_named():
    labels = ["red", "green", "blue", "grey"]
    answers, truths, groups = drawn(labels, ["a", "b"], 400)
    found = group_gaps(answers, truths, groups, 0)
    measures = {"demographic_parity": demographic_parity_difference, "equalised_odds": equalized_odds_difference}
    for key, measure in measures.items():
        sides = {label: ([t == label for t in truths], [a == label for a in answers]) for label in labels}
        each = {label: measure(*side, sensitive_features=groups) for label, side in sides.items()}
        assert found[key]["gap"] == pytest.approx(max(each.values()))
        assert found[key]["label"] == max(each, key=each.__getitem__)


def test_who_is_wrongly_given_an_answer_counts_as_much_as_who_is_not_given_it():
    truths = ["red", "red", "blue", "blue", "grey"] * 2
    answers = ["red", "grey", "blue", "grey", "grey", "red", "blue", "blue", "red", "grey"]
    odds = group_gaps(answers, truths, ["a"] * 5 + ["b"] * 5, 0)["equalised_odds"]
    assert (odds["gap"], odds["label"], odds["among"]) == (0.5, "grey", "those it is not true of")
    assert (odds["between"], odds["records"]) == (["a", "b"], [4, 4])


def test_the_interval_is_that_of_two_independent_shares():
    right = np.array([True] * 160 + [False] * 40 + [True] * 60 + [False] * 40)
    answers, groups = ["x" if r else "y" for r in right], ["a"] * 200 + ["b"] * 100
    low, high = group_gaps(answers, ["x"] * 300, groups, 0)["accuracy"]["interval"]
    half = 1.96 * np.sqrt(0.8 * 0.2 / 200 + 0.6 * 0.4 / 100)
    assert (low, high) == (pytest.approx(0.2 - half, abs=0.015), pytest.approx(0.2 + half, abs=0.015))


def test_a_perfect_answer_has_equalised_odds_and_no_demographic_parity_where_base_rates_differ():
    truths = ["ill"] * 30 + ["well"] * 10 + ["ill"] * 10 + ["well"] * 30
    found = group_gaps(truths, truths, ["old"] * 40 + ["young"] * 40, 0)
    assert (found["accuracy"]["gap"], found["equalised_odds"]["gap"]) == (0.0, 0.0)
    assert (found["demographic_parity"]["gap"], found["demographic_parity"]["between"]) == (0.5, ["old", "young"])
    assert found["accuracy"]["interval"] is found["equalised_odds"]["interval"] is None  # resampling changes nothing
    assert found["demographic_parity"]["interval"][0] > 0.2


def test_a_group_without_a_label_is_no_group_that_never_has_it_right():
    answers = truths = ["ill", "well"] * 10 + ["well"] * 10
    groups = ["old"] * 20 + ["young"] * 10
    ill, said = [t == "ill" for t in truths], [a == "ill" for a in answers]
    assert equalized_odds_difference(ill, said, sensitive_features=groups) == 1
    found = group_gaps(answers, truths, groups, 0)
    assert found["equalised_odds"]["gap"] == 0.0
    apart = group_gaps(["ill", "well"], ["ill", "well"], ["a", "b"], 0)
    assert apart["equalised_odds"] is None
    assert apart["accuracy"]["gap"] == 0.0


def test_a_constant_column_is_said_and_not_compared():
    answers, truths, _ = drawn(["no", "yes"], ["a"], 30)
    found = group_gaps(answers, truths, ["a"] * 30, 0)
    assert found["said"] == "all 30 test records are in one group: no comparison"
    assert found["groups"]["a"]["records"] == 30
    assert "accuracy" not in found


@pytest.mark.parametrize(("fields", "what"), [({"sex": None}, "empty"), ({}, "missing")])
def test_a_record_without_a_group_is_an_error_that_names_it(fields, what):
    records = [Record("a.csv row 1", {"sex": "f"}), Record("a.csv row 2", fields)]
    with pytest.raises(DataError, match=rf"a\.csv row 2, column 'sex': {what}.*data\.keep"):
        groups_of(records, "sex")
    assert groups_of([Record("x", {"age": 40}), Record("y", {"age": False})], "age") == ["40", "False"]


def test_clients_without_test_records_and_tasks_without_answers_to_choose_from():
    task, other = small.classes(), small.numbers()
    row = [Record("x row 1", {"text": "a", "target": "good", "sex": "f"})]
    number = [Record("y row 1", {"text": "a", "target": 2.0})]
    rows = {"a": (task, row), "b": (task, []), "c": (other, number * 2)}
    clients = {name: SimpleNamespace(task=of, test=test) for name, (of, test) in rows.items()}
    tasks = {"one": task, "two": other, "none": small.classes()}
    found = over_groups({"a": ["bad"], "c": [1.0, 3.0]}, clients, tasks, "sex", 0)  # type: ignore[arg-type]
    assert found["one"]["groups"]["f"]["records"] == 1
    for name in ("two", "none"):
        assert (found[name]["groups"], "no test records" in found[name]["said"]) == ({}, True)


def test_an_evaluation_tells_what_was_predicted(model):
    method = small.method("local")
    members = small.clients(model, method)
    members["site-2"].test = []
    state, _ = small.rounds(method, members, model)
    found = evaluate(method, state, members, model, 3)
    assert found.predicted.keys() == found.own.keys() == members.keys() - {"site-2"}
    for name, predicted in found.predicted.items():
        client = members[name]
        assert client.task.score(predicted, client.task.targets(client.test)) == found.own[name]


def toml(folder: Path, sex: str = "fm", method: str = "fedavg") -> str:
    lines = small.table(folder / "people.csv", 90).read_text().splitlines()
    rows = [f"{line},{sex[i % len(sex)]}" for i, line in enumerate(lines[1:])]
    (folder / "people.csv").write_text("\n".join([lines[0] + ",sex", *rows]) + "\n")
    text = small.toml(folder / "people.csv", method, rounds=2)
    return text.replace('keep = ["site"]', 'keep = ["site", "sex"]\ntest_fraction = 0.5')


def test_a_run_says_who_is_served_how_well(tmp_path):
    given = parse(toml(tmp_path), "x", ["fairness.group=sex", "baselines=['local']"])
    result = run_experiment(given, tmp_path / "run")
    assert RunResult.load(tmp_path / "run") == result
    fairness, metrics = result.fairness, result.scores
    assert fairness.clients["accuracy"].mean == pytest.approx(metrics.per_client_mean["accuracy"])
    assert fairness.clients["accuracy"].worst == metrics.per_client_worst["accuracy"]
    groups = fairness.groups["classification"].groups
    assert sum(one.records for one in groups.values()) == result.num_records.test == 45
    pooled = sum(one.records * one.accuracy for one in groups.values()) / 45
    everybody = metrics.global_prompt["accuracy"]  # fedavg: everybody's own prompt is the one of all
    assert pooled == pytest.approx(everybody)
    local = RunResult.load(tmp_path / "run" / "baselines" / "local")
    alone = local.scores.per_client
    worse = [n for n, own in metrics.per_client.items() if own["accuracy"] < alone[n]["accuracy"]]
    assert fairness.worse_off_than_local["accuracy"].worse == sorted(worse)
    assert local.fairness.clients
    assert local.fairness.groups
    page = small.page(tmp_path)
    assert "Clients' own test accuracy" in page
    assert f"Worse off than alone: {len(worse)} of 3" in page
    assert "\nf\n" in page
    assert "\nequalised odds\n" in page
    assert run_experiment(given, tmp_path / "run", resume=True) == result


def test_a_run_that_is_not_asked_compares_no_groups(tmp_path):
    result = small.run(tmp_path, rounds=1)
    assert result.fairness.clients
    assert (result.fairness.column, result.fairness.groups) == (None, {})
    page = small.page(tmp_path)
    assert "Client by client" in page
    assert "Groups of people" not in page
    assert "Worse off than alone" not in page
    assert "Whether joining pays is unknown, because no client was tuned alone" in page


def test_a_constant_column_ends_a_run_with_a_sentence(tmp_path):
    run_experiment(parse(toml(tmp_path, "f"), "x", ["fairness.group=sex"]), tmp_path / "run")
    assert "All 45 test records are in one group: no comparison." in small.page(tmp_path)


def test_a_column_that_is_missing_is_found_before_anything_is_run(tmp_path):
    for number, change in enumerate(["fairness.group=gender", "data.keep=['site']"]):
        with pytest.raises(DataError, match=r"column '(gender|sex)': missing; fairness\.group"):
            run_experiment(parse(toml(tmp_path), "x", ["fairness.group=sex", change]), tmp_path / f"run-{number}")
        assert not (tmp_path / f"run-{number}").exists()
    with pytest.raises(ConfigError, match=r"fairness: unknown key 'groups'; did you mean 'group'\?"):
        parse(toml(tmp_path), "x", ["fairness.groups=sex"])
