"""The floor plan, held by reading the source: imports go down, third parties stay in their rooms."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "lightning_influence"
MODULES = sorted(PACKAGE.rglob("*.py"))

# A module imports from lower floors only, and from its own folder.
FLOORS = [
    {"errors", "gradients"},
    {"processes", "background"},
    {"functional"},
    {"layers", "losses", "factors", "curvature", "codecs", "store", "metrics"},
    {"step", "scoring", "stored_rows", "attachment", "segments", "penalties", "exports"},
    {"layer_plan", "damping_advice", "row_choice"},
    {"layer_record"},
    {"blocks"},
    {"row_file", "fisher"},
    {"recorder", "query"},
    {"trajectory", "solvers"},
    {"training"},
    {"evaluation"},
    {"callback", "module"},
    {"cli"},
    {"__init__"},
]
FLOOR_OF = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
ONLY_IN = {
    "h5py": {"store"},
    "lightning": {"callback", "module", "training", "evaluation"},
    "lightning_utilities": {"training"},
    "torchmetrics": {"factors", "metrics"},
}
OPTIONAL = ("matplotlib", "sklearn", "transformers", "torchvision", "scipy", "pandas", "statsmodels")


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_names(path: Path) -> set[str]:
    """Dotted names of all imported modules, those inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: imports are absolute"
            members = {f"{node.module}.{alias.name}" for alias in node.names}
            modules = {name for name in members if (PACKAGE.parent / f"{name.replace('.', '/')}.py").exists()}
            names |= modules or {str(node.module)}
    return names


def own_imports(path: Path) -> set[str]:
    """Dotted names below the package, such as `codecs.base`."""
    prefix = f"{PACKAGE.name}."
    return {name.removeprefix(prefix) for name in imported_names(path) if name.startswith(prefix)}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_to_lower_floors_or_stay_in_their_folder(path):
    room = room_of(path)
    for name in own_imports(path):
        other = name.split(".")[0]
        assert other == room or FLOOR_OF[other] < FLOOR_OF[room], f"{room} must not import {name}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_third_parties_stay_in_their_rooms(path):
    for name in imported_names(path):
        rooms = ONLY_IN.get(name.split(".")[0])
        assert rooms is None or room_of(path) in rooms, f"{name} belongs into {rooms}"


def test_modules_import_each_other_without_cycles():
    graph = {}
    for path in MODULES:
        dotted = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
        graph[dotted] = own_imports(path)

    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names them


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_stay_below_400_lines(path):
    assert len(path.read_text().splitlines()) <= 400


def test_importing_the_package_loads_no_optional_library():
    # torchmetrics, which Lightning imports, loads matplotlib and SciPy where they are installed
    assert loaded_by("lightning_influence") == loaded_by("lightning.pytorch")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_module_names_an_optional_library(path):
    assert not {name.split(".")[0] for name in imported_names(path)} & set(OPTIONAL)


def loaded_by(module: str) -> set[str]:
    code = f"import sys, {module}; print(*[m for m in {OPTIONAL} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())
