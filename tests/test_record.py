"""A run's record in MLflow shows at a glance what one looks for: few metrics, in groups."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from ray_sql import finetune, rows, tracking
from ray_sql.config import Config
from ray_sql.finetune import results
from ray_sql.finetune.prepare import prepare
from ray_sql.publish.results import Stage, readme
from ray_sql.report import commands, description
from ray_sql.report.scores import verdict
from ray_sql.store.run_folder import RunFolder

GROUPS = {"score": 5, "system": 6, "time": 5, "train": 5, "validation": 3}
"""The groups of a run's metrics, with how many each has."""


@pytest.fixture(scope="module")
def recorded(
    tiny_model: Any, spider_folder: Any, empty_mlflow: Any, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Config, Any]]:
    """A finished run, and its record."""
    import shutil

    from mlflow.tracking import MlflowClient

    from ray_sql.config import load

    root = tmp_path_factory.mktemp("record")
    shutil.copy(empty_mlflow, root / "mlflow.db")
    settings = {
        **{"model_name": str(tiny_model), "output_name": "mine", "task_type": "sql"},
        **{"dataset_id": str(spider_folder), "output_dir": str(root / "out")},
        **{"cache_dir": str(root / "cache"), "prompt.serializer": "compact", "lora.r": 4},
        **{"data.split_by": "question", "data.validation_fraction": 0.2, "train.bf16": False},
        **{"train.max_steps": 2, "train.logging_steps": 1, "save_steps": 1},
        **{"evaluate.max_new_tokens": 8, "evaluate.limit": 4, "evaluate.processes": 1},
        **{"evaluate.select_examples": 2, "scaling.num_workers": 0, "grad_accum_steps": 2},
        **{"tracking.uri": f"sqlite:///{root}/mlflow.db", "tracking.questions": True},
    }
    config = load(Config, [], **settings)
    metrics = finetune.run(config)
    yield config, MlflowClient(f"sqlite:///{root}/mlflow.db").get_run(metrics["mlflow_run_id"])


def test_metrics_are_few_in_groups_and_the_main_score_is_the_first_final_one(recorded: Any) -> None:
    _, run = recorded
    assert Counter(name.partition("/")[0] for name in run.data.metrics) == GROUPS
    scores = [name for name in run.data.metrics if name.startswith("score/")]
    assert scores == [
        *("score/execution_accuracy", "score/valid_sql", "score/exact_set_match"),
        *("score/execution_accuracy_base", "score/validation"),
    ]
    counts = {"n", "correct", "gold_errors", "epoch"}
    assert not [name for name in run.data.metrics if name.rpartition("/")[2] in counts]


def test_a_runs_records_are_counted(recorded: Any) -> None:
    from mlflow.tracking import MlflowClient

    config, run = recorded
    client = MlflowClient(config.tracking.uri)

    def files(folder: str) -> int:
        found = client.list_artifacts(run.info.run_id, folder)
        return sum(files(one.path) if one.is_dir else 1 for one in found)

    assert len(run.data.metrics) == sum(GROUPS.values()) == 24, "43 before they were grouped"
    machines = [name for name in run.data.metrics if name.startswith("system/")]
    assert len(run.data.metrics) - len(machines) == 18, "the others have a tab of their own"
    assert len(run.data.params) <= 120
    assert files("") <= 25
    assert set(run.data.tags) - {"git_commit", "ray_job_id"} == {
        *("mlflow.runName", "mlflow.source.name", "mlflow.note.content", "mlflow.loggedArtifacts"),
        *("task_type", "data_fingerprint", "template_hash", "folder", "scored", "over_base"),
    }


def test_each_model_has_a_table_of_its_answers(recorded: Any) -> None:
    from mlflow.artifacts import load_dict

    _, run = recorded
    for file in ("predictions.json", "base_predictions.json"):
        table = load_dict(f"{run.info.artifact_uri}/{file}")
        first = ["verdict", "question", "gold", "predicted", "error"]
        assert table["columns"] == [*first, "db_id", "hardness", "split"]
        assert len(table["data"]) == 4, "MLflow reads a table whole: one model's answers, once"


def test_the_tuned_models_questions_stand_in_mlflow(recorded: Any) -> None:
    from mlflow.tracking import MlflowClient

    config, run = recorded
    client = MlflowClient(config.tracking.uri)
    asked = client.search_traces(locations=[run.info.experiment_id], run_id=run.info.run_id)
    rows = RunFolder(config.run_dir).read_predictions()
    assert len(rows) == 4
    told = [(trace.info.request_preview, trace.info.assessments[0].rationale) for trace in asked]
    assert sorted(told) == sorted((f"{row['question']} · mall", row["error"]) for row in rows)


def test_the_name_says_model_task_and_data(recorded: Any) -> None:
    config, run = recorded
    model, data = config.model_name.rpartition("/")[2], config.dataset_id.rpartition("/")[2]
    assert run.info.run_name == f"mine: {model}, sql, {data}"


def test_the_description_is_a_page(recorded: Any) -> None:
    config, run = recorded
    page = run.data.tags["mlflow.note.content"]
    here = f"#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}"
    first, *rest = page.split("\n\n")
    assert first.startswith("**execution accuracy 0.0 % [0.0, 49.0]** on 4 questions of `dev`")
    assert "base model 0.0 %, not shown to beat its base (p = 1)." in first
    assert "Trained on " in rest[0], "MLflow folds what comes after some four lines"
    assert "\n\n| split | score | n | base | tuned |" in page
    assert f"[Report: each question with its answers]({here}/artifacts/report.html)" in page
    assert "LoRA of rank 4 on the 4-bit base" in page and "2 steps of 2 examples" in page
    flags = f"--output_dir {config.output_dir} --output_name mine"
    assert f'ray-sql ask "YOUR QUESTION" {flags} --database mall' in page
    assert f"ray-sql serve {flags}\nray-sql publish {flags} --hub.repo_id YOU/mine" in page
    assert run.data.tags["scored"] == "0/4 dev"


def test_the_page_counts_what_was_trained_and_the_steps_of_the_adapter(make_config: Any) -> None:
    config = make_config(**{"rows.too_long": "drop"})
    lengths = sorted(len(row.input_ids) for row in rows.read(prepare(config).rows_file))
    config = make_config(**{"rows.too_long": "drop", "rows.max_length": lengths[-1] - 1})
    prepared = prepare(config)
    kept = rows.read(prepared.rows_file)
    assert len(kept) < len(lengths) == len(prepared.corpus.splits["train"])
    metrics = {"best_step": 4, "steps": 1200, "objective": None}
    said = " ".join(results.training_sentences(prepared, config.lora, 1e-4, metrics))
    assert f"4 steps of 2 examples each. Trained on {len(kept)} questions on at most " in said
    said = " ".join(
        results.training_sentences(prepared, config.lora, 1e-4, metrics | {"objective": 0.5})
    )
    assert "4 steps of 2 examples each, the best of 1,200 on validation. Trained on" in said


def test_commands_name_a_run_no_longer_than_needed(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert commands.named(RunFolder(str(tmp_path / "out" / "a"))) == "--output_name a"
    elsewhere = commands.named(RunFolder("s3://runs/of me/a"))
    assert elsewhere == "--output_dir 's3://runs/of me' --output_name a"
    assert commands.ask(RunFolder(str(tmp_path / "out" / "a")), {"tuned": {"dev": {}}}) == (
        'ray-sql ask "YOUR QUESTION" --output_name a'
    ), "no database is known"


def test_the_best_and_the_worst_databases_are_named() -> None:
    def scored(right: int) -> dict[str, Any]:
        return {"execution_accuracy": right / 8, "n": 8, "interval": [0, 1]}

    by_database = {f"d{n}`|": scored(n) for n in range(8)}
    split = scored(4) | {"gold_errors": 0, "by_database": by_database}
    metrics = {"task_type": "sql", "tuned": {"dev": split}}
    page = description.page(RunFolder("/out/a"), metrics, ["tuned"], [], "#x")
    assert "Best databases of `dev`: `d7'|` 87.5 % of 8, `d6'|` 75.0 % of 8" in page
    assert "Worst: `d0'|` 0.0 % of 8, `d1'|` 12.5 % of 8" in page
    few = {"dev": split | {"by_database": dict(list(by_database.items())[:1])}}
    assert "atabase" not in description.page(
        RunFolder("/out/a"), metrics | {"tuned": few}, ["tuned"], [], "#x"
    ).replace("--database", "")


def test_words_of_the_dataset_are_no_markdown() -> None:
    failing = {"id": "7", "error": "no such table: ![x](http://host/p.png) <img src=x>"}
    split = {"execution_accuracy": 0.5, "n": 8, "interval": [0, 1], "gold_errors": 1}
    metrics = {"task_type": "sql", "tuned": {"a|b": split | {"gold_left_out": [failing]}}}
    page = description.page(RunFolder("/out/a"), metrics, ["tuned"], [], "#x")
    assert r"no such table: !\[x\](http://host/p.png) \<img src=x\>" in page
    assert "![x]" not in page and " <img" not in page and r"| a\|b | execution accuracy" in page
    metrics |= {"dataset_id": "data`[x](http://host)"}
    shared = readme(
        "study", [Stage("one", metrics, {"evaluate": {"semantics": "spider"}}, {})], None
    )
    assert "![x]" not in shared and " <img" not in shared
    assert "data `data'[x](http://host)`" in shared


@pytest.mark.parametrize(
    ("base", "tuned", "words"),
    [(0, 8, "better than its base"), (8, 0, "worse than its base"), (1, 2, "not shown to beat")],
)
def test_the_verdict_is_the_paired_tests(base: int, tuned: int, words: str) -> None:
    test = {"only_base": base, "only_tuned": tuned, "mcnemar_p": 0.0}
    assert verdict({"compared": {"dev": test}}, "dev").startswith(words)
    assert verdict({"compared": {}}, "dev") == verdict({}, "dev") == ""


def test_counts_are_no_curves() -> None:
    values = {"loss": 1.0, "epoch": 0.5, "time/data": 0.1, "validation/n": 4.0}
    assert tracking.named(values) == {"train/loss": 1.0, "time/data": 0.1}
