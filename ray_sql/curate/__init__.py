"""A database and raw pairs of one's own become a dataset that can be trusted.

`prepare` is the door. `audit` judges queries by running them, on copies whose rows lie in another
order, too. `near` finds pairs that are almost alike, `fixes` the query that was meant, and `divide`
makes splits of it all.
"""

from ray_sql.curate.audit import Bench, Subject, bench, examine, examine_all
from ray_sql.curate.flags import KINDS, MEANING, UNDETERMINED, Flag, Kind
from ray_sql.curate.prepare import prepare
