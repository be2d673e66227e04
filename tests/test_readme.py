"""What the pages show is what was measured."""

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
