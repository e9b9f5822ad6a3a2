"""Imports go one way, from floor to floor, and the package is light at the door."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

from ray_sql import cli

PACKAGE = Path(__file__).parent.parent / "ray_sql"

FLOORS = [
    {"errors", "tasks", "display"},
    {"config", "database"},
    {"data", "metrics", "store", "models", "cluster", "tracking"},
    {"rows", "generate", "report", "curate"},
    {"evaluate", "train"},
    {"publish", "finetune", "tune", "serve", "preflight", "cli", "__main__"},
]
"""A module imports from the floors above its own in this list, and of its own floor only itself."""

NEIGHBOURS = {
    "config": set(),
    "database": {"config"},
    "data": {"store"},
    "cluster": {"models"},
    "generate": {"rows"},
    "curate": {"report"},
    "train": {"evaluate"},
    "finetune": {"publish"},
    "tune": {"finetune", "publish"},
    "preflight": {"finetune", "publish", "tune"},
}
"""Modules of its own floor that a module may import besides."""


def imports(path: Path) -> set[str]:
    """Return the modules of the package that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "ray_sql":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ray_sql."):
            found.add((node.module or "").split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {
                alias.name.split(".")[1]
                for alias in node.names
                if alias.name.startswith("ray_sql.")
            }
    return found - {"__version__"}


def modules() -> dict[str, list[Path]]:
    """Return the files of each module: one, or those of its folder."""
    files = {path.stem: [path] for path in PACKAGE.glob("*.py") if path.stem != "__init__"}
    return files | {
        path.parent.name: sorted(path.parent.glob("*.py")) for path in PACKAGE.glob("*/__init__.py")
    }


def floor(module: str) -> int:
    """Return the number of the floor that a module is on."""
    return next(number for number, floor in enumerate(FLOORS) if module in floor)


def test_every_module_has_its_floor() -> None:
    assert sorted(modules()) == sorted(set.union(*FLOORS))


def test_imports_go_one_way() -> None:
    wrong = [
        f"{file.relative_to(PACKAGE)} imports {other}"
        for name, files in modules().items()
        for file in files
        for other in imports(file) - {name} - NEIGHBOURS.get(name, set())
        if floor(other) >= floor(name)
    ]
    assert not wrong


def test_neighbours_import_each_other_one_way() -> None:
    circles = [
        (name, other)
        for name, others in NEIGHBOURS.items()
        for other in others
        if name in NEIGHBOURS.get(other, set())
    ]
    assert not circles


def test_tracking_knows_no_stage() -> None:
    assert {module for path in (PACKAGE / "tracking").glob("*.py") for module in imports(path)} <= {
        "config",
        "errors",
        "tracking",
    }


def loaded(*modules: str) -> str:
    """Return the heavy libraries that importing these modules loads, as a list in words."""
    heavy = "torch transformers ray mlflow trl peft datasets sqlalchemy scipy"
    code = (
        f"import sys, {', '.join(modules)}\n"
        f"print([name for name in '{heavy}'.split() if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_importing_settings_and_databases_loads_nothing_heavy() -> None:
    assert loaded("ray_sql", "ray_sql.config", "ray_sql.database", "ray_sql.cli") == "[]"


def test_a_job_that_says_nothing_at_its_start_loads_nothing_heavy() -> None:
    doors = [
        door.partition(":")[0]
        for job in cli.JOBS.values()
        if job.is_light
        for door in (job.run, job.plan)
        if door
    ]
    assert "ray_sql.finetune.runs" in doors and "ray_sql.evaluate.compare" in doors
    assert loaded(*doors) == "[]"
