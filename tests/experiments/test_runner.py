"""A whole run on disk: what it leaves, and that no crash at any moment changes what a resumed run leaves."""

import errno
import json
import math
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch

import small
from disk import to_the_disk, watch_renames
from ficpd import storage
from ficpd.backbones import query_engine
from ficpd.errors import ConfigError, DataError, RunError
from ficpd.experiments.build import build_context
from ficpd.experiments.config import parse
from ficpd.experiments.finished import FinishedRun
from ficpd.experiments.report.blocks import Table
from ficpd.experiments.report.build import page_of
from ficpd.experiments.results import RunResult
from ficpd.experiments.run_directory import ROUNDS, RunDir
from ficpd.experiments.runner import run as run_experiment
from ficpd.federation import codec
from ficpd.federation.client_states import ClientStates
from ficpd.federation.rounds import Round
from ficpd.library.library import PromptLibrary
from ficpd.types import State


class Killed(BaseException):
    """Stands for the power cut: nothing in the package catches it."""


def left_by(out: Path) -> dict[str, torch.Tensor]:
    """All numbers that a run leaves: its library, its last state, what clients keep, its scores."""
    prompts = {f"library/{n}": p.vectors_PD for n, p in PromptLibrary.load(out).candidates().items()}
    state, number, rounds, _ = RunDir(out).load()
    states = ClientStates(out, len(rounds), number)
    kept = {f"{name}/{key}": array for name in states.names for key, array in states.load(name).items()}
    metrics = RunResult.load(out).scores
    scores = [value for score in metrics.per_client.values() for value in score.values()]
    return {
        **prompts,
        **state.arrays,
        **{f"kept/{name}": array for name, array in kept.items()},
        "rounds": torch.tensor([done.round for done in rounds]),
        "bytes": torch.tensor([[done.bytes_up, done.bytes_down] for done in rounds]),
        "scores": torch.tensor(scores),
    }


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    """To the last bit."""
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_run_other_lock_step_cores_or_baselines_leaves_the_same_bits(tmp_path, monkeypatch, dtype):
    """`keep_mb=0`: lower layers are computed anew in each step."""
    same = f"backbone.dtype={dtype}"
    small.run(tmp_path / "a", "ficpd", same, "baselines=['local']", rounds=3)
    small.run(tmp_path / "b", "ficpd", same, "engine.options.lock_step=1", "engine.keep_mb=0", rounds=3)
    monkeypatch.setattr(query_engine, "THREADS", 1)
    small.run(tmp_path / "c", "ficpd", same, "engine.options.lock_step=2", rounds=3)
    whole = left_by(tmp_path / "a" / "run")
    assert_same(left_by(tmp_path / "b" / "run"), whole)
    assert_same(left_by(tmp_path / "c" / "run"), whole)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    small.run(folder, "ficpd", "baselines=['local', 'centralized']", "federation.evaluate_every=2", rounds=4)
    return folder


def test_the_files_of_a_run(finished):
    out = finished / "run"
    found = {str(file.relative_to(out)) for file in out.rglob("*") if file.is_file()}
    own = {"checkpoint", "rounds.jsonl", "result.json"}
    kept = {f"library/{name}" for name in ("prompts.safetensors", "card.json", "README.md")}
    assert {"experiment.toml", "resolved.toml", "report.html", *own, *kept} <= found
    for name in ("local", "centralized"):
        assert {f"baselines/{name}/{file}" for file in own | kept} <= found
    assert "baselines/zero_shot/result.json" in found
    assert not [name for name in found if "writing" in name or ".old" in name]


@pytest.mark.parametrize("where", [".", "baselines/local", "baselines/centralized", "baselines/zero_shot"])
def test_a_result_holds_what_was_asked_for(finished, where):
    result = RunResult.load(finished / "run" / where)
    assert result.method == {".": "ficpd"}.get(where, Path(where).name)
    assert (result.backbone.name, result.task, result.seed) == ("tiny", "classification", 0)
    assert result.num_clients == (1 if result.method == "centralized" else 3)
    assert result.num_rounds == (0 if result.method == "zero_shot" else 4)
    assert result.scores.per_client
    scores = [*result.scores.per_client.values(), result.scores.zero_shot]
    assert all(score.keys() == {"accuracy", "f1"} and 0 <= score["accuracy"] <= 1 for score in scores)
    assert (result.scores.global_prompt is None) == (result.method == "local")
    assert all(value >= 0 for value in result.seconds.model_dump().values())
    nothing_leaves = result.method in ("local", "zero_shot")
    guarantee = ("record", 0.0) if nothing_leaves else ("none", None)
    assert (result.privacy.unit, result.privacy.epsilon) == guarantee
    assert {"device", "torch"} <= result.machine.keys()
    assert {"ficpd", "torch"} <= result.versions.keys()
    assert result.dropped_updates == 0


def test_every_round_has_its_line_and_bytes_add_up(finished):
    out = finished / "run"
    lines = [json.loads(line) for line in (out / "rounds.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines] == [1, 2, 3, 4]
    result = RunResult.load(out)
    assert result.bytes.up_total == sum(line["bytes_up"] for line in lines) > 0
    assert result.bytes.down_total == sum(line["bytes_down"] for line in lines) > 0
    assert result.bytes.up_per_client_round == result.bytes.up_total / 12
    assert result.bytes.down_per_client_round == result.bytes.down_total / 12
    delta, totals = 3 * 16 * 4, (2 * 17 + 16 * 17 // 2) * 4
    mean = (3 * delta + 2 * totals) / 4  # the first round sends both, the last one only totals
    assert mean < result.bytes.up_per_client_round < mean + 100
    assert ["sample_accuracy" in line["metrics"] for line in lines] == [False, True, False, False]


def test_the_report_has_a_row_for_each_method(finished):
    names = ["zero_shot", "local", "centralized", "ficpd"]
    assert [result.method for result in FinishedRun.load(finished / "run").results] == names
    (methods,) = [section for section in page_of(finished / "run").sections if section.id == "methods"]
    (table,) = [block for block in methods.blocks if isinstance(block, Table)]
    assert [line[0] for line in table.cells] == names
    lines = [line for line in small.page(finished).splitlines() if line]
    for fact, value in {"clients": "3, all asked every round", "rounds": "4", "seed": "0"}.items():
        assert f"{fact}{value}" in lines


def test_all_settings_are_written_as_they_were_used(finished):
    given = parse((finished / "run" / "experiment.toml").read_text(), "experiment.toml")
    used = parse((finished / "run" / "resolved.toml").read_text(), "resolved.toml")
    changes = ("baselines=['local', 'centralized']", "federation.evaluate_every=2")
    assert given == small.experiment(finished, "ficpd", *changes, rounds=4)
    assert (given.prompt.enters_at, given.training.learning_rate) == (None, None)
    assert used.prompt.enters_at == 1
    assert used.training.learning_rate > 0
    card = PromptLibrary.load(finished / "run").card
    assert card["training"]["learning_rate"] == used.training.learning_rate


def test_a_finished_run_is_not_run_again(finished):
    changes = ("baselines=['local', 'centralized']", "federation.evaluate_every=2")
    again = small.experiment(finished, "ficpd", *changes, rounds=4)
    before = {file: file.stat().st_mtime_ns for file in (finished / "run").rglob("result.json")}
    assert run_experiment(again, finished / "run", resume=True).method == "ficpd"
    assert {file: file.stat().st_mtime_ns for file in (finished / "run").rglob("result.json")} == before


@pytest.mark.parametrize("method", ["fedavg", "ficpd", "local", "centralized", "zero_shot"])
def test_a_run_without_rounds_leaves_the_start(tmp_path, method):
    result = small.run(tmp_path, method, rounds=0)
    assert (result.bytes.up_total, result.num_rounds) == (0, 0)
    found = small.library(tmp_path)
    assert all(torch.equal(vectors, found["start"]) for vectors in found.values())


@pytest.mark.parametrize("method", ["fedavg", "ficpd"])
def test_a_run_whose_every_update_is_dropped_ends_and_says_so(tmp_path, method):
    result = small.run(tmp_path, method, "federation.max_update_norm=1e-9", rounds=2)
    assert result.dropped_updates == 6
    assert result.bytes.up_total > 0
    assert "6 of 6 updates were dropped (site-0, round 1: " in small.page(tmp_path)


@pytest.mark.parametrize("method", ["fedavg", "fedprox", "ficpd", "local", "centralized"])
def test_equal_seeds_leave_equal_libraries_and_others_do_not(tmp_path, method):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        small.run(tmp_path / name, method, seed=seed)
    left = [left_by(tmp_path / name / "run") for name in "abc"]
    assert_same(left[0], left[1])
    both = left[0].keys() & left[2].keys()
    assert any(not small.close(left[0][name].float(), left[2][name].float(), 1e-6) for name in both)


def test_regression_and_a_tuned_head_run_too(tmp_path):
    given = small.experiment(tmp_path, "fedavg", small.NUMBERS, "task.tuned_head=true")
    small.numbered(tmp_path / "records.csv")
    result = run_experiment(given, tmp_path / "run")
    assert result.task == "regression"
    assert result.scores.global_prompt["rmse"] < 3
    assert PromptLibrary.load(tmp_path / "run").start.head_rows == 2


@pytest.mark.parametrize("method", ["fedavg", "ficpd"])
def test_a_constant_target_gives_finite_scores(tmp_path, method):
    given, data = small.experiment(tmp_path, method, small.NUMBERS), tmp_path / "records.csv"
    data.write_text(data.read_text().replace(",good,", ",3.0,").replace(",bad,", ",3.0,"))
    result = run_experiment(given, tmp_path / "run")
    scores = [*result.scores.per_client.values(), result.scores.per_client_mean]
    assert all(math.isfinite(value) for of in scores for value in of.values())


def test_a_wrong_label_stops_the_run_before_it_begins(tmp_path):
    given = small.experiment(tmp_path)
    file = tmp_path / "records.csv"
    file.write_text(file.read_text().replace(",bad,", ",bd,", 1))
    with pytest.raises(DataError, match=r"records\.csv row \d+, column target: unknown label 'bd'; did you mean 'bad'"):
        run_experiment(given, tmp_path / "run")


def kill_when(lines: Path, number: int, process: subprocess.Popen) -> None:
    """SIGKILL as soon as that many rounds are on the disk. Fails if the process ends before."""
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if lines.exists() and lines.read_text().count("\n") >= number:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.002)
    said = process.communicate()[1].decode()
    assert process.returncode == -signal.SIGKILL, said or "it was finished before it could be killed"


@pytest.fixture
def one_thread():
    """As in the processes that are killed: another number of threads rounds sums otherwise, and Adam makes that large."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_a_killed_run_goes_on_to_the_same_end(tmp_path):
    """SIGKILL to a process of its own, once amid each of three methods; then to the end, and an unbroken run beside."""
    rounds, out, recipe = 30, tmp_path / "killed", tmp_path / "small.toml"
    text = small.toml(small.table(tmp_path / "records.csv"), "ficpd", rounds)
    recipe.write_text(text.replace("baselines = []", "baselines = ['fedavg', 'local']"))
    command = [sys.executable, "-m", "ficpd", "run", str(recipe), "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    folders = [out, out / "baselines" / "fedavg", out / "baselines" / "local"]
    for folder, number in zip(folders, (2, 7, 4), strict=True):
        process = subprocess.Popen(
            command + ["--resume"] * (folder != out), env=environment, start_new_session=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )  # fmt: skip
        kill_when(folder / "rounds.jsonl", number, process)
        assert number <= len(RunDir(folder).load()[2]) < rounds
    given = parse(recipe.read_text(), "small.toml")
    run_experiment(given, out, resume=True)
    run_experiment(given, tmp_path / "whole")
    for folder in folders:
        assert_same(left_by(folder), left_by(tmp_path / "whole" / folder.relative_to(out)))


def crash_at(monkeypatch, number: int) -> None:
    """What is to be renamed as the `number`-th, from 1, is not: the power is gone."""
    left = [number]

    def seen(target: Path) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise Killed(f"before {target}")

    watch_renames(monkeypatch, seen)


def files_below(folder: Path) -> set[str]:
    return {str(file.relative_to(folder)) for file in folder.rglob("*")}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ficpd", "local"])
def test_a_crash_before_any_file_is_in_its_place_changes_nothing(tmp_path, monkeypatch, method):
    """Every moment at which the disk can be left: each resumed run ends with the files and numbers of an unbroken one."""
    given, names = small.experiment(tmp_path, method, rounds=2), []
    with monkeypatch.context() as patch:
        watch_renames(patch, lambda target: names.append(target.name))
        run_experiment(given, tmp_path / "whole")
    assert {"experiment.toml", "checkpoint", "rounds.jsonl", "library", "result.json", "report.html"} <= set(names)
    whole, wrong = left_by(tmp_path / "whole"), []
    for number, name in enumerate(names, 1):
        out = tmp_path / str(number)
        with monkeypatch.context() as patch:
            crash_at(patch, number)
            with pytest.raises(Killed):
                run_experiment(given, out)
        try:
            run_experiment(given, out, resume=True)
        except RunError as error:
            wrong.append(f"{number} {name}: {error}".replace(str(tmp_path), ""))
            continue
        assert_same(left_by(out), whole)
        lacking = files_below(tmp_path / "whole") ^ files_below(out)
        lines = (out / "rounds.jsonl").read_text().count("\n")
        wrong += [f"{number} {name}: rounds.jsonl has {lines} of 2 lines"] if lines != 2 else []
        wrong += [f"{number} {name}: more or fewer files: {lacking}"] if lacking else []
    assert not wrong, "\n".join(wrong)


def test_a_run_stopped_between_two_rounds_goes_on_with_the_baselines_too(tmp_path):
    given = small.experiment(tmp_path, "fedavg", "baselines=['local']", rounds=3)
    seen: list[tuple[str, int]] = []

    def stop(method, done, planned, figures):
        seen.append((method, done))
        if (method, done) == ("local", 2):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_experiment(given, tmp_path / "broken", progress=stop)
    assert ("fedavg", 3) in seen
    run_experiment(given, tmp_path / "broken", resume=True)
    run_experiment(given, tmp_path / "whole")
    for where in (".", "baselines/local"):
        assert_same(left_by(tmp_path / "broken" / where), left_by(tmp_path / "whole" / where))
    tables = [(tmp_path / name / "report.html").read_text().count("<tr") for name in ("broken", "whole")]
    assert tables[0] == tables[1] > 5


@pytest.mark.parametrize("method", ["fedavg", "local"])
def test_a_learning_rate_that_diverges_is_told_and_leaves_what_was_there(tmp_path, method):
    """A client that keeps its prompt keeps the last one that is a number, as the server does."""
    changes = "training.learning_rate=1e38", "training.local_steps=5", "baselines=['local']"
    given = small.experiment(tmp_path, method, *changes, rounds=1)
    regression = {"name": "regression", "anchors": small.ANCHORS, "instruction": "it was", "tuned_head": False}
    numbers = tmp_path / "numbers.csv"
    rows = [f"{word} film,{i % 3 + 1},s{i % 2}\n" for i, word in enumerate(small.GOOD * 6)]
    numbers.write_text("text,target,site\n" + "".join(rows))
    of_numbers = {"task": regression, "data": given.data.model_copy(update={"source": str(numbers)})}
    for name, experiment in {"labels": given, "numbers": given.model_copy(update=of_numbers)}.items():
        result = run_experiment(experiment, tmp_path / name)
        found = FinishedRun.load(tmp_path / name)
        alone = result if method == "local" else found.alone
        bare = next(one for one in found.baselines if one.method == "zero_shot")
        if name == "labels":
            assert alone.scores.per_client_mean == bare.scores.per_client_mean
        else:  # a prompt can be far too long, and a number
            assert alone.scores.per_client_mean["rmse"] <= 2
        if method != "local":
            assert "updates were dropped (" in found.verdict
            assert "lower training.learning_rate" in found.verdict


def test_two_runs_in_one_directory_at_once_are_refused(finished, tmp_path):
    """Both new, or both going on: each would write over the other's checkpoint, and pay from one ledger."""
    given, out = parse((finished / "run" / "experiment.toml").read_text(), "experiment.toml"), tmp_path / "out"
    refused: list[str] = []

    def meanwhile(*_: object) -> None:
        for resume in (False, True):
            busy = r"another process is at work in .*out; wait until it has ended, or choose"
            with pytest.raises(RunError, match=busy):
                run_experiment(given, out, resume=resume)
            refused.append("resumed" if resume else "new")

    run_experiment(given, out, progress=meanwhile)
    assert refused[:2] == ["new", "resumed"]
    assert_same(left_by(out), left_by(finished / "run"))


def test_a_directory_that_nothing_was_put_into_is_taken_away_again(tmp_path):
    with RunDir(tmp_path / "runs" / "mine").lock():
        assert (tmp_path / "runs" / "mine").is_dir()
    assert not (tmp_path / "runs").exists()
    with RunDir(tmp_path / "runs" / "mine").lock():
        RunDir(tmp_path / "runs" / "mine").write("experiment.toml", "")
    assert (tmp_path / "runs" / "mine" / "experiment.toml").exists()


def test_a_file_is_no_run_directory(tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(RunError, match="out is a file, expected a directory"):
        run_experiment(small.experiment(tmp_path), tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"


def test_a_directory_of_something_else_is_refused_and_left_alone(tmp_path):
    given, out = small.experiment(tmp_path), tmp_path / "thesis"
    out.mkdir()
    (out / "chapter.tex").write_text("...")
    for resume in (False, True):
        with pytest.raises(RunError, match=r"is not empty and holds no run\. Choose another --out"):
            run_experiment(given, out, resume=resume)
    assert [file.name for file in out.iterdir()] == ["chapter.tex"]


def test_an_empty_directory_is_taken(tmp_path):
    (tmp_path / "run").mkdir()
    assert small.run(tmp_path, rounds=1).num_rounds == 1


def test_an_occupied_directory_is_refused(finished):
    given = parse((finished / "run" / "experiment.toml").read_text(), "experiment.toml")
    with pytest.raises(RunError, match=r"already holds a run. Go on with it \(--resume\), or choose another --out"):
        run_experiment(given, finished / "run")


def test_another_experiment_is_not_gone_on_with(finished):
    given = parse((finished / "run" / "experiment.toml").read_text(), "experiment.toml", ["seed=9"])
    with pytest.raises(RunError, match=r"another experiment \(seed was 0, is 9\)\. Resume without changes"):
        run_experiment(given, finished / "run", resume=True)


def stopped(tmp_path: Path, method: str = "fedavg"):
    given = small.experiment(tmp_path, method, rounds=3)

    def stop(name, done, planned, figures):
        if (name, done) == (method, 2):
            raise Killed

    with pytest.raises(Killed):
        run_experiment(given, tmp_path / "run", progress=stop)
    return given, tmp_path / "run"


@pytest.mark.parametrize(
    "damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"{" + b[1:], lambda b: b + b"0"]
)
def test_a_damaged_checkpoint_is_refused_with_what_to_do(tmp_path, damage):
    given, out = stopped(tmp_path)
    whole = (out / "checkpoint").read_bytes()
    (out / "checkpoint").write_bytes(damage(whole))
    unread = r"checkpoint cannot be read, or is of another version: .*Delete it to begin anew"
    with pytest.raises(RunError, match=unread):
        run_experiment(given, out, resume=True)
    (out / "checkpoint").unlink()
    assert run_experiment(given, out, resume=True).num_rounds == 3


@pytest.mark.parametrize("told", [None, b"", b"[", b"3", b'[{"round": 1}]'])
def test_a_checkpoint_of_another_version_is_refused(tmp_path, told):
    directory, arrays = RunDir(tmp_path), {"prompt": torch.ones(2)}
    if told is not None:
        arrays[ROUNDS] = torch.tensor(list(told), dtype=torch.uint8)
    directory.write("checkpoint", storage.encode_state(State(arrays), {"totals": {}}))
    with pytest.raises(RunError, match="checkpoint cannot be read"):
        directory.load()


def test_among_sites_a_damaged_checkpoint_is_not_to_be_deleted(tmp_path):
    """They answer no round again that is over."""
    directory = RunDir(tmp_path)
    directory.write("checkpoint", "half")
    with pytest.raises(RunError, match="Delete it to begin anew"):
        directory.load()
    directory.write("sites.json", "{}")
    with pytest.raises(RunError, match="Restore it from a copy, or begin in a new directory"):
        directory.load()


def test_a_damaged_result_is_refused(tmp_path):
    given, out = stopped(tmp_path)
    (out / "result.json").write_text('{"method": ')
    with pytest.raises(RunError, match=r"result\.json"):
        run_experiment(given, out, resume=True)


def test_a_checkpoint_comes_back_as_it_was_saved(tmp_path):
    directory = RunDir(tmp_path)
    assert directory.load() is None
    state = State({"prompt": torch.randn(2, 3)}, {"num_rounds": 4})
    rounds = [Round(1, 3, 2, {"a": "no reply"}, 10, 20, 0.5, 0.25, {"own_accuracy": 0.5})]
    directory.save(state, 3, rounds, {"train": 0.5})
    back, states, back_rounds, totals = directory.load()
    assert small.same(back.arrays, state.arrays)
    assert states == 3
    assert (back.facts, back_rounds, totals) == (state.facts, rounds, {"train": 0.5})
    assert len((tmp_path / "rounds.jsonl").read_text().splitlines()) == 1


def test_a_checkpoint_of_many_clients_and_rounds_comes_back(tmp_path):
    """They hold every client's queries in every round, and no header, which has a limit, grows with them."""
    directory, state = RunDir(tmp_path), State({"prompt": torch.ones(2)})
    queries = {f"site-{i:03}": [400, 400] for i in range(500)}
    rounds = [Round(r, 500, 500, {}, 10, 20, 0.5, 0.25, queries=queries) for r in range(1, 101)]
    directory.save(state, 0, rounds, {})
    whole = (tmp_path / "checkpoint").read_bytes()
    assert int.from_bytes(whole[:8], "little") < 1000 < codec.HEADER_LIMIT < len(whole)
    back, _, back_rounds, _ = directory.load()
    assert small.same(back.arrays, state.arrays)
    assert back_rounds == rounds


def test_a_write_that_breaks_off_leaves_the_old_file(tmp_path, monkeypatch):
    directory = RunDir(tmp_path)
    directory.write("result.json", "old")
    crash_at(monkeypatch, 1)
    with pytest.raises(Killed):
        directory.write("result.json", "new")
    assert (tmp_path / "result.json").read_text() == "old"
    monkeypatch.undo()
    directory.write("result.json", "new")
    assert (tmp_path / "result.json").read_text() == "new"
    assert [file.name for file in tmp_path.iterdir()] == ["result.json"]


def test_a_file_is_on_the_disk_before_it_is_renamed_and_its_name_before_anything_else(tmp_path, monkeypatch):
    steps = to_the_disk(monkeypatch)
    RunDir(tmp_path / "new" / "folder").write("a", "text")
    assert steps == ["file", "-> a", "folder"]
    assert (tmp_path / "new" / "folder" / "a").read_text() == "text"


def test_a_folder_that_the_platform_cannot_open_or_flush_is_left_to_it(tmp_path, monkeypatch):
    opened, fsync = os.open, os.fsync

    def closed(path, *given):
        if Path(path).is_dir():
            raise PermissionError(errno.EACCES, "a folder")
        return opened(path, *given)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", closed)
        storage.atomic_write(tmp_path / "a", "text")
    code = errno.EINVAL

    def no_folder(number: int) -> None:
        if stat.S_ISDIR(os.fstat(number).st_mode):
            raise OSError(code, "a folder")
        fsync(number)

    monkeypatch.setattr(os, "fsync", no_folder)
    storage.atomic_write(tmp_path / "b", "text")
    assert {file.name for file in tmp_path.iterdir()} == {"a", "b"}
    code = errno.EIO
    with pytest.raises(OSError, match="a folder"):
        storage.atomic_write(tmp_path / "c", "text")


def test_clients_that_take_no_part_are_tried_at_the_end(tmp_path):
    text = small.toml(small.table(tmp_path / "table.csv"), "fpl")
    text = text.replace('kind = "column"\ncolumn = "site"', 'kind = "iid"\nnum_clients = 4')
    result = run_experiment(parse(text, "x", ["federation.unseen_clients=1"]), tmp_path / "run")
    assert result.num_clients == 3
    assert len(result.scores.per_client) == 3
    assert result.unseen_clients.global_prompt
    assert result.unseen_clients.assigned
    assert "Clients that took no part" in small.page(tmp_path)


def test_clients_of_test_records_alone_and_named_ones_take_no_part_and_are_served(tmp_path):
    table = pd.read_csv(small.table(tmp_path / "table.csv"))
    held = [site == "site-0" or place % 4 == 0 for place, site in enumerate(table["site"])]
    table["split"] = ["test" if one else "train" for one in held]
    table.to_csv(tmp_path / "table.csv", index=False)
    text = small.toml(tmp_path / "table.csv", "ficpd")
    changes = ["data.split_column=split", "federation.unseen=['site-1']"]
    result = run_experiment(parse(text, "x", changes), tmp_path / "run")
    assert result.num_clients == 1
    assert result.scores.per_client.keys() == {"site-2"}
    assert result.unseen_clients.assigned
    for names, said in (("['site-9']", "unknown client 'site-9'"), ("['site-1','site-2']", "no client takes part")):
        with pytest.raises(ConfigError, match=said):
            build_context(parse(text, "x", [changes[0], f"federation.unseen={names}"]))


def test_taking_everybody_out_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="unseen_clients = 3 of 3"):
        small.run(tmp_path, "fedavg", "federation.unseen_clients=3")


def test_a_personal_prompt_outlives_a_run_that_was_cut_off(tmp_path):
    """What a client keeps is on disk: a run that goes on ends as one that never stopped."""
    whole = small.run(tmp_path, "fpl", rounds=4)

    def cut(method: str, done: int, planned: int, figures: dict) -> None:
        if method == "fpl" and done == 2:
            raise KeyboardInterrupt

    experiment, out = small.experiment(tmp_path, "fpl", rounds=4), tmp_path / "cut"
    with pytest.raises(KeyboardInterrupt):
        run_experiment(experiment, out, progress=cut)
    again = run_experiment(experiment, out, resume=True)
    assert again.personalization == whole.personalization
    assert set(again.personalization) == {"personal", "global"}
    assert RunDir(out).load()[1] == 3
    assert "residual" in ClientStates(out, 4, 3).load("site-0")
