"""Tables for other programs: what a client is named stays text there."""

import csv
import io

import pandas as pd
import pytest

from ficpd.experiments.report.blocks import Table
from ficpd.experiments.report.table_formats import as_csv, as_markdown, safe_csv

FORMULAS = ['=HYPERLINK("http://x")', "+1+cmd", "@SUM(A1)", "-2+3", "\t=1", " =1"]


@pytest.mark.parametrize("name", FORMULAS)
def test_a_cell_is_no_formula_in_a_spreadsheet(name):
    frame = pd.DataFrame([{name: name, "value": -0.5}])
    tables = (as_csv([Table(name, ["client", name], [[name, "-0.5"]])]), safe_csv(frame))
    assert "\r" not in safe_csv(pd.DataFrame([{"a": "\r=1"}]))
    for text in tables:
        cells = [cell for row in csv.reader(io.StringIO(text, newline="")) for cell in row]
        assert "'" + name in cells
        assert not [cell for cell in cells if cell.strip(" ")[:1] in tuple("=+@\t") or cell.startswith("-2")]
        assert "-0.5" in cells, "a number stays one"


def test_a_name_is_no_markup_in_markdown():
    name = "</script><img src=x onerror=alert(1)> [a](javascript:1) `b` *c*\n# d | e"
    drawn = as_markdown(Table("T", ["client", "score"], [[name, "1"]]))
    assert len(drawn.splitlines()) == 5
    for markup in ("<", ">", "[a](", " `b`", " *c*"):
        assert markup not in drawn
