"""Noise and clipping are in the functions that docs/privacy.md lists, and nowhere else."""

import ast
import re
from pathlib import Path

import ficpd

SOURCE = Path(ficpd.__file__).parent
PAGE = Path(__file__).parents[2] / "docs" / "privacy.md"
CALLS = {
    "add_gaussian", "add_discrete_gaussian", "make_gaussian", "gaussian_measurement", "discrete_gaussian_measurement",
    "clipped_sum", "clip_query", "rescale",
}  # fmt: skip
DRAWS = {"randn", "randn_like", "normal", "normal_"}
"""Calls that draw Gaussian numbers: inside `privacy/` they are noise."""


def listed() -> set[str]:
    """Reads the listed functions, such as `privacy/noise.py: SeededNoise.add_gaussian`."""
    section = PAGE.read_text().split("## Where noise and clipping are\n")[1].split("\n## ")[0]
    return {f"{module}: {name}" for module, name in re.findall(r"`(\w+/[\w/]+\.py): ([\w.]+)`", section)}


def functions(tree: ast.Module) -> dict[str, ast.AST]:
    found: dict[str, ast.AST] = {}
    for node in tree.body:
        for part in node.body if isinstance(node, ast.ClassDef) else [node]:
            if isinstance(part, ast.FunctionDef):
                found[f"{node.name}.{part.name}" if isinstance(node, ast.ClassDef) else part.name] = part
    return found


def called(node: ast.AST) -> set[str]:
    calls = [part.func for part in ast.walk(node) if isinstance(part, ast.Call)]
    return {getattr(call, "attr", getattr(call, "id", "")) for call in calls}


def imports(node: ast.AST) -> set[str]:
    parts = list(ast.walk(node))
    names = [alias.name for part in parts if isinstance(part, ast.Import) for alias in part.names]
    names += [part.module or "" for part in parts if isinstance(part, ast.ImportFrom)]
    return {name.split(".")[0] for name in names}


def places(path: str, source: str) -> set[str]:
    """The functions of one module that add noise or clip; `path: ` alone is the module outside of functions."""
    tree = ast.parse(source)
    of_module = functions(tree)
    wanted = CALLS | DRAWS if path.startswith("privacy/") else CALLS
    found = {
        f"{path}: {name}" for name, node in of_module.items() if called(node) & wanted or "opendp" in imports(node)
    }
    rest = [node for node in tree.body if not isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    return found | {f"{path}: " for node in rest if called(node) & wanted or "opendp" in imports(node)}


def sources() -> dict[str, str]:
    return {str(file.relative_to(SOURCE)): file.read_text() for file in SOURCE.rglob("*.py")}


def test_the_page_lists_exactly_the_functions_that_add_noise_or_clip():
    texts = sources()
    found = set().union(*(places(path, text) for path, text in texts.items()))
    clips = {f"privacy/clipping.py: {name}" for name in functions(ast.parse(texts["privacy/clipping.py"]))}
    assert len(found) > 5
    assert len(clips) > 2
    assert listed() == found | clips
    assert {place.split("/")[0] for place in listed()} == {"privacy"}


def test_each_call_elsewhere_is_found():
    for extra in ("noise.add_gaussian(x, 1.0)", "clipped_sum(x, 1.0)", "import opendp.prelude as dp"):
        assert places("methods/x.py", f"def local_update(x):\n    {extra}") == {"methods/x.py: local_update"}
        assert places("methods/x.py", f"class X:\n    def go(self, x):\n        {extra}") == {"methods/x.py: X.go"}
        assert places("methods/x.py", extra) == {"methods/x.py: "}
