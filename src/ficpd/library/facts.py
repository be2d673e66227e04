"""Describes a library from its card and the header of its tensors, without torch and without its backbone."""

from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ficpd.library.card import (
    ADAPTED,
    CARD,
    KEY,
    LEARNED,
    MIXTURE,
    READOUT,
    START,
    TENSORS,
    check_format,
    damaged,
    describe_layout,
    describe_run,
    guarantee,
    read_card,
)
from ficpd.library.hub import find_library

UNSTATED = ("table", "demonstrations")
"""Facts of an adapted prompt that are too long to state, or hold its records."""


def library_facts(path: Path) -> dict[str, Any]:
    """Returns the facts of a library for `ficpd info`, as JSON values.

    Raises `LibraryError` if there is none, or if it is damaged or of another format.
    """
    folder = find_library(Path(path))
    try:
        with safe_open(folder / TENSORS, "numpy") as file:
            meta, names = file.metadata(), list(file.keys())
            check_format(meta)
            (rows, width), dtype = file.get_slice(START).get_shape(), file.get_slice(START).get_dtype()
        layout = rows - int(meta["head_rows"]), width, int(meta["enters_at"]), "F" in dtype
        card = read_card(folder / CARD)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise damaged(folder, error) from error
    adapted = card.get(ADAPTED)
    return {
        "prompts": sorted(
            name for name in names if name != START and not name.startswith((KEY, READOUT, LEARNED, MIXTURE))
        ),
        "backbone": {"name": card["backbone"].get("name", "?"), "fingerprint": meta["backbone"]},
        "shape": describe_layout(*layout),
        "tasks": card["tasks"],
        "made_by": describe_run(card),
        "privacy": guarantee(card.get("privacy", {})),
        ADAPTED: adapted and {key: value for key, value in adapted.items() if key not in UNSTATED},
    }
