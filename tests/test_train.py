"""The loss is the completion's, a run cut off repeats the unbroken one, two workers equal one.

Everything is real: TRL, PEFT, 4-bit NF4 on the CPU, Ray Train; only the model is tiny.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from ray_sql import cluster, finetune, rows, tracking, train
from ray_sql.cluster.events import CheckpointSaved, Event, Note, TrainPoint
from ray_sql.config import Config
from ray_sql.display import Display
from ray_sql.errors import (
    ConfigError,
    ContractError,
    ModelError,
    OutOfMemory,
    StoreError,
    TrainingError,
    out_of_memory,
)
from ray_sql.finetune import prepare
from ray_sql.rows.batch import Step
from ray_sql.store import checkpoints, storage
from ray_sql.store.run_folder import RunFolder
from ray_sql.tasks import TASKS
from ray_sql.train import trainer
from ray_sql.train.resume import claim_run
from tests.conftest import load_base, make_model, removal_cut_off


class Curve:
    """Collects the loss of every step; `at` is called when a step is first seen."""

    def __init__(self, at: Any = None) -> None:
        self.losses: dict[int, float] = {}
        self.order: list[int] = []
        self.validated: list[int] = []
        self._at = at

    def __call__(self, event: Event) -> None:
        match event:
            case CheckpointSaved(step):
                self.validated.append(step)
            case TrainPoint(step, _, values):
                new = step not in self.losses
                self.losses[step] = values["loss"]
                self.order.append(step)
                if new and self._at:
                    self._at(step)


def fit(config: Config, on_event: Any) -> train.FitResult:
    prepared = prepare.prepare(config)
    prepare.write_inputs(prepared)
    return train.fit(config, prepared.model_folder, on_event)


def adapter_weights(config: Config) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(f"{config.run_dir}/adapter/adapter_model.safetensors")


def test_a_run_that_was_taken_over_ends_without_saving(make_config: Any) -> None:
    config = make_config(**{"train.max_steps": 6, "save_steps": 2, "evaluate.select_examples": 0})

    def another(step: int) -> None:
        if step == 3:
            claim_run(RunFolder(config.run_dir))

    with pytest.raises(TrainingError, match="taken over by the same command given again"):
        fit(config, Curve(another))
    assert [one.step for one in checkpoints.complete(RunFolder(config.run_dir))] == [2]
    assert fit(config, Curve()).steps == 6


def test_a_folder_that_workers_do_not_see_is_named(make_config: Any) -> None:
    config = make_config()
    prepared = prepare.prepare(config)
    prepare.write_inputs(prepared)
    storage.remove(
        RunFolder(config.run_dir).rows
    )  # as on a node where the folder of that name is another one
    with pytest.raises(
        ConfigError, match=r"is not on .*, where a worker runs: give --scaling.storage_path"
    ):
        train.fit(config, prepared.model_folder, lambda _: None)


def test_the_loss_is_that_of_the_completions_alone(make_config: Any, tiny_model: Path) -> None:
    config = make_config(
        **{
            "train.max_steps": 1,
            "lora.lora_dropout": 0,
            "quantization.load_in_4bit": False,
            "data.limit": 2,
        }
    )
    curve = Curve()
    fit(config, curve)
    data = rows.read(RunFolder(config.run_dir).rows)
    model = load_base(tiny_model, config)
    total, tokens = 0.0, 0
    for row in data:
        with torch.no_grad():
            logits = model(torch.tensor([row.input_ids])).logits[0, :-1].float()
        wanted = torch.tensor(row.labels[1:])
        total += torch.nn.functional.cross_entropy(
            logits, wanted, ignore_index=-100, reduction="sum"
        ).item()
        tokens += int((wanted != -100).sum())
    assert curve.losses[1] == pytest.approx(total / tokens, rel=1e-4)


def test_a_step_sees_the_global_batch_and_every_epoch_all_examples(make_config: Any) -> None:
    config = make_config(**{"train_batch_size": 2, "grad_accum_steps": 3, "num_epochs": 2})
    curve = Curve()
    result = fit(config, curve)
    examples = prepare.prepare(config).audit.rows
    per_epoch = -(-examples // 6)
    assert result.steps == config.batching.steps(examples) == 2 * per_epoch == max(curve.losses)


def test_an_interrupted_run_resumes_with_the_unbroken_curve(make_config: Any) -> None:
    settings = {
        "train.max_steps": 6,
        "save_steps": 2,
        "lora.lora_dropout": 0.1,
        "learning_rate": 1e-2,
    }
    whole = Curve()
    fit(make_config(output_name="whole", **settings), whole)

    def stop(step: int) -> None:
        if step == 5:
            raise KeyboardInterrupt

    broken = make_config(output_name="broken", **settings)
    first, second = Curve(stop), Curve()
    with pytest.raises(KeyboardInterrupt):
        fit(broken, first)
    fit(broken, second)
    assert second.order == [5, 6], "resumes after checkpoint-4"
    curve = first.losses | second.losses
    assert curve == pytest.approx(whole.losses, abs=1e-4)
    a, b = adapter_weights(broken), adapter_weights(make_config(output_name="whole", **settings))
    assert all(torch.allclose(a[name], b[name], atol=1e-6) for name in a)


@pytest.mark.slow
@pytest.mark.cluster
def test_a_killed_worker_is_replaced_and_repeats_the_unbroken_curve(
    make_config: Any, ray_local: None
) -> None:
    settings = {
        "train.max_steps": 6,
        "save_steps": 2,
        "lora.lora_dropout": 0.1,
        "learning_rate": 1e-2,
    }
    whole = Curve()
    fit(make_config(output_name="whole", **settings), whole)

    def kill(step: int) -> None:
        if step == 5:
            for process in psutil.Process().children(recursive=True):
                if "RayTrainWorker" in " ".join(process.cmdline()):
                    process.send_signal(signal.SIGKILL)

    killed = Curve(kill)
    config = make_config(output_name="killed", **settings | {"scaling.num_workers": 1})
    result = fit(config, killed)
    assert result.steps == 6
    assert killed.order.count(5) == 2 or killed.order[-1] == 6
    assert len(killed.order) > 6, "the worker died and its steps were repeated"
    assert killed.losses == pytest.approx(whole.losses, abs=1e-4)


@pytest.mark.slow
@pytest.mark.cluster
def test_a_relative_output_dir_means_the_drivers_folder(
    make_config: Any, ray_local: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = make_config(
        **{
            "output_dir": "here",
            "train.max_steps": 1,
            "evaluate.limit": 2,
            "scaling.num_workers": 1,
        }
    )
    finetune.run(config)
    assert (tmp_path / "here" / "run" / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_two_workers_train_the_same_adapter_as_one(make_config: Any, ray_local: None) -> None:
    settings = {
        "train.max_steps": 5,
        "lora.lora_dropout": 0,
        "learning_rate": 1e-2,
        "evaluate.select_examples": 4,
    }
    one, two = Curve(), Curve()
    alone = make_config(output_name="one", **settings | {"grad_accum_steps": 4})
    together = make_config(
        output_name="two", **settings | {"grad_accum_steps": 2, "scaling.num_workers": 2}
    )
    fit(alone, one)
    fit(together, two)
    assert two.losses == pytest.approx(one.losses, abs=1e-3)
    a, b = adapter_weights(alone), adapter_weights(together)
    assert all(torch.allclose(a[name], b[name], atol=1e-3) for name in a)
    assert checkpoints.complete(RunFolder(together.run_dir))[-1].metrics["validation/n"] == 2, (
        "both ranks' answers were judged"
    )


def test_a_run_without_memory_goes_on_with_smaller_passes_as_the_unbroken_one(
    make_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {
        **{"train.max_steps": 5, "save_steps": 2, "lora.lora_dropout": 0, "learning_rate": 1e-2},
        **{"grad_accum_steps": 8, "evaluate.select_examples": 0},
    }
    whole, broken = Curve(), Curve()
    fit(make_config(output_name="whole", **settings), whole)
    step, tried, notes = trainer.StepTrainer.training_step, [], []

    def small_memory(self: Any, model: Any, inputs: Step, *rest: Any) -> torch.Tensor:
        tried.append(max(int(made.segments.max()) for made in inputs.passes))
        if self.state.global_step >= 2 and tried[-1] > 2:
            torch.empty(2**55)  # more than any machine has: what torch then says is what it says
        return step(self, model, inputs, *rest)

    def on_event(event: Event) -> None:
        broken(event)
        if isinstance(event, Note):
            notes.append(event.text)

    monkeypatch.setattr(trainer.StepTrainer, "training_step", small_memory)
    config = make_config(output_name="broken", **settings)
    fit(config, on_event)
    assert [one.removesuffix(", and more passes in a step") for one in notes] == [
        f"out of memory: on from the last checkpoint with up to {n} examples in a forward pass, "
        f"not {2 * n}"
        for n in (4, 2)
    ]
    assert max(tried[:2]) > 4 and tried[2] > 4 and tried[3] in (3, 4) and max(tried[4:]) <= 2
    assert broken.order == [1, 2, 3, 4, 5], "on from the checkpoint of step 2"
    assert broken.losses == pytest.approx(whole.losses, abs=1e-4)
    assert finetune.finished_metrics(config) is None, "it is the same run still"
    tried.clear()
    fit(config.changed({"train.max_steps": 6}), Curve())
    assert max(tried) <= 2, "the same command does not go where memory was full"


def test_what_a_full_memory_says_is_known() -> None:
    assert out_of_memory(RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"))
    assert out_of_memory(MemoryError())
    assert out_of_memory(OutOfMemory("worker 1 found none"))
    behind = RuntimeError("connection reset by peer")
    behind.__cause__ = RuntimeError("rank 0: CUDA out of memory\nrank 1: connection reset by peer")
    assert out_of_memory(behind)
    killed = TrainingError(
        "the workers failed: a node was low on memory; how to address the out of memory issue"
    )
    assert not out_of_memory(killed), (
        "Ray's monitor ended a process, perhaps for a neighbour's sake"
    )


def flip_a_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_a_damaged_checkpoint_is_set_aside_for_the_one_before(make_config: Any) -> None:
    settings = {
        "train.max_steps": 6,
        "save_steps": 2,
        "learning_rate": 1e-2,
        "evaluate.select_examples": 0,
    }
    config, first, second, notes = make_config(**settings), Curve(), Curve(), []

    def on_event(event: Event) -> None:
        second(event)
        if isinstance(event, Note):
            notes.append(event.text)

    fit(config, first)
    flip_a_byte(Path(config.run_dir, "checkpoint-6", "adapter_model.safetensors"))
    with pytest.raises(
        ModelError, match=r"--prev_checkpoint checkpoint-6: is damaged .*; give another one"
    ):
        train.starting_point("checkpoint-6", RunFolder(config.run_dir), {}, config.lora)
    result = fit(config, on_event)
    assert notes == [
        "checkpoint-6 is damaged (adapter_model.safetensors is not as it was saved): set aside for "
        "the one before"
    ]
    assert second.order == [5, 6] and result.best.step == 6
    assert first.losses | second.losses == pytest.approx(first.losses, abs=1e-4)


def test_an_adapter_is_never_copied_from_a_damaged_checkpoint(
    make_config: Any, caplog: Any
) -> None:
    config = make_config(**{"train.max_steps": 2, "save_steps": 1, "evaluate.select_examples": 0})
    fit(config, Curve())
    flip_a_byte(Path(config.run_dir, "checkpoint-2", "adapter_model.safetensors"))
    assert train.keep_best(RunFolder(config.run_dir)).step == 1
    assert "checkpoint-2 is damaged" in caplog.text
    flip_a_byte(Path(config.run_dir, "checkpoint-1", "adapter_config.json"))
    with pytest.raises(TrainingError, match="ended without a complete checkpoint"):
        train.keep_best(RunFolder(config.run_dir))


def test_a_diverging_loss_stops_with_the_step_and_the_remedies(make_config: Any) -> None:
    config = make_config(
        **{
            "learning_rate": 1e5,
            "train.max_steps": 20,
            "train.max_grad_norm": 1e9,
            "train.lr_scheduler_type": "constant",
        }
    )
    curve = Curve()
    with pytest.raises(
        TrainingError, match=r"diverged by step \d+.*--learning_rate \(now 100000\)"
    ):
        fit(config, curve)
    assert max(curve.losses) < 20


def test_the_best_and_the_last_two_checkpoints_are_kept(make_config: Any) -> None:
    config = make_config(**{"train.max_steps": 5, "save_steps": 1, "evaluate.select_examples": 2})
    curve = Curve()
    result = fit(config, curve)
    kept = {checkpoint.step for checkpoint in checkpoints.complete(RunFolder(config.run_dir))}
    assert curve.validated == [1, 2, 3, 4, 5]
    assert kept == {4, 5, result.best.step}


def test_only_checkpoints_at_eval_steps_and_the_last_are_measured(make_config: Any) -> None:
    settings = {
        "train.max_steps": 5,
        "save_steps": 1,
        "evaluate.select_examples": 2,
        "evaluate.eval_steps": 3,
    }
    config = make_config(**settings)
    measured: dict[int, bool] = {}

    def on_event(event: Event) -> None:
        if isinstance(event, CheckpointSaved):
            measured[event.step] = "validation/execution_accuracy" in event.values

    result = fit(config, on_event)
    assert measured == {1: False, 2: False, 3: True, 4: False, 5: True}
    assert result.best.step in (3, 5) and result.best.objective is not None


def test_prev_checkpoint_goes_on_from_the_one_named(make_config: Any) -> None:
    config = make_config(**{"train.max_steps": 4, "save_steps": 2})
    fit(config, Curve())
    again = Curve()
    name = Path(checkpoints.complete(RunFolder(config.run_dir))[-1].uri).name
    longer = config.changed({"train.max_steps": 6, "prev_checkpoint": name})
    fit(longer, again)
    assert again.order == [5, 6]


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"lora.r": 8}, r"LoRA rank is 4, but --lora.r is 8; set --lora.r 4"),
        (
            {"prev_checkpoint": "checkpoint-77"},
            r"no complete checkpoint at .*checkpoint-77; this run has checkpoint-1",
        ),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(
    make_config: Any, changes: dict[str, Any], message: str
) -> None:
    config = make_config(**{"train.max_steps": 1})
    fit(config, Curve())
    with pytest.raises(ModelError, match=message):
        train.fit(
            config.changed({"prev_checkpoint": "checkpoint-1"} | changes),
            config.model_name,
            Curve(),
        )


def test_a_checkpoint_with_nothing_left_to_train_is_refused_before_anything_is_written(
    make_config: Any,
) -> None:
    config = make_config(**{"train.max_steps": 2})
    fit(config, Curve())
    more = config.changed(
        {"prev_checkpoint": f"{config.run_dir}/checkpoint-2", "output_name": "more"}
    )
    with pytest.raises(
        ModelError, match="is at step 2, and this run ends at step 2: nothing is left to train"
    ):
        finetune.run(more)
    assert not os.path.exists(more.run_dir)


def test_a_checkpoint_of_another_base_model_is_refused(make_config: Any, tmp_path: Path) -> None:
    config = make_config(**{"train.max_steps": 1})
    fit(config, Curve())
    other = make_model(tmp_path / "other", hidden_size=32)
    moved = config.changed(
        {
            "model_name": str(other),
            "prev_checkpoint": f"{config.run_dir}/checkpoint-1",
            "output_name": "new",
        }
    )
    with pytest.raises(ContractError, match="trained with model_name"):
        train.starting_point(
            moved.prev_checkpoint,
            RunFolder(moved.run_dir),
            prepare.prepare(moved).contract,
            moved.lora,
        )


def test_the_same_command_goes_on_from_a_named_checkpoint_only_once(make_config: Any) -> None:
    config = make_config(**{"train.max_steps": 4, "save_steps": 1, "evaluate.select_examples": 0})
    fit(config, Curve())
    last = checkpoints.complete(RunFolder(config.run_dir))[-1]
    again = config.changed({"train.max_steps": 6, "prev_checkpoint": Path(last.uri).name})
    fit(again, Curve())
    repeated = Curve()
    fit(again, repeated)
    assert repeated.order == [], (
        "training is over: nothing is trained again, and no checkpoint is removed"
    )
    assert checkpoints.complete(RunFolder(config.run_dir))[-1].step == 6


def test_workers_read_nothing_but_the_runs_folder(
    make_config: Any, spider_folder: Path, tmp_path: Path
) -> None:
    """As on another machine: the dataset and its databases are gone once the run is laid out."""
    dataset = shutil.copytree(spider_folder, tmp_path / "dataset")
    config = make_config(
        **{
            "dataset_id": str(dataset),
            "scaling.storage_path": (tmp_path / "store").as_uri(),
            "train.max_steps": 1,
        }
    )
    prepared = prepare.prepare(config)
    prepare.write_inputs(prepared)
    shutil.rmtree(dataset)
    shutil.rmtree(config.cache)
    result = train.fit(config, prepared.model_folder, Curve())
    assert result.best.metrics["validation/n"] == len(prepared.validation()) > 0
    assert set(result.best.metrics) >= {"validation/execution_accuracy", "validation/loss"}


@pytest.mark.parametrize(
    ("task_type", "chosen"),
    [
        ("sql", {"ground": "none", "choose": "vote"}),
        ("sql", {"ground": "repair", "choose": "repaired"}),
        ("sql", {"ground": "constrain", "choose": "weighted_vote"}),
        ("schema", {"ground": "repair", "choose": "vote"}),
    ],
)
@pytest.mark.parametrize("objective", ["answers", "chosen"])
def test_checkpoints_are_chosen_by_greedy_answers_or_by_chosen_ones(
    make_config: Any, objective: str, task_type: str, chosen: dict[str, str]
) -> None:
    config = make_config(
        **{f"evaluate.{name}": value for name, value in chosen.items()},
        **{"task_type": task_type, "evaluate.samples": 3, "evaluate.select_examples": 2},
        **{"tune.objective": objective, "train.max_steps": 1},
    )
    metrics = fit(config, Curve()).best.metrics
    names = {"validation/pass_2", f"validation/{TASKS[task_type].metric}_{chosen['choose']}"}
    assert metrics["validation/n"] == 2
    assert names & metrics.keys() == (names if objective == "chosen" else set())


@pytest.mark.parametrize("remote", [False, True])
def test_a_run_is_recorded_once_and_shown_when_it_is_run_again(
    make_config: Any, tmp_path: Path, remote: bool
) -> None:
    from mlflow.tracking import MlflowClient

    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    config = make_config(
        **{"train.max_steps": 2, "tracking.enabled": True, "tracking.uri": uri, "evaluate.limit": 2}
    )
    if remote:
        config = config.changed({"scaling.storage_path": (tmp_path / "store").as_uri()})
    metrics = finetune.run(config)
    assert finetune.run(config) == metrics
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("ray_sql")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params["lora.r"] == "4"
    assert run.data.tags[tracking.SCORED].endswith("/2 dev")
    assert [point.step for point in client.get_metric_history(run.info.run_id, "train/loss")] == [
        1,
        2,
    ]
    names = {item.path for item in client.list_artifacts(run.info.run_id)}
    assert {"predictions.json", "metrics.json", "report.html", "figures"} <= names
    (model,) = client.search_logged_models([experiment.experiment_id], "name = 'adapter'")
    weights = {item.path for item in client.list_logged_model_artifacts(model.model_id)}
    assert {"adapter_model.safetensors", "contract.json", "MLmodel"} <= weights
    assert not list((config.cache / "spool").rglob("*.html")), "no copy is left behind"
    assert (
        json.loads(storage.read_text(f"{config.run_dir}/metrics.json") or "")["mlflow_run_id"]
        == run.info.run_id
    )


def test_a_failed_run_ends_as_failed_and_goes_on_as_the_same_run(
    make_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.tracking import MlflowClient

    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    config = make_config(
        **{"train.max_steps": 2, "tracking.enabled": True, "tracking.uri": uri, "evaluate.limit": 2}
    )
    monkeypatch.setattr(finetune.finetune, "evaluate_models", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        finetune.run(config)
    monkeypatch.undo()
    client = MlflowClient(uri)
    (failed,) = client.search_runs(["1"])
    assert failed.info.status == "FAILED"
    finetune.run(config)
    (run,) = client.search_runs(["1"])
    assert (run.info.run_id, run.info.status) == (failed.info.run_id, "FINISHED")


def test_the_name_of_a_run_with_other_settings_is_refused(make_config: Any) -> None:
    config = make_config()
    prepare.write_inputs(prepare.prepare(config))
    with pytest.raises(
        ConfigError, match=r"learning_rate 0.0001 there, 0.5 here.*--output_name.*--overwrite"
    ):
        finetune.finished_metrics(config.changed({"learning_rate": 0.5}))
    assert finetune.finished_metrics(config.changed({"evaluate.timeout": 5})) is None, (
        "an unfinished run of the same settings goes on"
    )
    anew = config.changed({"learning_rate": 0.5, "overwrite": True})
    assert finetune.finished_metrics(anew) is None
    assert os.path.exists(config.run_dir), "nothing is removed before everything has been checked"
    Path(config.run_dir, "metrics.json").write_text("{}")
    with finetune.Session(anew, Display()):
        assert not os.path.exists(f"{config.run_dir}/metrics.json")


METRICS = {
    **{"task_type": "sql", "dataset_id": "d", "data_fingerprint": "f", "identity": "i"},
    **{"mlflow_run_id": None, "tracking_uri": None, "best_step": 1, "steps": 1},
    **{"training_seconds": 1.0, "seconds": 2.0},
}
"""What `metrics.json` of a finished run holds at least."""


def test_what_a_removal_that_was_cut_off_left_is_taken_for_no_run(make_config: Any) -> None:
    config = make_config()
    prepared, adapter = (
        prepare.prepare(config),
        f"{config.run_dir}/adapter/adapter_model.safetensors",
    )
    for after in itertools.count():
        prepare.write_inputs(prepared)
        for file in (
            adapter,
            f"{config.run_dir}/metrics.json",
            f"{config.run_dir}/inputs/finished",
        ):
            storage.write_text(file, json.dumps(METRICS))
        assert finetune.finished_metrics(config) == METRICS, "a finished run"
        if not removal_cut_off(config.run_dir, after):
            break
        assert os.path.exists(config.run_dir)
        assert after == 0 or not os.path.exists(f"{config.run_dir}/inputs/finished"), (
            "it cannot be published"
        )
        again = config.changed({"learning_rate": 0.5, "overwrite": after % 2 == 0})
        assert finetune.finished_metrics(again) is None and not os.path.exists(config.run_dir)
    assert after > 3 and not os.path.exists(config.run_dir)


def test_overwriting_a_run_that_was_killed_ends_it_in_mlflow(
    make_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.tracking import MlflowClient

    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    config = make_config(
        **{"train.max_steps": 1, "tracking.enabled": True, "tracking.uri": uri, "evaluate.limit": 1}
    )
    with monkeypatch.context() as killed, pytest.raises(KeyboardInterrupt):
        killed.setattr(train, "fit", stopped)
        killed.setattr(
            tracking.Run, "end", lambda *_: None
        )  # a process that is killed says nothing any more
        finetune.run(config)
    (left,) = MlflowClient(uri).search_runs(["1"])
    assert left.info.status == "RUNNING"
    finetune.run(config.changed({"overwrite": True}))
    status = {run.info.run_id: run.info.status for run in MlflowClient(uri).search_runs(["1"])}
    assert status.pop(left.info.run_id) == "KILLED" and list(status.values()) == ["FINISHED"]


def stopped(*_: Any) -> None:
    raise KeyboardInterrupt


def test_a_finished_run_is_not_shown_as_if_it_were_scored_otherwise(make_config: Any) -> None:
    config = make_config(**{"train.max_steps": 1})
    finetune.run(config)
    for changes, message in (
        (
            {"evaluate.semantics": "bird"},
            r"evaluate.semantics 'spider' there, 'bird' here\); score its adapter anew",
        ),
        ({"evaluate.limit": 2}, "evaluate.limit 4 there, 2 here"),
        ({"prev_checkpoint": "checkpoint-9"}, "prev_checkpoint None there, 'checkpoint-9' here"),
    ):
        with pytest.raises(ConfigError, match=message):
            finetune.run(config.changed(changes))


def test_a_model_folder_is_no_run_to_overwrite(make_config: Any, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "out" / "run")
    with pytest.raises(
        ConfigError, match=r"config\.json is of no run of this version of ray_sql; choose another"
    ):
        finetune.run(make_config(model_name=str(folder), overwrite=True))
    assert (folder / "model.safetensors").is_file()


def test_settings_that_the_libraries_refuse_are_one_line(make_config: Any) -> None:
    for changes, message in (
        (
            {"lora.target_modules": ["q_pro"]},
            "training cannot begin: .*q_pro.*; see --train.optim and --lora.target_modules",
        ),
        ({"train.optim": "adamww"}, "training cannot begin: .*adamww"),
    ):
        with pytest.raises(ModelError, match=message):
            finetune.run(make_config(overwrite=True, **{"train.max_steps": 1} | changes))


def test_a_model_is_not_trained_or_asked_beyond_its_window(
    make_config: Any, tmp_path: Path
) -> None:
    folder = make_model(tmp_path / "model")
    given = {"model_name": str(folder), "train.max_steps": 1, "evaluate.max_new_tokens": 1000}
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"max_position_embeddings": 900}))
    with pytest.raises(
        ModelError, match="reads up to 900 tokens, but a prompt and its answer have 1,"
    ):
        finetune.run(make_config(**given))
    (folder / "config.json").write_text(json.dumps(settings | {"max_position_embeddings": 64}))
    with pytest.raises(
        ModelError, match=r"reads up to 64 tokens, but an example has \d+: lower --rows.max_length"
    ):
        finetune.run(make_config(**given))


def test_a_folder_that_is_no_run_is_never_removed(make_config: Any) -> None:
    config = make_config(overwrite=True)
    Path(config.run_dir).mkdir(parents=True)
    (Path(config.run_dir) / "thesis.tex").write_text("years of work")
    with pytest.raises(StoreError, match="no run of ray_sql"):
        finetune.run(config)
    assert (Path(config.run_dir) / "thesis.tex").exists()


@pytest.mark.slow
@pytest.mark.cluster
def test_memory_that_is_full_on_one_rank_is_said_and_not_tried_again(
    make_config: Any, tmp_path: Path, ray_local: None
) -> None:
    def full_on_rank_0(tried: str, driver: cluster.DriverLink) -> None:
        """The other rank hears of it by a lost connection.

        It is a function in a function, so that its code goes to the workers.
        """
        import time

        import ray.train

        rank = ray.train.get_context().get_world_rank()
        with open(tried, "a") as stream:
            stream.write(f"{rank}\n")
        if rank:
            time.sleep(5)  # the connection is lost once rank 0 has ended
        while "1" not in Path(tried).read_text():
            time.sleep(0.1)
        raise RuntimeError(
            "connection reset by peer" if rank else "CUDA out of memory. Tried to allocate 2.00 GiB"
        )

    config = make_config(**{"scaling.num_workers": 2, "scaling.max_failures": 5})
    with pytest.raises(
        TrainingError,
        match=r"worker 0 is out of memory: .*Tried to allocate 2.00 GiB; lower --eval_batch",
    ) as caught:
        cluster.run_workers(
            full_on_rank_0, str(tmp_path / "tried"), config.scaling, config.run_dir, lambda _: None
        )
    assert out_of_memory(caught.value)
    assert sorted((tmp_path / "tried").read_text().split()) == ["0", "1"]


@pytest.fixture
def ray_with_little_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A Ray of the test's own that kills workers once this machine's memory grows by 2 GiB."""
    import ray

    memory = psutil.virtual_memory()
    most = (memory.total - memory.available + 2 * 2**30) / memory.total
    monkeypatch.setenv("RAY_memory_usage_threshold", str(most))
    ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level="ERROR")
    yield
    ray.shutdown()


@pytest.mark.slow
@pytest.mark.cluster
def test_a_worker_that_ray_kills_for_its_memory_leaves_its_cores_to_the_next(
    make_config: Any, ray_with_little_memory: None
) -> None:
    def fill(pages: int, driver: cluster.DriverLink) -> str:
        """As a function in a function, its code goes to the workers."""

        held = []
        for _ in range(pages):
            held.append(bytearray(b"x") * 2**26)
            time.sleep(0.1)  # Ray looks every quarter of a second
        return "fits"

    cores = {"scaling.resources_per_worker": {"CPU": 2}}  # all there are
    config = make_config(**{"scaling.num_workers": 1, **cores})
    with pytest.raises(OutOfMemory, match="low on memory"):
        cluster.run_workers(fill, 160, config.scaling, config.run_dir, lambda _: None)
    assert cluster.run_workers(fill, 1, config.scaling, config.run_dir, lambda _: None) == "fits"


@pytest.mark.slow
@pytest.mark.cluster
def test_what_one_rank_lacks_ends_the_run_with_its_reason(
    make_config: Any, ray_local: None
) -> None:
    def loads_on_rank_0_alone(job: None, driver: cluster.DriverLink) -> None:
        """As a function in a function, its code goes to the workers."""
        import ray.train

        from ray_sql.cluster.ranks import agreed
        from ray_sql.errors import ModelError

        def load() -> None:
            if ray.train.get_context().get_world_rank() == 1:
                raise ModelError("the model is not on this node")

        agreed(load)

    config = make_config(**{"scaling.num_workers": 2})
    with pytest.raises(ModelError, match="the model is not on this node"):
        cluster.run_workers(
            loads_on_rank_0_alone, None, config.scaling, config.run_dir, lambda _: None
        )
