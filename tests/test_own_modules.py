"""Modules outside the package, found by their dotted names from the recipe's folder and the current folder."""

import subprocess
import sys
from pathlib import Path

import pytest

import ficpd
import small
from ficpd.errors import ConfigError, DataError

COMMANDS = {"ficpd": [str(Path(sys.executable).with_name("ficpd"))], "python -m ficpd": [sys.executable, "-m", "ficpd"]}
METHOD = """
from ficpd.methods.fedavg import Config, FedAvg
from mylab.helper import NAME

class Own(FedAvg):
    name = NAME

    def local_update(self, client, assignment):
        from mylab import late  # after the search
        return super().local_update(client, assignment)

def build(config, training):
    return Own(training, config.robust)
"""
TASK = """
from ficpd.tasks.classification import Classification, Config

def build(config):
    return Classification(config)
"""
METRIC = """
from ficpd.registry import FrozenConfig

class Config(FrozenConfig):
    label: str = "good"

def build(config):
    return lambda predictions, targets: {"share_" + config.label: predictions.count(config.label) / len(predictions)}
"""
PARTITION = """
from ficpd.registry import FrozenConfig
from ficpd.types import ClientData

class Config(FrozenConfig):
    clients: int = 2
    forget: bool = False

def build(config):
    def divide(data, seed):
        n, train = config.clients, data.train[config.forget:]
        return {f"part-{i}": ClientData(train[i::n], data.test[i::n], {}) for i in range(n)}
    return divide
"""
SOURCE = """
from ficpd.registry import FrozenConfig

class Config(FrozenConfig):
    rows: int = 40

def build(config):
    for place in range(config.rows):
        good = place % 2
        yield {"text": f"{'lovely' if good else 'dull'} film {place}", "target": "good" if good else "bad"}
"""
ALL = """
name = "own"
baselines = []
method = { name = "mylab.method" }
metrics = [{ name = "mylab.metric", label = "bad" }]
backbone = { name = "tiny" }
task = { name = "mylab.task", labels = { good = "good fine", bad = "bad dull" } }
data = { source = "mylab.source", source_options = { rows = 60 } }
partition = { kind = "mylab.partition", options = { clients = 3 } }
federation = { num_rounds = 1 }
"""


@pytest.fixture
def lab(tmp_path) -> Path:
    """A folder with a package of own modules and a recipe that uses all of them."""
    package = tmp_path / "lab" / "mylab"
    package.mkdir(parents=True)
    files = {"method": METHOD, "task": TASK, "metric": METRIC, "partition": PARTITION, "source": SOURCE,
             "helper": "NAME = 'own_fedavg'\n", "late": ""}  # fmt: skip
    for name, text in files.items():
        (package / f"{name}.py").write_text(text)
    (package.parent / "own.toml").write_text(ALL)
    return package.parent


def command(kind: str, *words: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMANDS[kind], *map(str, words)], cwd=cwd, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("kind", COMMANDS)
@pytest.mark.parametrize("place", ["recipe's folder", "current folder"])
def test_a_command_finds_own_modules(lab, tmp_path, kind, place):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    recipe, cwd = lab / "own.toml", elsewhere
    if place == "current folder":
        recipe, cwd = (lab / "own.toml").rename(elsewhere / "own.toml"), lab
    done = command(kind, "run", recipe, "--out", tmp_path / "run", cwd=cwd)
    assert done.returncode == 0, done.stderr
    assert "own_fedavg" in done.stdout
    result = (tmp_path / "run" / "result.json").read_text()
    for words in ("share_bad", "part-2"):
        assert words in result


@pytest.mark.slow
def test_workers_of_a_comparison_find_own_modules(lab, tmp_path):
    text = 'name = "two"\nrecipe = "own.toml"\nseeds = [0]\n[methods.own]\nmethod.name = "mylab.method"\n'
    (lab / "two.toml").write_text(text)
    done = command("ficpd", "compare", lab / "two.toml", "--out", tmp_path / "two", "--jobs", 1, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_a_package_of_the_same_name_elsewhere_does_not_hide_it(lab, tmp_path, monkeypatch):
    (tmp_path / "other" / "mylab").mkdir(parents=True)
    (tmp_path / "other" / "mylab" / "__init__.py").touch()
    (lab / "mylab" / "__init__.py").touch()
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'other'}:{Path(ficpd.__file__).parents[1]}")
    done = command("ficpd", "run", lab / "own.toml", "--out", tmp_path / "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("change", "words"), [
    ("method.name=nolab.method", "method 'nolab.method': No module named 'nolab'"),
    ("method.name=mylab.nomethod", "No module named 'mylab.nomethod'"),
    ("method.name=mylab.helper", "does not define `Config`"),
    ("metrics=[{name='kappa'}]", "metric 'kappa': expected the dotted name"),
    ("metrics=[{name='mylab.metric', lable='x'}]", "unknown key 'lable'; did you mean 'label'"),
    ("data.source=nolab.source", "source 'nolab.source': No module named 'nolab'"),
    ("data.source_options.row=1", "data.source_options: unknown key 'row'; did you mean 'rows'"),
    ("partition.kind=column_dirichlett", "did you mean 'column_dirichlet'"),
    ("partition.kind=mylab.nopartition", "partition 'mylab.nopartition'"),
    ("partition.options.clientz=3", "partition.options: unknown key 'clientz'"),
])  # fmt: skip
def test_a_mistake_names_the_setting(lab, tmp_path, change, words):
    with pytest.raises(ConfigError) as error:
        ficpd.run(lab / "own.toml", tmp_path / "run", changes=[change])
    assert words in str(error.value)


def test_a_partition_that_loses_a_record_is_refused(lab, tmp_path):
    with pytest.raises(DataError, match=r"every train record at exactly one client; 47 were dealt, 48 were given"):
        ficpd.run(lab / "own.toml", tmp_path / "run", changes=["partition.options.forget=true"])


def test_options_are_for_own_partitions_only(tmp_path):
    small.table(tmp_path / "records.csv")
    (tmp_path / "small.toml").write_text(small.toml(tmp_path / "records.csv"))
    with pytest.raises(ConfigError, match="options are for a dotted name"):
        ficpd.run(tmp_path / "small.toml", tmp_path / "run", changes=["partition.options.clients=3"])
