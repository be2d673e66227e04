"""Figures as plotly.js draws them: plain mappings, so that plotly itself is only read as a file.

Colours are names of the page's CSS properties (`--c0`): the page puts in what they are in light or dark. Whatever comes
from data goes through `safe`, because plotly reads a little HTML in its texts. Numbers are rounded to six digits.
"""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

Plot = dict[str, Any]

COLOURS = [f"--c{i}" for i in range(8)]
SYMBOLS = ["circle", "square", "diamond", "triangle-up", "cross", "triangle-down", "pentagon", "star-triangle-up"]
INK, SOFT, LINE, PANEL = "--ink", "--soft", "--line", "--panel"
OUTLINES = {
    "circle": "M5 0A5 5 0 1 1-5 0A5 5 0 1 1 5 0Z", "square": "M-5-5H5V5H-5Z", "diamond": "M0-6.5L6.5 0L0 6.5L-6.5 0Z",
    "triangle-up": "M0-6L6 4.5H-6Z", "cross": "M-2-6H2V-2H6V2H2V6H-2V2H-6V-2H-2Z", "triangle-down": "M0 6L6-4.5H-6Z",
    "pentagon": "M0-6L5.7-1.9L3.5 4.9H-3.5L-5.7-1.9Z", "star-triangle-up": "M0-7Q1.5 1 6 4Q0 2 -6 4Q-1.5 1 0-7Z",
}  # fmt: skip
ROW = 46
"""Pixels for a line of names."""


def safe(text: object, most: int = 48) -> str:
    """Text that plotly shows as it is, shortened in its middle.

    >>> safe("<b>north</b>")
    '&lt;b&gt;north&lt;/b&gt;'
    """
    words = " ".join(str(text).split())
    end = most // 3
    return escape(words if len(words) <= most else f"{words[: most - end - 1]}…{words[-end:]}", quote=False)


def label(text: object) -> str:
    """What an axis or a legend has room for, on a telephone too."""
    return safe(text, 24)


def named_rows(names: Sequence[str], marked: str | None = None) -> Plot:
    """An axis with a line for each name, from the top; two names that are shortened alike are two lines all the same."""
    shown = [f"<b>{label(name)}</b>" if name == marked else label(name) for name in names]
    return {"tickvals": list(range(len(names))), "ticktext": shown, "range": [len(names) - 0.5, -0.5]}


def rounded(values: Sequence[float | None]) -> list[float | None]:
    return [None if value is None else float(f"{value:.6g}") for value in values]


def colour(place: int) -> str:
    return COLOURS[place % len(COLOURS)]


def symbol(place: int) -> str:
    """Another one when colours come round again, too."""
    return SYMBOLS[(place + place // len(COLOURS)) % len(SYMBOLS)]


def plot(data: list[Plot], height: int, x: str = "", y: str = "", **layout: Any) -> Plot:
    """`x`, `y`: what the axes are called. Nested settings of `layout` are added to ours."""
    own: Plot = {
        "height": height,
        "margin": {"l": 8, "r": 12, "t": 8, "b": 8},
        "xaxis": {"title": {"text": x}, "automargin": True, **layout.pop("xaxis", {})},
        "yaxis": {"title": {"text": y}, "automargin": True, **layout.pop("yaxis", {})},
        "showlegend": False,
    }
    return {"data": data, "layout": {**own, **layout}}


def dots(
    names: Sequence[str], series: Mapping[str, Sequence[float | None]], x: str, ends: Sequence[Any] = (),
    line: float | None = None, shown: str = ".1f", marked: str | None = None,
) -> Plot:  # fmt: skip
    """A line for each name and a dot for each figure of it. `ends`: (low, high) or None for the first series; `line`: a
    value to compare with; `marked`: the name that the page is about."""
    data = []
    for place, (of, values) in enumerate(series.items()):
        trace: Plot = {
            "type": "scatter", "mode": "markers", "name": label(of), "meta": str(of), "x": rounded(values),
            "y": list(range(len(names))), "text": [safe(name) for name in names],
            "marker": {"color": colour(place), "symbol": symbol(place), "size": 12},
            "hovertemplate": f"%{{text}}<br>%{{fullData.name}}: %{{x:{shown}}}<extra></extra>",
        }  # fmt: skip
        if place == 0 and any(ends):
            trace["error_x"] = whiskers(values, ends) | {"color": colour(0)}
        data.append(trace)
    shapes = [] if line is None else [upright(line)]
    return plot(
        data, 66 + ROW * len(names), x, shapes=shapes,
        yaxis=named_rows(names, marked),
    )  # fmt: skip


def whiskers(values: Sequence[float | None], ends: Sequence[Any]) -> Plot:
    up = [None if v is None or e is None else e[1] - v for v, e in zip(values, ends, strict=True)]
    down = [None if v is None or e is None else v - e[0] for v, e in zip(values, ends, strict=True)]
    return {
        "type": "data", "symmetric": False, "array": rounded(up), "arrayminus": rounded(down), "thickness": 1.5, "width": 5
    }  # fmt: skip


def upright(value: float) -> Plot:
    """A dashed line at a value of the x axis."""
    return {"type": "line", "x0": value, "x1": value, "yref": "paper", "y0": 0, "y1": 1,
            "line": {"color": SOFT, "width": 1.5, "dash": "dash"}}  # fmt: skip


def level(value: float) -> Plot:
    """A dashed line at a value of the y axis."""
    return {"type": "line", "y0": value, "y1": value, "xref": "paper", "x0": 0, "x1": 1,
            "line": {"color": SOFT, "width": 1.5, "dash": "dash"}}  # fmt: skip


def lines(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], y: str, level_at: float | None,
    places: Mapping[str, int],
) -> Plot:  # fmt: skip
    """Curves by name over the rounds, each (rounds, values). `places`: which colour and symbol each has."""
    most = max((xs[-1] for xs, _ in curves.values()), default=1)
    data = [
        {
            "type": "scatter", "mode": "lines+markers", "name": label(name), "meta": str(name),
            "x": rounded(xs), "y": rounded(ys), "line": {"color": colour(places[name]), "width": 2},
            "marker": {"symbol": symbol(places[name]), "size": 7, "color": colour(places[name])},
            "hovertemplate": "%{fullData.name}<br>round %{x}: %{y:,.4~g}<extra></extra>",
        }
        for name, (xs, ys) in curves.items()
    ]  # fmt: skip
    shapes = [] if level_at is None else [level(level_at)]
    axis = {"dtick": max(1, round(most / 8)), "tick0": 0, "tickformat": "d"}
    return plot(data, 330, "round", y, shapes=shapes, xaxis=axis)


def bubbles(
    names: Sequence[str], xs: Sequence[float], ys: Sequence[float], sizes: Sequence[float], texts: Sequence[str],
    x: str, y: str, marks: Sequence[tuple[int, int]], xaxis: Plot | None = None,
) -> Plot:  # fmt: skip
    """A bubble for each name, `sizes` in pixels across. `marks`: which colour and which symbol each has."""
    data = [
        {
            "type": "scatter", "mode": "markers", "name": label(name), "meta": str(name),
            "x": rounded([xs[i]]), "y": rounded([ys[i]]),
            "marker": {"size": sizes[i], "color": colour(marks[i][0]), "symbol": symbol(marks[i][1]), "opacity": 0.8,
                       "line": {"color": PANEL, "width": 1}},
            "text": [f"{safe(name)}<br>{safe(texts[i])}"], "hovertemplate": "%{text}<extra></extra>",
        }
        for i, name in sorted(enumerate(names), key=lambda pair: -sizes[pair[0]])
    ]  # fmt: skip
    return plot(data, 360, x, y, xaxis=xaxis or {})


def spread(
    values: Mapping[str, Mapping[str, float]], tails: Mapping[str, float | None], x: str, shown: str,
    places: Mapping[str, int],
) -> Plot:  # fmt: skip
    """A box and all its dots for each method: `values` by method and client; `tails`: the mean of the worst tenth."""
    data: list[Plot] = []
    for row, (method, of) in enumerate(values.items()):
        place = places[method]
        data.append({
            "type": "box", "orientation": "h", "name": label(method), "x": rounded(list(of.values())),
            "y": [row] * len(of), "text": [safe(client) for client in of],
            "boxpoints": "all", "jitter": 0.6, "pointpos": 0, "hoveron": "points", "fillcolor": "--wash",
            "line": {"color": colour(place), "width": 1.5},
            "marker": {"color": colour(place), "size": 6, "opacity": 0.75},
            "hovertemplate": f"%{{text}}: %{{x:{shown}}}<extra></extra>",
        })  # fmt: skip
    marked = {row: tails[method] for row, method in enumerate(values) if tails.get(method) is not None}
    data.append({
        "type": "scatter", "mode": "markers", "name": "worst tenth", "x": rounded(list(marked.values())),
        "y": list(marked),
        "marker": {"symbol": "line-ns-open", "size": 26, "color": INK, "line": {"width": 2.5}},
        "hovertemplate": f"worst tenth, mean: %{{x:{shown}}}<extra></extra>",
    })  # fmt: skip
    return plot(data, 70 + 62 * len(values), x, boxgap=0.45, yaxis=named_rows(list(values)))  # fmt: skip


def against(xs: Mapping[str, float], ys: Mapping[str, float], x: str, y: str, shown: str = ".1f") -> Plot:
    """A dot for each client, and the line on which both are equal."""
    names = [name for name in ys if name in xs]
    ends = [min([*xs.values(), *ys.values()]), max([*xs.values(), *ys.values()])]
    room = 0.06 * (ends[1] - ends[0] or 1)
    ends = [ends[0] - room, ends[1] + room]
    dot = {
        "type": "scatter", "mode": "markers", "x": rounded([xs[n] for n in names]), "y": rounded([ys[n] for n in names]),
        "text": [safe(name) for name in names],
        "marker": {"color": colour(0), "size": 10, "opacity": 0.75, "line": {"color": PANEL, "width": 1}},
        "hovertemplate": f"%{{text}}<br>alone %{{x:{shown}}}, together %{{y:{shown}}}<extra></extra>",
    }  # fmt: skip
    line = {"type": "line", "x0": ends[0], "y0": ends[0], "x1": ends[1], "y1": ends[1],
            "line": {"color": SOFT, "width": 1.5, "dash": "dash"}}  # fmt: skip
    return plot([dot], 440, x, y, shapes=[line], xaxis={"range": ends}, yaxis={"range": ends})


def legend(plot: Plot) -> list[tuple[str, str, str]]:
    """Name, colour and outline (an SVG path around 0, 0) of each trace that has a name to be told by; none of one alone. It
    stands beside the figure, where it has room, and is text."""
    named = [trace for trace in plot["data"] if "meta" in trace]
    return [
        (trace["meta"], trace["marker"].get("color") or trace["line"]["color"], OUTLINES[trace["marker"]["symbol"]])
        for trace in named if len(named) > 1
    ]  # fmt: skip


def drawn(plot: Plot) -> Plot:
    """What the page's script is given: without the names that are the legend's."""
    return {**plot, "data": [{key: value for key, value in trace.items() if key != "meta"} for trace in plot["data"]]}


def plane(
    at: Mapping[str, tuple[float, float]],
    member: Mapping[str, int],
    prompts: Mapping[str, tuple[float, float]],
    x: str,
    y: str,
) -> Plot:
    """Clients (`at`), each tied to its prototype; `prompts` are drawn large and named."""
    data: list[Plot] = []
    for k in sorted(set(member.values())):
        own = [name for name in at if member.get(name) == k]
        centre = prompts.get(f"prototype-{k}")
        if centre and own:
            tied = [(*at[name], *centre) for name in own]
            data.append({
                "type": "scatter", "mode": "lines", "hoverinfo": "skip", "line": {"color": LINE, "width": 1},
                "x": [v for a in tied for v in (*rounded([a[0], a[2]]), None)],
                "y": [v for a in tied for v in (*rounded([a[1], a[3]]), None)],
            })  # fmt: skip
        data.append({
            "type": "scatter", "mode": "markers", "name": f"clients of prototype-{k}",
            "x": rounded([at[n][0] for n in own]), "y": rounded([at[n][1] for n in own]), "text": [safe(n) for n in own],
            "marker": {"color": colour(k), "symbol": symbol(k), "size": 9, "opacity": 0.85},
            "hovertemplate": f"%{{text}}<br>prototype-{k}<extra></extra>",
        })  # fmt: skip
    names = list(prompts)
    data.append({
        "type": "scatter", "mode": "markers+text", "x": rounded([prompts[n][0] for n in names]),
        "y": rounded([prompts[n][1] for n in names]), "text": [label(n) for n in names], "textposition": "top center",
        "marker": {"symbol": "star", "size": 17, "color": [_of_prompt(n) for n in names],
                   "line": {"color": INK, "width": 1.2}},
        "textfont": {"color": INK, "size": 12}, "cliponaxis": False, "hovertemplate": "%{text}<extra></extra>",
    })  # fmt: skip
    return plot(data, 480, x, y)


def _of_prompt(name: str) -> str:
    """A prototype has its clients' colour."""
    number = name.rpartition("-")[2]
    return colour(int(number)) if name.startswith("prototype-") and number.isdigit() else PANEL


def heat(names: Sequence[str], cosine_NN: Sequence[Sequence[float]]) -> Plot:
    """Similarities between everything named, with their numbers where there is room for them."""
    full = [safe(name) for name in names]
    trace: Plot = {
        "type": "heatmap", "z": [[round(v, 3) for v in line] for line in cosine_NN],
        "hovertext": [[f"{a}, {b}" for b in full] for a in full],
        "zmin": min(0.9, *(min(line) for line in cosine_NN)), "zmax": 1, "colorscale": [[0, "--heat0"], [1, "--heat1"]],
        "xgap": 2, "ygap": 2, "colorbar": {"thickness": 10, "outlinewidth": 0}, "showscale": len(names) > 12,
        "hovertemplate": "%{hovertext}: %{z:.2f}<extra></extra>",
    }  # fmt: skip
    if len(names) <= 12:
        trace |= {"texttemplate": "%{z:.2f}", "textfont": {"color": INK}}
    height = 70 + min(34 * len(names), 560)
    rows = named_rows(names)
    return plot([trace], height, xaxis={**rows, "range": rows["range"][::-1]}, yaxis=rows)


def bars(names: Sequence[str], values: Sequence[float], x: str, shown: str, most: float) -> Plot:
    data: list[Plot] = [{
        "type": "bar", "orientation": "h", "x": rounded(values), "y": list(range(len(names))),
        "text": [safe(name) for name in names], "textposition": "none", "marker": {"color": colour(0)},
        "hovertemplate": f"%{{text}}: %{{x:{shown}}}<extra></extra>",
    }]  # fmt: skip
    return plot(data, 70 + ROW * len(names), x, bargap=0.35, xaxis={"range": [0, most]}, yaxis=named_rows(names))
