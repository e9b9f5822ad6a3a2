"""Run one untrusted SQL query, on a SQLite file or a PostgreSQL server: read-only, bounded, killed on time; the answer is a
value, never an exception.

What a model writes is run in a pool of child processes, because SQLite can be stopped from inside only between the
steps of its virtual machine: planning a join of sixty tables, or one call of a string function on a huge blob, never
gets there. A child that overstays is killed and replaced.

    with Executor() as executor:
        result = executor.run(Path("shop.sqlite"), "SELECT name FROM customer")

What the isolation covers: no byte of any database changes, no other file is opened, memory, time and result size are
bounded, the parent survives a crash. What it does not cover: an attacker with a hole in SQLite itself has the rights of
the user who runs this; the child holds no environment variable and no open file of the parent, and that is all.

On a server the guards are others, since queries run outside of the child: `postgres` lists them, and what they leave to the
rights of the role that the URL names.

`values` has the plain values, `worker` what runs in the child, `postgres` what runs there for a server, `pool` the executor.
"""

from ray_sql.execution.pool import Executor
from ray_sql.execution.values import Limits, Place, QueryResult, Row, Rows, Status

__all__ = ["Executor", "Limits", "Place", "QueryResult", "Row", "Rows", "Status"]
