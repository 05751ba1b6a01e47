"""docs/structure.md says what lies where, and a module imports only from modules above it there; docs point to what is there."""

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


@lru_cache
def defined(path: Path) -> set[str]:
    """Functions, classes, their methods as CLASS.METHOD, and constants that a file defines."""
    found, bodies = set(), [("", ast.parse(path.read_text()).body)]
    while bodies:
        inside, body = bodies.pop()
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.add(inside + node.name)
            if isinstance(node, ast.ClassDef):
                bodies.append((f"{inside}{node.name}.", node.body))
            for target in getattr(node, "targets", ()):
                found |= {name.id for name in ast.walk(target) if isinstance(name, ast.Name)}
    return found


def test_what_the_coverage_of_the_specification_names_is_there():
    text = (ROOT / "docs/spec-coverage.md").read_text()
    places = re.findall(r"`([\w/]+\.py)::?([\w.]+)", text)
    assert len(places) > 100
    assert [place for place in places if place[1] not in defined(ROOT / place[0])] == []
    tests = set().union(*(defined(path) for path in ROOT.glob("tests/test_*.py")))
    assert set(re.findall(r"`(test_\w+)`", text)) <= tests
