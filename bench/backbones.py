"""Which families run, and how far they are from plain transformers and PEFT: the table of docs/backbones.md.

    python bench/backbones.py          about two minutes; random models of width 32, no download

It writes the table into the page. Differences are of features or of mean log-likelihoods, the largest of all checks.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import families

PAGE = Path(__file__).parents[1] / "docs" / "backbones.md"
BEGIN, END = "<!-- table: bench/backbones.py -->\n", "<!-- end of the table -->\n"


def table(lines: list[dict[str, str]]) -> str:
    rows = [[*lines[0]], ["---"] * len(lines[0]), *([*line.values()] for line in lines)]
    return "".join("| " + " | ".join(row) + " |\n" for row in rows)


def main() -> None:
    lines = []
    for group in (families.DECODERS, families.MASKED, families.SENTENCES, families.SEQ2SEQ, families.VISION):
        for name, family in group.items():
            lines.append(families.line(name, family))
            print(*lines[-1].values(), sep=" | ", flush=True)
    text = PAGE.read_text(encoding="utf-8")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    PAGE.write_text(before + BEGIN + table(lines) + END + after, encoding="utf-8")


if __name__ == "__main__":
    main()
