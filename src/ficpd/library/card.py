"""Renders a library's card for people: the README page and its phrases."""

import json
from collections.abc import Container, Iterable, Mapping
from typing import Any

from ficpd.types import LORA, Prompt

ADAPTED = "adapted"
"""The name of the adapted prompt, and the key of its facts in the card."""
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


def describe_shape(prompt: Prompt) -> str:
    """Describes a prompt's size and entry layer in a phrase."""
    width = prompt.vectors_PD.shape[1]
    if prompt.enters_at == LORA:
        rows = len(prompt.vectors_PD) - prompt.head_rows
        return f"LoRA weights ({rows} rows of width {width}), on the query and value projections of all layers"
    if not prompt.vectors_PD.is_floating_point():
        return f"{prompt.num_virtual_tokens} words, in front of every text"
    return f"{prompt.num_virtual_tokens} virtual tokens of width {width}, entering at layer {prompt.enters_at}"


def model_card(card: Mapping[str, Any], start: Prompt, prompts: Iterable[str], readouts: Container[str]) -> str:
    """Returns the library's README page: content, backbone and privacy cost."""
    words = "".join(f"- `{name}` reads: {json.dumps(text)}\n" for name, text in card.get(WORDS, {}).items())
    return (
        f"# Prompt library: {join_names(prompts, 8)}\n\n"
        f"- backbone: {card.get('backbone', {}).get('name', '?')} (`{start.backbone}`)\n"
        f"- {describe_shape(start)}\n"
        f"- tasks: {join_names(card.get('tasks', {}))}\n"
        f"- made by: {describe_run(card)}\n"
        f"- privacy: {guarantee(card.get('privacy', {}))}\n"
        f"{unit_line(card.get('privacy', {}))}"
        f"{_settings_lines(card)}{words}{adapted_line(card, readouts)}\n"
        'Use it: `ficpd predict THIS_FOLDER --text "..."`, or fit it to your own records: '
        "`ficpd adapt THIS_FOLDER --data few.jsonl --shots 16 --out DIR`.\n"
    )


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
    holds = bool(facts.get("demonstrations")) or ADAPTED in readouts
    shown = ", and the demonstrations or head that come with it," if holds else ""
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
    """Returns what a guarantee per record means for somebody with several, as one phrase.

    >>> describe_group_costs({2: 4.3204, 10: 28.84})
    'ε = 4.32 for somebody with 2 records, 28.84 with 10'
    """
    said = [f"{cost:.2f} {'for somebody ' if not place else ''}with {size}{' records' if not place else ''}"
            for place, (size, cost) in enumerate(costs.items())]  # fmt: skip
    return f"ε = {', '.join(said)}"


def unit_line(privacy: Mapping[str, Any]) -> str:
    """Returns the card's line about the unit of a guarantee; empty without one, or where the unit is a client."""
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
    more = f", {card['prototypes']} prototypes" if "prototypes" in card else ""
    return f"{method}, {clients} clients, {rounds} rounds, seed {seed}{more}"
