"""Which checkpoint a run goes on from, and whether it may."""

from __future__ import annotations

import json
import tempfile
import uuid
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ray_sql.cluster.events import Note, OnEvent, Resumed
from ray_sql.cluster.ranks import agreed, gather_all
from ray_sql.config import Config
from ray_sql.data import prompts
from ray_sql.errors import ModelError, TakenOver
from ray_sql.store import checkpoints, storage
from ray_sql.store.checkpoints import Checkpoint
from ray_sql.store.run_folder import RunFolder

LOGGED = ("loss", "grad_norm", "learning_rate")


def claim_run(folder: RunFolder) -> str:
    """Make this driver the one that the run belongs to, and return its name; workers of one before end at their next checkpoint."""
    name = uuid.uuid4().hex
    folder.write_driver(name)
    return name


def check_owned(folder: RunFolder, driver: str | None) -> None:
    """Raise `TakenOver` if the run was taken over by another driver: two would write, and prune, the same checkpoints."""
    if folder.read_driver() != driver:
        raise TakenOver(
            f"{folder} was taken over by the same command given again, which goes on with it; this one ends without saving"
        )


def starting_point(
    config: Config, contract: Mapping[str, Any], steps: int | None = None
) -> str | None:
    """The checkpoint that `prev_checkpoint` names, as a URI, after checking that it continues into this run (of so many steps, where
    they are known); changes nothing.

    Raises `ModelError` if it is missing, incomplete, at the end already, or of another LoRA rank, `ContractError` if of another base
    model or prompt.
    """
    if config.prev_checkpoint is None:
        return None
    name, run = config.prev_checkpoint, RunFolder(config.run_dir)
    own = "/" not in name and not Path(name).is_dir()
    uri = run.place(name) if own else storage.absolute_uri(name)
    if run.read_start() == uri:
        return uri  # this run did start there, and goes on from wherever it has come to
    if (found := checkpoints.read(uri)) is None:
        have = [checkpoint.name for checkpoint in checkpoints.complete(run)]
        raise ModelError(
            f"--prev_checkpoint {name}: no complete checkpoint at {uri}; this run has {', '.join(have) or 'none'}"
        )
    if steps is not None and found.step >= steps:
        raise ModelError(
            f"--prev_checkpoint {name}: is at step {found.step}, and this run ends at step {steps}: nothing is left to train; raise "
            "--num_epochs or --train.max_steps"
        )
    with tempfile.TemporaryDirectory() as scratch:
        folder = storage.fetch(uri, Path(scratch))
        _check_intact(uri, folder, name)
        check_resumable(folder, contract, config, name)
    return uri


def _check_intact(uri: str, folder: Path, name: str) -> None:
    if wrong := _wrong(uri, folder):
        raise ModelError(
            f"--prev_checkpoint {name}: is damaged ({wrong} is not as it was saved); give another one"
        )


def check_resumable(
    checkpoint: Path, contract: Mapping[str, Any], config: Config, name: str
) -> None:
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


def rewind(config: Config, start_from: str) -> None:
    """Remove this run's checkpoints from after `start_from`, once: the same command given again goes on, it does not go back."""
    folder = RunFolder(config.run_dir)
    if folder.read_start() == start_from:
        return
    found = checkpoints.read(start_from)
    for checkpoint in checkpoints.complete(folder):
        if found and checkpoint.step > found.step:
            storage.remove(checkpoint.uri)
    folder.write_start(start_from)


def resume(
    config: Config, start_from: str | None, scratch: Path, emit: OnEvent
) -> tuple[Path | None, Checkpoint | None]:
    """The newest checkpoint of this run that is complete and not damaged, else the one the user named, as a local folder, the same one
    on all ranks; and what is known of it where it is this run's."""
    import ray.train

    first = ray.train.get_context().get_world_rank() == 0
    while True:
        found = checkpoints.complete(RunFolder(config.run_dir)) if first else []
        own = gather_all(found[-1] if found else None)[0]
        uri = own.uri if own else start_from
        if uri is None:
            return None, None
        folder = storage.fetch(uri, scratch / "resume" / Path(uri).name)
        if own is None:
            agreed(partial(_check_intact, uri, folder, uri))
            return folder, None
        wrong = next((each for each in gather_all(_wrong(uri, folder)) if each), None)
        if wrong is None:
            if first:
                emit(Resumed(own.step, _curve(folder, found)))
            return folder, own
        if first:
            set_aside_damaged(uri, wrong, lambda text: emit(Note(text)))


def set_aside_damaged(uri: str, wrong: str, say: Callable[[str], object]) -> None:
    """Pass over a checkpoint from now on, and say so."""
    checkpoints.set_aside(uri)
    say(
        f"{Path(uri).name} is damaged ({wrong} is not as it was saved): set aside for the one before"
    )


def _wrong(uri: str, folder: Path) -> str | None:
    """A file of a checkpoint that is damaged in storage: what came wrong over the network comes right the second time."""
    return checkpoints.damaged(folder) and checkpoints.damaged(storage.fetch(uri, folder))


def _curve(newest: Path, found: Sequence[Checkpoint]) -> list[tuple[int, Mapping[str, float]]]:
    """(step, values) of all that was logged and measured up to the newest checkpoint: a driver that was killed may have taken some of
    it with it."""
    entries = json.loads((newest / "trainer_state.json").read_text())["log_history"]
    logged = [
        (entry["step"], {name: entry[name] for name in LOGGED if name in entry})
        for entry in entries
    ]
    return [*logged, *((one.step, one.metrics) for one in found if one.metrics)]


def needs_validation(last: Checkpoint, config: Config, examples: int) -> bool:
    """Whether a checkpoint should have been measured, and the run was cut off before."""
    asked = bool(storage.read_text(RunFolder(config.run_dir).validation_questions))
    return asked and not last.metrics and config.measured(last.step, examples)
