"""Tables for other tools: CSV with figures as they were measured, LaTeX as the page shows them."""

from collections.abc import Mapping, Sequence
from typing import Any

from ficpd.experiments.report.blocks import Table
from ficpd.experiments.report.load import Finished
from ficpd.experiments.report.summary import results_table
from ficpd.experiments.results import RunResult

SIGNS = {"ε": r"$\varepsilon$", "δ": r"$\delta$", "–": "--", "▲": r"$\uparrow$", "▼": r"$\downarrow$"}


def lines(run: Finished) -> list[dict[str, Any]]:
    """A line for each method."""
    return [_line(run.main.name, result) for result in run.results]


def _line(main: str, result: RunResult) -> dict[str, Any]:
    scores, privacy = result.scores, result.privacy
    return {
        "method": result.label,
        "epsilon": privacy.epsilon,
        "delta": privacy.delta,
        "unit": privacy.unit,
        f"everyone_{main}": (scores.global_prompt or {}).get(main),
        f"own_{main}_mean": scores.per_client_mean.get(main),
        f"own_{main}_worst": scores.per_client_worst.get(main),
        "bytes_up_client_round": result.bytes.up_per_client_round,
        "bytes_up_total": result.bytes.up_total,
        "bytes_down_total": result.bytes.down_total,
        "seconds": result.seconds.total,
        "rounds": result.num_rounds,
        "clients": result.num_clients,
        "seed": result.seed,
    }


def shown(run: Finished) -> Table:
    heads, cells = results_table(run.results) if run.results else ([], [])
    return Table("", heads, cells)


def csv(found: Sequence[Mapping[str, Any]]) -> str:
    """Empty where a line has no such figure."""
    import pandas as pd

    return pd.DataFrame(found).to_csv(index=False)


def latex(found: Sequence[Table]) -> str:
    """A `tabular` with booktabs' rules for each table."""
    return "% needs \\usepackage{booktabs}\n" + "\n".join(map(_tabular, found))


def _tabular(one: Table) -> str:
    import pandas as pd

    columns = "".join("r" if numeric else "l" for numeric in one.numeric)
    style: Any = pd.DataFrame(one.cells, columns=list(one.heads)).style.hide(axis="index")
    style = style.format(escape="latex").format_index(escape="latex", axis=1)
    drawn: str = style.to_latex(hrules=True, column_format=columns)
    for sign, command in SIGNS.items():
        drawn = drawn.replace(sign, command)
    return f"% {one.caption}\n{drawn}" if one.caption else drawn
