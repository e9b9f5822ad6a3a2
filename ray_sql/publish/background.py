"""Checkpoints pushed to the Hub while training goes on, from the driver, beside the training loop.

Two threads, one after the other: the first copies a new checkpoint's adapter before the run prunes it, which takes moments; the
second pushes the copies in order, however long that takes. Whatever fails is a warning: training is not the Hub's business.
"""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

from ray_sql.config import Config
from ray_sql.errors import RaySqlError
from ray_sql.publish import bundle, hub
from ray_sql.store import checkpoints
from ray_sql.store.run_folder import ADAPTER_CONFIG, CONTRACT, AdapterFolder, RunFolder

log = logging.getLogger(__name__)

BRANCH = "checkpoints"
LAST_PUSH = 10.0
"""Seconds that a run which is being stopped gives the push under way before it closes its records. Its process lasts as long as the
push, but whoever stops it may kill it then."""


@contextmanager
def beside_training(config: Config) -> Iterator[Callable[[int], None] | None]:
    """What to call with the step of every checkpoint that is saved; None where `hub.push_checkpoints` asks for nothing.

    Leaving waits for what is still to be pushed, but not on the way out of a run that is stopped or failed.
    """
    if config.hub.push_checkpoints == "none":
        yield None
        return
    pusher = Checkpoints(config)
    try:
        yield pusher
    except BaseException:
        pusher.close(wait=False)
        raise
    pusher.close()


class Checkpoints:
    """Call it with the step of every checkpoint that was saved; `close` waits for what is still to be pushed.

    Checkpoints of an earlier attempt of the same run are pushed first; those that are there already cost a question each.
    """

    def __init__(self, config: Config) -> None:
        self._config, self._base = config, bundle.base_name(config)
        self._run = RunFolder(config.run_dir)
        self._copies = tempfile.TemporaryDirectory(prefix="ray_sql-")
        self._copying = ThreadPoolExecutor(1, thread_name_prefix="ray_sql-copy")
        self._pushing = ThreadPoolExecutor(1, thread_name_prefix="ray_sql-push")
        self._pushes: list[Future[None]] = []
        for checkpoint in checkpoints.complete(self._run):
            self(checkpoint.step)

    @cached_property
    def _hub(self) -> hub.Hub:
        """Logged in where it is first pushed, so that a Hub that does not answer delays no training."""
        return hub.login(self._config)

    def __call__(self, step: int) -> None:
        """Take note of a new checkpoint; returns at once."""
        self._copying.submit(self._guarded, step, self._copy)

    def close(self, wait: bool = True) -> None:
        """Wait for what is under way and queued; of a run that is being stopped, only for the push under way, and not for long."""
        self._copying.shutdown(wait=True, cancel_futures=not wait)
        self._pushing.shutdown(wait=wait, cancel_futures=not wait)
        if not wait:
            futures.wait([push for push in self._pushes if not push.cancelled()], timeout=LAST_PUSH)
        self._copies.cleanup()

    def _copy(self, step: int) -> None:
        found = checkpoints.complete(self._run)
        best = checkpoints.best(found)
        checkpoint = next((one for one in found if one.step == step), None)
        if self._config.hub.push_checkpoints == "best" and (best is None or best.step != step):
            return
        if checkpoint is None:
            raise FileNotFoundError(f"{self._run.checkpoint(step).name} is not there any more")
        folder = self._copy_of(step)
        if folder.exists():  # measured when the run went on, and told of again
            return
        with tempfile.TemporaryDirectory(dir=self._copies.name) as scratch:
            AdapterFolder(checkpoint.uri).fetch_files(Path(scratch))
            shutil.copytree(scratch, folder)
        self._pushes.append(self._pushing.submit(self._guarded, step, self._push))

    def _copy_of(self, step: int) -> Path:
        return Path(self._copies.name) / self._run.checkpoint(step).name

    def _push(self, step: int) -> None:
        folder = self._copy_of(step)
        contract = json.loads((folder / CONTRACT).read_text())
        saved = json.loads((folder / ADAPTER_CONFIG).read_text())
        published = {
            CONTRACT: contract | {"model_name": self._base},
            ADAPTER_CONFIG: bundle.public_adapter_config(saved, self._base, contract),
        }
        for name, content in published.items():
            (folder / name).write_text(json.dumps(content, indent=2) + "\n")
        files: dict[str, Path | bytes] = {
            f"{folder.name}/{file.name}": file for file in sorted(folder.iterdir())
        }
        pushed = self._hub.push(files, f"{self._config.output_name}: {folder.name}", branch=BRANCH)
        log.info("%s pushed to %s", folder.name, pushed.url)

    def _guarded(self, step: int, action: Callable[[int], None]) -> None:
        try:
            action(step)
        except (RaySqlError, OSError, RuntimeError, ValueError) as error:
            log.warning(
                "checkpoint-%d was not pushed: %s", step, " ".join(str(error).split())[:300]
            )
