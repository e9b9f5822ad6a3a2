"""Find the databases of a test suite: the files beside a database that have its very schema."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ray_sql.database.pool import Executor
from ray_sql.database.query import Place
from ray_sql.errors import DataError

SHOWN = 3
"""Files that a remark names."""

_COLUMNS = """
    SELECT lower(t.name), lower(c.name)
    FROM sqlite_master AS t JOIN pragma_table_info(t.name) AS c
    WHERE t.type IN ('table', 'view') AND t.name NOT LIKE 'sqlite~_%' ESCAPE '~'
    ORDER BY 1, c.cid
"""


@dataclass(frozen=True)
class Suite:
    """The databases on which a query must be right, the question's own first.

    `strangers` are files beside it of another schema, or that cannot be read.
    """

    databases: tuple[Place, ...]
    strangers: tuple[Path, ...] = ()


def find(executor: Executor, database: Place) -> Suite:
    """Return the test suite of a database: itself alone, unless others of its schema lie beside it.

    Only a folder named after the database can be one, not a folder of unrelated databases. Gold
    that runs on one database of a suite runs on all, for their tables, views and columns are alike.
    """
    if isinstance(database, str) and "://" in database:
        return Suite((database,))
    file = Path(database)
    if file.parent.name != file.stem:
        return Suite((database,))
    beside = sorted(set(file.parent.glob("*.sqlite")) - {file})
    columns = _columns(executor, file) if beside else None
    alike = [other for other in beside if columns and _columns(executor, other) == columns]
    strangers = tuple(other for other in beside if other not in alike)
    return Suite((database, *alike), strangers)


def remarks(executor: Executor, databases: Iterable[Place]) -> Iterator[str]:
    """Say which databases have a test suite, and which files beside one are left out."""
    suites = [find(executor, database) for database in databases]
    members = [place for suite in suites for place in suite.databases[1:]]
    strangers = [file for suite in suites for file in suite.strangers]
    if members:
        count = sum(len(suite.databases) > 1 for suite in suites)
        yield (
            f"test suites: answers on {count} of {len(suites)} databases must be right on "
            f"{len(members)} files beside them too: {_some(members)}"
        )
    if strangers:
        yield (
            "no test suite, for its tables and columns are others than the database's: "
            f"{_some(strangers)}"
        )


def _columns(executor: Executor, file: Path) -> object:
    """Return tables and columns as they compare; None for a file that cannot be read."""
    try:
        return executor.run(file, _COLUMNS).rows or None
    except DataError:
        return None


def _some(files: Sequence[Place]) -> str:
    names = [f"{Path(file).parent.name}/{Path(file).name}" for file in files[:SHOWN]]
    more = f" and {len(files) - SHOWN} more" if len(files) > SHOWN else ""
    return ", ".join(names) + more
