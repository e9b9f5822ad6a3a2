"""The code stays as easy to live in as it is: counts of `benchmarks.house` have limits."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import TypeGuard

import pytest

from benchmarks import house

LIMITS = {
    "functions_that_take_config": 90,
    "run_file_f_strings": 0,
    "kind_dispatches": 0,
    "top_level_names": 24,
    "own_imports_in_functions": 6,
    "nested_comprehensions": 0,
    "nested_conditionals": 0,
    "conditional_expressions_per_1000_lines": 15.0,
    "docstrings_without_a_verb": 0,
    "long_docstring_sentences": 0,
    "readme_lines": 150,
    "readme_long_sentences_percent": 5.0,
}
TESTS = Path(__file__).parent
TREE_TAKERS = {
    "cli": "how a job begins",
    "config": "the tree itself",
    "data": "the stage's door; a contract records settings of six sections",
    "evaluate": "the stage's door",
    "finetune": "one run from end to end",
    "generate": "workers rebuild the settings",
    "preflight": "the checks before a run read every section",
    "publish": "the stage's door",
    "serve": "an adapter's settings come from its own file",
    "train": "the stage's door",
    "tune": "trials change any setting",
}
"""Modules in which a function may take the whole tree of settings, and why."""


@pytest.fixture(scope="module")
def counts() -> dict[str, float]:
    return house.measure()


@pytest.mark.parametrize("name", LIMITS)
def test_a_count_stays_under_its_limit(counts: dict[str, float], name: str) -> None:
    places = f"see: python -m benchmarks.house --where {name}"
    assert counts[name] <= LIMITS[name], places


def test_every_count_has_a_limit(counts: dict[str, float]) -> None:
    assert counts.keys() - {"lines"} == LIMITS.keys()  # features add lines


def test_only_doors_take_the_whole_tree_of_settings() -> None:
    modules = set()
    for place in house.functions_that_take_config():
        module = place.split("/")[1].split(":")[0].removesuffix(".py")
        modules.add(module)
    assert modules <= TREE_TAKERS.keys()


def private_names() -> list[str]:
    """List private names of this package's modules that tests import, patch or call."""
    places = []
    for path in sorted(TESTS.glob("*.py")):
        imports = [node for node in ast.walk(ast.parse(path.read_text())) if is_own_import(node)]
        names = {alias.asname or alias.name for node in imports for alias in node.names}
        places += [name for name in names if re.match("_[^_]", name)]
        modules = "|".join(sorted(names)) or "none"
        places += re.findall(rf"\b(?:{modules})\._[^_]\w*", path.read_text())
    return places


def is_own_import(node: ast.AST) -> TypeGuard[ast.ImportFrom]:
    return isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "ray_sql"


def test_tests_come_in_through_public_doors() -> None:
    assert not private_names()


def test_docstrings_are_counted_to_their_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = " ".join(["word"] * 26)
    (tmp_path / "a.py").write_text(
        'def f():\n    """Do it.\n\n    How it goes.\n\n'
        f'        {long} in code\n\n    {long}.\n    """\n'
    )
    monkeypatch.setattr(house, "PACKAGE", tmp_path)
    monkeypatch.setattr(house, "ROOT", tmp_path)
    assert house.docstrings_without_a_verb() == house.long_docstring_sentences() == ["a.py:2"]
