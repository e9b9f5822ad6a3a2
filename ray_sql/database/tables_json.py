"""Read the `tables.json` of Spider and BIRD: every schema of a dataset in one file.

Each database has these keys:

- `table_names_original`: names.
- `column_names_original`: pairs `[table index, name]`, the first of them `[-1, "*"]`.
- `column_types`: one for each column.
- `primary_keys`: column indices (in BIRD a list of them for a composite key).
- `foreign_keys`: pairs of column indices.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ray_sql.config.files import read_json
from ray_sql.database.schema import Column, ForeignKey, Schema, Table
from ray_sql.errors import DataError

_Place = tuple[int, str]  # (table index, column name)
_KEYS = (
    "table_names_original",
    "column_names_original",
    "column_types",
    "primary_keys",
    "foreign_keys",
)


def read_tables_json(path: str | Path) -> dict[str, Schema]:
    """Return db_id → schema, with original names and the file's own type words.

    Raises:
        DataError: no such file, no JSON, or a malformed entry, by file, database and key.
    """
    entries = read_json(list[Any], path, "give a list with one object a database")
    schemas = [_read_entry(entry, f"{path}: entry {index}") for index, entry in enumerate(entries)]
    return {schema.db_id: schema for schema in schemas}


def _read_entry(entry: Any, where: str) -> Schema:
    if not isinstance(entry, dict) or not isinstance(entry.get("db_id"), str):
        raise DataError(f"{where}: must be an object with a text `db_id`")
    where = f"{where} (db_id {entry['db_id']})"
    for key in _KEYS:
        if not isinstance(entry.get(key), list):
            raise DataError(f"{where}: `{key}` must be a list")
    if not all(isinstance(name, str) for name in entry["table_names_original"]):
        raise DataError(f"{where}: `table_names_original` must hold texts")
    places = _places(entry, where)
    types = entry["column_types"]
    if len(types) != len(places):
        raise DataError(f"{where}: `column_types` has {len(types)} items for {len(places)} columns")
    primary = _primary_keys(entry, places, where)
    foreign = _foreign_keys(entry, places, primary, where)
    tables = []
    for index, name in enumerate(entry["table_names_original"]):
        columns = [
            Column(column, str(kind))
            for (table, column), kind in zip(places, types, strict=True)
            if table == index
        ]
        keys = primary.get(index, ()), foreign.get(index, ())
        tables.append(Table(name, tuple(columns), *keys))
    return Schema(entry["db_id"], tuple(tables))


def _places(entry: Mapping[str, Any], where: str) -> list[_Place]:
    tables = len(entry["table_names_original"])
    for item in entry["column_names_original"]:
        match item:
            case [int(table), str()] if -1 <= table < tables:
                pass
            case _:
                raise DataError(
                    f"{where}: `column_names_original` must hold [table index, name] pairs, found "
                    f"{item!r}"
                )
    return [(table, name) for table, name in entry["column_names_original"]]


def _place(index: Any, places: list[_Place], key: str, where: str) -> _Place:
    if isinstance(index, int) and 0 <= index < len(places) and places[index][0] >= 0:
        return places[index]
    raise DataError(f"{where}: `{key}` must hold indices of columns, found {index!r}")


def _primary_keys(
    entry: Mapping[str, Any], places: list[_Place], where: str
) -> dict[int, tuple[str, ...]]:
    keys: dict[int, tuple[str, ...]] = {}
    for item in entry["primary_keys"]:
        for index in item if isinstance(item, list) else [item]:
            table, name = _place(index, places, "primary_keys", where)
            keys[table] = (*keys.get(table, ()), name)
    return keys


def _foreign_keys(
    entry: Mapping[str, Any],
    places: list[_Place],
    primary: Mapping[int, tuple[str, ...]],
    where: str,
) -> dict[int, tuple[ForeignKey, ...]]:
    # The inner dict keeps the order and drops repeated pairs.
    pairs: dict[tuple[int, int], dict[tuple[str, str], None]] = {}
    for item in entry["foreign_keys"]:
        if not isinstance(item, list) or len(item) != 2:
            raise DataError(
                f"{where}: `foreign_keys` must hold pairs of column indices, found {item!r}"
            )
        table, name = _place(item[0], places, "foreign_keys", where)
        target, ref = _place(item[1], places, "foreign_keys", where)
        pairs.setdefault((table, target), {})[name, ref] = None
    keys: dict[int, tuple[ForeignKey, ...]] = {}
    for (table, target), joined in pairs.items():
        target_name = entry["table_names_original"][target]
        for group in _group(list(joined), primary.get(target, ())):
            names, refs = zip(*group, strict=True)
            keys[table] = (*keys.get(table, ()), ForeignKey(names, target_name, refs))
    return keys


def _group(pairs: list[tuple[str, str]], key: Iterable[str]) -> list[list[tuple[str, str]]]:
    """Group the pairs between two tables into keys: one composite key, or a key per pair.

    The file does not say which pairs belong together. They do when no column occurs twice on either
    side and they cover the target's primary key, of which Spider lists only the first column.
    """
    names, refs = {name for name, _ in pairs}, {ref for _, ref in pairs}
    composite = len(names) == len(refs) == len(pairs) and bool(key) and set(key) <= refs
    return [pairs] if composite else [[pair] for pair in pairs]
