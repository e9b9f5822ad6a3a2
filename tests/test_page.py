"""The page in headless Chromium, on a real service: asked, edited, corrected, refused, cut off."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest

from ray_sql.serve.engine import Engine
from tests.conftest import QUESTIONS
from tests.serving import Held, always_answering, count_waiting, serving
from tests.waiting import HANGS, wait_until

playwright = pytest.importorskip("playwright.sync_api")
expect = playwright.expect
COUNTED, COUNT = QUESTIONS[6]
"""A question whose answer the tuned run knows, and its SQL."""

pytestmark = pytest.mark.browser
Open = Callable[..., Any]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Share Chromium."""
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("chromium is not installed")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Any) -> Iterator[Open]:
    """Open the page of a service; a script that fails, or that the page forbids, fails the test."""
    contexts, mistakes = [], []

    def call(client: httpx2.Client, **context: Any) -> Any:
        contexts.append(browser.new_context(**context))
        page = contexts[-1].new_page()
        page.set_default_timeout(HANGS * 1000)
        page.on("pageerror", lambda error: mistakes.append(str(error)))
        page.on(
            "console",
            lambda line: mistakes.append(line.text) if "Content Security" in line.text else None,
        )
        page.goto(str(client.base_url))
        return page

    expect.set_options(timeout=HANGS * 1000)
    yield call
    for context in contexts:
        context.close()
    assert not mistakes


def ask(page: Any, question: str = COUNTED) -> None:
    """Ask about the database mall by the keyboard."""
    page.get_by_label("Database", exact=True).select_option("mall")
    expect(page.locator(".table")).to_have_count(3)
    page.get_by_label("Question", exact=True).fill(question)
    page.keyboard.press("Control+Enter")


def used(page: Any) -> list[str]:
    """Return the tables and columns that the schema highlights."""
    marked = page.locator(".table.used, li.used")
    return marked.evaluate_all("all => all.map(one => one.dataset.name)")


def rows(page: Any) -> list[list[str]]:
    """Return the cells that the table shows."""
    lines = page.locator("#rows tr")
    return lines.evaluate_all("all => all.map(one => [...one.cells].map(cell => cell.textContent))")


def test_a_question_shows_sql_rows_links_and_times(engine: Engine, open_page: Open) -> None:
    with serving(engine) as client:
        page = open_page(client)
        expect(page.get_by_label("Question", exact=True)).to_be_focused()
        ask(page)
        expect(page.locator("#facts")).to_contain_text("1 row · written in ")
        assert page.get_by_label("SQL").input_value() == COUNT
        assert rows(page) == [["COUNT(*)"], ["2"]]
        assert used(page) == ["product", "price"]
        assert page.locator("#schema [data-name=sale] li").all_inner_texts() == [
            "customer_id\ninteger\nKEY\n→ customer.id",
            "product_id\ninteger\nKEY\n→ product.id",
            "day\ntext\nKEY",
            "amount\ninteger",
        ]
        page.get_by_label("Find a table or column").fill("price")
        assert page.locator(".table:visible").count() == 1


def test_sql_is_edited_run_and_undone(engine: Engine, open_page: Open) -> None:
    with serving(engine) as client:
        page = open_page(client)
        ask(page)
        sql = page.get_by_label("SQL")
        expect(sql).to_have_value(COUNT)
        sql.fill("SELECT name, city, 9007199254740993, '<b>x</b>' FROM customer WHERE id > 2")
        page.keyboard.press("Control+Enter")
        expect(page.locator("#facts")).to_contain_text("2 rows")
        assert rows(page)[1:] == [
            ["Cleo", "Lisbon", "9007199254740993", "<b>x</b>"],
            ["Dan", "NULL", "9007199254740993", "<b>x</b>"],
        ]
        assert used(page) == ["customer", "id", "name", "city"]
        sql.fill("DROP TABLE customer")
        page.get_by_role("button", name="Run").click()
        expect(page.locator("#facts")).to_contain_text("Not run: refused:")
        assert page.locator("#scroll").is_hidden()
        page.get_by_role("button", name="Undo changes").click()
        expect(sql).to_have_value(COUNT)


def test_html_in_questions_names_and_cells_stays_text(engine: Engine, open_page: Open) -> None:
    hostile = "<img src=x onerror=document.title='taken'>"
    with serving(engine) as client:
        page = open_page(client)
        ask(page, hostile)
        expect(page.locator("#asked")).to_have_text(hostile)
        page.get_by_label("SQL").fill(f'SELECT 1 AS "{hostile}"')
        page.keyboard.press("Control+Enter")
        expect(page.locator("#rows th")).to_have_text(hostile)
        page.get_by_label("SQL").fill(f'SELECT "{hostile}" FROM nothing')
        page.keyboard.press("Control+Enter")
        expect(page.locator("#facts")).to_contain_text("Not run")
        assert page.locator("img").count() == 0
        assert page.title() == "Ask a database"


def test_tables_may_be_called_as_what_every_object_has(engine: Engine, open_page: Open) -> None:
    with serving(engine) as client:
        schema = client.get("/v1/databases/mall").json()
        for table, name in zip(schema["tables"], ("constructor", "__proto__"), strict=False):
            table["name"] = name
        page = open_page(client)
        page.route("**/v1/databases/mall", lambda route: route.fulfill(json=schema))
        ask(page)
        expect(page.locator("#facts")).to_contain_text("1 row")
        names = page.locator(".table").evaluate_all("all => all.map(one => one.dataset.name)")
        assert names == ["constructor", "__proto__", "sale"]
        assert used(page) == []


def test_votes_show_their_candidates(engine: Engine, open_page: Open) -> None:
    with serving(engine) as client:
        page = open_page(client)
        page.get_by_text("Options").click()
        page.get_by_label("Answers", exact=True).select_option("4")
        ask(page)
        expect(page.locator("#others-title")).to_contain_text("Candidates (4 drawn")
        page.locator("#others-title").click()
        candidate = page.locator("#candidates button").last
        words = candidate.inner_text()
        candidate.click()
        expect(page.get_by_label("SQL")).to_have_value(words)


def test_names_that_the_database_lacks_are_mended(engine: Engine, open_page: Open) -> None:
    with serving(engine) as client, always_answering(engine, "SELECT nam FROM customer"):
        page = open_page(client)
        ask(page)
        expect(page.locator("#facts")).to_contain_text("Not run: no such column")
        page.get_by_text("Options").click()
        page.get_by_label("Mend names that the database lacks").check()
        page.get_by_role("button", name="Ask").click()
        expect(page.locator("#facts")).to_contain_text("4 rows")
        assert page.get_by_label("SQL").input_value() == "SELECT name FROM customer"


def test_a_wrong_answer_is_corrected_and_kept(
    engine: Engine, open_page: Open, tmp_path: Path
) -> None:
    kept = tmp_path / "kept.jsonl"
    with serving(engine, corrections=str(kept)) as client:
        page = open_page(client)
        ask(page)
        page.get_by_role("button", name="This was wrong").click()
        expect(page.get_by_label("SQL")).to_be_focused()
        page.get_by_label("SQL").fill("SELECT 1 -- it is\nWHERE 1")
        page.get_by_role("button", name="Save the pair").click()
        expect(page.get_by_text("Saved. Thank you.")).to_be_visible()
        page.get_by_text("Options").click()
        page.get_by_label("Hint").fill("cheap is below 50")
        page.get_by_role("button", name="Ask").click()
        expect(page.locator("#facts")).to_contain_text("written in")
        page.get_by_role("button", name="This was wrong").click()
        page.get_by_label("SQL").fill("SELECT 2")
        page.get_by_role("button", name="Save the pair").click()
        expect(page.get_by_text("Saved. Thank you.")).to_be_visible()
    pair = {"db_id": "mall", "question": COUNTED, "query": "SELECT 1 WHERE 1"}
    hinted = pair | {"query": "SELECT 2", "evidence": "cheap is below 50"}
    assert [json.loads(line) for line in kept.read_text().splitlines()] == [pair, hinted]


def test_without_a_file_nothing_offers_to_save(engine: Engine, open_page: Open) -> None:
    with serving(engine) as client:
        page = open_page(client)
        ask(page)
        expect(page.locator("#answer")).to_be_visible()
        assert page.get_by_role("button", name="This was wrong").is_hidden()


def test_a_reload_keeps_the_database_and_what_was_asked(engine: Engine, open_page: Open) -> None:
    with serving(engine) as client:
        page = open_page(client)
        ask(page)
        expect(page.locator("#earlier li")).to_have_count(1)
        page.reload()
        expect(page.get_by_label("Database", exact=True)).to_have_value("mall")
        page.get_by_label("Database", exact=True).select_option("shop")
        page.locator("#earlier button").click()
        expect(page.locator("#facts")).to_contain_text("1 row")
        assert page.get_by_label("SQL").input_value() == COUNT
        assert page.get_by_label("Database", exact=True).input_value() == "mall"
        page.get_by_role("button", name="Clear").click()
        expect(page.locator("#history")).to_be_hidden()


def test_a_slow_answer_says_so_and_may_be_left(engine: Engine, open_page: Open, held: Held) -> None:
    with serving(engine) as client:
        page = open_page(client)
        ask(page)
        expect(page.locator("#status")).to_contain_text(re.compile(r"Writing SQL\s+[23] s"))
        page.get_by_role("button", name="Cancel").click()
        expect(page.locator("#status")).to_be_hidden()
        expect(page.locator("#problem")).to_be_hidden()
        page.keyboard.press("Control+Enter")
        held.release()
        expect(page.locator("#facts")).to_contain_text("1 row")


def test_a_full_queue_is_asked_again(engine: Engine, open_page: Open, held: Held) -> None:
    with serving(engine, max_waiting=1) as client, ThreadPoolExecutor(2) as threads:
        page = open_page(client)
        others = [threads.submit(post, client)]
        held.wait_begun()
        others.append(threads.submit(post, client))
        wait_until(lambda: count_waiting(client) == 1)
        ask(page)
        expect(page.locator("#doing")).to_contain_text("Many are asking")
        held.release()
        expect(page.locator("#facts")).to_contain_text("1 row")
        assert [one.result().status_code for one in others] == [200, 200]


def test_a_queue_that_stays_full_is_left(engine: Engine, open_page: Open) -> None:
    with serving(engine) as client:
        page = open_page(client)
        page.route("**/v1/sql", lambda route: route.fulfill(status=503, json={}))
        ask(page)
        expect(page.locator("#doing")).to_contain_text("Many are asking")
        page.get_by_role("button", name="Cancel").click()
        expect(page.locator("#status")).to_be_hidden()
        expect(page.locator("#problem")).to_be_hidden()
        page.unroute("**/v1/sql")
        page.keyboard.press("Enter")
        expect(page.locator("#facts")).to_contain_text("1 row")


def test_what_stands_before_the_service_may_be_busy_too(engine: Engine, open_page: Open) -> None:
    tries: list[float] = []

    def refuse(route: Any) -> None:
        tries.append(time.monotonic())
        route.fulfill(status=503, body="no healthy upstream")

    with serving(engine) as client:
        page = open_page(client)
        page.route("**/v1/sql", refuse)
        ask(page)
        expect(page.locator("#clock")).to_contain_text("s")  # a second and more
        while len(tries) < 2 and time.monotonic() < tries[0] + HANGS:
            page.wait_for_timeout(100)
        assert tries[1] - tries[0] > 1.5, "it is asked again without a pause"
        page.unroute("**/v1/sql")
        expect(page.locator("#facts")).to_contain_text("1 row")


def test_a_server_that_goes_away_is_asked_again(engine: Engine, open_page: Open) -> None:
    coming: list[Any] = []
    with serving(engine) as client:
        page = open_page(client)
        page.route("**/v1/sql", lambda route: coming.append(route))
        ask(page)
        expect(page.locator("#cancel")).to_be_visible()
        coming[0].abort("connectionreset")
        expect(page.get_by_role("alert")).to_contain_text("The server does not answer")
        expect(page.locator("#status")).to_be_hidden()
        page.unroute("**/v1/sql")
        page.get_by_role("button", name="Try again").click()
        expect(page.locator("#facts")).to_contain_text("1 row")


def test_an_error_is_said_and_may_be_tried_again(engine: Engine, open_page: Open) -> None:
    with serving(engine) as client:
        page = open_page(client)
        ask(page, "why " * 3000)
        expect(page.get_by_role("alert")).to_contain_text("reads up to 2,048 tokens")
        page.get_by_label("Question", exact=True).fill(COUNTED)
        page.route("**/v1/sql", lambda route: route.abort())
        page.keyboard.press("Enter")
        expect(page.get_by_role("alert")).to_contain_text("The server does not answer")
        page.unroute("**/v1/sql")
        page.get_by_role("button", name="Try again").click()
        expect(page.locator("#facts")).to_contain_text("1 row")
        page.context.set_offline(True)
        expect(page.get_by_text("You are offline.")).to_be_visible()


def test_without_a_database_the_page_says_what_to_do(
    engine: Engine, open_page: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine.prompter, "databases", {})
    with serving(engine) as client:
        page = open_page(client)
        expect(page.locator("#empty")).to_contain_text("This server has no database")
        assert page.get_by_role("button", name="Ask").is_disabled()


def test_a_token_is_asked_for_and_kept_in_the_tab(engine: Engine, open_page: Open) -> None:
    with serving(engine, token="open-sesame") as client:
        page = open_page(client)
        for wrong in ("other", "sésame"):
            page.get_by_label("Token", exact=True).fill(wrong)
            page.keyboard.press("Enter")
            expect(page.get_by_role("alert")).to_contain_text("does not know this token")
        page.get_by_label("Token", exact=True).fill("open-sesame")
        page.keyboard.press("Enter")
        ask(page)
        expect(page.locator("#facts")).to_contain_text("1 row")
        page.reload()
        expect(page.get_by_label("Question", exact=True)).to_be_focused()
        page.get_by_role("button", name="Forget the token").click()
        expect(page.get_by_label("Token", exact=True)).to_be_focused()


@pytest.mark.parametrize("width", [320, 390, 768])
def test_nothing_is_wider_than_a_phone(engine: Engine, open_page: Open, width: int) -> None:
    with serving(engine) as client:
        page = open_page(client, viewport={"width": width, "height": 800}, has_touch=True)
        ask(page)
        expect(page.locator("#answer")).to_be_visible()
        page.get_by_label("SQL").fill("SELECT *, hex(randomblob(90)) FROM customer, product")
        page.get_by_role("button", name="Run").click()
        expect(page.locator("#facts")).to_contain_text("12 rows")
        assert page.evaluate("document.documentElement.scrollWidth") == width


def test_the_keyboard_reaches_everything_in_order(engine: Engine, open_page: Open) -> None:
    with serving(engine) as client:
        page = open_page(client)
        ask(page)
        expect(page.locator("#facts")).to_contain_text("1 row")
        page.get_by_label("Question", exact=True).focus()
        reached = []
        for _ in range(6):
            page.keyboard.press("Tab")
            reached.append(
                page.evaluate("document.activeElement.id || document.activeElement.tagName")
            )
        assert reached == ["SUMMARY", "ask", "sql", "run", "copy", "scroll"]


def post(client: httpx2.Client) -> httpx2.Response:
    """Ask a question about the database mall."""
    return client.post("/v1/sql", json={"question": COUNTED, "database": "mall"})
