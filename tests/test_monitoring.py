"""Prometheus and Grafana find what runs export, by the files of `jobs/monitoring/`."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import urllib.request
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml

from ray_sql.report import commands
from ray_sql.store.run_folder import RunFolder
from ray_sql.train.gauges import GAUGES, VALIDATION, Gauges
from tests.waiting import wait_until

FILES = Path(__file__).parent.parent / "jobs" / "monitoring"
OURS = {f"ray_sql_{name}" for name in (*GAUGES, VALIDATION)}


@pytest.fixture(scope="module")
def board() -> dict[str, Any]:
    """The dashboard of Grafana."""
    read: dict[str, Any] = json.loads((FILES / "grafana.json").read_text())
    return read


def rules() -> list[dict[str, str]]:
    (group,) = yaml.safe_load((FILES / "rules.yaml").read_text())["groups"]
    return list(group["rules"])


def test_the_files_ask_for_what_runs_export(board: dict[str, Any]) -> None:
    asked = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    shown = set(re.findall(r"ray_sql_\w+", " ".join(asked)))
    assert shown == OURS, "the dashboard shows every metric of a run, and no other"
    ruled = set(re.findall(r"ray_sql_\w+", " ".join(rule["expr"] for rule in rules())))
    assert ruled and ruled <= OURS
    choices = {choice["name"]: choice["query"] for choice in board["templating"]["list"]}
    assert choices["run"]["query"] == "label_values(ray_sql_step, run)"
    assert all('{run=~"$run"}' in query for query in asked if "ray_sql_" in query)


def test_the_panels_of_the_dashboard_stand_beside_each_other(board: dict[str, Any]) -> None:
    panels = board["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        assert panel["datasource"]["uid"] == "${datasource}" and panel["title"]
        assert panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24
    for one, other in combinations([panel["gridPos"] for panel in panels], 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        below = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert beside or below


def test_rules_have_a_name_and_say_what_to_do() -> None:
    for rule in rules():
        assert rule.get("alert") or rule.get("record")
        if "alert" in rule:
            assert {"summary", "description"} == set(rule["annotations"]) and rule["for"]


@pytest.mark.skipif(not shutil.which("promtool"), reason="Prometheus is not installed")
def test_prometheus_reads_the_rules() -> None:
    command = ["promtool", "check", "rules", str(FILES / "rules.yaml")]
    subprocess.run(command, check=True, capture_output=True)


def test_without_ray_nothing_is_exported() -> None:
    import ray

    gauges = Gauges("mine")
    gauges.point(1, 2, {"loss": 1.0})
    gauges.validated({"validation/loss": 1.0})
    assert not ray.is_initialized()


def test_trials_are_told_apart_by_their_sweeps() -> None:
    sweep = RunFolder("s3://bucket/runs/wide")
    assert sweep.full_name == RunFolder("/out/wide/").full_name == "wide"
    assert sweep.trial("trial-003").full_name == "wide/trial-003"


@pytest.mark.slow
@pytest.mark.cluster
def test_ray_exports_every_value_of_a_run(ray_with_metrics: str) -> None:
    gauges = Gauges("mine")
    values = {"loss": 0.5, "examples_per_second": 4.0, "tokens_per_second": 80.0, "epoch": 1.0}
    gauges.point(3, 10, values)
    gauges.validated({"validation/execution_accuracy": 0.25, "validation/n": 8.0})

    def shown() -> dict[str, tuple[str, float]]:
        text = urllib.request.urlopen(ray_with_metrics, timeout=10).read().decode()
        found = re.findall(r"^(ray_sql_\w+)\{(.*)\} (\S+)$", text, re.MULTILINE)
        return {name: (labels, float(value)) for name, labels, value in found}

    wait_until(lambda: shown().keys() == OURS)
    known = shown()
    assert all('run="mine"' in labels for labels, _ in known.values())
    assert (known["ray_sql_step"][1], known["ray_sql_steps"][1]) == (3.0, 10.0)
    labels, value = known["ray_sql_validation"]
    assert 'score="execution_accuracy"' in labels and value == 0.25


def test_the_log_says_where_a_run_is_watched() -> None:
    line = commands.watch("http://1.2.3.4:8265/#/jobs/raysubmit_1", "abc", "http://me:x@ml:5000")
    assert line == (
        "watch     http://1.2.3.4:8265/#/jobs/raysubmit_1; MLflow run abc of http://me:***@ml:5000"
    )
    assert commands.watch("http://1.2.3.4:8265", "", "") == "watch     http://1.2.3.4:8265"
    assert commands.watch(None, "abc", "sqlite:////x.db") == ""
