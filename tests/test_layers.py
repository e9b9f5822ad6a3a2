"""Imports go one way, and the package is light at the door."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "ray_sql"

ORDER = [
    "errors", "config", "schema", "data", "linking", "prompts", "linear", "models", "rows", "execution", "metrics", "tracking", "timeline",
    "display", "checkpoints", "cluster", "generate", "evaluate", "compare", "plots", "report", "prepare", "measure", "timing", "trainer",
    "train", "publish", "finetune", "tune", "check", "cli",
]  # fmt: skip
"""Every module may import only those before it (data belongs to the pipeline in this order, too)."""


def imports(path: Path) -> set[str]:
    """The modules of the package that a file imports, wherever in it."""
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
    """Module name → its files: one, or those of its folder."""
    files = {path.stem: [path] for path in PACKAGE.glob("*.py") if path.stem != "__init__"}
    return files | {
        path.parent.name: sorted(path.parent.glob("*.py")) for path in PACKAGE.glob("*/__init__.py")
    }


def test_every_module_has_its_place_in_the_order() -> None:
    assert sorted(modules()) == sorted(ORDER)


def test_imports_go_one_way() -> None:
    wrong = [
        f"{name} imports {other}"
        for name, files in modules().items()
        for file in files
        for other in imports(file) - {name}
        if ORDER.index(other) >= ORDER.index(name)
    ]
    assert not wrong


def test_tracking_knows_no_stage() -> None:
    assert imports(PACKAGE / "tracking.py") == {"config", "errors"}


def test_importing_settings_and_execution_loads_nothing_heavy() -> None:
    heavy = "torch transformers ray mlflow trl peft datasets sqlalchemy"
    code = (
        "import sys, ray_sql, ray_sql.config, ray_sql.database, ray_sql.cli\n"
        f"print([name for name in '{heavy}'.split() if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
