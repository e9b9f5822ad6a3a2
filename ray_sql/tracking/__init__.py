"""MLflow as the record of a run. Where tracking is off, no function does anything."""

from ray_sql.tracking.models import LoggedModel
from ray_sql.tracking.names import GAIN, SCORED, THIS_RUN, VALIDATED, VIEW, final, named
from ray_sql.tracking.questions import ScoredQuestion
from ray_sql.tracking.remove import Recorded, find, remove
from ray_sql.tracking.run import Run, Status, close, null_run, read_tag, reopen, replay, start
from ray_sql.tracking.spool import run_ids_waiting
from ray_sql.tracking.store import require_store, run_exists, store_uri
