"""Given texts are scored in few passes, and find room however much the running requests hold."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.broken_models import failing
from tests.support.engines import (
    PROMPTS,
    SEARCH,
    assert_all_pages_free,
    engine,
    forwarded,
    found,
    make_engine,
)
from tests.support.tiny_models import tiny_triple
from w2s_fast import Engine, SearchParams
from w2s_fast.errors import InvalidRequest, OutOfPages
from w2s_fast.scheduling.scheduler import Room
from w2s_fast.scheduling.scoring import Given, _batches
from w2s_fast.search.guide import PagedGuide

LONG = replace(SEARCH, max_new_tokens=24)
KEYS = 120  # 30 pages of 4 tokens
# As long as the KV cache of a guide: 3 tokens of the prompt, of which the last is run later.
WHOLE = ([7, 8, 9], [t % 18 + 1 for t in range(KEYS - 2)])


def tight(tokens: int = KEYS) -> Engine:
    return make_engine(*tiny_triple(eos=()), kv_cache_tokens=tokens)


def roomy() -> Engine:
    return engine(eos=())


def score(e: Engine, prompt: list[int], response: list[int]) -> float:
    (found,) = e.score([prompt], [response])
    return found


def test_a_text_as_long_as_the_cache_is_scored_while_a_stream_holds_pages() -> None:
    e = tight()
    expected = score(roomy(), *WHOLE)
    stream = e.stream(PROMPTS[2], LONG)
    pieces = []
    for piece in stream:
        pieces.append(piece)
        if piece.result is None:
            assert e.guides[0].models[0].pool.free_pages < KEYS // 4
            assert score(e, *WHOLE) == pytest.approx(expected, abs=1e-4)
            assert e.stats().running == 0
            assert e.stats().waiting == 1
    result = pieces[-1].result
    assert result is not None
    assert result.stats is not None
    assert e.stats().set_aside == result.stats.set_aside == len(pieces) - 1 > 1
    assert found([result]) == found(roomy().generate([PROMPTS[2]], LONG))
    assert [t for piece in pieces for t in piece.token_ids] == result.token_ids
    assert_all_pages_free(e)


@pytest.mark.parametrize("number", [1, 2])
def test_a_round_under_way_ends_before_its_pages_are_given_up(number: int) -> None:
    e = tight()
    params = replace(LONG, beam_width=1, successors=2, chunk_length=20, max_new_tokens=50, n=1)
    request = e.make_request([1, 2], params)
    e.runner.submit(request)
    while not request.in_round or request.beams.round < number:
        e.runner.advance([request])
    before = len(request.beams.candidates[0].tokens)
    assert score(e, *WHOLE) == pytest.approx(score(roomy(), *WHOLE), abs=1e-4)
    if number == 1:  # in the first round the guides hold nothing yet
        assert len(request.beams.candidates[0].tokens) == before
        assert not request.beams.aside
    else:
        assert not request.in_round
        assert request.beams.aside
    while not request.ended:
        e.runner.advance([request])
    assert found([e.result(request)]) == found(roomy().generate([[1, 2]], params))
    assert_all_pages_free(e)


def test_the_least_urgent_give_up_their_pages_and_no_more_than_have_to() -> None:
    e = tight(400)
    requests = [e.make_request([i], LONG, priority=p) for i, p in ((1, 0), (2, 1), (3, 0), (4, -1))]
    plain = e.make_request([5], SearchParams(method="sample", max_new_tokens=60), priority=9)
    for request in [*requests, plain]:
        e.runner.submit(request)
    e.runner.advance(requests)
    pool = e.guides[0].models[1].pool
    assert pool.num_pages - pool.free_pages == 8  # two hypotheses of each, of one page
    for left, aside in ((8, []), (7, [1]), (5, [1, 2]), (0, [0, 1, 2, 3])):
        rooms = [Room(pool, pool.num_pages - left, 1)]
        with e.runner.turn_with(rooms):
            assert rooms[0].there
        assert [i for i, r in enumerate(requests) if r.beams.aside] == aside
        assert not plain.beams.aside  # it holds nothing there
    with pytest.raises(OutOfPages), e.runner.turn_with([Room(pool, pool.num_pages + 1, 1)]):
        pass
    for request in [*requests, plain]:
        e.runner.give_up(request)
    e.runner.settle()
    assert_all_pages_free(e)


def test_a_text_that_is_longer_than_the_cache_is_refused_by_name() -> None:
    e = tight()
    stream = e.stream([1], LONG)
    next(stream)
    prompt, response = WHOLE
    with pytest.raises(InvalidRequest, match=r"124 .* tuned, which has 120; .* kv_cache_tokens"):
        e.score([[1], prompt], [[2], [*response, 1]])
    assert e.stats().set_aside == 0  # and nobody had to make room for it
    stream.close()
    assert_all_pages_free(e)


def test_a_model_that_fails_while_it_scores_gives_all_pages_back() -> None:
    e = tight()
    model = e.guides[0].models[1].model
    with failing(model, 1, MemoryError("for the test")), pytest.raises(MemoryError):
        e.score([[1, 2, 3]] * 3, [[4, 5]] * 3)
    assert_all_pages_free(e)
    assert e.score([[1]], [[2]]) == pytest.approx(roomy().score([[1]], [[2]]), abs=1e-4)


def test_many_texts_take_few_passes_and_their_prompt_is_run_once() -> None:
    triple = tiny_triple(eos=())
    e = make_engine(*triple)
    prompt = [t % 17 + 1 for t in range(41)]
    responses = [[i % 19, *range(i % 5)] for i in range(60)]
    with (
        forwarded(*triple) as tokens,
        mock.patch.object(PagedGuide, "append", autospec=True, side_effect=PagedGuide.append) as p,
    ):
        scores = e.score([prompt] * 60, responses)
    rest = sum(len(response) for response in responses)
    assert tokens == [0, 40 + rest, 40 + rest]
    assert p.call_count == 6  # passes of 128 pages at most, and each text counts as 11 or 12
    alone = make_engine(*triple, prefix_cache=False)
    expected = [score(alone, prompt, response) for response in responses]
    assert scores == pytest.approx(expected, abs=1e-4)
    assert_all_pages_free(e)


lengths = st.integers(1, 40)


@given(sizes=st.lists(st.tuples(lengths, lengths, st.integers(1, 300)), max_size=30))
def test_passes_have_the_texts_in_their_order_and_are_not_too_large(
    sizes: list[tuple[int, int, int]],
) -> None:
    texts = [Given(([0] * tuned, [0] * untuned), [0] * new) for tuned, untuned, new in sizes]
    batches = list(_batches(texts, engine().guides[0]))
    assert [text for batch in batches for text in batch] == texts
    pages = [sum(max(text.pages(4)) for text in batch) for batch in batches]
    assert all(p <= 128 or len(b) == 1 for p, b in zip(pages, batches))
    # None could have been run with the one before.
    assert all(p + max(after[0].pages(4)) > 128 for p, after in zip(pages, batches[1:]))


def test_scores_are_taken_while_other_threads_search() -> None:
    e = tight()
    params = [replace(SEARCH, max_new_tokens=12 + i, seed=i) for i in range(3)]
    expected = found(roomy().generate(PROMPTS[:3], params))
    whole = score(roomy(), *WHOLE)
    seen: list[Any] = []

    def search() -> None:
        seen.append(found(e.generate(PROMPTS[:3], params)) == expected)

    def rate() -> None:
        seen.extend(score(e, *WHOLE) == pytest.approx(whole, abs=1e-4) for _ in range(3))

    threads = [threading.Thread(target=target) for target in (search, rate, search, rate)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [True] * 8
    assert_all_pages_free(e)
