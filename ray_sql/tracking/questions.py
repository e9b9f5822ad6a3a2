"""A run's scored questions as traces with verdicts, which MLflow shows beside another run's.

`mlflow.genai.evaluate` on given outputs records the same, and is not called. Its ten threads wait
for each other where the store is a SQLite file, and questions are lost. It writes to the terminal,
too.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

GOLD = "gold"
"""The name of the answer that is expected."""
PREVIEW = 1000
"""Characters of a question, and of an answer, that MLflow's table holds."""
TRACES_PER_CALL = 100
"""Traces that MLflow deletes in one call."""


class ScoredQuestion(NamedTuple):
    """A question with its answer. `right` is None where the gold is at fault, for that `reason`."""

    inputs: Mapping[str, str]
    answer: str | None
    gold: str
    right: bool | None
    reason: str
    tags: Mapping[str, str]


def send_questions(client: Any, run_id: str, score: str, *scored: Sequence[Any]) -> None:
    """Log the questions of a run, judged by `score`, in place of those of an earlier time."""
    from mlflow.tracing.client import TracingClient

    experiment = client.get_run(run_id).info.experiment_id
    remove_questions(client, experiment, run_id)
    sender, spans = TracingClient(client.tracking_uri), []
    for values in scored:
        question = ScoredQuestion(*values)
        number = secrets.randbits(128)
        sender.start_trace(_trace(question, number, score, experiment, run_id))
        spans.append(_span(question, number))
    sender.log_spans(experiment, spans)  # all in one call: the text that a click shows


def remove_questions(client: Any, experiment: str, run_id: str) -> None:
    """Delete the questions of a run."""
    trace_ids = list(_trace_ids(client, experiment, run_id))
    for first in range(0, len(trace_ids), TRACES_PER_CALL):
        client.delete_traces(experiment, trace_ids=trace_ids[first : first + TRACES_PER_CALL])


def _trace_ids(client: Any, experiment: str, run_id: str) -> Iterator[str]:
    token = None
    while True:
        found = client.search_traces(
            locations=[experiment], run_id=run_id, include_spans=False, page_token=token
        )
        yield from (trace.info.trace_id for trace in found)
        token = found.token
        if not token:
            return


def _trace(question: ScoredQuestion, number: int, score: str, experiment: str, run_id: str) -> Any:
    from mlflow.entities import (
        AssessmentError,
        AssessmentSource,
        Expectation,
        Feedback,
        TraceInfo,
        TraceLocation,
        TraceState,
    )

    told = {
        "source": AssessmentSource("CODE", "ray_sql"),
        "metadata": {"mlflow.assessment.sourceRunId": run_id},
    }
    if question.right is None:
        error = AssessmentError("GOLD_ERROR", question.reason)
        verdict = Feedback(score, error=error, **told)
    else:
        verdict = Feedback(score, question.right, rationale=question.reason or None, **told)
    return TraceInfo(
        _trace_id(number),
        TraceLocation.from_experiment_id(experiment),
        int(time.time() * 1000),
        TraceState.OK,
        request_preview=" · ".join(question.inputs.values())[:PREVIEW],
        response_preview=(question.answer or "")[:PREVIEW],
        execution_duration=0,
        trace_metadata={"mlflow.sourceRun": run_id, "mlflow.trace_schema.version": "3"},
        tags={
            "mlflow.traceName": "question",
            "mlflow.trace.spansLocation": "TRACKING_STORE",
            **question.tags,
        },
        assessments=[verdict, Expectation(GOLD, question.gold, **told)],
    )


def _span(question: ScoredQuestion, number: int) -> Any:
    from mlflow.entities import Span
    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.trace import SpanContext, TraceFlags

    now = time.time_ns()
    context = SpanContext(number, secrets.randbits(64), False, TraceFlags(TraceFlags.SAMPLED))
    attributes = {
        "mlflow.traceRequestId": _trace_id(number),
        "mlflow.spanType": "CHAIN",
        "mlflow.spanInputs": question.inputs,
        "mlflow.spanOutputs": question.answer,
    }
    known = {name: json.dumps(value, ensure_ascii=False) for name, value in attributes.items()}
    return Span(ReadableSpan("question", context, attributes=known, start_time=now, end_time=now))


def _trace_id(number: int) -> str:
    return f"tr-{number:032x}"
