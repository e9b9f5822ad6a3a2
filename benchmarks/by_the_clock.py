"""Compare what plain TRL and this project have learnt after the same minutes of the same cores.

    RAY_SQL_SHARED=… python -m benchmarks.by_the_clock --output_dir out/by-the-clock
    (--quick: seconds in place of minutes, and a few questions)

Three ways train the same LoRA on the same questions of 12 of Spider's training databases:

    trl     TRL's own trainer, every example by itself
    plain   this project's trainer, every example by itself
    shared  this project's trainer, questions of a database in a row with their schema

A way trains at its best of a few learning rates and layouts of a step. They are chosen on six other
databases, by the loss of held-out gold answers after 2 minutes: the rate first, then the layout at
that rate. Then each way trains once, for 12 minutes at a constant rate. The adapters after 3, 6
and 12 minutes answer other questions on the training databases, and their SQL is executed.

Seconds count from the loading of the model to the end of a step, with its quantising and our check
of shared rows. An adapter is that of the last step that ended within its minutes. What is alike for
all ways does not count: imports, tokenising, and writing adapters.

A finished training or answered adapter is a file in the folder, and is not repeated. The plot is
`by_the_clock.png` there. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback

from benchmarks import make_encoder
from benchmarks.shared_rows_quality import drawn, settings
from benchmarks.studies.selection_by_execution import judged
from benchmarks.training_speed import plain_trl
from ray_sql import cluster, data, generate, models, rows
from ray_sql.config import Config
from ray_sql.display import percent
from ray_sql.generate import Question
from ray_sql.metrics import mcnemar, wilson_interval
from ray_sql.models import packed_attention
from ray_sql.rows import TokenizedExample
from ray_sql.rows.probe import why_not_share
from ray_sql.train import trainer

LABELS = {"trl": "plain TRL", "plain": "ours, plain rows", "shared": "ours, shared rows"}
SEPARATE = ((8, 8), (8, 1), (4, 4), (2, 2))
LAYOUTS = {"trl": SEPARATE, "plain": SEPARATE, "shared": ((8, 8), (8, 4), (8, 2), (4, 4))}
"""Examples of an optimizer step, and of a forward pass; of `shared`, questions of a row.

The default of `rows.examples_per_row`, `auto`, is 2 in steps of 8.
"""
CHANGES = {
    "train.lr_scheduler_type": "constant",
    "train.warmup_ratio": 0.0,
    "train.max_steps": 10_000,  # more than any way makes in its time
    "scaling.use_gpu": False,
}
STEPS = "steps.json"
"""The file of an adapter's folder that is written last."""


@dataclass(frozen=True)
class Scale:
    """Say for how long is trained, on how much, and what is tried."""

    budgets: tuple[float, ...] = (180, 360, 720)
    """Seconds after which an adapter is scored."""
    choice: float = 120
    """Seconds after which a setting is judged."""
    databases: tuple[int, int] = (12, 6)
    """Databases for the score, and others for the choice."""
    trained: int = 40
    """Questions of each that are trained on; `asked` are others."""
    asked: int = 20
    rates: tuple[float, ...] = (5e-4, 1e-3, 2e-3)
    layouts: int = 4  # of each way


QUICK = Scale((8, 16), 8, (1, 1), 16, 6, (1e-3,), 2)


@dataclass(frozen=True)
class Setting:
    """Describe a training by what is chosen for it."""

    way: str
    rate: float
    batch: int
    together: int

    @property
    def name(self) -> str:
        """Return the name of the setting's files."""
        return f"{self.way}-{self.rate:g}-{self.batch}-{self.together}"

    def __str__(self) -> str:
        row = "row" if self.way == "shared" else "pass"
        layout = f"steps of {self.batch}, {self.together} a {row}"
        return f"{LABELS[self.way]} (rate {self.rate:g}, {layout})"


@dataclass(frozen=True)
class Cell:
    """Hold the right answers after some seconds of a training, and its steps until then."""

    setting: Setting
    seconds: float
    steps: int
    right: list[bool]

    @property
    def accuracy(self) -> float:
        """Return the share of right answers."""
        return sum(self.right) / len(self.right)

    @property
    def interval(self) -> tuple[float, float]:
        """Return the 95 % Wilson interval of the accuracy."""
        found = wilson_interval(sum(self.right), len(self.right))
        return found.low, found.high

    def summary(self) -> dict[str, Any]:
        """Return what the last line says of the cell."""
        examples = self.steps * self.setting.batch
        shares = {"accuracy": self.accuracy, "interval": self.interval, "n": len(self.right)}
        return shares | {"seconds": self.seconds, "steps": self.steps, "examples": examples}


@dataclass(frozen=True)
class Part:
    """Hold rows of a few databases to train on, and other questions on them with their rows."""

    trained: list[TokenizedExample]
    held_out: list[TokenizedExample]
    asked: list[Question]


class Clock(TrainerCallback):  # type: ignore[misc]  # transformers has no types for mypy
    """Save what the last step within each budget of seconds has made; stop after the last budget.

    It begins when it is made. The seconds of saving do not count.
    """

    def __init__(
        self,
        budgets: Sequence[float],
        save: Callable[..., None],
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._left, self._save, self._now = list(budgets), save, now
        self._began = now()

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Keep the weights before the first step."""
        self._keep(given["model"], 0)

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Save the weights before this step for every budget that it went beyond."""
        ended = self._now()
        while self._left and ended - self._began > self._left[0]:
            self._save(given["model"], self._left.pop(0), *self._kept)
        if not self._left:
            control.should_training_stop = True
        self._keep(given["model"], state.global_step)
        self._began += self._now() - ended

    def _keep(self, model: Any, steps: int) -> None:
        trained = ((name, w) for name, w in model.named_parameters() if w.requires_grad)
        self._kept = steps, {name: weight.detach().clone() for name, weight in trained}


class Bench:
    """Train, choose and score; what is in the folder is not done again."""

    def __init__(self, scale: Scale, config: Config, folder: Path) -> None:
        self._scale, self._folder = scale, folder
        self._model, _ = models.resolve(config.model_name, config.cache, config.read_token)
        self.dtype = models.compute_dtype(None, self._model, config.cache, gpu=False)
        self._config = config.changed({"train.bf16": self.dtype == torch.bfloat16})
        self._require_same()
        self._tokenizer = models.load_tokenizer(self._model)
        self._scored, self._choice = self._parts()
        self.began, self._trained = time.monotonic(), 0.0

    def choose(self, way: str) -> Setting:
        """Return the best setting of a way: the best rate, then the best layout at that rate."""
        (batch, together), *others = LAYOUTS[way][: self._scale.layouts]
        rates = [Setting(way, rate, batch, together) for rate in self._scale.rates]
        best = min(rates, key=self.loss)
        layouts = (replace(best, batch=steps, together=row) for steps, row in others)
        return min([best, *layouts], key=self.loss)

    def loss(self, setting: Setting) -> float:
        """Return the mean loss of held-out answer tokens after the seconds of the choice."""
        file = self._folder / f"choice-{setting.name}.json"
        if not file.is_file():
            with tempfile.TemporaryDirectory() as scratch:
                self._train(setting, self._choice, [self._scale.choice], Path(scratch))
                (adapter,) = Path(scratch).iterdir()
                file.write_text(json.dumps(self._held_out_loss(adapter)))
            print(f"  loss {file.read_text()}", flush=True)
        return float(json.loads(file.read_text()))

    def score(self, setting: Setting) -> Iterator[Cell]:
        """Yield a training's right answers after each budget."""
        places = [self._folder / f"{setting.name}-{budget:g}s" for budget in self._scale.budgets]
        if not all((place / STEPS).is_file() for place in places):
            self._train(setting, self._scored, self._scale.budgets, self._folder)
        for place, budget in zip(places, self._scale.budgets, strict=True):
            file = place / "right.json"
            if not file.is_file():
                file.write_text(json.dumps(self._ask(place)))
            steps, right = (json.loads(each.read_text()) for each in (place / STEPS, file))
            print(f"{setting}: {sum(right)} of {len(right)} right, {budget:g} s", flush=True)
            yield Cell(setting, budget, steps, right)

    def _require_same(self) -> None:
        """Write down what the folder is for, or refuse one that is for something else."""
        whose = {name: getattr(self._config, name) for name in ("model_name", "dataset_id")}
        text = json.dumps(whose | asdict(self._scale) | {"dtype": str(self.dtype)})
        file = self._folder / "settings.json"
        if file.is_file() and file.read_text() != text:
            raise SystemExit(f"{file}: of another run than {text}; give another --output_dir")
        self._folder.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    def _parts(self) -> tuple[Part, Part]:
        """Return what is trained on and asked for the score, and for the choice."""
        config, scale = self._config, self._scale
        corpus = data.load(config)
        encoder = make_encoder(self._tokenizer, config, corpus.schemas)
        most = config.rows.max_length
        short = [e for e in corpus.splits["train"] if len(encoder.encode(e).input_ids) <= most]
        chosen = drawn(short, sum(scale.databases), scale.trained + scale.asked)

        def part(databases: list[list[data.Example]]) -> Part:
            trained = [one for each in databases for one in each[: scale.trained]]
            asked = [one for each in databases for one in each[scale.trained :]]
            questions = generate.make_questions(asked, "held-out", corpus, encoder)
            held_out, _ = rows.build(asked, encoder, config.rows)
            return Part(rows.build(trained, encoder, config.rows)[0], held_out, questions)

        return part(chosen[: scale.databases[0]]), part(chosen[scale.databases[0] :])

    def _train(self, setting: Setting, part: Part, budgets: Sequence[float], place: Path) -> None:
        """Train for the last budget's seconds, and write the adapter of each into `place`."""
        scale = self._scale
        tries = len(scale.rates) + scale.layouts - 1
        left = len(LABELS) * (tries * scale.choice + scale.budgets[-1]) - self._trained
        pace = (time.monotonic() - self.began) / (self._trained or 1)
        minutes = left * max(1, pace) / 60
        print(f"{setting}: {budgets[-1]:g} s; at most {minutes:.0f} min left", flush=True)

        def save(model: Any, budget: float, steps: int, weights: dict[str, torch.Tensor]) -> None:
            adapter = place / f"{setting.name}-{budget:g}s"
            model.save_pretrained(adapter, state_dict=weights)
            (adapter / STEPS).write_text(json.dumps(steps))
            print(f"  {steps} steps in {budget:g} s", flush=True)

        with tempfile.TemporaryDirectory() as scratch:
            clock = Clock(budgets, save)
            built = self._build(setting, part.trained, Path(scratch))
            built.remove_callback(PrinterCallback)
            built.add_callback(clock)
            built.train()
        self._trained += budgets[-1]

    def _build(self, setting: Setting, examples: list[TokenizedExample], scratch: Path) -> Any:
        """Load the model, and return the trainer of a setting."""
        shares = setting.way == "shared"
        in_pass = setting.batch if shares else setting.together
        layout = {"train_batch_size": in_pass, "grad_accum_steps": setting.batch // in_pass}
        config = self._config.changed(layout | {"learning_rate": setting.rate})
        if setting.way == "trl":
            return plain_trl(self._model, self._tokenizer, examples, config, scratch)
        base = self._load_base()
        batching = replace(config.batching, examples_per_row=setting.together if shares else 1)
        longest = max(len(example.input_ids) for example in examples)
        row = rows.longest_row(examples, batching)
        if shares and (reason := why_not_share(base, longest, row)):
            raise SystemExit(f"--model_name {config.model_name}: {reason}")
        return trainer.build(base, self._tokenizer, examples, config, batching, scratch)

    def _load_base(self) -> Any:
        given = self._config.quantization, self._config.train.bf16
        return models.load_base(self._model, *given, cache=self._config.cache)

    def _tuned(self, adapter: Path) -> Any:
        """Load an adapter over the base model, for shared rows as well."""
        base = self._load_base()
        packed_attention.install(base)
        return models.load_adapter(base, adapter)

    def _held_out_loss(self, adapter: Path) -> float:
        batching = replace(self._config.batching, examples_per_row=8)
        pad, held_out = self._tokenizer.pad_token_id, self._choice.held_out
        total, labels = trainer.held_out_loss(self._tuned(adapter), held_out, batching, 0, 1, pad)
        return total / labels

    def _ask(self, adapter: Path) -> list[bool]:
        """Return whether each question is answered rightly, without those whose gold fails."""
        answered = judged(self._tuned(adapter), self._tokenizer, self._config, self._scored.asked)
        return [row["verdict"] == "correct" for row in answered if row["verdict"] != "gold_error"]


def main(argv: list[str] | None = None) -> None:
    """Choose, train, ask, draw, and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output_dir", type=Path, default=Path("out/by-the-clock"))
    parser.add_argument("--model_name", default="demo", help="the base model")
    parser.add_argument("--dataset_id", help="Spider's folder; by default that of RAY_SQL_SHARED")
    parser.add_argument("--quick", action="store_true", help="seconds, to see that it works")
    arguments = parser.parse_args(argv)
    shared = os.environ.get("RAY_SQL_SHARED")
    if not shared and not arguments.dataset_id:
        parser.error("give --dataset_id, or RAY_SQL_SHARED with Spider in data/spider")
    source = arguments.dataset_id or f"{shared}/data/spider"
    cluster.keep_freed_memory()
    models.import_bitsandbytes()
    changes = CHANGES | {"model_name": arguments.model_name, "dataset_id": source}
    scale = QUICK if arguments.quick else Scale()
    bench = Bench(scale, settings().changed(changes), arguments.output_dir)
    chosen = {way: bench.choose(way) for way in LABELS}
    cells = {way: list(bench.score(setting)) for way, setting in chosen.items()}
    tried = sorted(arguments.output_dir.glob("choice-*.json"))
    losses = {file.stem.removeprefix("choice-"): json.loads(file.read_text()) for file in tried}
    draw(cells, arguments.output_dir / "by_the_clock.png")
    print(table(cells))
    result = {
        "accuracy": {way: [cell.summary() for cell in each] for way, each in cells.items()},
        "chosen": {way: asdict(setting) for way, setting in chosen.items()},
        "shared_against": {way: paired(cells["shared"], cells[way]) for way in ("trl", "plain")},
        "choice_losses": losses,
        "threads": torch.get_num_threads(),
        "dtype": str(bench.dtype),
        "processor": platform.processor() or platform.machine(),
        "seconds": round(time.monotonic() - bench.began),
    }
    print(json.dumps(result))


def paired(ours: Sequence[Cell], theirs: Sequence[Cell]) -> list[dict[str, Any]]:
    """Return McNemar's test of two ways after each budget, question by question."""
    found = []
    for one, other in zip(ours, theirs, strict=True):
        pairs = list(zip(one.right, other.right, strict=True))
        alone = sum(a and not b for a, b in pairs), sum(b and not a for a, b in pairs)
        found.append({"only_ours": alone[0], "only_theirs": alone[1], "p": mcnemar(*alone)})
    return found


def table(cells: Mapping[str, Sequence[Cell]]) -> str:
    """Return the table of RESULTS.md."""
    columns = [f"{cell.seconds:g} s" for cell in cells["shared"]]
    lines = [f"| way, at its best | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for each in cells.values():
        shares = [percent(cell.accuracy, cell.interval) for cell in each]
        lines.append(f"| {each[0].setting} | {' | '.join(shares)} |")
    return "\n".join(lines)


def draw(cells: Mapping[str, Sequence[Cell]], file: Path) -> None:
    """Draw execution accuracy against minutes, with intervals."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    for place, (way, each) in enumerate(cells.items()):
        below = [100 * (cell.accuracy - cell.interval[0]) for cell in each]
        above = [100 * (cell.interval[1] - cell.accuracy) for cell in each]
        beside = [cell.seconds / 60 * (0.99 + 0.01 * place) for cell in each]
        shares = [100 * cell.accuracy for cell in each]
        axes.errorbar(beside, shares, [below, above], marker="o", capsize=3, label=LABELS[way])
    minutes = [cell.seconds / 60 for cell in cells["shared"]]
    axes.set_xticks(minutes, [f"{one:.3g}" for one in minutes])
    cores = torch.get_num_threads()
    axes.set(xlim=(0, None), ylim=(0, None), xlabel=f"minutes of training on {cores} cores")
    axes.set_ylabel("execution accuracy, % [95 % interval]")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=160)


if __name__ == "__main__":
    main()
