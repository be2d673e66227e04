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
from ficpd.experiments.report.blocks import Downloads, Figure, KeyValues, Page, Section, Table, Text
from ficpd.experiments.report.build import page_of, write_page, write_tables
from ficpd.experiments.report.comparison import headline
from ficpd.experiments.report.summary import results_table
from ficpd.experiments.results import RunResult

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


def test_the_first_screen_says_whether_joining_pays(folder):
    page = page_of(folder)
    assert page.headline == "Joining pays 5.0 points over alone: together 69.0, alone 64.0, no prompt 49.0."
    tiles, told = page.lead
    assert isinstance(tiles, KeyValues)
    assert list(tiles.pairs) == [
        ("Together", "69.0 %"), ("Alone", "64.0 %"), ("No prompt", "49.0 %"), ("Privacy, per record", "ε = 2.00"),
        ("Noise", "simulated"), ("Up, a client and round", "289 B"), ("Down, a client and round", "1.00 kB"),
    ]  # fmt: skip
    assert isinstance(told, Text)
    assert told.words.startswith("Accuracy in %, mean of 12 clients' own tests.")


def test_the_table_has_the_numbers_of_the_screen(folder):
    run = FinishedRun.load(folder)
    table = results_table(run.results)
    assert table in tables_of(page_of(folder))
    assert [line[0] for line in table.cells] == ["zero_shot", "local", "fedavg", "ficpd"]
    assert list(table.heads)[1:3] == ["own test %", "worst client %"]
    assert table.marked == {3}


def test_every_section_of_a_whole_run_is_there(folder):
    found = [section.id for section in page_of(folder).sections]
    assert found == [
        "rounds", "methods", "privacy", "clients", "levels", "prototypes", "library", "examples", "audit", "run",
    ]  # fmt: skip


def test_sections_without_data_are_left_out(folder, tmp_path):
    small.run(tmp_path, "fedavg")
    page = page_of(tmp_path / "run")
    assert {s.id for s in page.sections} == {"methods", "rounds", "clients", "library", "privacy", "run"}
    assert all(section.blocks for section in page.sections)


@pytest.mark.slow
def test_a_real_run_of_prototypes_is_drawn_with_its_clients(tmp_path):
    small.run(tmp_path, "ficpd", "method.num_prototypes=2", "federation.evaluate_records=0", "privacy.name=record_gaussian",
              "privacy.epsilon=8", 'baselines=["local"]')  # fmt: skip
    page = page_of(tmp_path / "run")
    by_id = {figure.id: figure for figure in page.figures}
    assert {"glance", "spread", "alone", "plane", "curve-own", "curve-global"} <= by_id.keys()
    assert by_id["curve-own"].plot.layout.yaxis.range == by_id["curve-global"].plot.layout.yaxis.range
    clients = [line[0] for line in by_id["plane"].numbers.cells if line[1].startswith("client")]
    assert sorted(clients) == ["site-0", "site-1", "site-2"]
    assert len({tuple(line[2:]) for line in by_id["plane"].numbers.cells}) > 3
    last = [line for line in by_id["curve-own"].numbers.cells if line[0] == "3"]
    own = next(line for line in results_table(FinishedRun.load(tmp_path / "run").results).cells if line[0] == "ficpd")
    assert last[0][list(by_id["curve-own"].numbers.heads).index("ficpd")] == own[1]


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
        at["methods"] = {name: of for name, of in at["methods"].items() if name == "ficpd"}
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
    said = "ficpd beats fedavg (4 of 4); is not significantly different from zero_shot (4 of 4), "
    assert page.headline.startswith(said)
    tiles = page.lead[0]
    assert isinstance(tiles, KeyValues)
    assert {"tasks": "2", "partition": "1", "budgets": "2", "seeds": "3"}.items() <= dict(tiles.pairs).items()
    assert [s.id for s in page.sections] == [
        "grid", "privacy", "curves", "fronts", "ranks", "targets", "clients", "failures", "compared"
    ]  # fmt: skip
    matrix = tables_of(page)[0]
    assert next(line for line in matrix.cells if line[0] == "fedavg")[1] == "74.0 [72.0, 76.0] ▼"
    curve = next(figure for figure in page.figures if figure.id == "way-0")
    assert [line[0] for line in curve.numbers.cells] == ["1", "2", "3"]
    spread = next(figure for figure in page.figures if figure.id == "clients-0")
    assert ["fedavg", "15", "64.0", "64.0", "84.0"] in spread.numbers.cells
    (failure,) = next(s for s in page.sections if s.id == "failures").blocks
    assert isinstance(failure, Text)
    assert failure.words.startswith("ficpd (")
    assert failure.words.endswith(f"seeds 2: {made_up.HOSTILE}")


def facts_of(page: Page, section: str) -> dict[str, str]:
    (found,) = [one for one in page.sections if one.id == section]
    return {name: value for block in found.blocks if isinstance(block, KeyValues) for name, value in block.pairs}


def test_what_left_each_site_can_be_signed_off(folder, tmp_path):
    found = facts_of(page_of(folder), "privacy")
    assert list(found) == [
        "sent by a site", "sent to a site", "records", "guarantee", "in words", "unit", "noise", "budget left",
        "not covered", "audited",
    ]  # fmt: skip
    assert "factor 7.4 (e to the ε) and by 1 in 100,000 (δ)" in found["in words"]
    assert found["unit"].startswith("one record")
    assert found["noise"].startswith("simulated")
    assert found["budget left"].startswith("0.000 of 2")
    assert found["audited"].startswith("ALARM")
    small.run(tmp_path, "ficpd", "compression.name=subspace", "compression.dimension=8", "compression.bits=8",
              "privacy.name=record_gaussian", "privacy.epsilon=8")  # fmt: skip
    page = page_of(tmp_path / "run")
    items = next(table for table in tables_of(page) if table.heads[0] == "item")
    assert ["change of the prompt", "12 B", "8", "8", "3"] in [list(line) for line in items.cells]
    assert facts_of(page, "privacy")["audited"].startswith("no. `ficpd audit")
    left = next(section for section in page.sections if section.id == "privacy")
    assert next(block for block in left.blocks if isinstance(block, Text)).alarm


def test_a_run_without_privacy_says_that_nothing_is_covered(tmp_path):
    small.run(tmp_path, "fedavg")
    found = facts_of(page_of(tmp_path / "run"), "privacy")
    assert found["guarantee"] == "none: messages carry no guarantee"
    assert "unit" not in found


def test_the_page_holds_its_results_as_files(folder):
    blocks = [block for section in page_of(folder).sections for block in section.blocks]
    (files,) = [block for block in blocks if isinstance(block, Downloads)]
    assert RunResult.model_validate_json(files.files["result.json"]) == RunResult.load(folder)
    assert files.files["results.csv"].startswith("method,privacy,epsilon")


@pytest.mark.parametrize(("fit", "folded"), [(0.5, ""), (0.01, "they match no known fact")])
def test_clusters_that_match_nothing_are_folded(tmp_path, fit, folded):
    run = made_up.run(tmp_path / "run", clients=4)
    own = json.loads((run / "result.json").read_text())
    own["clusters"]["adjusted_rand"] = {"domain": fit}
    (run / "result.json").write_text(json.dumps(own))
    (found,) = [section for section in page_of(run).sections if section.id == "prototypes"]
    assert found.folded == folded


def test_budgets_of_several_epsilons_have_a_curve_and_figures_one_scale(compared):
    by_id = {figure.id: figure for figure in page_of(compared).figures}
    numbers = by_id["epsilon-0"].numbers
    assert (numbers.heads[0], numbers.heads[-1]) == ("ε", "ficpd")
    assert [[line[0], line[-1]] for line in numbers.cells] == [["1", "80.0"], ["none", "80.0"]]
    for kind, axis in (("condition", "xaxis"), ("way", "yaxis"), ("clients", "xaxis")):
        drawn = [figure for id, figure in by_id.items() if id.startswith(f"{kind}-")]
        assert len(drawn) == 4
        assert len({tuple(figure.plot.layout[axis].range) for figure in drawn}) == 1


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
        targets = [a["href"] or "" for a in page.named("a") if "download" not in a]
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
    assert r"zero\_shot & 49.0" in latex
    assert r"$\varepsilon$" in latex
    assert "own test \\%" in latex


def test_a_comparison_has_tables_too(compared, tmp_path):
    found = write_tables(compared, tmp_path / "page.html", csv=True, latex=True)
    assert len(found["csv"].read_text().splitlines()) == 1 + 4 * 4 * 3
    assert found["latex"].read_text().count(r"\begin{tabular}") == 2


@pytest.mark.parametrize(("names", "words"), [
    ([], "holds no run"),
    (["experiment.toml"], "has not finished; go on with it (--resume)"),
    (["result.json"], "result.json is of another version"),
    (["compare.json"], "compare.json is of another version"),
])  # fmt: skip
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
    assert {"table", "figure", "text", "facts", "code", "quotes", "files"} <= kinds
    assert isinstance(page_of(folder).sections[0], Section)
    assert all(isinstance(figure, Figure) for figure in page_of(folder).figures)
