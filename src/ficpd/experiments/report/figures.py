"""Figures of a page: plotly's graph objects in one template.

Colours have a contrast of at least 3 to 1 with the light and the dark panel, and symbols differ as well. The page's script
adds the colour of texts. Text from data goes through `safe`, because plotly reads a little HTML in its texts.
"""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import plotly.graph_objects as go

Values = Sequence[float | None]
Curves = Mapping[str, tuple[Sequence[float], Sequence[float]]]

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
        "heatmap": [{
            "colorscale": [[0, "#f7f5f0"], [1, "#7fbde8"]], "textfont": {"color": DARK}, "xgap": 2, "ygap": 2, "zmax": 1,
            "colorbar": {"thickness": 10, "outlinewidth": 0}, "hovertemplate": "%{hovertext}: %{z:.2f}<extra></extra>",
        }],
        "bar": [{"orientation": "h", "textposition": "none"}],
        "box": [{"orientation": "h", "boxpoints": "all", "jitter": 0.6, "pointpos": 0, "hoveron": "points"}],
    },
)  # fmt: skip
ROW = 46
"""Pixels of a line of names."""


def safe(text: object, most: int = 48) -> str:
    """Escapes a text for plotly and shortens it in its middle.

    >>> safe("<b>north</b>")
    '&lt;b&gt;north&lt;/b&gt;'
    """
    words = " ".join(str(text).split())
    end = most // 3
    return escape(words if len(words) <= most else f"{words[: most - end - 1]}…{words[-end:]}", quote=False)


def label(text: object) -> str:
    """Shortens a text to the width of an axis or a legend on a telephone."""
    return safe(text, 24)


def named_rows(names: Sequence[str], marked: str | None = None) -> dict[str, Any]:
    """Returns an axis with a line for each name, from the top; names that are shortened alike keep their own lines."""
    shown = [f"<b>{label(name)}</b>" if name == marked else label(name) for name in names]
    return {"tickvals": list(range(len(names))), "ticktext": shown, "range": [len(names) - 0.5, -0.5]}


def mark(place: int, **more: Any) -> dict[str, Any]:
    """Returns colour and symbol of a series; the symbol differs where colours repeat."""
    symbol = SYMBOLS[(place + place // len(COLOURS)) % len(SYMBOLS)]
    return {"color": COLOURS[place % len(COLOURS)], "symbol": symbol, **more}


def figure(traces: Sequence[Any], height: int, x: str, y: str = "", **layout: Any) -> go.Figure:
    """Draws traces in the template. Each entry of a legend adds to the height."""
    legend = 14 * len(traces) if len(traces) > 1 and layout.get("showlegend", True) else 0
    drawn = go.Figure(list(traces), {"template": TEMPLATE, "height": height + legend, **layout})
    return drawn.update_xaxes(title_text=x).update_yaxes(title_text=y)


def dots(
    names: Sequence[str], series: Mapping[str, Values], x: str, ends: Sequence[Any] = (),
    line: float | None = None, shown: str = ".1f", marked: str | None = None,
) -> go.Figure:  # fmt: skip
    """Draws a line for each name and a dot for each of its values.

    `ends`: (low, high) or None for the first series. `line`: a value to compare with. `marked`: a name in bold.
    """
    traces = [
        go.Scatter(
            mode="markers", name=label(of), x=list(values), y=list(range(len(names))), text=[safe(n) for n in names],
            marker=mark(place, size=12), hovertemplate=f"%{{text}}<br>%{{fullData.name}}: %{{x:{shown}}}<extra></extra>",
        )
        for place, (of, values) in enumerate(series.items())
    ]  # fmt: skip
    if any(ends):
        values = next(iter(series.values()))
        known = [None if v is None or e is None else (e[1] - v, v - e[0]) for v, e in zip(values, ends, strict=True)]
        up, down = ([of and of[side] for of in known] for side in (0, 1))
        traces[0].error_x = {"type": "data", "symmetric": False, "array": up, "arrayminus": down, "thickness": 1.5}
    drawn = figure(traces, 66 + ROW * len(names), x, yaxis=named_rows(names, marked))
    return drawn if line is None else drawn.add_vline(line, line=DASHED)


def lines(curves: Curves, y: str, level: float | None, places: Mapping[str, int]) -> go.Figure:
    """Draws curves over the rounds. `level`: a value to compare with. `places`: the colour and symbol of each curve."""
    most = max((xs[-1] for xs, _ in curves.values()), default=1)
    traces = [
        go.Scatter(
            mode="lines+markers", name=label(name), x=list(xs), y=list(ys), marker=mark(places[name], size=7),
            line={"width": 2, "color": mark(places[name])["color"]},
            hovertemplate="%{fullData.name}<br>round %{x}: %{y:,.4~g}<extra></extra>",
        )
        for name, (xs, ys) in curves.items()
    ]  # fmt: skip
    drawn = figure(traces, 330, "round", y, xaxis={"dtick": max(1, round(most / 8)), "tick0": 0, "tickformat": "d"})
    return drawn if level is None else drawn.add_hline(level, line=DASHED)


def bubbles(
    names: Sequence[str], xs: Sequence[float], ys: Sequence[float], sizes: Sequence[float], texts: Sequence[str],
    x: str, y: str, marks: Sequence[tuple[int, int]], xaxis: Mapping[str, Any],
) -> go.Figure:  # fmt: skip
    """Draws a bubble for each name, the largest first. `marks`: the colour and the symbol of each."""
    traces = [
        go.Scatter(
            mode="markers", name=label(names[i]), x=[xs[i]], y=[ys[i]], text=[f"{safe(names[i])}<br>{safe(texts[i])}"],
            marker={**mark(marks[i][0]), "symbol": mark(marks[i][1])["symbol"], "size": sizes[i]},
            hovertemplate="%{text}<extra></extra>",
        )
        for i in sorted(range(len(names)), key=lambda i: -sizes[i])
    ]  # fmt: skip
    return figure(traces, 360, x, y, xaxis=xaxis)


def spread(
    values: Mapping[str, Mapping[str, float]], tails: Mapping[str, float | None], x: str, shown: str,
    places: Mapping[str, int],
) -> go.Figure:  # fmt: skip
    """Draws a box and all dots of each method: `values` by method and client; `tails`: the mean of the worst tenth."""
    traces: list[Any] = [
        go.Box(
            name=label(method), x=list(of.values()), y=[row] * len(of), text=[safe(client) for client in of],
            marker={"color": mark(places[method])["color"], "size": 6, "opacity": 0.75}, line={"width": 1.5},
            hovertemplate=f"%{{text}}: %{{x:{shown}}}<extra></extra>",
        )
        for row, (method, of) in enumerate(values.items())
    ]  # fmt: skip
    known = {row: tails[method] for row, method in enumerate(values) if tails.get(method) is not None}
    traces.append(go.Scatter(
        mode="markers", x=list(known.values()), y=list(known),
        hovertemplate=f"worst tenth, mean: %{{x:{shown}}}<extra></extra>",
        marker={"symbol": "line-ns-open", "size": 26, "color": GREY, "line": {"width": 3}},
    ))  # fmt: skip
    height = 70 + 62 * len(values)
    return figure(traces, height, x, showlegend=False, boxgap=0.45, yaxis=named_rows(list(values)))


def against(xs: Mapping[str, float], ys: Mapping[str, float], x: str, y: str, shown: str = ".1f") -> go.Figure:
    """Draws a dot for each client, and the line on which both values are equal."""
    names = [name for name in ys if name in xs]
    low, high = min([*xs.values(), *ys.values()]), max([*xs.values(), *ys.values()])
    room = 0.06 * (high - low or 1)
    ends = [low - room, high + room]
    trace = go.Scatter(
        mode="markers", x=[xs[n] for n in names], y=[ys[n] for n in names], text=[safe(n) for n in names],
        marker=mark(0, size=10, opacity=0.75),
        hovertemplate=f"%{{text}}<br>alone %{{x:{shown}}}, together %{{y:{shown}}}<extra></extra>",
    )  # fmt: skip
    drawn = figure([trace], 440, x, y, xaxis={"range": ends}, yaxis={"range": ends})
    return drawn.add_shape(type="line", x0=ends[0], y0=ends[0], x1=ends[1], y1=ends[1], line=DASHED)


def plane(
    at: Mapping[str, tuple[float, float]], member: Mapping[str, int], prompts: Mapping[str, tuple[float, float]],
    x: str, y: str,
) -> go.Figure:  # fmt: skip
    """Draws clients (`at`), each tied to its prototype, and the prompts, larger and named."""
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
    return figure(traces, 480, x, y, showlegend=False)


def heat(names: Sequence[str], cosine_NN: Sequence[Sequence[float]]) -> go.Figure:
    """Draws similarities between names, with their numbers where there is room for them."""
    full, rows = [safe(name) for name in names], named_rows(names)
    few = len(names) <= 12
    trace = go.Heatmap(
        z=cosine_NN, zmin=min(0.9, *(min(line) for line in cosine_NN)), showscale=not few,
        hovertext=[[f"{a}, {b}" for b in full] for a in full], texttemplate="%{z:.2f}" if few else None,
    )  # fmt: skip
    return figure([trace], 70 + min(34 * len(names), 560), "", xaxis={**rows, "range": rows["range"][::-1]}, yaxis=rows)


def bars(names: Sequence[str], values: Sequence[float], x: str, shown: str, most: float) -> go.Figure:
    trace = go.Bar(
        x=list(values), y=list(range(len(names))), text=[safe(name) for name in names], marker_color=COLOURS[0],
        hovertemplate=f"%{{text}}: %{{x:{shown}}}<extra></extra>",
    )  # fmt: skip
    return figure([trace], 70 + ROW * len(names), x, bargap=0.35, xaxis={"range": [0, most]}, yaxis=named_rows(names))
