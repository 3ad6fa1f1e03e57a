"""What a server says of its API holds: schemathesis sends what the description allows, and what it does not."""

from __future__ import annotations

from contextlib import nullcontext, suppress
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
)

CHECKS = [not_a_server_error, content_type_conformance, response_schema_conformance, negative_data_rejection]
ROUTES = "^/(v1/(images|videos|models)|images)"


def check_answers(schema: Any, mode: GenerationMode, examples: int) -> None:
    """Send each route of ours so many requests, and check the answers.

    Args:
        schema: schemathesis's, of a server's /openapi.json.
    """
    operations = [operation.ok() for operation in schema.include(path_regex=ROUTES).get_all_operations()]
    assert len(operations) >= 9
    for operation in operations:

        @given(case=operation.as_strategy(generation_mode=mode))
        @settings(max_examples=examples, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
        def answers_as_described(case: Any) -> None:
            case.call_and_validate(checks=CHECKS)

        # A path whose parameters may be anything can't be asked for wrongly.
        with suppress(Unsatisfiable) if mode is GenerationMode.NEGATIVE else nullcontext():
            answers_as_described()
