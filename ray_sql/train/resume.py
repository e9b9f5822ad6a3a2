"""Which checkpoint a run goes on from, and whether it may."""

from __future__ import annotations

import tempfile
import uuid
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ray_sql.cluster.events import Note, OnEvent, Resumed
from ray_sql.cluster.ranks import agreed, gather_all, rank
from ray_sql.config.files import read_json
from ray_sql.config.sections import LoraSection
from ray_sql.data.contract import check_contract
from ray_sql.errors import ModelError, TakenOver
from ray_sql.store import checkpoints, storage
from ray_sql.store.checkpoints import Checkpoint
from ray_sql.store.run_folder import AdapterFolder, RunFolder
from ray_sql.store.shapes import TrainerState

LOGGED = ("loss", "grad_norm", "learning_rate")


def claim_run(folder: RunFolder) -> str:
    """Make this driver the one that the run belongs to, and return its name.

    The workers of an earlier driver end at their next checkpoint.
    """
    name = uuid.uuid4().hex
    folder.write_driver(name)
    return name


def check_owned(folder: RunFolder, driver: str | None) -> None:
    """Raise `TakenOver` if another driver has claimed the run.

    Two drivers would write, and prune, the same checkpoints.
    """
    if folder.read_driver() != driver:
        raise TakenOver(
            f"{folder} was taken over by the same command given again, which goes on with it; this "
            "one ends without saving"
        )


def starting_point(
    name: str | None,
    folder: RunFolder,
    contract: Mapping[str, Any],
    lora: LoraSection,
    steps: int | None = None,
) -> str | None:
    """Return the URI of the checkpoint that `prev_checkpoint` names, checked; change nothing.

    The checkpoint must continue into a run with this contract, adapter and, where they are known,
    optimizer steps. Raises `ModelError` if it is missing, incomplete, damaged, at the end already,
    or of another LoRA rank. Raises `ContractError` if it is of another base model or prompt.
    """
    if name is None:
        return None
    flag = f"--prev_checkpoint {name}"
    own = "/" not in name and not Path(name).is_dir()
    uri = folder.place(name) if own else storage.absolute_uri(name)
    if folder.read_start() == _named_in(folder, uri):
        return uri  # this run did start there, and goes on from wherever it has come to
    checkpoint = checkpoints.read(uri)
    if checkpoint is None:
        names = ", ".join(saved.name for saved in checkpoints.complete(folder)) or "none"
        raise ModelError(f"{flag}: no complete checkpoint at {uri}; this run has {names}")
    if steps is not None and checkpoint.step >= steps:
        raise ModelError(
            f"{flag}: is at step {checkpoint.step}, and this run ends at step {steps}: nothing is "
            "left to train; raise --num_epochs or --train.max_steps"
        )
    with tempfile.TemporaryDirectory() as scratch:
        local = storage.fetch(uri, Path(scratch))
        _check_intact(uri, local, name)
        _check_resumable(local, contract, lora, name)
    return uri


def _check_intact(uri: str, local: Path, name: str) -> None:
    damaged = _damaged_in_store(uri, local)
    if damaged:
        raise ModelError(
            f"--prev_checkpoint {name}: is damaged ({damaged} is not as it was saved); give another"
            " one"
        )


def _check_resumable(
    checkpoint: Path, contract: Mapping[str, Any], lora: LoraSection, name: str
) -> None:
    """Raise if the checkpoint called `name`, fetched to `checkpoint`, does not fit this run.

    `ModelError` for another LoRA rank or other modules; `ContractError` for another base model,
    task or prompt.
    """
    flag = f"--prev_checkpoint {name}"
    folder = AdapterFolder(str(checkpoint))
    saved, signed = folder.read_adapter_config(), folder.read_contract()
    if saved is None or signed is None:
        raise ModelError(
            f"{flag}: holds no adapter_config.json and contract.json; give a checkpoint of a run"
        )
    own = lora.model_dump()
    for key in ("r", "lora_alpha", "use_dora", "use_rslora"):
        if saved[key] != own[key]:
            label = "LoRA rank" if key == "r" else key
            raise ModelError(
                f"{flag}: its {label} is {saved[key]}, but --lora.{key} is {own[key]}; set "
                f"--lora.{key} {saved[key]}"
            )
    modules = own["target_modules"]
    if isinstance(modules, list) and set(modules) != set(saved["target_modules"]):
        raise ModelError(
            f"{flag}: it adapts {', '.join(sorted(saved['target_modules']))}, but "
            f"--lora.target_modules is {', '.join(modules)}; give it the same"
        )
    check_contract(signed, contract, flag)


def rewind(folder: RunFolder, start_from: str) -> None:
    """Remove this run's checkpoints from after `start_from`, once.

    The same command given again goes on; it does not go back.
    """
    name = _named_in(folder, start_from)
    if folder.read_start() == name:
        return
    start = checkpoints.read(start_from)
    for checkpoint in checkpoints.complete(folder):
        if start and checkpoint.step > start.step:
            storage.remove(checkpoint.uri)
    folder.write_start(name)


def _named_in(folder: RunFolder, uri: str) -> str:
    """Return the name of a checkpoint of this run, for its folder may be moved; else the URI."""
    return uri.removeprefix(f"{folder}/")


def resume(
    folder: RunFolder, start_from: str | None, scratch: Path, emit: OnEvent
) -> tuple[Path | None, Checkpoint | None]:
    """Return the checkpoint to go on from, the same on all ranks: (local folder, its record).

    It is the newest complete and undamaged one of this run, else the one that the user named, which
    has no record here. Both are None where there is none.
    """
    first = rank() == 0
    while True:
        saved = checkpoints.complete(folder) if first else []
        newest = gather_all(saved[-1] if saved else None)[0]
        uri = newest.uri if newest else start_from
        if uri is None:
            return None, None
        local = storage.fetch(uri, scratch / "resume" / Path(uri).name)
        if newest is None:
            agreed(partial(_check_intact, uri, local, uri))
            return local, None
        by_rank = gather_all(_damaged_in_store(uri, local))
        damaged = next((file for file in by_rank if file), None)
        if damaged is None:
            if first:
                kept = [checkpoint.step for checkpoint in saved]
                emit(Resumed(newest.step, _curve(local, saved), kept))
            return local, newest
        if first:
            set_aside_damaged(uri, damaged, lambda text: emit(Note(text)))


def set_aside_damaged(uri: str, damaged: str, note: Callable[[str], object]) -> None:
    """Pass over a checkpoint from now on, and say so."""
    checkpoints.set_aside(uri)
    note(
        f"{Path(uri).name} is damaged ({damaged} is not as it was saved): set aside for the one "
        "before"
    )


def _damaged_in_store(uri: str, local: Path) -> str | None:
    """Return a file of a checkpoint that is damaged in storage; None if all are intact.

    A file that came wrong over the network comes right the second time.
    """
    return checkpoints.damaged(local) and checkpoints.damaged(storage.fetch(uri, local))


def _curve(newest: Path, saved: Sequence[Checkpoint]) -> list[tuple[int, Mapping[str, float]]]:
    """Return (step, values) of all logs and evaluations up to the newest checkpoint.

    A driver that was killed may have taken some of them with it.
    """
    file = newest / "trainer_state.json"
    state = read_json(TrainerState, file, "go on from another checkpoint with --prev_checkpoint")
    curve: list[tuple[int, Mapping[str, float]]] = []
    for entry in state["log_history"]:
        values: dict[str, Any] = dict(entry)
        curve.append((entry["step"], {name: values[name] for name in LOGGED if name in values}))
    return curve + [(past.step, past.metrics) for past in saved if past.metrics]


def needs_validation(
    last: Checkpoint, folder: RunFolder, is_eval_step: Callable[[int], bool]
) -> bool:
    """Tell whether a checkpoint was due for evaluation when the run was cut off."""
    has_questions = bool(storage.read_text(folder.validation_questions))
    return has_questions and not last.metrics and is_eval_step(last.step)
