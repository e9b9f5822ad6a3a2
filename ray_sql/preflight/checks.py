"""Check settings, data and stores, in the order in which the lines appear."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import SecretStr

from ray_sql import finetune, publish, tracking, tune
from ray_sql.config import CheckConfig, Config, mask_password
from ray_sql.config.sections import TrackingSection
from ray_sql.display import Display
from ray_sql.errors import ConfigError, RaySqlError, StoreError
from ray_sql.finetune import prepare
from ray_sql.finetune.prepare import Prepared
from ray_sql.preflight import nodes, rights
from ray_sql.store import storage
from ray_sql.store.run_folder import RunFolder
from ray_sql.tasks import TASKS, TaskName
from ray_sql.tune import study

T = TypeVar("T")


def run(config: CheckConfig) -> None:
    """Print one line per check and task.

    Raises `ConfigError` at the end if any failed, so that the job exits with 2.
    """
    if config.replay:
        replay(config)
        return
    studies, results = config.studies(), list[bool]()
    with Display() as display:
        for study_config in studies:
            if len(studies) > 1:
                display.line(f"--- {study_config.output_name} ---")
            results += _Lines(display).all(study_config)
    if failed := results.count(False):
        raise ConfigError(f"{failed} of {len(results)} checks failed")


def replay(config: CheckConfig) -> None:
    """Send MLflow the records that a run or sweep kept while no server answered.

    Raises `StoreError` if MLflow does not take them.
    """
    with Display() as display:
        for study_config in config.studies():
            display.line(_replay(study_config))


def _replay(config: Config) -> str:
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
            f"records still wait in {', '.join(map(str, left))}: MLflow stopped answering; do the "
            "same again later"
        )
    store = mask_password(tracking.store_uri(config.tracking.uri))
    return f"all that was recorded of {config.output_name} is in MLflow ({store})"


class _Lines:
    """Print the lines of one task's checks, and remember which were ok."""

    def __init__(self, display: Display) -> None:
        self._display = display
        self._results: list[bool] = []

    def all(self, config: Config) -> list[bool]:
        """Make every check that the earlier ones leave possible, the cheap ones first."""
        self._check("output", check_output, config)
        self._check("mlflow", check_tracking, config.tracking)
        tokens = {"read_token": config.read_token, "write_token": config.write_token}
        self._check("tokens", check_tokens, tokens)
        self._check("hub", check_hub, config)
        folder = RunFolder(config.run_dir)
        machines = self._machines(config, folder)
        counter = self._display.counter("reading data")
        prepared = self._try("data and model", prepare.prepare, config, counter)
        if prepared is None:
            return self._results
        self._check("data", check_data, config.split, config.task_type, prepared)
        databases = prepared.corpus.databases.values()
        if any(map(rights.on_server, databases)):
            self._check("database role", rights.check, databases)
        self._check("lengths", prepared.audit.line)
        if config.prev_checkpoint:
            self._check("start", check_start, prepared)
        if machines is not None:
            self._check("memory", nodes.require_memory, config, prepared, machines)
            self._check("disk", nodes.require_disk, config.lora.r, folder, prepared, machines)
        return self._results

    def _machines(self, config: Config, folder: RunFolder) -> list[nodes.Node] | None:
        """Check the cluster, if there is one, and return the machines that will train."""
        scaling = config.scaling
        joins = nodes.joins_cluster(scaling)
        if joins and self._check("cluster", nodes.require_cluster) is None:
            return None
        if joins:
            self._check("state API", nodes.require_state_api)
        trials = config.tune.max_concurrent_trials
        self._check("resources", nodes.check_capacity, scaling, trials)
        machines = self._try("nodes", nodes.survey, folder, scaling)
        if joins and machines is not None:
            self._check("storage", nodes.require_shared_storage, folder, machines)
            self._check("packages", nodes.require_equal_packages, machines)
        return machines

    def _check(self, name: str, check: Callable[..., str], *arguments: Any) -> str | None:
        """Make a check and print its line. Return its text; None if it failed."""
        text = self._try(name, check, *arguments)
        if text is not None:
            self._display.line(f"ok    {name}: {text}")
            self._results.append(True)
        return text

    def _try(self, name: str, action: Callable[..., T], *arguments: Any) -> T | None:
        """Return an action's result; None if it failed, with a line that says why."""
        self._display.starting(name)
        try:
            return action(*arguments)
        except RaySqlError as error:
            self._display.line(f"FAIL  {name}: {error}")
            self._results.append(False)
            return None
        finally:
            self._display.starting("")


def check_output(config: Config) -> str:
    """Require a place that can be written, and a name that is free or continues the same run."""
    folder = RunFolder(config.run_dir)
    if folder.is_local:
        place = Path(folder.uri)
        existing = next(path for path in (place, *place.parents) if path.exists())
        if not os.access(existing, os.W_OK):
            raise StoreError(
                f"{existing}: cannot be written; choose another --output_dir or "
                "--scaling.storage_path"
            )
    probe = nodes.probe_folder(folder)
    storage.write_text(f"{probe}/probe", "x" * 4096)
    storage.remove(probe)
    text = f"{folder} can be written"
    if folder.has_study():
        if not config.overwrite and study.load(config):
            text += " and holds a study of these settings"
    elif finetune.finished_metrics(config) is not None:
        text += " and holds a finished run of these settings"
    return text


def check_start(prepared: Prepared) -> str:
    """Check the checkpoint that a run is to start from."""
    finetune.require_start(prepared)
    return f"training starts from {prepared.config.prev_checkpoint}"


def check_tracking(settings: TrackingSection) -> str:
    """Require that the tracking store answers."""
    if not settings.enabled:
        return "tracking is off"
    return f"{mask_password(tracking.require_store(settings))} answers"


def check_tokens(tokens: Mapping[str, SecretStr | None]) -> str:
    """Require that the Hub knows the tokens that were given."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    given = {name: token.get_secret_value() for name, token in tokens.items() if token}
    if not given:
        return "none given; public models and datasets only, and no publishing"
    try:
        users = {name: HfApi().whoami(token=token)["name"] for name, token in given.items()}
    except HfHubHTTPError as error:
        raise ConfigError(
            f"the Hub refuses the token ({str(error).splitlines()[0]}); make a new one and set "
            "HF_TOKEN"
        ) from None
    except Exception as error:  # the HTTP client's own: no route, a proxy, a timeout
        raise StoreError(
            f"the Hub does not answer ({type(error).__name__}); check the network, or leave the "
            "tokens out"
        ) from None
    return ", ".join(f"{name} belongs to {user}" for name, user in users.items())


def check_hub(config: Config) -> str:
    """Require that the run can be published, if it is to be.

    The token may write, and the repository is free or of the same base model.
    """
    if not config.publishes:
        return "nothing will be published (--publish)"
    return publish.require_publishable(config)


def check_data(scored: Sequence[str], task: TaskName, prepared: Prepared) -> str:
    """Return the splits, and those of the `scored` that SQL cannot be executed on.

    Without databases a run trains, but gets no score by execution.
    """
    corpus = prepared.corpus
    splits = ", ".join(f"{len(examples)} {split}" for split, examples in corpus.splits.items())
    text = f"{splits}; {len(prepared.gold_errors)} gold queries do not run"
    if prepared.left_out:
        text += f"; rows left out: {len(prepared.left_out)}"
    without = [
        split
        for split in scored
        if not any(corpus.executable(example.db_id) for example in corpus.splits[split])
    ]
    if without and TASKS[task].executes_sql:
        text += (
            f"; nothing can be executed on {', '.join(without)}, so it gets no score: name its "
            "databases with --data.databases"
        )
    return text
