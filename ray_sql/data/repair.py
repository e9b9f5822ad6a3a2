"""Replace names in an answer that its schema lacks by the nearest name in scope.

Only where one name is clearly nearest. A name that exists is never touched, so a valid answer stays
as it is, to the letter. Tables are mended first, then the columns of each subquery, CTE or half of
a UNION by the tables that it reads. A column behind the wrong alias moves to the one table in scope
that has it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

from rapidfuzz import fuzz, process
from sqlglot import exp, parse
from sqlglot.errors import SqlglotError
from sqlglot.optimizer.scope import Scope, traverse_scope

from ray_sql.data.names import ROW_NAMES
from ray_sql.database import Schema

NEAR = 70.0
"""Similarity from which a name may stand for another, of 100."""
CLEARLY = 8.0
"""Similarity by which the nearest name must be ahead of the next one."""


def nearest(name: str, options: Collection[str]) -> str | None:
    """Return the option that is clearly nearest to a name, by letters or by words, if there is one.

    Upper and lower case count as equal.
    """
    if not options:
        return None
    ranked = process.extract(name, sorted(options), scorer=_similarity, limit=2)
    (best, score, _), *others = ranked
    if score < NEAR or any(score - other < CLEARLY for _, other, _ in others):
        return None
    return str(best)


def _similarity(left: str, right: str, **_: object) -> float:
    """Return the similarity of two names, of 100: of their letters, or of their sorted words."""
    letters = fuzz.ratio(left.lower(), right.lower())
    by_words = fuzz.token_sort_ratio(_words(left), _words(right))
    return max(letters, by_words)


def _words(name: str) -> str:
    """Return the words of a name in camel case or with underscores."""
    apart = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", name)
    return re.sub(r"[\W_]+", " ", apart).lower().strip()


def repair_sql(sql: str, schema: Schema, dialect: str = "sqlite") -> str:
    """Return a query with names that exist, or the same query where nothing is clear."""
    try:
        statements = [statement for statement in parse(sql, read=dialect) if statement is not None]
        if len(statements) != 1 or not isinstance(statements[0], exp.Query):
            return sql
        return _Repair(sql, statements[0], schema, dialect).run()
    except (SqlglotError, RecursionError):
        return sql


@dataclass
class _Names:
    """The names that a source of a scope has; `open` where they are not all known."""

    columns: dict[str, str] = field(default_factory=dict)
    """Lower case → as it is spelled."""
    open: bool = False


class _Repair:
    def __init__(self, sql: str, tree: exp.Query, schema: Schema, dialect: str) -> None:
        self._sql, self._tree, self._schema, self._dialect = sql, tree, schema, dialect
        self._edits: dict[tuple[int, int], str] = {}

    def run(self) -> str:
        renamed = self._mend_tables()
        scopes = traverse_scope(self._tree)
        for scope in scopes:
            self._mend_columns(scope, renamed)
        text = self._sql
        for (start, end), name in sorted(self._edits.items(), reverse=True):
            text = text[:start] + name + text[end + 1 :]
        return text

    def _mend_tables(self) -> dict[str, str]:
        """Mend the names of tables; return old → new, in lower case."""
        known = {name.lower() for name in self._schema.table_names}
        made = {cte.alias.lower() for cte in self._tree.find_all(exp.CTE)}
        renamed = {}
        for table in list(self._tree.find_all(exp.Table)):
            identifier = table.this
            if not isinstance(identifier, exp.Identifier) or table.args.get("db"):
                continue
            old = identifier.name.lower()
            if old in known or old in made or not old:
                continue
            new = nearest(identifier.name, [*self._schema.table_names, *made])
            if new is None:
                continue
            self._replace(identifier, new)
            renamed[old] = new.lower()
        return renamed

    def _mend_columns(self, scope: Scope, renamed: Mapping[str, str]) -> None:
        visible = dict(self._sources(scope))
        query = scope.expression
        selects = query.selects if isinstance(query, exp.Query) else []
        aliases = {select.alias.lower() for select in selects if select.alias}
        for column in scope.columns:
            identifier, qualifier = column.this, column.args.get("table")
            if not isinstance(identifier, exp.Identifier) or column.args.get("db"):
                continue
            name = identifier.name.lower()
            if qualifier is None:
                self._mend_unqualified(identifier, name, visible, aliases)
                continue
            source = qualifier.name.lower()
            if source not in visible and renamed.get(source) in visible:
                source = renamed[source]
                self._replace(qualifier, source)
            self._mend_qualified(identifier, name, qualifier, source, visible)

    def _mend_unqualified(
        self,
        identifier: exp.Identifier,
        name: str,
        visible: Mapping[str, _Names],
        aliases: Collection[str],
    ) -> None:
        if self._dialect == "sqlite" and self._sql[identifier.meta.get("start", 0)] == '"':
            return  # SQLite reads such a word that is no name as text
        if name in aliases or name in ROW_NAMES or any(one.open for one in visible.values()):
            return
        options = {lower: word for one in visible.values() for lower, word in one.columns.items()}
        if name not in options and (new := nearest(name, list(options))):
            self._replace(identifier, options[new])

    def _mend_qualified(
        self,
        identifier: exp.Identifier,
        name: str,
        qualifier: exp.Identifier,
        source: str,
        visible: Mapping[str, _Names],
    ) -> None:
        names = visible.get(source)
        if names and (names.open or name in names.columns or name in ROW_NAMES):
            return
        owners = [other for other, one in visible.items() if name in one.columns]
        if len(owners) == 1 and not any(one.open for one in visible.values()):
            self._replace(qualifier, owners[0])
        elif names and not owners and (new := nearest(name, list(names.columns))):
            self._replace(identifier, names.columns[new])

    def _sources(self, scope: Scope) -> Iterator[tuple[str, _Names]]:
        """Yield the sources that a scope sees, with their columns; nearer ones come last."""
        if scope.parent is not None:
            yield from self._sources(scope.parent)
        for alias, source in scope.sources.items():
            yield alias.lower(), self._names(source)

    def _names(self, source: exp.Expression | Scope) -> _Names:
        if isinstance(source, Scope):
            query = source.expression
            selects = query.named_selects if isinstance(query, exp.Query) else ["*"]
            listed = source.expression.args.get("alias")
            renamed = [] if listed is None else [column.name for column in listed.columns]
            return _Names({name.lower(): name for name in renamed or selects}, "*" in selects)
        table = self._schema.table(source.name)
        if table is None:
            return _Names(open=True)
        return _Names({name.lower(): name for name in table.column_names})

    def _replace(self, identifier: exp.Identifier, name: str) -> None:
        quoted = identifier.quoted or not re.fullmatch(r"[A-Za-z_]\w*", name)
        new = exp.to_identifier(name, quoted=quoted)
        place = identifier.meta.get("start"), identifier.meta.get("end")
        if isinstance(place[0], int) and isinstance(place[1], int):
            self._edits[place[0], place[1]] = new.sql(self._dialect)
            identifier.set("this", name)


def repair_links(text: str, schema: Schema) -> str:
    """Return links, a JSON object as text, with names that exist where one is clear."""
    links: dict[str, list[str]] = {}
    for name, columns in json.loads(text).items():
        table = schema.table(name) or schema.table(nearest(name, schema.table_names) or "")
        if table is None:
            links[name] = columns
            continue
        kept = links.setdefault(table.name, [])
        for column in columns:
            exists = table.column(column)
            spelled = exists.name if exists else nearest(column, table.column_names) or column
            if spelled not in kept:
                kept.append(spelled)
    return json.dumps(links)
