"""A real PostgreSQL server for tests, started from the installed binaries.

It listens on a socket in a folder of its own. Where the tests run as root, which PostgreSQL
refuses, it runs as another user. Without a server or psycopg its tests skip.
"""

from __future__ import annotations

import glob
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from ray_sql.database import Limits
from tests.conftest import SHOP

psycopg = pytest.importorskip("psycopg")

LIMITS = Limits(seconds=1, rows=1000, bytes=2**20, memory=2**29, sql_length=20_000)
TABLES = """
CREATE TABLE item (id int PRIMARY KEY, name text, price numeric(8, 2), weight float8, made date,
  sold boolean, code char(6));
INSERT INTO item VALUES (1, 'pen', 1.50, 0.5, '2024-01-02', true, 'p1'),
  (2, 'ink', NULL, NULL, '2024-02-03', false, 'i1'),
  (3, 'nib', 2.00, 0.25, NULL, NULL, 'n1');
CREATE SEQUENCE number;
CREATE FUNCTION remove() RETURNS int LANGUAGE plpgsql AS 'BEGIN DELETE FROM item; RETURN 1; END';
CREATE FUNCTION raised(x numeric) RETURNS numeric LANGUAGE sql AS 'SELECT x * 2';
"""


class Server:
    """A PostgreSQL server in a folder of its own, with the databases `hostile` and `mall`."""

    def __init__(self, binaries: Path) -> None:
        self._binaries = binaries
        self._folder = Path(tempfile.mkdtemp(prefix="ray_sql-pg-"))  # short: it names a socket
        self._account: dict[str, Any] = {}
        if os.geteuid() == 0:
            nobody = pwd.getpwnam("nobody")
            self._account = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
            os.chown(self._folder, nobody.pw_uid, nobody.pw_gid)
        self._command("initdb", "-A", "trust", "-U", "owner", "-E", "UTF8", "--no-sync")
        options = f"-k {self._folder} -c listen_addresses='' -c fsync=off -c max_connections=20"
        self._command("pg_ctl", "-w", "-o", options, "-l", str(self._folder / "log"), "start")
        with psycopg.connect(self.url("postgres"), autocommit=True) as connection:
            for name in ("hostile", "mall"):
                connection.execute(f"CREATE DATABASE {name}")
        for name, script in (("hostile", TABLES), ("mall", SHOP)):
            with psycopg.connect(self.url(name)) as connection:
                connection.execute(script)

    def url(self, name: str) -> str:
        return f"postgresql://owner@/{name}?host={self._folder}"

    def state(self) -> list[Any]:
        """Read what a query could change: rows, relations, functions, large objects, settings."""
        with psycopg.connect(self.url("hostile")) as connection:
            return [
                connection.execute(question).fetchall()
                for question in (
                    "SELECT * FROM item ORDER BY id",
                    "SELECT relname, relkind FROM pg_class ORDER BY 1",
                    "SELECT count(*) FROM pg_proc",
                    "SELECT count(*) FROM pg_largeobject_metadata",
                    "SELECT last_value, is_called FROM number",
                    "SELECT rolname, rolsuper FROM pg_roles ORDER BY 1",
                    "SELECT datname FROM pg_database ORDER BY 1",
                )
            ]

    def files(self) -> list[str]:
        return sorted(path for path in glob.glob(f"{self._folder}/*") if not path.endswith("log"))

    def busy(self) -> list[int]:
        """Process ids of the backends that work on a query of an executor."""
        with psycopg.connect(self.url("postgres")) as connection:
            pids = connection.execute(
                "SELECT pid FROM pg_stat_activity "
                "WHERE application_name LIKE 'ray_sql%' AND state = 'active'"
            )
            return [pid for (pid,) in pids]

    def close(self) -> None:
        self._command("pg_ctl", "-m", "immediate", "stop")
        shutil.rmtree(self._folder)

    def _command(self, name: str, *arguments: str) -> None:
        command = [str(self._binaries / name), "-D", str(self._folder / "data"), *arguments]
        # no pipe: the server would keep it open
        with (self._folder / "out").open("w") as out:
            done = subprocess.run(command, stdout=out, stderr=out, cwd="/", **self._account)
        assert done.returncode == 0, (self._folder / "out").read_text()


def find_binaries() -> Path | None:
    """The folder of the newest server that is installed; Debian keeps it off the PATH."""
    on_path = shutil.which("initdb")
    installed = sorted(
        Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3])
    )
    if on_path:
        return Path(on_path).resolve().parent
    return installed[-1].parent if installed else None


@contextmanager
def running() -> Iterator[Server]:
    """Start a server, and end it; skip the test where none is installed."""
    binaries = find_binaries()
    if binaries is None:
        pytest.skip("no PostgreSQL server is installed")
    started = Server(binaries)
    yield started
    started.close()
