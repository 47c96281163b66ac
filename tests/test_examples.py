"""What the example scripts import is there; they are too long to run here."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "examples"
SCRIPTS = sorted(ROOT.rglob("*.py"))


def imported(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Modules and the names that are taken from them."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from ((node.module, alias.name) for alias in node.names)


def defined(tree: ast.Module) -> set[str]:
    """Names at a file's top level."""
    names: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {each.id for target in targets for each in ast.walk(target) if isinstance(each, ast.Name)}
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
    return names


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: str(script.relative_to(ROOT)))
def test_imports_from_the_package_and_from_neighbours_are_there(script: Path) -> None:
    missing = []
    for module, name in imported(ast.parse(script.read_text())):
        neighbour = script.with_name(f"{module}.py")
        if neighbour.exists():
            if name not in defined(ast.parse(neighbour.read_text())):
                missing.append(f"{module}.{name}")
        elif module.split(".")[0] == "lightning_influence":
            found = importlib.import_module(module)
            if not hasattr(found, name):
                importlib.import_module(f"{module}.{name}")
    assert not missing
