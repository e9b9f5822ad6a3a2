"""Databases: their schemas, and one untrusted query run on them.

`schema` holds the dataclasses and `restrict`. `reflection` reads a live database. `tables_json`
reads the file of Spider and BIRD. `serialize` writes a schema as text.

SQL written by a model runs in a pool of child processes (`pool`). From inside, SQLite can be
stopped only between the steps of its virtual machine. Planning a join of sixty tables, or one call
of a string function on a huge blob, never gets there. A child that overstays is killed and
replaced. The answer is a value, never an exception.

    with Executor() as executor:
        result = executor.run(Path("shop.sqlite"), "SELECT name FROM customer")

The isolation guarantees that no byte of any database changes and that no other file is opened. It
bounds memory, time and result size, and the parent survives a crash. It does not stop an attacker
with a hole in SQLite itself, who gets the rights of the user who runs this. Even so, the child
holds no environment variable and no open file of the parent. On a server queries run outside of the
child, so the guards differ: `postgres_worker` lists them, and the risks left to the role's rights.
`duckdb_worker` lists DuckDB's.
"""

from ray_sql.database.join_paths import complete
from ray_sql.database.pool import Executor
from ray_sql.database.query import (
    MOST_ANALYSED,
    MOST_NODES,
    MOST_SQL,
    OVER_LIMITS,
    Limits,
    Place,
    QueryResult,
    ResultRow,
    Rows,
)
from ray_sql.database.reflection import reflect
from ray_sql.database.schema import Column, ForeignKey, Form, Links, Schema, Table, restrict
from ray_sql.database.serialize import SERIALIZER_VERSION, Names, render
from ray_sql.database.tables_json import read_tables_json
