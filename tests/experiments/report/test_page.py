"""A page's facts, its escaping and its size, without a browser."""

import json
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import made_up
import pytest
from typer.testing import CliRunner

import small
from ficpd.cli import app
from ficpd.errors import RunError
from ficpd.experiments.comparison.schema import ComparisonResult
from ficpd.experiments.finished import FinishedRun
from ficpd.experiments.report import figures
from ficpd.experiments.report.blocks import Figure, Page, Section, Table, Text
from ficpd.experiments.report.build import page_of, write_page, write_tables
from ficpd.experiments.report.comparison import headline
from ficpd.experiments.report.summary import results_table

LIMIT = 6_000_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return made_up.run(tmp_path_factory.mktemp("page") / "run")


@pytest.fixture(scope="module")
def compared(tmp_path_factory) -> Path:
    return made_up.comparison(tmp_path_factory.mktemp("page") / "compared")


@pytest.fixture(scope="module")
def html(folder) -> str:
    return write_page(folder).read_text()


@pytest.fixture(scope="module")
def both(html, compared) -> list[str]:
    return [html, write_page(compared).read_text()]


class Reader(HTMLParser):
    """All elements with their attributes, and the text of a page, without its scripts and styles."""

    def __init__(self, html: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.inside: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.inside.append(tag)

    def handle_endtag(self, tag):
        while self.inside and self.inside.pop() != tag:
            pass

    def handle_data(self, data):
        if not {"script", "style"} & {*self.inside[-1:]}:
            self.texts.append(data)

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def plots_of(html: str) -> dict[str, Any]:
    """The figures of a rendered page, as its script reads them."""
    found = re.search(r'<script type="application/json" id="plots">(.*?)</script>', html, re.DOTALL)
    assert found
    return json.loads(found.group(1))


def tables_of(page: Page) -> list[Table]:
    return [block for section in page.sections for block in section.blocks if isinstance(block, Table)]


# ---------------------------------------------------------------- what is on it


def test_the_first_screen_says_whether_joining_pays(folder):
    page = page_of(folder)
    assert page.headline == "Joining pays 5.0 points over alone."
    told = [block.words for block in page.lead if isinstance(block, Text)]
    assert any(
        words.startswith("Together 69.0, alone 64.0, no prompt 49.0 (accuracy in %, mean of 12") for words in told
    )


def test_the_table_has_the_numbers_of_the_screen(folder):
    run = FinishedRun.load(folder)
    heads, cells = results_table(run.results)
    shown = next(t for t in tables_of(page_of(folder)) if t.heads == heads)
    assert shown.cells == cells
    assert [line[0] for line in cells] == ["zero_shot", "local", "fedavg", "ficpd"]
    assert shown.marked == {3}


def test_every_section_of_a_whole_run_is_there(folder):
    found = [section.id for section in page_of(folder).sections]
    assert found == [
        "methods", "costs", "rounds", "clients", "levels", "prototypes", "library", "examples", "privacy", "audit", "run",
    ]  # fmt: skip


def test_sections_without_data_are_left_out(folder, tmp_path):
    small.run(tmp_path, "fedavg")
    page = page_of(tmp_path / "run")
    assert {s.id for s in page.sections} == {"methods", "costs", "rounds", "clients", "library", "privacy", "run"}
    assert all(section.blocks for section in page.sections)


def test_a_real_run_of_prototypes_is_drawn_with_its_clients(tmp_path):
    small.run(tmp_path, "ficpd", "method.num_prototypes=2", "federation.evaluate_records=0", "privacy.name=record_gaussian",
              "privacy.epsilon=8", 'baselines=["local"]')  # fmt: skip
    page = page_of(tmp_path / "run")
    by_id = {figure.id: figure for figure in page.figures}
    assert {"glance", "spread", "alone", "plane", "curve-own", "curve-global", "sites"} <= by_id.keys()
    clients = [line[0] for line in by_id["plane"].numbers.cells if line[1].startswith("client")]
    assert sorted(clients) == ["site-0", "site-1", "site-2"]
    assert len({tuple(line[2:]) for line in by_id["plane"].numbers.cells}) > 3
    last = [line for line in by_id["curve-own"].numbers.cells if line[0] == "3"]
    own = next(line for line in tables_of(page)[0].cells if line[0] == "ficpd")
    assert last[0][list(by_id["curve-own"].numbers.heads).index("ficpd")] == own[3]


def test_clients_are_listed_with_their_prototype_where_no_more_is_known(tmp_path):
    folder = made_up.run(tmp_path / "run", clients=4)
    (folder / "checkpoint").unlink()
    page = page_of(folder)
    plane = next(figure for figure in page.figures if figure.id == "plane")
    assert {line[1] for line in plane.numbers.cells} == {"prompt"}
    assert ["prototype-1", "2", "site-1, site-3"] in [line for table in tables_of(page) for line in table.cells]


def test_a_comparison_of_one_method_says_what_it_has(tmp_path):
    folder = made_up.comparison(tmp_path / "compared")
    tree = json.loads((folder / "compare.json").read_text())
    for at in tree["conditions"]:
        at["methods"] = {name: of for name, of in at["methods"].items() if name in ("zero_shot", "ficpd")}
    (folder / "compare.json").write_text(json.dumps(tree))
    assert "ficpd has 80.0 % accuracy, 80.0 % accuracy" in headline(ComparisonResult.load(folder))
    tree["conditions"] = []
    (folder / "compare.json").write_text(json.dumps(tree))
    assert headline(ComparisonResult.load(folder)).endswith("ficpd has not finished anything yet.")


def test_a_legend_names_the_methods_that_are_drawn(html):
    named = [trace["name"] for trace in plots_of(html)["curve-own"]["data"] if trace.get("showlegend", True)]
    assert sorted(named) == ["fedavg", "ficpd", "local"]


def test_a_comparison_says_who_beats_whom(compared):
    page = page_of(compared)
    assert page.headline == "ficpd beats other methods in 4 of 8 comparisons, is beaten in 0, and 4 are undecided."
    assert [s.id for s in page.sections] == [
        "grid", "ranks", "fronts", "curves", "targets", "clients", "failures", "compared"
    ]  # fmt: skip
    matrix = tables_of(page)[0]
    assert next(line for line in matrix.cells if line[0] == "fedavg")[1] == "74.0 ± 2.0 ▼"
    curve = next(figure for figure in page.figures if figure.id == "way-0")
    assert [line[0] for line in curve.numbers.cells] == ["1", "2", "3"]
    spread = next(figure for figure in page.figures if figure.id == "clients-0")
    assert ["fedavg", "15", "64.0", "64.0", "84.0"] in spread.numbers.cells
    (failure,) = next(s for s in page.sections if s.id == "failures").blocks
    assert isinstance(failure, Text)
    assert failure.words.startswith("ficpd (")
    assert failure.words.endswith(f"seeds 2: {made_up.HOSTILE}")


# ---------------------------------------------------------------- escaping


def test_nothing_from_data_becomes_an_element(both):
    for html in both:
        page = Reader(html)
        assert [a.get("id") for a in page.named("script")] == ["plots", None, None]
        assert page.named("img") == []
        assert not [key for _, attributes in page.elements for key in attributes if key.startswith("on")]
        text = "".join(page.texts)
        assert made_up.HOSTILE in text
        assert made_up.LABEL in text


def test_nothing_from_data_becomes_html_in_a_figure(both):
    for html in both:
        shown = json.dumps(plots_of(html), ensure_ascii=False)
        assert "site-1" in shown or "fedavg" in shown
        assert "<script" not in shown
        assert "<img" not in shown
        templates = re.findall(r'"hovertemplate": "(.*?)"', shown)
        assert templates
        assert not [t for t in templates if "onmouseover" in t and "<b" in t]


def test_only_our_scripts_may_run_and_nothing_is_fetched(html):
    policy = next(a["content"] or "" for a in Reader(html).named("meta") if a.get("http-equiv"))
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert policy.count("sha256-") == 2
    assert "unsafe-eval" not in policy
    scriptless = re.sub(r"<script.*?</script>", "", html, flags=re.DOTALL)
    assert not re.search(r"""(?:src|href)\s*=\s*["'](?!#|data:,)""", scriptless.split("</head>")[0])


# ---------------------------------------------------------------- shape


def test_a_page_is_under_its_limit(both):
    assert all(len(html.encode()) < LIMIT for html in both)


def test_headings_are_in_order_and_ids_are_once(both):
    for html in both:
        page = Reader(html)
        levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch(r"h[1-6]", tag)]
        assert levels[0] == 1
        assert levels.count(1) == 1
        assert all(after - before <= 1 for before, after in pairwise(levels))
        ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
        assert len(ids) == len(set(ids))
        targets = [a["href"] or "" for a in page.named("a")]
        assert {href.removeprefix("#") for href in targets} <= {*ids}


def test_tables_have_captions_and_scopes_and_figures_a_text(both):
    for html in both:
        page = Reader(html)
        assert len(page.named("caption")) == len(page.named("table")) > 5
        assert all(th.get("scope") in ("col", "row") for th in page.named("th"))
        drawn = [a for a in page.named("div") if a.get("role") == "img"]
        assert len(drawn) == len(page.named("figure")) == len(plots_of(html)) > 5
        assert all(len(a.get("aria-label") or "") > 20 for a in drawn)


def test_every_figure_has_data_and_the_one_template(both):
    for plot in (plot for html in both for plot in plots_of(html).values()):
        assert len(plot["data"]) > 0
        assert plot["layout"]["template"] == json.loads(json.dumps(figures.TEMPLATE.to_plotly_json()))


def test_names_in_figures_are_short_and_plain():
    assert figures.safe("a <i>b</i>\n c") == "a &lt;i&gt;b&lt;/i&gt; c"
    assert len(figures.safe("x" * 1000)) == 48
    rows = figures.named_rows(["x" * 100, "x" * 101])
    assert len(set(rows["ticktext"])) == 1 < len(set(rows["tickvals"]))


# ---------------------------------------------------------------- the command, and what it refuses


def test_the_command_writes_page_and_tables(folder, tmp_path):
    words = ["report", str(folder), "--out", str(tmp_path / "page.html"), "--csv", "--latex"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert [line.split(":")[0] for line in done.output.splitlines()] == ["page", "csv", "latex"]
    assert (tmp_path / "page.html").stat().st_size > 1_000_000
    lines = (tmp_path / "page.csv").read_text().splitlines()
    assert lines[0].startswith("method,privacy,epsilon,delta,unit,accuracy_global,accuracy_own")
    assert lines[-1].startswith('ficpd,"ε = 2.00 per record, simulated noise",2.0,1e-05,record,0.8,0.69')
    latex = (tmp_path / "page.tex").read_text()
    assert r"\toprule" in latex
    assert r"zero\_shot & nothing leaves" in latex
    assert r"$\varepsilon$ = 2.00 per record" in latex
    assert "accuracy \\%" in latex


def test_a_comparison_has_tables_too(compared, tmp_path):
    found = write_tables(compared, tmp_path / "page.html", csv=True, latex=True)
    assert len(found["csv"].read_text().splitlines()) == 1 + 4 * 4 * 3
    assert found["latex"].read_text().count(r"\begin{tabular}") == 2


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ([], "holds no run"),
        (["experiment.toml"], "has not finished; go on with it (--resume)"),
        (["result.json"], "result.json is of another version"),
        (["compare.json"], "compare.json is of another version"),
    ],
)
def test_what_is_no_finished_run_is_said_so(tmp_path, names, words):
    for name in names:
        (tmp_path / name).write_text('{"schema": 99}' if name.endswith("json") else "")
    with pytest.raises(RunError, match=re.escape(words)):
        write_page(tmp_path)


def test_a_damaged_file_is_named(tmp_path):
    run = made_up.run(tmp_path / "run", clients=2)
    (run / "audit.json").write_text('{"run": 1}')
    with pytest.raises(RunError, match=r"audit\.json cannot be read as an audit"):
        write_page(run)
    (run / "audit.json").unlink()
    (run / "rounds.jsonl").write_text("{")
    with pytest.raises(RunError, match=r"rounds\.jsonl cannot be read"):
        write_page(run)


def test_a_run_among_real_sites_has_a_page_without_scores(tmp_path):
    """What a coordinator knows: no client's score is in it (`serve._left`)."""
    folder = made_up.run(tmp_path / "run", clients=3)
    own = json.loads((folder / "result.json").read_text())
    for key in ("metrics", "fairness", "num_records", "personalization", "unseen_clients", "excluded_updates"):
        del own[key]
    agreed = {"noise": "each site's own", "at_most": True}
    own["privacy"] = {"mechanism": "record_gaussian", "unit": "record", "epsilon": 2.0, "delta": 1e-5, **agreed}
    own["shared_scores"] = {"site-1": {"personal": {"accuracy": 0.5}}, "site-2": {"personal": {"accuracy": 0.6}}}
    (folder / "result.json").write_text(json.dumps(own))
    page = page_of(folder)
    assert page.headline == "ficpd ran 3 rounds among 3 sites; their scores stay with them."
    assert {"rounds", "prototypes", "library", "privacy", "run"} <= {section.id for section in page.sections}
    assert "methods" not in {section.id for section in page.sections}
    assert ["personal", "2", "accuracy 0.550"] in [line for table in tables_of(page) for line in table.cells]
    write_page(folder)


def test_kinds_of_blocks_reach_the_template(folder):
    kinds = {block.kind for section in page_of(folder).sections for block in section.blocks}
    assert {"table", "figure", "text", "facts", "code", "quotes", "pair"} <= kinds
    assert isinstance(page_of(folder).sections[0], Section)
    assert all(isinstance(figure, Figure) for figure in page_of(folder).figures)
