"""Questions with their gold SQL, and their databases, from any form that the user has.

Five forms are recognised by the files at the place that `dataset_id` names. They are a Spider
folder, a BIRD folder, JSONL, a dataset of the Hub, and `demo`. Each becomes a `Corpus`: splits of
`Example`s by name, and one `Schema` and one database per `db_id`. Validation examples are set aside
by whole databases unless the user asks for questions. Overlap between splits is reported.
"""

from ray_sql.data.corpus import Corpus, Example, leakage, sample, why_not_executable
from ray_sql.data.read import parse_lines, read_records
from ray_sql.data.splits import load, load_split
