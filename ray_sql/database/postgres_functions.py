"""Find the functions of a PostgreSQL server that act outside of a transaction.

No query may call them, by their names or through what the database's owner made of them.
"""

from collections.abc import Iterable
from typing import Any

import psycopg

from ray_sql.database.named_functions import is_called, outside, used

HARMLESS = set(
    "random random_normal clock_timestamp timeofday gen_random_uuid uuid_generate_v4".split()
)
"""Volatile only because they answer anew each time."""
RUNS_TEXT = set("crosstab crosstab2 crosstab3 crosstab4 crosstabn connectby xpath_table".split())
"""Functions of the server's extensions that run a query given as text, not declared volatile."""
XPATH = set("xpath xpath_exists xmltable xmlexists xslt_process xpath_bool xpath_nodeset".split())
"""They run programs of loops in loops, which no limit of the server stops."""
WORDS = {"xmlexists", "xmltable"}
"""Functions of the grammar, whose names may be those of columns too."""
# No query can call a function with an argument of type `internal`, whose name may be "system".
VOLATILE = """
SELECT DISTINCT lower(p.proname) FROM pg_catalog.pg_proc p
WHERE p.provolatile = 'v' AND p.prorettype <> 'trigger'::regtype
  AND NOT 'internal'::regtype = ANY (p.proargtypes::oid[])
  AND (p.pronamespace = 'pg_catalog'::regnamespace OR EXISTS (
    SELECT FROM pg_catalog.pg_depend d
    WHERE d.classid = 'pg_proc'::regclass AND d.objid = p.oid AND d.deptype = 'e'))
"""
OWN = """
SELECT lower(p.proname), p.prosecdef OR NOT l.lanpltrusted,
  CASE p.prokind WHEN 'a' THEN concat_ws(' ', a.aggtransfn, a.aggfinalfn, a.aggcombinefn,
      a.aggmtransfn, a.aggminvtransfn, a.aggmfinalfn)
    ELSE pg_catalog.pg_get_functiondef(p.oid) END
FROM pg_catalog.pg_proc p JOIN pg_catalog.pg_language l ON l.oid = p.prolang
LEFT JOIN pg_catalog.pg_aggregate a ON a.aggfnoid = p.oid
WHERE p.pronamespace <> 'pg_catalog'::regnamespace AND p.prorettype <> 'trigger'::regtype
  AND p.pronamespace <> 'information_schema'::regnamespace AND NOT EXISTS (
    SELECT FROM pg_catalog.pg_depend d
    WHERE d.classid = 'pg_proc'::regclass AND d.objid = p.oid AND d.deptype = 'e')
UNION ALL SELECT lower(c.relname), false, pg_catalog.pg_get_viewdef(c.oid)
FROM pg_catalog.pg_class c WHERE c.relkind = 'v'
  AND c.relnamespace <> 'pg_catalog'::regnamespace
  AND c.relnamespace <> 'information_schema'::regnamespace
UNION ALL SELECT lower(c.relname), false, pg_catalog.pg_get_expr(y.polqual, y.polrelid)
FROM pg_catalog.pg_policy y JOIN pg_catalog.pg_class c ON c.oid = y.polrelid
WHERE y.polqual IS NOT NULL
UNION ALL SELECT lower(t.typname), false, pg_catalog.pg_get_constraintdef(c.oid)
FROM pg_catalog.pg_constraint c JOIN pg_catalog.pg_type t ON t.oid = c.contypid
UNION ALL SELECT lower(t.typname), false, pg_catalog.format_type(t.typbasetype, NULL)
FROM pg_catalog.pg_type t WHERE t.typtype = 'd'
UNION ALL SELECT lower(c.relname), true, ''
FROM pg_catalog.pg_foreign_table f JOIN pg_catalog.pg_class c ON c.oid = f.ftrelid
WHERE array_to_string(f.ftoptions, ' ') LIKE '%program=%'
UNION ALL SELECT lower(t.typname), false, p.proname
FROM pg_catalog.pg_cast c JOIN pg_catalog.pg_type t ON t.oid = c.casttarget
JOIN pg_catalog.pg_proc p ON p.oid = c.castfunc
WHERE p.pronamespace <> 'pg_catalog'::regnamespace
UNION ALL SELECT o.oprname, false, p.proname
FROM pg_catalog.pg_operator o JOIN pg_catalog.pg_proc p ON p.oid = o.oprcode
WHERE p.pronamespace <> 'pg_catalog'::regnamespace
"""
"""The functions that the database's owner made, and what calls them without their names.

These are views, policies of rows, checks of domains, foreign tables that a program fills, casts
(by the target's type) and operators.
"""


def refused_functions(connection: psycopg.Connection[Any]) -> set[str]:
    """Return the names of all functions that no query may call, in lower case."""
    volatile = {name for (name,) in connection.execute(VOLATILE)}
    refused = volatile - HARMLESS | RUNS_TEXT | XPATH
    return refused | outside(connection.execute(OWN).fetchall(), refused)


def called(refused: Iterable[str], sql: str) -> set[str]:
    """Return the refused names that a query may call."""
    return {name for name in used(refused, sql) if name not in WORDS or is_called(name, sql)}
