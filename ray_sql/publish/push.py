"""Check before training whether a run could be published, and publish it when it is finished.

check(config)    whoever owns the token may write the repository, and it holds no model of another base
publish(config)  adapter, contract, settings, metrics and model card as one commit, tagged with the MLflow run
"""

from __future__ import annotations

import shlex
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray_sql import __version__
from ray_sql.config import Config, PublishConfig
from ray_sql.display import Display, percent
from ray_sql.errors import ConfigError, StoreError
from ray_sql.publish import bundle as bundles
from ray_sql.publish import hub as hubs
from ray_sql.publish import merge
from ray_sql.publish.bundle import Bundle
from ray_sql.publish.card import card
from ray_sql.publish.hub import Hub, License, Pushed
from ray_sql.store import storage
from ray_sql.store.run_folder import ADAPTER_WEIGHTS, CONTRACT
from ray_sql.tasks import TASKS


def check(config: Config) -> str:
    """What a run of `config` would be published as; sends nothing.

    Raises `ConfigError` without a token that may write, where the repository holds a model of another base, or the base has no name on
    the Hub, and `StoreError` if the Hub does not answer.
    """
    base, hub = bundles.base_name(config), hubs.login(config)
    there, public = _same_base(hub, base), hub.public()
    if public is None:
        place = f"if there is none, {'a private one' if config.hub.private else 'a public one'} is created"
    else:
        place = "on top of what it holds" if there else "which holds no model yet"
        place += "; it is public: everybody can read what is pushed there" if public else ""
    return f"{hub.repo_id}, {place}, base model {base}"


def publish(config: Config | PublishConfig, display: Display | None = None) -> str:
    """Push the finished run in `config.run_dir`, under the hub settings and tokens of `config`; returns the repository's address.

    Raises `ConfigError`, `ContractError` or `ModelError` for a run that is not to be published (see `bundle.read`), and `StoreError`,
    with the command that does it later, where the Hub cannot be reached: the adapter stays where it is.
    """
    display = display or Display()
    bundle = bundles.read(config)
    try:
        hub = hubs.login(bundle.config)
        _same_base(hub, bundle.base_model)
        license = _license(hub, bundle)
        pushed = _push_adapter(hub, bundle, license)
        display.line(_line(pushed))
        if bundle.config.hub.merge:
            display.line(_line(_push_merged(hub, bundle, license, display)))
    except StoreError as error:
        raise StoreError(
            f"{error}; nothing is lost: the adapter is in {bundle.folder.adapter}; with HF_TOKEN set, push it later with: {later(bundle)}"
        ) from None
    return pushed.url


def dry_run(config: Config | PublishConfig) -> None:
    """Say what `publish` would push where, and show the model card; raises what it would, and sends nothing."""
    display, bundle = Display(), bundles.read(config)
    display.line(f"Hub       {check(bundle.config)}")
    hub = hubs.login(bundle.config)
    license = _license(hub, bundle)
    display.line(
        f"files     {', '.join(sorted((ADAPTER_WEIGHTS, 'README.md', *bundle.json_files())))}, as one commit, tag {bundle.tag}"
    )
    display.line(f"--- README.md ---\n{card(bundle, hub.repo_id, license)}")


def later(bundle: Bundle) -> str:
    """The command that publishes a run as it was to be; the token comes from the environment."""
    root, _, name = bundle.folder.uri.rpartition("/")
    place = ["--scaling.storage_path" if "://" in root else "--output_dir", root]
    words = ["ray-sql", "publish", "--output_name", name, *place]
    for setting, value in bundle.asked.items():
        flag = f"--hub.{setting}"
        words += (
            [flag if value else f"--no-hub.{setting}"]
            if isinstance(value, bool)
            else [flag, str(value)]
        )
    return shlex.join(words)


def _same_base(hub: Hub, base: str) -> bool:
    """Whether the repository holds a model already. Raises `ConfigError` if it is one of another base."""
    there = hub.base_model()
    if there not in (None, base):
        raise ConfigError(
            f"--hub.repo_id {hub.repo_id}: holds a model over {there}, this run is over {base}; choose another --hub.repo_id"
        )
    return there is not None


def _license(hub: Hub, bundle: Bundle) -> License:
    given = bundle.config.hub.license
    return {"license": given} if given else hub.license_of(bundle.base_model)


def _push_adapter(hub: Hub, bundle: Bundle, license: License) -> Pushed:
    with tempfile.TemporaryDirectory(prefix="ray_sql-") as scratch:
        weights = storage.fetch_file(
            bundle.folder.adapter.place(ADAPTER_WEIGHTS), Path(scratch) / ADAPTER_WEIGHTS
        )
        files: dict[str, Path | bytes] = {
            ADAPTER_WEIGHTS: weights,
            **bundle.json_files(),
            "README.md": card(bundle, hub.repo_id, license).encode(),
        }
        return hub.push(files, _message(bundle, bundle.metrics["tuned"]), tag=bundle.tag)


def _push_merged(hub: Hub, bundle: Bundle, license: License, display: Display) -> Pushed:
    """Push the merged model to a repository of its own, whose root is the model, as servers and converters expect it."""
    measured = merge.merged(bundle.config, bundle.folder, display)
    other = Hub(hub.api, f"{hub.repo_id}-merged", hub.private)
    _same_base(other, bundle.base_model)
    with tempfile.TemporaryDirectory(prefix="ray_sql-") as scratch:
        folder = storage.fetch(bundle.folder.merged.uri, Path(scratch))
        files: dict[str, Path | bytes] = {file.name: file for file in sorted(folder.iterdir())}
        files |= {
            CONTRACT: bundle.json_files()[CONTRACT],
            "README.md": card(bundle, other.repo_id, license, measured).encode(),
        }
        return other.push(files, _message(bundle, measured["merged"]), tag=bundle.tag)


def _message(bundle: Bundle, measured: Mapping[str, Any]) -> str:
    task = TASKS[bundle.config.task_type]
    scores = [
        f"{percent(one[task.metric])} of {one['n']} {split}" for split, one in measured.items()
    ]
    return f"{bundle.config.output_name}: {task.label} {', '.join(scores)} (ray_sql {__version__})"


def _line(pushed: Pushed) -> str:
    return f"Hub       {pushed.url}, commit {pushed.commit[:12]}{'' if pushed.new else ', which was there already'}"
