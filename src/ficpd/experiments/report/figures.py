"""Draws the figures of a page with plotly, in one template, each with its numbers as a table.

Values are in a metric's units. Figures and tables show them scaled.

Colours have a contrast of at least 3 to 1 with the light and the dark panel, and symbols differ as well. The page's script
sets the colour of texts. Text from data is escaped by `safe`, because plotly interprets some HTML.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from statistics import fmean
from typing import Any

import plotly.graph_objects as go

from ficpd.evaluation.metrics import Metric
from ficpd.experiments.report.blocks import Figure, Table
from ficpd.experiments.report.summary import format_number

Values = Sequence[float | None]
Point = tuple[float, float]

COLOURS = ["#2b82c4", "#d2601a", "#12936c", "#a765b3", "#a07b10", "#4797bd", "#78838d", "#cf5389"]
SYMBOLS = ["circle", "square", "diamond", "triangle-up", "cross", "triangle-down", "pentagon", "star-triangle-up"]
GREY, CLEAR, DARK = "#78838d", "rgba(0,0,0,0)", "#1b2128"
DASHED = {"color": GREY, "width": 1.5, "dash": "dash"}
AXIS = {
    "automargin": True, "fixedrange": True, "zeroline": False, "gridcolor": "rgba(128,128,128,0.25)",
    "title": {"standoff": 12, "font": {"size": 13}},
}  # fmt: skip
TEMPLATE = go.layout.Template(
    layout={
        "colorway": COLOURS, "font": {"family": "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif", "size": 13},
        "paper_bgcolor": CLEAR, "plot_bgcolor": CLEAR, "margin": {"l": 8, "r": 12, "t": 8, "b": 8}, "dragmode": False,
        "hovermode": "closest", "hoverlabel": {"bgcolor": DARK, "font": {"color": "#ffffff"}, "align": "left"},
        "xaxis": AXIS, "yaxis": AXIS,
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "bgcolor": CLEAR, "itemclick": False,
                   "itemdoubleclick": False},
    },
    data={
        "box": [{"orientation": "h", "boxpoints": "all", "jitter": 0.6, "pointpos": 0, "hoveron": "points"}],
    },
)  # fmt: skip
ROW = 46
"""The height of a named row in pixels."""


def safe(text: object, most: int = 48) -> str:
    """Escapes a text for plotly and shortens its middle.

    >>> safe("<b>north</b>")
    '&lt;b&gt;north&lt;/b&gt;'
    """
    words = " ".join(str(text).split())
    end = most // 3
    return escape(words if len(words) <= most else f"{words[: most - end - 1]}…{words[-end:]}", quote=False)


def label(text: object) -> str:
    """Shortens a text for an axis or a legend on a phone."""
    return safe(text, 24)


def named_rows(names: Sequence[str], marked: str | None = None) -> dict[str, Any]:
    """Returns an axis with a row for each name, from the top. Equal shortened names have separate rows."""
    shown = [f"<b>{label(name)}</b>" if name == marked else label(name) for name in names]
    return {"tickvals": list(range(len(names))), "ticktext": shown, "range": [len(names) - 0.5, -0.5]}


def mark(place: int, **more: Any) -> dict[str, Any]:
    """Returns the colour and symbol of a series. If colours repeat, symbols differ."""
    symbol = SYMBOLS[(place + place // len(COLOURS)) % len(SYMBOLS)]
    return {"color": COLOURS[place % len(COLOURS)], "symbol": symbol, **more}


def draw(traces: Sequence[Any], height: int, x: str, y: str = "", **layout: Any) -> go.Figure:
    """Draws traces in the template. Each entry of the legend adds to the height."""
    legend = 14 * len(traces) if len(traces) > 1 and layout.get("showlegend", True) else 0
    drawn = go.Figure(list(traces), {"template": TEMPLATE, "height": height + legend, **layout})
    return drawn.update_xaxes(title_text=x).update_yaxes(title_text=y)


def scaled(values: Values, metric: Metric) -> list[float | None]:
    return [None if value is None else metric.scale * value for value in values]


def extent(values: Iterable[float | None], metric: Metric) -> list[float]:
    """Returns the ends of an axis with all values, as a common scale for several figures."""
    known = [metric.scale * value for value in values if value is not None] or [0.0, 1.0]
    room = 0.06 * (max(known) - min(known) or 1)
    return [min(known) - room, max(known) + room]


def dots(
    id: str, title: str, said: str, names: Sequence[str], series: Mapping[str, Values], metric: Metric,
    ends: Sequence[Sequence[float] | None] = (), line: float | None = None, marked: str | None = None,
    scale: Sequence[float] | None = None,
) -> Figure:  # fmt: skip
    """Draws a row for each name and a dot for each of its values.

    ends: (low, high) or None for each value of the first series.
    line: a value to compare with.
    marked: a name in bold.
    scale: the ends of the axis.
    """
    traces = [
        go.Scatter(
            mode="markers", name=label(of), x=scaled(values, metric), y=list(range(len(names))), marker=mark(place, size=12),
            text=[safe(n) for n in names],
            hovertemplate=f"%{{text}}<br>%{{fullData.name}}: %{{x:.{metric.digits}f}}<extra></extra>",
        )
        for place, (of, values) in enumerate(series.items())
    ]  # fmt: skip
    ends = ends or [None] * len(names)
    if any(ends):
        values = next(iter(series.values()))
        known = [None if v is None or e is None else (e[1] - v, v - e[0]) for v, e in zip(values, ends, strict=True)]
        up, down = (scaled([of and of[side] for of in known], metric) for side in (0, 1))
        traces[0].error_x = {"type": "data", "symmetric": False, "array": up, "arrayminus": down, "thickness": 1.5}
    what = metric.name + metric.unit
    plot = draw(traces, 66 + ROW * len(names), what, yaxis=named_rows(names, marked), xaxis={"range": scale})
    if line is not None:
        plot.add_vline(metric.scale * line, line=DASHED)
    cells = [
        [name, *(format_number(values[i], metric, None if j else ends[i]) for j, values in enumerate(series.values()))]
        for i, name in enumerate(names)
    ]
    lines_marked = frozenset(i for i, name in enumerate(names) if name == marked)
    return Figure(id, title, said, plot, Table(f"{title}: {what}", ["", *series], cells, lines_marked))


def lines(
    id: str, title: str, said: str, curves: Mapping[str, Mapping[float, float]], metric: Metric, places: Mapping[str, int],
    level: float | None = None, scale: Sequence[float] | None = None, x: str = "round",
) -> Figure:  # fmt: skip
    """Draws curves by round, or by ε on a logarithmic axis (infinity: without privacy).

    places: the index of each curve's colour and symbol.
    level: a value to compare with.
    scale: the ends of the y axis.
    """
    at, rounds = sorted({x for curve in curves.values() for x in curve}), x == "round"
    named = {place: "none" if place == math.inf else f"{place:.3g}" if not rounds else str(place) for place in at}
    end = 4 * max([place for place in at if place < math.inf], default=1)
    ticks = {"dtick": max(1, round(max(at) / 8)), "tick0": 0, "tickformat": "d"} if rounds else {
        "type": "log", "tickvals": [min(place, end) for place in at], "ticktext": list(named.values())
    }  # fmt: skip
    traces = [
        go.Scatter(
            mode="lines+markers", name=label(name), x=[min(place, end) for place in sorted(curve)],
            y=scaled([curve[place] for place in sorted(curve)], metric), text=[named[place] for place in sorted(curve)],
            marker=mark(places[name], size=7), line={"width": 2, "color": mark(places[name])["color"]},
            hovertemplate=f"%{{fullData.name}}<br>{x} %{{text}}: %{{y:,.4~g}}<extra></extra>",
        )
        for name, curve in curves.items()
    ]  # fmt: skip
    what = metric.name + metric.unit
    plot = draw(traces, 330, x, what, xaxis=ticks, yaxis={"range": scale})
    if level is not None:
        plot.add_hline(metric.scale * level, line=DASHED)
    cells = [[named[place], *(format_number(curve.get(place), metric) for curve in curves.values())] for place in at]
    return Figure(id, title, said, plot, Table(f"{title}: {what} by {x}", [x, *curves], cells))


def front(
    id: str, title: str, said: str, names: Sequence[str], values: Sequence[float], metric: Metric,
    costs: Sequence[float], cost: str, marks: Sequence[tuple[int, int]], on_front: frozenset[int],
) -> Figure:  # fmt: skip
    """Draws values against costs on a logarithmic axis. The cost 0 is a decade below the smallest cost.

    marks: the indices of colour and symbol of each name.
    on_front: the indices of larger points, which a line joins.
    """
    known = [value for value in costs if value > 0] or [1.0]
    least, most = math.floor(math.log10(min(known))), math.ceil(math.log10(max(known)))
    ticks = {t: f"10<sup>{t}</sup>" if abs(t) > 3 else f"{10.0**t:g}" for t in range(least, max(most, least + 1) + 1)}
    ticks |= {least - 1: "0"} if min(costs) <= 0 else {}
    xs = [least - 1 if c <= 0 else math.log10(c) for c in costs]
    ys, what = [metric.scale * value for value in values], metric.name + metric.unit
    cells = [[name, metric.shown(v), f"{c:,.0f}"] for name, v, c in zip(names, values, costs, strict=True)]
    traces = [
        go.Scatter(
            mode="markers", name=label(names[i]), x=[xs[i]], y=[ys[i]], text=[safe(names[i])],
            marker={**mark(marks[i][0]), "symbol": mark(marks[i][1])["symbol"], "size": 22 if i in on_front else 13},
            hovertemplate=f"%{{text}}<br>{cells[i][1]}{metric.unit}, {cost} {cells[i][2]}<extra></extra>",
        )
        for i in sorted(range(len(names)), key=lambda i: i not in on_front)
    ]  # fmt: skip
    axis = {"tickvals": list(ticks), "ticktext": list(ticks.values()), "range": [min(ticks) - 0.5, max(ticks) + 0.5]}
    plot = draw(traces, 360, cost, what, xaxis=axis)
    on = sorted((xs[i], ys[i]) for i in on_front)
    plot.add_scatter(mode="lines", x=[x for x, _ in on], y=[y for _, y in on], hoverinfo="skip", showlegend=False,
                     line={"color": GREY, "width": 1.5, "shape": "hv"})  # fmt: skip
    return Figure(id, title, said, plot, Table(f"{title}: {what}", ["", what, cost], cells, on_front))


def spread(
    id: str, title: str, said: str, values: Mapping[str, Mapping[str, float]], metric: Metric, places: Mapping[str, int],
    scale: Sequence[float] | None = None,
) -> Figure:  # fmt: skip
    """Draws each method's clients: a box, a dot for each client, a stroke for the mean of the worst tenth."""
    traces: list[Any] = [
        go.Box(
            name=label(method), x=scaled(list(of.values()), metric), y=[row] * len(of), text=[safe(client) for client in of],
            marker={"color": mark(places[method])["color"], "size": 6, "opacity": 0.75}, line={"width": 1.5},
            hovertemplate=f"%{{text}}: %{{x:.{metric.digits}f}}<extra></extra>",
        )
        for row, (method, of) in enumerate(values.items())
    ]  # fmt: skip
    ranked = [sorted(of.values(), reverse=metric.less_is_better) for of in values.values()]
    tails = [fmean(of[: -(-len(of) // 10)]) for of in ranked]
    traces.append(go.Scatter(
        mode="markers", x=scaled(tails, metric), y=list(range(len(tails))),
        hovertemplate=f"worst tenth, mean: %{{x:.{metric.digits}f}}<extra></extra>",
        marker={"symbol": "line-ns-open", "size": 26, "color": GREY, "line": {"width": 3}},
    ))  # fmt: skip
    what = metric.name + metric.unit
    plot = draw(traces, 70 + 62 * len(values), what, showlegend=False, boxgap=0.45, yaxis=named_rows(list(values)),
                xaxis={"range": scale})  # fmt: skip
    cells = [
        [name, str(len(of)), *map(metric.shown, (of[0], tail, of[-1]))]
        for name, of, tail in zip(values, ranked, tails, strict=True)
    ]
    heads = ["method", "clients", "worst", "worst tenth, mean", "best"]
    return Figure(id, title, said, plot, Table(f"{title}: own test {what}", heads, cells))


def against(id: str, title: str, said: str, of: Mapping[str, Point], heads: tuple[str, str], metric: Metric) -> Figure:
    """Draws a dot for each client, and the line of equal values."""
    xs, ys = ([metric.scale * both[i] for both in of.values()] for i in (0, 1))
    low, high = min(xs + ys), max(xs + ys)
    room = 0.06 * (high - low or 1)
    ends = [low - room, high + room]
    trace = go.Scatter(
        mode="markers", x=xs, y=ys, text=[safe(n) for n in of], marker=mark(0, size=10, opacity=0.75),
        hovertemplate=f"%{{text}}<br>%{{x:.{metric.digits}f}}, %{{y:.{metric.digits}f}}<extra></extra>",
    )  # fmt: skip
    plot = draw([trace], 440, *(f"{head}{metric.unit}" for head in heads), xaxis={"range": ends}, yaxis={"range": ends})
    plot.add_shape(type="line", x0=ends[0], y0=ends[0], x1=ends[1], y1=ends[1], line=DASHED)
    cells = [[name, *map(metric.shown, both)] for name, both in of.items()]
    return Figure(
        id, title, said, plot, Table(f"{title}: own test {metric.name}{metric.unit}", ["client", *heads], cells)
    )


def plane(
    id: str, title: str, said: str, at: Mapping[str, Point], member: Mapping[str, int], prompts: Mapping[str, Point],
    axes: tuple[str, str],
) -> Figure:  # fmt: skip
    """Draws clients (`at`), each joined to its prototype, and the prompts, larger and with names."""
    traces: list[Any] = []
    for k in sorted(set(member.values())):
        own, centre = [name for name in at if member.get(name) == k], prompts.get(f"prototype-{k}")
        if centre and own:
            ties = {axis: [v for name in own for v in (at[name][i], centre[i], None)] for i, axis in enumerate("xy")}
            traces.append(
                go.Scatter(mode="lines", hoverinfo="skip", line={"color": AXIS["gridcolor"], "width": 1}, **ties)
            )
        traces.append(go.Scatter(
            mode="markers", x=[at[n][0] for n in own], y=[at[n][1] for n in own], text=[safe(n) for n in own],
            marker=mark(k, size=9, opacity=0.85), hovertemplate=f"%{{text}}<br>prototype-{k}<extra></extra>",
        ))  # fmt: skip
    numbers = {name: name.rpartition("-")[2] for name in prompts}
    colours = [
        mark(int(k))["color"] if name.startswith("prototype-") and k.isdigit() else GREY for name, k in numbers.items()
    ]
    traces.append(go.Scatter(
        mode="markers+text", x=[p[0] for p in prompts.values()], y=[p[1] for p in prompts.values()], cliponaxis=False,
        text=[label(name) for name in prompts], textposition="top center", hovertemplate="%{text}<extra></extra>",
        marker={"symbol": "star", "size": 17, "color": colours, "line": {"color": GREY, "width": 1.2}},
    ))  # fmt: skip
    cells = [[name, "prompt", *(f"{v:.3f}" for v in xy)] for name, xy in prompts.items()]
    cells += [[name, f"client of prototype-{member[name]}", *(f"{v:.3f}" for v in xy)] for name, xy in at.items()]
    numbers = Table(f"{title}: places", ["name", "what", *axes], cells)
    return Figure(id, title, said, draw(traces, 480, *axes, showlegend=False), numbers)
