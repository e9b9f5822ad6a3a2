"""Answers are kept as they come, and a run that was cut off asks only the rest."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from ray_sql import data, generate
from ray_sql.cluster.events import AnswersCounted
from ray_sql.display import Display
from ray_sql.errors import ConfigError
from ray_sql.evaluate import scoring
from ray_sql.evaluate.models import evaluate_models
from ray_sql.generate import Answer, AnswerCache, Candidate
from ray_sql.models import load_tokenizer
from ray_sql.report.progress import Progress
from ray_sql.store.run_folder import RunFolder
from ray_sql.tasks import SQL
from ray_sql.tracking import null_run
from tests.conftest import make_encoder

DISPLAY = Display(Console(file=io.StringIO()))


def ask(
    config: Any, model: Path, adapter: str | None = None
) -> tuple[dict[str, list[dict[str, Any]]], list[Any]]:
    """The judged rows by model, and the counts of answers that came while asking."""
    corpus, tokenizer = data.load(config), load_tokenizer(str(model))
    asked = generate.make_questions(
        corpus.splits["dev"], "dev", corpus, make_encoder(tokenizer, config, corpus.schemas)
    )
    events: list[Any] = []
    return evaluate_models(
        config, asked, corpus.schemas, str(model), adapter, DISPLAY, events.append
    ), [event for event in events if isinstance(event, AnswersCounted)]


def files(config: Any) -> list[Path]:
    return sorted((config.cache / "answers").glob("*.jsonl"))


def test_answers_survive_their_file_and_a_line_cut_off(tmp_path: Path) -> None:
    kept = AnswerCache(tmp_path / "deep" / "answers.jsonl")
    assert kept.read() == {}
    answers = {
        3: Answer("a\u2028b\n", 1, 2, 0.5),
        0: Answer("c", 1, 2, 0.5, candidates=[Candidate("c", 2, -0.5)]),
    }
    for number, answer in answers.items():
        kept.add(number, answer)
    assert kept.read() == answers
    with kept.file.open("a") as stream:
        stream.write('{"question": 7, "raw": "cut')
    assert kept.read() == answers
    kept.write(answers)
    assert kept.read() == answers and len(kept.file.read_text().splitlines()) == 2


@pytest.fixture
def small(make_config: Any) -> Any:
    return lambda **changes: make_config(
        **({"quantization.load_in_4bit": False, "evaluate.max_new_tokens": 3} | changes)
    )


def test_models_are_shown_by_the_names_that_people_know(small: Any, tiny_model: Path) -> None:
    config, out = small(), io.StringIO()
    corpus, tokenizer = data.load(config), load_tokenizer(str(tiny_model))
    encoder = make_encoder(tokenizer, config, corpus.schemas)
    asked = generate.make_questions(corpus.splits["dev"], "dev", corpus, encoder)
    display = Display(Console(file=out, soft_wrap=True))
    progress = Progress(RunFolder(config.run_dir), null_run(), display)
    parts = (config, asked, corpus.schemas, str(tiny_model), None, display, progress)
    for name in ("base", "the merged model"):
        out.truncate(0)
        evaluate_models(*parts, called={"base": name})
        assert f"\nexecuting {name}'s SQL: 8/8" in out.getvalue()
    assert "the merged model: 8 of 8 answers are there from before" in out.getvalue()


def test_only_what_is_left_is_asked(small: Any, tiny_model: Path) -> None:
    whole, points = ask(small(), tiny_model)
    assert [(point.done, point.total) for point in points] == [(done, 8) for done in range(1, 9)]
    (file,) = files(small())
    lines = file.read_text().splitlines()
    changed = {
        **json.loads(lines[0]),
        "raw": "SELECT 1 -- an answer that this model would never give",
    }
    file.write_text(json.dumps(changed) + "\n" + "\n".join(lines[1:5]) + "\n" + lines[5][:20])
    again, points = ask(small(), tiny_model)
    assert [point.done for point in points] == [6, 7, 8]
    assert [row["raw"] for row in again["base"]] == [
        changed["raw"],
        *(row["raw"] for row in whole["base"][1:]),
    ]


def test_another_question_limit_or_adapter_has_its_own_answers(
    small: Any, tiny_model: Path, tmp_path: Path
) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    ask(small(), tiny_model)
    for changes in (
        {"evaluate.max_new_tokens": 4},
        {"prompt.serializer": "ddl"},
        {"evaluate.num_beams": 2},
    ):
        _, points = ask(small(**changes), tiny_model)
        assert len(points) == 8
    for seed in (0, 1):
        import torch

        torch.manual_seed(seed)
        adapter = tmp_path / f"adapter-{seed}"
        base = AutoModelForCausalLM.from_pretrained(tiny_model)
        get_peft_model(
            base, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")
        ).save_pretrained(adapter)
        _, points = ask(small(), tiny_model, str(adapter))
        assert {point.model for point in points} == {"tuned"} and len(points) == 8
        assert not ask(small(), tiny_model, str(adapter))[1]


@pytest.mark.slow
@pytest.mark.cluster
def test_a_killed_evaluation_goes_on_where_it_ended(
    make_config: Any, tiny_model: Path, spider_folder: Path, tmp_path: Path
) -> None:
    flags = f"--model_name {tiny_model} --dataset_id {spider_folder} --output_name run "
    flags += f"--output_dir {tmp_path / 'out'} --cache_dir {tmp_path / 'cache'} "
    flags += "--scaling.num_workers 0 --evaluate.max_new_tokens 40 --train.bf16 false "
    flags += "--evaluate.max_num_seqs 1 --evaluate.processes 1 --tracking.enabled false"
    command = [sys.executable, "-m", "jobs.evaluate", *flags.split()]
    root = Path(__file__).parent.parent
    environment = os.environ | {"PYTHONPATH": str(root)}
    process = subprocess.Popen(command, cwd=root, env=environment, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while (
        not (found := list((tmp_path / "cache" / "answers").glob("*.jsonl")))
        or len(found[0].read_text().splitlines()) < 2
    ):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = found[0].read_text().splitlines()
    assert 2 <= len(before) < 8 and not (tmp_path / "out" / "run" / "predictions.jsonl").exists()
    times = {one["question"]: one["seconds"] for one in map(json.loads, before[:2])}
    subprocess.run(command, cwd=root, env=environment, check=True, stdout=subprocess.DEVNULL)
    after = {
        one["question"]: one["seconds"]
        for one in map(json.loads, found[0].read_text().splitlines())
    }
    assert sorted(after) == list(range(8)) and {number: after[number] for number in times} == times
    predictions = (tmp_path / "out" / "run" / "predictions.jsonl").read_text().splitlines()
    assert len(predictions) == 8


@pytest.mark.slow
@pytest.mark.cluster
def test_two_workers_answer_as_one_process(
    small: Any, tiny_model: Path, tmp_path: Path, ray_local: None
) -> None:
    here, _ = ask(small(), tiny_model)
    both, points = ask(
        small(**{"scaling.num_workers": 2, "cache_dir": str(tmp_path / "other")}), tiny_model
    )
    assert [row["raw"] for row in both["base"]] == [row["raw"] for row in here["base"]]
    assert sorted(point.done for point in points) == list(range(1, 9))


def test_the_first_candidate_that_runs_is_taken(make_config: Any, tiny_model: Path) -> None:
    config = make_config(**{"evaluate.num_beams": 3, "evaluate.first_executable": True})
    corpus, tokenizer = data.load(config), load_tokenizer(str(tiny_model))
    asked = generate.make_questions(
        corpus.splits["dev"][:4], "dev", corpus, make_encoder(tokenizer, config, corpus.schemas)
    )
    bad, good, other = "SELECT x FROM nowhere", "SELECT COUNT(*) FROM customer", "SELECT 7"
    candidates: Sequence[list[str]] = ([bad, good, other], [other, good, bad], [bad, "", bad], [])
    beams = [[Candidate(text, 1) for text in each] for each in candidates]
    answers = [
        Answer((each or [bad])[0], 1, 1, 0.0, candidates=own)
        for each, own in zip(candidates, beams, strict=True)
    ]
    rows = scoring.score(asked, answers, SQL, config.evaluate)
    assert [row["predicted"] for row in rows] == [good, other, bad, bad]
    kept = [[one["sql"] for one in row.get("candidates", ())] for row in rows]
    assert kept == [candidates[0], candidates[1], [bad, None, bad], []]
    assert rows[0]["verdict"] == "correct"
    plain = scoring.score(asked, answers, SQL, make_config(**{"evaluate.num_beams": 3}).evaluate)
    assert [row["predicted"] for row in plain] == [bad, other, bad, bad]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"evaluate.first_executable": True}, "evaluate.num_beams and evaluate.samples are 1"),
        (
            {"evaluate.ves_iterations": 100},
            "ves_iterations 100 times right queries for BIRD's R-VES",
        ),
        (
            {"evaluate.ves_iterations": 1, "evaluate.semantics": "bird", "task_type": "schema"},
            "use task_type sql and evaluate.semantics bird",
        ),
        (
            {"evaluate.num_beams": 2, "evaluate.first_executable": True, "task_type": "schema"},
            "first_executable executes SQL, which task_type schema does not write",
        ),
    ],
)
def test_settings_that_contradict_are_refused(
    make_config: Any, changes: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        make_config(**changes)
