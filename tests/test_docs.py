"""The program takes what the pages tell a reader to write, and the pages name what exists."""

import inspect
import re
import sys
import tomllib
from inspect import get_annotations
from pathlib import Path
from pkgutil import resolve_name

import pytest
import tomli_w

import ficpd
from ficpd import cli
from ficpd.experiments import config
from ficpd.experiments.comparison.grid import expand
from ficpd.privacy.noise import SeededNoise

ROOT = Path(__file__).parent.parent
BLOCKS = [
    pytest.param(page, block, id=f"{page.stem}-{number}")
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("[!a]*.md")))
    for number, block in enumerate(re.findall(r"```toml\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL))
]
ADDING = {page.stem: page.read_text(encoding="utf-8") for page in (ROOT / "docs").glob("add_a_*.md")}
TOUR = [
    "quickstart", "-q", "-s", 'backbone={name="tiny",dtype="float32"}', "-s", "method.name=fedavg", "-s", "baselines=[]",
    "-s", 'partition={kind="iid",num_clients=3}', "-s", "data.max_records=400", "-s", "federation.num_rounds=1",
    "-s", "privacy.name=record_gaussian", "-s", "privacy.epsilon=2", "-s", "compression.name=none",
    "-s", "training.optimizer=adam",
]  # fmt: skip
PAGES = [
    *sorted(str(file.relative_to(ROOT)) for file in (ROOT / "docs").glob("*.md")),
    "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "bench/README.md",
]  # fmt: skip
FILES = re.compile(r"```(?:python|toml)\n# (\S+)\n(.*?)```", re.DOTALL)
NAMED = re.compile(r"`src/ficpd/([\w/-]+)\.py`:\s+`([\w.]+)`")


def test_the_pages_have_recipes():
    assert len(BLOCKS) > 6


@pytest.mark.parametrize(("page", "block"), BLOCKS)
def test_a_recipe_of_the_pages_can_be_read(page, block, tmp_path):
    """Alone if it says what the task is and who holds the data; else its parts in the place of the quick start's."""
    tree, quick = tomllib.loads(block), config.read_recipe(config.QUICKSTART)[0]
    if page.stem == "compare":
        (tmp_path / "abstracts.toml").write_text(quick, encoding="utf-8")
        assert expand(block, page.name, beside=tmp_path).cells
        return
    if not ({"task", "data", "partition"} <= tree.keys() or "groups" in tree):
        block = tomli_w.dumps({**tomllib.loads(quick), **tree})
    assert config.parse(block, page.name)


@pytest.mark.parametrize("page", sorted(ADDING))
def test_the_example_of_a_page_runs_and_is_short(page, tmp_path, monkeypatch):
    files = dict(FILES.findall(ADDING[page]))
    for module in [name for name in sys.modules if name.partition(".")[0] == "mylab"]:
        monkeypatch.delitem(sys.modules, module)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    for recipe in (name for name in files if name.endswith(".toml")):
        run = ficpd.run(tmp_path / recipe, tmp_path / recipe.removesuffix(".toml"))
        assert {"local", "linear_probe", "zero_shot"} < set(run.to_frame().index)
        assert set(re.findall(r"mylab\.\w+", files[recipe])) <= sys.modules.keys()
        if "[metrics" in files[recipe] or "metrics =" in files[recipe]:
            assert "kappa_own" in run.to_frame()
    assert max(len([line for line in text.splitlines() if line]) for text in files.values()) < 40


@pytest.mark.parametrize("page", PAGES)
def test_every_link_of_a_page_leads_to_a_file(page):
    links = re.findall(r"\]\(((?!https?:|mailto:)[^)#\s]+)", (ROOT / page).read_text(encoding="utf-8"))
    assert [link for link in links if not (ROOT / page).parent.joinpath(link).exists()] == []


def test_every_step_of_the_tour_is_there():
    steps = NAMED.findall((ROOT / "docs/tour_of_the_code.md").read_text(encoding="utf-8"))
    assert len(steps) > 20
    for file, name in steps:
        assert callable(resolve_name(f"ficpd.{file.replace('/', '.')}:{name}"))


def test_the_tour_names_every_call_from_the_command_to_the_noise(tmp_path, monkeypatch):
    """By the stack at the call that adds noise to a record's gradient: ten calls from the command."""
    package, stacks, own = f"{Path(ficpd.__file__).parent}/", [], SeededNoise.add_gaussian

    def add_gaussian(*given):
        codes = [frame.frame.f_code for frame in reversed(inspect.stack())]
        stacks.append([code for code in codes if code.co_filename.startswith(package)])
        return own(*given)

    monkeypatch.setattr(SeededNoise, "add_gaussian", add_gaussian)
    monkeypatch.setattr(sys, "argv", ["ficpd", "run", *TOUR, "--out", str(tmp_path / "run")])
    with pytest.raises(SystemExit, match="0"):
        cli.main()
    _, *calls = [(code.co_filename.removeprefix(package), code.co_qualname) for code in stacks[0]]
    assert calls[0] == ("cli/run.py", "run")
    assert len(calls) - 1 <= 10
    tour = (ROOT / "docs/tour_of_the_code.md").read_text(encoding="utf-8")
    assert set(calls) <= {(f"{file}.py", name) for file, name in NAMED.findall(tour)}


def test_every_word_of_the_glossary_is_there():
    lines = re.findall(r"^\| [^`|]+ \| .+ \| (`.+`) \|$", (ROOT / "docs/glossary.md").read_text("utf-8"), re.MULTILINE)
    assert len(lines) >= 40
    for name in (name for line in lines for name in re.findall(r"`([\w.]+)`", line)):
        owner, _, last = f"ficpd.{name}".rpartition(".")
        assert last in get_annotations(resolve_name(owner)) or resolve_name(f"ficpd.{name}")


@pytest.mark.parametrize("page", ["glossary", "tour_of_the_code", *sorted(ADDING)])
def test_the_readme_links_the_page(page):
    assert f"docs/{page}.md" in (ROOT / "README.md").read_text(encoding="utf-8")
