"""Complete links, so that SQL can join what they name: keys, and the tables on the way between.

Foreign keys are followed in both directions.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Mapping

from ray_sql.database.schema import Links, Schema

Neighbours = Mapping[str, list[str]]
"""Table → the tables that a foreign key connects it with, in lower case, in the schema's order."""


def complete(links: Links, schema: Schema) -> Links:
    """Return links in the schema's order, with the keys and tables that joins need.

    Names that the schema lacks are left out. Linked tables that no foreign keys connect get the
    fewest tables between them that do. Every table has its primary key, and the foreign keys to the
    other tables at both ends.
    """
    columns = {
        table.lower(): {name.lower() for name in names}
        for table, names in links.items()
        if schema.table(table)
    }
    neighbours = _neighbours(schema)
    kept = _connected([name for name in neighbours if name in columns], neighbours)
    wanted = {name: columns.get(name, set()) for name in kept}
    tables = [table for table in schema.tables if table.name.lower() in kept]
    for table in tables:
        wanted[table.name.lower()] |= {name.lower() for name in table.primary_key}
        for key in table.foreign_keys:
            other = key.ref_table.lower()
            if other in kept:
                wanted[table.name.lower()] |= {name.lower() for name in key.columns}
                wanted[other] |= {name.lower() for name in key.ref_columns}
    return {
        table.name: [
            name for name in table.column_names if name.lower() in wanted[table.name.lower()]
        ]
        for table in tables
    }


def _neighbours(schema: Schema) -> Neighbours:
    neighbours: dict[str, list[str]] = {table.name.lower(): [] for table in schema.tables}
    for table in schema.tables:
        for key in table.foreign_keys:
            one, other = table.name.lower(), key.ref_table.lower()
            if other in neighbours and other != one:
                neighbours[one].append(other)
                neighbours[other].append(one)
    return neighbours


def _connected(tables: list[str], neighbours: Neighbours) -> set[str]:
    """Return the tables and those on the shortest ways between them, where there are any."""
    kept: set[str] = set()
    while waiting := [table for table in tables if table not in kept]:
        group = {waiting[0]}
        while way := _shortest_way(group, set(waiting) - group, neighbours):
            group |= way
        kept |= group
    return kept


def _shortest_way(
    start: Collection[str], goals: Collection[str], neighbours: Neighbours
) -> set[str]:
    """Return the tables from a group to the nearest goal, with it; none where none is reached."""
    came_from: dict[str, str | None] = dict.fromkeys(sorted(start))
    queue = deque(came_from)
    while queue:
        table = queue.popleft()
        if table in goals:
            way: set[str] = set()
            step: str | None = table
            while step is not None:
                way.add(step)
                step = came_from[step]
            return way
        for other in neighbours[table]:
            if other not in came_from:
                came_from[other] = table
                queue.append(other)
    return set()
