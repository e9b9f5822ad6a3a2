"""Train an adapter on N workers: Ray Train around `trainer`, checkpoints, restarts, and the choice of the best checkpoint.

`fit` runs on the driver, `train_loop_per_worker` on every worker. They meet in the run's folder: rows and validation questions
lie there before workers start, checkpoints appear there while they run, and a restarted worker group goes on from the
newest complete one, with as many workers as there are then. At `evaluate.eval_steps` a checkpoint is saved, then the validation
questions are answered by all ranks and judged on rank 0; where a run was cut off in between, it goes on with that. Ray's
`ValidationConfig` would do that in a task of its own beside training; it is not used because its verdicts go to Ray's own checkpoint
manager (see `checkpoints` for why that is not ours), a crash would leave checkpoints that nobody measured, and each task loads the base
model anew on a device of its own, where here every rank has it loaded.
"""

from __future__ import annotations

import gc
import json
import logging
import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_sql import checkpoints, cluster, evaluate, generate, models, prompts, rows
from ray_sql.checkpoints import Checkpoint
from ray_sql.config import Config
from ray_sql.errors import ModelError, RaySqlError, TrainingError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

START_FILE = "inputs/start"
"""Which checkpoint the run was told to go on from, once it has been done."""
HALVINGS_FILE = "inputs/halvings"
"""How often this run had to halve its forward passes to find memory: no setting, for the adapter is the same."""
ASKING = 100
"""Training takes so many times as long as asking whether to save at once ..."""
SECONDS_UNASKED = 5.0
"""... unless that is longer ago than this. Ray itself looks every five seconds for nodes that are to be taken away."""
GAUGES = {"loss": "Training loss", "examples_per_second": "Examples trained on, all workers together"}
"""Points that Ray shows too, as `ray_sql_<name>`: Ray puts `ray_` before every metric."""
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
LOGGED = ("loss", "grad_norm", "learning_rate")


@dataclass(frozen=True)
class FitResult:
    """A finished training run: its last step and its best checkpoint, whose adapter lies in `<run_dir>/adapter`."""

    steps: int
    best: Checkpoint
    seconds: float


def fit(config: Config, model_folder: str, on_point: cluster.OnPoint, decides: bool = False) -> FitResult:
    """Train on the inputs in `config.run_dir`, going on from its newest checkpoint if there is one.

    Where `on_point` `decides`, it is asked at every checkpoint, and False ends training there. A run that is out of memory goes on from
    its last checkpoint with half as many examples in a forward pass, and twice as many passes, as often as they can be halved. Raises
    `TrainingError` where the loss diverges or the workers cannot be kept alive, `ModelError` for a wrong checkpoint.
    """
    started = time.monotonic()
    run_dir = config.run_dir
    start_from = starting_point(config, json.loads(checkpoints.read_text(f"{run_dir}/contract.json") or "{}"))
    if start_from:
        _rewind(config, start_from)
    plan = {"config": config.for_workers(), "model_folder": model_folder, "start_from": start_from}
    halvings = int(checkpoints.read_text(f"{run_dir}/{HALVINGS_FILE}") or 0)
    try:
        while (outcome := _attempt({**plan, "halvings": halvings}, config, on_point, decides)) is None:
            halvings += 1
            most = rows.per_pass(config, halvings)
            checkpoints.write_text(f"{run_dir}/{HALVINGS_FILE}", str(halvings))
            _noting(on_point)(
                f"out of memory: on from the last checkpoint with up to {most} examples in a forward pass, not {2 * most}, and more "
                "passes in a step"
            )
            free_memory()
    except (KeyboardInterrupt, SystemExit):
        done = checkpoints.complete(run_dir)
        kept = (
            f"{Path(done[-1].uri).name} is saved: the same command goes on from there" if done else "no checkpoint yet"
        )
        _noting(on_point)(f"stopped; {kept}")
        raise
    if outcome["failure"]:
        raise TrainingError(outcome["failure"])
    return FitResult(outcome["step"], keep_best(run_dir, _noting(on_point)), time.monotonic() - started)


def _attempt(
    plan: Mapping[str, Any], config: Config, on_point: cluster.OnPoint, decides: bool
) -> dict[str, Any] | None:
    """What rank 0 returned; None where memory was full and forward passes can be halved once more."""
    try:
        return cluster.run_workers(train_loop_per_worker, plan, config, on_point, config.run_dir, decides, resizes=True)
    except Exception as error:  # in this process it is torch's own, from workers a TrainingError
        if not cluster.out_of_memory(error) or rows.per_pass(config, plan["halvings"]) == 1:
            raise
        return None


def free_memory() -> None:
    """Give back what a failed attempt held in this process."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _noting(on_point: cluster.OnPoint) -> Callable[[str], object]:
    return lambda text: on_point({"kind": "note", "text": text})


def keep_best(run_dir: str, say: Callable[[str], object] = log.warning) -> Checkpoint:
    """Copy the adapter of a run's best checkpoint that is not damaged to `<run_dir>/adapter`; returns that checkpoint."""
    while (best := checkpoints.best(checkpoints.complete(run_dir))) is not None:
        with tempfile.TemporaryDirectory() as scratch:
            folder = checkpoints.fetch(best.uri, Path(scratch) / "best")
            if wrong := checkpoints.damaged(folder):
                _set_aside(best.uri, wrong, say)
                continue
            for file in folder.iterdir():
                if file.name not in ADAPTER_FILES:
                    file.unlink()
            for name in ("config.json", "contract.json"):  # an adapter carries its recipe wherever it is copied to
                checkpoints.fetch_file(f"{run_dir}/{name}", folder / name)
            checkpoints.put(folder, f"{run_dir}/adapter")
        return best
    raise TrainingError(f"{run_dir}: training ended without a complete checkpoint")


def _set_aside(uri: str, wrong: str, say: Callable[[str], object]) -> None:
    checkpoints.set_aside(uri)
    say(f"{Path(uri).name} is damaged ({wrong} is not as it was saved): set aside for the one before")


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
        folder = checkpoints.fetch(uri, Path(scratch))
        _check_intact(folder, name)
        check_resumable(folder, contract, config, name)
    return uri


def _check_intact(checkpoint: Path, name: str) -> None:
    if wrong := checkpoints.damaged(checkpoint):
        raise ModelError(f"--prev_checkpoint {name}: is damaged ({wrong} is not as it was saved); give another one")


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
    if config.elastic and context.get_world_rank() == 0:
        bounds = f"{config.fewest_workers} to {config.workers}"
        plan["emit"]({"kind": "note", "text": f"training with {context.get_world_size()} of {bounds} workers"})
    mark("imports of the training stack")
    folder = models.here(plan["model_folder"], config)
    base = models.load_base(folder, config, cluster.claim_device(config))
    tokenizer = models.load_tokenizer(folder)
    mark("model")
    with tempfile.TemporaryDirectory(prefix="ray_sql-") as scratch:
        local = Path(scratch)
        data = rows.read(checkpoints.fetch_file(f"{config.run_dir}/{rows.FILE}", local / "rows.parquet"))
        resume_from, done = _resume(config, plan["start_from"], local, plan["emit"])
        owed = done is not None and _owed(done, config, len(data))
        step, steps = done.step if done else 0, config.steps(len(data))
        notice = _Notice(plan["stopping"])
        if (step >= steps and not owed) or notice.told_to_stop():  # else only what follows training was cut off
            return asdict(trainer.Outcome(step, steps, None))
        together = _together(base, data, config, plan["emit"])
        judge = _Validation(config, tokenizer, together, local)
        mark("shared rows tried")
        reporter = _Reporter(config, judge, notice, plan["emit"], data, context.get_world_rank())
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
            halvings=plan["halvings"],
            on_step=notice,
            on_begin=reporter.measure if owed else None,
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


def _resume(
    config: Config, start_from: str | None, scratch: Path, emit: cluster.OnPoint
) -> tuple[Path | None, Checkpoint | None]:
    """The newest checkpoint of this run that is complete and not damaged, else the one the user named, as a local folder, the same one
    on all ranks; and what is known of it where it is this run's."""
    import ray.train

    first = ray.train.get_context().get_world_rank() == 0
    while True:
        found = checkpoints.complete(config.run_dir) if first else []
        own = generate.gather_all(found[-1] if found else None)[0]
        uri = own.uri if own else start_from
        if uri is None:
            return None, None
        folder = checkpoints.fetch(uri, scratch / "resume" / Path(uri).name)
        if own is None:
            _check_intact(folder, uri)
            return folder, None
        wrong = next((each for each in generate.gather_all(checkpoints.damaged(folder)) if each), None)
        if wrong is None:
            if first:
                emit({"kind": "curve", "points": _curve(folder)})
            return folder, own
        if first:
            _set_aside(uri, wrong, _noting(emit))


def _curve(checkpoint: Path) -> list[tuple[int, dict[str, float]]]:
    """(step, values) of all that was logged up to a checkpoint: a driver that was killed may have taken some of it with it."""
    entries = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    return [(entry["step"], {name: entry[name] for name in LOGGED if name in entry}) for entry in entries]


def _owed(last: Checkpoint, config: Config, examples: int) -> bool:
    """Whether a checkpoint should have been measured, and the run was cut off before."""
    asked = bool(checkpoints.read_text(f"{config.run_dir}/{generate.VALIDATION_FILE}"))
    return asked and not last.metrics and config.measured(last.step, examples)


class _Notice:
    """Whether to save now, before the next `save_steps`: the driver was told to stop, or Ray takes away a node that a rank is on.

    All ranks learn of it after the same step. They ask each other as often as costs a hundredth of training, but every few seconds.
    """

    def __init__(self, stopping: Callable[[], bool]) -> None:
        self.stops = False
        self._stopping = stopping
        self._leaving: set[str] = set()
        self._next = 0
        self._asked: tuple[int, float, float] | None = None

    def told_to_stop(self) -> bool:
        """What rank 0 sees, on all ranks."""
        return bool(generate.gather_all(self._stopping())[0])

    def __call__(self, step: int) -> bool:
        """Whether all ranks are to save after this step."""
        import ray.train

        if step < self._next:
            return False
        began = time.monotonic()
        info = ray.train.get_preemption_info()
        self.stops, self._next = generate.gather_all((self._stopping(), step + self._pace(step, began)))[0]
        self._asked = (step, began, time.monotonic() - began)
        new = (set(info.preempted_node_ids) if info else set()) - self._leaving
        self._leaving |= new
        return self.stops or bool(new)

    def _pace(self, step: int, now: float) -> int:
        """After how many steps to ask again."""
        if self._asked is None:
            return 1
        before, then, took = self._asked
        each = max((now - then) / (step - before), 1e-6)
        return max(1, min(math.ceil(ASKING * took / each), int(SECONDS_UNASKED / each)))


class _Reporter:
    """What happens at a log and at a save: points to the driver, validation, the checkpoint to storage."""

    def __init__(
        self,
        config: Config,
        judge: _Validation,
        notice: _Notice,
        emit: cluster.OnPoint,
        data: Sequence[rows.Row],
        rank: int,
    ) -> None:
        self._config, self._judge, self._notice, self._emit, self._rank = config, judge, notice, emit, rank
        self._examples = len(data)
        self._tokens = sum(len(row.input_ids) for row in data) / len(data)
        self._last: tuple[int, float] | None = None
        self._gauges = _gauges(config) if rank == 0 else {}

    def on_log(self, step: int, steps: int, values: dict[str, float]) -> None:
        now = time.monotonic()
        kept: dict[str, float] = {
            name: value for name, value in values.items() if name in LOGGED or name.startswith(("time/", "memory/"))
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
        self._together(lambda: self._save(step, folder))  # first: it must be complete before anything that takes long
        go_on = self.measure(step, model)
        ray.train.report({"step": step})  # a barrier: no rank trains on before the checkpoint is safe
        if self._last is not None:  # time spent here is not training time
            self._last = (self._last[0], self._last[1] + time.monotonic() - started)
        return go_on and not self._notice.stops

    def measure(self, step: int, model: PreTrainedModel) -> bool:
        """Add to this step's checkpoint what it is measured at, if it is to be and there is time, and say that it is there; False on
        all ranks if training should stop."""
        return self._together(lambda: self._measure(step, model))

    def _together(self, part: Callable[[], bool]) -> bool:
        """Whether all ranks' parts are for going on. A rank that leaves alone would let the others wait for it forever."""
        problem, go_on = "", True
        try:
            go_on = part()
        except RaySqlError as error:
            problem = str(error)
        said = generate.gather_all((problem, go_on))
        if problems := [text for text, _ in said if text]:
            raise TrainingError(problems[0])
        return all(each for _, each in said)

    def _save(self, step: int, folder: Path) -> bool:
        if self._rank == 0:
            checkpoints.fetch_file(f"{self._config.run_dir}/contract.json", folder / "contract.json")
            checkpoints.save(folder, self._config.run_dir, step, {})
        return True

    def _measure(self, step: int, model: PreTrainedModel) -> bool:
        """Whether to go on after this checkpoint, as far as this rank knows."""
        wanted = self._config.measured(step, self._examples) and not self._notice.stops
        judged = self._judge(model) if wanted else None
        if self._rank != 0:
            return True
        if judged:
            checkpoints.score(f"{self._config.run_dir}/checkpoint-{step}", judged)
        scores = judged or {"objective": None, "tie_break": None, "metrics": {}}
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
