"""What a library's card says to people: a page, a line, a phrase."""

import json
from collections.abc import Container, Iterable, Mapping
from typing import Any

from ficpd.types import LORA, Prompt

ADAPTED = "adapted"
"""The name of the prompt that somebody fitted to records of their own, and of the card's part that says how."""
WORDS = "words"
"""The card's part that says how prompts of words read: by name."""


def join_names(names: Iterable[str], most: int = 20) -> str:
    """Names for a sentence.

    >>> join_names(["a", "b", "c"], 2)
    'a, b and 1 more'
    """
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(names[:most]) or "none") + more


def describe_shape(prompt: Prompt) -> str:
    """A prompt's size and where it goes in, for a sentence."""
    width = prompt.vectors_PD.shape[1]
    if prompt.enters_at == LORA:
        rows = len(prompt.vectors_PD) - prompt.head_rows
        return f"LoRA weights ({rows} rows of width {width}), on the query and value projections of all layers"
    if not prompt.vectors_PD.is_floating_point():
        return f"{prompt.num_virtual_tokens} words, in front of every text"
    return f"{prompt.num_virtual_tokens} virtual tokens of width {width}, entering at layer {prompt.enters_at}"


def model_card(card: Mapping[str, Any], start: Prompt, prompts: Iterable[str], readouts: Container[str]) -> str:
    """A page for people: what the library is, for which backbone, what it cost in privacy."""
    return (
        f"# Prompt library: {join_names(prompts, 8)}\n\n"
        f"- backbone: {card.get('backbone', {}).get('name', '?')} (`{start.backbone}`)\n"
        f"- {describe_shape(start)}\n"
        f"- tasks: {join_names(card.get('tasks', {}))}\n"
        f"- made by: {describe_run(card)}\n"
        f"- privacy: {guarantee(card.get('privacy', {}))}\n"
        f"{_settings_lines(card)}{_words_lines(card)}{adapted_line(card, readouts)}\n"
        'Use it: `ficpd predict THIS_FOLDER --text "..."`, or fit it to your own records: '
        "`ficpd adapt THIS_FOLDER --data few.jsonl --shots 16 --out DIR`.\n"
    )


def _words_lines(card: Mapping[str, Any]) -> str:
    """Prompts that were made of words, as they read."""
    return "".join(f"- `{name}` reads: {json.dumps(text)}\n" for name, text in card.get(WORDS, {}).items())


def _settings_lines(card: Mapping[str, Any]) -> str:
    """How the method was set, and what was distilled."""
    lines = [f"- method: {json.dumps(card['settings'])}"] if card.get("settings") else []
    if distilled := card.get("distilled"):
        gained = "" if distilled["gained"] else "; it gained nothing, so the global prompt stands for it"
        lines.append(f"- distilled ({distilled['how']}) on examples by {distilled['writer']}{gained}")
    return "".join(f"{line}\n" for line in lines)


def adapted_line(card: Mapping[str, Any], readouts: Container[str]) -> str:
    """What the page says of a prompt that somebody fitted to records of their own: no guarantee covers those."""
    facts = card.get(ADAPTED)
    if facts is None:
        return ""
    holds = bool(facts.get("demonstrations")) or ADAPTED in readouts
    beside = " and the demonstrations beside it, which are such records or made of them" if holds else ""
    return (
        f"- adapted: to {facts.get('shots', '?')} records of its owner by {facts.get('way', '?')}. The prompt "
        f"`{ADAPTED}`{beside}: no guarantee covers those records; pass this on only to who may see them\n"
    )


def guarantee(privacy: Mapping[str, Any]) -> str:
    """A run's `privacy` block in one phrase.

    >>> guarantee({"unit": "record", "epsilon": 1.987, "delta": 1e-5, "noise": "simulated"})
    'ε = 1.99 per record, simulated noise'
    """
    if privacy.get("epsilon") is None:
        return "none"
    if privacy.get("noise") is None:
        return "nothing leaves"
    return f"ε = {privacy['epsilon']:.2f} per {privacy['unit']}, {privacy['noise']} noise"


def describe_run(card: Mapping[str, Any]) -> str:
    """Which run a card is of, in one phrase."""
    method, clients, rounds, seed = (card.get(key, "?") for key in ("method", "num_clients", "num_rounds", "seed"))
    more = f", {card['prototypes']} prototypes" if "prototypes" in card else ""
    return f"{method}, {clients} clients, {rounds} rounds, seed {seed}{more}"
