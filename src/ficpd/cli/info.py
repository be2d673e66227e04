"""The command `ficpd info`."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from ficpd.cli.console import asked, print_json, screen
from ficpd.cli.options import Json


def info(
    path: Annotated[Path | None, typer.Argument(help="a library or run directory; none: this installation")] = None,
    as_json: Json = False,
) -> None:
    """Describe a library, a run (finished or not), or this installation (with `-v`: also torch and its devices).

    Example: `ficpd info runs/demo`
    """
    facts = _facts_of(path) if path else _installation()
    print_json(facts)
    if not as_json:
        table = Table.grid(padding=(0, 2))
        table.add_column()
        table.add_column(overflow="fold")  # wraps a path instead of cutting it
        for name, words in _in_words(facts).items():
            table.add_row(f"[bold]{name.replace('_', ' ')}[/]", escape(words))
        screen.print(table, highlight=False)


def schema() -> None:
    """Print the JSON schema of a recipe, with which editors complete and check settings.

    Example: `ficpd schema > ficpd.schema.json`, and `#:schema ficpd.schema.json` as a recipe's first line
    """
    from ficpd.experiments.reference import recipe_schema

    typer.echo(json.dumps(recipe_schema(), indent=2))


def _facts_of(path: Path) -> dict[str, Any]:
    """Returns the facts of a run and of its library, if it has one. Raises `LibraryError` for a comparison."""
    from ficpd.errors import LibraryError
    from ficpd.experiments.facts import run_facts
    from ficpd.library.facts import library_facts

    facts = run_facts(path)
    if facts and not (path / "library").is_dir():
        return facts
    if (path / "compare.json").is_file():
        raise LibraryError(f"{path} holds a comparison; print it by `ficpd compare {path}`")
    return {**facts, **library_facts(path)}


def _installation() -> dict[str, Any]:
    from ficpd.experiments.facts import installation_facts

    facts = installation_facts()
    if asked.verbose:
        import torch

        from ficpd.backbones.autotune import machine_info

        facts["torch_device"] = machine_info(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    return facts


def _in_words(facts: Mapping[str, Any]) -> dict[str, str]:
    """Returns the facts as phrases. The facts on a run's state become one phrase."""
    words = {name: _phrase(value) for name, value in facts.items()}
    if "rounds" in facts:
        done = "finished" if facts["finished"] else f"not finished; continue it: {facts['continue']}"
        words["run"] = f"{facts['run']}: {facts['method']}, seed {facts['seed']}"
        words["rounds"] = f"{facts['rounds']} of {facts['planned_rounds']}, {done}"
        words = {
            k: v for k, v in words.items() if k not in ("method", "seed", "planned_rounds", "finished", "continue")
        }
    if "scores" in facts:
        words["scores"] = "; ".join(f"{_SCORES[name]}: {_scores(score)}" for name, score in facts["scores"].items())
    if "tasks" in facts and "shape" in facts:
        words["backbone"] = "{name} ({fingerprint})".format_map(facts["backbone"])
        words["tasks"] = _tasks(facts["tasks"])
        words["adapted"] = _adapted(facts["adapted"])
        words.pop("guarantee", None)
    return words


_SCORES = {
    "own": "own test, mean client",
    "worst": "worst client",
    "global": "everyone's test",
    "zero_shot": "no prompt",
}


def _scores(score: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in score.items() if not name.endswith(("_low", "_high")))


def _tasks(tasks: Mapping[str, Mapping[str, Any]]) -> str:
    """Describes tasks in a line: a single task in full, several by their names and kinds.

    >>> _tasks({"mood": {"name": "classification", "instruction": "it was", "labels": {"g": "good", "b": "bad"}}})
    'mood (classification, 2 labels): g, b; instruction: it was'
    >>> _tasks({"a": {"name": "classification", "labels": {"x": "x", "y": "y"}}, "b": {"name": "generation"}})
    'a (classification, 2 labels), b (generation)'
    """
    from ficpd.library.card import join_names

    labels = {name: about.get("labels") or {} for name, about in tasks.items()}
    said = [f"{n} ({t['name']}{f', {len(labels[n])} labels' if labels[n] else ''})" for n, t in tasks.items()]
    if len(tasks) > 1:
        return join_names(said)
    ((name, about),) = tasks.items()
    more = [join_names(labels[name])] if labels[name] else []
    more += [f"instruction: {about['instruction']}"] if about.get("instruction") else []
    return f"{said[0]}: {'; '.join(more)}" if more else said[0]


def _adapted(facts: Mapping[str, Any] | None) -> str:
    if not facts:
        return "no"
    shots, task, way, why = (facts.get(key, "?") for key in ("shots", "task", "way", "why"))
    return f"to {shots} records of {task} by {way}: {why}"


def _phrase(value: Any) -> str:
    if isinstance(value, Mapping):
        return "; ".join(f"{name}: {_phrase(item)}" for name, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)
