"""Questions → answers with a base model and, where given, its adapter: each database's schema computed once and shared by its
questions (`shared`), as one-by-one greedy decoding would answer them; beams and other models in plain batches (`plain`)."""

from ray_sql.generate.answer_cache import Kept
from ray_sql.generate.answers import (
    VERSION,
    answer,
    answer_loop_per_worker,
    answer_together,
    spread,
)
from ray_sql.generate.questions import (
    Answer,
    Question,
    carry,
    check_window,
    dump,
    gold,
    parse,
    questions,
    unpack,
)
