"""The report loads nothing, shows every number and question, and runs no text that it shows."""

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from ray_sql.evaluate import results, scoring
from ray_sql.generate import Answer, Question
from ray_sql.report import figures, html
from ray_sql.store.run_folder import RunFolder
from ray_sql.tasks import SCHEMA, TASKS

HOSTILE = (
    r"$\frac{$ </script><script>alert('x')</script><img src=x onerror=alert(1)> & "
    """"quoted" 'SQL'"""
)


class Page(HTMLParser):
    """The tags of a page, and the text of its cells."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.cells: list[str] = []
        self._inside = False
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag in ("td", "th"):
            self.cells.append("")
            self._inside = True

    def handle_endtag(self, tag: str) -> None:
        self._inside = self._inside and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.cells[-1] += data


def questions(count: int) -> list[dict[str, Any]]:
    return [
        {
            "id": str(n), "split": "dev", "db_id": f"db{n % 2}", "hardness": "easy",
            "question": f"Question {n}?", "gold": f"SELECT {n}", "predicted": f"SELECT {n}",
            "raw": "", "prompt_tokens": 100 + n,
            "verdict": "correct", "error": None, "error_kind": "none",
        }
        for n in range(count)
    ]  # fmt: skip


def page_of(measured: dict[str, list[dict[str, Any]]], config: Any, task: str = "sql") -> str:
    metrics = {
        "task_type": task,
        "dataset_id": "some data",
        **results.summarise(measured, TASKS[config.task_type], config.evaluate),
    }
    return html.page("my run", metrics, measured, figures.figures(metrics, measured))


@pytest.fixture
def text(make_config: Any) -> str:
    """Thirty questions: the base model is right on a third, the tuned one on all but one."""
    tuned = questions(30)
    wrong = {"verdict": "wrong", "error": "other rows", "error_kind": "wrong rows"}
    tuned[7] |= dict.fromkeys(("question", "hardness", "db_id"), HOSTILE)
    base = [row | (wrong if n % 3 else {}) for n, row in enumerate(tuned)]
    tuned[7] |= wrong | dict.fromkeys(("predicted", "error"), HOSTILE)
    return page_of({"base": base, "tuned": tuned}, make_config())


def test_the_page_shows_scores_with_n_and_intervals_figures_and_every_question(text: str) -> None:
    page = Page(text)
    row = page.cells.index("tuned")
    assert page.cells[row - 1 : row + 4] == ["dev", "tuned", "30", "96.7 %", "83.3 – 99.4 %"]
    assert re.fullmatch(r"[\d.]+ – 100\.0 % \(3\)", page.cells[row + 4])
    assert "McNemar p = " in text and "some data" in text and "spider" in text
    assert {cell for cell in page.cells if "Question" in cell} >= {
        f"dev {n} · db{n % 2} · easyQuestion {n}?SELECT {n}" for n in (0, 29)
    }
    assert (
        sum("data-verdict-tuned" in attributes for tag, attributes in page.tags if tag == "tr")
        == 30
    )
    filters = [
        attributes["data-filter"] for _, attributes in page.tags if "data-filter" in attributes
    ]
    assert filters == ["split", "db_id", "hardness", "verdict-base", "verdict-tuned", "text"]
    alts = [attributes["alt"] for tag, attributes in page.tags if tag == "img"]
    assert alts == ["accuracy dev", "databases dev", "prompt tokens", "errors"]


def test_the_page_needs_nothing_but_itself(text: str) -> None:
    tags = Page(text).tags
    addresses = [
        value or ""
        for _, attributes in tags
        for name, value in attributes.items()
        if name in ("src", "href")
    ]
    assert addresses and all(
        address.startswith("data:image/svg+xml;base64,") for address in addresses
    )
    assert not {"link", "iframe", "object", "base"} & {tag for tag, _ in tags}
    assert "url(" not in text and "@import" not in text


def test_the_text_of_data_and_models_is_shown_and_never_run(text: str) -> None:
    page = Page(text)
    assert sum(tag == "script" for tag, _ in page.tags) == 1
    assert not [attributes for _, attributes in page.tags if "onerror" in attributes]
    shown = [cell for cell in page.cells if HOSTILE in cell]
    assert len(shown) == 2 and "wrong" in shown[-1]
    assert any(attributes.get("data-hardness") == HOSTILE for _, attributes in page.tags)


def test_the_same_run_gives_the_same_page(make_config: Any) -> None:
    assert page_of({"file": questions(25)}, make_config()) == page_of(
        {"file": questions(25)}, make_config()
    )


def test_links_have_a_page_too(make_config: Any) -> None:
    config = make_config(task_type="schema")
    gold = '{"customer": ["name", "city"]}'
    asked = [Question(str(n), "dev", f"db{n}", "Who?", gold, None, None, [1]) for n in range(3)]
    said = [gold, '{"customer": ["name", "city", "id"]}', "no links at all"]
    answers = [Answer(f"```json\n{text}\n```", 10, 5, 0.1) for text in said]
    judged = scoring.score(asked, answers, SCHEMA, config.evaluate)
    text = page_of({"file": judged}, config, "schema")
    for shown in (
        "strict recall",
        "column F1 (micro / macro)",
        "extra names",
        "no links at all",
        "66.7 %",
    ):
        assert shown in text, shown
    assert "hardness" not in [attributes.get("data-filter") for _, attributes in Page(text).tags]


def test_a_split_of_failing_gold_has_a_page(make_config: Any) -> None:
    rows = [
        row | {"verdict": "gold_error", "error_kind": "gold error", "error": "no such table"}
        for row in questions(2)
    ]
    assert "not scored" in page_of({"file": rows}, make_config())


def test_it_is_written_into_the_runs_folder(make_config: Any, tmp_path: Path) -> None:
    config = make_config()
    measured = {"file": questions(3)}
    html.write(
        RunFolder(config.run_dir),
        "my run",
        {
            "task_type": "sql",
            "dataset_id": "d",
            **results.summarise(measured, TASKS[config.task_type], config.evaluate),
        },
        measured,
        {},
    )
    assert (tmp_path / "out" / "run" / "report.html").read_text().startswith("<!DOCTYPE html>")


@pytest.mark.browser
@pytest.mark.parametrize(
    ("filters", "shown"),
    [
        ("", "30 of 30 questions: base right on 10, tuned right on 29"),
        (
            "#verdict-base=wrong&verdict-tuned=correct",
            "19 of 30 questions: base right on 0, tuned right on 19",
        ),
        ("#db_id=db1&text=QUESTION 2", "5 of 30 questions: base right on 2, tuned right on 5"),
        ("#split=dev&text=alert('x')", "1 of 30 questions: base right on 0, tuned right on 0"),
    ],
)
def test_filters_work_in_a_browser(text: str, tmp_path: Path, filters: str, shown: str) -> None:
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("chromium is not installed")
    (tmp_path / "report.html").write_text(text, encoding="utf-8")
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--dump-dom",
    ]
    address = (tmp_path / "report.html").as_uri() + filters
    done = subprocess.run(
        [chromium, *flags, address], capture_output=True, text=True, check=True, timeout=60
    )
    assert f'<span id="shown">{shown}</span>' in done.stdout
    visible = [
        attributes
        for tag, attributes in Page(done.stdout).tags
        if tag == "tr" and "hidden" not in attributes
    ]
    assert sum("data-split" in attributes for attributes in visible) == int(shown.split()[0])
