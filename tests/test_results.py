"""A study's results in one folder: scored again they say the same, and the Hub takes them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi, constants
from huggingface_hub.utils import close_session

from ray_sql import evaluate
from ray_sql.config import EvaluateConfig, ResultsConfig
from ray_sql.errors import ConfigError
from ray_sql.publish import results
from tests import hub as stand_in


@pytest.fixture
def scored(make_config: Any, tmp_path: Path) -> Path:
    """The folder of an evaluation of predictions, some of them wrong."""
    answers = ["SELECT COUNT(*) FROM customer", "SELECT name FROM customer WHERE city = 'Porto'"]
    file = tmp_path / "answers.jsonl"
    rows = [{"id": str(number), "predicted": text} for number, text in enumerate(answers)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = make_config(
        EvaluateConfig, predictions_file=str(file), output_name="first", **{"evaluate.limit": None}
    )
    evaluate.run(config)
    return Path(config.run_dir)


def test_answers_that_are_scored_again_give_the_same_numbers(
    scored: Path, make_config: Any, tmp_path: Path
) -> None:
    results.run(make_config(ResultsConfig, runs=[str(scored)], output_name="study"))
    study = tmp_path / "out" / "study"
    assert sorted(path.name for path in study.iterdir()) == ["README.md", "first"]
    again = make_config(
        EvaluateConfig,
        predictions_file=str(study / "first" / "predictions.jsonl"),
        output_name="again",
        **{"evaluate.limit": None},
    )
    shared = json.loads((study / "first" / "metrics.json").read_text())
    assert evaluate.run(again)["file"] == shared["file"]
    assert shared["file"]["dev"]["correct"] == 1
    page = (study / "README.md").read_text()
    assert "| dev | execution accuracy | 2 | 50.0 %" in page
    assert str(tmp_path) not in "".join(path.read_text() for path in study.glob("first/*.json")), (
        "places of this machine"
    )


def test_no_server_and_no_place_of_this_machine_is_shared(
    scored: Path, make_config: Any, tmp_path: Path
) -> None:
    settings = json.loads((scored / "config.json").read_text())
    settings["evaluate"]["url"] = "http://gpu7.internal:8000/v1"
    settings["audit"] = "/home/me/audit/audit.json"
    (scored / "config.json").write_text(json.dumps(settings))
    results.run(make_config(ResultsConfig, runs=[str(scored)], output_name="study"))
    shared = (tmp_path / "out" / "study" / "first" / "config.json").read_text()
    assert "internal" not in shared and "/home/me" not in shared
    assert json.loads(shared)["evaluate"]["semantics"] == "spider"


@pytest.mark.parametrize("place", ["nowhere", "twice"])
def test_a_folder_without_scores_and_two_of_a_name_are_refused(
    scored: Path, make_config: Any, tmp_path: Path, place: str
) -> None:
    runs = [str(scored), str(scored) if place == "twice" else str(tmp_path)]
    with pytest.raises(ConfigError, match=r"two are called first|holds no scored run"):
        results.run(make_config(ResultsConfig, runs=runs, output_name="study"))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[stand_in.Hub]:
    """The stand-in, taken for the Hub by this process."""
    with stand_in.running() as running:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", running.endpoint)
        close_session()
        yield running
        close_session()


def test_the_hub_gets_them_as_a_dataset(scored: Path, make_config: Any, hub: stand_in.Hub) -> None:
    given = {"runs": [str(scored)], "output_name": "study", "write_token": stand_in.WRITER}
    results.run(make_config(ResultsConfig, **given, publish=True))
    found = HfApi(endpoint=hub.endpoint, token=stand_in.WRITER).dataset_info("me/study")
    names = {file.rfilename for file in found.siblings or []}
    assert {"README.md", "first/metrics.json", "first/predictions.jsonl"} <= names
    assert found.private and hub.repos["me/study"].files["README.md"].startswith(b"---\ntags:")
    assert hub.count("/api/models/") == 0
