"""Find the stored tables and columns that a parsed query reads, as the database itself finds them.

A name means what it means in its own subquery, CTE or half of a UNION, or else in the query around
it. Any other name reads nothing by itself: an alias, a text in double quotes, or a column of a
table function.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from sqlglot import exp

Owner = tuple[str, str]
"""A stored column as (table, column), in lower case."""

DEFAULT_NAMESPACES = ("main", "temp", "public", "dbo")
"""Names that databases give to the schema whose tables need no qualifier."""

ROW_NAMES = frozenset({"rowid", "oid", "_rowid_", "ctid"})
"""Columns that tables have without being declared."""

_TREE = "key value type atom id parent fullkey path json root"
FUNCTION_COLUMNS = {
    "json_each": _TREE.split(),
    "json_tree": _TREE.split(),
    "jsonb_each": _TREE.split(),
    "jsonb_tree": _TREE.split(),
    "generate_series": "value start stop step".split(),
}
"""The columns of SQLite's table functions, which hide those of the queries around."""


@dataclass(frozen=True)
class Relation:
    """The columns that a table or a subquery offers, in order.

    Each has the stored columns which it passes on unread, as `SELECT *` does.
    """

    columns: tuple[tuple[str, frozenset[Owner]], ...] = ()

    def owners(self, name: str) -> frozenset[Owner] | None:
        """Return the stored columns behind the first column of a name, None if there is none."""
        return next((owners for column, owners in self.columns if column == name), None)

    def renamed(self, names: list[str]) -> Relation:
        """Return the relation as an alias with a list of columns calls it: `AS t (a, b)`."""
        if not self.columns:
            return named(names)
        kept = self.columns[len(names) :]
        pairs = zip(names, self.columns, strict=False)
        return Relation((*((name.lower(), owners) for name, (_, owners) in pairs), *kept))


@dataclass
class Scope:
    """A SELECT's sources by alias, the aliases that it gives, its CTEs, and the scope around it."""

    ctes: Mapping[str, Relation]
    outer: Scope | None
    sources: list[tuple[str, Relation]] = field(default_factory=list)
    aliases: set[str] = field(default_factory=set)
    shared: set[str] = field(default_factory=set)
    """Names that USING and NATURAL JOIN make one column."""


def named(names: Iterable[str]) -> Relation:
    """Return a relation whose columns pass no stored ones on."""
    return Relation(tuple((name.lower(), frozenset()) for name in names))


class Reader:
    """Read queries against the stored tables of `known`; collect what they use and miss."""

    def __init__(self, known: Mapping[str, tuple[str, ...]]) -> None:
        self.known = known
        self.used: dict[str, set[str]] = {}
        self.missing: set[str] = set()

    def query(
        self,
        node: exp.Expr,
        outer: Scope | None,
        ctes: Mapping[str, Relation],
        recursive: exp.CTE | None = None,
    ) -> Relation:
        """Read a query with its subqueries, and return its columns.

        `recursive` is the CTE whose body the query is, where its later parts may read it.
        """
        ctes = self._with(node, outer, ctes)
        if isinstance(node, exp.Select):
            return self._select(node, Scope(ctes, outer))
        scope = Scope(ctes, outer)
        if isinstance(node, exp.SetOperation):
            relation = self._combined(node, outer, ctes, recursive)
        elif isinstance(node, exp.Subquery) and isinstance(node.this, exp.Query):
            relation = self.query(node.this, outer, ctes)
        else:  # VALUES, and a table in parentheses.
            self._source(node, scope)
            return _all_columns(scope)
        scope.sources = [("", relation)]
        self._expressions(_arguments(node, without=("this", "expression", "with_")), scope)
        return relation

    def _with(
        self, node: exp.Expr, outer: Scope | None, ctes: Mapping[str, Relation]
    ) -> Mapping[str, Relation]:
        """Read the CTEs of a query; return those that it sees."""
        clause = node.args.get("with_")
        if clause is None:
            return ctes
        seen = dict(ctes)
        for cte in clause.expressions:
            name = cte.alias.lower()
            is_recursive = clause.recursive or name not in self.known
            body = self.query(cte.this, outer, dict(seen), cte if is_recursive else None)
            seen[name] = body.renamed(cte.alias_column_names)
        return seen

    def _combined(
        self,
        node: exp.SetOperation,
        outer: Scope | None,
        ctes: Mapping[str, Relation],
        recursive: exp.CTE | None,
    ) -> Relation:
        """Read the parts of a set operation; its columns have the first part's names."""
        first, *parts = _parts(node)
        relation = self.query(first, outer, ctes)
        if recursive is not None:
            itself = relation.renamed(recursive.alias_column_names)
            ctes = {**ctes, recursive.alias.lower(): itself}
        others = [self.query(part, outer, ctes) for part in parts]
        columns = [set(owners) for _, owners in relation.columns]
        for other in others:
            for owners, (_, more) in zip(columns, other.columns, strict=False):
                owners |= more
        names = [name for name, _ in relation.columns]
        return Relation(tuple(zip(names, map(frozenset, columns), strict=True)))

    def _select(self, node: exp.Select, scope: Scope) -> Relation:
        source = node.args.get("from_")
        joins = node.args.get("joins") or []
        if source is not None:
            self._source(source.this, scope)
        for join in [*joins, *(node.args.get("laterals") or [])]:
            self._join(join, scope)
        scope.aliases = {
            item.alias.lower() for item in node.expressions if isinstance(item, exp.Alias)
        }
        rest = _arguments(node, without=("from_", "joins", "laterals", "with_", "order"))
        conditions = [join.args["on"] for join in joins if join.args.get("on") is not None]
        self._expressions([*rest, *conditions], scope)
        order = node.args.get("order")
        outputs = {_output_name(item) for item in node.expressions}
        for key in order.expressions if order is not None else ():
            if not _is_output(key, outputs):
                self._expressions([key], scope)
        return self._offered(node, scope)

    def _offered(self, node: exp.Select, scope: Scope) -> Relation:
        columns: list[tuple[str, frozenset[Owner]]] = []
        for item in node.expressions:
            if isinstance(item, exp.Star):
                columns += _all_columns(scope).columns
            elif isinstance(item, exp.Column) and isinstance(item.this, exp.Star):
                columns += _columns_of(scope, item.table.lower())
            else:
                columns.append((_output_name(item), frozenset()))
        return Relation(tuple(columns))

    def _join(self, node: exp.Expr, scope: Scope) -> None:
        """Add the right side of a join, and use the columns which it shares with the left."""
        if not isinstance(node, exp.Join):
            return self._source(node, scope)
        left = _all_columns(scope)
        before = len(scope.sources)
        self._source(node.this, scope)
        right = _all_columns(Scope({}, None, scope.sources[before:]))
        names = {column.name.lower() for column in node.args.get("using") or ()}
        if node.method == "NATURAL":
            names = {name for name, _ in left.columns} & {name for name, _ in right.columns}
        scope.shared |= names
        for name in names:
            self._use((left.owners(name) or frozenset()) | (right.owners(name) or frozenset()))
        return None

    def _source(self, node: exp.Expr, scope: Scope) -> None:
        """Add what stands in a FROM to the sources of its scope."""
        name = node.alias_or_name.lower()
        alias = node.args.get("alias")
        columns = alias.columns if isinstance(alias, exp.TableAlias) else []
        if isinstance(node, exp.Table):
            relation = self._table(node, scope)
        elif isinstance(node, exp.Subquery) and isinstance(node.this, exp.Query):
            relation = self.query(node.this, scope.outer, self._with(node, scope.outer, scope.ctes))
        elif isinstance(node, exp.Subquery):
            inner = Scope(scope.ctes, scope.outer)
            self._source(node.this, inner)
            if not node.alias:
                scope.sources += inner.sources
                scope.shared |= inner.shared
            relation = _all_columns(inner) if node.alias else Relation()
        elif isinstance(node, exp.Lateral) and isinstance(node.this, exp.Subquery):
            relation = self.query(node.this, scope, scope.ctes)
        else:  # UNNEST, VALUES and other functions: they see the tables before them.
            relation = Relation()
            self._expressions(_arguments(node, without=("alias",)), scope)
        scope.sources.append((name, relation.renamed([column.name for column in columns])))
        for join in node.args.get("joins") or ():
            self._join(join, scope)
            if join.args.get("on") is not None:
                self._expressions([join.args["on"]], scope)

    def _table(self, node: exp.Table, scope: Scope) -> Relation:
        if not isinstance(node.this, exp.Identifier):
            self._expressions([node.this], scope)
            # PostgreSQL calls the one column of a function by the function's alias.
            return named([*FUNCTION_COLUMNS.get(_function(node.this), ()), node.alias])
        name = node.name.lower()
        if not node.db and name in scope.ctes:
            return scope.ctes[name]
        return self._stored(f"{node.db.lower()}.{name}" if node.db else name)

    def _stored(self, name: str) -> Relation:
        """Use a stored table; another schema's is known with that schema's name before it."""
        name = self._known_name(name)
        if name not in self.known:
            self.missing.add(name)
            return Relation()
        self.used.setdefault(name, set())
        return Relation(tuple((column, frozenset([(name, column)])) for column in self.known[name]))

    def _known_name(self, name: str) -> str:
        """Return the name in `known` that a table means, or the name as it is written."""
        namespace, _, own = name.rpartition(".")
        if name in self.known or namespace:
            default = name not in self.known and namespace in DEFAULT_NAMESPACES
            return own if default else name
        # A role's search path may lead to another schema.
        alike = [known for known in self.known if known.endswith(f".{own}")]
        return alike[0] if len(alike) == 1 else name

    def _expressions(self, nodes: Iterable[exp.Expr], scope: Scope) -> None:
        """Use the columns in expressions, and read the subqueries in them."""
        pending = list(nodes)
        # Not recursive: a generated chain of conditions can be deeper than Python's stack.
        while pending:
            node = pending.pop()
            if isinstance(node, exp.Column):
                self._column(node, scope)
            elif isinstance(node, exp.Query):
                self.query(node, scope, scope.ctes)
            elif isinstance(node, exp.In) and isinstance(node.args.get("field"), exp.Column):
                pending.append(node.this)
                self._table(exp.Table(this=node.args["field"].this), scope)
            else:
                pending += node.iter_expressions()

    def _column(self, node: exp.Column, scope: Scope | None) -> None:
        """Use a column of the nearest scope that has it."""
        name, table = node.name.lower(), node.table.lower()
        while scope is not None:
            sources = [relation for alias, relation in scope.sources if not table or alias == table]
            found = [owners for source in sources if (owners := source.owners(name)) is not None]
            if found:
                return self._use(frozenset().union(*found))
            if (table and sources) or (not table and name in scope.aliases):
                return None
            scope = scope.outer
        return None

    def _use(self, owners: Iterable[Owner]) -> None:
        for table, column in owners:
            self.used[table].add(column)


def _arguments(node: exp.Expr, without: tuple[str, ...]) -> list[exp.Expr]:
    """Return the expressions under a node, but for those of the arguments named."""
    return [child for child in node.iter_expressions() if child.arg_key not in without]


def _parts(node: exp.Expr) -> list[exp.Expr]:
    """Return the parts of a chain of set operations in order, but for those in parentheses."""
    parts: list[exp.Expr] = []
    while isinstance(node, exp.SetOperation):
        parts.append(node.expression)
        node = node.this
    return [node, *reversed(parts)]


def _output_name(item: exp.Expr) -> str:
    while isinstance(item, exp.Paren | exp.Collate):
        item = item.this
    return item.alias_or_name.lower()


def _is_output(key: exp.Expr, outputs: set[str]) -> bool:
    """Tell whether a key of ORDER BY is an output of its query, which then comes first."""
    while isinstance(key, exp.Ordered | exp.Paren | exp.Collate):
        key = key.this
    return isinstance(key, exp.Column) and not key.table and key.name.lower() in outputs


def _all_columns(scope: Scope) -> Relation:
    """Return the columns that `*` gives."""
    columns = [column for _, relation in scope.sources for column in relation.columns]
    once: dict[str, set[Owner]] = {name: set() for name in scope.shared}
    for name, owners in columns:
        if name in once:
            once[name] |= owners
    kept = []
    for name, owners in columns:
        if name not in scope.shared:
            kept.append((name, owners))
        elif name in once:
            kept.append((name, frozenset(once.pop(name))))
    return Relation(tuple(kept))


def _function(node: exp.Expr) -> str:
    if isinstance(node, exp.Func) and not isinstance(node, exp.Anonymous):
        return str(node.sql_name()).lower()
    return node.name.lower()


def _columns_of(scope: Scope, alias: str) -> tuple[tuple[str, frozenset[Owner]], ...]:
    return next((source.columns for name, source in scope.sources if name == alias), ())
