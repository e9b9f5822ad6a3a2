"""Push checkpoints to the Hub from the driver, beside training.

Of two threads, the first copies a new checkpoint's adapter before the run prunes it, which takes
moments. The second pushes the copies in order, however long that takes. A failure is a warning: a
push must not stop training.
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
from functools import cached_property, partial
from pathlib import Path

from ray_sql.config import Config
from ray_sql.errors import RaySqlError
from ray_sql.publish import bundle, hub
from ray_sql.store import checkpoints, weights
from ray_sql.store.run_folder import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    CONTRACT,
    AdapterFolder,
    RunFolder,
)

log = logging.getLogger(__name__)

BRANCH = "checkpoints"
LAST_PUSH = 10.0
"""Seconds that a run which is being stopped gives a running push before it closes its records.

Its process lasts as long as the push, but whoever stops it may kill it then."""


@contextmanager
def beside_training(config: Config) -> Iterator[Callable[[int], None] | None]:
    """Yield a function to call with the step of every saved checkpoint.

    It is None if `hub.push_checkpoints` is `none`. Leaving waits for all pushes, unless the run was
    stopped or failed.
    """
    if config.hub.push_checkpoints == "none":
        yield None
        return
    base = bundle.base_name(config.model_name, config.hub)
    connect = partial(hub.login, config.hub, config.output_name, config.write_token)
    best_only = config.hub.push_checkpoints == "best"
    pusher = CheckpointPusher(RunFolder(config.run_dir), base, best_only, connect)
    try:
        yield pusher
    except BaseException:
        pusher.close(wait=False)
        raise
    pusher.close()


class CheckpointPusher:
    """Push every checkpoint whose step it is called with. `close` waits for all pushes.

    Checkpoints of an earlier attempt of the run are pushed first. Those that the Hub has already
    cost one request each.
    """

    def __init__(
        self, run: RunFolder, base: str, best_only: bool, connect: Callable[[], hub.Hub]
    ) -> None:
        self._run, self._base, self._best_only, self._connect = run, base, best_only, connect
        self._copies = tempfile.TemporaryDirectory(prefix="ray_sql-")
        self._copying = ThreadPoolExecutor(1, thread_name_prefix="ray_sql-copy")
        self._pushing = ThreadPoolExecutor(1, thread_name_prefix="ray_sql-push")
        self._pushes: list[Future[None]] = []
        for checkpoint in checkpoints.complete(self._run):
            self(checkpoint.step)

    @cached_property
    def _hub(self) -> hub.Hub:
        """The Hub, logged in at the first push, so that one that does not answer delays nothing."""
        return self._connect()

    def __call__(self, step: int) -> None:
        """Take note of a new checkpoint. Returns at once."""
        self._copying.submit(self._guarded, step, self._copy)

    def close(self, wait: bool = True) -> None:
        """Wait for all pushes. With `wait` off, wait a few seconds for the running one only."""
        self._copying.shutdown(wait=True, cancel_futures=not wait)
        self._pushing.shutdown(wait=wait, cancel_futures=not wait)
        if not wait:
            futures.wait([push for push in self._pushes if not push.cancelled()], timeout=LAST_PUSH)
        self._copies.cleanup()

    def _copy(self, step: int) -> None:
        complete = {checkpoint.step: checkpoint for checkpoint in checkpoints.complete(self._run)}
        best = checkpoints.best(complete.values())
        checkpoint = complete.get(step)
        if self._best_only and (best is None or best.step != step):
            return
        if checkpoint is None:
            raise FileNotFoundError(f"{self._run.checkpoint(step).name} is not there any more")
        folder = self._copy_of(step)
        if folder.exists():  # reported again: it was measured when the run continued
            return
        with tempfile.TemporaryDirectory(dir=self._copies.name) as scratch:
            AdapterFolder(checkpoint.uri).fetch_files(Path(scratch))
            shutil.copytree(scratch, folder)
        self._pushes.append(self._pushing.submit(self._guarded, step, self._push))

    def _copy_of(self, step: int) -> Path:
        return Path(self._copies.name) / self._run.checkpoint(step).name

    def _push(self, step: int) -> None:
        folder = self._copy_of(step)
        copy = AdapterFolder(str(folder))
        weights.check(folder / ADAPTER_WEIGHTS, copy.place(ADAPTER_WEIGHTS))
        contract, saved = copy.read_contract() or {}, copy.read_adapter_config() or {}
        published = {
            CONTRACT: contract | {"model_name": self._base},
            ADAPTER_CONFIG: bundle.public_adapter_config(saved, self._base, contract),
        }
        for name, content in published.items():
            (folder / name).write_text(json.dumps(content, indent=2) + "\n")
        files: dict[str, Path | bytes] = {
            f"{folder.name}/{file.name}": file for file in sorted(folder.iterdir())
        }
        pushed = self._hub.push(files, f"{self._run.name}: {folder.name}", branch=BRANCH)
        log.info("%s pushed to %s", folder.name, pushed.url)

    def _guarded(self, step: int, action: Callable[[int], None]) -> None:
        try:
            action(step)
        except (RaySqlError, OSError, RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())[:300]
            log.warning("checkpoint-%d was not pushed: %s", step, reason)
