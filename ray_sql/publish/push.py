"""Check before training that a run can be published, and publish it when it is finished.

A push is one commit of adapter, contract, settings, metrics and model card, tagged with the MLflow
run.
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
from ray_sql.store import storage, weights
from ray_sql.store.run_folder import ADAPTER_WEIGHTS, CONTRACT
from ray_sql.tasks import TASKS


def require_publishable(config: Config) -> str:
    """Return where a run would be published, over which base model. Sends nothing.

    Raises `ConfigError` without a token that may write, and for a base without a name on the Hub.
    Raises it also for a repository with a model of another base. Raises `StoreError` if the Hub
    does not answer.
    """
    base = bundles.base_name(config.model_name, config.hub)
    hub = hubs.login(config.hub, config.output_name, config.write_token)
    holds_model, public = _require_same_base(hub, base), hub.public()
    if public is None:
        kind = "private" if config.hub.private else "public"
        place = f"if there is none, a {kind} one is created"
    else:
        place = "on top of what it holds" if holds_model else "which holds no model yet"
        if public:
            place += "; it is public: everybody can read what is pushed there"
    return f"{hub.repo_id}, {place}, base model {base}"


def publish(config: Config | PublishConfig, display: Display | None = None) -> str:
    """Push the finished run in `config.run_dir`. Return the repository's address.

    Raises `ConfigError`, `ContractError` or `ModelError` for a run that must not be published (see
    `bundle.read`). Raises `StoreError`, with the command that pushes later, if the Hub cannot be
    reached. The adapter stays where it is.
    """
    display = display or Display()
    bundle = bundles.read(config)
    try:
        hub = _login(bundle)
        _require_same_base(hub, bundle.base_model)
        license = _license(hub, bundle)
        pushed = _push_adapter(hub, bundle, license)
        display.line(_line(pushed))
        if bundle.config.hub.merge:
            display.line(_line(_push_merged(hub, bundle, license, display)))
    except StoreError as error:
        raise StoreError(
            f"{error}; nothing is lost: the adapter is in {bundle.folder.adapter}; with HF_TOKEN "
            f"set, push it later with: {command_to_publish(bundle)}"
        ) from None
    return pushed.url


def dry_run(config: Config | PublishConfig) -> None:
    """Show what `publish` would push where, and the card. Sends nothing.

    Raises as it does for the run, and for a token without rights. Without a token, or a Hub that
    answers, it shows what is known here.
    """
    display, bundle = Display(), bundles.read(config)
    run = bundle.config
    repo_id = run.hub.repo_id or run.output_name
    repo_id = repo_id if "/" in repo_id else f"YOU/{repo_id}"
    license: License = {"license": run.hub.license} if run.hub.license else {}
    place = f"{repo_id}, which was not asked: there is no token (HF_TOKEN)"
    if hubs.token_of(run.write_token):
        try:
            place, hub = require_publishable(run), _login(bundle)
            repo_id, license = hub.repo_id, _license(hub, bundle)
        except StoreError as error:
            place = f"{repo_id}, which was not asked: {error}"
    display.line(f"Hub       {place}")
    files = ", ".join(sorted((ADAPTER_WEIGHTS, "README.md", *bundle.json_files())))
    display.line(f"files     {files}, as one commit, tag {bundle.tag}")
    display.line(f"--- README.md ---\n{card(bundle, repo_id, license)}")


def command_to_publish(bundle: Bundle) -> str:
    """Return the command that publishes a run with these settings, without the token."""
    root, _, name = bundle.folder.uri.rpartition("/")
    place = ["--scaling.storage_path" if "://" in root else "--output_dir", root]
    words = ["ray-sql", "publish", "--output_name", name, *place]
    for setting, value in bundle.changed.items():
        if value is False:
            words.append(f"--no-hub.{setting}")
        else:
            words += [f"--hub.{setting}"] if value is True else [f"--hub.{setting}", str(value)]
    return shlex.join(words)


def _login(bundle: Bundle) -> Hub:
    config = bundle.config
    return hubs.login(config.hub, config.output_name, config.write_token)


def _require_same_base(hub: Hub, base: str) -> bool:
    """Tell whether the repository holds a model. Raises `ConfigError` for one of another base."""
    published = hub.base_model()
    if published not in (None, base):
        raise ConfigError(
            f"--hub.repo_id {hub.repo_id}: holds a model over {published}, this run is "
            f"over {base}; choose another --hub.repo_id"
        )
    return published is not None


def _license(hub: Hub, bundle: Bundle) -> License:
    given = bundle.config.hub.license
    return {"license": given} if given else hub.license_of(bundle.base_model)


def _push_adapter(hub: Hub, bundle: Bundle, license: License) -> Pushed:
    with tempfile.TemporaryDirectory(prefix="ray_sql-") as scratch:
        known = bundle.metrics.get("weights_sha256")
        copy = weights.fetch(bundle.folder.adapter, Path(scratch) / ADAPTER_WEIGHTS, known)
        files: dict[str, Path | bytes] = {
            ADAPTER_WEIGHTS: copy,
            **bundle.json_files(),
            "README.md": card(bundle, hub.repo_id, license).encode(),
        }
        return hub.push(files, _message(bundle, bundle.metrics["tuned"]), tag=bundle.tag)


def _push_merged(hub: Hub, bundle: Bundle, license: License, display: Display) -> Pushed:
    """Push the merged model to the root of a repository of its own, where servers expect it."""
    measured = merge.merged(bundle.config, bundle.folder, display)
    other = Hub(hub.api, f"{hub.repo_id}-merged", hub.private)
    _require_same_base(other, bundle.base_model)
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
    text = f"{bundle.config.output_name}: {task.label} {', '.join(scores)} (ray_sql {__version__})"
    return " ".join(text.split())


def _line(pushed: Pushed) -> str:
    line = f"Hub       {pushed.url}, commit {pushed.commit[:12]}"
    return line if pushed.new else f"{line}, which was there already"
