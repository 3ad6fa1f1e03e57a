"""What the server says of its API holds, for a model of each kind; a real server is asked in tests/e2e."""

import pytest
import schemathesis
from schemathesis import GenerationMode

from tests.openapi_checks import check_answers
from tests.unit.edits import EDIT_INFO
from tests.unit.fakes import INFO, VIDEO_INFO
from tests.unit.http_app import FakeEngine, make_app


@pytest.mark.parametrize("mode", GenerationMode)
@pytest.mark.parametrize("info", [INFO, EDIT_INFO, VIDEO_INFO], ids=["generations", "edits", "videos"])
def test_answers_are_as_described(monkeypatch, info, mode):
    app = make_app(FakeEngine(), monkeypatch, info)
    check_answers(schemathesis.openapi.from_asgi("/openapi.json", app), mode, examples=8)
