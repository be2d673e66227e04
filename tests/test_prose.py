"""The prose of the package and of its pages is plain: no metaphors, short sentences, first lines that stand alone."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import pytest

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src/ficpd"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
MEASURED = [page for page in PAGES if page.stem != "CONTRIBUTING"]
BANNED = re.compile(
    r"\b(doors?|walls?|books?|bills?|prices?|homes?|worlds?|told|said|made[ -]up|nobody['’]s|beside|passages?|whoever)\b",
    re.IGNORECASE,
)
ALLOWED = re.compile(
    r"home directory|wall time|Hardt, Price, Srebro"  # the system's words, and an author
    r"|\| question, passage|\| passage \| question"  # columns of XGLUE
    r"|^ at home$"  # the name of a random stream, which is part of the results
    r"|^ +said: ",  # a field's name
    re.MULTILINE,
)
CODE = re.compile(r"```.*?```", re.DOTALL)
NO_PROSE = re.compile(r"(?s:```.*?```|<!--.*?-->)|^#.*$|^ *\|.*$|!\[[^]]*\]\([^)]*\)", re.MULTILINE)
INVERTED = re.compile(r"(Of|To|Where|What|Whoever|Nobody)\b")


def modules() -> Iterator[tuple[str, str]]:
    """Lists the modules of the package with their sources."""
    for file in sorted(SOURCE.rglob("*.py")):
        yield file.relative_to(SOURCE).as_posix(), file.read_text(encoding="utf-8")


def texts(source: str) -> Iterator[tuple[int, str]]:
    """Lists a module's comments, and its strings of several words: docstrings, errors, help."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            yield node.lineno, node.value
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string


def banned(text: str) -> list[str]:
    return [found.group() for found in BANNED.finditer(ALLOWED.sub("", text))]


def first_lines(source: str) -> Iterator[tuple[int, str]]:
    """Lists the first line of each docstring, those of constants and fields too."""
    for node in ast.walk(ast.parse(source)):
        for statement in node.body if hasattr(node, "body") and isinstance(node.body, list) else []:
            value = getattr(statement, "value", None)
            if isinstance(statement, ast.Expr) and isinstance(value, ast.Constant) and isinstance(value.value, str):
                yield statement.lineno, value.value.strip().split("\n")[0]


def stands_alone(line: str) -> bool:
    return not INVERTED.match(line) and all(len(sentence.split()) <= 20 for sentence in line.split(". "))


def sentences(page: str) -> list[int]:
    """Counts the words of each sentence of a Markdown page, without headings, tables and code."""
    text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", NO_PROSE.sub("\n\n", page))
    blocks = re.split(r"\n\s*\n|^\s*(?:[-*]|\d+\.) ", re.sub(r"`[^`]+`", "code", text), flags=re.MULTILINE)
    return [len(part.split()) for block in blocks for part in re.split(r"(?<=[.!?])[*)]*\s", block) if part.split()]


def test_no_text_of_the_package_has_a_banned_word():
    lines = [(name, line, text) for name, source in modules() for line, text in texts(source)]
    found = [f"{name}:{line}: {word}" for name, line, text in lines for word in banned(text)]
    assert found == []


def test_first_lines_of_docstrings_stand_alone():
    lines = [(name, line, first) for name, source in modules() for line, first in first_lines(source)]
    assert len(lines) > 2000
    assert [f"{name}:{line}: {first}" for name, line, first in lines if not stands_alone(first)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_no_page_has_a_banned_word(page):
    assert banned(CODE.sub("", page.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize("page", MEASURED, ids=lambda page: page.stem)
def test_the_median_sentence_of_a_page_is_short(page):
    assert median(sentences(page.read_text(encoding="utf-8"))) <= 18


def test_the_median_sentence_of_all_pages_is_short():
    counts = [words for page in MEASURED for words in sentences(page.read_text(encoding="utf-8"))]
    assert len(counts) > 500
    assert median(counts) <= 16


def test_the_measures_find_what_they_look_for():
    source = '"""What a page holds."""\n# the price of a step\nerror = "a wall of text in the home directory"\n'
    assert [word for _, text in texts(source) for word in banned(text)] == ["wall", "price"]
    assert [stands_alone(line) for _, line in first_lines(source)] == [False]
    assert not stands_alone("Returns " + "very " * 20 + "much.")
    page = (
        "# Title of a page\n\nTwo words. Then `ficpd run x` runs.\n\n- A [link](x.md).\n\n| a | b |\n```\ncode\n```\n"
    )
    assert sentences(page) == [2, 3, 2]
