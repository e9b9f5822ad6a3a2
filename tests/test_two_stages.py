"""A linker, its links and a generator in one command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import two_stages
from ray_sql import evaluate
from ray_sql.config import EvaluateConfig, PipelineConfig
from ray_sql.data.shown import ORACLE
from ray_sql.database import Column, Schema, Table
from ray_sql.errors import ConfigError
from ray_sql.evaluate import stages
from ray_sql.store.run_folder import RunFolder
from ray_sql.tune import pipeline

SHORT: dict[str, Any] = {
    "task_type": ["sql", "schema"],
    "sweep": False,
    "prompt.schema_form": "noisy",
    "train.max_steps": 2,
    "evaluate.select_examples": 2,
    "evaluate.baseline": False,
}


@pytest.fixture
def config(make_config: Any) -> PipelineConfig:
    made: PipelineConfig = make_config(PipelineConfig, **SHORT)
    return made


def test_a_pipeline_reports_both_stages(
    config: PipelineConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    result = pipeline.run(config)["two_stages"]
    shown = capsys.readouterr().out
    assert "oracle (gold links)" in shown and "lost to linking" in shown
    assert list(result["ways"]) == [stages.FULL, stages.PREDICTED, stages.GOLD]
    tokens = {way: one["prompt_tokens"] for way, one in result["ways"].items()}
    assert tokens[stages.GOLD] < tokens[stages.FULL]
    # a model of two steps finds no links: all prompts are whole, and say so
    assert result["ways"][stages.PREDICTED]["full_schema"] == result["n"] == 4
    assert result["loss"]["lost_to_linking"] == 0
    page = Path(RunFolder(config.run_dir).report).read_text()
    assert "predicted links" in page and "oracle" in page
    rows = RunFolder(f"{config.run_dir}-oracle").read_predictions()
    assert {row["split"] for row in rows} == {f"dev{ORACLE}"}
    linker, generator = (f"{config.run_dir}-{task}" for task in ("schema", "sql"))
    # asked itself, the linker gives the links that were in its file
    changes = {"adapter": f"{generator}/adapter", "prompt.links": f"{linker}/adapter"}
    settings = RunFolder(generator).read_settings() or {}
    asking = EvaluateConfig(**settings | {"output_name": "asking"}).changed(changes)
    evaluate.run(asking)
    assert "\nthe linker: 4 of 4 answers are there from before" in capsys.readouterr().out
    predicted = RunFolder(f"{config.run_dir}-predicted").read_predictions()
    assert RunFolder(asking.run_dir).read_predictions() == predicted
    # the noise of the generator is that of the linker on validation questions
    scored = RunFolder(f"{linker}-validation").read_metrics(dict[str, Any]) or {}
    saved = RunFolder(generator).read_settings() or {}
    rate = scored["tuned"]["validation"].get("spare_tables", 0.0)
    assert saved["prompt"]["spare_tables"] == round(rate, 2)


def test_a_pipeline_takes_no_links_of_others(make_config: Any) -> None:
    with pytest.raises(ConfigError, match=r"prompt.links gold: the pipeline asks without links"):
        make_config(PipelineConfig, **SHORT, **{"prompt.links": "gold"})


TOWN = Schema(
    "town",
    tuple(
        Table(name, (Column("id", "INTEGER"), Column("name", "TEXT"))) for name in ("house", "road")
    ),
)


def judged(split: str, rights: str, links: list[dict[str, list[str]] | None]) -> list[Any]:
    """Return rows: `+` for a right answer, `-` for a wrong one, `?` where gold fails."""
    verdicts = {"+": "correct", "-": "wrong", "?": "gold_error"}
    rows = []
    for number, (mark, link) in enumerate(zip(rights, links, strict=True)):
        row = {"id": str(number), "split": split, "db_id": "town", "verdict": verdicts[mark]}
        row |= {"gold": "SELECT name FROM house", "prompt_tokens": 10, "generation_seconds": 1.0}
        rows.append(row | ({} if link is None else {"links": json.dumps(link)}))
    return rows


def test_questions_are_lost_to_linking_to_generation_or_saved() -> None:
    good, bad, whole = {"house": ["name"]}, {"road": ["name"]}, None
    none = [whole] * 6
    result = stages.account(
        {
            stages.FULL: judged("dev", "+--+-?", none),
            stages.PREDICTED: judged("dev", "-+-++-", [bad, good, good, bad, whole, good]),
            stages.GOLD: judged(f"dev{ORACLE}", "+++++-", none),
        },
        {"town": TOWN},
        "reduced",
    )
    assert result["n"] == 5
    assert result["loss"] == {
        "needed_name_missing": 2,
        "lost_to_linking": 1,
        "lost_to_generation": 1,
        "saved_by_linking": 2,
        "spoiled_by_linking": 1,
    }
    test = result["tests"][f"{stages.FULL} / {stages.PREDICTED}"]
    assert (test["only_first"], test["only_second"]) == (1, 2)


@pytest.mark.parametrize(
    ("form", "links", "lacks"),
    [
        ("tables", {"house": []}, False),
        ("reduced", {"house": []}, True),
        ("reduced", {"HOUSE": ["NAME"]}, False),
        ("tables", {"road": ["name"]}, True),
    ],
)
def test_a_name_is_missing_by_what_the_prompt_shows(
    form: Any, links: dict[str, list[str]], lacks: bool
) -> None:
    (row,) = judged("dev", "-", [links])
    assert stages.lacks_a_name(row, {"town": TOWN}, form) is lacks


@pytest.mark.slow
def test_the_benchmark_prints_one_object_at_its_end(
    tiny_model: Path,
    spider_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(two_stages.QUICK, "train.max_steps", 1)
    monkeypatch.setitem(two_stages.CUT, "scaling.num_workers", 0)
    monkeypatch.setitem(two_stages.CUT, "tracking.enabled", False)
    monkeypatch.setitem(two_stages.CUT, "evaluate.max_new_tokens", 8)
    monkeypatch.setitem(two_stages.CUT, "data.split_by", "question")
    monkeypatch.setitem(two_stages.QUICK, "evaluate.limit", 4)
    places = ["--model_name", str(tiny_model), "--dataset_id", str(spider_folder)]
    two_stages.main(["--quick", "--output_dir", str(tmp_path), *places])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(result["accuracy"]) == ["full", "reduced", "noisy"]
    assert result["n"] == 4 and set(result["dial"]) == {"0.75", "0.5", "0.125"}
