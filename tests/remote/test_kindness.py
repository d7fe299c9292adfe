"""A server is asked no more, no faster and no longer than was agreed."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import openai._base_client
import pytest
from starlette.responses import Response

from tests.support.remote_engines import PROMPTS, SAMPLE, SEARCH, remote, told
from tests.support.scripted_server import Asked, Script, error, never_ending, scripted
from tests.support.servers import Running
from w2s_fast.errors import InvalidRequest, RemoteFailure

WIDE = replace(SEARCH, beam_width=4, successors=2, chunk_length=3)
PASSING = (408, 409, 429, 500, 503)


@pytest.fixture
def server() -> Iterator[Script]:
    with scripted(choice=never_ending) as found:
        yield found


def failing(times: int, status: int = 503, **headers: str) -> Callable[[Asked], Response | None]:
    """So many requests from now on."""
    left = [times]

    def instead(asked: Asked) -> Response | None:
        left[0] -= 1
        return error(status, "busy", **headers) if left[0] >= 0 else None

    return instead


@pytest.mark.parametrize("most", [1, 3])
def test_no_more_requests_are_under_way_than_were_agreed(server: Script, most: int) -> None:
    e = remote(server.url, (), max_concurrency=most)
    server.delay = 0.03
    server.begin()
    e.generate([f"{p} {i}" for i in range(3) for p in PROMPTS], replace(SAMPLE, n=2))
    assert server.at_once == most and len(server.asked) == 12


def test_connections_are_used_again(server: Script) -> None:
    e = remote(server.url, max_concurrency=3)
    server.begin()
    e.generate(PROMPTS, WIDE)
    e.generate(PROMPTS, WIDE)
    ports = Counter(asked.port for asked in server.asked)
    assert len(ports) <= 3 and len(server.asked) > 20


@pytest.mark.parametrize("status", PASSING)
def test_what_fails_in_passing_is_tried_again(
    server: Script, status: int, short_pauses: None
) -> None:
    e = remote(server.url, max_retries=2)
    (expected,) = e.generate(["hello"], SEARCH)
    server.begin()
    server.instead = failing(2, status)
    (result,) = e.generate(["hello"], SEARCH)
    assert told(result) == told(expected)
    assert result.usage.remote is not None and expected.usage.remote is not None
    assert result.usage.remote.requests == expected.usage.remote.requests + 2 == len(server.asked)
    assert replace(result.usage.remote, requests=0) == replace(expected.usage.remote, requests=0)
    bodies = [asked.body for asked in server.asked]
    assert bodies[0] == bodies[1] == bodies[2] != bodies[3]


@pytest.mark.parametrize("status", [400, 401, 403, 404, 413, 422])
def test_what_fails_for_good_is_asked_once(server: Script, status: int) -> None:
    e = remote(server.url)
    server.begin()
    server.instead = failing(99, status)
    with pytest.raises(RemoteFailure, match=f"{status}: busy"):
        e.generate(["hello"], SEARCH)
    assert len(server.asked) == 1


def test_pauses_grow(server: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai._base_client, "INITIAL_RETRY_DELAY", 0.04)
    e = remote(server.url, ())
    server.begin()
    server.instead = failing(3)
    e.generate(["hello"], SAMPLE)
    times = [asked.at for asked in server.asked]
    gaps = [b - a for a, b in pairwise(times)]
    assert len(gaps) == 3
    for number, gap in enumerate(gaps):
        assert gap >= 0.75 * 0.04 * 2**number  # up to a quarter less, by chance


@pytest.mark.parametrize(
    ("headers", "pause"), [({"retry_after": "1"}, 1.0), ({"retry_after_ms": "150"}, 0.15)]
)
def test_who_says_when_to_come_back_is_believed(
    server: Script, headers: dict[str, str], pause: float, short_pauses: None
) -> None:
    e = remote(server.url, ())
    server.begin()
    server.instead = failing(1, 429, **headers)
    e.generate(["hello"], SAMPLE)
    first, second = server.asked
    assert pause <= second.at - first.at < pause + 2


def test_who_is_too_slow_is_given_up(server: Script, short_pauses: None) -> None:
    e = remote(server.url, (), timeout=0.3, max_retries=1)
    server.begin()
    server.delay = 5.0
    begin = time.perf_counter()
    with pytest.raises(RemoteFailure, match=r"did not answer in time.*larger timeout"):
        e.generate(["hello"], SAMPLE)
    assert time.perf_counter() - begin < 4.5 and len(server.asked) == 2
    deadline = time.perf_counter() + 5
    while server.left < 2 and time.perf_counter() < deadline:
        time.sleep(0.002)
    assert server.left == 2


@pytest.mark.parametrize("most", [1, 4, 7, 100])
def test_requests_are_no_more_than_may_be(server: Script, most: int) -> None:
    """The search ends with what it has, which is how it would have begun."""
    whole = remote(server.url).generate(["hello"], WIDE)[0]
    e = remote(server.url, max_requests=most)
    server.begin()
    (result,) = e.generate(["hello"], WIDE)
    assert result.usage.remote is not None and whole.usage.remote is not None
    assert result.usage.remote.requests == len(server.asked) <= most
    if most == 100:
        assert told(result) == told(whole)
        return
    assert result.ended_early == f"max_requests ({most}) is used up"
    assert result.error is None and result.finish_reason == "length"
    assert result.trace is not None and whole.trace is not None
    same = len(result.trace.rounds) - 2
    for ours, theirs in zip(result.trace.rounds[:same], whole.trace.rounds):
        assert [c.text for c in ours.candidates] == [c.text for c in theirs.candidates]
    assert 0 < len(result.text or "") <= len(whole.text or "") + 40
    # Each of the last hypotheses is what came for it, and none is there twice.
    last = result.trace.rounds[-1]
    assert len(set(last.kept)) == len(last.kept) > 0


@pytest.mark.parametrize("most", [3, 5, 8])
def test_those_that_are_tried_again_count(server: Script, most: int, short_pauses: None) -> None:
    """Also of several that are under way at once."""
    e = remote(server.url, max_requests=most)
    server.begin()
    server.instead = lambda asked: error(500, "busy") if len(server.asked) > 2 else None
    (result,) = e.generate(["hello"], WIDE)
    assert result.usage.remote is not None
    assert result.usage.remote.requests == len(server.asked) <= most
    assert result.ended_early == f"max_requests ({most}) is used up"
    assert result.hypotheses and result.finish_reason == "length"


def test_where_nothing_came_before_the_end_that_is_an_error(
    server: Script, short_pauses: None
) -> None:
    e = remote(server.url, max_requests=2)
    server.instead = failing(9)
    with pytest.raises(InvalidRequest, match=r"nothing was sampled: max_requests \(2\)"):
        e.generate(["hello"], WIDE)
    server.instead = None
    e = remote(server.url, max_total_tokens=3)
    with pytest.raises(InvalidRequest, match=r"nothing was sampled: max_total_tokens \(3\)"):
        e.generate(["hello"], WIDE)


@pytest.mark.parametrize("most", [30, 60, 110, 5000])
def test_tokens_are_no_more_than_may_be(server: Script, most: int) -> None:
    e = remote(server.url, max_total_tokens=most)
    for params in (WIDE, replace(WIDE, finished="replicate", stop="s")):
        (result,) = e.generate(["hello"], params)
        cost = result.usage.remote
        assert cost is not None
        total = cost.prompt_tokens + cost.completion_tokens
        assert total <= most + result.usage.prompt_tokens  # which nobody knew before
        early = result.ended_early
        assert early == (None if most == 5000 else f"max_total_tokens ({most}) is used up")
        assert result.hypotheses


def test_each_search_has_its_own(server: Script) -> None:
    e = remote(server.url, max_requests=2)
    first, second = e.generate(["hello", "hello"], replace(WIDE, max_new_tokens=3))
    assert first.ended_early is second.ended_early is None
    assert first.usage == second.usage


def test_usage_and_cost_are_the_servers(own_server: Running, own_url: str) -> None:
    e = remote(own_url, price_per_million=(3.0, 15.0))
    (result,) = e.generate(["hello world " * 4], SEARCH)
    (again,) = e.generate(["hello world " * 4], SEARCH)
    own = again.usage.remote
    assert own is not None and result.usage.remote is not None
    assert own.cost == pytest.approx((3 * own.prompt_tokens + 15 * own.completion_tokens) / 1e6)
    assert 0 < own.cached_tokens < own.prompt_tokens  # it has pages of them
    assert own.completion_tokens == again.usage.sampled_tokens
    assert remote(own_url).generate(["x"], SEARCH)[0].usage.remote.cost is None  # type: ignore[union-attr]


def test_when_one_request_fails_for_good_its_search_asks_no_more(server: Script) -> None:
    """Those beside it are not waited for, by the server either."""
    server.most = 1
    e = remote(server.url)
    with pytest.warns(UserWarning, match=r"\(n\)"):
        e.generate(["hello"], SEARCH)
    server.begin()
    server.delay = 0.03

    def slow(asked: Asked) -> Response | None:
        if len(server.asked) < 3:
            return None
        server.delay = 5.0
        return error(400, "no more")

    server.instead = slow
    with pytest.raises(RemoteFailure, match="400: no more"):
        e.generate(["hello"], WIDE)
    asked = len(server.asked)
    time.sleep(0.1)
    assert len(server.asked) == asked


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_concurrency": 0}, "max_concurrency is 0; allowed: an integer >= 1"),
        ({"max_retries": -1}, "max_retries"),
        ({"max_requests": 0}, "max_requests"),
        ({"max_total_tokens": True}, "max_total_tokens"),
        ({"timeout": 0}, "timeout"),
        ({"timeout": float("nan")}, "timeout"),
        ({"price_per_million": (1,)}, "price_per_million"),
        ({"price_per_million": (1, -1)}, "price_per_million"),
    ],
)
def test_what_is_no_limit_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        remote("http://localhost:1/v1", **options)
