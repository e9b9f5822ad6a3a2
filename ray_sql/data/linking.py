"""Schema links: which tables and columns a question's SQL needs, exactly, and how a model writes them down.

Labels come from the scopes of the parsed query, not from the words in it: a column counts for the table it belongs
to in its own subquery, CTE or half of a UNION, and a name inside a string never counts. Answers are real JSON, and
nothing that a model wrote is ever evaluated as code.
"""

import ast
import json
import re
from collections.abc import Iterable
from functools import lru_cache

from sqlglot import exp, parse
from sqlglot.errors import SqlglotError
from sqlglot.optimizer.normalize_identifiers import normalize_identifiers
from sqlglot.optimizer.qualify import qualify
from sqlglot.optimizer.scope import Scope, traverse_scope
from sqlglot.schema import MappingSchema

from ray_sql.database import Links, Schema
from ray_sql.errors import DataError

# After parsing, names match as in SQLite, in any case and quoted or not, whatever the query's dialect.
_MATCHING = "sqlite"

_FENCED = re.compile(r"```(?:json)?\s*(.*?)\s*(?:```|\Z)", re.DOTALL | re.IGNORECASE)
_LONGEST_LITERAL = 100_000


class LinkError(DataError):
    """A query whose links cannot be told: it does not parse, or it names a table that its schema lacks."""


def gold_links(sql: str, schema: Schema, dialect: str = "sqlite") -> Links:
    """The tables and columns that a query reads, spelled and ordered as in the schema.

    `*` names no columns, so `count(*)` gives its table with none. What is no column of the tables at hand (a string
    in double quotes, an output alias, a rowid) gives no link.

    Args:
        dialect: how to parse the query, in sqlglot's words.

    Raises:
        LinkError: with one line that names the query or the table.
    """
    try:
        tree = normalize_identifiers(_parse(sql, dialect), dialect=_MATCHING)
        known, mapping = _lookup(schema)
        _check_tables(traverse_scope(tree), known, schema.db_id)
        qualified = qualify(
            tree,
            dialect=_MATCHING,
            schema=mapping,
            allow_partial_qualification=True,
            validate_qualify_columns=False,
            expand_stars=False,
            quote_identifiers=False,
        )
        used = _used_columns(traverse_scope(qualified), known)
    except (SqlglotError, RecursionError) as error:
        raise LinkError(
            f"query that cannot be analysed ({_one_line(str(error))}): {_one_line(sql)}"
        ) from error
    return {
        table.name: [
            name for name in table.column_names if name.lower() in used[table.name.lower()]
        ]
        for table in schema.tables
        if table.name.lower() in used
    }


def _parse(sql: str, dialect: str) -> exp.Query:
    statements = [statement for statement in parse(sql, read=dialect) if statement is not None]
    match statements:
        case [exp.Query() as query]:
            return query
        case _:
            raise LinkError(
                f"must be one query that reads, found {len(statements)} statements: {_one_line(sql)}"
            )


def _one_line(text: str) -> str:
    """Text that fits in an error message; sqlglot underlines errors with terminal codes."""
    return " ".join(re.sub(r"\x1b\[[0-9;]*m", "", text).split())[:200]


_Known = dict[str, frozenset[str]]  # table -> columns, all in lower case
_Source = exp.Expression | Scope  # what a query reads from


@lru_cache(maxsize=256)
def _lookup(schema: Schema) -> tuple[_Known, MappingSchema]:
    """The names of a schema, for us and for sqlglot; cached, because a database has many questions."""
    known = {
        table.name.lower(): frozenset(name.lower() for name in table.column_names)
        for table in schema.tables
    }
    types: dict[str, object] = {
        table: dict.fromkeys(columns, "text") for table, columns in known.items() if columns
    }
    return known, MappingSchema(types, dialect=_MATCHING, normalize=False)


def _table_name(source: _Source) -> str:
    """The name of a stored table; empty for a subquery, a CTE or a table function."""
    return source.name if isinstance(source, exp.Table) else ""


def _check_tables(scopes: list[Scope], known: _Known, db_id: str) -> None:
    names = {_table_name(source) for scope in scopes for source in scope.sources.values()}
    missing = ", ".join(sorted(names - known.keys() - {""}))
    if missing:
        raise LinkError(f"query on tables that the schema of {db_id} lacks: {missing}")


def _used_columns(scopes: list[Scope], known: _Known) -> dict[str, set[str]]:
    """Every table that the scopes read, with the columns that they name."""
    names = {_table_name(source) for scope in scopes for source in scope.sources.values()}
    used: dict[str, set[str]] = {name: set() for name in names - {""}}
    for scope in scopes:
        for column in scope.columns:
            # A qualifier from an enclosing query is met again in that query's scope. What sqlglot left unqualified is
            # an alias, a string, or comes through the star of a subquery; only then does one of the sources own it.
            sources = [
                source for name, source in scope.sources.items() if column.table in ("", name)
            ]
            for table in {table for source in sources for table in _origins(source, column.name)}:
                if column.name in known[table]:
                    used[table].add(column.name)
    return used


def _origins(source: _Source, column: str) -> set[str]:
    """The stored tables that a column of this source may come from, through `SELECT *` however deep."""
    if not isinstance(source, Scope):
        return {_table_name(source)} - {""}
    return {name for inner in _starred(source, column) for name in _origins(inner, column)}


def _starred(scope: Scope, column: str) -> Iterable[_Source]:
    """The sources of which a subquery passes all columns on, unless it defines the column itself."""
    if scope.set_operation_scopes:
        return scope.set_operation_scopes
    if not isinstance(scope.expression, exp.Query) or column in scope.expression.named_selects:
        return []
    stars = [projection for projection in scope.expression.selects if projection.is_star]
    if any(isinstance(star, exp.Star) for star in stars):
        return scope.sources.values()
    return [
        scope.sources[star.table]
        for star in stars
        if isinstance(star, exp.Column) and star.table in scope.sources
    ]


def format_links(links: Links) -> str:
    """Links as a model is to write them: one line of JSON, without a fence.

    Example: `{"singer": ["name", "age"], "concert": []}`
    """
    return json.dumps(links, ensure_ascii=False)


def parse_links(answer: str) -> Links | None:
    """The links in a model's answer, each column once; None unless they are a JSON object of lists of names.

    Reads the first fenced block, also one that was cut off before its end; without a fence, or where the object comes before
    it, the first JSON object.
    """
    try:
        fenced = None if answer.lstrip().startswith("{") else _FENCED.search(answer)
        return _as_links(json.loads(fenced[1]) if fenced else _first_object(answer))
    except (ValueError, RecursionError):  # RecursionError: a model that repeats "[" for ever
        return None


def parse_python_literal(text: str) -> Links | None:
    """The links in a Python dict literal, fenced or bare, as older datasets label them. Never for model answers."""
    fenced = _FENCED.search(text)
    literal = fenced[1] if fenced else text.strip()
    if len(literal) > _LONGEST_LITERAL:
        return None
    try:
        return _as_links(ast.literal_eval(literal))
    except (
        ValueError,
        TypeError,
        SyntaxError,
        MemoryError,
        RecursionError,
    ):  # all that literal_eval documents
        return None


def _first_object(text: str) -> object:
    decoder = json.JSONDecoder()
    for brace in re.finditer(r"\{", text):
        try:
            return decoder.raw_decode(text, brace.start())[0]
        except ValueError:
            continue
    return None


def _as_links(value: object) -> Links | None:
    """The value as links, or None; names that UTF-8 cannot store raise UnicodeEncodeError, a ValueError."""
    if not isinstance(value, dict):
        return None
    links: Links = {}
    for table, columns in value.items():
        if not isinstance(table, str) or not isinstance(columns, list):
            return None
        if not all(isinstance(column, str) for column in columns):
            return None
        "".join([table, *columns]).encode()
        links[table] = list(dict.fromkeys(columns))
    return links
