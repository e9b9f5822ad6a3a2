"""Questions with their gold SQL, and their databases, from any form that the user has.

The form is recognised by the files at the place that `dataset_id` names. It is one file, a folder
in a known layout, a dataset of the Hub, or `demo`. Each becomes a `Corpus`: splits of
`Example`s by name, and one `Schema` and one database per `db_id`. Validation examples are set aside
by whole databases unless the user asks for questions. Overlap between splits is reported.
"""

from ray_sql.data.corpus import (
    Corpus,
    Example,
    LeftOut,
    counted,
    leakage,
    remarks,
    repeated,
    sample,
    why_not_executable,
)
from ray_sql.data.formats import parse_lines, read_file, read_text
from ray_sql.data.splits import add_schema, load, load_split, read_databases
from ray_sql.data.values import with_values
