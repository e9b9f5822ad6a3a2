"""Schema links: find the tables and columns that a question's SQL needs, and read a model's own.

Labels come from the scopes of the parsed query, not from its words. A column counts for the table
that it belongs to in its own subquery, CTE or half of a UNION. A name inside a string never counts.
Answers are real JSON, and no text of a model is ever evaluated as code.
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

from ray_sql.database import MOST_ANALYSED, MOST_NODES, Links, Schema
from ray_sql.errors import DataError

# After parsing, names match as in SQLite in every dialect: in any case, quoted or not.
_MATCHING = "sqlite"

_FENCED = re.compile(r"```(?:json)?(.*?)(?:```|\Z)", re.DOTALL | re.IGNORECASE)
_LONGEST_LITERAL = 100_000
"""Characters of an answer or label; a longer one holds no links that anybody could use."""


class LinkError(DataError):
    """A query without links: it does not parse, or it names a table that its schema lacks."""


def gold_links(sql: str, schema: Schema, dialect: str = "sqlite") -> Links:
    """Return the tables and columns that a query reads, spelled and ordered as in the schema.

    `*` names no columns, so `count(*)` gives its table with none. Names that are no column of the
    query's tables give no link: a string in double quotes, an output alias, a rowid.

    Args:
        dialect: the query's dialect, as sqlglot names it.

    Raises:
        LinkError: one line that names the query or the table.
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
    links: Links = {}
    for table in schema.tables:
        columns = used.get(table.name.lower())
        if columns is not None:
            links[table.name] = [name for name in table.column_names if name.lower() in columns]
    return links


def _parse(sql: str, dialect: str) -> exp.Query:
    if len(sql) > MOST_ANALYSED:
        raise LinkError(f"must be at most {MOST_ANALYSED:,} characters, found {len(sql):,}")
    parsed = parse(sql, read=dialect, max_nodes=MOST_NODES)
    statements = [statement for statement in parsed if statement is not None]
    match statements:
        case [exp.Query() as query]:
            return query
        case _:
            raise LinkError(
                f"must be one query that reads, found {len(statements)} statements: "
                f"{_one_line(sql)}"
            )


def _one_line(text: str) -> str:
    """Return text for an error message; sqlglot underlines errors with terminal codes."""
    return " ".join(re.sub(r"\x1b\[[0-9;]*m", "", text).split())[:200]


_Known = dict[str, frozenset[str]]  # table -> columns, all in lower case
_Source = exp.Expression | Scope  # a table or a subquery that a query reads


@lru_cache(maxsize=256)
def _lookup(schema: Schema) -> tuple[_Known, MappingSchema]:
    """Return a schema's names, for us and for sqlglot; cached for a database's many questions."""
    known = schema.lower_names()
    types: dict[str, object] = {
        table: dict.fromkeys(columns, "text") for table, columns in known.items() if columns
    }
    return known, MappingSchema(types, dialect=_MATCHING, normalize=False)


def _table_name(source: _Source) -> str:
    """Return the name of a stored table; empty for a subquery, a CTE or a table function."""
    return source.name if isinstance(source, exp.Table) else ""


def _table_names(scopes: list[Scope]) -> set[str]:
    sources = [source for scope in scopes for source in scope.sources.values()]
    return {_table_name(source) for source in sources} - {""}


def _check_tables(scopes: list[Scope], known: _Known, db_id: str) -> None:
    missing = ", ".join(sorted(_table_names(scopes) - known.keys()))
    if missing:
        raise LinkError(f"query on tables that the schema of {db_id} lacks: {missing}")


def _used_columns(scopes: list[Scope], known: _Known) -> dict[str, set[str]]:
    """Return every table that the scopes read, with the columns that they name."""
    used: dict[str, set[str]] = {name: set() for name in _table_names(scopes)}
    for scope in scopes:
        for column in scope.columns:
            for table in _owners(scope, column):
                if column.name in known[table]:
                    used[table].add(column.name)
    return used


def _owners(scope: Scope, column: exp.Column) -> set[str]:
    """Return the stored tables that may own a column in this scope.

    A qualifier of an enclosing query comes up again in that query's scope. A column that sqlglot
    left unqualified is an alias, a string, or comes through the star of a subquery. Only the last
    belongs to a source.
    """
    tables: set[str] = set()
    for name, source in scope.sources.items():
        if column.table in ("", name):
            tables |= _origins(source, column.name)
    return tables


def _origins(source: _Source, column: str) -> set[str]:
    """Return the stored tables that may own a source's column, through `SELECT *` at any depth."""
    if not isinstance(source, Scope):
        return {_table_name(source)} - {""}
    return {name for inner in _starred(source, column) for name in _origins(inner, column)}


def _starred(scope: Scope, column: str) -> Iterable[_Source]:
    """Return the sources whose columns a subquery all passes on, unless it defines the column."""
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
    """Return links as a model must write them: one line of JSON, without a fence.

    Example: `{"singer": ["name", "age"], "concert": []}`
    """
    return json.dumps(links, ensure_ascii=False)


def parse_links(answer: str) -> Links | None:
    """Return the links in a model's answer, each column once.

    Reads the first fenced block, even one that was cut off. Without a fence, or with an object
    before it, reads the first JSON object. None means no JSON object of lists of names.
    """
    if len(answer) > _LONGEST_LITERAL:
        return None
    fenced = _FENCED.search(answer)
    try:
        if fenced is None or answer.lstrip().startswith("{"):
            return _as_links(_first_object(answer))
        return _as_links(json.loads(fenced[1]))
    except (ValueError, RecursionError):  # A model may repeat "[" until RecursionError.
        return None


def parse_python_literal(text: str) -> Links | None:
    """Return the links in a Python dict literal of an older dataset; never for model answers."""
    if len(text) > _LONGEST_LITERAL:
        return None
    fenced = _FENCED.search(text)
    literal = (fenced[1] if fenced else text).strip()
    try:
        return _as_links(ast.literal_eval(literal))
    # All errors that literal_eval documents.
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
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
    """Return the value as links, or None.

    Names that UTF-8 cannot store raise UnicodeEncodeError, a ValueError.
    """
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
