"""Progress says what is known: no end is guessed from one row, and none is forgotten."""

from __future__ import annotations

import io
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from ray_sql import display as displays
from ray_sql.cluster import resources
from ray_sql.cluster.events import StepEnded, TrainPoint
from ray_sql.data import Corpus, Example, leakage
from ray_sql.display import Display, Pace, duration
from ray_sql.errors import DamagedFile
from ray_sql.finetune import Session, plan, prepare
from ray_sql.preflight import nodes
from ray_sql.report.progress import Progress
from ray_sql.store.run_folder import RunFolder
from ray_sql.tracking import null_run
from tests.test_field_interrupted import screen
from tests.waiting import wait_until

kind = pytest.mark.kind("progress that tells the truth")


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    clock = Clock()
    monkeypatch.setattr(displays.time, "monotonic", clock.monotonic)
    yield clock


def shown(terminal: bool, clock: Clock, points: list[tuple[float, int]], total: int) -> str:
    """What a stage shows at last, after (seconds, done)."""
    out = io.StringIO()
    display = Display(Console(file=out, force_terminal=terminal, width=120))
    begun = clock.now
    for seconds, done in points:
        clock.now = begun + seconds
        display.update("scoring", done, total, every=0)
    if not terminal:
        return out.getvalue().splitlines()[-1]
    out.seek(0)
    out.truncate()
    display.console.print(display._progress)
    return out.getvalue()


@kind
@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize(
    ("points", "total", "left"),
    [
        ([(0, 1)], 500, None),  # one row
        ([(0, 1), (50, 2)], 500, None),  # two, of which the first began things
        ([(0, 1), (0.5, 30)], 500, None),  # half a second
        ([(0, 1), (10, 101)], 501, "40 s left"),
        ([(0, 1), (60, 2), (120, 3)], 13, "10 min left"),  # steps of a minute
        ([(0, 1), (45, 2), (90, 3), (135, 4), (180, 5)], 30, "19 min left"),
        ([(0, 1), (3600, 11)], 31, "2 h 0 min left"),
        ([(0, 8), (40, 48), (41, 2), (61, 42)], 82, "20 s left"),  # restarted
        ([(0, 1), (40, 41), (4000, 1), (4020, 41)], 81, "20 s left"),  # from the first step
        ([(0, 1), (10, 5)], 5, None),
    ],
)
def test_the_time_that_is_left_is_known_or_not_shown(
    terminal: bool, points: list[tuple[float, int]], total: int, left: str | None, clock: Clock
) -> None:
    text = shown(terminal, clock, points, total)
    assert (left in text) if left else ("left" not in text)
    assert "--:--" not in text


@kind
def test_the_end_comes_nearer_between_two_steps() -> None:
    pace = Pace(1, 0.0)
    for step in range(2, 5):
        pace.update(step, 13, 60.0 * (step - 1))
    assert pace.left(180.0) == "9 min left" and pace.left(181.0) == "9 min left"
    assert pace.left(241.0) == "8 min left" and pace.left(9999.0) == ""


@kind
@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.2, "1 s"), (59.5, "60 s"), (61, "2 min"), (1004, "17 min"), (7500, "2 h 5 min")],
)
def test_times_are_said_as_people_say_them(seconds: float, words: str) -> None:
    assert duration(seconds) == words


@kind
@pytest.mark.parametrize("terminal", [True, False])
def test_steps_without_values_move_the_bar(terminal: bool, make_config: Any, clock: Clock) -> None:
    out = io.StringIO()
    display = Display(Console(file=out, force_terminal=terminal, width=160))
    progress = Progress(RunFolder(make_config().run_dir + "-none"), null_run(), display)

    progress(TrainPoint(1, 13, {"loss": 2.5}))
    for step in range(2, 8):
        clock.now += 33
        progress(StepEnded(step, 13))
    if terminal:
        out.truncate(0)
        display.console.print(display._progress)
    lines = [line for line in out.getvalue().splitlines() if "training" in line]
    assert "7/13" in lines[-1] or not terminal
    assert "4 min left" in lines[-1]
    assert ("loss 2.500" in lines[-1]) == terminal, "the last values stay beside the bar"
    if not terminal:
        assert [line.split()[1] for line in lines] == [f"{n}/13" for n in range(1, 8)]


@kind
@pytest.mark.parametrize(
    ("task", "limit", "rule", "points"),
    [("sql", 4, "semantics spider", 35), ("schema", 8, "by strict recall", 28)],
)
def test_the_plan_says_what_is_scored_by_and_how_little_a_few_questions_tell(
    task: str, limit: int, rule: str, points: int, make_config: Any
) -> None:
    config = make_config(
        **{"task_type": task, "evaluate.limit": limit, "evaluate.semantics": "spider"}
    )
    lines = list(plan.lines(prepare.prepare(config)))
    at = next(n for n, line in enumerate(lines) if line.startswith("scoring"))
    assert lines[at].endswith(f"on {limit} of dev, {rule}")
    assert f"is known to ±{points} points" in lines[at + 1]


@kind
def test_counts_of_one_are_said_as_such(make_config: Any) -> None:
    one = Example("1", "shop", "How many?", "SELECT 1")
    assert leakage(Corpus({"train": (one,), "dev": (one,)}))[0] == (
        "dev: 1 question on 1 database, which train has too; 1 question also in train"
    )


@kind
def test_a_run_without_trials_speaks_of_none(make_config: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(resources, "cluster_nodes", lambda: [{"CPU": 2.0}])
    scaling = make_config(**{"scaling.num_workers": 2}).scaling
    assert "2 a training (2 x 1)" in nodes.check_capacity(scaling, None)
    assert "2 a trial (2 x 1)" in nodes.check_capacity(scaling, 1)


@kind
def test_a_start_is_told_below_the_bars_and_leaves_nothing() -> None:
    out = io.StringIO()
    with Display(Console(file=out, force_terminal=True, width=80)) as display:
        for stage in ("MLflow", "data"):
            display.starting(stage)
            time.sleep(0.6)  # so that it is drawn more than once
        display.line("run       out/x")
        display.starting("")
        display.update("training", 1, 10)
    assert "starting: MLflow" in out.getvalue()
    shown = screen(out.getvalue())
    assert shown[0] == "run       out/x" and len(shown) == 2 and shown[1].endswith("1/10")


@kind
def test_no_wait_is_told_below_a_plan(make_config: Any) -> None:
    out, config = io.StringIO(), make_config(overwrite=True)
    terminal = Console(file=out, force_terminal=True, highlight=False, soft_wrap=True)
    with Display(terminal) as display:
        for _ in range(2):  # of rows that are kept no progress is shown, which would end the wait
            begun = len(out.getvalue())
            with Session(config, display):
                pass
    written = out.getvalue()[begun:].partition(f"data      {config.dataset_id}")[2]
    told, *waits = written.split("starting: ")
    assert "training  " in told and {wait.split("\x1b")[0] for wait in waits} <= {"run folder"}


@kind
@pytest.mark.parametrize("terminal", [True, False])
def test_a_plan_is_shown_up_to_what_ends_it(terminal: bool, make_config: Any) -> None:
    out, config = io.StringIO(), make_config(**{"train.bf16": None})
    console = Console(file=out, force_terminal=terminal, highlight=False, soft_wrap=True)
    folder = RunFolder(config.run_dir)
    with Session(config, Display(Console(file=io.StringIO()))):
        folder.write_compute_type("float32")
    (compute_type,) = Path(config.run_dir).rglob("compute_type")
    compute_type.write_bytes(b"\xff")  # it is read for the plan, after the data and the rows
    with (
        pytest.raises(DamagedFile, match="compute_type"),
        Display(console) as display,
        Session(config, display),
    ):
        pass
    shown = screen(out.getvalue()) if terminal else out.getvalue().splitlines()
    told = [line.split()[0] for line in shown if line[:1].strip()]
    assert told[-4:] == ["data", "gold", "rows", "sharing"] and "starting" not in shown[-1]


@kind
def test_a_wait_is_told_in_a_log_until_there_is_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(displays, "WAIT_SECONDS", 0.05)
    monkeypatch.setattr(displays, "PLAIN_SECONDS", 0.05)
    monkeypatch.setattr(displays, "LOOK_SECONDS", 0.01)
    out = io.StringIO()
    with Display(Console(file=out)) as display:
        display.starting("workers and model")
        wait_until(lambda: out.getvalue().count("starting: workers and model, ") >= 2)
        display.update("training", 1, 10)
        told = out.getvalue().count("starting:")
        time.sleep(0.5)
        assert out.getvalue().count("starting:") == told
        display.starting("answers")
    time.sleep(0.2)
    last = out.getvalue()
    time.sleep(0.3)
    assert out.getvalue() == last, "nothing is told after the end"


@kind
def test_waits_that_follow_each_other_are_told_as_one_is(clock: Clock) -> None:
    display, told = Display(Console(file=io.StringIO())), []
    for tick in range(80):  # four waits of ten seconds, looked at every half second
        if tick % 20 == 0:
            display.starting(f"wait {tick // 20}")
        clock.now += displays.LOOK_SECONDS
        if display._wait is not None and display._wait.is_due(clock.now):
            told.append(clock.now - 1000.0)
    gaps = [after - before for before, after in zip([0.0, *told], [*told, 40.0], strict=False)]
    assert max(gaps) <= displays.PLAIN_SECONDS and len(told) < 16


@kind
def test_lines_of_a_long_stage_grow_rarer(clock: Clock) -> None:
    out = io.StringIO()
    display = Display(Console(file=out, width=120))
    for second in range(7200):
        clock.now = 1000.0 + second
        display.update("scoring", second, 7200)
    lines = len(out.getvalue().splitlines())
    assert 100 < lines < 400, "two hours, at most a line a minute in the end"


@kind
def test_the_plan_warns_of_what_can_tell_and_teach_little(make_config: Any) -> None:
    config = make_config(**{"evaluate.max_new_tokens": 8, "evaluate.limit": 4})
    lines = "\n".join(plan.lines(prepare.prepare(config)))
    assert "so few steps change a model little: raise --num_epochs" in lines
    assert "a gain over the base model cannot be shown: it takes 6 questions" in lines
    assert re.search(r"\d+ of 22 gold answers of train are longer than --evaluate.max_new", lines)
    assert "8 of 8 gold answers of dev are longer" in lines
    enough = make_config(**{"evaluate.max_new_tokens": 128, "train.max_steps": 40})
    lines = "\n".join(plan.lines(prepare.prepare(enough)))
    assert "so few steps" not in lines and "cut off" not in lines and "goes on" not in lines


@kind
def test_the_plan_says_where_a_run_goes_on(make_config: Any, tmp_path: Any) -> None:
    config = make_config(**{"train.max_steps": 4})
    place = tmp_path / "out" / "run" / "checkpoint-2"
    place.mkdir(parents=True)
    (place / "a.bin").write_text("x")
    marker = {"step": 2, "files": {"a.bin": 1}, "objective": None, "tie_break": None, "metrics": {}}
    (place / "checkpoint.json").write_text(json.dumps(marker))
    prepared = prepare.prepare(config)
    assert "          goes on after step 2 of 4" in list(plan.lines(prepared))
    anew = prepare.prepare(config.changed({"overwrite": True}))
    assert not [line for line in plan.lines(anew) if "goes on" in line]
