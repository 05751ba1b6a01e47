"""docs/structure.md says what lies where, and a module imports only from modules above it there."""

import ast
import re
from functools import lru_cache
from pathlib import Path

from conftest import ROOT

PACKAGE = ROOT / "sonic"
# Inside functions, for parts of preparing that few runs need: the command line, and shards out of what was prepared.
LATE = {("prepare", "checkpoints"), ("prepare", "shards")}


def listed() -> list[str]:
    """The modules of the package from top to bottom."""
    return re.findall(r"^  (\w+)\.py  ", (ROOT / "docs/structure.md").read_text(), re.MULTILINE)


@lru_cache
def imported(path: Path) -> set[str]:
    """The full names that a file imports, also inside functions, but not for annotations alone."""
    found, nodes = set(), [ast.parse(path.read_text())]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        nodes += ast.iter_child_nodes(node)
    return found


def test_every_module_is_listed_once():
    assert sorted(listed()) == sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__")


def test_a_module_imports_only_from_modules_above_it():
    place = {module: line for line, module in enumerate(listed())}
    wrong = set()
    for module, line in place.items():
        others = {name.split(".")[1] for name in imported(PACKAGE / f"{module}.py") if name.startswith("sonic.")}
        wrong |= {(module, other) for other in others & set(place) if place[other] >= line}
    assert wrong == LATE


def test_the_package_does_without_the_doors():
    doors = {path.stem for path in ROOT.glob("*.py")}
    assert {"sonic_training", "sonic_demo"} <= doors
    for path in PACKAGE.glob("*.py"):
        assert not {name.split(".")[0] for name in imported(path)} & doors, path.name
