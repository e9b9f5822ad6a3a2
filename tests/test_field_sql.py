"""SQL as people write it is kept, read and linked: odd names, dialects, what SQLite runs."""

import sqlite3
from dataclasses import replace

import pytest

from ray_sql.config.sections import PromptSection
from ray_sql.data import Example, prompts
from ray_sql.data.answers import one_line, parse_sql
from ray_sql.data.linking import gold_links
from ray_sql.database import Column, Links, Schema, Table
from ray_sql.metrics import exact_set_match, exact_set_verdict, hardness


@pytest.mark.kind("names in brackets")
@pytest.mark.parametrize(
    "name", ["a  b", "x--y", "a;b", "it's", 'so "called"', "/* no comment", "tab\there", "`", "[x"]
)
def test_a_name_in_brackets_is_kept_and_reads_the_same_column(name: str) -> None:
    connection = sqlite3.connect(":memory:")
    connection.execute(f"CREATE TABLE t ([{name}] TEXT)")
    connection.execute("INSERT INTO t VALUES ('found')")
    sql = f"SELECT [{name}]\n  FROM t -- all\n WHERE [{name}] != '; [x'"
    answers = one_line(sql), parse_sql(f"```sql\n{sql};\n```"), parse_sql(f"{sql}; SELECT 2")
    for answer in answers:
        assert answer == f"SELECT [{name}] FROM t WHERE [{name}] != '; [x'"
        assert connection.execute(answer).fetchall() == [("found",)]
    connection.close()


@pytest.mark.kind("names in brackets")
@pytest.mark.parametrize(
    ("sql", "line"),
    [
        ("SELECT ARRAY[1, -- one\n 2]", "SELECT ARRAY[1, 2]"),
        ("SELECT tags[1] FROM [a  b]", "SELECT tags[1] FROM [a  b]"),
        ("SELECT m[1][2] -- cell\nFROM t", "SELECT m[1][2] FROM t"),
        ("SELECT ARRAY['a]b', 'c--d']", "SELECT ARRAY['a]b', 'c--d']"),
    ],
)
def test_the_brackets_of_an_array_are_no_name(sql: str, line: str) -> None:
    assert one_line(sql) == line


# Links, beside what SQLite itself says that it reads


TABLES = {"person": ["id", "name", "meta", "born"], "city": ["id", "name", "mayor"]}


def schema_of(tables: dict[str, list[str]]) -> Schema:
    return Schema(
        "town",
        tuple(
            Table(name, tuple(Column(column, "TEXT") for column in columns))
            for name, columns in tables.items()
        ),
    )


def names_read(sql: str, tables: dict[str, list[str]]) -> Links:
    """Return the tables and columns that SQLite reads for a query, as its authorizer is told."""
    connection = sqlite3.connect(":memory:")
    for table, columns in tables.items():
        listed = ", ".join(f'"{column}"' for column in columns)
        connection.execute(f'CREATE TABLE "{table}" ({listed})')
    read: dict[str, set[str]] = {}

    def note(action: int, table: str | None, column: str | None, *_: str | None) -> int:
        if action == sqlite3.SQLITE_READ and table in tables:
            read.setdefault(str(table), set()).add(str(column))
        return sqlite3.SQLITE_OK

    connection.set_authorizer(note)
    connection.execute(sql)
    connection.close()
    return {
        table: [column for column in columns if column in read[table]]
        for table, columns in tables.items()
        if table in read
    }


@pytest.mark.kind("valid SQL that the analysis refuses")
@pytest.mark.parametrize(
    "sql",
    [
        "SELECT count(*) FROM person",
        "VALUES (1, 2), (3, 4)",
        "SELECT name FROM person; -- done",
        "SELECT name FROM person ORDER BY 1",
        "SELECT name FROM (SELECT name, born FROM person ORDER BY 2) WHERE born > 3",
        "WITH a(x) AS (SELECT name FROM person) SELECT x FROM a ORDER BY 1",
        "WITH RECURSIVE n(i) AS (VALUES (1) UNION ALL SELECT i + 1 FROM n WHERE i < 3) "
        "SELECT i, name FROM n, person",
        "SELECT name FROM person WHERE (id, born) IN (VALUES (1, 2))",
        "SELECT name FROM person WHERE NOT EXISTS (SELECT 1 FROM city WHERE mayor = person.id)",
        "SELECT (SELECT (SELECT born)) FROM person",
        "SELECT name FROM ((person))",
        "SELECT p.name FROM (person AS p JOIN city AS c ON c.mayor = p.id)",
        "SELECT sum(born) OVER w FROM person WINDOW w AS (PARTITION BY meta ORDER BY id)",
        "SELECT main.person.name FROM person",
        'SELECT name AS "a b" FROM person ORDER BY "a b" COLLATE NOCASE DESC NULLS LAST',
        'SELECT name FROM person WHERE meta = "a text"',
        "SELECT name FROM person WHERE id IN (SELECT mayor FROM city ORDER BY 1 LIMIT 1)",
        "SELECT name FROM person UNION SELECT mayor FROM city ORDER BY 1",
        "SELECT meta ->> '$.a', name NOT NULL, 0x1F, x'ab', +born, born == 1 FROM person",
        "SELECT name AS born FROM person ORDER BY born",
        "SELECT count(*) FILTER (WHERE born > 1), (id) FROM person GROUP BY 2 HAVING count(*) > 1",
        "SELECT EXISTS (SELECT name FROM city AS c WHERE c.mayor = p.id) AS born FROM person AS p",
    ],
)
def test_what_sqlite_runs_is_linked_as_sqlite_reads_it(sql: str) -> None:
    assert gold_links(sql, schema_of(TABLES)) == names_read(sql, TABLES)
    assert hardness(sql) != "unknown" or sql.startswith("VALUES")
    assert exact_set_verdict(sql, sql, schema_of(TABLES)) in (True, None)


@pytest.mark.kind("valid SQL that the analysis refuses")
@pytest.mark.parametrize(
    ("sql", "links"),
    [
        ("SELECT * FROM person ORDER BY 1", {"person": []}),
        ("SELECT DISTINCT * FROM person, city ORDER BY 1, 2 DESC", {"person": [], "city": []}),
        ("WITH a AS (SELECT * FROM person) SELECT name FROM a", {"person": ["name"]}),
        ("WITH a AS (SELECT * FROM person), b AS (SELECT * FROM a) SELECT b.born FROM b",
         {"person": ["born"]}),
        ("SELECT x FROM (SELECT * FROM (SELECT id AS x FROM city))", {"city": ["id"]}),
        ("WITH a AS (WITH b AS (SELECT * FROM city) SELECT mayor FROM b UNION SELECT name FROM b) "
         "SELECT * FROM a", {"city": ["name", "mayor"]}),
        ("SELECT * FROM person UNION SELECT * FROM person ORDER BY born", {"person": ["born"]}),
        ("SELECT c.x FROM (SELECT * FROM city) AS c (y, x)", {"city": ["name"]}),
        ("SELECT name FROM person WHERE id IN city", {"person": ["id", "name"], "city": []}),
        ("SELECT count(*) FROM (SELECT * FROM person) GROUP BY 1 ORDER BY 1", {"person": []}),
    ],
)  # fmt: skip
def test_a_star_passes_on_only_what_is_named_behind_it(sql: str, links: Links) -> None:
    assert gold_links(sql, schema_of(TABLES)) == links


@pytest.mark.kind("valid SQL that the analysis refuses")
def test_deeply_nested_ctes_are_read_once_each() -> None:
    sql = "SELECT name FROM person UNION SELECT name FROM city"
    for level in range(40):
        sql = f"WITH c{level} AS ({sql}) SELECT * FROM c{level} UNION SELECT name FROM city"
    assert gold_links(sql, schema_of(TABLES)) == {"person": ["name"], "city": ["name"]}


ODD_NAMES = (
    "any outer if window offset lock left right full cross natural key desc asc end row rows range "
    "groups first last nulls value date text current of over filter partition match glob like plan "
    "do each by replace trigger before begin conflict array map struct lateral qualify pivot "
    "top some anti div xor rlike unnest interval prior use copy no ties others exclude"
).split()


@pytest.mark.kind("table-valued functions and odd column names")
@pytest.mark.parametrize("name", ODD_NAMES)
def test_a_column_called_like_a_keyword_is_linked_and_graded(name: str) -> None:
    tables = {"t": [name, "meta"], "city": ["id", name]}
    for sql in (
        f"SELECT {name} FROM t",
        f"SELECT t.{name}, city.id FROM t LEFT OUTER JOIN city ON t.{name} = city.{name}",
        f"SELECT meta FROM t WHERE {name} = 1 AND {name} NOT LIKE 'x' OR NOT {name}",
        f"SELECT count(*) FROM t GROUP BY {name} ORDER BY {name} DESC LIMIT 1 OFFSET 1",
        f"SELECT max({name}), -{name}, meta + {name} FROM t",
        f"SELECT CASE {name} WHEN 1 THEN {name} ELSE meta END FROM t",
        f"SELECT meta FROM t WHERE {name} IN (SELECT id FROM city) AND {name} BETWEEN 1 AND 2",
        f"SELECT id FROM city WHERE EXISTS (SELECT 1 FROM t WHERE t.{name} = city.id)",
        f"SELECT meta AS {name} FROM t ORDER BY {name}",
    ):
        assert gold_links(sql, schema_of(tables)) == names_read(sql, tables), sql
        assert hardness(sql) != "unknown"
    plain = f"SELECT meta FROM t WHERE {name} = 1 ORDER BY {name} DESC"
    assert exact_set_match(plain, plain, schema_of(tables))


@pytest.mark.kind("table-valued functions and odd column names")
@pytest.mark.parametrize(
    "sql",
    [
        "SELECT value FROM person, json_each(meta)",
        "SELECT value FROM person, json_each(person.meta)",
        "SELECT e.value, name FROM person AS p, json_each(p.meta, '$.tags') AS e WHERE e.key > 1",
        "SELECT name FROM person WHERE EXISTS (SELECT 1 FROM json_each(meta) WHERE value = 'x')",
        "SELECT name FROM person WHERE id IN (SELECT value FROM json_each(meta))",
        "SELECT c.fullkey FROM person AS p, json_tree(p.meta) AS c JOIN city ON city.id = c.atom",
        "SELECT name, (SELECT count(*) FROM json_each(meta) WHERE type = 'text') FROM person",
        "SELECT type FROM pragma_table_info('person')",
        "SELECT name FROM person WHERE born > (SELECT max(key) FROM json_each('[1, 2]'))",
    ],
)
def test_the_columns_given_to_a_table_function_are_linked(sql: str) -> None:
    assert gold_links(sql, schema_of(TABLES)) == names_read(sql, TABLES)


@pytest.mark.kind("table-valued functions and odd column names")
def test_the_columns_of_a_table_function_hide_those_of_the_query_around_it() -> None:
    tables = {"person": ["name", "meta", "value", "key"]}
    sql = "SELECT name FROM person WHERE EXISTS (SELECT 1 FROM json_each(meta) WHERE value = key)"
    assert gold_links(sql, schema_of(tables)) == names_read(sql, tables)
    assert gold_links(sql, schema_of(tables)) == {"person": ["name", "meta"]}
    series = "SELECT name FROM person WHERE 3 IN (SELECT value FROM generate_series(1, person.key))"
    assert gold_links(series, schema_of(tables)) == {"person": ["name", "key"]}


@pytest.mark.kind("linking in other dialects")
@pytest.mark.parametrize(
    ("dialect", "sql", "links"),
    [
        ("postgresql", "SELECT name FROM person WHERE name ~ '^A'", {"person": ["name"]}),
        ("postgresql", "SELECT id FROM person WHERE name !~* 'a$'", {"person": ["id", "name"]}),
        ("postgresql", "SELECT id FROM person WHERE meta @> '{\"a\": 1}'",
         {"person": ["id", "meta"]}),
        ("postgresql", "SELECT name FROM ONLY person", {"person": ["name"]}),
        ("postgresql", "SELECT DISTINCT ON (born) name FROM person ORDER BY born, id",
         {"person": ["id", "name", "born"]}),
        ("postgresql", "SELECT name FROM person WHERE id = ANY (ARRAY[1, 2]) AND name ILIKE 'a%'",
         {"person": ["id", "name"]}),
        ("postgresql", "SELECT e.key FROM person, jsonb_each(meta) AS e (key, value)",
         {"person": ["meta"]}),
        ("postgresql", "SELECT tag FROM person, unnest(string_to_array(meta, ',')) AS tag",
         {"person": ["meta"]}),
        ("postgresql", "SELECT p.name, l.n FROM person p CROSS JOIN LATERAL "
         "(SELECT count(*) AS n FROM city WHERE mayor = p.id) l",
         {"person": ["id", "name"], "city": ["mayor"]}),
        ("postgresql", "SELECT l.name FROM person p, LATERAL "
         "(SELECT * FROM city WHERE mayor = p.id) l",
         {"person": ["id"], "city": ["name", "mayor"]}),
        ("postgresql", "SELECT born::date, meta ->> 'a' FROM person FETCH FIRST 3 ROWS ONLY",
         {"person": ["meta", "born"]}),
        ("postgresql", "WITH city AS (SELECT mayor AS m FROM city) SELECT m FROM city",
         {"city": ["mayor"]}),
        ("postgresql", "SELECT date_trunc('year', born) FROM public.person",
         {"person": ["born"]}),
        ("mysql", 'SELECT `name` FROM person WHERE meta = "born" LIMIT 1, 2',
         {"person": ["name", "meta"]}),
        ("mariadb", "SELECT name FROM person WHERE name REGEXP '^a' AND born DIV 10 = 2",
         {"person": ["name", "born"]}),
        ("mssql", "SELECT TOP 3 [name] FROM person ORDER BY born", {"person": ["name", "born"]}),
        ("duckdb", "SELECT name FROM person QUALIFY row_number() OVER (ORDER BY born) = 1",
         {"person": ["name", "born"]}),
    ],
)  # fmt: skip
def test_gold_is_read_in_the_dialect_of_its_database(dialect: str, sql: str, links: Links) -> None:
    schema = replace(schema_of(TABLES), dialect=dialect)
    example = Example("1", "town", "?", sql)
    assert prompts.gold_links(example, {"town": schema}) == links
    tables = PromptSection(schema_form="tables")
    assert set(prompts.shown_schema(example, {"town": schema}, tables).table_names) == set(links)
