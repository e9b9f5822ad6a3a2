"""Database schemas: values, two ways to read them, the part that a query needs, and the text that a prompt shows.

`values` holds the dataclasses and `restrict`, `reflection` reads a live database, `tables_json` reads Spider's and
BIRD's file, `text` renders. Import from here.
"""

from ray_sql.schema.reflection import reflect
from ray_sql.schema.tables_json import read_tables_json
from ray_sql.schema.text import SERIALIZER_VERSION, Serializer, render
from ray_sql.schema.values import Column, ForeignKey, Form, Links, Schema, Table, restrict

__all__ = [
    "SERIALIZER_VERSION",
    "Column",
    "ForeignKey",
    "Form",
    "Links",
    "Schema",
    "Serializer",
    "Table",
    "read_tables_json",
    "reflect",
    "render",
    "restrict",
]
