"""Questions with their gold SQL, and the databases they are about, from whatever form the user has them in.

Five forms are told apart by what lies in the place named by `dataset_id`: a Spider folder, a BIRD folder, JSONL, a dataset of
the Hub, and `demo`. All become a `Corpus`: named splits of `Example`s plus one `Schema` and one database per `db_id`. What is
set aside for validation is set aside by whole databases unless the user says otherwise, and overlap between splits is reported.
"""

from ray_sql.data.corpus import Corpus, Example, leakage, sample, why_not_executable
from ray_sql.data.read import parse_lines, read_records
from ray_sql.data.splits import load, load_split
