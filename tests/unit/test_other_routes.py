"""Routes beside those that generate, and what the server says of those that there are not: OpenAI's objects."""

import openai
import pytest
from fastapi import FastAPI

from tests.unit.http_app import GENERATIONS, FakeEngine, ask, get, make_app
from vllm_cfg_plugin.compat.api_server import explain_unauthorized
from vllm_cfg_plugin.entrypoints import health
from vllm_cfg_plugin.entrypoints.endpoint import replace_routes


@pytest.fixture
def app(monkeypatch):
    return make_app(FakeEngine(), monkeypatch)


def test_the_served_names_are_listed_and_can_be_retrieved(app):
    async def use(client):
        listed = [model.id async for model in await client.models.list()]
        return listed, [(await client.models.retrieve(name)).id for name in listed]

    assert ask(app, use) == (["emoji", "alias"], ["emoji", "alias"])


@pytest.mark.parametrize("name", ["gpt-image-1", "a/b"])
def test_another_name_is_a_404(app, name):
    with pytest.raises(openai.NotFoundError) as missing:
        ask(app, lambda client: client.models.retrieve(name))
    assert missing.value.param == "model"
    assert "emoji, alias" in missing.value.body["message"]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/v1/nothing", 404), ("POST", "/v1/image/generations", 404), ("GET", GENERATIONS, 405)],
)
def test_what_is_no_route_is_answered_with_an_error_object(app, method, path, status):
    answer = get(app, f"http://test{path}", method)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert path in error["message"]
    assert status != 405 or answer.headers["allow"] == "POST"


def test_a_route_in_place_of_vllms_is_the_only_one():
    """Else the description of the API has both, or vLLM's, and the log a warning."""
    app = FastAPI()
    app.get("/health")(lambda: "vLLM's")
    app.get("/version")(lambda: "vLLM's")
    replace_routes(app, health.router)
    routes = [route for route in app.router.routes if route.path in ("/health", "/version")]
    assert [(route.path, route.endpoint.__module__) for route in routes] == [
        ("/health", health.__name__),
        ("/version", __name__),
    ]


def test_a_wrong_key_is_answered_with_an_error_object(app):
    from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware

    explain_unauthorized()
    guarded = AuthenticationMiddleware(app, ["secret"])
    with pytest.raises(openai.AuthenticationError) as refused:
        ask(guarded, lambda client: client.models.list())
    assert "--api-key" in refused.value.body["message"]
