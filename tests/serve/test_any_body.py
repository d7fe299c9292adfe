"""Whatever is sent, by the schema and against it: no answer is the server's own fault."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode

from tests.serve.conftest import DEFAULTS, make_engine
from tests.support.engines import assert_all_pages_free
from tests.support.servers import Running, running


@pytest.fixture(scope="module")
def fuzzed() -> Iterator[Running]:
    """One of its own: what it is sent, no other test sees."""
    with running(make_engine(), DEFAULTS, seconds=20.0, tokens=24, candidates=16) as found:
        yield found
        with httpx2.Client(base_url=found.url) as http:
            assert http.get("/ready").status_code == 200
        with found.engine.runner.turn():
            assert_all_pages_free(found.engine)


@pytest.fixture(scope="module")
def api(fuzzed: Running) -> Any:
    return schemathesis.openapi.from_dict(fuzzed.app.openapi())


ROUTES = [
    ("/v1/completions", "POST"),
    ("/v1/chat/completions", "POST"),
    ("/v1/score", "POST"),
    ("/tokenize", "POST"),
    ("/detokenize", "POST"),
    ("/live", "POST"),
    ("/v1/models/{name}", "GET"),
]


@pytest.mark.parametrize(
    ("path", "method", "mode"),
    [
        (*route, mode)
        for route in ROUTES
        for mode in GenerationMode
        if route[1] == "POST" or mode is GenerationMode.POSITIVE  # any text is a name
    ],
)
def test_no_body_brings_the_server_down(
    fuzzed: Running, api: Any, path: str, method: str, mode: GenerationMode
) -> None:
    @given(case=api[path][method].as_strategy(generation_mode=mode))
    @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
    def ask(case: Any) -> None:
        answer = case.call(base_url=fuzzed.url, timeout=30)
        assert answer.status_code < 500, answer.text
        if answer.status_code >= 400:
            error = answer.json()["error"]
            assert error["message"] and set(error) == {"message", "type", "param", "code"}

    ask()


def test_all_routes_that_take_something_are_among_these(fuzzed: Running) -> None:
    paths = fuzzed.app.openapi()["paths"]
    asked = {(path, method.upper()) for path, own in paths.items() for method in own}
    takes = {
        (path, method)
        for path, method in asked
        if "requestBody" in paths[path][method.lower()] or "{" in path
    }
    assert takes == set(ROUTES)
