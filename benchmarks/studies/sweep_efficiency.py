"""Compare a sweep's cost and choice with the full grid of the same points, trained to the end.

    python -m benchmarks.studies.sweep_efficiency out/sweep-efficiency

With --quick it has one seed and fewer trials.

A Llama of two layers and random weights learns the demo's answers through LoRA, with the project's
own training; its tokenizer is trained on the demo's questions. The grid is every learning rate with
every rank, each trained to the end in this process. It is trained once and kept in the folder. The
sweep is `tune.run` over the same points, which it draws with TPE and stops with ASHA. It chooses by
the loss on the validation examples: a model so small writes no SQL that runs.

The sweep's choice and every point of the grid are scored on examples that no trial saw (the demo's
`seen` split), by the share of the answers' tokens that the model predicts. Every seed has a split,
a model, a grid and a sweep of its own.

The last line is one JSON object, with means over the seeds. `share_of_passes` is the number of
examples that the sweep's trials passed over that of the grid. `points_below_grid_best` is the
distance in points from the sweep's choice to the best of the grid in that score.
"""

from __future__ import annotations

import argparse
import json
import logging
from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks import make_encoder
from ray_sql import data, models, train, tune
from ray_sql.config import Config, SweepConfig, load
from ray_sql.finetune import prepare
from ray_sql.store import storage
from ray_sql.store.run_folder import RunFolder
from ray_sql.tune import study

RATES = [3e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1]
RANKS = [4, 8, 16, 32, 64]
SEEDS = (1, 2, 3)
SETTINGS: dict[str, Any] = {
    "task_type": "sql",
    "dataset_id": "demo",
    "split": ["seen"],
    "data.split_by": "question",
    "data.validation_fraction": 0.1,
    "prompt.serializer": "compact",
    "rows.max_length": 1024,
    "rows.row_length": 1024,
    "data.limit": 320,
    "learning_rate": 1e-3,
    "lora.r": 64,
    "lora.lora_alpha": 128,
    "lora.lora_dropout": 0.0,
    "quantization.load_in_4bit": False,
    "train.bf16": False,
    "train.max_steps": 40,
    "train.logging_steps": 1,  # of a trial that fails, its steps up to there count as passes
    "save_steps": 4,
    "scaling.num_workers": 0,
    "evaluate.limit": 1,
    "evaluate.max_new_tokens": 1,
    "evaluate.baseline": False,
    "evaluate.select_examples": 32,
    "tracking.enabled": False,
    "tune.objective": "eval_loss",
    "tune.num_samples": 16,
    "tune.space": {"learning_rate": {"choice": RATES}, "lora.r": {"choice": RANKS}},
}


def main(argv: list[str] | None = None) -> None:
    """Train grid and sweep of every seed, and print the comparison."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where models, grids and sweeps are kept")
    parser.add_argument("--quick", action="store_true", help="one seed, every other rate and rank")
    arguments = parser.parse_args(argv)
    logging.disable(logging.WARNING)
    rates, ranks = (RATES[1::2], RANKS[::2]) if arguments.quick else (RATES, RANKS)
    found = [
        one(arguments.folder.resolve(), seed, rates, ranks)
        for seed in (SEEDS[:1] if arguments.quick else SEEDS)
    ]
    below = [each["points_below_grid_best"] for each in found]
    print(
        json.dumps(
            {
                "share_of_passes": round(mean(each["share_of_passes"] for each in found), 3),
                "points_below_grid_best": round(mean(below), 2),
                "by_seed": found,
            }
        )
    )


def one(folder: Path, seed: int, rates: list[float], ranks: list[int]) -> dict[str, Any]:
    """Compare one seed's grid and sweep."""
    place = folder / f"{len(rates)}x{len(ranks)}-{seed}"
    config = settings(place, seed, rates, ranks)
    prepared = prepare.prepare(config)
    grid = trained_grid(place / "grid.json", config, prepared, list(product(rates, ranks)))
    tune.run(load(SweepConfig, [], **{**config.public(), "task_type": ["sql"], "overwrite": True}))
    known = study.load(config)
    assert known is not None
    best = known.best()
    assert best is not None
    chosen = grid[key(best.point["learning_rate"], best.point["lora.r"])]
    by_loss = min(grid.values(), key=lambda point: point["loss"])
    steps = sum(trial.steps for trial in known.trials)
    scores = sorted(point["score"] for point in grid.values())
    result = {
        "seed": seed,
        "share_of_passes": round(steps / (len(grid) * config.train.max_steps), 3),
        "points_below_grid_best": round(
            scores[-1] - held_out(config, prepared, f"{config.run_dir}/adapter"), 2
        ),
        "chosen": [best.point["learning_rate"], best.point["lora.r"]],
        "chosen_in_grid": chosen["score"],
        "grid_chosen_by_loss": by_loss["score"],
        "grid_best": scores[-1],
        "grid_median": scores[len(scores) // 2],
        "stopped": sum(trial.state == "stopped" for trial in known.trials),
        "trials": len(known.trials),
    }
    print(json.dumps(result), flush=True)
    return result


def settings(place: Path, seed: int, rates: list[float], ranks: list[int]) -> Config:
    """Return the settings of a seed.

    The sweep starts at the grid's rate a third of the way up and its largest rank.
    """
    start = {
        "learning_rate": rates[len(rates) // 3],
        "lora.r": ranks[-1],
        "lora.lora_alpha": 2 * ranks[-1],
    }
    axes = {"learning_rate": {"choice": rates}, "lora.r": {"choice": ranks}}
    places = {"output_name": "sweep", "output_dir": str(place), "cache_dir": str(place / "cache")}
    model = place / "model"
    if not (model / "config.json").is_file():
        make_model(model, seed)
    return load(
        Config,
        [],
        **(
            SETTINGS | start | places | {"model_name": str(model), "seed": seed, "tune.space": axes}
        ),
    )


def make_model(folder: Path, seed: int) -> None:
    """Save a Llama of random weights, and a tokenizer of the demo's words."""
    import torch
    from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
    from tokenizers.models import BPE
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    config = load(
        Config,
        [],
        model_name="m",
        output_name="o",
        task_type="sql",
        dataset_id="demo",
        split=["seen"],
    )
    examples = data.load(config).splits["train"]
    made = Tokenizer(BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    learner = trainers.BpeTrainer(
        vocab_size=1500,
        special_tokens=["<|pad|>", "<|end|>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    made.train_from_iterator(
        [f"{example.question}\n{example.gold}" for example in examples], learner
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<|pad|>", eos_token="<|end|>")
    fast.save_pretrained(folder)
    torch.manual_seed(seed)
    shape = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    LlamaForCausalLM(
        LlamaConfig(vocab_size=len(fast), max_position_embeddings=4096, **shape)
    ).save_pretrained(folder)


def trained_grid(
    file: Path, config: Config, prepared: prepare.Prepared, points: list[tuple[float, int]]
) -> dict[str, Any]:
    """Return the loss that chooses and the held-out score of every point.

    Points that the file has are not trained again.
    """
    known: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    for number, (rate, rank) in enumerate(points):
        if key(rate, rank) in known:
            continue
        changes = {
            "learning_rate": rate,
            "lora.r": rank,
            "lora.lora_alpha": 2 * rank,
            "output_name": f"grid-{number}",
        }
        own = config.changed(changes | {"overwrite": True})
        RunFolder(own.run_dir).remove()
        prepare.write_inputs(replace(prepared, config=own))
        fitted = train.fit(own, prepared.model_folder, lambda point: None)
        known[key(rate, rank)] = {
            "loss": -(fitted.best.objective or 0.0),
            "score": held_out(own, prepared, f"{own.run_dir}/adapter"),
        }
        storage.remove(own.run_dir)
        storage.write_local_text(file, json.dumps(known, indent=1))
    return known


def key(rate: float, rank: int) -> str:
    """Return a point's name in the file."""
    return f"{rate:g} {rank}"


def held_out(config: Config, prepared: prepare.Prepared, adapter: str) -> float:
    """Return the share, in per cent, of held-out answer tokens that the adapter predicts."""
    import torch

    model = models.load_adapter(
        models.load_base(prepared.model_folder, config.quantization, config.train.bf16),
        Path(adapter),
    ).eval()
    encoder = make_encoder(prepared.tokenizer, config, prepared.corpus.schemas)
    right = total = 0
    for example in prepared.corpus.splits["seen"]:
        row = encoder.encode(example)
        ids = torch.tensor([row.input_ids])
        with torch.no_grad():
            said = model(ids).logits[0, row.prompt_length - 1 : -1].argmax(-1)
        right += int((said == ids[0, row.prompt_length :]).sum())
        total += len(said)
    return round(100 * right / total, 2)


if __name__ == "__main__":
    main()
