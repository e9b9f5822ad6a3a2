"""Questions become answers of a base model, with or without an adapter.

A driver needs `questions`, `answer_cache` and the worker's entry point. `answers` asks a model, and
is imported by those who have one. It computes each database's schema once (`decoder`). Beams and
models that cannot share a prefix go through transformers (`hf_generate`).
"""

from ray_sql.generate.answer_cache import VERSION, AnswerCache
from ray_sql.generate.groups import token_counts
from ray_sql.generate.questions import (
    Answer,
    Candidate,
    Question,
    check_window,
    dump,
    gold_answer,
    localize,
    make_questions,
    parse,
    question_encoder,
    stage_databases,
)
from ray_sql.generate.worker import answer_loop_per_worker, load_model
