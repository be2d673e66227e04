"""The public API: `import ficpd`, and what its functions take and return."""

import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

import ficpd
import small
from ficpd.errors import ConfigError, DataError, LibraryError, RunError
from ficpd.library.library import PromptLibrary
from ficpd.library.session import LibrarySession
from ficpd.types import Record

COMPARISON = """
name = "two"
recipe = "small.toml"
seeds = [0]
[methods.fedavg]
[methods.fedprox]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A table, a recipe, and a finished run of it."""
    folder = tmp_path_factory.mktemp("api")
    small.table(folder / "records.csv")
    (folder / "small.toml").write_text(small.toml(folder / "records.csv", "fedavg", 2))
    ficpd.run(folder / "small.toml", folder / "run", changes=["method.name=ficpd", "method.num_prototypes=2"])
    return folder


@pytest.fixture(scope="module")
def library(folder) -> LibrarySession:
    return ficpd.load_library(folder / "run")


def test_importing_is_quick_and_loads_nothing_heavy():
    code = (
        "import sys, time; began = time.perf_counter(); import ficpd; took = time.perf_counter() - began\n"
        "heavy = [name for name in ('torch', 'pydantic', 'pandas', 'transformers') if name in sys.modules]\n"
        "assert {*ficpd.__all__} <= {*dir(ficpd)} and not heavy, heavy\n"
        "print(took)"
    )
    took = [float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
            for _ in range(3)]  # fmt: skip
    assert min(took) < 0.1


def test_every_public_name_is_there_and_no_other():
    for name in ficpd.__all__:
        assert getattr(ficpd, name).__name__ == name
    with pytest.raises(AttributeError, match="'runn'"):
        ficpd.runn  # noqa: B018
    assert (Path(ficpd.__file__).parent / "py.typed").exists()


def test_a_run_is_a_directory_and_a_table(folder):
    again = ficpd.run(folder / "small.toml", folder / "run", resume=True,
                      changes=["method.name=ficpd", "method.num_prototypes=2"])  # fmt: skip
    assert again.directory == folder / "run"
    assert len(repr(again)) < 200
    frame = again.to_frame()
    assert list(frame.index) == ["zero_shot", "ficpd"]
    assert frame.loc["ficpd", "accuracy_own"] == again.result.scores.per_client_mean["accuracy"]
    assert frame.loc["ficpd", "bytes_up"] > frame.loc["zero_shot", "bytes_up"] == 0


def test_a_run_takes_an_experiment_and_reports_progress(folder, tmp_path):
    rounds = []
    experiment = small.experiment(folder, "fedavg")
    changes = ["method.name=fedprox", "federation.num_rounds=1"]
    found = ficpd.run(experiment, tmp_path / "run", changes=changes, progress=lambda *event: rounds.append(event[1]))
    assert found.result.method == "fedprox"
    assert max(rounds) == 1
    assert "num_rounds = 1" in (tmp_path / "run" / "experiment.toml").read_text()


def test_a_run_without_a_directory_names_its_own(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = ficpd.run(folder / "small.toml", changes=["federation.num_rounds=0"])
    assert found.directory == Path("runs/small-fedavg-0")
    with pytest.raises(RunError, match="already holds a run"):
        ficpd.run(folder / "small.toml", changes=["federation.num_rounds=0"])


def test_a_run_among_real_sites_is_refused(folder, tmp_path):
    with pytest.raises(ConfigError, match=r"engine\.name"):
        ficpd.run(folder / "small.toml", tmp_path / "run", changes=["engine.name=flower"])
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_comparison_has_a_line_for_each_method(folder, tmp_path):
    (folder / "two.toml").write_text(COMPARISON)
    events = []
    found = ficpd.compare(folder / "two.toml", tmp_path / "two", jobs=1, progress=events.append)
    assert found.directory == tmp_path / "two"
    assert len(repr(found)) < 200
    assert set(found.to_frame()["method"]) == {"zero_shot", "local", "centralized", "fedavg", "fedprox"}
    assert found.to_frame()["mean"].notna().all()
    assert any(event.get("method") == "fedprox" for event in events)


def test_a_library_predicts_with_and_without_scores(library):
    texts = ["the film was lovely", "awful and grey"]
    labels = library.predict(texts)
    scores = library.predict(texts, scores=True)
    assert list(scores.columns) == ["label", *small.LABELS]
    assert list(scores["label"]) == labels == list(scores[list(small.LABELS)].idxmax(axis=1))
    assert scores[list(small.LABELS)].sum(axis=1).tolist() == pytest.approx([1, 1])
    assert library.predict(texts[0]) == labels[:1]
    assert library.predict([Record("a", {"text": texts[1]})]) == labels[1:]
    assert len(repr(library)) < 200


def test_scores_of_a_task_without_labels_are_refused(tmp_path):
    small.numbered(small.table(tmp_path / "records.csv"))
    (tmp_path / "small.toml").write_text(small.toml(tmp_path / "records.csv"))
    run = ficpd.run(tmp_path / "small.toml", tmp_path / "run", changes=[small.NUMBERS])
    library = ficpd.load_library(run.directory)
    assert isinstance(library.predict("a film")[0], float)
    with pytest.raises(LibraryError, match="scores"):
        library.predict("a film", scores=True)


def test_data_may_be_a_file_a_frame_or_records(library, folder):
    frame = pd.read_csv(folder / "records.csv")
    wanted = library.evaluate(folder / "records.csv")
    assert wanted.keys() == {"accuracy", "f1"}
    assert library.evaluate(frame) == wanted
    assert library.evaluate(frame.to_dict("records")) == wanted
    renamed = frame.rename(columns={"text": "review"})
    assert library.evaluate(renamed, columns={"text": "review"}) == wanted
    with pytest.raises(DataError, match=r"record 1: .*'text'"):
        library.evaluate(renamed)


def test_one_prompt_is_scored_as_beside_the_others(library, folder):
    every = library.evaluate_prompts(folder / "records.csv")
    assert list(every) == ["zero-shot", *library.library.prompts]
    for name in every:
        assert library.evaluate(folder / "records.csv", prompt=name) == every[name]
    with pytest.raises(LibraryError, match="globl"):
        library.evaluate(folder / "records.csv", prompt="globl")


def test_an_adapted_library_is_used_saved_and_loaded(library, folder, tmp_path):
    said = []
    few = pd.read_csv(folder / "records.csv").replace({"target": {"good": "happy", "bad": "sad"}})
    mine = library.adapt(few, shots=8, how="demonstrations", say=said.append)
    assert "a new task, own: which of happy, sad" in said
    assert "adapted" not in library.library.prompts
    mine.save(tmp_path / "mine")
    loaded = ficpd.load_library(tmp_path / "mine")
    texts = list(few["text"])
    assert loaded.predict(texts, scores=True).equals(mine.predict(texts, scores=True))
    assert set(mine.predict(texts)) <= {"happy", "sad"}
    with pytest.raises(LibraryError, match="exists already"):
        mine.save(tmp_path / "mine")
    with pytest.raises(LibraryError, match="task names a task of the library"):
        library.adapt(few, task="classification", labels={"a": "b"})


def test_a_library_opens_on_the_backbone_that_is_named(folder, tmp_path):
    library = PromptLibrary.load(folder / "run")
    card = {**library.card, "backbone": {**library.card["backbone"], "name": "elsewhere/tiny"}}
    PromptLibrary(library.start, library.prompts, card, library.keys).save(tmp_path / "moved")
    assert ficpd.load_library(tmp_path / "moved", backbone="tiny").predict("lovely")


def test_a_tiny_library_is_not_for_peft(library, tmp_path):
    with pytest.raises(LibraryError, match="PEFT"):
        library.export_peft(tmp_path / "peft")
