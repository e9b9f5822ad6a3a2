"""Databases: their schemas, and one untrusted query run on them.

`schema` holds the dataclasses and `restrict`, `reflection` reads a live database, `tables_json` reads Spider's and BIRD's file, and
`serialize` writes a schema as text.

What a model writes is run in a pool of child processes (`pool`), because SQLite can be stopped from inside only between the steps of its
virtual machine: planning a join of sixty tables, or one call of a string function on a huge blob, never gets there. A child that
overstays is killed and replaced. The answer is a value, never an exception.

    with Executor() as executor:
        result = executor.run(Path("shop.sqlite"), "SELECT name FROM customer")

What the isolation covers: no byte of any database changes, no other file is opened, memory, time and result size are bounded, the parent
survives a crash. What it does not cover: an attacker with a hole in SQLite itself has the rights of the user who runs this; the child holds
no environment variable and no open file of the parent, and that is all. On a server the guards are others, since queries run outside of
the child: `postgres_worker` lists them, and what they leave to the rights of the role that the URL names.
"""

from ray_sql.database.pool import Executor
from ray_sql.database.query import Limits, Place, QueryResult, Row, Rows, Status
from ray_sql.database.reflection import reflect
from ray_sql.database.schema import Column, ForeignKey, Form, Links, Schema, Table, restrict
from ray_sql.database.serialize import SERIALIZER_VERSION, Serializer, render
from ray_sql.database.tables_json import read_tables_json
