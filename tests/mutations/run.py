"""Shows that the privacy tests have teeth: each fault of `faults.toml`, put into a copy of the package, fails its test.

`make test-mutations` runs all of them; `python tests/mutations/run.py WORDS` those whose name has these words, `--file
privacy/ledger.py deployment/site` those of these files, `--part 2/8` the second of eight slices. `--table` writes their
table into docs/privacy.md.
"""

import contextlib
import importlib
import multiprocessing
import os
import shutil
import sys
import tempfile
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE, PAGE = ROOT / "src", ROOT / "docs" / "privacy.md"
FAILED = {"AssertionError", "Failed"}
"""Errors of a test that has noticed something: its assertion, or `pytest.raises` without an error."""
OPTIONS = (
    "-q", "-p", "no:cacheprovider", "-p", "no:unraisableexception", "-o", "addopts=",
    "-W", "ignore::pytest.PytestAssertRewriteWarning",
)  # fmt: skip
"""Faults leave files open. What is preloaded cannot be rewritten."""
PRELOADED = (
    "torch", "transformers", "datasets", "pandas", "sklearn.linear_model", "scipy.stats", "dp_accounting.pld", "flwr",
)  # fmt: skip
"""Imported once, before the processes are forked."""


@dataclass(frozen=True)
class Fault:
    """One change of `file`: `before`, which is there exactly once, becomes `after`. `test` must notice it.

    test: node id below `tests/`. attack: node id of an audit that has to find it, too; none if empty.
    """

    name: str
    file: str
    before: str
    after: str
    test: str
    attack: str = ""

    def mutate(self, source: Path) -> None:
        """Changes the copy at `source`. Raises `ValueError` for a stale fault."""
        file = source / "ficpd" / self.file
        text = file.read_text(encoding="utf-8")
        if text.count(self.before) != 1:
            raise ValueError(f"{self.name}: its text is {text.count(self.before)} times in {self.file}, expected once")
        file.write_text(text.replace(self.before, self.after), encoding="utf-8")


def faults() -> list[Fault]:
    text = (Path(__file__).parent / "faults.toml").read_text(encoding="utf-8")
    return [Fault(**entry) for entry in tomllib.loads(text)["fault"]]


def select(*words: str) -> list[Fault]:
    """Returns the faults that the command line names."""
    known = faults()
    match words:
        case ("--file", *files):
            return [fault for fault in known if any(file in fault.file for file in files)]
        case ("--part", part):
            place, _, number = part.partition("/")
            return known[int(place) - 1 :: int(number)]
    return [fault for fault in known if " ".join(words) in fault.name]


def page(text: str) -> str:
    """Returns the page's text with the table of the faults between its markers."""
    begin, end = text.index("<!-- faults"), text.index("<!-- end of faults")
    lines = ["| fault | found by | by attack |", "|---|---|---|"]
    lines += [f"| {f.name} | `{f.test.partition('::')[2]}` | {'yes' if f.attack else ''} |" for f in faults()]
    return text[: text.index("\n", begin) + 1] + "\n".join(lines) + "\n" + text[end:]


@contextlib.contextmanager
def mutated(fault: Fault | None) -> Iterator[Path]:
    """Copies the sources to a temporary folder, with the fault if there is one."""
    with tempfile.TemporaryDirectory(prefix="ficpd-fault-") as folder:
        copy = Path(shutil.copytree(SOURCE, Path(folder) / "src"))
        if fault is not None:
            fault.mutate(copy)
        yield copy


class Outcomes:
    """A plugin that counts passed tests. errors: the kinds of the others' errors, and by whom."""

    def __init__(self) -> None:
        self.passed, self.errors = 0, dict[str, str]()

    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo) -> None:
        if call.excinfo is not None:
            phase = "" if call.when == "call" else f"{call.when}: "
            self.errors |= {phase + type(error).__name__: item.nodeid for error in leaves(call.excinfo.value)}
        elif call.when == "call":
            self.passed += 1

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.errors["collection"] = report.nodeid


def leaves(error: BaseException) -> list[BaseException]:
    """The errors of a group, such as hypothesis raises for several examples."""
    return [x for part in error.exceptions for x in leaves(part)] if isinstance(error, BaseExceptionGroup) else [error]


def outcomes(source: Path, tests: Sequence[str]) -> tuple[int, dict[str, str]]:
    """Runs tests on the package at `source`, in a process that has not imported it: passed tests, and others' errors."""
    sys.path.insert(0, str(source))
    os.environ |= {"PYTHONPATH": str(source), "HYPOTHESIS_STORAGE_DIRECTORY": str(source.parent / "hypothesis")}
    os.chdir(ROOT)
    found, log = Outcomes(), source.parent / "log"
    with log.open("w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        status = pytest.main([*OPTIONS, *(f"tests/{test}" for test in tests)], plugins=[found])
    if status == pytest.ExitCode.USAGE_ERROR:  # of one test that does not exist, no other runs
        found.errors["usage"] = next((line for line in log.read_text().splitlines() if line.startswith("ERROR")), "")
    assert str(sys.modules["ficpd"].__file__).startswith(str(source)), "the copy was not what ran"
    return found.passed, found.errors


def escaped(fault: Fault, test: str) -> str:
    """Says how a fault got past a test; nothing if it was caught."""
    with mutated(fault) as source:
        passed, errors = outcomes(source, [test])
    if FAILED & errors.keys():
        return ""
    ended = f"ended with {', '.join(errors)}" if errors else "passed" if passed else "does not exist"
    return f"{fault.name}: {test} {ended}"


def unsound(tests: Sequence[str]) -> str:
    """Says which errors these tests have without a fault; nothing if they pass."""
    with mutated(None) as source:
        passed, errors = outcomes(source, tests)
    return f"without a fault, of {len(tests)} tests {passed} pass; errors: {errors}" if errors or not passed else ""


def main(*words: str) -> int:
    if words == ("--table",):
        PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
        return 0
    chosen = select(*words)
    if not chosen:  # pytest without a test would run all of them
        print(__doc__)
        return 1
    pairs = [(fault, test) for fault in chosen for test in (fault.test, fault.attack) if test]
    for module in PRELOADED:
        importlib.import_module(module)
    with multiprocessing.get_context("fork").Pool(min(os.cpu_count() or 1, 4), maxtasksperchild=1) as pool:
        jobs = [pool.apply_async(unsound, [sorted({test for _, test in pairs})])]
        jobs += [pool.apply_async(escaped, pair) for pair in pairs]
        said = [line for job in jobs if (line := job.get()) and not print(line, flush=True)]
    print(f"{len(chosen)} faults, {len(said)} complaints")
    return bool(said)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
