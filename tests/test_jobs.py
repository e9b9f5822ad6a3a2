"""The jobs as a user runs them: files, output, and one line with exit code 2 for bad input."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from tests.conftest import QUESTIONS, make_spider_folder
from tests.waiting import HANGS

ROOT = Path(__file__).parent.parent
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Run `python -m jobs.JOB` here: `run("finetune", "--flag", …)` gives (code, out, err)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")

    def call(job: str, *arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [f"jobs/{job}.py", *arguments])
        code = 0
        try:
            runpy.run_module(f"jobs.{job}", run_name="__main__")
        except SystemExit as stop:
            code = int(stop.code or 0)
        out, err = capfd.readouterr()
        return code, out, err

    return call


@pytest.fixture
def flags(tiny_model: Path, spider_folder: Path, tmp_path: Path) -> list[str]:
    """The flags of a run of seconds."""
    text = f"""--model_name {tiny_model} --output_name run --task_type sql
        --dataset_id {spider_folder} --cache_dir {tmp_path}/cache
        --lora.r 4 --lora.lora_alpha 8 --train.max_steps 2 --train.logging_steps 1
        --scaling.num_workers 0 --evaluate.limit 3 --evaluate.max_new_tokens 8
        --evaluate.select_examples 2 --evaluate.processes 1 --no-tracking.enabled"""
    return text.split()


def changed(flags: list[str], **values: str) -> list[str]:
    """The flags with some of their values replaced or added; `_DOT_` stands for a dot."""
    result = list(flags)
    for name, value in values.items():
        flag = "--" + name.replace("_DOT_", ".")
        if flag in result:
            result[result.index(flag) + 1] = value
        else:
            result += [flag, value]
    return result


def test_finetune_writes_exactly_the_documented_files(
    run: Run, flags: list[str], tmp_path: Path
) -> None:
    code, out, err = run("finetune", *flags)
    assert (code, err) == (0, "")
    place = tmp_path / "out" / "run"
    assert sorted(path.name for path in place.iterdir()) == [
        "adapter", "base_predictions.jsonl", "checkpoint-2", "config.json", "contract.json",
        "inputs", "logs", "metrics.json", "predictions.jsonl", "report.html",
    ]  # fmt: skip
    assert sorted(path.name for path in (place / "adapter").iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "contract.json", "ray_sql_config.json",
    ]  # fmt: skip
    rows = [json.loads(line) for line in (place / "predictions.jsonl").read_text().splitlines()]
    assert len(rows) == 3
    assert {
        "id",
        "db_id",
        "question",
        "gold",
        "predicted",
        "raw",
        "verdict",
        "error",
        "seconds",
        "prompt_tokens",
    } <= set(rows[0])
    assert "training: 2/2" in out
    assert "execution accuracy" in out
    assert str(place / "adapter") in out


def test_a_cache_that_cannot_be_written_is_named(run: Run, flags: list[str]) -> None:
    code, _, err = run("finetune", *changed(flags, cache_dir="/sys/ray_sql"))
    assert code == 2
    assert "/sys/ray_sql" in err and "--cache_dir" in err and "Traceback" not in err


def test_a_run_does_not_go_on_with_other_data(run: Run, flags: list[str], tmp_path: Path) -> None:
    folder = make_spider_folder(tmp_path / "data")
    given = changed(flags, dataset_id=str(folder))
    assert run("finetune", *given)[0] == 0
    questions = folder / "train_spider.json"
    questions.write_text(questions.read_text().replace("highest", "largest"))
    code, _, err = run("finetune", *given)
    assert code == 2
    assert "run on other data" in err and "--overwrite" in err


@pytest.mark.slow
@pytest.mark.cluster  # no cluster, but most of a minute of the gate's time
def test_a_run_ends_in_order_where_ray_is_told_to_stop_with_it(
    flags: list[str], tmp_path: Path
) -> None:
    store = tmp_path / "mlflow.db"
    given = changed(
        flags,
        scaling_DOT_num_workers="1",
        train_DOT_max_steps="5000",
        tracking_DOT_uri=f"sqlite:///{store}",
    )
    given.remove("--no-tracking.enabled")
    command = [sys.executable, "-m", "jobs.finetune", *given, "--output_dir", str(tmp_path / "out")]
    log = tmp_path / "log"
    with log.open("wb") as stream:
        job = subprocess.Popen(
            command, cwd=ROOT, stdout=stream, stderr=stream, start_new_session=True
        )
    try:
        while "training: 1/" not in log.read_text():
            assert job.poll() is None, log.read_text()
            time.sleep(0.1)
        os.killpg(
            job.pid, signal.SIGTERM
        )  # as `timeout`, Slurm and systemd do: Ray's own processes, too
        assert job.wait(timeout=HANGS) == 128 + signal.SIGTERM
    finally:
        with suppress(ProcessLookupError):
            os.killpg(job.pid, signal.SIGKILL)
    # the message cannot be sent to Ray, or its end is noticed first
    ends = ("Ray does not answer", "stopped without a checkpoint")
    assert any(end in log.read_text() for end in ends) and "Traceback" not in log.read_text()
    assert sqlite3.connect(store).execute("SELECT status FROM runs").fetchall() == [("KILLED",)]


def test_finetune_for_schema_linking(run: Run, flags: list[str], tmp_path: Path) -> None:
    code, out, _ = run("finetune", *changed(flags, task_type="schema"))
    assert code == 0
    assert "strict recall" in out
    metrics = json.loads((tmp_path / "out" / "run" / "metrics.json").read_text())
    assert metrics["tuned"]["dev"]["n"] == 3
    assert 0 <= metrics["tuned"]["dev"]["unparsable"] <= 1


def test_the_original_command_line_works(
    run: Run, tiny_model: Path, spider_folder: Path, tmp_path: Path
) -> None:
    line = (
        f"--model_name {tiny_model} --output_name o --read_token hf_rrr --write_token hf_www "
        f"--task_type sql --dataset_id {spider_folder} --seed 14 --train_batch_size 1 "
        "--eval_batch_size 1 --grad_accum_steps 8 --learning_rate 1e-4 --num_epochs 1 "
        "--save_steps 250"
    )
    code, out, err = run(
        "finetune", *line.split(), "--dry_run", "--cache_dir", str(tmp_path / "cache")
    )
    assert code == 0
    assert "hf_" not in out + err
    for flag in ("--read_token", "--write_token"):
        assert err.count(f"warning: {flag} shows in the process list") == 1
    assert not (tmp_path / "out").exists(), "a dry run writes nothing but caches"


def test_a_password_on_the_command_line_is_warned_of_and_not_repeated(
    run: Run, flags: list[str]
) -> None:
    _, out, err = run(
        "finetune", *flags, "--dry_run", "--tracking.uri", "http://me:hunter2@127.0.0.1:1"
    )
    assert "warning: the password in http://me:***@127.0.0.1:1 shows in the process list" in err
    assert "hunter2" not in out + err


def test_dry_run_shows_prompt_answer_audit_and_plan(
    run: Run, flags: list[str], tmp_path: Path
) -> None:
    code, out, _ = run("finetune", *flags, "--dry_run")
    assert code == 0
    assert "CREATE TABLE" in out
    assert QUESTIONS[0][0] in out or "Question:" in out
    assert "```sql\nSELECT" in out
    assert "tokens" in out
    assert "2 steps of 8 examples (1 x 8 x 1 workers)" in out
    assert "up to 4 questions in a row" in out and "larger steps share more" in out
    assert "ray" not in sys.modules or not __import__("ray").is_initialized()


def test_a_config_json_can_be_fed_back(run: Run, flags: list[str], tmp_path: Path) -> None:
    assert run("finetune", *flags)[0] == 0
    saved = tmp_path / "out" / "run" / "config.json"
    code, out, _ = run("finetune", "--config", str(saved))
    assert code == 0
    assert "holds a finished run of these settings" in out


def test_evaluate_scores_the_adapter_it_is_given(
    run: Run, flags: list[str], tmp_path: Path
) -> None:
    assert run("finetune", *flags)[0] == 0
    first = (tmp_path / "out" / "run" / "predictions.jsonl").read_text()
    adapter = str(tmp_path / "out" / "run" / "adapter")
    code, _, err = run(
        "evaluate",
        "--config",
        f"{adapter}/ray_sql_config.json",
        "--adapter",
        adapter,
        "--output_name",
        "again",
    )
    assert (code, err) == (0, "")
    again = (tmp_path / "out" / "again" / "predictions.jsonl").read_text()
    assert _untimed(first) == _untimed(again)
    code, _, err = run(
        "evaluate",
        "--config",
        f"{adapter}/ray_sql_config.json",
        "--adapter",
        adapter,
        "--output_name",
        "drift",
        "--prompt.serializer",
        "compact",
    )
    assert code == 2
    assert "trained with serializer" in err
    assert not (tmp_path / "out" / "drift").exists()


def test_evaluate_scores_gold_as_predictions_at_100_percent(
    run: Run, spider_folder: Path, tmp_path: Path
) -> None:
    file = tmp_path / "gold.sql"
    file.write_text("".join(f"{sql}\n" for _, sql in QUESTIONS))
    arguments = [
        "--dataset_id",
        str(spider_folder),
        "--split",
        "dev",
        "--evaluate.semantics",
        "spider",
        "--output_name",
        "scores",
    ]
    code, out, _ = run("evaluate", "--predictions_file", str(file), *arguments)
    assert code == 0
    assert (
        json.loads((tmp_path / "out" / "scores" / "metrics.json").read_text())["file"]["dev"][
            "execution_accuracy"
        ]
        == 1.0
    )
    assert "100.0 %" in out
    assert sorted(path.name for path in (tmp_path / "out" / "scores").iterdir()) == [
        "config.json", "metrics.json", "predictions.jsonl", "report.html",
    ]  # fmt: skip
    file.write_text(json.dumps({"id": "3", "predicted": "SELECT 1"}) + "\n")
    code, _, _ = run("evaluate", "--predictions_file", str(file), *arguments)
    assert code == 0
    assert (
        json.loads((tmp_path / "out" / "scores" / "metrics.json").read_text())["file"]["dev"][
            "correct"
        ]
        == 0
    )


def test_compare_compares_two_scored_files(run: Run, spider_folder: Path, tmp_path: Path) -> None:
    scored = []
    for name, sql in (
        ("gold", [sql for _, sql in QUESTIONS]),
        ("count", ["SELECT COUNT(*) FROM customer"] * 8),
    ):
        (tmp_path / f"{name}.sql").write_text("".join(f"{one}\n" for one in sql))
        given = [
            "--predictions_file",
            f"{name}.sql",
            "--dataset_id",
            str(spider_folder),
            "--output_name",
            name,
        ]
        assert run("evaluate", *given)[0] == 0
        scored.append(f"out/{name}/predictions.jsonl")
    code, out, err = run("compare", "--files", *scored, "--output_name", "both")
    assert (code, err) == (0, "")
    assert "A is significantly better, by 87.5 points (McNemar p = 0.016)" in out
    assert sorted(path.name for path in (tmp_path / "out" / "both").iterdir()) == [
        "compare.json",
        "compare.txt",
    ]
    code, again, err = run("evaluate", "--compare", *scored, "--output_name", "both")
    assert (code, again) == (0, out)
    assert err == "note: `ray-sql compare A B` compares two scored files now\n"
    code, _, err = run("compare", "--files", scored[0], "nowhere.jsonl")
    assert code == 2
    missing = f"error: --files {tmp_path}/nowhere.jsonl: no such file; "
    assert err == missing + "give the predictions.jsonl of a run or an evaluation\n"


def test_check_says_ok_line_by_line(run: Run, flags: list[str]) -> None:
    code, out, err = run("check", *flags)
    assert code == 0, out + err
    assert sum(line.startswith("ok ") for line in out.splitlines()) == 9
    code, out, err = run("check", *changed(flags, lora_DOT_r="50000000"))
    assert code == 2
    assert "FAIL  memory" in out and "FAIL  disk" in out
    assert "2 of 9 checks failed" in err


def _no_database(folder: Path) -> None:
    shutil.rmtree(folder / "database" / "mall")


def _malformed(folder: Path) -> None:
    (folder / "dev.json").write_text('[\n{"db_id": "mall",\n oops}]')


def _unknown_db_id(folder: Path) -> None:
    (folder / "dev.json").write_text(
        json.dumps([{"db_id": "nowhere", "question": "q", "query": "SELECT 1"}])
    )


def _missing_column(folder: Path) -> None:
    (folder / "dev.json").write_text(
        json.dumps([{"db_id": "mall", "pergunta": "q", "query": "SELECT 1"}])
    )


def _not_a_database(folder: Path) -> None:
    (folder / "database" / "mall" / "mall.sqlite").write_text(
        "this is no database at all, only some text"
    )


@pytest.mark.parametrize(
    "spoil,message",
    [
        (_no_database, r"unknown db_id 'mall'"),
        (_malformed, "dev.json, line 3: not valid JSON"),
        (_unknown_db_id, "dev example 0: unknown db_id 'nowhere'"),
        (
            _missing_column,
            "dev.json: no column 'question' or 'question_en' or 'SpiderSynQuestion' or "
            "'sql_prompt' or 'utterance' or 'nl' or 'nl_question' or 'natural_language' or "
            "'user_question' or 'input' or 'prompt' for question; found db_id, pergunta, query",
        ),
        (_not_a_database, "mall.sqlite"),
    ],
)
def test_bad_data_is_one_line_that_names_the_place(
    run: Run, flags: list[str], tmp_path: Path, spoil: Callable[[Path], None], message: str
) -> None:
    folder = make_spider_folder(tmp_path / "spoilt")
    spoil(folder)
    _refused(run("finetune", *changed(flags, dataset_id=str(folder))), message, tmp_path)


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"dataset_id": "./nowhere"}, "--dataset_id ./nowhere: no such file or folder"),
        ({"task_type": "poetry"}, "--task_type: 'poetry' given; input should be 'sql' or 'schema'"),
        (
            {"model_name": "nobody/no-such-model"},
            "--model_name nobody/no-such-model: neither a local folder nor a model",
        ),
        ({"learning_rate": "-1"}, "--learning_rate: '-1' given; input should be greater than 0"),
        ({"learning_rat": "1"}, "--learning_rat: unknown flag; did you mean --learning_rate?"),
        ({"config": "wrong.yaml"}, "wrong.yaml: lora.rank: unknown setting"),
        (
            {"train_DOT_global_batch_size": "7", "train_batch_size": "2"},
            "7 does not divide by train_batch_size 2 x 1 workers = 2",
        ),
        ({"split": "holdout"}, "--split holdout:"),
        (
            {"prev_checkpoint": "checkpoint-9"},
            "--prev_checkpoint checkpoint-9: no complete checkpoint",
        ),
        (
            {"rows_DOT_max_length": "16"},
            "training examples are over --rows.max_length 16, the longest has",
        ),
        (
            {"dataset_id": "owner/never-published"},
            "neither a local folder nor a Hub dataset that can be read",
        ),
    ],
)
def test_bad_settings_are_one_line_that_names_the_flag(
    run: Run, flags: list[str], tmp_path: Path, changes: dict[str, str], message: str
) -> None:
    (tmp_path / "wrong.yaml").write_text("lora: {rank: 8}\n")
    _refused(run("finetune", *changed(flags, **changes)), message, tmp_path)


def test_an_unreachable_mlflow_server_is_refused_before_training(
    run: Run, flags: list[str], tmp_path: Path
) -> None:
    tracked = [flag for flag in flags if flag != "--no-tracking.enabled"]
    _refused(
        run("finetune", *tracked, "--tracking.uri", "http://127.0.0.1:9"),
        "no MLflow server answers there",
        tmp_path,
    )


def test_an_output_place_that_cannot_be_written_is_refused(
    run: Run, flags: list[str], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    code, _, err = run("finetune", *flags, "--output_dir", str(tmp_path / "file"))
    assert code == 2
    assert "cannot be written" in err
    code, _, err = run("finetune", *flags, "--output_dir", "/proc/none")
    assert code == 2
    assert "/proc/none/run" in err


def test_gold_queries_that_fail_are_counted_listed_and_kept_out(
    run: Run, flags: list[str], tmp_path: Path
) -> None:
    folder = make_spider_folder(tmp_path / "folder")
    rows = json.loads((folder / "dev.json").read_text())
    rows[0]["query"] = "SELECT colour FROM product"
    (folder / "dev.json").write_text(json.dumps(rows))
    code, out, _ = run("finetune", *changed(flags, dataset_id=str(folder), evaluate_DOT_limit="8"))
    assert code == 0
    assert "queries that do not run: 1 in dev; kept out of the scores" in out
    metrics = json.loads((tmp_path / "out" / "run" / "metrics.json").read_text())
    assert (metrics["tuned"]["dev"]["n"], metrics["tuned"]["dev"]["gold_errors"]) == (7, 1)
    (row,) = [
        json.loads(line)
        for line in (tmp_path / "out" / "run" / "gold_errors.jsonl").read_text().splitlines()
    ]
    assert (row["id"], row["split"]) == ("0", "dev")
    assert "colour" in row["error"]


def _untimed(text: str) -> list[dict[str, object]]:
    """The rows of a predictions file without what differs from run to run."""
    rows = [json.loads(line) for line in text.splitlines()]
    return [{key: value for key, value in row.items() if "seconds" not in key} for row in rows]


def _refused(result: tuple[int, str, str], message: str, tmp_path: Path) -> None:
    code, out, err = result
    assert code == 2, out + err
    assert message in err
    assert "Traceback" not in err
    err = err.removeprefix("starting: libraries\n")  # where no other test has loaded them
    assert err.startswith("error: ")
    assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "out" / "run" / "metrics.json").exists()
    assert not (tmp_path / "out" / "run").exists(), "nothing half-written"


def test_the_exit_code_of_a_process_is_2_for_a_user_error(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "jobs.finetune", "--task_type", "sql"]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
        env=os.environ | {"COLUMNS": "80"},
    )
    assert done.returncode == 2
    assert "--model_name is required" in done.stderr


def test_databases_are_never_changed(run: Run, flags: list[str], spider_folder: Path) -> None:
    file = spider_folder / "database" / "mall" / "mall.sqlite"
    before = file.read_bytes()
    assert run("finetune", *flags)[0] == 0
    assert file.read_bytes() == before
    assert sqlite3.connect(f"file:{file}?mode=ro", uri=True).execute(
        "SELECT COUNT(*) FROM customer"
    ).fetchone() == (4,)
