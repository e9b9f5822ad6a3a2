"""Exact set match: each rule of Spider's judgement on small queries over a bakery."""

import pytest

from ray_sql.database import Column, ForeignKey, Schema, Table
from ray_sql.metrics import exact_set_match
from ray_sql.metrics.spider_grammar import read_query


def table(name: str, columns: str, *keys: ForeignKey) -> Table:
    return Table(
        name, tuple(Column(column, "text") for column in columns.split()), foreign_keys=keys
    )


BAKERY = Schema(
    "bakery",
    (
        table("Baker", "Id Name City Age"),
        table("Cake", "Id Baker_Id Title Price Cost", ForeignKey(("Baker_Id",), "Baker", ("Id",))),
        table("Sale", "Cake_Id Day Price", ForeignKey(("Cake_Id",), "Cake", ("Id",))),
    ),
)

JOINED = "FROM baker AS T1 JOIN cake AS T2 ON T1.id = T2.baker_id"

SAME = {
    "itself, in any case": ("SELECT name FROM baker", "select NAME from BAKER"),
    "columns in any order": ("SELECT name, city FROM baker", "SELECT city, name FROM baker"),
    "values": ("SELECT name FROM baker WHERE age > 30", "SELECT name FROM baker WHERE age > 'x'"),
    "double quotes hold a value": (
        "SELECT name FROM baker WHERE city = 'A'",
        'SELECT name FROM baker WHERE city = "B"',
    ),
    "distinct": ("SELECT DISTINCT name FROM baker", "SELECT name FROM baker"),
    "distinct in an aggregate": (
        "SELECT count(DISTINCT city) FROM baker",
        "SELECT count(city) FROM baker",
    ),
    "conditions in any order": (
        "SELECT name FROM baker WHERE age > 1 AND city = 'A'",
        "SELECT name FROM baker WHERE city = 'A' AND age > 1",
    ),
    "aliases and full names": (
        f"SELECT T1.name {JOINED}",
        "SELECT baker.name FROM baker JOIN cake ON baker.id = cake.id",
    ),
    "bare and qualified columns": (f"SELECT T2.title {JOINED}", f"SELECT title {JOINED}"),
    "tables in any order": (
        f"SELECT title {JOINED}",
        "SELECT title FROM cake JOIN baker ON cake.baker_id = baker.id",
    ),
    "no join condition": (f"SELECT title {JOINED}", "SELECT title FROM baker JOIN cake"),
    "columns of a foreign key": (f"SELECT T1.id {JOINED}", f"SELECT T2.baker_id {JOINED}"),
    "a limit's number": ("SELECT name FROM baker LIMIT 1", "SELECT name FROM baker LIMIT 5"),
    "offset": ("SELECT name FROM baker LIMIT 1", "SELECT name FROM baker LIMIT 1 OFFSET 2"),
    "ascending by default": (
        "SELECT name FROM baker ORDER BY age",
        "SELECT name FROM baker ORDER BY age ASC",
    ),
    "one direction for all keys": (
        "SELECT name FROM baker ORDER BY age DESC, name DESC",
        "SELECT name FROM baker ORDER BY age, name DESC",
    ),
    "both AND and OR, wherever": (
        "SELECT name FROM baker WHERE age > 1 AND city = 'A' OR name = 'B'",
        "SELECT name FROM baker WHERE age > 1 OR city = 'A' AND name = 'B'",
    ),
    "a second statement": ("SELECT name FROM baker", "SELECT name FROM baker; DROP TABLE baker"),
    "prose after a semicolon": (
        "SELECT name FROM baker",
        "SELECT name FROM baker; that is what was asked.",
    ),
    "a pair of parentheses": ("SELECT name FROM baker", "(SELECT name FROM baker)"),
    "operators apart": (
        "SELECT name FROM baker WHERE age >= 1",
        "SELECT name FROM baker WHERE age > = 1",
    ),
    "an alias defined twice": (
        "SELECT T1.id FROM baker AS T1 EXCEPT SELECT T1.baker_id FROM cake AS T1",
        "SELECT cake.id FROM baker EXCEPT SELECT cake.baker_id FROM cake",
    ),
    "what follows the OR after a column": (
        "SELECT title FROM cake WHERE price > cost",
        "SELECT title FROM cake WHERE price > cost OR price > 1",
    ),
    "a LEFT that the column before it swallows": (
        f"SELECT T2.title {JOINED} JOIN sale AS T3 ON T2.id = T3.cake_id",
        f"SELECT T2.title {JOINED} LEFT JOIN sale AS T3 ON T2.id = T3.cake_id",
    ),
    "values in a nested query": (
        "SELECT name FROM baker WHERE id IN (SELECT baker_id FROM cake WHERE price > 1)",
        "SELECT name FROM baker WHERE id IN (SELECT baker_id FROM cake WHERE price > 2)",
    ),
    "subquery in FROM": (
        "SELECT count(*) FROM (SELECT name FROM baker)",
        "SELECT count(*) FROM (SELECT name FROM baker)",
    ),
}

DIFFERENT = {
    "a column": ("SELECT name FROM baker", "SELECT city FROM baker"),
    "a column twice": ("SELECT name FROM baker", "SELECT name, name FROM baker"),
    "a column of another table": ("SELECT T1.id FROM baker AS T1", "SELECT T1.id FROM cake AS T1"),
    "an aggregate": ("SELECT max(age) FROM baker", "SELECT min(age) FROM baker"),
    "count of rows and of values": ("SELECT count(*) FROM baker", "SELECT count(name) FROM baker"),
    "an operation": ("SELECT price - cost FROM cake", "SELECT price + cost FROM cake"),
    "an operation's sides": ("SELECT price - cost FROM cake", "SELECT cost - price FROM cake"),
    "a comparison": (
        "SELECT name FROM baker WHERE age > 1",
        "SELECT name FROM baker WHERE age >= 1",
    ),
    "a condition": ("SELECT name FROM baker WHERE age > 1", "SELECT name FROM baker"),
    "NOT": (
        "SELECT name FROM baker WHERE city LIKE 'A%'",
        "SELECT name FROM baker WHERE city NOT LIKE 'A%'",
    ),
    "AND and OR": (
        "SELECT name FROM baker WHERE age > 1 AND city = 'A'",
        "SELECT name FROM baker WHERE age > 1 OR city = 'A'",
    ),
    "a table": ("SELECT baker.name FROM baker", f"SELECT T1.name {JOINED}"),
    "OR in a join": (
        f"SELECT title {JOINED}",
        "SELECT title FROM baker JOIN cake ON age = 1 OR age = 2",
    ),
    "a key to group by": (
        "SELECT count(*) FROM baker GROUP BY city",
        "SELECT count(*) FROM baker GROUP BY name",
    ),
    "keys to group by in another order": (
        "SELECT count(*) FROM baker GROUP BY city, name",
        "SELECT count(*) FROM baker GROUP BY name, city",
    ),
    "having": (
        "SELECT city FROM baker GROUP BY city HAVING count(*) > 1",
        "SELECT city FROM baker GROUP BY city HAVING avg(age) > 1",
    ),
    "a direction": (
        "SELECT name FROM baker ORDER BY age",
        "SELECT name FROM baker ORDER BY age DESC",
    ),
    "no order": ("SELECT name FROM baker ORDER BY age", "SELECT name FROM baker"),
    "a limit": (
        "SELECT name FROM baker ORDER BY age LIMIT 1",
        "SELECT name FROM baker ORDER BY age",
    ),
    "a set operation": (
        "SELECT id FROM baker UNION SELECT baker_id FROM cake",
        "SELECT id FROM baker INTERSECT SELECT baker_id FROM cake",
    ),
    "the sides of a set operation": (
        "SELECT id FROM baker EXCEPT SELECT baker_id FROM cake",
        "SELECT baker_id FROM cake EXCEPT SELECT id FROM baker",
    ),
    "one side only": (
        "SELECT id FROM baker UNION SELECT baker_id FROM cake",
        "SELECT id FROM baker",
    ),
    "a column whose foreign key joins a table that is not there": (
        "SELECT id FROM baker",
        "SELECT baker_id FROM cake",
    ),
    "distinct in a nested query": (
        "SELECT name FROM baker WHERE id IN (SELECT baker_id FROM cake)",
        "SELECT name FROM baker WHERE id IN (SELECT DISTINCT baker_id FROM cake)",
    ),
    "columns of a foreign key in a nested query": (
        f"SELECT name FROM baker WHERE id IN (SELECT T1.id {JOINED})",
        f"SELECT name FROM baker WHERE id IN (SELECT T2.baker_id {JOINED})",
    ),
}


@pytest.mark.parametrize("what", SAME)
def test_what_does_not_count(what: str) -> None:
    gold, predicted = SAME[what]
    assert exact_set_match(gold, predicted, BAKERY)
    assert exact_set_match(predicted, gold, BAKERY)


@pytest.mark.parametrize("what", DIFFERENT)
def test_what_counts(what: str) -> None:
    gold, predicted = DIFFERENT[what]
    assert read_query(predicted, BAKERY) is not None
    assert exact_set_match(gold, gold, BAKERY)
    assert not exact_set_match(gold, predicted, BAKERY)
    assert not exact_set_match(predicted, gold, BAKERY)


@pytest.mark.parametrize(
    "sql",
    [
        "",
        ";",
        "The answer is: SELECT name FROM baker",
        "SELECT name FROM",
        "DELETE FROM baker",
        "EXPLAIN SELECT name FROM baker",
        "WITH b AS (SELECT name FROM baker) SELECT name FROM b",
        "SELECT 1",
        "SELECT , FROM baker",
        "SELECT name FROM bread",
        "SELECT flour FROM baker",
        "SELECT cake.flour FROM cake",
        "SELECT title FROM baker",
        "SELECT name AS n FROM baker",
        "SELECT baker.* FROM baker",
        "SELECT upper(name) FROM baker",
        "SELECT CASE WHEN age > 1 THEN name END FROM baker",
        "SELECT (SELECT count(*) FROM cake) FROM baker",
        "SELECT max(price, cost) FROM cake",
        "SELECT count() FROM cake",
        "SELECT sum(price) / count(price) FROM cake",
        "SELECT price * 2 FROM cake",
        "SELECT price + cost + price FROM cake",
        "SELECT price-cost FROM cake",
        "SELECT 'name' FROM baker",
        "SELECT [name] FROM baker",
        'SELECT "name" FROM baker',
        "SELECT name FROM baker, cake",
        "SELECT name FROM baker LEFT JOIN cake ON baker.id = cake.baker_id",
        "SELECT name FROM baker JOIN cake USING (id)",
        "SELECT b.name FROM baker b",
        "SELECT cake.name FROM baker AS cake",
        "SELECT name FROM (SELECT name FROM baker) AS b",
        "SELECT name FROM baker WHERE (age > 1)",
        "SELECT name FROM baker WHERE 1 = 1",
        "SELECT name FROM baker WHERE age <> 1",
        "SELECT name FROM baker WHERE age == 1",
        "SELECT name FROM baker WHERE age=1",
        "SELECT name FROM baker WHERE city ='A'",
        "SELECT name FROM baker WHERE city = 'A''s'",
        "SELECT name FROM baker WHERE age IS NULL",
        "SELECT name FROM baker WHERE age IN (1, 2)",
        "SELECT name FROM baker WHERE NOT id IN (SELECT baker_id FROM cake)",
        "SELECT name FROM baker WHERE EXISTS (SELECT id FROM cake)",
        "SELECT name FROM baker WHERE id IN (SELECT id FROM cake WHERE title = name)",
        "SELECT name FROM baker WHERE id IN (SELECT id FROM cake LIMIT 1 OFFSET 1)",
        "SELECT count(*) FROM baker HAVING count(*) > 1",
        "SELECT name FROM baker ORDER BY 1",
        "SELECT id FROM baker UNION ALL SELECT id FROM cake",
        "(SELECT id FROM baker UNION SELECT id FROM cake)",
        "SELECT name FROM baker -- all of them",
    ],
)
def test_what_spiders_parser_rejects_matches_nothing(sql: str) -> None:
    assert read_query(sql, BAKERY) is None
    assert not exact_set_match(sql, sql, BAKERY)
    assert not exact_set_match("SELECT name FROM baker", sql, BAKERY)


def test_an_order_after_a_set_operation_belongs_to_its_last_query() -> None:
    query = read_query(
        "SELECT id FROM baker UNION SELECT id FROM cake EXCEPT SELECT id FROM cake "
        "ORDER BY cost LIMIT 1",
        BAKERY,
    )
    assert query is not None and not query.order
    assert query.combined is not None and query.combined[0] == "union"
    second = query.combined[1]
    assert second.combined is not None and second.combined[0] == "except" and not second.order
    assert [key.left.column for key in second.combined[1].order] == [
        "cake.cost"
    ] and second.combined[1].limited


def test_long_and_deep_queries_get_a_verdict() -> None:
    for sql in (
        "SELECT name FROM baker WHERE " + " AND ".join(["age = 1"] * 3000),
        " UNION ".join(["SELECT name FROM baker"] * 3000),
        " UNION ".join(["SELECT name FROM baker"] * 600),
        "SELECT name FROM baker WHERE id IN (" * 300 + "SELECT id FROM cake" + ")" * 300,
        "(" * 3000 + "SELECT name FROM baker" + ")" * 3000,
    ):
        assert exact_set_match(sql, sql, BAKERY) in (True, False)
