"""What the pages tell a reader to write is what the program takes."""

import re
import tomllib
from pathlib import Path

import pytest
import tomli_w

from ficpd.experiments import config
from ficpd.experiments.comparison.grid import expand

ROOT = Path(__file__).parent.parent
BLOCKS = [
    pytest.param(page, block, id=f"{page.stem}-{number}")
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    for number, block in enumerate(re.findall(r"```toml\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL))
]


def test_the_pages_have_recipes():
    assert len(BLOCKS) > 6


@pytest.mark.parametrize(("page", "block"), BLOCKS)
def test_a_recipe_of_the_pages_can_be_read(page, block, tmp_path):
    """Alone if it says what the task is and who holds the data; else its parts in the place of the quick start's."""
    tree, quick = tomllib.loads(block), config.read_recipe(config.QUICKSTART)[0]
    if page.stem == "compare":
        (tmp_path / "abstracts.toml").write_text(quick, encoding="utf-8")
        assert expand(block, page.name, beside=tmp_path).cells
        return
    if not ({"task", "data", "partition"} <= tree.keys() or "groups" in tree):
        block = tomli_w.dumps({**tomllib.loads(quick), **tree})
    assert config.parse(block, page.name)
