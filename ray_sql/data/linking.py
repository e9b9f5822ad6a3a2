"""Schema links: find the tables and columns that a question's SQL needs, and read a model's own.

Labels come from the scopes of the parsed query, not from its words. A column counts for the table
that it belongs to in its own subquery, CTE or half of a UNION. A name inside a string never counts.
Answers are real JSON, and no text of a model is ever evaluated as code.
"""

import ast
import json
import re
from collections.abc import Callable
from functools import lru_cache
from itertools import islice

from sqlglot import exp, parse
from sqlglot.errors import SqlglotError

from ray_sql.data.answers import after_thoughts, code_blocks
from ray_sql.data.names import Reader
from ray_sql.database import MOST_ANALYSED, MOST_NODES, Links, Schema, sqlite_words
from ray_sql.errors import DataError

_FENCED = re.compile(r"```(?:json)?(.*?)(?:```|\Z)", re.DOTALL | re.IGNORECASE)
_BLOCK_INFO = re.compile(r"\A[^\n{\[]*(?:\{[.#][^}\n]*\})?\s*")
"""The words behind an opening fence, before JSON."""
_LONGEST_LITERAL = 100_000
"""Characters of an answer or label; a longer one holds no links that anybody could use."""
_MOST_BRACES = 1_000
"""Braces that are tried as the begin of an answer's object."""
_SQLGLOT_NAMES = {
    "postgresql": "postgres",
    "mysql": "mysql",
    "mariadb": "mysql",
    "duckdb": "duckdb",
    "mssql": "tsql",
}
"""Dialect as SQLAlchemy names it → as sqlglot does; any other is read as SQLite's."""


def sqlglot_dialect(name: str) -> str:
    """Return the name that sqlglot has for a dialect, e.g. that of `Schema.dialect`."""
    return _SQLGLOT_NAMES.get(name, "sqlite")


class LinkError(DataError):
    """A query without links: it does not parse, or it names a table that its schema lacks."""


def gold_links(sql: str, schema: Schema, dialect: str | None = None) -> Links:
    """Return the tables and columns that a query reads, spelled and ordered as in the schema.

    `*` names no columns, so `count(*)` gives its table with none. Names that are no column of the
    query's tables give no link: a string in double quotes, an output alias, a rowid.

    Args:
        dialect: the query's dialect, as sqlglot names it; its database's own if not given.

    Raises:
        LinkError: one line that names the query or the table.
    """
    try:
        reader = Reader(_known(schema))
        reader.query(_parse(sql, dialect or sqlglot_dialect(schema.dialect)), None, {})
    except (SqlglotError, RecursionError) as error:
        raise LinkError(
            f"query that cannot be analysed ({_one_line(str(error))}): {_one_line(sql)}"
        ) from error
    if reader.missing:
        missing = ", ".join(sorted(reader.missing))
        raise LinkError(f"query on tables that the schema of {schema.db_id} lacks: {missing}")
    used = reader.used
    links: Links = {}
    for table in schema.tables:
        columns = used.get(table.name.lower())
        if columns is not None:
            links[table.name] = [name for name in table.column_names if name.lower() in columns]
    return links


def _parse(sql: str, dialect: str) -> exp.Expr:
    if len(sql) > MOST_ANALYSED:
        raise LinkError(f"must be at most {MOST_ANALYSED:,} characters, found {len(sql):,}")
    if dialect == "sqlite":
        parsed = sqlite_words.parse(sql, sqlite_words.tokenize(sql))
    else:
        parsed = parse(sql, read=dialect, max_nodes=MOST_NODES)
    statements = [one for one in parsed if not isinstance(one, exp.Semicolon | None)]
    match statements:
        case [exp.Query() | exp.Values() as query]:
            return query
        case _:
            raise LinkError(
                f"must be one query that reads, found {len(statements)} statements: "
                f"{_one_line(sql)}"
            )


def _one_line(text: str) -> str:
    """Return text for an error message; sqlglot underlines errors with terminal codes."""
    return " ".join(re.sub(r"\x1b\[[0-9;]*m", "", text).split())[:200]


@lru_cache(maxsize=256)
def _known(schema: Schema) -> dict[str, tuple[str, ...]]:
    """Return table → its columns in order, all in lower case."""
    return {
        table.name.lower(): tuple(name.lower() for name in table.column_names)
        for table in schema.tables
    }


def format_links(links: Links) -> str:
    """Return links as a model must write them: one line of JSON, without a fence.

    Example: `{"singer": ["name", "age"], "concert": []}`
    """
    return json.dumps(links, ensure_ascii=False)


def parse_links(answer: str) -> Links | None:
    """Return the links in a model's answer, each column once.

    Reads the last code block that has links, behind the thoughts, even one that was cut off.
    Without a block, or with an object before it, reads the first JSON object. None means no JSON
    object of lists of names.
    """
    answer = after_thoughts(answer)
    if len(answer) > _LONGEST_LITERAL:
        return None
    blocks = [_BLOCK_INFO.sub("", block.text, count=1) for block in code_blocks(answer)]
    if not blocks or answer.lstrip().startswith("{"):
        return _read_links(_first_object, answer)
    found = (_read_links(json.loads, block) for block in reversed(blocks))
    return next((links for links in found if links is not None), None)


def _read_links(read: Callable[[str], object], text: str) -> Links | None:
    try:
        return _as_links(read(text))
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
    for brace in islice(re.finditer(r"\{", text), _MOST_BRACES):
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
