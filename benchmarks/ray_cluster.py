"""A real Ray cluster on one machine, to which nodes are added and from which they are taken."""

from __future__ import annotations

import os
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def ray_cluster(**head: Any) -> Iterator[Any]:
    """Start a `ray.cluster_utils.Cluster` with a head of these settings.

    Meanwhile the environment holds a token of the cluster's own.
    """
    from ray._common.utils import get_default_ray_temp_dir
    from ray._private.authentication_test_utils import reset_auth_token_state
    from ray.cluster_utils import Cluster

    # Cluster writes its address there even if its files are elsewhere, and where no Ray has run yet
    # the folder is missing
    Path(get_default_ray_temp_dir()).mkdir(parents=True, exist_ok=True)
    before = dict(os.environ)
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    reset_auth_token_state()  # Ray reads the variables once, and may have done so
    try:
        # names of sockets must be short; processes that die slowly may still write there when it is
        # removed
        with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
            cluster = Cluster(initialize_head=True, head_node_args={"temp_dir": folder, **head})
            try:
                yield cluster
            finally:
                cluster.shutdown()
    finally:
        os.environ.clear()
        os.environ.update(before)
        reset_auth_token_state()
