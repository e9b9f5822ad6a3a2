"""Name what the role or account of a server's URL may do besides reading tables."""

from __future__ import annotations

import re
from collections.abc import Iterable
from contextlib import suppress

from ray_sql.database.places import POSTGRESQL, Kind, kind_of
from ray_sql.database.reflection import database_url
from ray_sql.errors import StoreError

SHOWN = 3
"""Names of a list that are shown."""
READING = {"USAGE", "SELECT", "SHOW VIEW"}
"""Rights of a MySQL account that change nothing, on whole tables or on columns."""
_QUOTED = r"""`(?:[^`]|``)*+`|"(?:[^"]|"")*+"|'(?:[^']|'')*+'"""
_TEXT = rf"(?:{_QUOTED}|[^`\"'])"
GRANT = re.compile(rf"GRANT ({_TEXT}+?) ON ({_TEXT}+?) TO ({_TEXT}+)", re.DOTALL)
"""The rights, the place and the receiver of a grant. A grant of a role names no place."""
RIGHT = re.compile(rf"([A-Z_ ]+?) ?(\({_TEXT}*?\))?(?:, ?|$)", re.DOTALL)
"""A right, and its columns in parentheses."""
ACCOUNTS = "SELECT 1 FROM mysql.user LIMIT 0"
ROLE = """
SELECT rolsuper, rolcreaterole, rolreplication FROM pg_catalog.pg_roles
WHERE rolname = current_user
"""
MEMBER = """
SELECT rolname FROM pg_catalog.pg_roles
WHERE rolname IN ('pg_read_server_files', 'pg_write_server_files', 'pg_execute_server_program',
  'pg_signal_backend') AND pg_has_role(current_user, oid, 'USAGE') ORDER BY 1
"""
WRITABLE = """
SELECT c.oid::regclass::text FROM pg_catalog.pg_class c
WHERE c.relkind IN ('r', 'p', 'v', 'f') AND c.relnamespace <> 'pg_catalog'::regnamespace
  AND c.relnamespace <> 'information_schema'::regnamespace
  AND has_table_privilege(c.oid, 'INSERT, UPDATE, DELETE, TRUNCATE') ORDER BY 1
"""
FOREIGN = """
SELECT c.oid::regclass::text FROM pg_catalog.pg_class c
WHERE c.relkind = 'f' AND has_table_privilege(c.oid, 'SELECT') ORDER BY 1
"""
FUNCTIONS = """
SELECT p.oid::regproc::text FROM pg_catalog.pg_proc p
JOIN pg_catalog.pg_language l ON l.oid = p.prolang
WHERE p.pronamespace <> 'pg_catalog'::regnamespace AND has_function_privilege(p.oid, 'EXECUTE')
  AND p.prorettype <> 'trigger'::regtype
  AND (p.prosecdef OR NOT l.lanpltrusted AND l.lanname NOT IN ('c', 'internal')) ORDER BY 1
"""


def check(databases: Iterable[str]) -> str:
    """Return a line about the roles of all databases on servers."""
    found: dict[str, None] = {}
    kinds = {url: kind for url in databases if (kind := on_server(url))}
    for url, kind in kinds.items():
        found |= dict.fromkeys(of_role(url) if kind == POSTGRESQL else of_account(url))
    if not found:
        names = " and ".join(sorted({kind.name for kind in kinds.values()}))
        return f"the role of {len(kinds)} {names} databases may only read"
    return (
        f"the role {'; '.join(found)}. Queries that a model writes run with these rights: give the "
        "URL a role of its own that may SELECT from the tables of the questions only"
    )


def on_server(place: str) -> Kind | None:
    """Return the kind of the server that a place is on; None for a file."""
    return kind_of(place) if "://" in place else None


def of_account(url: str) -> list[str]:
    """Return what the account of a MySQL URL may do, in words, besides reading tables."""
    from sqlalchemy import create_engine
    from sqlalchemy.exc import SQLAlchemyError
    from sqlalchemy.pool import NullPool

    try:
        with create_engine(database_url(url), poolclass=NullPool).connect() as connection:
            rights = in_grants(connection.exec_driver_sql("SHOW GRANTS").scalars().all())
            with suppress(SQLAlchemyError):
                connection.exec_driver_sql(ACCOUNTS)
                rights.append("may read the server's accounts")
    except SQLAlchemyError as error:
        reason = str(error).partition("\n")[0]
        raise StoreError(f"the rights of its account cannot be read: {reason}") from None
    return rights


def in_grants(lines: Iterable[str]) -> list[str]:
    """Return what the lines of SHOW GRANTS allow, in words, besides reading tables.

    A server shows the rights of the roles that are active in the session, too. No query that reads
    can make another role active.
    """
    rights = []
    for line in lines:
        if found := GRANT.fullmatch(line):
            granted, where, grantee = found.groups()
            more = [f"{name} {columns}".strip() for name, columns in RIGHT.findall(granted)]
            more = [right for right in more if right.partition(" (")[0] not in READING]
            more += ["GRANT OPTION"] * ("GRANT OPTION" in re.sub(_QUOTED, "", grantee))
            rights += [f"may {', '.join(more)} on {where}"] if more else []
    return rights


def of_role(url: str) -> list[str]:
    """Return what a URL's role is or may do, in words, besides reading tables."""
    from sqlalchemy import create_engine, text
    from sqlalchemy.exc import SQLAlchemyError
    from sqlalchemy.pool import NullPool

    try:
        with create_engine(database_url(url), poolclass=NullPool).connect() as connection:
            is_superuser, makes_roles, replicates = connection.execute(text(ROLE)).one()
            if is_superuser:
                return ["is a superuser"]
            lists = {
                "is a member of": connection.execute(text(MEMBER)).scalars().all(),
                "may write to": connection.execute(text(WRITABLE)).scalars().all(),
                "reads other servers by": connection.execute(text(FOREIGN)).scalars().all(),
                "may call": connection.execute(text(FUNCTIONS)).scalars().all(),
            }
    except SQLAlchemyError as error:
        reason = str(error).partition("\n")[0]
        raise StoreError(f"the rights of its role cannot be read: {reason}") from None
    rights = ["may make roles"] * makes_roles + ["may replicate the server"] * replicates
    return rights + [f"{words} {_listed(names)}" for words, names in lists.items() if names]


def _listed(names: Iterable[str]) -> str:
    first = [str(name) for name in names]
    more = f" and {len(first) - SHOWN} more" if len(first) > SHOWN else ""
    return ", ".join(first[:SHOWN]) + more
