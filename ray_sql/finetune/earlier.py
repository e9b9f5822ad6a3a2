"""An earlier run under the same name: gone on with, shown again, or refused."""

from __future__ import annotations

import shlex
from typing import Any

from ray_sql.config import Config, differences
from ray_sql.data import Corpus
from ray_sql.errors import ConfigError, StoreError
from ray_sql.finetune.prepare import TRAINED_ON
from ray_sql.store.run_folder import RunFolder

SCORING_SETTINGS = (
    "split",
    "prompt.links",
    "linking.form",
    "linking.complete",
    "linking.keep",
    "evaluate.semantics",
    "evaluate.keep_distinct",
    "evaluate.limit",
    "evaluate.max_new_tokens",
    "evaluate.baseline",
    "evaluate.num_beams",
    "evaluate.first_executable",
    "evaluate.ves_iterations",
)
"""Settings that decide what a run's scores mean."""


def finished_metrics(config: Config) -> dict[str, Any] | None:
    """Return the metrics of a finished run of the same settings under this name, if there is one.

    None also where the run is to be overwritten. Raises `ConfigError` if the name holds a run of
    other settings, `StoreError` if it holds something else.
    """
    folder = RunFolder(config.run_dir)
    folder.finish_removal()
    earlier = _earlier_settings(folder, config)
    if earlier is None or config.overwrite:
        return None
    if earlier.identity() != config.identity():
        changed = differences(earlier.public(), config.public()) or "other data"
        raise ConfigError(
            f"{folder.uri} holds a run of other settings ({changed}); choose another "
            "--output_name, or replace it with --overwrite"
        )
    if not folder.is_finished():
        return None
    require_scored_alike(earlier, config)
    return folder.read_metrics()


def require_scored_alike(earlier: Config, config: Config) -> None:
    """Raise `ConfigError` if a finished run was scored otherwise than `config` says.

    Its table would answer another question.
    """
    names = [name for name in SCORING_SETTINGS if earlier.setting(name) != config.setting(name)]
    if config.prev_checkpoint and config.prev_checkpoint != earlier.prev_checkpoint:
        names.append("prev_checkpoint")
    if names:
        changed = "; ".join(
            f"{name} {earlier.setting(name)!r} there, {config.setting(name)!r} here"
            for name in names[:3]
        )
        adapter = shlex.quote(RunFolder(config.run_dir).adapter.uri)
        raise ConfigError(
            f"{config.run_dir} holds a finished run, made or scored otherwise ({changed}); score "
            f"its adapter anew with ray-sql evaluate --adapter {adapter}, or train again with "
            "another --output_name or --overwrite"
        )


def require_same_data(corpus: Corpus, config: Config) -> None:
    """Raise `ConfigError` if the folder holds a run of the same settings on other data."""
    before = RunFolder(config.run_dir).read_data_fingerprint()
    now = corpus.fingerprint(TRAINED_ON)
    if before and before != now and not config.overwrite:
        raise ConfigError(
            f"{config.run_dir} holds a run on other data (fingerprint {before} there, {now} of "
            f"{config.dataset_id} now); choose another --output_name, or replace it with "
            "--overwrite"
        )


def _earlier_settings(folder: RunFolder, config: Config) -> Config | None:
    """Return the settings of the run in a folder; None for no run, or one to overwrite."""
    trained = folder.holds_training_run()
    if config.overwrite and trained and folder.has_settings():
        return None
    saved = folder.read_settings()
    if saved is None:
        if folder.contents():
            raise StoreError(
                f"{folder.uri}: exists, but is no run of ray_sql (no config.json); choose another "
                "--output_name"
            )
        return None
    try:
        return type(config)(**saved)
    except ValueError:  # of another version
        way_out = ", or replace the run with --overwrite" if trained else ""
        raise ConfigError(
            f"{folder.uri}/config.json is of no run of this version of ray_sql; choose another "
            f"--output_name{way_out}"
        ) from None
