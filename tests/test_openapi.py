"""Requests that schemathesis makes of the service's own description: none makes it fail."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from tests.serving import make_engine, serving


@pytest.fixture(scope="module")
def described(tuned_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Share the description that a service gives of itself, which leads back to it."""
    schemathesis = pytest.importorskip("schemathesis")
    kept = tmp_path_factory.mktemp("kept") / "kept.jsonl"
    limits = {"evaluate.timeout": 1.0, "evaluate.processes": 1, "evaluate.max_new_tokens": 16}
    with make_engine(tuned_run, **limits) as engine, serving(engine, corrections=str(kept)) as http:
        yield schemathesis.openapi.from_url(f"{str(http.base_url).rstrip('/')}/openapi.json")


@pytest.mark.cluster
def test_no_request_of_the_description_makes_the_service_fail(described: Any) -> None:
    from schemathesis.checks import not_a_server_error

    tried = 0
    for found in described.get_all_operations():
        operation = found.ok()

        @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
        @given(operation.as_strategy())
        def no_request_fails(case: Any) -> None:
            case.call_and_validate(checks=[not_a_server_error])

        no_request_fails()
        tried += 1
    assert tried == len(described.raw_schema["paths"]) == 9
