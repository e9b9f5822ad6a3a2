"""A run whose worker, node or newest checkpoint is lost ends with the curve of the unbroken one.

These are three trials of `benchmarks.faults`, which has all: killed processes of three real nodes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import faults
from ray_sql.cluster.events import Event, Note
from ray_sql.store import checkpoints
from ray_sql.store.run_folder import RunFolder
from tests.test_train import Curve, fit, flip_a_byte

pytestmark = [pytest.mark.slow, pytest.mark.cluster]


def test_a_run_survives_and_repeats_the_unbroken_curve(tmp_path: Path) -> None:
    chosen = [
        ("worker killed", "during a save"),
        ("node killed", "between two"),
        ("checkpoint damaged", "at the last step"),
    ]
    for result in faults.trials(tmp_path, chosen):
        assert result["survived"], result
        assert result["largest_difference"] < 1e-4, result
        assert 0 <= result["steps_repeated"] <= 2 * faults.SAVE, result


def test_all_ranks_go_on_from_the_same_checkpoint_where_the_newest_is_damaged(
    make_config: Any, ray_local: None
) -> None:
    settings = {
        "train.max_steps": 4,
        "save_steps": 2,
        "scaling.num_workers": 2,
        "evaluate.select_examples": 0,
    }
    config, first, second, notes = (
        make_config(**settings, **{"lora.lora_dropout": 0}),
        Curve(),
        Curve(),
        [],
    )

    def on_event(event: Event) -> None:
        second(event)
        if isinstance(event, Note):
            notes.append(event.text)

    fit(config, first)
    flip_a_byte(Path(config.run_dir, "checkpoint-4", "optimizer.pt"))
    fit(config, on_event)
    assert [
        text
        for text in notes
        if "checkpoint-4 is damaged (optimizer.pt is not as it was saved)" in text
    ] == notes
    assert len(notes) == 1 and second.order == [3, 4]
    assert second.losses == pytest.approx({step: first.losses[step] for step in (3, 4)}, abs=1e-4)
    assert [one.step for one in checkpoints.complete(RunFolder(config.run_dir))] == [2, 4]
