"""Scores: pure functions of plain values, each named by the judgement it makes.

- `match` compares two results under the semantics of Spider, BIRD or plain equality.
- `judge` runs gold and prediction in an `Executor` and returns a verdict.
- `bird` has BIRD's scores of speed and of near misses.
- `exact_set` compares two queries clause by clause, as Spider does; `spider_grammar`,
  `spider_query` and `spider_words` read them.
- `hardness` grades a query as Spider does.
- `linking` scores schema links.
- `statistics` has the intervals that belong beside every accuracy, `paired` the paired test.
- `judged` counts and groups the rows of `predictions.jsonl`.
"""

from ray_sql.metrics.bird import r_ves, soft_f1, ves_reward
from ray_sql.metrics.exact_set import exact_set_match, exact_set_verdict, is_readable
from ray_sql.metrics.hardness import hardness
from ray_sql.metrics.judge import (
    Pair,
    Verdict,
    VerdictName,
    classify_error,
    judge,
    judge_many,
    time_pair,
)
from ray_sql.metrics.linking import (
    PRF,
    Counts,
    LinkingScore,
    score_links,
    spare_names,
    summarise_links,
)
from ray_sql.metrics.match import (
    Semantics,
    bird_match,
    execution_match,
    is_ordered,
    prepare_spider,
    spider_match,
    strict_match,
)
from ray_sql.metrics.statistics import (
    Interval,
    clustered_interval,
    how_little_is_known,
    mcnemar,
    resolvable_difference,
    wilson_interval,
)
