"""Reads data sets of the Hugging Face hub, and folders of `save_to_disk`, as tables."""

import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

from ficpd.data import images
from ficpd.data.tables import SPLITS, Table
from ficpd.errors import DataError, needs


def is_saved(path: Path) -> bool:
    """Tells whether `save_to_disk` of `datasets` wrote this folder: one data set, or one for each split."""
    return any(os.path.isfile(path / name) for name in ("state.json", "dataset_dict.json"))  # False where stat fails


def read(
    source: str, subset: str | None, only: str | None, with_dev: bool, columns: Collection[str] | None = None
) -> list[Table]:
    """Reads the train and test splits of "hf:ID" (also `test.de`), or one split. Class numbers become names.

    source: "hf:ID", or a folder (`is_saved`).
    only: the split to read; None: train and test, or train without test. A folder with both ignores it.
    with_dev: also reads dev splits.
    columns: the columns to read; None: all.
    """
    name = source.removeprefix("hf:")
    splits = _load(name, subset, only)
    sides = ["train", *["dropped"] * with_dev, "test"]
    named = {side: [split for split in splits if SPLITS.get(split.partition(".")[0]) == side] for side in sides}
    if only is None and named["train"] and named["test"]:
        return [_table(f"{name} {split}", splits[split], columns, side) for side in sides for split in named[side]]
    only = only or "train"
    if only not in splits:
        raise DataError(f"{source}: splits are {', '.join(splits)}; say which to read with hf_split")
    return [_table(f"{name} {only}", splits[only], columns)]


def _load(name: str, subset: str | None, only: str | None) -> dict[str, Any]:
    with needs("a data set of the hub or of save_to_disk", "hub"):
        import datasets

    if is_saved(folder := Path(name).expanduser()):
        return _load_saved(folder)
    try:
        loaded = datasets.load_dataset(name, subset, split=only)
    except Exception as error:  # the hub's client raises many classes, also when it is offline
        raise DataError(
            f"hf:{name}: cannot be loaded ({type(error).__name__}: {error}); check the id, subset and hf_split and "
            f"that the hub can be reached, or download the data and name a local file as source"
        ) from error
    return {only: loaded} if only else dict(loaded)  # type: ignore[arg-type]


def _load_saved(folder: Path) -> dict[str, Any]:
    import datasets

    try:
        loaded = datasets.load_from_disk(str(folder))
    except Exception as error:  # many classes, as above
        raise DataError(
            f"{folder}: a folder of datasets.save_to_disk that cannot be loaded ({type(error).__name__}: {error}); save it "
            "again, or write it with to_parquet and name that file as source"
        ) from error
    if isinstance(loaded, datasets.DatasetDict):
        return {str(name): split for name, split in loaded.items()}
    return {str(loaded.split or "train"): loaded}


def _table(name: str, dataset: Any, columns: Collection[str] | None, split: str | None = None) -> Table:
    from datasets import ClassLabel, Image

    names = list(dataset.features)
    if columns is not None:
        dataset = dataset.select_columns([column for column in names if column in columns])
    kinds = {column: getattr(feature, "dtype", "") for column, feature in dataset.features.items()}
    binary = ("binary", "large_binary")
    seen = [c for c, kind in kinds.items() if isinstance(dataset.features[c], Image) or kind in binary]
    pictures, texts = images.hub_images(name, dataset, seen), dataset.remove_columns(seen)
    named = {column: feature for column, feature in dataset.features.items() if isinstance(feature, ClassLabel)}

    def words(row: dict[str, Any]) -> dict[str, Any]:
        numbers = {column: row[column] for column in named}
        return row | {c: None if n is None or n < 0 else named[c].int2str(n) for c, n in numbers.items()}

    rows = {i: words(row) | pictures(i) for i, row in enumerate(texts, 1)}
    return Table(name, names, rows, split=split)
