"""The command `ficpd audit`."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from ficpd.cli.console import FAILED, note, print_json, print_table, progress_bars, say
from ficpd.cli.options import Columns, Device, Json, roles


def audit(
    run: Annotated[Path, typer.Argument(help="the directory of a finished run; with --trained, any library")],
    prompt: Annotated[str | None, typer.Option(help="the prompt attacked; none: global, else the first")] = None,
    trained: Annotated[str | None, typer.Option(help="a file of records that the library was tuned on")] = None,
    others: Annotated[str | None, typer.Option(help="a file of similar records that it was not tuned on")] = None,
    columns: Columns = None,
    out: Annotated[Path | None, typer.Option(help="with --trained: where audit.json goes; none: LIBRARY-audit")] = None,
    shadows: Annotated[int, typer.Option(help="shadow prompts to tune", min=1)] = 4,
    members: Annotated[int, typer.Option(help="maximum number of training records attacked", min=2)] = 1000,
    canaries: Annotated[int, typer.Option(help="records planted in a second training; 0: none", min=0)] = 100,
    seed: int = 0, device: Device = "cpu", as_json: Json = False,
) -> None:  # fmt: skip
    """Attack a run: infer members of its training data, and test its ε. Exit status 3 if the ε is violated.

    Without the run, attack a library's prompt with known members: `--trained` and `--others`.

    Example: `ficpd audit runs/quickstart-ficpd-0 --canaries 0`
    """
    from ficpd.evaluation.audit.report import FEW, table, verdict
    from ficpd.experiments.audit import audit_library, audit_run
    from ficpd.library.records import read_records

    if bool(trained) != bool(others):
        raise typer.BadParameter("give --trained and --others together: members and non-members")
    if out is not None and not trained:
        raise typer.BadParameter(f"--out goes with --trained; an audit of a run is written to {run / 'audit.json'}")
    if trained and others:
        folder = out or run.with_name(run.resolve().name + "-audit")
        known, unknown = (read_records(file, roles(columns)) for file in (trained, others))
        with progress_bars("") as progress:
            found = audit_library(run, known, unknown, folder, prompt, shadows, members, seed, device, progress)
    else:
        folder = run
        with progress_bars("") as progress:
            found = audit_run(run, prompt, shadows, members, canaries, seed, device, progress)
    say(
        f"{found.prompt} of {run}: {found.num_members:,} records that were trained on, {found.num_nonmembers:,} that were "
        f"not; privacy: {found.guarantee}"
    )
    print_table(*table(found))
    if found.num_nonmembers < FEW:
        say(f"few non-members (below {FEW:,}): intervals are wide, and low rates cannot be measured")
    for name, bound in found.bounds.items():
        stated = "none stated" if bound.stated is None else f"{bound.stated:.2f} stated"
        say(f"{name}: ε is at least {bound.epsilon:.2f} ({stated}; {bound.runs:,} could show {bound.reach:.2f})")
    say(verdict(found), "bold red" if found.alarm else "")
    note(f"result:  {folder / 'audit.json'}")
    print_json({**asdict(found), "alarm": found.alarm, "verdict": verdict(found), "file": folder / "audit.json"})
    if found.alarm:
        raise typer.Exit(FAILED)
