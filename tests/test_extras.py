"""The core runs without the packages of the extras; what needs one names it in one sentence with the command."""

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import ficpd
import small
from ficpd import registry

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CORE, EXTRAS = PROJECT["dependencies"], PROJECT["optional-dependencies"]
MODULES = {"pillow": "PIL", "mlflow-skinny": "mlflow"}
"""The module of a package, where it has another name."""
PROGRAM = """
import contextlib, importlib.machinery, io, json, sys
class Core(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, *rest):
        return None if name.partition(".")[0] in BLOCKED else super().find_spec(name, *rest)
sys.meta_path = [Core if finder is importlib.machinery.PathFinder else finder for finder in sys.meta_path]
from ficpd import cli
for words in CALLS:
    out, err, status = io.StringIO(), io.StringIO(), 0
    sys.argv = ["ficpd", *words]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            cli.main()
    except SystemExit as end:
        status = int(end.code or 0)
    print(json.dumps([status, out.getvalue(), err.getvalue()]))
"""


def requirements(*extras: str) -> list[str]:
    """What these extras install, with the extras of this package that they name."""
    named = [one for extra in extras for one in EXTRAS[extra]]
    inner = [extra for one in named if Requirement(one).name == "ficpd" for extra in Requirement(one).extras]
    return [one for one in named if Requirement(one).name != "ficpd"] + (requirements(*inner) if inner else [])


def packages(*extras: str) -> set[str]:
    """The modules that these extras bring."""
    return {MODULES.get(name, name) for name in (Requirement(one).name for one in requirements(*extras))}


HEAVY = packages(*(name for name in EXTRAS if name not in ("dev", "quantized")))


def call(*calls: tuple[object, ...]) -> list[tuple[int, str, str]]:
    """Runs commands in a process without the packages of all extras: of each its status, output and errors."""
    given = json.dumps([[str(word) for word in words] for words in calls])
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    code = f"BLOCKED = {sorted(HEAVY)}\nCALLS = {given}\n{PROGRAM}"
    how = {"capture_output": True, "text": True, "env": env, "timeout": 300}
    done = subprocess.run([sys.executable, "-c", code], check=False, **how)
    assert done.returncode == 0, done.stderr
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A private run of the core alone."""
    folder = tmp_path_factory.mktemp("core")
    private = '[privacy]\nname = "record_gaussian"\nepsilon = 4.0\ndelta = 1e-3\n'
    (folder / "small.toml").write_text(small.toml(small.table(folder / "records.csv"), "ficpd", 1) + private)
    ((status, _, err),) = call(("run", folder / "small.toml", "--out", folder / "run"))
    assert status == 0, err
    assert "pip install 'ficpd[report]'; then run: ficpd report" in err
    return folder


def test_the_heavy_packages_are_those_of_extras():
    assert {
        "plotly", "pandas", "pyarrow", "datasets", "opendp", "sacrebleu", "fairlearn", "peft", "PIL", "flwr",
    } <= HEAVY  # fmt: skip
    assert not {MODULES.get(name, name) for name in (Requirement(one).name for one in CORE)} & HEAVY


def test_each_command_that_is_named_installs_an_extra_of_the_package():
    sources = [file.read_text(encoding="utf-8") for file in Path(ficpd.__file__).parent.rglob("*.py")]
    named = {extra for text in sources for extra in re.findall(r'needs\([^()]*"([\w-]+)"\)', text)}
    assert {"report", "hub", "secure-noise"} < named <= set(EXTRAS)
    assert set(registry.EXTRAS.values()) <= set(EXTRAS)


def test_the_constraints_pin_what_make_installs_beside_torch():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    pinned = {canonicalize_name(name): version for name, version in pins.items()}
    assert "torch" not in pinned
    assert all(re.fullmatch(r"[\w.!]+", version) for version in pins.values())
    for one in map(Requirement, [*CORE, *requirements("dev")]):
        if one.name != "torch":
            assert pinned[canonicalize_name(one.name)] in one.specifier, one


def test_dev_installs_every_package_that_the_quick_suite_needs():
    assert packages("dev") >= HEAVY - {"matplotlib"}


def test_the_tour_lists_the_extras():
    table = (ROOT / "docs/tour.md").read_text(encoding="utf-8").partition("## Install less")[2].partition("\n## ")[0]
    lines = re.findall(r"^\|(.*?)\|", table, re.MULTILINE)
    named = {word for line in lines for word in re.findall(r"`([\w-]+)`", line)}
    assert named == set(EXTRAS) - {"bench", "dev"}


@pytest.mark.slow
def test_a_run_of_the_core_is_whole(folder):
    page = (folder / "run" / "report.html").read_text(encoding="utf-8")
    assert "ficpd[report]" in page
    assert json.loads((folder / "run" / "result.json").read_text())["privacy"]["epsilon"] <= 4.0
    ((_, told, _),) = call(("info", folder / "run", "--json"))
    assert json.loads(told)["finished"]


@pytest.mark.slow
def test_the_core_predicts_evaluates_and_adapts(folder):
    data = folder / "records.csv"
    for status, _, err in call(
        ("predict", folder / "run", "--data", data, "--out", folder / "answers.csv"),
        ("evaluate", folder / "run", "--data", data),
        ("adapt", folder / "run", "--data", data, "--how", "tune", "--shots", "8", "--out", folder / "mine"),
    ):
        assert status == 0, err
    heads, *lines = (folder / "answers.csv").read_text().splitlines()
    assert heads.endswith("prediction,score_good,score_bad")
    assert len(lines) == len(data.read_text().splitlines()) - 1


MISSING = [
    (("report", "RUN"), "report"),
    (("compare", "quick", "--out", "NEW"), "report"),
    (("predict", "RUN", "fine", "--out", "NEW.parquet"), "parquet"),
    (("predict", "RUN", "--data", "empty.parquet"), "parquet"),
    (("serve", "RUN"), "serve"),
    (("run", "RECIPE", "-q", "--out", "NEW", "--set", "data.source=hf:some/thing"), "hub"),
    (("run", "RECIPE", "-q", "--out", "NEW", "--set", 'privacy.noise="cryptographic"'), "secure-noise"),
    (("run", "RECIPE", "-q", "--out", "NEW", "--set", 'task={name="generation"}'), "generation"),
    (("run", "RECIPE", "-q", "--out", "NEW", "--set", 'fairness.group="site"'), "fairness"),
    (("run", "RECIPE", "-q", "--out", "NEW", "--set", "data.source=pictures"), "images"),
    (("run", "RECIPE", "-q", "--out", "NEW", "--engine", "flower"), "flower"),
    (("run", "RECIPE", "-q", "--out", "NEW", "--engine", "ray"), "ray"),
    (("run", "RECIPE", "-q", "--out", "NEW", "--track", "tensorboard"), "track"),
]


@pytest.mark.slow
def test_what_is_missing_is_one_sentence_with_the_command(folder, tmp_path):
    (tmp_path / "empty.parquet").write_bytes(b"")
    (tmp_path / "pictures.csv").write_text("text,target,site,image\n" + "a,good,x,a.png\nb,bad,x,a.png\n" * 4)
    columns = 'columns={text="text",target="target",client="site",image="image"}'
    image = f'{{source="{tmp_path / "pictures.csv"}",{columns}}}'
    places = {"RUN": folder / "run", "RECIPE": folder / "small.toml", "empty.parquet": tmp_path / "empty.parquet"}
    places |= {"data.source=pictures": f"data={image}"}
    calls = [
        tuple(places.get(word, str(word).replace("NEW", str(tmp_path / f"new{place}"))) for word in words)
        for place, (words, _) in enumerate(MISSING)
    ]
    for (words, extra), (status, _, err) in zip(MISSING, call(*calls), strict=True):
        assert status == 1, words
        told = rf"error: .* needs the package \w+, which is not installed: pip install 'ficpd\[{extra}\]'\n"
        assert re.fullmatch(told, err), (words, err)
