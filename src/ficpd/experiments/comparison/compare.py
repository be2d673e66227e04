"""Runs the missing cells of a comparison, and summarises all of them in its folder."""

import os
from collections import Counter
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from ficpd import __version__
from ficpd.errors import RunError, needs
from ficpd.evaluation.metrics import Metric
from ficpd.experiments.comparison import pareto, summary
from ficpd.experiments.comparison.grid import Grid
from ficpd.experiments.comparison.overrides import REFERENCE_METHODS
from ficpd.experiments.comparison.ray_workers import ray_address, run_jobs_on_ray
from ficpd.experiments.comparison.results import CELLS, load_result, result_rows, run_keys
from ficpd.experiments.comparison.schema import (
    COMPARISON,
    BudgetInfo,
    ComparisonResult,
    MethodInfo,
    RunOutcome,
    TaskInfo,
)
from ficpd.experiments.comparison.statistics import CONFIDENCE
from ficpd.experiments.comparison.workers import Event, Job, run_jobs
from ficpd.experiments.config import to_toml
from ficpd.experiments.report.comparison_tables import write_tables
from ficpd.experiments.run_directory import RunDir
from ficpd.storage import atomic_write

Seen = Callable[[Event], None]


def compare(
    plan: Grid, out: Path, jobs: int | str | None = None, planned: Callable[[int, int], None] | None = None,
    seen: Seen = lambda event: None,
) -> ComparisonResult:  # fmt: skip
    """Runs the missing cells of `out`, `jobs` at a time, and writes the tables, also if it is interrupted.

    jobs: None: one for each core, or one on a GPU. "ray" or "ray://HOST:PORT": one for each CPU or GPU of a Ray cluster.
    planned: receives the number of runs and of missing runs.
    seen: receives every event.

    A script that calls this needs the guard `if __name__ == "__main__":`, because workers are spawned processes.

    Raises `RunError` if another process works in `out`, or if `out` has other files or results of another version.
    """
    with needs("a comparison", "report"):
        for package in ("pandas", "tabulate"):
            import_module(package)
    with RunDir(out).lock():
        if not RunDir(out).is_empty and not (out / "compare.toml").exists():
            raise RunError(f"{out} is not empty and holds no comparison; choose another --out")
        names = run_keys(out, plan.cells)
        missing = _missing(plan, out, names)
        atomic_write(out / "compare.toml", plan.text)
        if planned is not None:
            planned(len(names), len(missing))
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        on_gpu = any(cell.experiment.engine.device.startswith("cuda") for cell in plan.cells)
        try:
            if isinstance(jobs, str):
                run_jobs_on_ray(missing, out / CELLS, ray_address(jobs), float(on_gpu), seen)
            else:
                number = min(jobs or (1 if on_gpu else cores), max(len(missing), 1))
                run_jobs(missing, out / CELLS, number, max(1, cores // number), seen)
        finally:
            found = described(plan, {h: load_result(out, key) for h, key in names.items()}, names)
            found.write(out / COMPARISON)
            write_tables(found, out)
        return found


def _missing(plan: Grid, out: Path, names: Mapping[str, str]) -> list[Job]:
    """Returns the unfinished runs, each once, in the plan's order."""
    first = {cell.hash: cell for cell in reversed(plan.cells)}
    open_ = [h for h in names if not (one := load_result(out, names[h])) or one.status != "done"]
    (out / CELLS).mkdir(parents=True, exist_ok=True)
    return [Job(names[h], to_toml(first[h].experiment), first[h].ground) for h in open_]


def described(plan: Grid, outcomes: Mapping[str, RunOutcome | None], names: Mapping[str, str]) -> ComparisonResult:
    """Summarises all cells of a comparison."""
    spec, cells = plan.spec, result_rows(plan.cells, names, outcomes)
    metrics: dict[str, Metric | None] = dict.fromkeys(plan.axes["tasks"])
    metrics |= {c.task: one.metric for c in plan.cells if (one := outcomes[c.hash]) and one.status == "done"}
    seen = summary.ResultView(cells, list(plan.methods), spec.figure, plan.reference, metrics)
    return ComparisonResult(
        ficpd=__version__,
        name=spec.name,
        figure=spec.figure,
        reference=plan.reference,
        lines=seen.lines,
        confidence=CONFIDENCE,
        seeds=list(spec.seeds),
        methods={label: _method(label, piece) for label, piece in plan.methods.items()},
        tasks={label: _task(plan, label, metrics[label]) for label in plan.axes["tasks"]},
        partitions={label: dict(piece.get("partition", {})) for label, piece in plan.axes["partitions"].items()},
        budgets={label: _budget(piece) for label, piece in plan.axes["budgets"].items()},
        sweeps={path: list(values) for path, values in plan.sweeps.items()},
        cells=cells,
        conditions=summary.conditions(seen),
        settings=summary.settings(seen),
        fronts=pareto.pareto_fronts(seen),
        targets=pareto.cost_to_target(seen, spec.targets),
        counts=dict(Counter(row.status for row in cells)),
    )


def _method(label: str, piece: Mapping[str, Any]) -> MethodInfo:
    parts = {key: value for key, value in piece.items() if key not in ("private", "method")}
    own = {key: value for key, value in piece["method"].items() if key != "name"}
    settings = {**({"method": own} if own else {}), **parts}
    line, private = label in REFERENCE_METHODS, piece.get("private", True)
    return MethodInfo(name=piece["method"]["name"], line=line, private=private, settings=settings)


def _task(plan: Grid, label: str, metric: Metric | None) -> TaskInfo:
    experiment = next(cell.experiment for cell in plan.cells if cell.task == label)
    return TaskInfo(task=experiment.tasks_in_words, backbone=experiment.backbone.name, metric=metric)


def _budget(piece: Mapping[str, Any]) -> BudgetInfo:
    """Returns a budget for JSON, which has no infinity (None: no limit)."""
    return BudgetInfo(**{k: None if piece.get(k) == float("inf") else piece.get(k) for k in BudgetInfo.model_fields})
