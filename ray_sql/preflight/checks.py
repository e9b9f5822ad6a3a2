"""The checks of settings, data and stores, in the order in which they are made and said."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from ray_sql import finetune, publish, tracking, tune
from ray_sql.config import CheckConfig, Config, mask_password
from ray_sql.display import Display
from ray_sql.errors import ConfigError, RaySqlError, StoreError
from ray_sql.finetune import prepare
from ray_sql.finetune.prepare import Prepared
from ray_sql.preflight import nodes
from ray_sql.store import storage
from ray_sql.store.run_folder import RunFolder
from ray_sql.tasks import TASKS
from ray_sql.tune import study

T = TypeVar("T")


def run(config: CheckConfig) -> None:
    """Print one line per check and task; raises `RaySqlError` at the end if any failed, so that the job exits with 2."""
    if config.replay:
        replay(config)
        return
    tasks, results = config.studies(), list[bool]()
    with Display() as display:
        for one in tasks:
            if len(tasks) > 1:
                display.line(f"--- {one.output_name} ---")
            results += _Lines(display).all(one)
    if failed := results.count(False):
        raise ConfigError(f"{failed} of {len(results)} checks failed")


def replay(config: CheckConfig) -> None:
    """Send MLflow what the run or the sweep of these settings kept while no server answered; `StoreError` if it does not take it."""
    with Display() as display:
        for one in config.studies():
            display.line(_replayed(one))


def _replayed(config: Config) -> str:
    if not config.tracking.enabled:
        return "tracking is off"
    spool = finetune.spool(config)
    if RunFolder(config.run_dir).has_study():
        left = tune.replay(config)
    else:
        # with other settings, the records would be looked for in another file
        finetune.finished_metrics(config)
        if not spool.exists():
            return f"nothing of {config.output_name} waits for MLflow (it would in {spool})"
        left = [spool] if tracking.replay(config.tracking, spool) else []
    if left:
        raise StoreError(
            f"records still wait in {', '.join(map(str, left))}: MLflow stopped answering; do the same again later"
        )
    return f"all that was recorded of {config.output_name} is in MLflow ({mask_password(tracking.store_uri(config.tracking.uri))})"


class _Lines:
    """The lines of one task's checks, and whether each was ok."""

    def __init__(self, display: Display) -> None:
        self._display = display
        self._results: list[bool] = []

    def all(self, config: Config) -> list[bool]:
        """Make every check that the ones before leave possible, the cheap ones first."""
        for name, check in CHECKS.items():
            self._made(name, check, config)
        machines = self._machines(config)
        prepared = self._tried(
            "data and model", prepare.prepare, config, self._display.counter("reading data")
        )
        if prepared is not None:
            for name, of_data in PREPARED_CHECKS.items():
                self._made(name, of_data, config, prepared)
            if machines is not None:
                self._made("memory", nodes.memory, config, prepared, machines)
                self._made("disk", nodes.disk, config, prepared, machines)
        return self._results

    def _machines(self, config: Config) -> list[nodes.Node] | None:
        """What the machines that will train say, after the checks of the cluster, where there is one."""
        joins = nodes.on_cluster(config)
        if joins and self._made("cluster", nodes.reach, config) is None:
            return None
        if joins:
            self._made("state API", nodes.state, config)
        self._made("resources", nodes.room, config)
        machines = self._tried("nodes", nodes.survey, config)
        if joins and machines is not None:
            self._made("storage", nodes.shared_storage, config, machines)
            self._made("packages", nodes.packages_equal, config, machines)
        return machines

    def _made(self, name: str, check: Callable[..., str], *given: Any) -> str | None:
        """What a check found, said in a line; None where it failed."""
        found = self._tried(name, check, *given)
        if found is not None:
            self._display.line(f"ok    {name}: {found}")
            self._results.append(True)
        return found

    def _tried(self, name: str, action: Callable[..., T], *given: Any) -> T | None:
        """What an action returned; None where it failed, which is said."""
        try:
            return action(*given)
        except RaySqlError as error:
            self._display.line(f"FAIL  {name}: {error}")
            self._results.append(False)
            return None


def output(config: Config) -> str:
    """The run's place can be written, and its name is free or continues the same run."""
    if "://" not in config.run_dir:
        existing = next(
            p for p in (Path(config.run_dir), *Path(config.run_dir).parents) if p.exists()
        )
        if not os.access(existing, os.W_OK):
            raise StoreError(
                f"{existing}: cannot be written; choose another --output_dir or --scaling.storage_path"
            )
    probe = f"{config.run_dir}-probe-{uuid.uuid4().hex[:8]}"
    storage.write_text(f"{probe}/probe", "x" * 4096)
    storage.remove(probe)
    if RunFolder(config.run_dir).has_study():
        there = None if config.overwrite else study.load(config)
        holds = "a study of these settings" if there else ""
    else:
        finished = finetune.finished_metrics(config) is not None
        holds = "a finished run of these settings" if finished else ""
    return f"{config.run_dir} can be written{f' and holds {holds}' if holds else ''}"


def mlflow(config: Config) -> str:
    """The tracking store answers."""
    if not config.tracking.enabled:
        return "tracking is off"
    return f"{mask_password(tracking.require_store(config.tracking))} answers"


def tokens(config: Config) -> str:
    """The Hub knows the tokens that were given."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    given = {
        name: token for name in ("read_token", "write_token") if (token := getattr(config, name))
    }
    if not given:
        return "none given; public models and datasets only, and no publishing"
    try:
        users = {
            name: HfApi().whoami(token=token.get_secret_value())["name"]
            for name, token in given.items()
        }
    except HfHubHTTPError as error:
        raise ConfigError(
            f"the Hub refuses the token ({str(error).splitlines()[0]}); make a new one and set HF_TOKEN"
        ) from None
    except Exception as error:  # no route, a proxy, a timeout: huggingface_hub passes on whatever its HTTP client raises
        raise StoreError(
            f"the Hub does not answer ({type(error).__name__}); check the network, or leave the tokens out"
        ) from None
    return ", ".join(f"{name} belongs to {user}" for name, user in users.items())


def hub(config: Config) -> str:
    """What is to be published can be: the token may write, and the repository is free or of the same base model."""
    return publish.check(config) if config.publishes else "nothing will be published (--publish)"


def data(config: Config, prepared: Prepared) -> str:
    """The splits, and which of them can be scored by execution: without databases a run trains, but gets no such score."""
    splits = ", ".join(
        f"{len(examples)} {split}" for split, examples in prepared.corpus.splits.items()
    )
    without = [
        s for s in config.split if not any(map(prepared.corpus.executable, _databases(prepared, s)))
    ]
    scored = f"; nothing can be executed on {', '.join(without)}, so it gets no score: name its databases with --data.databases"
    unscored = scored if without and TASKS[config.task_type].executes_sql else ""
    return f"{splits}; {len(prepared.gold_errors)} gold queries do not run{unscored}"


def lengths(config: Config, prepared: Prepared) -> str:
    """The length audit."""
    return prepared.audit.line()


def _databases(prepared: Prepared, split: str) -> set[str]:
    return {example.db_id for example in prepared.corpus.splits[split]}


CHECKS: dict[str, Callable[[Config], str]] = {
    "output": output,
    "mlflow": mlflow,
    "tokens": tokens,
    "hub": hub,
}
PREPARED_CHECKS: dict[str, Callable[[Config, Prepared], str]] = {"data": data, "lengths": lengths}
