"""`ficpd init` on images: in folders by label, as paths in a table, as bytes in Parquet and `save_to_disk`."""

import tomllib
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pytest
from PIL import Image

import sights
from ficpd.errors import ConfigError, DataError
from ficpd.experiments.draft import draft
from ficpd.experiments.results import RunResult

NONE = dict.fromkeys(("text", "image", "target", "client", "subject"))
LABELS = {"cat": 200, "dog": 40}


@pytest.fixture
def images(tmp_path, monkeypatch) -> list[dict[str, str]]:
    """Rows with the paths of 60 images under `images`, in a folder for each label; at two hospitals."""
    monkeypatch.chdir(tmp_path)
    rows = []
    for place in range(60):
        label = list(LABELS)[place % 2]
        path = Path("images", label, f"{place}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), LABELS[label] + place % 7, "uint8")).save(path)
        rows.append({"note": f"note {place}", "scan": str(path), "kind": label, "hospital": f"h{place % 3}"})
    return rows


def stored(rows: list[dict[str, str]]) -> datasets.Dataset:
    """The rows with the images' bytes, as `datasets` keeps them."""
    kind = datasets.ClassLabel(names=list(LABELS))
    features = datasets.Features({"note": datasets.Value("string"), "scan": datasets.Image(), "kind": kind})
    cells = [{**row, "scan": {"bytes": Path(row["scan"]).read_bytes(), "path": None}} for row in rows]
    return datasets.Dataset.from_list([{key: row[key] for key in features} for row in cells], features=features)


def written(rows: list[dict[str, str]], source: str) -> str:
    if source == "a.csv":
        pd.DataFrame(rows).to_csv(source, index=False)
    elif source == "a.parquet":
        stored(rows).to_parquet(source)
    elif source == "saved":
        stored(rows).save_to_disk(source)
    return source


def test_the_recipe_of_a_folder_runs(ficpd, images, tmp_path):
    status, out, err = ficpd("init", "images")
    assert status == 0
    assert "2 labels: 'cat' (30), 'dog' (30)" in out
    assert "60 records are few" in err
    text = Path("images.toml").read_text(encoding="utf-8")
    recipe = tomllib.loads(text)
    assert text.count("# 30 records") == 2
    assert recipe["backbone"]["name"] == "facebook/dinov2-small"
    assert recipe["task"] == {
        "name": "classification", "tuned_head": True, "instruction": "a photo of", "labels": {"cat": "cat", "dog": "dog"},
    }  # fmt: skip
    assert recipe["data"]["columns"] == {"image": "image", "target": "target"}
    (tmp_path / "model").mkdir()
    sights.write_vit(tmp_path / "model")
    changes = ("-s", "backbone.name=model", "-s", "federation.num_rounds=1", "-s", "baselines=[]")
    assert ficpd("run", "images.toml", "--out", "run", *changes)[0] == 0
    assert RunResult.load(Path("run")).num_clients == 5


@pytest.mark.parametrize("source", ["a.csv", "a.parquet", "saved"])
def test_a_column_of_images_is_seen(images, source):
    found = draft(written(images, source), "a.toml", NONE)
    recipe = tomllib.loads(found.toml)
    columns = {"image": "scan", "target": "kind"} | ({"client": "hospital"} if source == "a.csv" else {})
    assert recipe["data"]["columns"] == columns
    assert recipe["task"]["labels"] == {"cat": "cat", "dog": "dog"}
    assert "image is column 'scan', a guess (--image or --text names another)" in found.found
    assert found.warnings == ["60 records are few: scores on a fifth of them have wide intervals"]


@pytest.mark.parametrize("source", ["a.csv", "a.parquet"])
def test_texts_beside_images_are_read_where_they_are_named(images, source):
    recipe = tomllib.loads(draft(written(images, source), "a.toml", {**NONE, "text": "note"}).toml)
    assert recipe["backbone"]["name"] == "minilm"
    assert (recipe["data"]["columns"]["text"], "image" in recipe["data"]["columns"]) == ("note", False)
    with pytest.raises(DataError, match=r"--image = scan: expected one of --text and --image"):
        draft(source, "a.toml", {**NONE, "text": "note", "image": "scan"})


def test_folders_of_train_and_test_are_the_split(images):
    Path("set").mkdir()
    Path("images").rename("set/train")
    for label in LABELS:
        Path("set/test", label).mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(Path("set/test", label, "a.png"))
    found = draft("set", "set.toml", NONE)
    assert "train has 60 records, test 2" in found.found
    assert "test_fraction" not in tomllib.loads(found.toml)["data"]


def test_numbers_of_images_become_a_regression_with_a_head(images):
    pd.DataFrame([{**row, "age": 20 + place / 7} for place, row in enumerate(images)]).to_csv("a.csv", index=False)
    task = tomllib.loads(draft("a.csv", "a.toml", {**NONE, "target": "age"}).toml)["task"]
    assert (task["name"], task["tuned_head"], min(task["anchors"].values())) == ("regression", True, 20.0)


def test_what_is_no_set_of_images_is_refused(images):
    with pytest.raises(ConfigError, match=r"--backbone = minilm: it reads texts.*--backbone facebook/dinov2-small"):
        draft("images", "a.toml", NONE, backbone="minilm")
    with pytest.raises(DataError, match=r"images without labels; expected a folder for each label"):
        draft("images/cat", "a.toml", NONE)
    Path("empty").mkdir()
    with pytest.raises(DataError, match=r"folder empty holds no file ending in \.csv"):
        draft("empty", "a.toml", NONE)


def test_it_warns_of_an_image_that_is_missing_or_damaged(images):
    Path(images[4]["scan"]).write_bytes(b"no image")
    assert "as it is, the run stops: images row" in "\n".join(draft("images", "a.toml", NONE).warnings)
    pd.DataFrame([{**images[0], "scan": ""}, *images[1:]]).to_csv("a.csv", index=False)
    assert "rows without an image (column 'scan'): 1" in "\n".join(draft("a.csv", "a.toml", NONE).warnings)
