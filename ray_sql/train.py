"""Train an adapter on N workers: Ray Train around `trainer`, checkpoints, restarts, and the choice of the best checkpoint.

`fit` runs on the driver, `train_loop_per_worker` on every worker. They meet in the run's folder: rows and validation questions
lie there before workers start, checkpoints appear there while they run, and a restarted worker group goes on from the
newest complete one. At `evaluate.eval_steps` the validation questions are answered by all ranks and judged on rank 0, before the
checkpoint is saved with what came of it. Ray's `ValidationConfig` would do that in a task of its own beside training; it is not used
because its verdicts go to Ray's own checkpoint manager (see `checkpoints` for why that is not ours), a crash would leave checkpoints
that nobody measured, and each task loads the base model anew on a device of its own, where here every rank has it loaded.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_sql import checkpoints, cluster, evaluate, generate, models, prompts, rows
from ray_sql.checkpoints import Checkpoint
from ray_sql.config import Config
from ray_sql.errors import ModelError, RaySqlError, TrainingError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

START_FILE = "inputs/start"
"""Which checkpoint the run was told to go on from, once it has been done."""
GAUGES = {"loss": "Training loss", "examples_per_second": "Examples trained on, all workers together"}
"""Points that Ray shows too, as `ray_sql_<name>`: Ray puts `ray_` before every metric."""
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


@dataclass(frozen=True)
class FitResult:
    """A finished training run: its last step and its best checkpoint, whose adapter lies in `<run_dir>/adapter`."""

    steps: int
    best: Checkpoint
    seconds: float


def fit(config: Config, model_folder: str, on_point: cluster.OnPoint, decides: bool = False) -> FitResult:
    """Train on the inputs in `config.run_dir`, going on from its newest checkpoint if there is one.

    Where `on_point` `decides`, it is asked at every checkpoint, and False ends training there. Raises `TrainingError` where the loss
    diverges or the workers cannot be kept alive, `ModelError` for a wrong checkpoint.
    """
    started = time.monotonic()
    run_dir = config.run_dir
    start_from = starting_point(config, json.loads(checkpoints.read_text(f"{run_dir}/contract.json") or "{}"))
    if start_from:
        _rewind(config, start_from)
    plan = {"config": config.for_workers(), "model_folder": model_folder, "start_from": start_from}
    outcome = cluster.run_workers(train_loop_per_worker, plan, config, on_point, run_dir, decides)
    if outcome["failure"]:
        raise TrainingError(outcome["failure"])
    return FitResult(outcome["step"], keep_best(run_dir), time.monotonic() - started)


def keep_best(run_dir: str) -> Checkpoint:
    """Copy the adapter of a run's best checkpoint to `<run_dir>/adapter`; returns that checkpoint."""
    best = checkpoints.best(checkpoints.complete(run_dir))
    if best is None:
        raise TrainingError(f"{run_dir}: training ended without a complete checkpoint")
    with tempfile.TemporaryDirectory() as scratch:
        folder = checkpoints.fetch(best.uri, Path(scratch) / "best")
        for file in folder.iterdir():
            if file.name not in ADAPTER_FILES:
                file.unlink()
        for name in ("config.json", "contract.json"):  # an adapter carries its recipe wherever it is copied to
            checkpoints.fetch_file(f"{run_dir}/{name}", folder / name)
        checkpoints.put(folder, f"{run_dir}/adapter")
    return best


def starting_point(config: Config, contract: Mapping[str, Any], steps: int | None = None) -> str | None:
    """The checkpoint that `prev_checkpoint` names, as a URI, after checking that it continues into this run (of so many steps, where
    they are known); changes nothing.

    Raises `ModelError` if it is missing, incomplete, at the end already, or of another LoRA rank, `ContractError` if of another base
    model or prompt.
    """
    if config.prev_checkpoint is None:
        return None
    name = config.prev_checkpoint
    own = "/" not in name and not Path(name).is_dir()
    uri = f"{config.run_dir}/{name}" if own else checkpoints.absolute_uri(name)
    if checkpoints.read_text(f"{config.run_dir}/{START_FILE}") == uri:
        return uri  # this run did start there, and goes on from wherever it has come to
    if (found := checkpoints.read(uri)) is None:
        have = [Path(c.uri).name for c in checkpoints.complete(config.run_dir)]
        raise ModelError(
            f"--prev_checkpoint {name}: no complete checkpoint at {uri}; this run has {', '.join(have) or 'none'}"
        )
    if steps is not None and found.step >= steps:
        raise ModelError(
            f"--prev_checkpoint {name}: is at step {found.step}, and this run ends at step {steps}: nothing is left to train; raise "
            "--num_epochs or --train.max_steps"
        )
    with tempfile.TemporaryDirectory() as scratch:
        check_resumable(checkpoints.fetch(uri, Path(scratch)), contract, config, name)
    return uri


def check_resumable(checkpoint: Path, contract: Mapping[str, Any], config: Config, name: str) -> None:
    """Raise if the checkpoint called `name`, fetched to `checkpoint`, does not continue into this run.

    `ModelError` for another LoRA rank or other modules; `ContractError` for another base model, task or prompt.
    """
    file, signed = checkpoint / "adapter_config.json", checkpoint / "contract.json"
    if not file.is_file() or not signed.is_file():
        raise ModelError(
            f"--prev_checkpoint {name}: holds no adapter_config.json and contract.json; give a checkpoint of a run"
        )
    saved, own = json.loads(file.read_text()), config.lora.model_dump()
    for key in ("r", "lora_alpha", "use_dora", "use_rslora"):
        if saved[key] != own[key]:
            what = "LoRA rank" if key == "r" else key
            raise ModelError(
                f"--prev_checkpoint {name}: its {what} is {saved[key]}, but --lora.{key} is {own[key]}; set --lora.{key} {saved[key]}"
            )
    modules = own["target_modules"]
    if isinstance(modules, list) and set(modules) != set(saved["target_modules"]):
        raise ModelError(
            f"--prev_checkpoint {name}: it adapts {', '.join(sorted(saved['target_modules']))}, but --lora.target_modules is "
            f"{', '.join(modules)}; give it the same"
        )
    prompts.check_contract(json.loads(signed.read_text()), contract, f"--prev_checkpoint {name}")


def _rewind(config: Config, start_from: str) -> None:
    """Remove this run's checkpoints from after `start_from`, once: the same command given again goes on, it does not go back."""
    record = f"{config.run_dir}/{START_FILE}"
    if checkpoints.read_text(record) == start_from:
        return
    found = checkpoints.read(start_from)
    for checkpoint in checkpoints.complete(config.run_dir):
        if found and checkpoint.step > found.step:
            checkpoints.remove(checkpoint.uri)
    checkpoints.write_text(record, start_from)


def train_loop_per_worker(plan: dict[str, Any]) -> dict[str, Any]:
    """One worker's training run; returns its `trainer.Outcome` as a dict."""
    import ray.train

    entered = time.time()
    from ray_sql import trainer  # here: it loads the whole training stack, which the driver can do without

    config = Config(**plan["config"])
    context = ray.train.get_context()

    def mark(stage: str, at: float | None = None) -> None:
        if context.get_world_rank() == 0:
            plan["emit"](cluster.mark(stage, at))

    mark("workers", entered)
    mark("imports of the training stack")
    folder = models.here(plan["model_folder"], config)
    base = models.load_base(folder, config, cluster.claim_device(config))
    tokenizer = models.load_tokenizer(folder)
    mark("model")
    with tempfile.TemporaryDirectory(prefix="ray_sql-") as scratch:
        local = Path(scratch)
        data = rows.read(checkpoints.fetch_file(f"{config.run_dir}/{rows.FILE}", local / "rows.parquet"))
        done = checkpoints.complete(config.run_dir)
        if done and done[-1].step >= config.steps(len(data)):
            return asdict(trainer.Outcome(done[-1].step, done[-1].step, None))  # only what follows training was cut off
        resume_from = _resume(config, plan["start_from"], local)
        together = _together(base, data, config, plan["emit"])
        judge = _Validation(config, tokenizer, together, local)
        mark("shared rows tried")
        reporter = _Reporter(config, judge, plan["emit"], data, context.get_world_rank())
        outcome = trainer.train(
            base,
            tokenizer,
            data,
            config,
            together=together,
            scratch=local,
            resume_from=resume_from,
            on_log=reporter.on_log,
            on_save=reporter.on_save,
            on_note=reporter.on_note,
        )
    return asdict(outcome)


def _together(base: PreTrainedModel, data: Sequence[rows.Row], config: Config, emit: cluster.OnPoint) -> int:
    """How many questions share a row: as the settings say, where this model allows it."""
    import ray.train

    from ray_sql.rows.probe import why_not_share

    wanted = rows.together(config)
    if wanted == 1:
        return 1
    reason = why_not_share(base, max(len(row.input_ids) for row in data), rows.heaviest_pass(data, config))
    reason = next((each for each in generate.gather_all(reason) if each), None)  # all ranks must lay steps out alike
    if reason is None:
        return wanted
    if config.rows.examples_per_row != "auto":
        raise ModelError(
            f"--rows.examples_per_row {wanted}: {config.model_name} cannot share rows: {reason}; set it to 1 or auto"
        )
    if ray.train.get_context().get_world_rank() == 0:
        emit({"kind": "note", "text": f"one question a row: {reason}"})
    return 1


def _resume(config: Config, start_from: str | None, scratch: Path) -> Path | None:
    """The newest complete checkpoint of this run, else the one the user named, as a local folder."""
    own = checkpoints.complete(config.run_dir)
    uri = own[-1].uri if own else start_from
    return None if uri is None else checkpoints.fetch(uri, scratch / "resume" / Path(uri).name)


class _Reporter:
    """What happens at a log and at a save: points to the driver, validation, the checkpoint to storage."""

    def __init__(
        self, config: Config, judge: _Validation, emit: cluster.OnPoint, data: Sequence[rows.Row], rank: int
    ) -> None:
        self._config, self._judge, self._emit, self._rank = config, judge, emit, rank
        self._examples = len(data)
        self._tokens = sum(len(row.input_ids) for row in data) / len(data)
        self._last: tuple[int, float] | None = None
        self._gauges = _gauges(config) if rank == 0 else {}

    def on_log(self, step: int, steps: int, values: dict[str, float]) -> None:
        now = time.monotonic()
        kept: dict[str, float] = {
            name: value
            for name, value in values.items()
            if name in ("loss", "grad_norm", "learning_rate") or name.startswith(("time/", "memory/"))
        }
        kept["epoch"] = step / self._config.steps_per_epoch(self._examples)
        if self._last is not None and now > self._last[1]:
            per_second = (step - self._last[0]) / (now - self._last[1]) * self._config.global_batch
            # a schema that questions share counts for each of them, so that speeds with and without sharing compare
            kept |= {"examples_per_second": per_second, "tokens_per_second": per_second * self._tokens}
        self._last = (step, now)
        self._emit({"kind": "train", "step": step, "steps": steps, "values": kept})
        for name, gauge in self._gauges.items():
            if name in kept:
                gauge.set(kept[name])

    def on_note(self, text: str) -> None:
        self._emit({"kind": "note", "text": text})

    def on_save(self, step: int, folder: Path, model: PreTrainedModel) -> bool:
        import ray.train

        started = time.monotonic()
        problem, go_on = "", True
        try:
            go_on = self._save(step, folder, model)
        except RaySqlError as error:
            problem = str(error)
        # a rank that leaves alone would let the others wait for it forever
        said = generate.gather_all((problem, go_on))
        if problems := [text for text, _ in said if text]:
            raise TrainingError(problems[0])
        ray.train.report({"step": step})  # a barrier: no rank trains on before the checkpoint is safe
        if self._last is not None:  # time spent here is not training time
            self._last = (self._last[0], self._last[1] + time.monotonic() - started)
        return all(each for _, each in said)

    def _save(self, step: int, folder: Path, model: PreTrainedModel) -> bool:
        """Whether to go on after this checkpoint, as far as this rank knows."""
        judged = self._judge(model) if self._config.measured(step, self._examples) else None
        if self._rank != 0:
            return True
        checkpoints.fetch_file(f"{self._config.run_dir}/contract.json", folder / "contract.json")
        scores = judged or {"objective": None, "tie_break": None, "metrics": {}}
        checkpoints.save(folder, self._config.run_dir, step, scores)
        checkpoints.prune(self._config.run_dir)
        point = {"kind": "validation", "step": step, "values": scores["metrics"]}
        return self._emit({**point, "objective": scores["objective"], "tie_break": scores["tie_break"]}) is not False


def _gauges(config: Config) -> dict[str, Any]:
    """Metrics of Ray by our names, for its dashboard and Prometheus; none where training runs without Ray."""
    import ray
    from ray.util.metrics import Gauge

    if not ray.is_initialized():
        return {}
    made = {name: Gauge(f"sql_{name}", text, tag_keys=("run",)) for name, text in GAUGES.items()}
    for gauge in made.values():
        gauge.set_default_tags({"run": config.output_name})
    return made


class _Validation:
    """The loss on a fixed set of validation examples and, unless the loss alone chooses, their questions answered and judged; each
    rank does its share, and rank 0 has the result."""

    def __init__(self, config: Config, tokenizer: PreTrainedTokenizerBase, together: int, scratch: Path) -> None:
        self._questions = generate.parse(checkpoints.read_text(f"{config.run_dir}/{generate.VALIDATION_FILE}") or "")
        source, self._rows = f"{config.run_dir}/{rows.VALIDATION_FILE}", []
        if checkpoints.exists(source):
            self._rows = rows.read(checkpoints.fetch_file(source, scratch / "validation.parquet"))
        # nothing is timed here: the other ranks would wait, and it chooses nothing
        self._config = config.changed({"evaluate.ves_iterations": 0})
        self._tokenizer, self._together = tokenizer, together

    def __call__(self, model: PreTrainedModel) -> dict[str, Any] | None:
        """What orders the checkpoint and its metrics, on rank 0; None on other ranks, and where there is nothing to validate on."""
        if not self._questions:
            return None
        measured = {"validation/n": float(len(self._questions))}
        if self._rows:
            measured["validation/loss"] = self._loss(model)
        if self._config.tune.objective == "eval_loss":
            objective = -measured["validation/loss"] if self._rows else None
            return {"objective": objective, "tie_break": None, "metrics": measured}
        answers = generate.answer_together(model, self._tokenizer, self._questions, self._config)
        if answers is None:
            return None
        scores = evaluate.summarise(evaluate.score(self._questions, answers, self._config), self._config)
        objective, tie_break = evaluate.objective(scores)
        metrics = measured | evaluate.flat(scores, "validation")
        return {"objective": objective, "tie_break": tie_break, "metrics": metrics}

    def _loss(self, model: PreTrainedModel) -> float:
        """The mean over all ranks' answer tokens."""
        import ray.train

        from ray_sql import trainer

        context, pad = ray.train.get_context(), self._tokenizer.pad_token_id
        rank, world = context.get_world_rank(), context.get_world_size()
        parts = generate.gather_all(
            trainer.held_out_loss(model, self._rows, self._config, self._together, rank, world, pad)
        )
        return float(sum(total for total, _ in parts) / sum(labels for _, labels in parts))
