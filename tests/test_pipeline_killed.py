"""A pipeline whose process is killed: the same command goes on, and reports what it would have."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from ray_sql.config import PipelineConfig
from ray_sql.generate import Answer, AnswerCache
from ray_sql.store.run_folder import ADAPTER_WEIGHTS, RunFolder
from ray_sql.tune import pipeline
from tests.test_signals import Job, complete
from tests.test_two_stages import SHORT
from tests.waiting import wait_until

LONG_ENOUGH = {
    "train.max_steps": 8,
    "save_steps": 2,
    "evaluate.limit": None,
    "evaluate.max_new_tokens": 64,
    "evaluate.max_num_seqs": 1,
}
"""Settings that leave time to kill the pipeline: checkpoints, and answers one by one."""
SECONDS = {"seconds", "generation_seconds"}


class Command:
    """`ray-sql pipeline` with its settings in a file, given as often as it is killed."""

    def __init__(self, config: PipelineConfig, folder: Path) -> None:
        self._file, self._log, self._scratch = folder / "p.yaml", folder / "log", folder / "scratch"
        self._file.write_text(json.dumps(config.given()))
        self._scratch.mkdir()
        self._answers = config.cache / "answers"
        self._job: Job

    @contextmanager
    def given(self) -> Iterator[Job]:
        """Start it as users do, in a process of its own; nothing of it goes on afterwards."""
        words = ["ray_sql", "pipeline", "--config", str(self._file)]
        with self._log.open("w") as log:
            self._job = Job(words, {"TMPDIR": str(self._scratch)}, log)
        try:
            yield self._job
        finally:
            self._job.end()

    @property
    def said(self) -> str:
        """What it said since it was given last."""
        return self._log.read_text()

    def wait_until(self, happened: Callable[[], object]) -> None:
        """Return once something has happened; fail where the command ends before."""
        process = self._job.process
        wait_until(lambda: happened() or process.poll() is not None)
        assert process.poll() is None, self.said

    def answers(self) -> dict[tuple[str, int], Answer]:
        """Return the answers that are kept, by their file and question, with their seconds."""
        return {
            (file.name, question): answer
            for file in self._answers.glob("*.jsonl")
            for question, answer in AnswerCache(file).read().items()
        }


def written(place: Path) -> dict[str, int]:
    """Return when each file below a place was written."""
    files = (file for file in place.rglob("*") if file.is_file())
    return {str(file): file.stat().st_mtime_ns for file in files}


def reported(config: PipelineConfig) -> tuple[Any, ...]:
    """Return what a pipeline reports and answers, without seconds."""
    place = Path(config.run_dir)
    numbers = json.loads((place / "stages.json").read_text())
    for way in numbers["ways"].values():
        del way["seconds"]
    page = re.sub(r"<td>\d+\.\d\d</td>", "", (place / "report.html").read_text())
    answers = [
        {name: value for name, value in row.items() if name not in SECONDS}
        for way in ("schema", "sql", "full", "predicted", "oracle")
        for row in RunFolder(f"{config.run_dir}-{way}").read_predictions()
    ]
    return numbers, page, answers


@pytest.mark.slow
@pytest.mark.cluster  # no cluster, but most of a minute
def test_a_killed_pipeline_goes_on_where_it_stopped(make_config: Any, tmp_path: Path) -> None:
    def settings(name: str) -> PipelineConfig:
        places = {place: str(tmp_path / name / place) for place in ("output_dir", "cache_dir")}
        config: PipelineConfig = make_config(PipelineConfig, **(SHORT | LONG_ENOUGH | places))
        return config

    undisturbed, config = settings("undisturbed"), settings("killed")
    pipeline.run(undisturbed)
    linker, generator = (Path(f"{config.run_dir}-{task}") for task in ("schema", "sql"))
    command = Command(config, tmp_path)

    with command.given() as job:
        command.wait_until(lambda: "step 2: checkpoint saved" in command.said)
        job.tell(signal.SIGKILL)
    assert not (linker / "adapter").exists(), "the linker was to be killed in its training"

    with command.given() as job:
        command.wait_until(RunFolder(str(linker)).is_finished)
        job.tell(signal.SIGKILL)
    assert "training goes on after step" in command.said
    assert "step 2: checkpoint saved" not in command.said
    assert not generator.exists(), "the pipeline was to be killed between its stages"
    linked = written(linker)

    with command.given() as job:
        command.wait_until((generator / "adapter" / ADAPTER_WEIGHTS).exists)
        before = command.answers()
        command.wait_until(lambda: len(command.answers()) > len(before) + 1)
        job.tell(signal.SIGKILL)
    assert "holds a finished run of these settings" in command.said
    assert not RunFolder(str(generator)).is_finished(), "it was to be killed while it answers"
    trained, given = written(generator / "checkpoint-8"), command.answers()

    with command.given() as job:
        complete(job)
    assert "checkpoint saved" not in command.said
    assert f"{len(given) - len(before)} of 8 answers are there from before" in command.said
    assert written(linker) == linked and written(generator / "checkpoint-8") == trained
    answers = command.answers()
    assert {question: answers[question] for question in given} == given
    assert reported(config) == reported(undisturbed)
