"""Imports point down only (docs/design.md), and asking for help loads nothing heavy."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import ficpd

FLOORS = [
    {"types", "seams", "traits", "errors", "seeds", "registry", "cache", "files", "spelling"},
    {"backbones", "tasks", "data", "privacy", "compression", "tuners"},
    {
        "compute",
        "speed",
        "codec",
        "orders",
        "clients",
        "personal",
        "cards",
        "library",
        "demonstrations",
        "heads",
        "adapt",
        "auto",
        "server",
    },
    {"methods"},
    {"engines"},
    {"federate", "metrics", "audit"},
    {
        "cli",
        "experiment",
        "guard",
        "world",
        "queries",
        "beginning",
        "run",
        "rundir",
        "use",
        "compare",
        "report",
        "page",
        "peft",
        "reentry",
        "refine",
        "attack",
        "terms",
        "site",
        "serve",
        "outcome",
        "simulated",
        "deploy",
        "track",
        "__main__",
    },
]
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}
SOURCE = Path(ficpd.__file__).parent


def imported(source: str) -> Iterator[tuple[str, ...]]:
    """Each imported module's path. `from ficpd import x` is an import of x; `__version__` is no module."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the floor; write the whole name"
            for alias in node.names:
                if alias.name != "__version__":
                    yield (*str(node.module).split("."), alias.name)
        elif isinstance(node, ast.Import):
            yield from (tuple(alias.name.split(".")) for alias in node.names)


def wrong(source: str, path: tuple[str, ...]) -> list[str]:
    """What the module at `path` (`methods`, `fedavg`) must not import."""
    here, found = FLOOR[path[0]], []
    for target in imported(source):
        if target[0] != "ficpd":
            if here == 0 and target[0] != "torch" and target[0] not in sys.stdlib_module_names:
                found.append(f"floor 0 imports {target[0]}")
            continue
        there = FLOOR[target[1]]
        siblings = here == there == 1 and target[1] != path[0]
        methods = here == there == 3 and target[2] != path[-1]
        if there > here or siblings or methods:
            found.append(f"{'.'.join(path)} (floor {here}) imports {'.'.join(target)} (floor {there})")
    return found


def test_imports_point_down_only():
    files = [file for file in SOURCE.rglob("*.py") if file != SOURCE / "__init__.py"]
    assert len(files) > 30
    paths = {file: file.relative_to(SOURCE).with_suffix("").parts for file in files}
    paths = {file: path[:-1] if path[-1] == "__init__" else path for file, path in paths.items()}
    assert [line for file, path in paths.items() for line in wrong(file.read_text(), path)] == []


def test_a_bad_import_is_caught():
    assert wrong("from ficpd.compute import Compute", ("tasks", "choice"))
    assert wrong("def late():\n    from ficpd import federate", ("methods", "fedavg"))
    assert wrong("import ficpd.cli", ("use",)) == []
    assert wrong("from ficpd.tasks import classification", ("backbones", "tiny"))
    assert wrong("from ficpd.tasks.regression import x", ("tasks", "classification")) == []
    assert wrong("from ficpd.methods.fedavg import FedAvg", ("methods", "fedprox"))
    assert wrong("from ficpd.methods import fedavg", ("methods", "fedprox"))
    assert wrong("import numpy", ("seeds",))
    assert wrong("import hashlib, torch.nn", ("seeds",)) == []


def test_help_loads_neither_torch_nor_flower():
    heavy = ("torch", "flwr", "transformers", "sklearn", "pandas", "pydantic")
    code = (
        "import sys; sys.argv = ['ficpd', '--help']\n"
        "from ficpd.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        f"print('loaded:', [name for name in {heavy} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "Usage" in done.stdout
    assert done.stdout.strip().endswith("loaded: []")
