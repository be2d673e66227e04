"""The command `ficpd plan`."""

import json
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from ficpd.cli.console import errors, print_table, screen
from ficpd.cli.run import Changes

if TYPE_CHECKING:
    from ficpd.experiments.planning import Plan


def plan(
    recipe: Annotated[str | None, typer.Argument(help="a TOML file or a recipe's name; none: quickstart")] = None,
    changes: Changes = None,
    as_json: Annotated[bool, typer.Option("--json", help="print bytes and seconds as JSON")] = False,
) -> None:
    """Print the memory and the time that a run needs on this machine, without running it.

    It rehearses two rounds of the method and of each baseline; the backbone answers a few of their queries.

    Example: `ficpd plan quickstart --set engine.device=cuda`
    """
    from ficpd.experiments import config as experiments
    from ficpd.experiments.planning import plan as make_plan

    experiment = experiments.read(recipe, changes or ())
    found = make_plan(experiment, lambda name: errors.print(f"planning {escape(name)}", highlight=False))
    if as_json:
        typer.echo(json.dumps(found.to_json(), indent=2))
        return
    screen.print(f"[bold]{escape(experiment.name)}[/] on {found.device}, {found.dtype}", highlight=False)
    print_table(["memory", "GB"], _memory(found))
    print_table(["time", "prepare", "rounds", "finish", "all"], _time(found))
    again = ", blocks computed again in the backward" if found.checkpoint else ""
    screen.print(f"A forward has {found.chunk_tokens:,} positions at most{again}.", highlight=False)
    if found.bytes > found.free:
        errors.print(
            f"[bold yellow]warning:[/] {found.device} has {_gb(found.free)} GB free. Set engine.checkpoint = true, a "
            "smaller engine.keep_mb, or another backbone",
            highlight=False, soft_wrap=True,
        )  # fmt: skip


def _memory(found: "Plan") -> list[list[str]]:
    lines = {
        "weights": found.weights, "forward and backward": found.forward, "kept lower layers": found.kept,
        "program and records (main memory)": found.program, "clients' states (main memory)": found.clients,
        f"all on {found.device}": found.bytes, f"free on {found.device}": found.free,
    }  # fmt: skip
    return [[name, _gb(value)] for name, value in lines.items()]


def _time(found: "Plan") -> list[list[str]]:
    lines = [["data, backbone, calibration", "", "", "", _clock(found.seconds_load)]]
    lines.append(["lower layers of all records", "", "", "", _clock(found.seconds_lower)])
    for method in found.methods:
        parts = (method.seconds_prepare, method.seconds_rounds, method.seconds_finish, method.seconds)
        lines.append([f"{method.name}, {method.rounds} rounds", *map(_clock, parts)])
    return [*lines, ["all", "", "", "", _clock(found.seconds)]]


def _gb(value: int) -> str:
    return f"{value / 1e9:.2f}"


def _clock(seconds: float) -> str:
    """
    >>> _clock(7.04), _clock(75), _clock(7325)
    ('7.0 s', '1 min 15 s', '2 h 2 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
