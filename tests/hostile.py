"""A corpus of hostile SQL, written for this project: statements that a model or an attacker may send.

Statements are grouped by kind, and kinds by outcome:

- REFUSED: not one read-only query.
- STOPPED: ends by a limit. Its work grows with rows without end, because a fast machine may finish
  anything less. Each step depends on its row, because SQLite computes a constant once.
- FAILED: an error in the database's words or ours.
- ANY: may even answer.

Each line is a statement; those that a line cannot show are made by code. `{folder}` stands for the
folder of the test, which holds `shop.sqlite` (`SCHEMA`), `other.sqlite` and `note.txt`.
"""

import random
from dataclasses import dataclass
from typing import Literal

SCHEMA = """
CREATE TABLE item (id INTEGER PRIMARY KEY, name TEXT UNIQUE, price REAL);
INSERT INTO item VALUES (1, 'pen', 1.5), (2, 'ink', NULL), (3, 'nib', 2.0);
CREATE TABLE sold (
  item_id INTEGER REFERENCES item (id) ON DELETE CASCADE, day TEXT, amount INTEGER);
INSERT INTO sold VALUES (1, '2024-01-02', 3), (3, '2024-02-03', 1);
CREATE TABLE big (i);
WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n LIMIT 2000)
  INSERT INTO big SELECT i FROM n;
CREATE INDEX item_price ON item (price);
CREATE VIEW cheap AS SELECT * FROM item WHERE price < 2;
CREATE TRIGGER cheap_insert INSTEAD OF INSERT ON cheap BEGIN DELETE FROM item; END;
CREATE TRIGGER item_delete AFTER DELETE ON item BEGIN DELETE FROM sold; END;
CREATE VIRTUAL TABLE note USING fts5(text);
INSERT INTO note VALUES ('ink and pen'), ('pen and paper');
CREATE VIRTUAL TABLE page USING fts4(body);
INSERT INTO page VALUES ('a page about ink'), ('another page');
CREATE VIRTUAL TABLE box USING rtree(id, x0, x1, y0, y1);
INSERT INTO box VALUES (1, 0, 1, 0, 1), (2, 5, 6, 5, 6);
"""

Outcome = Literal["refused", "stopped", "failed", "any"]


@dataclass(frozen=True)
class Hostile:
    """Hold one statement, its kind, and what must come of it."""

    kind: str
    outcome: Outcome
    sql: str


REFUSED = {
    "write": """
INSERT INTO item VALUES (9, 'x', 1.0)
INSERT INTO item (id) SELECT max(id) + 1 FROM item
INSERT INTO item DEFAULT VALUES
INSERT OR REPLACE INTO item VALUES (1, 'x', 1.0)
INSERT OR IGNORE INTO item VALUES (1, 'x', 1.0)
INSERT OR ROLLBACK INTO item VALUES (1, 'x', 1.0)
INSERT INTO main.item VALUES (10, 'y', 1)
INSERT INTO cheap VALUES (1, 'through a trigger of a view', 1)
REPLACE INTO item VALUES (2, 'x', 1.0)
REPLACE INTO item SELECT * FROM item
UPDATE item SET price = 0
UPDATE item SET price = price * 2 WHERE id IN (SELECT item_id FROM sold)
UPDATE OR IGNORE item SET id = 1
UPDATE item SET price = sold.amount FROM sold WHERE sold.item_id = item.id
UPDATE item SET (name, price) = (SELECT 'x', 0)
UPDATE item SET name = name WHERE 1 = 0
UPDATE item INDEXED BY item_price SET price = 1 WHERE price > 0
DELETE FROM item
DELETE FROM item WHERE 0
DELETE FROM item WHERE id = (SELECT min(id) FROM item)
DELETE FROM sold WHERE rowid IN (SELECT rowid FROM sold)
DELETE FROM main.sold
delete/**/from/**/item
DeLeTe FROM "item"
DELETE FROM [item]
DELETE FROM `item`
DELETE FROM 'item'
""",
    "upsert and returning": """
INSERT INTO item VALUES (1, 'x', 1) ON CONFLICT DO NOTHING
INSERT INTO item VALUES (1, 'x', 1) ON CONFLICT (id) DO UPDATE SET price = excluded.price
INSERT INTO item VALUES (1, 'x', 1) ON CONFLICT (id) DO UPDATE SET price = 0 WHERE price > 0
INSERT INTO item VALUES (7, 'x', 1) RETURNING *
INSERT INTO item SELECT 8, 'y', 1 RETURNING id, name
UPDATE item SET price = 0 RETURNING id
UPDATE item SET price = 0 WHERE 1 = 0 RETURNING (SELECT count(*) FROM item)
DELETE FROM item RETURNING *
DELETE FROM item WHERE 0 RETURNING id
REPLACE INTO item VALUES (1, 'x', 1) RETURNING rowid
""",
    "CTE in front of a write": """
WITH x AS (SELECT 1) DELETE FROM item
WITH x AS (SELECT 1) DELETE FROM item RETURNING *
WITH x AS (SELECT 1) INSERT INTO item SELECT 1, 'a', 2 FROM x
WITH x(a) AS (SELECT 1) UPDATE item SET price = (SELECT a FROM x)
WITH x(a) AS (SELECT 1) REPLACE INTO item SELECT a, 'b', 0 FROM x
WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) INSERT INTO big SELECT i FROM n
WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) DELETE FROM big WHERE i IN n
WITH item AS (SELECT 1) DELETE FROM item
WITH a AS MATERIALIZED (SELECT * FROM item) DELETE FROM sold WHERE item_id IN (SELECT id FROM a)
""",
    "DDL": """
CREATE TABLE other (a)
CREATE TABLE IF NOT EXISTS other (a INTEGER PRIMARY KEY) WITHOUT ROWID
CREATE TABLE other (a INTEGER) STRICT
CREATE TABLE other AS SELECT * FROM item
CREATE TABLE main.other AS SELECT 1
CREATE VIEW view_of_all AS SELECT * FROM item
CREATE INDEX by_name ON item (name)
CREATE UNIQUE INDEX by_name ON item (name) WHERE price > 1
CREATE INDEX by_expression ON item (lower(name))
CREATE TRIGGER t AFTER INSERT ON item BEGIN DELETE FROM item; END
CREATE TRIGGER t BEFORE UPDATE OF price ON item BEGIN SELECT raise(ABORT, 'no'); END
CREATE TRIGGER t INSTEAD OF DELETE ON cheap BEGIN DELETE FROM item; END
DROP TABLE item
DROP TABLE IF EXISTS item
DROP TABLE note
DROP VIEW cheap
DROP INDEX item_price
DROP TRIGGER item_delete
ALTER TABLE item RENAME TO thing
ALTER TABLE item RENAME COLUMN name TO title
ALTER TABLE item ADD COLUMN extra
ALTER TABLE item ADD COLUMN extra DEFAULT (random())
ALTER TABLE sold DROP COLUMN amount
""",
    "temporary objects": """
CREATE TEMP TABLE other (a)
CREATE TEMPORARY TABLE other AS SELECT * FROM big
CREATE TABLE temp.other (a)
CREATE TEMP VIEW item AS SELECT 1
CREATE TEMP TRIGGER t AFTER INSERT ON main.item BEGIN DELETE FROM item; END
CREATE TEMP TRIGGER IF NOT EXISTS t BEFORE DELETE ON item BEGIN SELECT 1; END
CREATE VIRTUAL TABLE temp.words USING fts5(text)
""",
    "other files": """
ATTACH DATABASE '{folder}/new.sqlite' AS other
ATTACH '{folder}/other.sqlite' AS other
ATTACH DATABASE 'new.sqlite' AS other
ATTACH DATABASE ':memory:' AS other
ATTACH DATABASE '' AS other
ATTACH 'file:{folder}/new.sqlite?mode=rwc' AS other
ATTACH 'file:{folder}/other.sqlite?mode=ro&immutable=1' AS other
ATTACH 'file:{folder}/shop.sqlite?mode=rw&cache=shared' AS other
ATTACH 'file:leak?mode=memory&cache=shared' AS other
ATTACH 'file:{folder}/shop.sqlite?vfs=unix-none' AS other
ATTACH 'file:{folder}/shop.sqlite?nolock=1&psow=0' AS other
ATTACH '/etc/passwd' AS other
ATTACH '../../../../etc/passwd' AS other
ATTACH '/dev/zero' AS other
ATTACH '/dev/full' AS other
ATTACH '/proc/self/environ' AS other
ATTACH '\\\\host\\share\\new.sqlite' AS other
ATTACH (SELECT '{folder}/new' || '.sqlite') AS other
ATTACH char(47, 116, 109, 112, 47, 120) AS other
ATTACH DATABASE '{folder}/new.sqlite' AS main
ATTACH DATABASE '{folder}/new.sqlite' AS other KEY 'secret'
DETACH DATABASE main
DETACH temp
VACUUM
VACUUM main
VACUUM INTO '{folder}/copy.sqlite'
VACUUM INTO 'copy.sqlite'
VACUUM main INTO 'file:{folder}/copy.sqlite?mode=rwc'
VACUUM INTO (SELECT '{folder}/' || name FROM item LIMIT 1)
""",
    "extensions and files by function": """
SELECT load_extension('{folder}/evil.so')
SELECT load_extension('{folder}/evil.so', 'entry')
SELECT LOAD_EXTENSION('libc.so.6')
SELECT "load_extension"('libc.so.6')
SELECT [load_extension]('libm.so.6', 'cos')
SELECT id FROM item WHERE load_extension(name) IS NULL
SELECT CASE WHEN 0 THEN load_extension('x') END
SELECT fts3_tokenizer('simple')
SELECT fts3_tokenizer('simple', x'4141414141414141')
SELECT hex(fts3_tokenizer('porter'))
SELECT (SELECT fts3_tokenizer('simple') FROM item LIMIT 1)
WITH x AS (SELECT load_extension('x') AS a) SELECT * FROM x
""",
    "virtual tables made": """
CREATE VIRTUAL TABLE words USING fts5(text)
CREATE VIRTUAL TABLE words USING fts5(text, content='item', content_rowid='id')
CREATE VIRTUAL TABLE words USING fts3(text)
CREATE VIRTUAL TABLE words USING fts4(text, tokenize=porter)
CREATE VIRTUAL TABLE words USING fts4aux(main, page)
CREATE VIRTUAL TABLE words USING fts5vocab('note', 'row')
CREATE VIRTUAL TABLE words USING rtree(id, a, b)
CREATE VIRTUAL TABLE words USING dbstat(main)
CREATE VIRTUAL TABLE words USING csv(filename='/etc/passwd')
CREATE VIRTUAL TABLE words USING zipfile('{folder}/new.zip')
CREATE VIRTUAL TABLE words USING no_such_module
""",
    "virtual tables written": """
INSERT INTO note VALUES ('more')
INSERT INTO note(note) VALUES ('rebuild')
INSERT INTO note(note) VALUES ('optimize')
INSERT INTO note(note) VALUES ('delete-all')
INSERT INTO note(note, rank) VALUES ('merge', 500)
INSERT INTO note(note, rank) VALUES ('automerge', 8)
INSERT INTO page(page) VALUES ('rebuild')
INSERT INTO page(page) VALUES ('integrity-check')
DELETE FROM note WHERE note MATCH 'pen'
UPDATE note SET text = 'x' WHERE rowid = 1
INSERT INTO box VALUES (3, 0, 1, 0, 1)
DELETE FROM box
DELETE FROM note_data
UPDATE note_content SET c0 = 'x'
INSERT INTO page_segments VALUES (1, x'00')
UPDATE box_node SET data = zeroblob(100)
DROP TABLE note_config
""",
    "pragma that writes": """
PRAGMA journal_mode = DELETE
PRAGMA journal_mode = WAL
PRAGMA main.journal_mode = MEMORY
PRAGMA journal_mode(OFF)
PRAGMA user_version = 7
PRAGMA user_version(7)
PRAGMA application_id = 1234
PRAGMA schema_version = 99
PRAGMA encoding = 'UTF-16'
PRAGMA auto_vacuum = FULL
PRAGMA incremental_vacuum(10)
PRAGMA optimize
PRAGMA optimize(0xfffe)
PRAGMA wal_checkpoint
PRAGMA wal_checkpoint(TRUNCATE)
PRAGMA wal_autocheckpoint = 1
PRAGMA journal_size_limit = 0
PRAGMA default_cache_size = 1000
PRAGMA analysis_limit = 1
PRAGMA max_page_count = 1
PRAGMA locking_mode = EXCLUSIVE
PRAGMA secure_delete = ON
""",
    "pragma that unlocks": """
PRAGMA writable_schema = ON
PRAGMA writable_schema = RESET
PRAGMA main.writable_schema(1)
PRAGMA query_only = OFF
PRAGMA query_only(0)
pragma Query_Only=0
PRAGMA/**/query_only/**/=/**/0
PRAGMA "query_only" = 0
PRAGMA [query_only] = 0
PRAGMA temp.query_only = 0
PRAGMA trusted_schema = ON
PRAGMA temp_store = FILE
PRAGMA temp_store_directory = '{folder}'
PRAGMA data_store_directory = '{folder}'
PRAGMA hard_heap_limit = 1
PRAGMA soft_heap_limit = 1
PRAGMA mmap_size = 1099511627776
PRAGMA cache_size = 2000000000
PRAGMA cache_spill = 1
PRAGMA busy_timeout = 100000000
PRAGMA threads = 8
PRAGMA read_uncommitted = 1
PRAGMA foreign_keys = ON
PRAGMA ignore_check_constraints = 1
PRAGMA recursive_triggers = 1
PRAGMA reverse_unordered_selects = 1
PRAGMA case_sensitive_like = 1
PRAGMA legacy_alter_table = 1
PRAGMA defer_foreign_keys = 1
PRAGMA synchronous = OFF
PRAGMA shrink_memory
PRAGMA key = 'secret'
PRAGMA no_such_pragma = 1
""",
    "pragma that leaks or works long": """
PRAGMA database_list
SELECT file FROM pragma_database_list
SELECT * FROM item, pragma_database_list
PRAGMA compile_options
SELECT * FROM pragma_compile_options
PRAGMA integrity_check
PRAGMA quick_check
SELECT * FROM pragma_integrity_check
PRAGMA foreign_key_check
PRAGMA lock_status
PRAGMA vdbe_trace = ON
PRAGMA parser_trace = ON
PRAGMA stats
PRAGMA temp_store_directory
PRAGMA journal_mode
SELECT * FROM pragma_user_version
SELECT * FROM pragma_journal_mode
""",
    "schema table": """
UPDATE sqlite_master SET sql = ''
UPDATE sqlite_schema SET name = 'x' WHERE name = 'item'
UPDATE main.sqlite_master SET rootpage = 2
UPDATE sqlite_temp_master SET sql = ''
UPDATE sqlite_temp_schema SET sql = 'x'
INSERT INTO sqlite_master VALUES ('table', 'x', 'x', 2, 'CREATE TABLE x (a)')
INSERT INTO temp.sqlite_master VALUES ('trigger', 'x', 'x', 0, '')
REPLACE INTO sqlite_schema SELECT * FROM sqlite_schema
DELETE FROM sqlite_master
DELETE FROM sqlite_temp_master
DROP TABLE sqlite_master
WITH x AS (SELECT 1) UPDATE sqlite_master SET sql = NULL
UPDATE sqlite_master SET sql = '' WHERE 0 RETURNING *
""",
    "transaction": """
BEGIN
BEGIN DEFERRED
BEGIN IMMEDIATE TRANSACTION
BEGIN EXCLUSIVE
COMMIT
END TRANSACTION
ROLLBACK
SAVEPOINT a
RELEASE a
RELEASE SAVEPOINT a
ROLLBACK TO a
ROLLBACK TRANSACTION TO SAVEPOINT a
""",
    "upkeep": """
REINDEX
REINDEX item
REINDEX item_price
REINDEX NOCASE
REINDEX main.item
ANALYZE
ANALYZE item
ANALYZE main
ANALYZE sqlite_master
ANALYZE main.item_price
""",
    "explain": """
EXPLAIN DELETE FROM item
EXPLAIN QUERY PLAN UPDATE item SET price = 0
EXPLAIN INSERT INTO item DEFAULT VALUES
EXPLAIN DROP TABLE item
EXPLAIN ATTACH '{folder}/new.sqlite' AS other
EXPLAIN PRAGMA user_version = 7
EXPLAIN CREATE TABLE other (a)
EXPLAIN BEGIN
EXPLAIN SELECT load_extension('x')
EXPLAIN QUERY PLAN WITH x AS (SELECT 1) DELETE FROM item RETURNING *
""",
    "several statements": """
SELECT 1; DROP TABLE item
SELECT 1; SELECT 2
SELECT 1;;
SELECT 1; ;
SELECT 1;SELECT load_extension('x')
SELECT ';'; DELETE FROM item
SELECT 1 /* ; */; DELETE FROM item
SELECT 1; VACUUM INTO '{folder}/copy.sqlite'
SELECT * FROM item; COMMIT; PRAGMA query_only = OFF; DELETE FROM item
BEGIN; DELETE FROM item; COMMIT
; DELETE FROM item
;;;;DROP TABLE item
DELETE FROM item; SELECT 1
""",
}

STOPPED = {
    "recursion without end": """
WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n
WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i FROM n) SELECT count(*) FROM n
WITH RECURSIVE n(i) AS (SELECT 1 UNION SELECT i + 1 FROM n) SELECT max(i) FROM n
WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT i FROM n WHERE i < 0
WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT i FROM n
WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n ORDER BY 1 DESC) SELECT count(*) FROM n
WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n LIMIT -1) SELECT sum(i) FROM n
WITH RECURSIVE n(i) AS (VALUES (1) UNION ALL SELECT i + 1 FROM n), m AS (SELECT * FROM n) SELECT count(*) FROM m, m AS o
WITH RECURSIVE n(s) AS (SELECT 'a' UNION ALL SELECT s || s FROM n) SELECT max(length(s)) FROM n
WITH RECURSIVE n(s) AS (SELECT 'a' UNION ALL SELECT s || 'aaaaaaaaaa' FROM n) SELECT count(*) FROM n
WITH RECURSIVE n(a, b) AS (SELECT 1, 1 UNION ALL SELECT b, a + b FROM n) SELECT count(*) FROM n
WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT n.i FROM n, big) SELECT count(*) FROM n
WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n UNION ALL SELECT i + 2 FROM n) SELECT count(*) FROM n
SELECT (WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n)
SELECT id FROM item WHERE EXISTS (WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT 1 FROM n WHERE i < 0)
WITH RECURSIVE n(i) AS (SELECT randomblob(1000) UNION ALL SELECT randomblob(1000) FROM n) SELECT group_concat(hex(i)) FROM n
WITH RECURSIVE n(i) AS (SELECT 1 UNION SELECT random() FROM n) SELECT count(*) FROM n
""",
    "exploding join": """
SELECT count(*) FROM big a, big b, big c
SELECT count(*) FROM big a, big b, big c, big d, big e, big f
SELECT * FROM big a, big b
SELECT * FROM big a CROSS JOIN big b CROSS JOIN big c
SELECT count(*) FROM big a JOIN big b ON a.i <> b.i JOIN big c ON b.i <> c.i
SELECT count(*) FROM big a JOIN big z LEFT JOIN big b ON a.i + b.i < 0 LEFT JOIN big c ON c.i + a.i < 0 LEFT JOIN big d ON d.i < c.i
SELECT count(DISTINCT a.i * b.i * c.i) FROM big a, big b, big c
SELECT a.i, count(*) FROM big a, big b, big c GROUP BY a.i
SELECT DISTINCT a.i || b.i || c.i FROM big a, big b, big c ORDER BY 1
SELECT max((SELECT count(*) FROM big b, big c WHERE b.i + c.i > a.i)) FROM big a
SELECT i FROM big WHERE i IN (SELECT a.i + b.i + c.i FROM big a, big b, big c)
SELECT sum(a.i) FROM big a, big b, big c WHERE a.i + b.i + c.i = -1
SELECT count(*) FROM (SELECT a.i FROM big a, big b UNION SELECT -a.i FROM big a, big b, big c)
SELECT count(*) FROM (SELECT a.i * b.i FROM big a, big b, big c EXCEPT SELECT 1)
SELECT a.i FROM big a, big b, big c LIMIT 1 OFFSET 9000000000
SELECT a.i FROM big a, big b, big c WHERE 0 = (a.i + b.i + c.i) * 1.0 LIMIT 5
SELECT total(a.i) FROM big a, big b, big c, json_each('[1,2,3,4,5,6,7,8,9]')
SELECT count(*) FROM note a, note b, big c, big d, big e
SELECT count(*) FROM sqlite_master a, sqlite_master b, big c, big d, big e
""",
    "sort and window": """
SELECT a.i FROM big a, big b, big c ORDER BY a.i * b.i
SELECT a.i FROM big a, big b ORDER BY random()
SELECT randomblob(100) AS r FROM big a, big b, big c ORDER BY r LIMIT 1
SELECT row_number() OVER (ORDER BY a.i) FROM big a, big b, big c
SELECT sum(a.i) OVER (ORDER BY a.i ROWS BETWEEN UNBOUNDED PRECEDING AND UNBOUNDED FOLLOWING) FROM big a, big b
SELECT rank() OVER (PARTITION BY a.i ORDER BY b.i DESC), ntile(9) OVER () FROM big a, big b, big c
SELECT group_concat(a.i) OVER (ORDER BY a.i ROWS BETWEEN 1000 PRECEDING AND CURRENT ROW) FROM big a, big b
SELECT max(x) FROM (SELECT min(a.i) OVER (ORDER BY b.i RANGE BETWEEN 5 PRECEDING AND 5 FOLLOWING EXCLUDE TIES) AS x FROM big a, big b)
SELECT nth_value(a.i, 1000000) OVER (ORDER BY a.i, b.i) FROM big a, big b, big c
SELECT lag(a.i, 99999999) OVER (ORDER BY a.i) FROM big a, big b, big c
SELECT count(*) FILTER (WHERE a.i > 1) OVER w FROM big a, big b, big c WINDOW w AS (PARTITION BY b.i)
""",
    "giant value": """
SELECT randomblob(1000000000)
SELECT zeroblob(1000000000)
SELECT zeroblob(2147483647)
SELECT zeroblob(9223372036854775807)
SELECT length(hex(zeroblob(1000000)))
SELECT hex(hex(hex(zeroblob(500000))))
SELECT quote(zeroblob(1000000))
SELECT printf('%.*c', 1000000000, 'x')
SELECT format('%900000000d', 1) FROM big
SELECT replace(hex(zeroblob(400000)), '0', 'aaaaaaaaaa')
SELECT replace(replace(replace(hex(zeroblob(500)), '0', 'aaaaaaaaaa'), 'a', 'bbbbbbbbbb'), 'b', 'cccccccccccccccccccc')
SELECT group_concat(randomblob(1000)) FROM big a, big b
SELECT group_concat(i, printf('%.*c', 10000, 'x')) FROM big
SELECT group_concat(name, zeroblob(900000)) FROM item, big
SELECT zeroblob(900000) || zeroblob(900000)
SELECT hex(zeroblob(400000)) || hex(zeroblob(400000)) || 'x'
SELECT zeroblob(1000000) FROM big
SELECT randomblob(10000) FROM big
SELECT zeroblob(600000), zeroblob(600000)
SELECT json_group_array(hex(randomblob(500))) FROM big
SELECT json_group_object(i, hex(zeroblob(5000))) FROM big
SELECT json_array(hex(zeroblob(300000)), hex(zeroblob(300000)))
SELECT json_quote(replace(hex(zeroblob(200000)), '0', char(1)))
SELECT trim(zeroblob(2000000))
SELECT max(zeroblob(1048570) || a.i) FROM big a, big b
SELECT sum(length(replace(hex(zeroblob(300000 + a.i)), '00', 'a'))) FROM big a, big b
SELECT count(DISTINCT randomblob(100000)) FROM big a, big b
""",
    "pathological pattern": """
SELECT hex(zeroblob(400000)) LIKE '%' || hex(zeroblob(12000)) || '1'
SELECT hex(zeroblob(400000)) GLOB '*' || hex(zeroblob(12000)) || '1'
SELECT hex(zeroblob(400000)) GLOB '*' || replace(hex(zeroblob(1000)), '0', '[0-9]') || 'x'
SELECT count(*) FROM big a, big b WHERE hex(zeroblob(3000 + a.i)) LIKE '%' || hex(zeroblob(1000 + b.i)) || '1'
SELECT trim(hex(zeroblob(400000)) || 'x', replace(hex(zeroblob(50000)), '0', 'ab') || 'x0') FROM big
SELECT count(instr(hex(zeroblob(400000)), hex(zeroblob(200000)) || a.i)) FROM big a, big b
SELECT sum(instr(zeroblob(500000), zeroblob(250000 + a.i) || x'01')) FROM big a, big b
SELECT count(replace(hex(zeroblob(400000)), hex(zeroblob(100000)) || a.i, '')) FROM big a, big b
""",
}

FAILED = {
    "writes that some builds cannot even parse": """
DELETE FROM item LIMIT 1
UPDATE item SET price = 0 ORDER BY id LIMIT 1
INSERT INTO item VALUES (1, 'x', 1) ON DUPLICATE KEY UPDATE price = 0
MERGE INTO item USING sold ON item.id = sold.item_id WHEN MATCHED THEN DELETE
TRUNCATE TABLE item
CREATE INDEX x ON sqlite_master (name)
ALTER TABLE sqlite_master RENAME TO x
CREATE INDEX temp.by_name ON item (name)
TRUNCATE item
SELECT * INTO other FROM item
SELECT * FROM item INTO OUTFILE '{folder}/new.csv'
COPY item TO '{folder}/new.csv'
LOAD DATA INFILE '/etc/passwd' INTO TABLE item
EXEC xp_cmdshell 'touch {folder}/new'
CALL system('touch {folder}/new')
GRANT ALL ON item TO PUBLIC
SET GLOBAL local_infile = 1
SHUTDOWN
CREATE DATABASE other
DROP DATABASE main
USE other
LOCK TABLE item
DO $$ BEGIN DELETE FROM item; END $$
SELECT * FROM (DELETE FROM item RETURNING *)
WITH gone AS (DELETE FROM item RETURNING *) SELECT * FROM gone
SELECT 1 UNION DELETE FROM item
SELECT CASE WHEN 1 THEN (DROP TABLE item) END
SELECT * FROM item FOR UPDATE
.open {folder}/new.sqlite
.shell touch {folder}/new
.dump
.load {folder}/evil.so
SELECT 1 .output {folder}/new
""",
    "functions of the shell": """
SELECT readfile('/etc/passwd')
SELECT readfile('{folder}/note.txt')
SELECT writefile('{folder}/new', 'x')
SELECT writefile('new', zeroblob(100))
SELECT edit('x', 'touch {folder}/new')
SELECT * FROM fsdir('{folder}')
SELECT * FROM zipfile('{folder}/new.zip')
SELECT * FROM csv('/etc/passwd')
SELECT sqlite_log(1, 'a line in the log')
SELECT sqlite_dbpage(1)
SELECT * FROM sqlite_dbdata
SELECT sha3(name) FROM item
SELECT eval('DELETE FROM item')
SELECT getenv('HF_TOKEN')
SELECT system('touch {folder}/new')
SELECT pg_sleep(100)
SELECT sleep(100)
SELECT sqlite_attach('{folder}/new.sqlite', 'x', '')
SELECT sqlite_rename_table('main', 'table', 'x', 'y', 'z', 'w', 0)
SELECT sqlite_drop_column(0, 'CREATE TABLE a (b, c)', 1)
SELECT count(*) FROM generate_series(1, 9223372036854775807)
SELECT * FROM carray(1, 2)
SELECT 'aaaa' REGEXP '(a+)+$'
SELECT regexp('(a|aa)+$', 'aaaaaaaaaaaaaaaaaaaaaaaaaaaa!')
SELECT x FROM item MATCH 'y'
SELECT decimal_mul('9', '9')
""",
    "full text and boxes": """
SELECT optimize(page) FROM page LIMIT 1
SELECT optimize(page) FROM page WHERE page MATCH 'page'
SELECT optimize('page')
SELECT matchinfo(page, 'zzzz') FROM page WHERE page MATCH 'page'
SELECT snippet(item) FROM item
SELECT offsets(zeroblob(8))
SELECT matchinfo(x'0000000000000000', 'pcx')
SELECT highlight(1, 2, 3, 4)
SELECT bm25(1)
SELECT * FROM note WHERE note MATCH 'NEAR('
SELECT * FROM note WHERE note MATCH '"'
SELECT * FROM note WHERE note MATCH 'nothing : pen'
SELECT * FROM page WHERE page MATCH '(((((((((((((((((((((((((((((((((((((((('
SELECT * FROM note('pen', 'ink', 3)
SELECT rtreecheck('no_such_table')
SELECT * FROM box WHERE id MATCH 1
SELECT * FROM item WHERE item MATCH 'pen'
SELECT * FROM fts5vocab
SELECT * FROM fts4aux
""",
    "what is no SQL": """
The answer is 42.
```sql
SELECT
SELECT FROM WHERE
SELECT * FROM
SELEC * FROM item
SELECT colour FROM item
SELECT * FROM nowhere
SELECT * FROM other.item
SELECT * FROM item WHERE
SELECT 'unterminated FROM item
SELECT "unterminated FROM item
SELECT [unterminated FROM item
SELECT `unterminated FROM item
SELECT x'0'
SELECT x'zz'
SELECT 1e
SELECT 0x
SELECT 0x10000000000000000
SELECT 1 + + + FROM * item
SELECT raise(ABORT, 'outside a trigger')
SELECT raise(IGNORE)
SELECT ?
SELECT ?1, :name, @name, $name
SELECT id FROM item LIMIT 'x'
SELECT id FROM item GROUP BY 99
SELECT id FROM item ORDER BY 99
SELECT 1 UNION SELECT 1, 2
SELECT sum(count(*)) FROM item
SELECT count(*) OVER (ROWS BETWEEN -1 PRECEDING AND CURRENT ROW) FROM item
SELECT likelihood(1, 2)
WITH n AS (SELECT * FROM n) SELECT * FROM n
WITH a AS (SELECT * FROM b), b AS (SELECT * FROM a) SELECT * FROM a
""",
    "overflow": """
SELECT abs(-9223372036854775808)
SELECT sum(9223372036854775807) FROM item
SELECT id FROM item LIMIT 99999999999999999999
SELECT id FROM item LIMIT 1e30
SELECT id FROM item LIMIT 9223372036854775808
SELECT char(1, 2
SELECT ntile(0) OVER () FROM item
SELECT nth_value(id, 0) OVER () FROM item
SELECT nth_value(id, -9223372036854775808) OVER () FROM item
SELECT ?32767000
SELECT ?99999999999
""",
    "pathological JSON": """
SELECT json('{')
SELECT json_extract('{}', 'x')
SELECT json_extract('{}', '$[')
SELECT json_extract('{}', CAST(x'ff' AS TEXT))
SELECT json_each('[1]')
SELECT * FROM json_each('[')
SELECT json_object('a')
SELECT json_set('{}', '$.a')
SELECT '[1' -> 0
SELECT json_extract('{}', hex(zeroblob(400000)))
SELECT count(*) FROM json_tree(replace(hex(zeroblob(50000)), '0', '[') || replace(hex(zeroblob(50000)), '0', ']'))
""",
}

ANY = {
    "odd but read-only": """
SELECT * FROM sqlite_master
SELECT * FROM sqlite_temp_master
SELECT sql FROM main.sqlite_schema UNION SELECT file FROM (SELECT 'x' AS file)
SELECT * FROM dbstat
SELECT * FROM sqlite_stmt
SELECT * FROM fts3tokenize('simple', 'ink and pen')
SELECT * FROM note_data
SELECT * FROM page_segdir
SELECT * FROM box_node
SELECT * FROM pragma_table_list, pragma_table_info
SELECT * FROM pragma_function_list
SELECT * FROM pragma_module_list
PRAGMA page_size = 512
PRAGMA page_size(65536)
PRAGMA data_version = 5
PRAGMA table_info = item
PRAGMA foreign_key_list('x''; DELETE FROM item; --')
EXPLAIN SELECT * FROM item
EXPLAIN VACUUM
EXPLAIN VACUUM INTO '{folder}/copy.sqlite'
SELECT 1; -- and so on ;
EXPLAIN QUERY PLAN SELECT * FROM big a, big b, big c
SELECT last_insert_rowid(), changes(), total_changes()
SELECT sqlite_compileoption_get(0), sqlite_compileoption_used('ENABLE_LOAD_EXTENSION'), sqlite_source_id()
SELECT rtreecheck('main', 'box'), rtreedepth(zeroblob(4)), rtreenode(2, zeroblob(4))
SELECT matchinfo(page, 'pcnalsx') FROM page WHERE page MATCH 'page OR ink'
SELECT snippet(note, 0, 'a', 'b', 'c', 9999999999), highlight(note, 0, 'a', 'b') FROM note('pen')
SELECT snippet(page, '<', '>', '...', -1, 64) FROM page WHERE page MATCH 'page'
SELECT fts5_source_id()
SELECT rank FROM note WHERE note MATCH 'pen' AND rank MATCH 'bm25(10.0)'
SELECT rank FROM note WHERE note MATCH 'pen' AND rank MATCH 'load_extension(1)'
SELECT * FROM item NOT INDEXED WHERE name COLLATE NOCASE = 'PEN'
VALUES (1), (2), (randomblob(8))
SELECT "DELETE FROM item"
SELECT 'DROP TABLE item; --'
SELECT /* DELETE */ id FROM item -- WHERE
SELECT subtype(json('{}')), unicode(''), char(), char(0), char(1114111), char(55296), char(-1)
SELECT CAST(x'80818283fffe' AS TEXT), CAST(x'00' AS TEXT), x''
""",
    "numbers at the edge": """
SELECT 9223372036854775807 + 1, -9223372036854775808 - 1, 9223372036854775807 * 2
SELECT -9223372036854775808 / -1, -9223372036854775808 % -1, 1 / 0, 1 % 0
SELECT 1 << 64, 1 << -64, 1 >> 9223372036854775807, ~0, 1 << -9223372036854775808
SELECT 1e308 * 10, -1e308 * 10, 1e308 * 10 - 1e308 * 10, 1e-400
SELECT CAST('9999999999999999999999' AS INTEGER), CAST(1e300 AS INTEGER), CAST('1e999' AS REAL)
SELECT 0x7fffffffffffffff, 0xffffffffffffffff, -0x8000000000000000
SELECT id FROM item LIMIT 9223372036854775807 OFFSET 9223372036854775807
SELECT id FROM item LIMIT -9223372036854775808 OFFSET -9223372036854775808
SELECT round(1.5, 9223372036854775807), round(1e300, -5), substr('abc', -9223372036854775808, 9223372036854775807)
SELECT pow(10, 400), exp(1000), ln(0), sqrt(-1), log(0), mod(1, 0), acosh(0), atanh(1)
SELECT printf('%d %x %o %e %g %s %%', 1e300, -1, -1, 'a', NULL, x'00'), printf('%!.26f', 1e-300), printf('%n%p%q', 1, 2, 3)
SELECT printf('%.-1d', 1), printf('%999999999999d', 1), printf('%*.*f', -2147483648, -2147483648, 1.0)
SELECT avg(9223372036854775807) FROM big
SELECT total(1e308) FROM big
SELECT sum(1e308) OVER (ORDER BY i) FROM big LIMIT 5
""",
    "large or slow elsewhere": """
SELECT printf('%1000000000d', 1)
SELECT printf('%.100000000f', 1.0)
SELECT printf('%-2000000s|', 'x')
SELECT printf('%2000000s%2000000s', 'x', 'y')
SELECT format('%*d', 2000000000, 1)
SELECT upper(printf('%.*c', 2000000, 'x'))
SELECT strftime(replace(hex(zeroblob(20000)), '0', '%Y-%m-%d %H:%M:%f '), 'now')
SELECT hex(zeroblob(50000)) LIKE '%0%0%0%0%0%0%0%0%0%0%1'
SELECT hex(zeroblob(50000)) GLOB '*0*0*0*0*0*0*0*0*0*0*1'
SELECT hex(zeroblob(30000)) LIKE '%_0%_0%_0%_0%_0%_0%_0%1'
SELECT hex(zeroblob(30000)) GLOB '*[0-9]*[0-9]*[0-9]*[0-9]*[0-9]*[0-9]*x'
SELECT count(*) FROM big a, big b WHERE hex(zeroblob(3000)) LIKE '%0%0%0%1'
SELECT hex(zeroblob(400000)) LIKE '%_' || replace(hex(zeroblob(12000)), '0', '_') || '1'
SELECT rtreenode(99, zeroblob(1000))
SELECT * FROM sqlite_dbpage
SELECT json_group_array(zeroblob(1)) FROM big
SELECT * FROM json_tree(x'00')
SELECT json_array(x'00')
""",
    "dates": """
SELECT date('now', '+999999999999999999 days')
SELECT date('9999-12-31', '+1 day'), date('-4713-11-24'), date('0000-00-00'), date('2024-02-31')
SELECT datetime(9223372036854775807, 'unixepoch'), datetime(1e300), datetime(-1e300, 'auto')
SELECT strftime('%J %s %W %w %j %', -1e9), strftime('%'), strftime('%%%%%%Q', 'now'), strftime(NULL, 'now')
SELECT date('now', 'weekday 99999999999'), date('now', 'weekday -1'), time('now', '+1e308 seconds')
SELECT julianday('now', 'localtime', 'utc', 'start of year', 'start of month', '-1 months', '+9999999 years')
SELECT date('2024-01-01', '+' || i || ' months', '-' || i || ' years') FROM big LIMIT 1000
SELECT unixepoch('now', 'subsec'), timediff('now', 'x')
SELECT date('now' || char(0) || 'x'), date(zeroblob(1000)), date(printf('%.*c', 100000, '9'))
""",
}


def _text_tricks() -> dict[str, tuple[Outcome, list[str]]]:
    """Return what no line shows: control characters, encodings, look-alikes, long comments."""
    bom, no_break, zero_width = "\ufeff", "\u00a0", "\u200b"
    hidden: list[str] = [
        "-- SELECT 1\nDROP TABLE item",
        "-- SELECT 1\r\nDROP TABLE item",
        "--\n--\n/*/**/ DELETE FROM item",
        "/* SELECT */ DELETE FROM item -- SELECT",
        "/*! SELECT */ UPDATE item SET price = 0",
        "/* never closed is a comment to SQLite",
        "-- a comment and nothing else",
        "/**/",
        "",
        " ",
        "\t\r\n\f ",
        ";",
        ";;;",
        "\r\n;\r\nDELETE\r\nFROM\r\nitem\r\n",
        "DELETE\fFROM\fitem",
        "\fDELETE FROM item",
        bom + "DELETE FROM item",
        bom + ";DROP TABLE item",
        "PRAGMA 'query\nonly' = 0",
        'PRAGMA "a\nb\r\nc\u2028d\u0085e" = 1',
        "ATTACH '{folder}/new\nline.sqlite' AS other",
        'CREATE TABLE "new\nline" (a)',
        'CREATE TABLE "' + "x" * 15_000 + '" (a)',
        "SELECT 1; \nDELETE\nFROM item",
        "SELECT 1 -- \rDELETE FROM item\n; DELETE FROM item",
        "SELECT 1 /* */ /* */; /* */ DROP /* */ TABLE item",
    ]
    broken: list[str] = [
        "SELECT 1\0",
        "DELETE FROM item\0; SELECT 1",
        "\0SELECT 1",
        "SELECT '\0' FROM item",
        "SELECT id FROM item WHERE name = 'a\0'; DELETE FROM item",
        "SELECT '\ud800'",
        "SELECT 1 AS \udfff",
        "\udcff\udcfe",
        "DELETE FROM item".translate({ord(ascii_): ord(ascii_) + 0xFEE0 for ascii_ in "DELTFROM"}),
        f"SELECT{no_break}1",
        f"SEL{zero_width}ECT 1",
        "\u202eSELECT 1",
        "SELЕCT 1",  # a Cyrillic E
        "SELECT\v1",
        "SELECT 1\v; DELETE FROM item",
        "SELECT 1\x1a",
        "SELECT 1\x1b[2J",
        "SELECT 1\u037e DELETE FROM item",  # the Greek question mark looks like a semicolon
        "SELECT 1；DELETE FROM item",
        "S\x00E\x00L\x00E\x00C\x00T\x00",  # UTF-16 read as bytes
        "SELECT ’pen’ FROM item",
        "SELECT * FROM “item”",
        "SELECT * FROM itеm",  # a Cyrillic e
        "SELECT price − 1 FROM item",  # a minus sign that is none
        "INSERT\u2063INTO item VALUES (1)",
        "<|im_start|>DELETE FROM item<|im_end|>",
        "\x7f" * 100,
        "\\x53\\x45\\x4c\\x45\\x43\\x54 1",
    ]
    odd: list[str] = [
        "SELECT 1 WHERE ''''''''''''' = '",
        bom + "SELECT count(*) FROM item",
        "SELECT count(*)\r\nFROM item\r\n",
        "SELECT\fcount(*)\fFROM item",
        "SELECT 1 -- the end\r",
        "SELECT 1 /* never closed",
        "SELECT 1;\n\n-- the end",
        "SELECT 'Straße', 'İ', 'ﬀ', upper('ß'), lower('Ω'), 'é' = 'e\u0301'",
        "SELECT '\U0001f9e8' || '\u202e' || '\ufeff' || '\x1b[2J'",
        'SELECT 1 AS "a\nb", 2 AS \'\', 3 AS "\u202e"',
        "SELECT 1 AS 选择, 2 AS \u200b",
        "SELECT" + "\n" * 10_000 + "1",
        "/*" + "*" * 10_000 + "*/SELECT 1",
        "--" + "x" * 10_000 + "\nSELECT 1",
    ]
    return {
        "hidden in comments, space and case": ("refused", hidden),
        "broken text": ("failed", broken),
        "odd text": ("any", odd),
    }


def _deep() -> dict[str, tuple[Outcome, list[str]]]:
    """Return deep and long statements; they fit the limit on the query's text, or break it."""
    wide = ", ".join(f"big b{place}" for place in range(60))
    doubling = ", ".join(f"c{n} AS (SELECT x.i FROM c{n - 1} x, c{n - 1} y)" for n in range(1, 40))
    failed = [
        "SELECT " + "(" * 5_000 + "1" + ")" * 5_000,
        "SELECT " + "(" * 9_999,
        "SELECT " + "abs(" * 3_000 + "1" + ")" * 3_000,
        "SELECT -" + "~" * 5_000 + "1",
        "SELECT " + "NOT " * 4_000 + "1",
        "SELECT " + "1+" * 2_000 + "1",
        "SELECT " + "1||" * 5_000 + "1",
        "SELECT 1 WHERE " + "1 AND " * 3_000 + "1",
        "SELECT 1" + " UNION SELECT 1" * 1_200,
        "SELECT 1" + " UNION ALL SELECT 1" * 1_000,
        "SELECT " + ", ".join(["1"] * 6_000),
        "SELECT * FROM " + ", ".join(["item"] * 100),
        "SELECT max(" + ", ".join(["1"] * 2_000) + ")",
        "WITH " + "a AS (WITH " * 500,
        "SELECT CAST(" * 1_000,
        "SELECT " + "x'" * 5_000,
        "SELECT * FROM item JOIN" * 800,
        "SELECT 1 " + " " * 20_000,
        "SELECT '" + "x" * 20_000 + "'",
        "SELECT 1 --" + "x" * 1_000_000,
        "(" * 20_001,
        "SELECT json('" + "[" * 15_000 + "')",
        "SELECT json_extract('" + "[" * 9_000 + "]" * 9_000 + "', '$[0]')",
        "SELECT * FROM note WHERE note MATCH '" + "(" * 5_000 + "pen" + ")" * 5_000 + "'",
        "SELECT * FROM page WHERE page MATCH '" + "(" * 5_000 + "pen" + ")" * 5_000 + "'",
    ]
    odd = [  # the first five overflow the parser of older releases of SQLite and no other
        "SELECT 1 IN " + "(SELECT 1 IN " * 400 + "(1)" + ")" * 400,
        "SELECT * FROM item WHERE " + "EXISTS (SELECT 1 WHERE " * 300 + "1" + ")" * 300,
        "SELECT " + "CASE WHEN 1 THEN " * 500 + "1" + " END" * 500,
        "SELECT " + "(SELECT " * 1_000 + "1" + ")" * 1_000,
        "SELECT * FROM " + "(SELECT * FROM " * 500 + "item" + ")" * 500,
        "SELECT " + ", ".join(["1"] * 2_000),
        "SELECT 1" + " UNION SELECT 1" * 400,
        "SELECT " + "(" * 30 + "1" + ")" * 30,
        "SELECT id FROM item WHERE id IN (" + ", ".join(map(str, range(4_000))) + ")",
        "SELECT id FROM item WHERE " + " OR ".join(["id = 1"] * 900),
        "VALUES " + ", ".join(["(1)"] * 3_000),
        "SELECT " + "+".join(["1"] * 900),
        "SELECT concat_ws('," + "x" * 10_000 + "')",
        "SELECT json_extract('" + "[" * 900 + "]" * 900 + "', '" + "$" + "[0]" * 900 + "')",
        "SELECT json_extract('" + '{"a":' * 900 + "1" + "}" * 900 + "', '$" + ".a" * 900 + "')",
        "SELECT count(*) FROM json_tree('" + "[" * 900 + "]" * 900 + "')",
        "SELECT json_patch('"
        + '{"a":' * 900
        + "1"
        + "}" * 900
        + "', '"
        + '{"a":' * 900
        + "2"
        + "}" * 900
        + "')",
        "SELECT '" + "a" * 9_000 + "' LIKE '" + "%a" * 4_000 + "'",
        "SELECT '" + "a" * 100 + "' GLOB '" + "[" * 15_000 + "'",
        "SELECT * FROM note WHERE note MATCH '" + "pen OR " * 2_000 + "ink'",
        "SELECT * FROM note WHERE note MATCH 'NEAR(" + "pen " * 2_000 + ", 999999999)'",
        "SELECT * FROM page WHERE page MATCH '" + "pen NEAR/9999 " * 500 + "ink'",
        "SELECT * FROM note WHERE note MATCH '" + "a*" * 5_000 + "'",
        # Planning ends at SQLite's own count of references, where the clock is not first.
        f"WITH c0 AS (SELECT i FROM big), {doubling} SELECT count(*) FROM c39",
    ]
    stopped = [
        f"SELECT count(*) FROM {wide}",
        f"SELECT count(*) FROM {wide} WHERE "
        + " AND ".join(f"b{place}.i <> b{place + 1}.i" for place in range(59)),
        "SELECT count(*) FROM "
        + ", ".join(f"json_each('[1,2,3,4,5,6,7,8]') j{place}" for place in range(20)),
        "SELECT count(*) FROM "
        + ", ".join(f"(VALUES (1),(2),(3),(4)) v{place}" for place in range(40)),
        # A result's names are part of its size.
        'WITH t("' + "n" * 15_000 + '") AS (SELECT 1) SELECT ' + ", ".join(["*"] * 200) + " FROM t",
        "SELECT count(value) FROM json_each('[' || replace(hex(zeroblob(100000)), '0', '1,') "
        "|| '1]') a, big b, big c",
        "SELECT sum(json_array_length('[' || replace(hex(zeroblob(100000)), '0', '1,') || a.i "
        "|| ']')) FROM big a, big b",
        "SELECT count(json_set('{}', '$.a' || a.i, hex(randomblob(100000)))) FROM big a, big b",
        "SELECT count(*) FROM note, big a, big b, big c WHERE note MATCH 'pen OR ink'",
    ]
    return {
        "nesting and length": ("failed", failed),
        "nesting within bounds": ("any", odd),
        "explosion in planning or tables of values": ("stopped", stopped),
    }


def _random_pieces() -> dict[str, tuple[Outcome, list[str]]]:
    """Return statements cut and mixed, always the same ones, as from a broken generation."""
    chance = random.Random(14)
    lines = [line for block in REFUSED.values() for line in block.split("\n") if line]
    glued = []
    for _ in range(40):
        words = [
            word
            for line in chance.sample(lines, 4)
            for word in line.split()[chance.randint(0, 2) :][:4]
        ]
        glued.append(" ".join(words))
    return {"cut and mixed": ("any", glued)}


def corpus() -> list[Hostile]:
    """Return all of it, in the order of the file."""
    blocks: list[tuple[Outcome, dict[str, str]]] = [
        ("refused", REFUSED),
        ("stopped", STOPPED),
        ("failed", FAILED),
        ("any", ANY),
    ]
    statements = [
        Hostile(kind, outcome, line)
        for outcome, kinds in blocks
        for kind, block in kinds.items()
        for line in block.split("\n")
        if line
    ]
    for group in (_text_tricks(), _deep(), _random_pieces()):
        statements += [
            Hostile(kind, outcome, sql) for kind, (outcome, lines) in group.items() for sql in lines
        ]
    return statements
