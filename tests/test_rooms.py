"""Each room imports only rooms before it (CONTRIBUTING.md), and asking for help loads nothing heavy."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import ficpd

GROUND = ("errors", "types", "rng", "registry", "storage", "interfaces")
"""Modules, in the order of their imports. They need torch, safetensors, pydantic and the standard library only."""
ROOMS = (
    "data", "backbones", "tasks", "privacy", "optimizers", "federation", "methods", "evaluation", "library",
    "experiments", "deployment", "cli",
)  # fmt: skip
ORDER = {name: place for place, name in enumerate((*GROUND, *ROOMS))}
OF_GROUND = {"torch", "safetensors", "pydantic", *sys.stdlib_module_names}
MOST_ARROWS = 70
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
    """Lists the imports that the module at `path` (such as `methods`, `fedavg`) must not have."""
    room, found = path[0], []
    for target in imported(source):
        if target[0] != "ficpd":
            if room in GROUND and target[0] not in OF_GROUND:
                found.append(f"{room} imports {target[0]}, which the ground modules do not need")
        elif ORDER[target[1]] > ORDER[room]:
            found.append(f"{'.'.join(path)} imports {'.'.join(target)}, which comes after it")
    return found


def modules() -> dict[tuple[str, ...], str]:
    """Maps the path of every module of the package to its source."""
    files = [file for file in SOURCE.rglob("*.py") if file.parent != SOURCE or not file.name.startswith("__")]
    paths = {file: file.relative_to(SOURCE).with_suffix("").parts for file in files}
    return {path[:-1] if path[-1] == "__init__" else path: file.read_text() for file, path in paths.items()}


def test_each_room_imports_only_rooms_before_it():
    assert len(modules()) > 100
    assert [line for path, source in modules().items() for line in wrong(source, path)] == []


def test_a_bad_import_is_caught():
    assert wrong("from ficpd.federation.client import Client", ("tasks", "multiple_choice"))
    assert wrong("def late():\n    from ficpd.federation import rounds", ("data", "tables"))
    assert wrong("import ficpd.cli", ("library", "session"))
    assert wrong("from ficpd.tasks.regression import x", ("tasks", "classification")) == []
    assert wrong("import numpy", ("rng",))
    assert wrong("import hashlib, torch.nn", ("rng",)) == []


def test_the_top_of_the_package_holds_rooms_and_ground_modules_only():
    there = {file.stem for file in SOURCE.iterdir() if file.suffix == ".py" or (file / "__init__.py").exists()}
    assert there == {"__init__", "__main__", *GROUND, *ROOMS}


def test_there_are_few_arrows_between_rooms():
    room = dict.fromkeys(GROUND, "ground") | {name: name for name in ROOMS}
    arrows = {
        (room[path[0]], room[target[1]])
        for path, source in modules().items()
        for target in imported(source)
        if target[0] == "ficpd" and room[path[0]] != room[target[1]]
    }
    assert len(arrows) <= MOST_ARROWS


def test_a_run_on_another_backbone_does_not_load_transformers(tmp_path):
    code = (
        "import sys; from pathlib import Path; import small\n"
        f"small.run(Path({str(tmp_path)!r}))\n"
        "print('loaded:', [name for name in ('transformers', 'flwr', 'ray') if name in sys.modules])"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent)
    assert done.stdout.strip().endswith("loaded: []")


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
