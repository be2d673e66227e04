"""Whole comparisons on the tiny backbone, in worker processes: what they leave, and what befalls them."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import small
from ficpd.errors import RunError
from ficpd.experiments.build import build_context
from ficpd.experiments.comparison.compare import compare
from ficpd.experiments.comparison.grid import Cell, Grid, expand
from ficpd.experiments.comparison.run_cell import ContextCache, data_of, run_cell
from ficpd.experiments.comparison.schema import CellResult, ComparisonResult
from ficpd.experiments.results import RunResult
from ficpd.experiments.run_directory import RunDir
from ficpd.experiments.runner import no_progress
from ficpd.experiments.runner import run as run_experiment
from ficpd.experiments.setup import build_method, build_schedule
from ficpd.federation.rounds import sample_cohort

FREE = "[budgets.free]\nepsilon = inf\nrounds = 3\n"
PRIVATE = '[budgets.private]\nepsilon = 4\nrounds = 3\ncompression = { name = "subspace", dimension = 4 }\n'


def plan(folder: Path, axes: str = "[methods.fedavg]\n", seeds: str = "[0]", more: str = "") -> Grid:
    """A comparison's file beside its recipe and records."""
    folder.mkdir(exist_ok=True, parents=True)
    small.table(folder / "records.csv")
    (folder / "small.toml").write_text(small.toml(folder / "records.csv", rounds=3))
    text = f'name = "test"\nrecipe = "small.toml"\nreference = "fedavg"\nseeds = {seeds}\n{more}\n{axes}'
    (folder / "test.toml").write_text(text)
    return expand(text, "test.toml", (), folder)


def troubled(how: str, unless: Path | str = "") -> str:
    """FedAvg, and a method that comes to grief in its second round."""
    return f'[methods.fedavg]\n[methods.bad]\nmethod = {{ name = "troubled.method", how = "{how}", unless = "{unless}" }}\n'


def of(found: ComparisonResult, **labels: Any) -> list[CellResult]:
    return [c for c in found.cells if all(getattr(c, key) == value for key, value in labels.items())]


def times(out: Path) -> dict[Path, int]:
    """When each run's result was written."""
    return {file: file.stat().st_mtime_ns for file in out.rglob("result.json")}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, Grid, ComparisonResult]:
    """Two budgets and two seeds; one method fails, one cannot be run with the private budget's compression."""
    folder = tmp_path_factory.mktemp("grid")
    axes = troubled("error") + '[methods.lora]\nmethod.name = "fedlora"\n[methods.ficpd]\nmethod.num_prototypes = 2\n'
    given = plan(folder, axes + FREE + PRIVATE, "[0, 1]")
    patch = pytest.MonkeyPatch()
    events: list[Mapping[str, Any]] = []
    found = compare(given, folder / "out", jobs=2, seen=events.append)
    patch.undo()
    failed = {event["key"] for event in events if event.get("status") == "failed"}
    assert failed == {c.key for c in of(found, method="bad")}
    return folder / "out", given, found


@pytest.mark.slow
def test_one_failing_method_does_not_stop_the_others(finished):
    out, _, found = finished
    assert len(found.cells) == 2 * 2 * 7
    bad = of(found, method="bad")
    assert {c.status for c in bad} == {"failed"}
    assert "ZeroDivisionError: a division by zero, in the second round" in bad[0].reason
    assert "Traceback" in (out / "cells" / f"{bad[0].key}.log").read_text()
    refused = of(found, method="lora", budget="private")
    assert {c.status for c in refused} == {"refused"}
    assert "fedlora tunes something else" in refused[0].reason
    others = [c for c in found.cells if c not in bad and c not in refused]
    assert {c.status for c in others} == {"done"}
    assert found.counts == {"done": 22, "failed": 4, "refused": 2}


def test_a_cell_is_what_the_run_came_to_alone(finished, tmp_path):
    """The figures of a worker that had seen other cells before are those of a run of its own."""
    out, given, found = finished
    (cell,) = of(found, method="ficpd", budget="private", seed=1)
    experiment = next(c.experiment for c in given.cells if (c.method, c.budget, c.seed) == ("ficpd", "private", 1))
    alone = run_experiment(experiment, tmp_path / "alone")
    assert cell.figures.own == pytest.approx(alone.scores.per_client_mean["accuracy"], abs=0.04)
    assert cell.epsilon == pytest.approx(alone.privacy.epsilon)
    assert cell.bytes.up == alone.bytes.up_total
    inside = RunResult.load(out / "cells" / cell.key)
    assert inside.scores.zero_shot == alone.scores.zero_shot
    assert (out / "cells" / cell.key / "library" / "card.json").exists()


def test_curves_have_every_round_and_end_with_the_figures(finished):
    _, _, found = finished
    for cell in of(found, status="done"):
        rounds = [point.round for point in cell.curve]
        assert rounds == ([0] if cell.method == "zero_shot" else [1, 2, 3])
        last = cell.curve[-1]
        assert (last.own, last.everyone) == (cell.figures.own, cell.figures.everyone)
        assert last.bytes_up + last.bytes_down == cell.bytes.total
        sums = [point.bytes_up for point in cell.curve]
        assert sums == sorted(sums)


def test_a_centralised_curve_is_scored_as_its_end_is(finished):
    """On each client's own test records, not on one pool of them."""
    out, _, found = finished
    (cell,) = of(found, method="centralized", budget="free", seed=0)
    line = json.loads((out / "cells" / cell.key / "rounds.jsonl").read_text().splitlines()[1])
    assert cell.curve[1].own == line["metrics"]["own_accuracy"]
    sizes = RunResult.load(out / "cells" / cell.key).scores.per_client
    assert len(sizes) == 3


def test_all_methods_of_a_condition_see_the_same_records_and_cohorts(finished):
    _, given, found = finished
    for budget in ("free", "private"):
        for seed in (0, 1):
            assert len({c.data for c in of(found, budget=budget, seed=seed, status="done")}) == 1
    assert len({c.data for c in of(found, status="done")}) == 2, "each seed deals anew"
    free = [c for c in given.cells if c.seed == 0 and c.budget == "free"]
    some = [c for c in free if c.method in ("fedavg", "lora", "bad", "ficpd")]
    assert len({cohorts(c, 2) for c in some if c.method != "ficpd"}) == 1
    others, ficpd = (next(cohorts(c, 2) for c in some if (c.method == "ficpd") == own) for own in (False, True))
    assert [len(names) for names in ficpd] == [3, 2, 3], "ficpd asks all in the first and in the last round"
    assert ficpd[1] == others[1]


def cohorts(cell: Cell, size: int) -> tuple[tuple[str, ...], ...]:
    """Who is asked in each round, if not everybody is."""
    federation = cell.experiment.federation.model_copy(update={"clients_per_round": size})
    context = build_context(cell.experiment.model_copy(update={"federation": federation}))
    schedule = build_schedule(context, build_method(context, context.experiment.method))
    return tuple(tuple(sample_cohort(schedule, list(context.shards), round)) for round in (1, 2, 3))


def test_statistics_and_targets_are_of_the_cells(finished):
    _, _, found = finished
    (free,) = [c for c in found.conditions if c.budget == "free"]
    own = [c.figures.own for c in of(found, method="ficpd", budget="free")]
    other = [c.figures.own for c in of(found, method="fedavg", budget="free")]
    summary = free.methods["ficpd"]
    assert summary.mean == pytest.approx(sum(own) / 2)
    assert summary.against.difference == pytest.approx((own[0] + own[1] - other[0] - other[1]) / 2)
    assert free.methods["fedavg"].against is None
    assert free.methods["bad"].n == 0
    assert free.methods["bad"].against.why == "no pair of finished cells with fedavg"
    ends = [c.figures.own for c in of(found, method="centralized", budget="free")]
    target = next(t for t in found.targets if t.budget == "free" and t.share == 0.9)
    assert target.target == pytest.approx(0.9 * sum(ends) / 2)
    assert target.methods["bad"].of == []


def test_what_it_leaves_can_be_read_again_and_is_plain_json(finished):
    out, _, found = finished
    assert ComparisonResult.load(out) == found == ComparisonResult.load(out / "compare.json")
    assert "NaN" not in (out / "compare.json").read_text()
    assert "Infinity" not in (out / "compare.json").read_text()
    page = " ".join((out / "compare.md").read_text().split())  # cells are padded to one width
    for words in (
        "| zero_shot |",
        "| centralized |",
        "| bad | – | – | – | failed |",
        "a division by zero",
        "## Cells without a figure",
    ):
        assert words in page
    for name in ("overview", "results", "targets", "fronts"):
        assert (out / "tables" / f"{name}.csv").read_text().count("\n") > 3
        tex = (out / "tables" / f"{name}.tex").read_text()
        assert tex.count(r"\begin{tabular}") == tex.count(r"\end{tabular}") == tex.count(r"\toprule") > 0
        assert "_shot" not in tex.replace(r"\_shot", "")
    assert (out / "tables" / "cells.csv").read_text().count("\n") == 29


@pytest.mark.slow
def test_a_second_call_runs_only_what_failed(finished):
    out, given, found = finished
    before, keys = times(out), []
    again = compare(given, out, jobs=2, seen=lambda e: keys.append(e["key"]) if "status" in e else None)
    assert times(out) == before
    assert sorted(keys) == sorted({c.key for c in found.cells if c.status in ("failed", "refused")})
    assert again.counts == found.counts


@pytest.fixture(scope="module")
def once(tmp_path_factory) -> tuple[Grid, Path]:
    """One method, one seed: four runs that are finished."""
    folder = tmp_path_factory.mktemp("once")
    given = plan(folder)
    assert compare(given, folder / "out", jobs=1).counts == {"done": 4}
    return given, folder


@pytest.fixture
def again(once, tmp_path) -> tuple[Grid, Path]:
    """The same plan, and a copy of what it left."""
    given, folder = once
    shutil.copytree(folder / "out", tmp_path / "out")
    return given, tmp_path / "out"


@pytest.mark.slow
def test_a_larger_grid_runs_only_what_is_new(once, again):
    _, out = again
    before = times(out)
    whole = plan(once[1], "[methods.fedavg]\n[methods.prox]\nmethod.name = 'fedprox'\n")
    assert compare(whole, out, jobs=1).counts == {"done": 5}
    after = times(out)
    assert len(after) == 5
    assert {file: after[file] for file in before} == before


@pytest.mark.slow
def test_a_run_that_was_half_done_goes_on_from_its_last_round(tmp_path):
    """Its process is killed in the second round; the second call finds the cause gone, and the first round's checkpoint."""
    given = plan(tmp_path, troubled("killed", tmp_path / "better"))
    found = compare(given, tmp_path / "out", jobs=1)
    (bad,) = of(found, method="bad")
    assert bad.status == "failed"
    assert "was killed by SIGKILL" in bad.reason
    assert {c.status for c in found.cells if c is not bad} == {"done"}
    folder = tmp_path / "out" / "cells" / bad.key
    first = (folder / "rounds.jsonl").read_text()
    assert first.count("\n") == 1
    (tmp_path / "better").touch()
    (bad,) = of(compare(given, tmp_path / "out", jobs=1), method="bad")
    assert bad.status == "done"
    assert (folder / "rounds.jsonl").read_text().startswith(first)
    assert not (tmp_path / "out" / "cells" / f"{bad.key}.log").exists()


def test_records_that_changed_in_between_stop_the_comparison(again):
    """As if the file had been another one when this cell was run."""
    given, out = again
    file = next(out.glob("cells/*fedavg*.json"))
    file.write_text(json.dumps(json.loads(file.read_text()) | {"data": "of another file"}))
    with pytest.raises(RunError, match="should hold the same records and do not: a file was changed between them"):
        compare(given, out, jobs=1)


def test_the_hash_of_the_records_tells_a_changed_word_and_another_holder(tmp_path):
    given = plan(tmp_path).cells[0].experiment
    worlds = [build_context(given), build_context(given)]
    file = tmp_path / "records.csv"
    before = file.read_text()
    file.write_text(before.replace(" was ", " is ", 1))
    worlds.append(build_context(given))
    lines = before.splitlines()
    file.write_text("\n".join([lines[0], lines[1].replace("site-0", "site-1"), *lines[2:]]) + "\n")
    worlds.append(build_context(given))
    hashes = [data_of(context.shards) for context in worlds]
    assert hashes[0] == hashes[1]
    assert len(set(hashes)) == 3


@pytest.mark.slow
def test_one_world_serves_cells_that_differ_in_more_than_the_method(tmp_path):
    """The same backbone in memory; its figures are those of a world of their own."""
    given = plan(tmp_path, "[methods.fedavg]\n" + FREE + PRIVATE)
    own = [c for c in given.cells if c.method == "fedavg"]
    shared, found = ContextCache(), {}
    for name, worlds in (("shared", lambda: shared), ("alone", ContextCache)):
        for cell in own:
            got = run_cell(cell.experiment, cell.hash, cell.ground, tmp_path / name, worlds(), no_progress)
            found.setdefault(cell.hash, []).append(got)
    assert shared.context is not None
    for one, other in found.values():
        assert one.figures.own == pytest.approx(other.figures.own, abs=0.04)
        assert (one.bytes, one.epsilon, one.data) == (other.bytes, other.epsilon, other.data)


def test_a_second_process_in_the_folder_is_refused(tmp_path):
    given = plan(tmp_path)
    with RunDir(tmp_path / "out").lock(), pytest.raises(RunError, match=r"another process is at work in .*out; wait"):
        compare(given, tmp_path / "out")
    assert not (tmp_path / "out" / "cells").exists()


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    with pytest.raises(RunError, match="is not empty and holds no comparison; choose another --out"):
        compare(plan(tmp_path), tmp_path / "mine")
    with pytest.raises(RunError, match=r"thesis\.txt is a file.*--out"):
        compare(plan(tmp_path), tmp_path / "mine" / "thesis.txt")
    assert [file.name for file in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("change", [{"schema": 1}, {"ficpd": "0.0.9"}, None])
def test_results_of_another_version_are_named_and_nothing_is_run(again, change):
    given, out = again
    file = next(out.glob("cells/*fedavg*.json"))
    file.write_text(json.dumps(json.loads(file.read_text()) | change) if change else "{")
    before = times(out)
    why = {"schema": "of another version", "ficpd": r"is of ficpd 0\.0\.9"}
    with pytest.raises(RunError, match=rf"{file.stem}.* {why[next(iter(change))] if change else 'cannot be read'}"):
        compare(given, out, jobs=1)
    assert times(out) == before


def test_a_comparison_of_another_schema_is_not_read(tmp_path):
    (tmp_path / "compare.json").write_text(json.dumps({"schema": 99}))
    with pytest.raises(RunError, match=r"compare\.json is of another version than this ficpd"):
        ComparisonResult.load(tmp_path)
    (tmp_path / "compare.json").write_text("{")
    with pytest.raises(RunError, match="cannot be read"):
        ComparisonResult.load(tmp_path)
    with pytest.raises(RunError, match="holds no comparison"):
        ComparisonResult.load(tmp_path / "nowhere")


def command(*words: object) -> subprocess.Popen[str]:
    """Starts the command with SIGINT as it is in a terminal; a shell starts its background jobs with SIGINT ignored."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200", "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(
        [sys.executable, "-m", "ficpd", "compare", *map(str, words)], env=environment, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, start_new_session=True, preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


@pytest.fixture
def compare_command(ficpd) -> Callable[..., tuple[int, str, str]]:
    return partial(ficpd, "compare")


@pytest.mark.slow
def test_the_command_says_what_failed_and_ends_with_status_3(compare_command, tmp_path):
    plan(tmp_path, troubled("error"))
    sweep = "training.local_steps=1,2"
    given = (tmp_path / "test.toml", "--out", tmp_path / "out", "--jobs", 1)
    status, out, err = compare_command(*given, "--ablate", sweep)
    assert (status, err) == (3, "")
    assert "bad (training.local_steps = 1) failed, seeds 0: ZeroDivisionError" in out
    assert "tables: " in out
    status, out, _ = compare_command(tmp_path / "out", "--table", "markdown")
    assert (status, " ".join(out.split()).count("| fedavg |")) == (0, 2)
    assert "**training.local_steps = 2**" in out
    assert r"\begin{tabular}" in compare_command(tmp_path / "out" / "compare.json", "--table", "latex")[1]
    assert compare_command(tmp_path / "out", "--table", "csv")[1].startswith("table,method,")


def test_a_mistake_is_one_sentence(compare_command, tmp_path):
    plan(tmp_path)
    file = tmp_path / "test.toml"
    for words, said in (
        ((tmp_path / "none.toml",), "no comparison file"),
        (("quikc",), "did you mean 'quick'?"),
        ((file, "--ablate", "privacy.epsilon"), "expected part.key=value,value"),
        ((tmp_path, "--table", "markdown"), "holds no comparison"),
        ((file, "--track", "aim"), "--track"),
    ):
        err = compare_command(*words).said(1)
        assert said in err
        assert "Traceback" not in err
    for words in (
        (file, "other.toml"),
        (file, "--table", "words"),
        (file, "--table", "csv", "--out", tmp_path / "out"),
    ):
        assert compare_command(*words)[0] == 2


@pytest.mark.slow
def test_ctrl_c_stops_all_and_leaves_what_is_finished(tmp_path):
    """The interrupted run's process is gone, its lock with it, and the same command goes on."""
    plan(tmp_path, troubled("slow", tmp_path / "better"))
    out = tmp_path / "out"
    process = command(tmp_path / "test.toml", "--out", out, "--jobs", 1)
    wait_for(lambda: any("bad" in file.parent.name for file in out.rglob("rounds.jsonl")))
    workers = children(process.pid)
    assert workers
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=300)
    assert process.returncode == 130, said
    assert "Traceback" not in said[0] + said[1]
    assert "the same command continues" in said[1]
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers))
    assert ComparisonResult.load(out).counts == {"done": 4, "missing": 1}
    (tmp_path / "better").touch()
    assert compare(plan(tmp_path, troubled("slow", tmp_path / "better")), out, jobs=1).counts == {"done": 5}


@pytest.mark.slow
def test_workers_end_with_the_process_that_they_work_for(tmp_path):
    """Killed, it can stop nobody; they see the end of their input, and the folder is free again."""
    plan(tmp_path, troubled("slow"))
    out = tmp_path / "out"
    process = command(tmp_path / "test.toml", "--out", out, "--jobs", 1)
    wait_for(lambda: any("bad" in file.parent.name for file in out.rglob("rounds.jsonl")))
    workers = children(process.pid)
    process.kill()
    process.communicate(timeout=300)
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers))
    with RunDir(out).lock():
        pass


def children(pid: int) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False).stdout
    return [int(line) for line in found.split()]


def wait_for(true: Any, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)
