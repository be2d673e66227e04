"""What the README shows is what was measured."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def checked(*changes: tuple[str, str], root: Path) -> int:
    for name in ("README.md", "bench/tables.py", "bench/measure.py"):
        (root / name).parent.mkdir(exist_ok=True, parents=True)
        (root / name).write_bytes((ROOT / name).read_bytes())
    (root / "bench/results").symlink_to(ROOT / "bench/results")
    text = (root / "README.md").read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    (root / "README.md").write_text(text)
    return subprocess.run([sys.executable, root / "bench/tables.py", "--check"], check=False).returncode


@pytest.mark.skipif(not (ROOT / "bench/results").is_dir(), reason="not a checkout")
def test_the_tables_of_methods_are_those_of_the_results(tmp_path):
    assert checked(root=tmp_path / "as it is") == 0
    assert checked(("| zero-shot | 70.9 ± 1.1 |", "| zero-shot | 90.9 ± 1.1 |"), root=tmp_path / "embellished") == 1
