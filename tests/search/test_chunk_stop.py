"""Chunks end at strings, each on its own, as the naive reference has it."""

from __future__ import annotations

import functools
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.support.drawn import drawn
from tests.support.engines import LONG_PROMPTS, PROMPTS, assert_all_pages_free, make_engine
from tests.support.taken_pages import all_taken_but
from tests.support.text_searches import EOS, STOPS, check, crowded, engine, tokenizer, valued
from tests.support.tiny_models import tiny_triple
from w2s_fast import Engine, SearchParams
from w2s_fast._pages import round_pages, round_rows
from w2s_fast.errors import InvalidRequest
from w2s_fast.scheduling.footprint import pages_at_most

STRINGS = st.lists(st.sampled_from([*STOPS, "a", " "]), min_size=1, max_size=3).map(tuple)
PARAMS = st.builds(
    SearchParams,
    beam_width=st.sampled_from([2, 3, (3, 1), (1, 4, 2)]),
    successors=st.sampled_from([2, 3, (2, 1, 3)]),
    chunk_length=st.sampled_from([2, 5, 17, None, (3, None, 4)]),
    chunk_stop=STRINGS,
    max_new_tokens=st.sampled_from([8, 13]),
    temperature=st.just(1.5),
    top_k=st.just(0),
    seed=st.integers(0, 2),
    stop=st.sampled_from([(), (), ("bb", "x"), ("a a",), ("ab",)]),
    stop_token_ids=st.sampled_from([(), (), (9,)]),
    min_new_tokens=st.sampled_from([0, 0, 0, 4]),
    ignore_eos=st.booleans(),
    trace=st.just(True),
    finished=st.sampled_from(["hold", "replicate"]),
    dedup=st.booleans(),
    score=st.sampled_from(["sum", "mean"]),
    selection=st.sampled_from(["top", "top", "resample"]),
    proposal=st.sampled_from(["base", "base", "fusion"]),
)
RAGGED = SearchParams(
    beam_width=2, successors=3, chunk_length=5, chunk_stop=("a", "bc", "\n"), max_new_tokens=14,
    top_k=0, ignore_eos=True, trace=True,
)  # fmt: skip
WIDE = replace(RAGGED, beam_width=3, max_new_tokens=20)


@functools.cache
def paged(page_size: int) -> Engine:
    options = {"page_size": page_size, "prefix_cache": False, "kv_cache_tokens": 1200}
    return make_engine(*tiny_triple(eos=EOS), tokenizer=tokenizer(), **options)


def lengths(result: Any) -> list[set[int]]:
    """Of each round, how many tokens its candidates have that go on."""
    return [
        {len(c.token_ids) for c in one.candidates if c.finish_reason is None}
        for one in result.trace.rounds
    ]


@pytest.mark.parametrize("ahead", [False, True])
@drawn(40)
@example(params=[RAGGED, replace(RAGGED, proposal="fusion"), replace(RAGGED, selection="resample")])
@given(params=st.lists(PARAMS, min_size=1, max_size=2))
def test_chunks_end_as_in_the_reference(ahead: bool, params: list[SearchParams]) -> None:
    prompts = PROMPTS[: len(params)]
    for prompt, own, result in zip(prompts, params, engine(ahead).generate(prompts, params)):
        check(prompt, own, result)
    assert_all_pages_free(engine(ahead))


@drawn(12)
@example(params=RAGGED)
@given(params=PARAMS)
def test_with_scorers_too(params: SearchParams) -> None:
    for prompt, result in zip(PROMPTS[:2], valued().generate(PROMPTS[:2], params)):
        check(prompt, params, result, scored=True)
    assert_all_pages_free(valued())


@drawn(8)
@example(params=WIDE)
@given(params=PARAMS)
def test_in_too_few_pages_chunks_end_the_same(params: SearchParams) -> None:
    """Requests are set aside in the middle of their searches, and recomputed."""
    before = crowded().stats().set_aside
    asked = [replace(params, seed=seed) for seed in range(3)]
    for prompt, own, result in zip(PROMPTS, asked, crowded().generate(PROMPTS[:3], asked)):
        check(prompt, own, result)
    assert_all_pages_free(crowded())
    assert params is not WIDE or crowded().stats().set_aside > before


@drawn(20)
@given(params=PARAMS, prompt=st.sampled_from(PROMPTS))
def test_a_stream_is_the_result_piece_by_piece(params: SearchParams, prompt: list[int]) -> None:
    (result,) = engine().generate([prompt], params)
    pieces = list(engine().stream(prompt, params))
    assert "".join(piece.text or "" for piece in pieces) == result.text
    assert [t for piece in pieces for t in piece.token_ids] == result.token_ids


@drawn(40)
@given(params=PARAMS, prompt=st.integers(1, 20), page_size=st.sampled_from([1, 4, 16]))
def test_no_round_holds_more_pages_or_rows_than_it_was_promised(
    params: SearchParams, prompt: int, page_size: int
) -> None:
    one = paged(page_size)
    request = one.make_request([p % 18 + 1 for p in range(prompt)], params)
    models = range(len(request.prompts))
    most = [pages_at_most(request, of, page_size) for of in models]
    while not request.done:
        (promised,) = round_pages([request.beams], [page_size] * 3)
        assert all(p <= m for p, m in zip(promised, most))
        assert round_rows([request.beams])[0] <= params.rows
        with ExitStack() as others:
            for model, pages in zip(one._search.models, promised):
                others.enter_context(all_taken_but(model.pool, pages))
            number = request.beams.round
            while request.in_round or request.beams.round == number:
                one._search.step([request])
                if request.choice is not None:
                    request.choice.decide()
                    one._search.close([request])
    one._search.abort(request)
    assert_all_pages_free(one)


def test_candidates_of_a_round_have_different_lengths() -> None:
    (result,) = engine().generate([[3, 1, 4]], RAGGED)
    assert any(len(own) > 1 for own in lengths(result))
    (plain,) = engine().generate([[3, 1, 4]], replace(RAGGED, chunk_stop=()))
    assert lengths(plain) == [{5}, {10}, set()]


@drawn(4)
@given(proposal=st.sampled_from(["base", "fusion"]))
def test_rows_of_different_lengths_share_what_they_have_in_common(proposal: Any) -> None:
    """Behind prompts and texts that are long enough to be segments of their own."""
    params = replace(WIDE, proposal=proposal, chunk_stop=("a", "\n"), chunk_length=9)
    for e in (engine(), engine(ahead=True)):
        (result,) = e.generate(LONG_PROMPTS[:1], params)
        check(LONG_PROMPTS[0], params, result)
        assert any(len(own) > 1 for own in lengths(result))


def test_neighbours_find_what_they_find_without() -> None:
    plain = replace(RAGGED, chunk_stop=())
    for e in (engine(), engine(ahead=True)):
        alone = e.generate(PROMPTS[:2], plain) + e.generate(PROMPTS[:2], RAGGED)
        among = e.generate([*PROMPTS[:2], *PROMPTS[:2]], [plain, plain, RAGGED, RAGGED])
        for a, b in zip(alone, among):
            assert [h.token_ids for h in a.hypotheses] == [h.token_ids for h in b.hypotheses]


def test_the_example_of_the_page_on_endings_runs() -> None:
    page = Path(__file__).parents[2] / "docs" / "endings.md"
    example = page.read_text().split("```python\n")[2].split("```")[0]
    names: dict[str, Any] = {"SearchParams": SearchParams, "engine": engine()}
    exec(compile(example, str(page), "exec"), names)
    assert names["params"].chunk_stop == ("\n\n", ". ") and names["result"].error is None


def test_a_string_that_never_comes_changes_nothing() -> None:
    for e in (engine(), engine(ahead=True)):
        results = e.generate([[3, 1, 4]] * 2, [RAGGED, replace(RAGGED, chunk_stop="zz")])
        plain = e.generate([[3, 1, 4]], replace(RAGGED, chunk_stop=()))[0]
        assert results[1].trace == plain.trace != results[0].trace


def test_it_needs_a_tokenizer() -> None:
    bare = make_engine(*tiny_triple(eos=EOS))
    with pytest.raises(InvalidRequest, match="chunk_stop needs a tokenizer"):
        bare.generate([[3]], SearchParams(chunk_stop="a"))
    assert SearchParams(chunk_stop="a").chunk_stop == ("a",)


@pytest.mark.parametrize("value", ["", ["a", ""], [1], 7, None, ["a"] * 65, "x" * 1025])
def test_what_ends_no_chunk_is_named(value: Any) -> None:
    with pytest.raises(
        InvalidRequest, match=r"chunk_stop is .*; allowed: a string, or a sequence of at most 64"
    ):
        SearchParams(chunk_stop=value)


@pytest.mark.parametrize("method", ["bon", "sample", "beam", "fusion", "dynamic_fusion"])
def test_others_than_cbs_have_no_chunks(method: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"chunk_stop is .*; allowed: \(\) for method"):
        SearchParams(method=method, chunk_stop="a")
    assert SearchParams(method=method, chunk_stop=[]).chunk_stop == ()


def test_hypotheses_are_counted_as_the_last_round_that_there_can_be_keeps_them() -> None:
    """A round brings a token at least, so there may be as many rounds as tokens."""
    values = {"beam_width": (4, 2, 1), "chunk_length": 10, "max_new_tokens": 20}
    assert SearchParams(**values, n=2).n == 2
    with pytest.raises(InvalidRequest, match=r"beam_width of the last round \(1\)"):
        SearchParams(**values, n=2, chunk_stop="a")
    # So guides run where a round further on has a choice.
    late = {"beam_width": 1, "successors": (1, 1, 2), "chunk_length": 10, "max_new_tokens": 20}
    assert not SearchParams(**late).uses_guides
    assert SearchParams(**late, chunk_stop="a").uses_guides
