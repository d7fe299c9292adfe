"""A search that was recorded is found again without its server."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from tests.support.foreign_guides import pairs
from tests.support.probed import probed_once
from tests.support.remote_engines import PROMPTS, SEARCH, remote, told
from tests.support.scripted_server import Script, scripted
from w2s_fast import Engine, RemoteBase, SearchResult
from w2s_fast.errors import InvalidRequest, RemoteFailure
from w2s_fast.result import Trace


def again(recorded: Any, kind: str = "bpe-first", **options: Any) -> Engine:
    with probed_once():
        return Engine(
            base=RemoteBase.replay(recorded), guides=pairs(kind), device="cpu",
            kv_cache_tokens=4096, page_size=4, **options,
        )  # fmt: skip


@pytest.fixture(scope="module")
def server() -> Iterator[Script]:
    with scripted() as found:
        yield found


@pytest.fixture(scope="module")
def engine(server: Script) -> Engine:
    return remote(server.url)


@pytest.mark.parametrize(
    "changes",
    [{}, {"stop": ("s", "film")}, {"chunk_stop": (" ",)}, {"temperature": 0.0, "dedup": True},
     {"method": "bon", "successors": 4, "n": 2}, {"method": "sample", "n": 3},
     {"selection": "resample", "finished": "replicate"}],
    ids=str,
)  # fmt: skip
def test_the_same_is_found(server: Script, engine: Engine, changes: dict[str, Any]) -> None:
    params = replace(SEARCH, **changes)
    results = engine.generate(PROMPTS[:2], params)
    asked = len(server.asked)
    e = again(results)
    assert e.server == "a recording of 2 searches"
    for ours, theirs in zip(e.generate(PROMPTS[:2], params), results):
        assert told(ours) == told(theirs)
    assert told(list(e.stream(PROMPTS[0], params))[-1].result) == told(results[0])  # type: ignore[arg-type]
    assert len(server.asked) == asked


def test_searches_of_one_prompt_are_told_apart(engine: Engine) -> None:
    params = [replace(SEARCH, seed=seed, chunk_length=3 + seed % 2) for seed in range(4)]
    results = engine.generate(["hello"] * 4, params)
    e = again([result.trace for result in results])
    for i in (2, 0, 3, 1):
        (found,) = e.generate(["hello"], params[i])
        assert told(found) == told(results[i])


def test_it_is_cut_short_where_it_was(server: Script) -> None:
    e = remote(server.url, max_requests=4)
    (result,) = e.generate(["hello"], replace(SEARCH, max_new_tokens=40))
    assert result.ended_early
    (found,) = again(result).generate(["hello"], replace(SEARCH, max_new_tokens=40))
    assert told(found) == told(result) and found.ended_early == result.ended_early


def test_chats_are_found_again(server: Script) -> None:
    chat = [{"role": "user", "content": "hello"}]
    e = remote(server.url, (), scorers=[values])
    (result,) = e.generate([chat], SEARCH)
    assert result.trace is not None and result.trace.prompt == chat
    with probed_once():
        replayed = Engine(base=RemoteBase.replay(result), scorers=[values], device="cpu")
    (found,) = replayed.generate([copy.deepcopy(chat)], SEARCH)
    assert told(found) == told(result)


def values(candidates: Any) -> list[float]:
    return [float(len(c.text)) for c in candidates]


@pytest.mark.parametrize(
    ("prompt", "changes", "message"),
    [
        ("hello", {"seed": 6}, "in round 1 the search goes another way"),
        ("hello", {"chunk_length": 5}, "in round 1 the search goes another way"),
        ("hello", {"successors": 3}, "in round 1 the search goes another way"),
        ("hello", {"chunk_length": (4, 5)}, "in round 2 the search goes another way"),
        ("hello", {"max_new_tokens": 40}, "in round . the search goes another way"),
        ("hallo", {}, "has no search of this prompt"),
    ],
    ids=str,
)
def test_another_search_is_not_in_it(
    engine: Engine, prompt: str, changes: dict[str, Any], message: str
) -> None:
    (result,) = engine.generate(["hello"], SEARCH)
    e = again(result)
    with pytest.raises(RemoteFailure, match=message):
        e.generate([prompt], replace(SEARCH, **changes))
    assert told(e.generate(["hello"], SEARCH)[0]) == told(result)


def test_other_guides_may_go_another_way(engine: Engine) -> None:
    (result,) = engine.generate(["hello"], SEARCH)
    with pytest.raises(RemoteFailure, match="guides that choose the same candidates"):
        again(result, "wordpiece").generate(["hello"], SEARCH)


def test_what_is_no_recording_is_refused(engine: Engine) -> None:
    (silent,) = engine.generate(["hello"], replace(SEARCH, trace=False))
    for given in (silent, Trace(), [silent], SearchResult([], silent.usage), [7], 7, None):
        with pytest.raises(InvalidRequest, match=r"SearchParams\(trace=True\) records it"):
            Engine(base=RemoteBase.replay(given), device="cpu")  # type: ignore[arg-type]


def test_a_trace_says_all_that_was_asked_and_came(server: Script, engine: Engine) -> None:
    server.begin()
    (result,) = engine.generate(["hello"], SEARCH)
    assert result.trace is not None and result.trace.prompt == "hello"
    drawn = [draw for draws in result.trace.draws for draw in draws]
    asked = {(a.text, a.body["seed"]): a for a in server.asked}
    assert len(asked) == len(server.asked) == len(drawn)
    for draw in drawn:
        own = asked[f"hello{draw.behind}", draw.seed]
        assert (own.samples, own.max_tokens) == (len(draw.samples), draw.max_tokens)
        for i, sample in enumerate(draw.samples):
            theirs = server.choice(own, i)
            assert (sample.text, sample.finish_reason) == (theirs.text, theirs.reason)
