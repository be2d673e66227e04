"""What the pages show is what was measured."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "docs/results.md")


def checked(*changes: tuple[str, str, str], root: Path) -> int:
    for name in (*PAGES, "bench/tables.py", "bench/design_tables.py", "bench/measure.py"):
        (root / name).parent.mkdir(exist_ok=True, parents=True)
        (root / name).write_bytes((ROOT / name).read_bytes())
    (root / "bench/results").symlink_to(ROOT / "bench/results")
    for page, old, new in changes:
        text = (root / page).read_text()
        assert old in text
        (root / page).write_text(text.replace(old, new))
    return subprocess.run([sys.executable, root / "bench/tables.py", "--check"], check=False).returncode


@pytest.mark.skipif(not (ROOT / "bench/results").is_dir(), reason="not a checkout")
def test_the_tables_of_methods_are_those_of_the_results(tmp_path):
    assert checked(root=tmp_path / "as it is") == 0
    for page in PAGES:
        embellished = page, "\n| FICPD | ", "\n| FICPD | 9"
        assert checked(embellished, root=tmp_path / Path(page).stem) == 1


def rows_of(page: str) -> dict[str, dict[str, float]]:
    """The README's table of results: its accuracies by method and column."""
    lines = page.split("<!-- compare first -->\n")[1].split("\n<!-- end -->")[0].splitlines()
    heads, _, *rows = [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in lines]
    return {name: dict(zip(heads[1:-1], map(float, cells[:-1]), strict=True)) for name, *cells in rows}


def test_the_sentences_of_the_first_page_are_the_differences_of_its_figures():
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    of = rows_of(page)
    own, alone, probe = of["FICPD"], of["local only"], of["a local linear probe"]
    ridge = {name: value - own[name] for name, value in of["analytic (one ridge head from sums)"].items()}
    assert f"{ridge['CLINC']:.1f} points ahead on CLINC" in page
    assert f"FICPD is {-ridge['polarity']:.1f} ahead on polarity and {-ridge['abstracts']:.1f} on abstracts" in page
    assert all(max(row[name] for row in of.values()) == own[name] for name in own if "skewed" in name)
    picture = (ROOT / "docs/img/joining.svg").read_text(encoding="utf-8")
    gains = [f"+{own[name] - max(alone[name], probe[name]):.1f}" for name in own]
    assert re.findall(r"<!-- ([+].*) -->", picture) == gains


@pytest.mark.parametrize("page", PAGES)
def test_the_demo_has_one_result(page):
    """The gain over a probe and over no prompt, and the clients that are worse off."""
    first, told = ((ROOT / name).read_text(encoding="utf-8").replace("\n", " ") for name in ("README.md", page))
    together, probe = re.search(r"together ([\d.]+), .*? linear probe ([\d.]+), ", first).groups()
    everyone, none = (
        float(re.search(rf" {name} +[\d.]+ +[\d.]+ +([\d.]+)", first)[1]) for name in ("ficpd", "zero_shot")
    )
    assert f"Joining pays {float(together) - float(probe):.1f} points over a local linear probe" in told
    assert f"Somebody without records gains {everyone - none:.1f} " in told
    assert "16 of 300 clients" in told or "Of 300 clients, 16 are" in told
