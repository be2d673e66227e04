"""Images from paths, folders, Parquet and the hub; what is no image, and what all come out as."""

import io
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ficpd.data import images
from ficpd.data.images import LazyImage
from ficpd.data.loading import Config, load, load_all
from ficpd.errors import DataError

COLUMNS = {"image": "image", "target": "target"}


def drawn(number: int, mode: str = "RGB", size: tuple[int, int] = (6, 5)) -> Image.Image:
    values = np.random.default_rng(number).integers(256, size=(size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(values).convert(mode)


def encoded(number: int) -> bytes:
    stream = io.BytesIO()
    drawn(number).save(stream, "PNG")
    return stream.getvalue()


def same(record, number: int) -> bool:
    found = record.fields["image"].open()
    return found.mode == "RGB" and found.tobytes() == drawn(number).tobytes()


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_paths_are_seen_from_the_tables_folder(tmp_path, kind):
    (tmp_path / "in here").mkdir()
    for i in range(4):
        drawn(i).save(tmp_path / "in here" / f"{i}.png")
    places = [f"in here/{i}.png" for i in range(3)] + [str(tmp_path / "in here" / "3.png")]
    frame, file = pd.DataFrame({"photo": places, "target": list("abab")}), tmp_path / f"table.{kind}"
    {
        "csv": lambda: frame.to_csv(file, index=False),
        "jsonl": lambda: frame.to_json(file, orient="records", lines=True),
        "parquet": lambda: frame.to_parquet(file),
    }[kind]()
    records = load_all(Config(source=str(file), columns={"image": "photo", "target": "target"}))
    assert [record.fields["target"] for record in records] == list("abab")
    assert all(same(record, i) for i, record in enumerate(records))
    assert str(records[1].fields["image"]) == str(tmp_path / "in here" / "1.png")


@pytest.mark.parametrize("hub", [False, True])
def test_bytes_stay_in_the_parquet_file(tmp_path, hub, monkeypatch):
    """A row group is read when one of its images is asked for, and of those as many are kept as the limit says."""
    cells = [{"bytes": encoded(i), "path": None} if hub else encoded(i) for i in range(9)]
    table = pa.table({"image": cells, "target": [str(i % 2) for i in range(9)]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    monkeypatch.setattr(images, "_groups", images._Groups(1000))
    records = load_all(Config(source=str(tmp_path / "a.parquet"), columns=COLUMNS))
    assert len(images._groups.kept) < 5
    assert all(same(records[i], i) for i in (8, 0, 5, 3, 1, 7, 2, 6, 4, 8))
    assert sum(values.nbytes for values in images._groups.kept.values()) <= 1000
    assert "PNG" not in repr(records) + str(records[0].fields["image"])


def test_a_file_of_nothing_but_images_is_read(tmp_path):
    pq.write_table(pa.table({"image": [encoded(0), encoded(1)]}), tmp_path / "a.parquet")
    records = load_all(Config(source=str(tmp_path / "a.parquet"), columns={"image": "image"}))
    assert [same(record, i) for i, record in enumerate(records)] == [True, True]


def folders(place: Path, labels: str = "ab", number: int = 3) -> Path:
    for label in labels:
        (place / label).mkdir(parents=True)
        for i in range(number):
            drawn(i).save(place / label / f"{i}.png")
    (place / "README.md").write_text("about them")
    (place / ".hidden").mkdir()
    return place


def test_a_folder_for_each_label(tmp_path):
    records = load_all(Config(source=str(folders(tmp_path / "set")), columns=COLUMNS))
    assert [record.fields["target"] for record in records] == list("aaabbb")
    assert [record.key for record in records] == [f"set row {i}" for i in range(1, 7)]
    assert all(same(record, i % 3) for i, record in enumerate(records))


def test_train_and_test_above_the_labels_are_the_split(tmp_path):
    for side, number in (("train", 3), ("test", 2), ("val", 1)):
        folders(tmp_path / side, number=number)
    found = load(Config(source=str(tmp_path), columns=COLUMNS), 0)
    assert (len(found.train), len(found.test)) == (6, 4)


def test_images_without_labels_are_read_to_be_predicted(tmp_path):
    drawn(0).save(tmp_path / "a.png")
    (record,) = load_all(Config(source=str(tmp_path), columns={"image": "image"}))
    assert same(record, 0)


@pytest.mark.parametrize("plain", [False, True])
def test_the_hubs_images_stay_encoded(monkeypatch, plain):
    kind = datasets.Value("binary") if plain else datasets.Image()
    features = datasets.Features({"image": kind, "label": datasets.ClassLabel(names=["no", "yes"])})
    cells = [encoded(i) if plain else {"bytes": encoded(i), "path": None} for i in range(4)]
    rows = {"image": cells, "label": [0, 1, 1, 0]}
    loaded = datasets.Dataset.from_dict(rows, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.DatasetDict(train=loaded))
    records = load_all(Config(source="hf:some/set", columns={"image": "image", "target": "label"}))
    assert [record.fields["target"] for record in records] == ["no", "yes", "yes", "no"]
    assert all(same(record, i) for i, record in enumerate(records))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "I;16", "I"])
def test_every_kind_comes_out_in_eight_bits_of_red_green_and_blue(tmp_path, mode):
    grey = np.linspace(0, 65535, 30).reshape(5, 6)
    if mode.startswith("I"):
        image = Image.fromarray(grey.astype(np.uint16 if mode == "I;16" else np.int32))
    else:
        image = Image.fromarray((grey / 257).astype(np.uint8)).convert(mode)
    file = tmp_path / ("a.png" if mode in ("1", "L", "LA", "P", "RGBA", "I;16") else "a.tif")
    image.save(file)
    found = LazyImage("a", file).open()
    assert (found.mode, found.size) == ("RGB", (6, 5))
    expected = grey / 257 > 127 if mode == "1" else grey / 257
    values = np.asarray(found).astype(float).mean(-1)
    if mode == "1":
        assert set(np.unique(values)) <= {0.0, 255.0}
    else:
        assert np.abs(values - expected).max() < 8


def test_what_is_transparent_is_white_whatever_colour_lies_under_it(tmp_path):
    image = Image.new("RGBA", (2, 1), (200, 0, 0, 0))
    image.putpixel((1, 0), (10, 20, 30, 255))
    image.save(tmp_path / "a.png")
    found = LazyImage("a", tmp_path / "a.png").open()
    assert [found.getpixel((x, 0)) for x in range(2)] == [(255, 255, 255), (10, 20, 30)]


def test_a_photograph_is_turned_as_its_camera_says(tmp_path):
    image, exif = drawn(0, size=(8, 4)), Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "a.png", exif=exif)
    assert LazyImage("a", tmp_path / "a.png").open().size == (4, 8)


def csv(place: Path, *cells: str) -> Config:
    lines = "".join(f"{cell},x\n" for cell in cells)
    (place / "table.csv").write_text(f"image,target\n{lines}")
    return Config(source=str(place / "table.csv"), columns=COLUMNS)


@pytest.mark.parametrize(("cell", "words"), [
    ("b.png", r"table.csv row 2, file .*b.png: no image that can be read \(FileNotFoundError"),
    ("notes.png", r"table.csv row 2, file .*notes.png: .*UnidentifiedImageError.*save it again as PNG or JPEG"),
    ("", "table.csv row 2, column 'image': is empty; expected an image"),
])  # fmt: skip
def test_a_row_without_an_image_is_named_when_the_data_are_read(tmp_path, cell, words):
    drawn(0).save(tmp_path / "a.png")
    (tmp_path / "notes.png").write_text("no image")
    with pytest.raises(DataError, match=words):
        load_all(csv(tmp_path, "a.png", cell))


def test_an_image_that_breaks_off_is_named_when_it_is_looked_at(tmp_path):
    drawn(0, size=(90, 90)).save(tmp_path / "a.png")
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(whole[: len(whole) // 2])
    (record,) = load_all(csv(tmp_path, "a.png"))
    with pytest.raises(DataError, match=r"table.csv row 1, file .*a.png: no image that can be read"):
        record.fields["image"].open()


def test_a_cell_without_bytes_and_pixels_of_real_numbers_are_refused(tmp_path):
    pq.write_table(pa.table({"image": pa.array([encoded(0), None], pa.binary())}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a.parquet row 2: .*the cell is empty"):
        load_all(Config(source=str(tmp_path / "a.parquet"), columns={"image": "image"}))
    Image.fromarray(np.ones((2, 2), np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(DataError, match="neither 8 nor 16 bits"):
        LazyImage("a", tmp_path / "a.tif").open()


def test_folders_without_images_are_refused(tmp_path):
    folders(tmp_path / "set")
    (tmp_path / "set" / "c").mkdir()
    with pytest.raises(DataError, match="no image in 'c'"):
        load_all(Config(source=str(tmp_path / "set"), columns=COLUMNS))
    (tmp_path / "set" / "c").rmdir()
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match="no image in 'none'"):
        load_all(Config(source=str(tmp_path / "none"), columns=COLUMNS))
    with pytest.raises(DataError, match="unknown column 'text'"):
        load_all(Config(source=str(tmp_path / "set"), columns={**COLUMNS, "text": "text"}))


def test_only_the_images_that_are_used_are_looked_at(tmp_path):
    """Of a large set a sample can be read whatever the rest is."""
    for i in range(30):
        drawn(i).save(tmp_path / f"{i}.png")
    config = csv(tmp_path, *[f"{i}.png" for i in range(30)]).model_copy(update={"max_records": 4})
    used = {str(record.fields["image"]) for side in (load(config, 0).train, load(config, 0).test) for record in side}
    for file in tmp_path.glob("*.png"):
        if str(file) not in used:
            file.unlink()
    found = load(config, 0)
    assert len(found.train) + len(found.test) == 4
