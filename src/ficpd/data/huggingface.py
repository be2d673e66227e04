"""Data sets of the Hugging Face hub as tables, by `datasets`."""

from typing import Any

from ficpd.data import images
from ficpd.data.tables import SPLITS, Table
from ficpd.errors import DataError


def read(source: str, subset: str | None, only: str | None, with_dev: bool) -> list[Table]:
    """The train and test splits of "hf:ID" (`test.de`, too), or one split to be divided; class numbers become names."""
    name = source.removeprefix("hf:")
    splits = _load(name, subset, only)
    sides = ["train", *["dropped"] * with_dev, "test"]
    named = {side: [split for split in splits if SPLITS.get(split.partition(".")[0]) == side] for side in sides}
    if named["train"] and named["test"]:
        return [_table(f"{name} {split}", splits[split], side) for side in sides for split in named[side]]
    only = only or "train"
    if only not in splits:
        raise DataError(f"{source}: splits are {', '.join(splits)}; say which to read with hf_split")
    return [_table(f"{name} {only}", splits[only])]


def _load(name: str, subset: str | None, only: str | None) -> dict[str, Any]:
    import datasets

    try:
        loaded = datasets.load_dataset(name, subset, split=only)
    except Exception as error:  # the hub's client raises a dozen kinds, offline ones among them
        raise DataError(
            f"hf:{name}: cannot be loaded ({type(error).__name__}: {error}); check the id, subset and hf_split and "
            f"that the hub can be reached, or download the data and name a local file as source"
        ) from error
    return {only: loaded} if only else dict(loaded)  # type: ignore[arg-type]


def _table(name: str, dataset: Any, split: str | None = None) -> Table:
    from datasets import ClassLabel, Image

    kinds = {column: getattr(feature, "dtype", "") for column, feature in dataset.features.items()}
    binary = ("binary", "large_binary")
    seen = [c for c, kind in kinds.items() if isinstance(dataset.features[c], Image) or kind in binary]
    pictures, texts = images.hub_images(name, dataset, seen), dataset.remove_columns(seen)
    named = {column: feature for column, feature in dataset.features.items() if isinstance(feature, ClassLabel)}

    def words(row: dict[str, Any]) -> dict[str, Any]:
        numbers = {column: row[column] for column in named}
        return row | {c: None if n is None or n < 0 else named[c].int2str(n) for c, n in numbers.items()}

    rows = {i: words(row) | pictures(i) for i, row in enumerate(texts, 1)}
    return Table(name, list(dataset.features), rows, split=split)
