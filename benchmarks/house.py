"""Count what makes the code hard to live in.

    python -m benchmarks.house            # a table for people, then one JSON object
    python -m benchmarks.house --where functions_that_take_config

`tests/test_house.py` holds the limits. Each count is a few lines of `ast` or `re` below.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "ray_sql"
RUN_FILES = re.compile(
    r"\{[^{}]*(?:run_dir|folder|run|uri)\}/\{|\{[^{}]*\}/(?:config\.json|contract\.json|metrics\.json|adapter|checkpoint-|"
    r"predictions\.jsonl|summary\.json|gold_errors|report\.html|inputs|merged|trials|ray\b|logs)"
)
"""A path below a run's folder, written as an f-string."""
TREES = frozenset(
    ["Config", "EvaluateConfig", "SweepConfig", "CheckConfig", "PublishConfig", "TasksConfig"]
)
"""Classes that hold the whole tree of settings."""
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def files() -> list[Path]:
    """Return every Python file of the package."""
    return sorted(PACKAGE.rglob("*.py"))


def functions_that_take_config() -> list[str]:
    """List functions and methods with a parameter annotated with the whole tree of settings."""
    places = []
    for path, node in _nodes(ast.FunctionDef, ast.AsyncFunctionDef):
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        notes = [ast.unparse(argument.annotation) for argument in arguments if argument.annotation]
        if any(map(_is_tree, notes)):
            places.append(_place(path, node))
    return places


def run_file_f_strings() -> list[str]:
    """List f-strings outside `store/` that spell the path of a file in a run's folder."""
    return [
        _place(path, node)
        for path, node in _nodes(ast.JoinedStr)
        if path.parent.name != "store" and RUN_FILES.search(ast.unparse(node)) and _is_path(node)
    ]


def kind_dispatches() -> list[str]:
    """List places that ask a message for its `["kind"]`."""
    return [
        _place(path, node)
        for path, node in _nodes(ast.Subscript)
        if isinstance(node.slice, ast.Constant) and node.slice.value == "kind"
    ]


def top_level_names() -> list[str]:
    """List modules and packages that stand side by side at the top of the package."""
    modules = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    return sorted(modules | {path.parent.name for path in PACKAGE.glob("*/__init__.py")})


def own_imports_in_functions() -> list[str]:
    """List imports of this package inside functions."""
    functions = _nodes(ast.FunctionDef, ast.AsyncFunctionDef)
    inside = ((path, node) for path, function in functions for node in ast.walk(function))
    return sorted({_place(path, node) for path, node in inside if _is_own_import(node)})


def conditional_expressions() -> list[str]:
    """List every `a if b else c` of the package."""
    return [_place(path, node) for path, node in _nodes(ast.IfExp)]


def nested_conditionals() -> list[str]:
    """List conditional expressions that hold another one."""
    return [_place(path, node) for path, node in _nodes(ast.IfExp) if _is_nested_conditional(node)]


def nested_comprehensions() -> list[str]:
    """List comprehensions that loop over something in a loop in a loop."""
    return [_place(path, node) for path, node in _nodes(*COMPREHENSIONS) if _loops(node) > 2]


def docstrings_without_a_verb() -> list[str]:
    """List docstrings with a sentence that begins with What, Whether or How instead of a verb."""
    start = re.compile(r"(?:^|[.;:!?]\s+)(?:What|Whether|How)\b[^?]*?(?:[.;]|$)")
    return [place for place, text in _docstrings() if start.search(text)]


def long_docstring_sentences(most: int = 25) -> list[str]:
    """List docstrings with a sentence of more than `most` words."""
    places = []
    for place, text in _docstrings():
        sentences = re.split(r"(?<=[.!?])\s+", text)
        if max(len(sentence.split()) for sentence in sentences) > most:
            places.append(place)
    return places


def lines() -> int:
    """Return the number of lines in the package's Python files."""
    return sum(path.read_text().count("\n") for path in files())


def readme_lines() -> int:
    """Return the number of lines of README.md."""
    return (ROOT / "README.md").read_text().count("\n")


def long_sentences(page: Path, most: int = 35) -> tuple[int, int]:
    """Return (sentences over `most` words, all sentences) of a page, without code and tables."""
    text = re.sub(r"```.*?```", "\n\n", page.read_text(), flags=re.DOTALL)
    text = re.sub(r"<[^>]+>|!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    blocks = re.split(r"\n\s*\n|\n(?=\s*(?:[-*]|\d+\.)\s)|\n(?=#)|(?<=\n)(?=\|)", text)
    words = []
    for block in blocks:
        if block.strip().startswith(("|", "#")):
            continue
        sentences = re.split(r"(?<=[.!?:])\s+(?=[A-Z`*\[(])", " ".join(block.split()))
        words += [len(sentence.split()) for sentence in sentences]
    counted = [count for count in words if count > 2]
    return sum(count > most for count in counted), len(counted)


LISTS: tuple[Callable[[], list[str]], ...] = (
    functions_that_take_config,
    run_file_f_strings,
    kind_dispatches,
    top_level_names,
    own_imports_in_functions,
    nested_comprehensions,
    nested_conditionals,
    docstrings_without_a_verb,
    long_docstring_sentences,
)
"""Counts whose places `--where` lists."""


def measure() -> dict[str, float]:
    """Return every count by name."""
    counts: dict[str, float] = {places.__name__: len(places()) for places in LISTS}
    long, sentences = long_sentences(ROOT / "README.md")
    counts["conditional_expressions_per_1000_lines"] = round(
        1000 * len(conditional_expressions()) / lines(), 1
    )
    counts["readme_lines"] = readme_lines()
    counts["readme_long_sentences_percent"] = round(100 * long / sentences, 1)
    counts["lines"] = lines()
    return counts


def _nodes(*kinds: type[ast.AST]) -> Iterator[tuple[Path, Any]]:
    for path in files():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, kinds):
                yield path, node


def _docstrings() -> Iterator[tuple[str, str]]:
    """Yield (place, sentences on one line) of every docstring, also of settings and constants.

    Paragraphs that are indented are commands and tables.
    """
    for path, node in _nodes(ast.Expr):
        if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            paragraphs = re.split(r"\n\s*\n", inspect.cleandoc(node.value.value))
            prose = [one for one in paragraphs if not one.startswith("    ")]
            prose = [re.sub(r"\n- ", ".\n", one.removeprefix("- ")) for one in prose]
            yield _place(path, node), " ".join(" ".join(prose).split())


def _loops(node: ast.AST) -> int:
    """Return how deep the `for` of comprehensions stand in each other, from this node down."""
    own = len(node.generators) if isinstance(node, COMPREHENSIONS) else 0
    return own + max(map(_loops, ast.iter_child_nodes(node)), default=0)


def _is_nested_conditional(node: ast.IfExp) -> bool:
    return any(isinstance(inner, ast.IfExp) for inner in ast.walk(node) if inner is not node)


def _is_own_import(node: ast.AST) -> bool:
    return isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "ray_sql"


def _is_tree(note: str) -> bool:
    return bool(TREES & set(re.findall(r"\w+", note)))


def _is_path(node: ast.JoinedStr) -> bool:
    """Return True where an f-string has no spaces, as a path has none and a sentence has some."""
    constants = [part for part in node.values if isinstance(part, ast.Constant)]
    return not any(" " in str(part.value) for part in constants)


def _place(path: Path, node: Any) -> str:
    name = getattr(node, "name", "")
    return f"{path.relative_to(ROOT)}:{node.lineno} {name}".strip()


def main() -> None:
    """Print the counts, or with `--where` the places behind one of them."""
    listed = {places.__name__: places for places in (*LISTS, conditional_expressions)}
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--where", choices=listed, help="list the places of one count")
    parser.add_argument("--quick", action="store_true", help="change nothing: it takes seconds")
    arguments = parser.parse_args()
    if arguments.where:
        print("\n".join(listed[arguments.where]()))
        return
    counts = measure()
    for name, value in counts.items():
        print(f"{name:<42} {value:>8}")
    print(json.dumps(counts))


if __name__ == "__main__":
    main()
