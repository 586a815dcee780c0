"""Who may import whom: `pipeline → scorer ← trainer`, and Beam in the pipeline alone (DESIGN, section 4)."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FORBIDDEN = {
    "scorer": {"apache_beam", "pipeline", "trainer"},
    "trainer": {"apache_beam", "pipeline"},
    "pipeline": {"trainer"},
}
IMPORT_ALL = """
import importlib, pkgutil, sys
for package in sys.argv[1].split(","):
    folder = importlib.import_module(package).__path__
    modules = [module.name for module in pkgutil.walk_packages(folder, package + ".")]
    assert modules, package
    for name in modules:
        importlib.import_module(name)
print(*sorted({name.partition(".")[0] for name in sys.modules}))
"""


def modules_of(package):
    return sorted((ROOT / package).rglob("*.py"))


def imported_packages(path):
    """Top-level names of all import statements, wherever they stand in the file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import"
            yield node.module.partition(".")[0]


def names_in_strings(path):
    """Top-level names of dotted string constants: what importlib may be given."""
    for node in ast.walk(ast.parse(path.read_text())):
        if (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and node.value.replace(".", "").isidentifier()
        ):
            yield node.value.partition(".")[0]


def loaded_after_importing(packages):
    finished = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL, packages], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr
    return set(finished.stdout.split())


@pytest.mark.parametrize("package", sorted(FORBIDDEN))
def test_no_module_names_a_forbidden_package_in_an_import(package):
    found = {path.name: set(imported_packages(path)) & FORBIDDEN[package] for path in modules_of(package)}
    assert len(found) > 3
    assert {name: packages for name, packages in found.items() if packages} == {}


@pytest.mark.parametrize("package", ["scorer", "trainer"])
def test_beam_is_not_imported_by_name_either(package):
    assert [path.name for path in modules_of(package) if "apache_beam" in names_in_strings(path)] == []


@pytest.mark.slow
def test_importing_all_of_trainer_and_scorer_loads_neither_beam_nor_pipeline():
    loaded = loaded_after_importing("scorer,trainer")
    assert {"scorer", "trainer", "torch"} <= loaded
    assert not loaded & {"apache_beam", "pipeline"}


@pytest.mark.slow
def test_importing_all_of_pipeline_does_not_load_trainer():
    loaded = loaded_after_importing("pipeline")
    assert {"pipeline", "scorer", "apache_beam"} <= loaded
    assert "trainer" not in loaded
