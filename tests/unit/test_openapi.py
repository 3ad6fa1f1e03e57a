"""What the server says of its API holds: schemathesis sends what the description allows, and what it does not."""

from contextlib import nullcontext, suppress

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
)

from tests.unit.edits import EDIT_INFO
from tests.unit.fakes import INFO, VIDEO_INFO
from tests.unit.http_app import FakeEngine, make_app

CHECKS = [not_a_server_error, content_type_conformance, response_schema_conformance, negative_data_rejection]
ROUTES = "^/(v1/(images|videos|models)|images)"


@pytest.mark.parametrize("mode", GenerationMode)
@pytest.mark.parametrize("info", [INFO, EDIT_INFO, VIDEO_INFO], ids=["generations", "edits", "videos"])
def test_answers_are_as_described(monkeypatch, info, mode):
    app = make_app(FakeEngine(), monkeypatch, info)
    schema = schemathesis.openapi.from_asgi("/openapi.json", app).include(path_regex=ROUTES)
    operations = [operation.ok() for operation in schema.get_all_operations()]
    assert len(operations) >= 9
    for operation in operations:

        @given(case=operation.as_strategy(generation_mode=mode))
        @settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
        def answers_as_described(case):
            case.call_and_validate(checks=CHECKS)

        # A path whose parameters may be anything can't be asked for wrongly.
        with suppress(Unsatisfiable) if mode is GenerationMode.NEGATIVE else nullcontext():
            answers_as_described()
