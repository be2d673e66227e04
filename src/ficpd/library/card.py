"""Reads a library's card, and renders it for people: the README page and its phrases.

This module and `facts` load no torch, so that `ficpd info` answers at once.
"""

import json
from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ficpd.errors import LibraryError

if TYPE_CHECKING:
    from ficpd.types import Prompt

FORMAT = 2
TENSORS, CARD, PAGE = "prompts.safetensors", "card.json", "README.md"
START = "start"
KEY, READOUT, LEARNED, MIXTURE = "key/", "readout/", "learned/", "mixture/"
NEEDED = ("backbone", "tasks")
"""The required keys of a card."""
ADAPTED = "adapted"
"""The name of the adapted prompt, and the key of its facts in the card."""
BEGAN = "began_with"
"""The card's key for a saved initial prompt: its name, and the privacy of its library."""
ONE_RECORD = "one record; somebody with several is protected less"
"""The unit of a record-level guarantee whose data name no subjects."""
WORDS = "words"
"""The card's key for the text of prompts of words, by prompt name."""


def join_names(names: Iterable[str], most: int = 20) -> str:
    """Joins names for a sentence.

    >>> join_names(["a", "b", "c"], 2)
    'a, b and 1 more'
    """
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(names[:most]) or "none") + more


def read_card(path: Path) -> dict[str, Any]:
    """Reads a card. Raises `ValueError` or `OSError` if the file is no card."""
    card = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(card, dict) or not all(isinstance(card.get(part), dict) and card[part] for part in NEEDED):
        raise ValueError(f"card.json: expected an object with {', '.join(NEEDED)}")
    if wrong := [name for name, task in card["tasks"].items() if not isinstance(task, dict) or "name" not in task]:
        raise ValueError(f"card.json: tasks: {wrong[0]} has no task kind (`name`)")
    if not isinstance(card.get(ADAPTED, {}), dict):
        raise ValueError(f"card.json: {ADAPTED}: expected an object")
    if not isinstance(card.get(BEGAN, {}), dict):
        raise ValueError(f"card.json: {BEGAN}: expected an object")
    return card


def check_format(meta: Mapping[str, str]) -> None:
    """Raises `ValueError` for a library's file of another format."""
    if meta["format"] != str(FORMAT):
        raise ValueError(f"format {meta['format']}, expected {FORMAT}")


def damaged(folder: Path, error: Exception) -> LibraryError:
    return LibraryError(f"{folder} is damaged or of another version: {error}; save the library again")


def describe_shape(prompt: "Prompt") -> str:
    """Describes a prompt's size and entry layer in a phrase."""
    rows, width = prompt.vectors_PD.shape
    return describe_layout(rows - prompt.head_rows, width, prompt.enters_at, prompt.vectors_PD.is_floating_point())


def describe_layout(rows: int, width: int, enters_at: int, soft: bool) -> str:
    """Describes prompts of `rows` rows, without head rows. `enters_at` below 0: LoRA weights (`types.LORA`)."""
    if enters_at < 0:
        return f"LoRA weights ({rows} rows of width {width}), on the query and value projections of all layers"
    if not soft:
        return f"{rows} words, in front of every text"
    return f"{rows} virtual tokens of width {width}, entering at layer {enters_at}"


def model_card(card: Mapping[str, Any], start: "Prompt", prompts: Iterable[str], readouts: Container[str]) -> str:
    """Returns the library's README page: content, backbone and privacy cost."""
    words = "".join(f"- `{name}` reads: {json.dumps(text)}\n" for name, text in card.get(WORDS, {}).items())
    return (
        f"# Prompt library: {join_names(prompts, 8)}\n\n"
        f"- backbone: {card.get('backbone', {}).get('name', '?')} (`{start.backbone}`)\n"
        f"- {describe_shape(start)}\n"
        f"- tasks: {join_names(card.get('tasks', {}))}\n"
        f"- made by: {describe_run(card)}\n"
        f"- privacy: {guarantee(card.get('privacy', {}))}\n"
        f"{unit_line(card.get('privacy', {}))}{began_line(card)}"
        f"{_settings_lines(card)}{words}{adapted_line(card, readouts)}\n"
        'Use it: `ficpd predict THIS_FOLDER "..."`, or fit it to your own records: '
        "`ficpd adapt THIS_FOLDER --data few.jsonl --shots 16 --out DIR`.\n"
    )


def beginning(card: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Returns the card's entry `BEGAN` for a run that starts from the prompt `name` of this card's library."""
    kept = {key: card[key] for key in ("privacy", BEGAN) if key in card}
    return {"prompt": name, **kept, **({ADAPTED: {}} if name == ADAPTED else {})}


def began_line(card: Mapping[str, Any]) -> str:
    """Returns the card's line about a saved initial prompt. The run's guarantee does not cover its records."""
    if not (began := card.get(BEGAN)):
        return ""
    said = "none" if ADAPTED in began else guarantee(began.get("privacy", {}))
    return (
        f"- began with: the saved prompt `{began.get('prompt', '?')}`, privacy: {said}. A record that both were tuned on is "
        f"protected by both together, at most\n{began_line(began)}"
    )


def weakness(card: Mapping[str, Any]) -> str | None:
    """Returns the reason why a library has no guarantee, in one phrase; None if it has one."""
    privacy = card.get("privacy", {})
    if ADAPTED in card:
        return f"the prompt `{ADAPTED}` is fitted to records without a guarantee"
    if privacy.get("epsilon") is None:
        return "the records that it was trained on have no privacy guarantee"
    if privacy.get("noise") == "simulated" or privacy.get("rehearsed"):
        return "its noise comes from a seed, and a correct guess of the seed removes the noise"
    if BEGAN in card and (why := weakness(card[BEGAN])):
        return f"it began with a saved prompt (prompt.library): {why}"
    return None


def _settings_lines(card: Mapping[str, Any]) -> str:
    """Returns the lines about the method's settings and the distillation."""
    lines = [f"- method: {json.dumps(card['settings'])}"] if card.get("settings") else []
    if distilled := card.get("distilled"):
        gained = "" if distilled["gained"] else "; it did not improve, so this is the global prompt"
        lines.append(f"- distilled ({distilled['how']}) on examples by {distilled['writer']}{gained}")
    return "".join(f"{line}\n" for line in lines)


def adapted_line(card: Mapping[str, Any], readouts: Container[str]) -> str:
    """Returns the line about the adapted prompt. Its records have no privacy guarantee."""
    facts = card.get(ADAPTED)
    if facts is None:
        return ""
    holds = bool(facts.get("demonstrations")) or ADAPTED in readouts or facts.get("way") in ("ensemble", "mixture")
    shown = ", and the demonstrations, head or mixture that come with it," if holds else ""
    return (
        f"- adapted: to {facts.get('shots', '?')} records by {facts.get('way', '?')}. The prompt `{ADAPTED}`{shown} has no "
        "privacy guarantee for those records; share it only with people who may see them\n"
    )


def guarantee(privacy: Mapping[str, Any]) -> str:
    """Returns a run's `privacy` block as one phrase.

    >>> guarantee({"unit": "record", "epsilon": 1.987, "delta": 1e-5, "noise": "simulated"})
    'ε = 1.99 per record, simulated noise'
    """
    if privacy.get("epsilon") is None:
        return "none"
    if privacy.get("noise") is None:
        return "nothing leaves"
    return f"ε = {privacy['epsilon']:.2f} per {privacy['unit']}, {privacy['noise']} noise"


def describe_group_costs(costs: Mapping[Any, float]) -> str:
    """Describes the cost for somebody with several records, under a guarantee per record.

    >>> describe_group_costs({2: 4.3204, 10: 28.84})
    'ε = 4.32 for somebody with 2 records, 28.84 with 10'
    """
    said = [f"{cost:.2f} {'for somebody ' if not place else ''}with {size}{' records' if not place else ''}"
            for place, (size, cost) in enumerate(costs.items())]  # fmt: skip
    return f"ε = {', '.join(said)}"


def unit_line(privacy: Mapping[str, Any]) -> str:
    """Returns the card's line about the privacy unit; empty without a guarantee, or if the unit is a client."""
    unit, replaced = privacy.get("unit"), privacy.get("replace_epsilon")
    if privacy.get("epsilon") is None or privacy.get("noise") is None or unit not in ("record", "subject"):
        return ""
    said = ONE_RECORD if unit == "record" else "one subject, all of its records at one site together"
    if costs := privacy.get("group_epsilon"):
        said += f" ({describe_group_costs(costs)}, at most)"
    return f"- unit: {said}" + (f"; for replacing one {unit} by another ε = {replaced:.2f}\n" if replaced else "\n")


def describe_run(card: Mapping[str, Any]) -> str:
    """Describes the run of a card in one phrase."""
    method, clients, rounds, seed = (card.get(key, "?") for key in ("method", "num_clients", "num_rounds", "seed"))
    number = card.get("prototypes")
    more = "" if number is None else ", one prototype" if number == 1 else f", {number} prototypes"
    withheld = "seed" not in card and card.get("privacy", {}).get("noise") == "simulated"
    seed = "seed withheld, because the noise is simulated" if withheld else f"seed {seed}"
    return f"{method}, {clients} clients, {rounds} rounds, {seed}{more}"
