"""Trackers are sent what runs leave: every round once, and the end."""

import getpass
import json
import sys
import time
from pathlib import Path
from socket import gethostname
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

import small
from ficpd.errors import ConfigError, PackageError
from ficpd.experiments import tracking
from ficpd.experiments.runner import run
from ficpd.experiments.tracking import followed


class Noted:
    """A run at a tracker that notes what it is sent."""

    def __init__(self, params):
        self.params, self.points, self.closed = dict(params), [], False

    def send(self, tag: str, value: float, step: int) -> None:
        self.points.append((tag, value, step))

    def end(self) -> None:
        self.closed = True


@pytest.fixture
def noted(monkeypatch) -> dict[str, Noted]:
    """The runs at a tracker that stands for MLflow, by name."""
    runs: dict[str, Noted] = {}

    def begin(name: str, run: Path, settings):
        assert name not in runs, "begun twice"
        runs[name] = Noted(settings)
        return runs[name].send, runs[name].end

    monkeypatch.setitem(tracking.TRACKERS, "mlflow", lambda folder: begin)
    return runs


def test_every_round_is_sent_once_and_the_end_last(tmp_path, noted):
    given = small.experiment(tmp_path, "fedavg", "baselines=['local']", "federation.evaluate_records=0")
    seen = []
    with followed("mlflow", tmp_path / "run") as look:

        def progress(method: str, done: int, planned: int, figures: dict[str, float]) -> None:
            look()
            seen.append([step for tag, _, step in noted["run"].points if tag == "bytes_up"] if "run" in noted else [])

        result = run(given, tmp_path / "run", progress=progress)
        look()
        look()
    assert [1] in seen
    assert [1, 2] in seen
    assert set(noted) == {"run", "baselines/local", "baselines/zero_shot"}
    own = noted["run"]
    sent = [(value, step) for tag, value, step in own.points if tag == "bytes_up"]
    assert sent == [(result.bytes.up_total / 3, step) for step in (1, 2, 3)]
    assert ("dropped", 0, 1) in own.points
    assert [step for tag, _, step in own.points if tag == "own_accuracy"] == [1, 2, 3]
    assert own.points[-1][2] == 3
    assert ("global_accuracy", result.scores.global_prompt["accuracy"], 3) in own.points
    assert (own.params["method.name"], own.params["federation.num_rounds"]) == ("fedavg", "3")
    assert noted["baselines/local"].params["training.local_steps"] == "2"
    assert all(one.closed for one in noted.values())
    assert all(isinstance(value, int | float) for _, value, _ in own.points)


def test_a_run_that_was_finished_before_is_not_sent_again(tmp_path, noted):
    small.run(tmp_path, "fedavg", rounds=1)
    with followed("mlflow", tmp_path / "run"):
        pass
    assert noted == {}


def test_without_a_tracker_nothing_is_done(tmp_path):
    with followed(None, tmp_path) as look:
        look()


def test_an_unknown_tracker_and_a_missing_one_are_said(tmp_path, monkeypatch):
    unknown = "--track 'aim' is not known; write one of tensorboard, mlflow, wandb"
    with pytest.raises(ConfigError, match=unknown), followed("aim", tmp_path):
        pass
    for name, module in (("tensorboard", "torch.utils.tensorboard"), ("mlflow", "mlflow.tracking"), ("wandb", "wandb")):
        monkeypatch.delitem(sys.modules, module, raising=False)
        monkeypatch.setitem(sys.modules, name, None)
        missing = rf"--track {name} needs the package {name}, which is not installed.*ficpd\[track\]"
        with pytest.raises(PackageError, match=missing), followed(name, tmp_path):
            pass


def test_tensorboard_reads_what_was_sent(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with followed("tensorboard", tmp_path / "run") as look:
        result = small.run(tmp_path, "fedavg", "federation.evaluate_records=0")
        look()
    events = EventAccumulator(str(tmp_path / "run" / "track"))
    events.Reload()
    assert [event.step for event in events.Scalars("bytes_up")] == [1, 2, 3]
    last = events.Scalars("global_accuracy")[-1]
    assert (last.step, last.value) == (3, pytest.approx(result.scores.global_prompt["accuracy"]))
    (said,) = [event.tensor_proto.string_val[0].decode() for event in events.Tensors("settings/text_summary")]
    assert "| method.name | fedavg |" in said


class FakeClient:
    """`mlflow.tracking.MlflowClient` as its documentation has it: the calls that are made, and what it takes."""

    kept: dict[str, Any]

    def __init__(self, tracking_uri: str | None = None):
        FakeClient.kept = self.__dict__.setdefault("kept", {"experiments": {}, "runs": {}})

    def get_experiment_by_name(self, name: str) -> SimpleNamespace | None:
        id = self.kept["experiments"].get(name)
        return SimpleNamespace(experiment_id=id) if id else None

    def create_experiment(self, name: str) -> str:
        return self.kept["experiments"].setdefault(name, "7")

    def create_run(self, experiment_id: str, run_name: str) -> SimpleNamespace:
        self.kept["runs"][run_name] = {"params": {}, "metrics": [], "ended": False}
        return SimpleNamespace(info=SimpleNamespace(run_id=run_name))

    def log_param(self, run_id: str, key: str, value: str) -> None:
        assert len(value) <= 500
        self.kept["runs"][run_id]["params"][key] = value

    def log_metric(self, run_id: str, key: str, value: float, step: int) -> None:
        assert isinstance(value, float)
        assert all(sign.isalnum() or sign in "_-. /" for sign in key)
        self.kept["runs"][run_id]["metrics"].append((key, value, step))

    def set_terminated(self, run_id: str) -> None:
        self.kept["runs"][run_id]["ended"] = True


def test_mlflow_is_called_as_its_documentation_says(tmp_path, monkeypatch):
    module = ModuleType("mlflow.tracking")
    module.MlflowClient = FakeClient  # type: ignore[attr-defined]
    module.is_tracking_uri_set = lambda: True  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mlflow", ModuleType("mlflow"))
    monkeypatch.setitem(sys.modules, "mlflow.tracking", module)
    with followed("mlflow", tmp_path / "run"):
        small.run(tmp_path, "fedavg")
    kept = FakeClient.kept
    assert kept["experiments"] == {"ficpd run": "7"}
    assert set(kept["runs"]) == {"run", "baselines/zero_shot"}
    own = kept["runs"]["run"]
    assert own["ended"]
    assert own["params"]["method.name"] == "fedavg"
    assert [step for key, _, step in own["metrics"] if key == "bytes_up"] == [1, 2, 3]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # its own, of the libraries that it is made of
@pytest.mark.parametrize("address", ["mlflow.db", None])
def test_mlflow_itself_takes_it(tmp_path, monkeypatch, address):
    """Without an address the figures are in the run's folder, and nothing in the current one."""
    import mlflow

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    if address:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / address}")
    with followed("mlflow", tmp_path / "run"):
        small.run(tmp_path, "fedavg")
    assert not list(elsewhere.iterdir())
    assert (tmp_path / "run" / "track").exists() == (not address)
    client = mlflow.tracking.MlflowClient(f"sqlite:///{tmp_path / (address or 'run/track/mlflow.db')}")
    experiment = client.get_experiment_by_name("ficpd run")
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert runs["run"].info.status == "FINISHED"
    history = client.get_metric_history(runs["run"].info.run_id, "bytes_up")
    assert [metric.step for metric in history] == [1, 2, 3]


@pytest.fixture
def wandb(tmp_path, monkeypatch):
    """Weights & Biases without settings of the user, which are read when its service starts."""
    wandb = pytest.importorskip("wandb", reason="needs wandb of ficpd[track]")
    for name in ("WANDB_MODE", "WANDB_PROJECT", "WANDB_API_KEY", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    for name in ("CONFIG_DIR", "CACHE_DIR", "DATA_DIR"):
        monkeypatch.setenv(f"WANDB_{name}", str(tmp_path / "user"))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.chdir(tmp_path)
    wandb.teardown()
    yield wandb
    wandb.teardown()


def wandb_records(run: Path) -> list[Any]:
    """Reads the file of a run's directory that `wandb sync` sends. Its last record comes after the end of the run."""
    from wandb.proto.wandb_internal_pb2 import Record
    from wandb.sdk.internal.datastore import DataStore

    (file,) = (run / "track" / "wandb").glob("offline-run-*/*.wandb")
    found: list[Any] = []
    for _ in range(200):
        store, found = DataStore(), []
        store.open_for_scan(str(file))
        while (body := store.scan_data()) is not None:
            found.append(Record.FromString(body))
        store.close()
        if found and found[-1].WhichOneof("record_type") == "exit":
            break
        time.sleep(0.1)
    return found


def items_of(items: Any) -> dict[str, Any]:
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


@pytest.mark.slow
def test_wandb_itself_takes_it_without_a_network(tmp_path, wandb):
    with followed("wandb", tmp_path / "run") as look:
        result = small.run(tmp_path, "fedavg", "federation.evaluate_records=0")
        look()
    records = wandb_records(tmp_path / "run")
    (began,) = [record.run for record in records if record.WhichOneof("record_type") == "run"]
    assert (began.display_name, began.project, began.host) == ("run", "ficpd-run", "")
    assert items_of(began.config.update)["method.name"] == "fedavg"
    rounds = [items_of(record.history.item) for record in records if record.WhichOneof("record_type") == "history"]
    assert [(one["_step"], one["bytes_up"]) for one in rounds] == [(n, result.bytes.up_total / 3) for n in (1, 2, 3)]
    assert rounds[-1]["global_accuracy"] == result.scores.global_prompt["accuracy"]
    assert records[-1].WhichOneof("record_type") == "exit"
    assert wandb_records(tmp_path / "run" / "baselines" / "zero_shot")[-1].WhichOneof("record_type") == "exit"
    kinds = {record.WhichOneof("record_type") for record in records}
    assert kinds <= {"header", "run", "telemetry", "summary", "history", "exit"}  # no files, output, statistics
    assert not list((tmp_path / "run" / "track" / "wandb").glob("offline-run-*/files/*"))
    rest = "".join(str(record) for record in records if record.WhichOneof("record_type") not in ("run", "history"))
    assert not [word for word in (gethostname(), getpass.getuser(), str(tmp_path)) if f'"{word}' in rest]


@pytest.mark.parametrize(("env", "file", "mode"), [
    ({}, "", "offline"),
    ({"WANDB_API_KEY": "0" * 40}, "", "offline"),
    ({"WANDB_MODE": "online"}, "", "online"),
    ({"WANDB_MODE": "disabled"}, "mode = online", "disabled"),
    ({}, "mode = online", "online"),
])  # fmt: skip
def test_wandb_sends_only_if_the_users_settings_say_so(tmp_path, monkeypatch, wandb, env, file, mode):
    (tmp_path / "user").mkdir()
    (tmp_path / "user" / "settings").write_text(f"[default]\nproject = ours\n{file}\n")
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    began, logins = [], []
    monkeypatch.setattr(wandb, "init", lambda **given: began.append(given))
    monkeypatch.setattr(wandb, "login", lambda: logins.append(True))
    begin = tracking.TRACKERS["wandb"](tmp_path)
    with pytest.raises(AttributeError, match="finish"):
        begin("run", tmp_path, {"seed": "1"})
    assert [(given["settings"].mode, given["project"]) for given in began] == [(mode, "ours")]
    assert len(logins) == (mode == "online")


def test_wandb_without_a_login_is_an_error_before_the_run(tmp_path, monkeypatch, wandb):
    monkeypatch.setenv("WANDB_MODE", "online")
    with pytest.raises(ConfigError, match=r"--track wandb cannot begin: .*(key|log)"), followed("wandb", tmp_path):
        pass


def test_settings_are_of_the_run_beside_which_a_baseline_stands(tmp_path):
    (tmp_path / "baselines" / "local").mkdir(parents=True)
    text = "seed = 3\ndp = true\n[method]\nname = 'ficpd'\n[method.contrast]\nweight = 0.1\n"
    (tmp_path / "resolved.toml").write_text(text)
    assert tracking.settings_of(tmp_path / "baselines" / "local") == {
        "seed": "3", "dp": "True", "method.name": "ficpd", "method.contrast.weight": "0.1",
    }  # fmt: skip
    assert tracking.settings_of(tmp_path / "a" / "b" / "c" / "d") == {}


def test_a_tracker_that_fails_does_not_stop_a_run(tmp_path, monkeypatch):
    def begin(name: str, run: Path, settings):
        def send(tag: str, value: float, step: int) -> None:
            raise ConnectionError("the server is gone")

        return send, lambda: None

    monkeypatch.setitem(tracking.TRACKERS, "mlflow", lambda folder: begin)

    def tracked() -> None:
        with followed("mlflow", tmp_path / "run") as look:
            small.run(tmp_path, "fedavg")
            look()
            look()

    with pytest.warns(UserWarning, match="the server is gone; nothing more is sent, and the run goes on") as said:
        tracked()
    assert len(said) == 1


def test_a_tracker_that_cannot_begin_is_an_error_before_the_run(tmp_path, monkeypatch):
    def refuses(folder: Path) -> None:
        raise OSError("no such server")

    monkeypatch.setitem(tracking.TRACKERS, "mlflow", refuses)
    with pytest.raises(ConfigError, match="--track mlflow cannot begin: no such server"), followed("mlflow", tmp_path):
        pass
