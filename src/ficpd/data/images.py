"""Reads images from the paths of a table, from a folder for each label, or from a Parquet column.

Images are decoded when a backbone reads them. The header of each image is checked when the data are read, so that a missing
or wrong file is found before the run. Damaged pixels are found only when they are decoded.
"""

import io
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ficpd.data.tables import SPLITS, WHOLE, ReadOptions, Table, holds_bytes, read_files, table_paths
from ficpd.errors import DataError, needs

if TYPE_CHECKING:
    from PIL import Image

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm")
KEEP_BYTES = 256 << 20
"""The maximum bytes of encoded Parquet images in memory (one row group may be larger)."""
Place = Path | bytes | Callable[[], Any]


@dataclass(frozen=True)
class LazyImage:
    """An image that is decoded when it is used.

    key: the key of its record.
    place: a file, its bytes, or a function that returns either.
    """

    key: str
    place: Place = field(repr=False)

    def __str__(self) -> str:
        return str(self.place) if isinstance(self.place, Path) else self.key

    def open(self) -> "Image.Image":
        """Decodes to 8-bit RGB, rotated by EXIF data, with transparency on white. Raises `DataError` if it cannot."""
        return self._opened(_rgb)

    def check(self) -> None:
        """Raises `DataError` if there is no image. Reads the header, not the pixels."""
        self._opened(lambda image: image)

    def _opened(self, use: "Callable[[Image.Image], Image.Image]") -> "Image.Image":
        with needs("an image", "images"):
            from PIL import Image
        try:
            place = self.place() if callable(self.place) else self.place
            with Image.open(io.BytesIO(place) if isinstance(place, bytes) else place) as image:
                return use(image)
        except Exception as error:  # each of Pillow's decoders raises other classes
            where = f", file {self.place}" if isinstance(self.place, Path) else ""
            raise DataError(
                f"{self.key}{where}: no image that can be read ({type(error).__name__}: {str(error)[:200]}); save it again "
                "as PNG or JPEG, or leave the record out"
            ) from error


def _rgb(image: "Image.Image") -> "Image.Image":
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image)
        if image.mode == "F" or values.min() < 0 or values.max() > 65535:
            raise ValueError(f"pixels of mode {image.mode} are neither 8 nor 16 bits")
        image = Image.fromarray((values / 257).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def check_all(cells: Iterable[tuple[str, Any]], column: str) -> None:
    """Raises `DataError` for the first row without an image. `cells`: key and cell of each row."""
    for key, cell in cells:
        if not isinstance(cell, LazyImage):
            given = "is empty" if cell is None else f"holds {str(cell)[:60]!r}"
            raise DataError(
                f"{key}, column {column!r}: {given}; expected an image: its path, or in Parquet its bytes; fill or drop "
                "the row"
            )
        cell.check()


# ---------------------------------------------------------------- tables with a column of images


def read_tables(path: Path, column: str, options: ReadOptions = WHOLE) -> list[Table]:
    """Reads tables like `read_files`, with `LazyImage`s in `column` (None for empty cells), or a folder of images.

    In CSV, TSV and JSON Lines the column has paths, relative to the table's folder. In Parquet it has paths, bytes, or the
    hub's `{"bytes", "path"}`. A folder of images has a folder for each label, which may be in folders `train` and `test`.
    Its columns are `image` and `target`.
    """
    if path.is_dir() and not table_paths(path):
        sides = {folder: folder.name.lower() for folder in _folders(path)}
        if {"train", "test"} <= {*sides.values()} <= SPLITS.keys():
            return [_labelled(folder)._replace(split=SPLITS[side]) for folder, side in sides.items()]
        return [_labelled(path)]
    folder = path if path.is_dir() else path.parent
    tables = read_files(path, options._replace(images=column))
    return [_with_pictures(folder / table.name, table, column) for table in tables]


def is_folder(path: Path) -> bool:
    """Tells whether this is a folder without tables, with images in it or up to two folders below."""
    if not path.is_dir() or table_paths(path):
        return False
    return any(p.suffix.lower() in ENDINGS for depth in ("*", "*/*", "*/*/*") for p in path.glob(depth))


def stored_column(path: Path) -> str | None:
    """Returns the first column with bytes in a Parquet file, or in a folder's first table; None without one."""
    file = next(iter(table_paths(path)), path) if path.is_dir() else path
    if file.suffix.lower() != ".parquet" or not file.is_file():
        return None
    with needs("a Parquet file", "parquet"):
        import pyarrow as pa
        import pyarrow.parquet as pq
    try:
        schema = pq.read_schema(file)
    except (OSError, pa.ArrowInvalid):  # the reader raises the error
        return None
    return next((field.name for field in schema if holds_bytes(field.type) and _has_bytes(field.type)), None)


def _has_bytes(kind: Any) -> bool:
    return not kind.num_fields or "bytes" in {kind.field(place).name for place in range(kind.num_fields)}


def _with_pictures(file: Path, table: Table, column: str) -> Table:
    if column not in table.columns:
        return table
    stored = _cells(file, column) if file.suffix.lower() == ".parquet" else {}
    rows = {}
    for number, cells in table.rows.items():
        place, cell = stored.get(number), cells.get(column)
        if not place and isinstance(cell, str) and cell.strip():
            place = file.parent / Path(cell.strip()).expanduser()
        rows[number] = {**cells, column: place and LazyImage(f"{table.name} row {number}", place)}
    return table._replace(rows=rows)


def _labelled(path: Path) -> Table:
    """Makes one row per image, with the name of its folder as target. Images directly in `path` have no target."""
    labels = _folders(path)
    found = [(image, label.name) for label in labels for image in _images(label)] or [(i, None) for i in _images(path)]
    if empty := [label.name for label in labels if not _images(label)] or ([] if found else [path.name]):
        raise DataError(
            f"folder {path}: no image in {empty[0]!r}; expected a folder for each label with files ending in "
            f"{', '.join(ENDINGS)} directly in it, or train and test with such folders"
        )
    rows = {}
    for number, (image, label) in enumerate(found, 1):
        rows[number] = {"image": LazyImage(f"{path.name} row {number}", image)} | ({"target": label} if labels else {})
    return Table(path.name, ["image", "target"] if labels else ["image"], rows)


def _folders(path: Path) -> list[Path]:
    return sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))


def _images(folder: Path) -> list[Path]:
    return sorted(
        p for p in folder.iterdir() if p.suffix.lower() in ENDINGS and p.is_file() and not p.name.startswith(".")
    )


# ---------------------------------------------------------------- bytes in Parquet and on the hub


def _cells(file: Path, column: str) -> dict[int, Place]:
    """Returns a function for each row that reads its image; empty for a column of paths, which the table has."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(file) as opened:
        if not holds_bytes(opened.schema_arrow.field(column).type):
            return {}
        sizes = [opened.metadata.row_group(group).num_rows for group in range(opened.metadata.num_row_groups)]
    places = ((group, row) for group, size in enumerate(sizes) for row in range(size))
    return {number: partial(_stored, file, column, *place) for number, place in enumerate(places, 1)}


def _stored(file: Path, column: str, group: int, row: int) -> Place:
    return image_bytes(_groups.fetch(file, column, group)[row].as_py(), file.parent)


def image_bytes(value: Any, folder: Path) -> Place:
    """Returns the bytes or path in a cell. Raises `ValueError` if the cell is empty."""
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return value
    if not value or not isinstance(value, str):
        raise ValueError("the cell is empty")
    return folder / value


class _Groups:
    """Caches the row groups that were used last, up to `limit` bytes. Images are read in any order."""

    def __init__(self, limit: int):
        self.limit, self.kept = limit, OrderedDict[tuple[Path, str, int], Any]()

    def fetch(self, file: Path, column: str, group: int) -> Any:
        import pyarrow.parquet as pq

        key = file, column, group
        if key not in self.kept:
            with pq.ParquetFile(file) as opened:
                self.kept[key] = opened.read_row_group(group, columns=[column]).column(column)
            while len(self.kept) > 1 and sum(values.nbytes for values in self.kept.values()) > self.limit:
                self.kept.popitem(last=False)
        self.kept.move_to_end(key)
        return self.kept[key]


_groups = _Groups(KEEP_BYTES)


def hub_images(name: str, dataset: Any, columns: list[str]) -> Callable[[int], dict[str, LazyImage]]:
    """Returns a function from a row number (from 1) of a hub's data set to its images by column."""
    from datasets import Image as Feature

    for column in columns:
        dataset = dataset.cast_column(column, Feature(decode=False))

    def place(number: int, column: str) -> Place:
        return image_bytes(dataset[number - 1][column], Path())

    return lambda number: {c: LazyImage(f"{name} row {number}", partial(place, number, c)) for c in columns}
