"""The end of a run on a terminal of 80 columns."""

import io
from pathlib import Path

import made_up
import pytest
from rich.console import Console

import small
from ficpd.experiments.config import read
from ficpd.experiments.finished import FinishedRun
from ficpd.experiments.report.blocks import Text
from ficpd.experiments.report.screen import announcement, print_blocks, result_blocks


def printed(blocks, width=80, terminal=False) -> list[str]:
    console = Console(width=width, file=io.StringIO(), force_terminal=terminal, no_color=True)
    print_blocks(console, blocks)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


@pytest.fixture(scope="module")
def shown(tmp_path_factory) -> list[str]:
    folder = made_up.run(tmp_path_factory.mktemp("screen") / "run")
    found = made_up.result("fedavg", ["a", "b"], 0.7, None) | {"label": "fedavg, no privacy, and a long name"}
    made_up.write_result(folder / "baselines" / "fedavg-none", found)
    return printed(result_blocks(FinishedRun.load(folder)))


def test_table_has_one_line_a_method_and_whole_figures(shown):
    rule = next(i for i, line in enumerate(shown) if line.strip().startswith("──"))
    lines = shown[rule + 1 : shown.index("", rule)]
    assert [line.split()[0] for line in lines] == ["zero_shot", "local", "fedavg", "fedavg,", "ficpd"]
    assert all(len(line) <= 80 for line in lines)
    assert lines[-1].split() == ["ficpd", "69.0", "58.0", "80.0", "2.00", "289", "B", "1.00", "kB", "5"]


def test_result_ends_with_verdict_page_and_three_commands(shown):
    text = "\n".join(shown)
    assert "Joining pays 5.0 points over alone: together 69.0, alone 64.0, no prompt 49.0" in text
    assert text.index("Joining pays") < text.index("report.html") < text.index("next:")
    assert [line.split()[1] for line in shown if line.startswith("ficpd ")] == ["predict", "adapt", "audit"]


def test_a_terminal_breaks_sentences_between_words_and_a_file_does_not():
    said = "Joining pays 5.0 points over a local linear probe: together 69.0, alone 64.0, a local linear probe 63.0."
    lines = printed([Text(said)], terminal=True)
    assert max(map(len, lines)) <= 80
    assert " ".join(lines) == said
    assert printed([Text(said)]) == [said]


def test_announcement_says_what_a_run_will_do(tmp_path):
    first, beside, *_ = printed(announcement(read("quickstart"), Path("runs/demo")))
    assert first == "quickstart: ficpd on minilm, 5 rounds, ε = 2"
    assert beside == "compared with: no prompt, alone, a local linear probe, on the same records"
    assert "no privacy" in printed(announcement(small.experiment(tmp_path), Path("x")))[0]
