"""Whatever a reader may copy is true: settings, YAML files, commands, the tree, make targets."""

from __future__ import annotations

import re
import runpy
import shlex
import tomllib
from collections.abc import Iterator
from itertools import dropwhile
from operator import attrgetter
from pathlib import Path

import pytest
import yaml

from ray_sql import __version__
from ray_sql.cli import JOBS
from ray_sql.config import SweepConfig, load
from tests.test_layers import FLOORS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
YAMLS = sorted((ROOT / "jobs" / "configs").glob("*.yaml"))
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "benchmarks" / "RESULTS.md",
]


def commands() -> list[tuple[str, list[str]]]:
    """Return the commands of the pages and of the jobs' docstrings, as (job, arguments)."""
    texts = [page.read_text() for page in PAGES] + [
        (ROOT / "jobs" / f"{job}.py").read_text() for job in JOBS
    ]
    found = []
    for text in texts:
        text = text.replace("\\\n", " ")
        found += [
            (job, shlex.split(rest))
            for job, rest in re.findall(r"(?:python -m jobs\.|ray-sql )([a-z]+)([^\n`)#]*)", text)
        ]
    return found


def settings_of(node: yaml.MappingNode, section: str = "") -> Iterator[tuple[str, int]]:
    """Yield the dotted name and the line of every setting of a YAML file."""
    for key, value in node.value:
        if not section and isinstance(value, yaml.MappingNode):
            yield from settings_of(value, f"{key.value}.")
        else:
            yield f"{section}{key.value}", key.start_mark.line


def test_the_settings_page_is_what_the_settings_say() -> None:
    page = runpy.run_path(str(ROOT / "docs" / "settings.py"))["page"]()
    assert (ROOT / "docs" / "settings.md").read_text() == page, "run: python docs/settings.py"


def test_every_yaml_is_a_valid_configuration() -> None:
    assert len(YAMLS) >= 4
    for path in YAMLS:
        assert load(SweepConfig, ["--config", str(path)]).studies(), path


def test_every_setting_of_a_yaml_differs_from_the_default_or_says_why() -> None:
    required = ["--model_name", "m", "--output_name", "o", "--task_type", "schema,sql"]
    default = load(SweepConfig, required)
    for path in YAMLS:
        text = path.read_text()
        assert text.startswith("#"), f"{path.name} does not say what it is for"
        given, lines = load(SweepConfig, ["--config", str(path)]), text.splitlines()
        for name, line in settings_of(yaml.compose(text)):
            same = attrgetter(name)(given) == attrgetter(name)(default)
            assert not same or "#" in lines[line], f"{path.name}: {name} is the default"


def test_commands_in_the_pages_parse() -> None:
    found = commands()
    assert {job for job, _ in found} == set(JOBS), "every job is shown somewhere"
    for job, arguments in found:
        if not arguments or "--help" in arguments or "…" in " ".join(arguments):
            continue
        words = [
            str(ROOT / word) if word.startswith("jobs/configs/") else word for word in arguments
        ]
        words = [word for word in words if word not in ("…", "...")]
        existing = "--config" not in words or Path(words[words.index("--config") + 1]).is_file()
        base = [] if existing else ["--model_name", "m", "--output_name", "o", "--task_type", "sql"]
        if not existing:
            del words[words.index("--config") : words.index("--config") + 2]
        if job == "demo":
            base = ["--config", str(ROOT / "ray_sql" / JOBS[job].defaults)]
        if words and not words[0].startswith("-") and JOBS[job].begin:
            base = ["--model_name", "m", "--output_name", "o", "--task_type", "sql"]
            words = list(dropwhile(lambda word: not word.startswith("-"), words))
        elif words and not words[0].startswith("-"):
            words = [f"--{JOBS[job].files}", *words]
        load(JOBS[job].settings, base + words)


def test_make_targets_in_the_readme_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"make ([a-z-]+)", README))
    assert {"demo", "test"} <= named <= targets


def test_the_tree_in_contributing_is_the_tree() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    blocks = re.findall(r"```text\nray_sql/\n(.*?)```", text, re.DOTALL)
    floors = [set(re.findall(r"^  (\w+)(?:\.py|/)", block, re.MULTILINE)) for block in blocks]
    assert floors == FLOORS
    shown, folder = set(), ""
    for line in "".join(blocks).splitlines():
        name = line.split()[0]
        folder = folder if line.startswith("    ") else name
        shown.add(f"{folder}{name}" if line.startswith("    ") else name)
    package = ROOT / "ray_sql"
    files = {str(path.relative_to(package)) for path in package.rglob("*.py")}
    assert {name for name in shown if name.endswith(".py")} == {
        name for name in files if not name.endswith("__init__.py")
    }


def test_files_that_contributing_names_exist() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    table = text.partition("## To change X, edit Y")[2].partition("## Rules")[0]
    named = re.findall(r"`([\w.]+/[\w./]*)`", table)
    assert len(named) > 30
    for name in named:
        assert (ROOT / "ray_sql" / name).exists() or (ROOT / name).exists(), name


def test_badges_are_true() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert f"{project['requires-python'].removeprefix('>=')}+<" in _badge("python")
    assert f"{project['license']}<" in _badge("licence")
    assert "make test<" in _badge("tests")


def test_the_changelog_and_the_citation_are_of_this_version() -> None:
    newest = re.search(r"^## (\d\S*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest and newest[1] == __version__
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == __version__


def _badge(name: str) -> str:
    return (ROOT / "docs" / f"badge-{name}.svg").read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_in_the_pages_lead_somewhere(page: Path) -> None:
    for target, anchor in re.findall(r"\]\((?!http)([^)#]*)#?([^)]*)\)", page.read_text()):
        place = page.parent / target if target else page
        assert place.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in _anchors(place), f"{page.name}: {target}#{anchor}"


def _anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}


def test_messages_in_troubleshooting_are_those_of_the_code() -> None:
    code = "".join(path.read_text() for path in sorted((ROOT / "ray_sql").rglob("*.py")))
    said = re.sub(r'"\s*\n\s*f?"', "", code)  # a message over several lines
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    messages = re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)
    assert len(messages) > 20
    assert not [message for message in messages if message not in said]
