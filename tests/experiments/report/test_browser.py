"""A page in a real Chromium, from a file: nothing asked of the network, nothing wrong on the console, every figure drawn,
legible and reachable at two widths, light and dark. What no assertion sees, a person has to look at."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import made_up
import pytest

import small
import test_groups
from ficpd.experiments.comparison.compare import compare
from ficpd.experiments.comparison.grid import expand
from ficpd.experiments.report.build import write_page

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
QUIET = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
LOOKS = (Path(__file__).parent / "looks.js").read_text().split("*/", 1)[1]
VIEWS = [(width, scheme) for width in (1280, 390) for scheme in ("light", "dark")]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        if os.environ.get("FICPD_NEEDS_CHROMIUM"):
            pytest.fail("FICPD_NEEDS_CHROMIUM is set and there is no chromium; apt-get install chromium")
        pytest.skip("chromium is not installed")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield started
        started.close()


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    return {
        "run": write_page(made_up.run(folder / "run")),
        "comparison": write_page(made_up.comparison(folder / "compared")),
        "real run": write_page(_real_run(folder / "real")),
        "real comparison": write_page(_real_comparison(folder / "small")),
    }


def _real_run(folder: Path) -> Path:
    """Two tasks, two prototypes, noise, synthetic examples, a client alone: all that a run's page can show but the audit."""
    folder.mkdir()
    changes = ("distillation.how=squared", "distillation.least_agreement=0.5", "method.num_prototypes=2",
               "privacy.name=record_gaussian", "privacy.epsilon=4", 'baselines=["local","fedavg"]',
               "federation.evaluate_records=0")  # fmt: skip
    test_groups.run(folder, *changes)
    return folder / "run"


def _real_comparison(folder: Path) -> Path:
    axes = "[methods.fedavg]\n[methods.ficpd]\n[budgets.free]\nepsilon = inf\n[budgets.private]\nepsilon = 4\n"
    folder.mkdir()
    small.table(folder / "records.csv")
    (folder / "small.toml").write_text(small.toml(folder / "records.csv", rounds=3))
    text = f'name = "test"\nrecipe = "small.toml"\nreference = "fedavg"\nseeds = [0, 1]\nevaluate_every = 1\n{axes}'
    compare(expand(text, "test.toml", (), folder), folder / "out", jobs=2)
    return folder / "out"


class View:
    """A page that is open, and what it said and asked for since it was."""

    def __init__(self, browser: Any, file: Path, width: int = 1280, scheme: str = "light", **more: Any):
        self.context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, **more)
        self.page = self.context.new_page()
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.said.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.said.append(f"error: {error}"))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(file.absolute().as_uri())
        self.page.wait_for_load_state("load")

    def look(self, what: str) -> Any:
        return self.page.evaluate(f"() => ({LOOKS}).{what}()")

    def __enter__(self) -> "View":
        return self

    def __exit__(self, *error: object) -> None:
        self.context.close()


FIGURES = {
    "run": "curve-own curve-global glance sites spread alone plane attacks",
    "comparison": "condition-0 condition-1 condition-2 condition-3 epsilon-0 epsilon-1 way-0 way-1 way-2 way-3 front-0 "
    "rank-0 rank-1 clients-0 clients-1 clients-2 clients-3",
    "real run": "curve-own curve-global glance spread alone plane",
    "real comparison": "condition-0 condition-1 epsilon-0 way-0 way-1 front-0 front-1 clients-0 clients-1",
}
"""The figures of each page, in their order; folded ones are not drawn."""


@pytest.mark.parametrize("kind", ["run", "comparison", "real run", "real comparison"])
@pytest.mark.parametrize(("width", "scheme"), VIEWS)
def test_every_figure_is_drawn_in_silence(browser, files, kind, width, scheme):
    with View(browser, files[kind], width, scheme) as view:
        drawn = view.look("figures")
        assert [one["id"].removeprefix("plot-") for one in drawn] == FIGURES[kind].split()
        assert files[kind].stat().st_size < 6e6
        assert [one["id"] for one in drawn if not one["marks"]] == []
        assert all(0.9 * one["room"] < one["wide"] <= one["room"] + 1 for one in drawn), drawn
        assert all(one["right"] <= width for one in drawn)
        assert view.page.evaluate("document.documentElement.scrollWidth") <= width
        assert view.said == []
        assert view.asked == [files[kind].absolute().as_uri()]
        assert view.page.evaluate("window.hacked") is None


@pytest.mark.parametrize("kind", ["run", "comparison", "real run", "real comparison"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_has_contrast(browser, files, kind, scheme):
    with View(browser, files[kind], 1280, scheme) as view:
        view.page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
        assert view.look("faint") == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_marks_of_figures_have_contrast(browser, files, scheme):
    """At least 3 to 1 against the panel they lie on (WCAG 1.4.11), for all eight colours."""
    with View(browser, files["run"], 1280, scheme) as view:
        assert min(view.look("colours")) >= 3


def test_the_keyboard_reaches_everything(browser, files):
    with View(browser, files["run"]) as view:
        page = view.page
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.className") == "skip"
        assert page.evaluate("document.activeElement.getBoundingClientRect().top") >= 0
        reachable, seen, unseen = view.look("stops"), 0, []
        for _ in range(2 * reachable):
            tag, visible = view.look("focused")
            if tag == "BODY":
                break
            seen += 1
            unseen += [] if visible else [tag]
            page.keyboard.press("Tab")
        assert seen == reachable > 20
        assert unseen == []


def test_a_figures_numbers_unfold_by_key(browser, files):
    with View(browser, files["run"]) as view:
        summary = view.page.locator("#glance summary")
        summary.focus()
        view.page.keyboard.press("Enter")
        assert view.page.locator("#glance table").is_visible()
        assert "80.0" in view.page.locator("#glance table").inner_text()


def test_the_skip_link_leads_past_the_navigation(browser, files):
    with View(browser, files["run"]) as view:
        view.page.keyboard.press("Tab")
        view.page.keyboard.press("Enter")
        assert view.page.evaluate("document.activeElement.id") == "main"


def test_light_and_dark_can_be_chosen_and_figures_follow(browser, files):
    ink = "() => getComputedStyle(document.querySelector('#plot-glance .xtick text')).fill"
    with View(browser, files["run"], scheme="light") as view:
        page, button = view.page, view.page.get_by_role("button", name="Dark")
        before, text = page.evaluate("getComputedStyle(document.body).backgroundColor"), page.evaluate(ink)
        assert button.get_attribute("aria-pressed") == "false"
        button.focus()
        page.keyboard.press("Enter")
        assert button.get_attribute("aria-pressed") == "true"
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") != before
        assert page.evaluate(ink) != text
        page.keyboard.press("Enter")
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == before
        assert page.evaluate(ink) == text
        page.emulate_media(color_scheme="dark")
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == before  # what was chosen stays
        assert view.said == []


def test_hostile_names_are_only_names(browser, files):
    with View(browser, files["run"]) as view:
        page = view.page
        page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
        assert page.locator("th", has_text=made_up.HOSTILE).count() > 0
        assert made_up.HOSTILE[:9] in page.locator("#plot-sites").inner_text()
        for mark in page.locator("#plot-sites .point").all()[:2]:
            mark.hover(force=True)
        assert page.evaluate("window.hacked") is None
        assert page.locator("img").count() == 0
        assert view.said == []


def test_a_page_can_be_read_without_script(browser, files):
    with View(browser, files["run"], java_script_enabled=False) as view:
        assert "Joining pays 5.0 points over alone" in view.page.locator("h1").inner_text()
        assert view.page.locator("#glance summary").is_visible()
        assert not view.page.locator("#theme").is_visible()


@pytest.mark.parametrize("width", [1280, 390])
def test_the_copy_button_stands_above_its_command(browser, files, width):
    with View(browser, files["run"], width) as view:
        button, code = (view.page.locator(f"#run {part}").first.bounding_box() for part in (".copy", ".code code"))
        assert button["y"] + button["height"] <= code["y"] or button["x"] >= code["x"] + code["width"]


def test_it_prints_on_white_without_what_is_only_for_screens(browser, files, tmp_path):
    with View(browser, files["run"], scheme="dark") as view:
        page = view.page
        page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
        page.emulate_media(media="print")
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        page.set_viewport_size({"width": 718, "height": 1000})  # A4 less its margins
        assert page.evaluate("document.documentElement.scrollWidth") <= 718
        assert not page.locator("nav").is_visible()
        assert not page.locator("#theme").is_visible()
        assert max(one["wide"] for one in view.look("figures")) <= 660
        page.evaluate("window.dispatchEvent(new Event('afterprint'))")
        page.emulate_media(media="screen")
        printed = page.pdf(format="A4", print_background=True)
        assert printed.startswith(b"%PDF")
        assert len(printed) > 50_000
        assert view.said == []


def test_landmarks_have_names(browser, files):
    with View(browser, files["run"]) as view:
        tree = view.page.locator("body").aria_snapshot()
        for landmark in ("banner", 'navigation "Sections"', "main", "contentinfo"):
            assert landmark in tree
        assert 'img "At a glance' in tree
        assert 'region "The methods compared"' in tree
