"""Every candidate is there once, and every token is counted, whatever a server does."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.drawn import drawn
from tests.support.remote_engines import SAMPLE, SEARCH, remote
from tests.support.scripted_server import Asked, Choice, Script, never_ending, scripted
from tests.support.scripted_server import drawn as drawn_words
from w2s_fast import Engine, SearchParams, SearchResult
from w2s_fast.errors import RemoteFailure
from w2s_fast.remote.dialect import _shared_out

WIDE = replace(SEARCH, beam_width=2, successors=4, chunk_length=3)


@pytest.fixture
def server() -> Iterator[Script]:
    with scripted() as found:
        yield found


def found(e: Engine, params: SearchParams, prompt: str = "hello") -> SearchResult:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (result,) = e.generate([prompt], params)
    assert result.trace is not None
    return result


def check(result: SearchResult, params: SearchParams) -> None:
    """That there are as many candidates as there should be, and each is what came for it."""
    assert result.trace is not None
    kept: list[tuple[str, Any]] = [("", None)]
    for number, (r, draws) in enumerate(zip(result.trace.rounds, result.trace.draws, strict=True)):
        copies = params.successors if number else params.first_candidates
        asked = iter(draws)
        expected = []
        for place, (text, reason) in enumerate(kept):
            parent = place if number else None
            if reason is not None:
                expected += [(text, parent)] * (copies if params.finished == "replicate" else 1)
                continue
            draw = next(asked)
            assert draw.behind == text and len(draw.samples) == copies
            expected += [(text + sample.text, parent) for sample in draw.samples]
        assert next(asked, None) is None
        for c, (whole, parent) in zip(r.candidates, expected, strict=True):
            assert c.parent == parent and c.text is not None
            if c.finish_reason == "stop":  # cut here
                assert whole.startswith(c.text)
            else:
                assert whole.rstrip("\ufffd") == c.text.rstrip("\ufffd")
        kept = [(r.candidates[i].text or "", r.candidates[i].finish_reason) for i in r.kept]


def given_by(server: Script) -> Counter[str]:
    """All texts of all answers."""
    most = server.most or 100
    return Counter(
        server.choice(asked, i).text or ""
        for asked in server.asked
        for i in range(min(asked.samples, most))
    )


@pytest.mark.parametrize("most", [1, 2, 3, 5])
def test_a_server_that_gives_fewer_is_asked_for_the_rest(server: Script, most: int) -> None:
    server.most = most
    e = remote(server.url)
    server.begin()
    result = found(e, WIDE)
    check(result, WIDE)
    assert result.trace is not None
    came = Counter(s.text for draws in result.trace.draws for d in draws for s in d.samples)
    assert came == given_by(server)  # nothing was lost, nothing came twice
    seeds = Counter((asked.text, asked.body["seed"]) for asked in server.asked)
    assert max(seeds.values()) == 1


@pytest.mark.parametrize("most", [1, 2])
def test_a_server_that_ignores_n_is_told_of_and_soon_known(server: Script, most: int) -> None:
    server.most = most
    e = remote(server.url)
    server.begin()
    with pytest.warns(UserWarning, match=rf"{server.url} .*{most} of \d samples \(n\)"):
        e.generate(["hello"], WIDE)
    server.begin()
    found(e, WIDE)
    assert max(asked.samples for asked in server.asked) == most


def test_a_server_that_gives_more_is_asked_no_less(server: Script) -> None:
    server.extra = 2
    e = remote(server.url)
    result = found(e, WIDE)
    check(result, WIDE)
    assert result.usage.remote is not None
    assert result.usage.remote.completion_tokens > result.usage.sampled_tokens


def test_greedy_candidates_are_sampled_once(server: Script) -> None:
    e = remote(server.url)
    server.begin()
    result = found(e, replace(WIDE, temperature=0.0))
    check(result, WIDE)
    assert {asked.samples for asked in server.asked} == {1}
    assert all("top_k" not in asked.body for asked in server.asked)
    assert result.trace is not None
    assert all(len({s.text for s in d.samples}) == 1 for ds in result.trace.draws for d in ds)


REASONS = {"length": None, "stop": "eos", "content_filter": "eos", None: None, "tool_calls": "eos"}


@pytest.mark.parametrize("reason", REASONS)
def test_a_text_ends_where_the_server_says_so(server: Script, reason: str | None) -> None:
    server.choice = lambda asked, i: Choice("s", reason, min(2, asked.max_tokens))
    result = found(remote(server.url), replace(WIDE, chunk_length=2, max_new_tokens=6))
    assert result.trace is not None
    assert {c.finish_reason for c in result.trace.rounds[0].candidates} == {REASONS[reason]}
    assert result.text == ("s" if REASONS[reason] else "sss")
    assert result.finish_reason == (REASONS[reason] or "length")


@pytest.mark.parametrize("tokens", [0, 1, 3])
def test_empty_chunks_do_not_go_on_for_ever(server: Script, tokens: int) -> None:
    """They count, and the next chunk may be longer by as much."""

    def choice(asked: Asked, index: int) -> Choice:
        done = asked.text == "hello the"
        return Choice("", "length", min(tokens, asked.max_tokens)) if done else Choice(" the")

    server.choice = choice
    e = remote(server.url)
    server.begin()
    params = replace(WIDE, max_new_tokens=12, beam_width=1)
    result = found(e, params)
    assert result.text == " the" and result.finish_reason == "length"
    lengths = [asked.max_tokens for asked in server.asked]
    assert len(lengths) <= 12 and max(lengths) > 3
    assert sum(1 for a, b in pairwise(lengths[1:]) if b > a) >= 1


def test_a_chunk_without_text_may_be_followed_by_one_with_text(server: Script) -> None:
    def choice(asked: Asked, index: int) -> Choice:
        if asked.max_tokens < 9:  # it thinks
            return Choice(None, "length", asked.max_tokens)
        return Choice(" the film", "stop", 9)

    server.choice = choice
    result = found(remote(server.url), replace(WIDE, max_new_tokens=20))
    assert result.text == " the film" and result.finish_reason == "eos"


@pytest.mark.parametrize("usage", [True, False])
def test_where_no_text_comes_at_all_that_is_said(server: Script, usage: bool) -> None:
    server.choice = lambda asked, i: Choice(None, "length", asked.max_tokens)
    server.usage = usage
    with pytest.raises(RemoteFailure, match=r"no text came in 11 tokens.*extra_body"):
        remote(server.url).generate(["hello"], WIDE)


def test_a_chunk_that_ends_inside_a_character_waits_for_the_next(server: Script) -> None:
    halves = {"hello": "a\ufffd", "helloa": "\u4eca\ufffd\ufffd", "helloa\u4eca": "z\ufffd"}
    server.choice = lambda asked, i: Choice(halves.get(asked.text, ""), "length", 3)
    e = remote(server.url)
    server.begin()
    params = replace(WIDE, max_new_tokens=9, beam_width=1)
    result = found(e, params)
    assert [asked.text for asked in server.asked] == list(halves)
    assert result.text == "a\u4ecaz\ufffd"  # nothing comes behind the last one
    assert result.trace is not None
    assert [r.candidates[0].text for r in result.trace.rounds][:2] == ["a", "a\u4eca"]
    assert result.trace.draws[1][0].samples[0].text == halves["helloa"]  # as it came


def test_without_the_servers_counts_a_search_ends_as_well(server: Script) -> None:
    server.usage, server.choice = False, never_ending
    e = remote(server.url)
    server.begin()
    result = found(e, WIDE)
    check(result, WIDE)
    assert result.finish_reason == "length" and result.usage.completion_tokens == 11
    assert result.usage.prompt_tokens == 0


def test_tokens_are_as_the_server_counts_them(server: Script) -> None:
    e = remote(server.url)
    server.begin()
    result = found(e, WIDE)
    sampled = sum(
        drawn_words(asked, i).tokens for asked in server.asked for i in range(asked.samples)
    )
    assert result.usage.sampled_tokens == sampled
    assert result.usage.remote is not None
    assert result.usage.remote.completion_tokens == sampled
    assert result.usage.prompt_tokens == 2 and result.usage.completion_tokens <= 11


def test_a_sample_that_ends_in_a_stop_string_of_ours_is_cut_here(server: Script) -> None:
    server.choice = lambda asked, i: Choice(" the film was", "length", asked.max_tokens)
    e = remote(server.url)
    server.begin()
    result = found(e, replace(WIDE, stop=("film",)))
    assert (result.text, result.finish_reason) == (" the ", "stop")
    assert result.hypotheses[0].stop_reason == "film"
    assert all("stop" not in asked.body for asked in server.asked)
    included = found(e, replace(WIDE, stop=("film",), include_stop_str_in_output=True))
    assert included.text == " the film"


def test_whole_texts_are_asked_for_at_once(server: Script) -> None:
    e = remote(server.url)
    server.begin()
    found(e, replace(SAMPLE, n=3, max_new_tokens=40))
    assert [(asked.samples, asked.max_tokens) for asked in server.asked] == [(3, 40)]


SAMPLES = st.lists(
    st.tuples(st.text(max_size=9), st.sampled_from(["length", "stop"])), min_size=1, max_size=6
)


@drawn(300)
@given(found=SAMPLES, most=st.integers(1, 9), count=st.integers(0, 80))
def test_tokens_are_shared_out_whole(found: list[tuple[str, str]], most: int, count: int) -> None:
    tokens = _shared_out(found, count, most)
    assert sum(tokens) == count and min(tokens) >= 0 and len(tokens) == len(found)
    cut = [reason == "length" for _, reason in found]
    if count <= most * len(found):
        assert max(tokens) <= most
    if most * sum(cut) == count or (most * sum(cut) < count <= most * len(found)):
        assert all(own == most for own, is_cut in zip(tokens, cut) if is_cut)


@drawn(200)
@given(found=SAMPLES, most=st.integers(1, 9))
def test_tokens_that_nobody_counts_are_guessed(found: list[tuple[str, str]], most: int) -> None:
    tokens = _shared_out(found, None, most)
    assert all(1 <= own <= most for own in tokens)
    assert all(own == most for own, (_, reason) in zip(tokens, found) if reason == "length")
