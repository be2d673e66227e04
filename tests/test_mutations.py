"""The faults of `mutations/faults.toml` fit the package and the pages. `make test-mutations` shows that they are found."""

import re
import subprocess
import sys

import pytest

from mutations.run import PAGE, ROOT, SOURCE, Fault, faults, main, page, select

CITED = re.compile(r"tests/[\w/]*test_\w+\.py|\btest_\w+")


@pytest.mark.parametrize("fault", faults(), ids=lambda fault: fault.name)
def test_a_fault_fits_the_package_and_its_tests_exist(fault: Fault):
    assert (SOURCE / "ficpd" / fault.file).read_text(encoding="utf-8").count(fault.before) == 1
    assert fault.before != fault.after
    for node in filter(None, (fault.test, fault.attack)):
        file, _, name = node.partition("[")[0].partition("::")
        assert f"def {name}(" in (ROOT / "tests" / file).read_text(encoding="utf-8")


@pytest.mark.slow
def test_pytest_finds_each_test_of_a_fault_with_its_parameters():
    nodes = sorted({f"tests/{node}" for fault in faults() for node in (fault.test, fault.attack) if node})
    asked = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-o", "addopts=", "-p", "no:cacheprovider", *nodes]
    done = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-2000:]


def test_names_differ():
    assert len({fault.name for fault in faults()}) == len(faults()) > 100
    assert sum(bool(fault.attack) for fault in faults()) >= 5


def test_slices_and_files_select_faults():
    slices = [fault for place in range(1, 9) for fault in select("--part", f"{place}/8")]
    assert sorted(fault.name for fault in slices) == sorted(fault.name for fault in faults())
    assert {fault.file for fault in select("--file", "privacy/ledger", "site/site.py")} == {
        "privacy/ledger.py", "deployment/site/site.py",
    }  # fmt: skip
    assert select("a fault that nobody has written") == []


def test_words_that_select_no_fault_print_the_usage(capsys):
    assert main("--help") == 1
    assert "--part 2/8" in capsys.readouterr().out


def test_the_page_has_the_table_of_the_faults():
    text = PAGE.read_text(encoding="utf-8")
    assert page(text) == text, "run: python tests/mutations/run.py --table"


@pytest.mark.parametrize("name", ["privacy.md", "design.md"])
def test_each_test_that_a_page_cites_finds_a_fault(name):
    tests = [f"tests/{fault.test}" for fault in faults()]
    cited = set(CITED.findall((ROOT / "docs" / name).read_text(encoding="utf-8")))
    assert len(cited) > 3
    assert [c for c in cited if not any(t.startswith(c) or f"::{c}" in t for t in tests)] == []
