"""Count what makes the code hard to live in, and the limits it must stay under.

    python -m benchmarks.house            # a table for people, then one JSON object
    python -m benchmarks.house --where functions_that_take_config

`tests/test_house.py` holds the limits. Each count is a few lines of `ast` or `re` below.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "ray_sql"
RUN_FILES = re.compile(
    r"\{[^{}]*\}/(?:\{[^{}]*\}|config\.json|contract\.json|metrics\.json|adapter|checkpoint-|"
    r"predictions\.jsonl|gold_errors|report\.html|inputs|merged|trials|ray\b|logs)"
)
"""A path below a run's folder, written as an f-string."""


def files() -> list[Path]:
    """Every Python file of the package."""
    return sorted(PACKAGE.rglob("*.py"))


def functions_that_take_config() -> list[str]:
    """Functions and methods with a parameter annotated with the whole tree of settings."""
    found = []
    for path, node in _nodes(ast.FunctionDef, ast.AsyncFunctionDef):
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        notes = [ast.unparse(each.annotation) for each in arguments if each.annotation]
        if any(map(_is_tree, notes)):
            found.append(_place(path, node))
    return found


def run_file_f_strings() -> list[str]:
    """F-strings outside `store/` that spell the path of a file in a run's folder."""
    return [
        _place(path, node)
        for path, node in _nodes(ast.JoinedStr)
        if path.parent.name != "store" and RUN_FILES.search(ast.unparse(node)) and _is_path(node)
    ]


def kind_dispatches() -> list[str]:
    """Places that ask a message for its `["kind"]`."""
    return [
        _place(path, node)
        for path, node in _nodes(ast.Subscript)
        if isinstance(node.slice, ast.Constant) and node.slice.value == "kind"
    ]


def top_level_names() -> list[str]:
    """Modules and packages that stand side by side at the top of the package."""
    modules = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    return sorted(modules | {path.parent.name for path in PACKAGE.glob("*/__init__.py")})


def own_imports_in_functions() -> list[str]:
    """Imports of this package inside functions."""
    functions = _nodes(ast.FunctionDef, ast.AsyncFunctionDef)
    inside = ((path, node) for path, function in functions for node in ast.walk(function))
    return sorted({_place(path, node) for path, node in inside if _is_own_import(node)})


def conditional_expressions() -> list[str]:
    """`a if b else c` anywhere in the package."""
    return [_place(path, node) for path, node in _nodes(ast.IfExp)]


def docstrings_without_a_verb() -> list[str]:
    """Docstrings with a sentence that begins with What, Whether or How, where a verb belongs."""
    start = re.compile(
        r"(?:^|[.;:!?]\s+)(?:What|Whether|How (?:many|often|long|far|much))\b[^?]*?(?:[.;]|$)"
    )
    return [place for place, text in _docstrings() if start.search(text)]


def long_docstring_sentences(most: int = 25) -> list[str]:
    """Docstrings with a sentence of more than `most` words."""
    return [
        place
        for place, text in _docstrings()
        if any(len(one.split()) > most for one in re.split(r"(?<=[.!?])\s+", text))
    ]


def lines() -> int:
    """Lines of the package's Python files."""
    return sum(path.read_text().count("\n") for path in files())


def readme_lines() -> int:
    """Lines of README.md."""
    return (ROOT / "README.md").read_text().count("\n")


def long_sentences(page: Path, most: int = 35) -> tuple[int, int]:
    """(sentences over `most` words, all sentences) of a page's prose, without code and tables."""
    text = re.sub(r"```.*?```", "\n\n", page.read_text(), flags=re.DOTALL)
    text = re.sub(r"<[^>]+>|!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    blocks = re.split(r"\n\s*\n|\n(?=\s*(?:[-*]|\d+\.)\s)|\n(?=#)|(?<=\n)(?=\|)", text)
    prose = [
        " ".join(block.split()) for block in blocks if not block.strip().startswith(("|", "#"))
    ]
    sentences = [
        one for block in prose for one in re.split(r"(?<=[.!?:])\s+(?=[A-Z`*\[(])", block) if one
    ]
    counted = [len(one.split()) for one in sentences if len(one.split()) > 2]
    return sum(count > most for count in counted), len(counted)


def measure() -> dict[str, float]:
    """Every count by name."""
    long, sentences = long_sentences(ROOT / "README.md")
    return {
        "functions_that_take_config": len(functions_that_take_config()),
        "run_file_f_strings": len(run_file_f_strings()),
        "kind_dispatches": len(kind_dispatches()),
        "top_level_names": len(top_level_names()),
        "own_imports_in_functions": len(own_imports_in_functions()),
        "conditional_expressions_per_1000_lines": round(
            1000 * len(conditional_expressions()) / lines(), 1
        ),
        "docstrings_without_a_verb": len(docstrings_without_a_verb()),
        "long_docstring_sentences": len(long_docstring_sentences()),
        "readme_lines": readme_lines(),
        "readme_long_sentences_percent": round(100 * long / sentences, 1),
        "lines": lines(),
    }


def _nodes(*kinds: type[ast.AST]) -> Iterator[tuple[Path, Any]]:
    for path in files():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, kinds):
                yield path, node


def _docstrings() -> Iterator[tuple[str, str]]:
    """Yield (place, text on one line) of every docstring, those of settings and constants included."""
    for path, node in _nodes(ast.Expr):
        if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            prose = re.split(r"\n\s*\n\s{4,}\S|\n\s*\n {4}", node.value.value)[0]
            yield _place(path, node), " ".join(prose.split())


def _is_own_import(node: ast.AST) -> bool:
    return isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "ray_sql"


def _is_tree(note: str) -> bool:
    trees = {
        "Config",
        "EvaluateConfig",
        "SweepConfig",
        "CheckConfig",
        "PublishConfig",
        "TasksConfig",
    }
    return bool(trees & set(re.findall(r"\w+", note)))


def _is_path(node: ast.JoinedStr) -> bool:
    """Whether an f-string is a path and no sentence: it has no spaces."""
    return " " not in "".join(
        str(part.value) for part in node.values if isinstance(part, ast.Constant)
    )


def _place(path: Path, node: Any) -> str:
    name = getattr(node, "name", "")
    return f"{path.relative_to(ROOT)}:{node.lineno} {name}".strip()


def main() -> None:
    """Print the counts, or with `--where` the places behind one of them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--where", help="list the places of one count")
    parser.add_argument(
        "--quick", action="store_true", help="nothing is left out: it takes seconds"
    )
    given = parser.parse_args()
    if given.where:
        for place in globals()[given.where]():
            print(place)
        return
    counts = measure()
    for name, value in counts.items():
        print(f"{name:<42} {value:>8}")
    print(json.dumps(counts))


if __name__ == "__main__":
    main()
