"""Stop strings end texts in every method, as the naive reference has it."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from tests.support.beam_reference import beam_search
from tests.support.drawn import drawn
from tests.support.engines import PROMPTS, assert_all_pages_free, make_engine
from tests.support.results import MARGIN
from tests.support.text_searches import EOS, STOPS, check, crowded, engine, reference, tokenizer
from tests.support.tiny_models import tiny_triple
from w2s_fast import AsyncEngine, SearchParams
from w2s_fast.errors import InvalidRequest

PARAMS = st.builds(
    SearchParams,
    method=st.sampled_from(["cbs", "cbs", "bon", "sample", "fusion"]),
    beam_width=st.sampled_from([2, 3]),
    successors=st.sampled_from([2, 3]),
    chunk_length=st.sampled_from([1, 2, 5, 17, None]),
    max_new_tokens=st.sampled_from([8, 20]),
    temperature=st.sampled_from([0.7, 1.5]),
    top_k=st.just(0),
    seed=st.integers(0, 9),
    stop=st.lists(st.sampled_from(STOPS), min_size=1, max_size=3).map(tuple),
    include_stop_str_in_output=st.booleans(),
    stop_token_ids=st.sampled_from([(), (), (9,)]),
    min_new_tokens=st.sampled_from([0, 0, 0, 4]),
    ignore_eos=st.sampled_from([False, False, True]),
    n=st.sampled_from([1, 2]),
    trace=st.just(True),
    finished=st.sampled_from(["hold", "replicate"]),
    dedup=st.booleans(),
    score=st.sampled_from(["sum", "mean"]),
)


@pytest.mark.parametrize("ahead", [False, True])
@drawn(60)
# More slots are forked in the guides than have anything to run.
@example(
    params=[SearchParams(beam_width=2, successors=2, chunk_length=1, max_new_tokens=8, top_k=0,
                         seed=1, stop="ab", trace=True)]
)  # fmt: skip
@given(params=st.lists(PARAMS, min_size=1, max_size=3))
def test_texts_end_as_in_the_reference(ahead: bool, params: list[SearchParams]) -> None:
    prompts = PROMPTS[: len(params)]
    for prompt, own, result in zip(prompts, params, engine(ahead).generate(prompts, params)):
        check(prompt, own, result)
    assert_all_pages_free(engine(ahead))


@drawn(40)
@given(
    width=st.sampled_from([1, 2, 4]),
    stop=st.lists(st.sampled_from(STOPS), min_size=1, max_size=3).map(tuple),
    penalty=st.sampled_from([0.0, 1.0]),
    least=st.sampled_from([0, 0, 3]),
    prompt=st.sampled_from(PROMPTS),
    early=st.sampled_from([False, True, "never"]),
)
def test_beams_end_as_in_the_reference(
    width: int, stop: tuple[str, ...], penalty: float, least: int, prompt: list[int], early: Any
) -> None:
    params = SearchParams(
        method="beam", beam_width=width, n=width, max_new_tokens=9, stop=stop,
        length_penalty=penalty, early_stopping=early, min_new_tokens=least,
    )  # fmt: skip
    expected = beam_search(reference(), prompt, params)
    assume(expected.margin > MARGIN)
    (result,) = engine().generate([prompt], params)
    for h, theirs in zip(result.hypotheses, expected.hypotheses, strict=True):
        assert h.token_ids == theirs.token_ids and h.finish_reason == theirs.finish_reason
        assert h.score == pytest.approx(theirs.score, abs=1e-4)
        assert h.token_logprobs == pytest.approx(theirs.token_logprobs, abs=1e-4)
        if theirs.text is not None:
            assert h.text == theirs.text and h.stop_reason in stop
    assert_all_pages_free(engine())


@drawn(30)
@given(params=PARAMS, prompt=st.sampled_from(PROMPTS))
def test_a_stream_shows_no_part_of_a_stop_string(params: SearchParams, prompt: list[int]) -> None:
    (result,) = engine().generate([prompt], params)
    pieces = list(engine().stream(prompt, params))
    assert "".join(piece.text or "" for piece in pieces) == result.text
    assert [t for piece in pieces for t in piece.token_ids] == result.token_ids


@pytest.mark.parametrize("stop", [(), ("ab",), ("c", "b\\n")])
def test_a_stream_of_beams_shows_no_part_of_one_either(stop: tuple[str, ...]) -> None:
    params = SearchParams(method="beam", beam_width=3, max_new_tokens=12, stop=stop)
    for prompt in PROMPTS:
        (result,) = engine().generate([prompt], params)
        pieces = list(engine().stream(prompt, params))
        assert "".join(piece.text or "" for piece in pieces) == result.text
        assert [t for piece in pieces for t in piece.token_ids] == result.token_ids


LONG = SearchParams(
    beam_width=3, successors=3, chunk_length=2, max_new_tokens=20, top_k=0, ignore_eos=True,
    stop=("abcabcabc",), trace=True,
)  # fmt: skip


@drawn(20)
@example(params=LONG)
@given(params=PARAMS)
def test_in_too_few_pages_texts_end_the_same(params: SearchParams) -> None:
    """Requests are set aside in the middle of their searches, and recomputed."""
    before = crowded().stats().set_aside
    asked = [replace(params, seed=seed) for seed in range(len(PROMPTS))]
    for prompt, own, result in zip(PROMPTS, asked, crowded().generate(PROMPTS, asked)):
        check(prompt, own, result)
    assert_all_pages_free(crowded())
    assert params is not LONG or crowded().stats().set_aside > before


def test_the_example_of_the_page_on_endings_runs() -> None:
    page = Path(__file__).parents[2] / "docs" / "endings.md"
    example = page.read_text().split("```python\n")[1].split("```")[0]
    names: dict[str, Any] = {"SearchParams": SearchParams, "engine": engine()}
    exec(compile(example, str(page), "exec"), names)
    assert names["params"].stop == ("\nUser:", "###") and names["result"].error is None


def test_a_stream_holds_back_no_more_than_may_belong_to_a_stop_string() -> None:
    """None of these tokens can begin one."""
    plain = SearchParams(method="sample", max_new_tokens=60, ignore_eos=True, seed=3)
    texts, expected = (
        [piece.text for piece in engine().stream([3, 1, 4], params)]
        for params in (replace(plain, stop=("zz",)), plain)
    )
    assert texts == expected and len(texts) > 2


def test_an_asynchronous_stream_does_the_same() -> None:
    params = SearchParams(beam_width=2, successors=3, chunk_length=3, max_new_tokens=20, stop="ab")

    async def pieces() -> list[str]:
        async with AsyncEngine(engine()) as served:
            return [piece.text or "" async for piece in served.stream([3, 1, 4], params)]

    (result,) = engine().generate([[3, 1, 4]], params)
    assert "".join(asyncio.run(pieces())) == result.text


def test_neighbours_find_what_they_find_without() -> None:
    plain = SearchParams(beam_width=2, successors=3, chunk_length=3, max_new_tokens=11, trace=True)
    stopped = replace(plain, stop=("a", "b", "c"), seed=1)
    alone = engine(True).generate(PROMPTS[:2], plain)
    among = engine(True).generate([*PROMPTS[:2], *PROMPTS[:2]], [plain, plain, stopped, stopped])
    for a, b in zip(alone, among):
        assert [h.token_ids for h in a.hypotheses] == [h.token_ids for h in b.hypotheses]


def test_all_candidates_may_end_before_anything_is_scored() -> None:
    params = SearchParams(
        beam_width=2, successors=2, chunk_length=2, max_new_tokens=8, ignore_eos=True,
        stop=tuple("abcxy \n"), trace=True, score="mean",
    )  # fmt: skip
    for ahead in (False, True):
        (result,) = engine(ahead).generate([[3, 1, 4]], params)
        assert result.text == "" and result.token_ids == [] and result.score == 0
        assert result.finish_reason == "stop"
        assert_all_pages_free(engine(ahead))


def test_stop_strings_need_a_tokenizer() -> None:
    bare = make_engine(*tiny_triple(eos=EOS))
    with pytest.raises(InvalidRequest, match="stop strings need a tokenizer"):
        bare.generate([[3]], SearchParams(stop="a"))
    assert SearchParams(stop="a").stop == ("a",)


@pytest.mark.parametrize("stop", ["", ["a", ""], [1], 7, None, ["a"] * 65, "x" * 1025, ["a", b"b"]])
def test_what_is_no_stop_string_is_named(stop: Any) -> None:
    with pytest.raises(
        InvalidRequest, match=r"stop is .*; allowed: a string, or a sequence of at most 64"
    ):
        SearchParams(stop=stop)


@pytest.mark.parametrize("least", [-1, 51, 1.0, True])
def test_min_new_tokens_are_some_of_them(least: Any) -> None:
    with pytest.raises(InvalidRequest, match="min_new_tokens"):
        SearchParams(min_new_tokens=least)


@pytest.mark.parametrize("method", ["cbs", "fusion", "beam"])
def test_a_text_that_cannot_be_decoded_ends_its_own_request(
    method: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = SearchParams(method=method, beam_width=2, max_new_tokens=8, ignore_eos=True)
    (expected,) = engine().generate([[3, 1, 4]], params)
    decode = tokenizer().decode

    def broken(ids: list[int], **options: Any) -> str:
        if ids[:1] == [15]:
            raise RuntimeError("no such text")
        return str(decode(ids, **options))

    monkeypatch.setattr(tokenizer(), "decode", broken)
    bad, good = engine().generate(
        [[15], [3, 1, 4]], [replace(params, stop="zz"), params], on_error="return"
    )
    assert "cannot be decoded: no such text" in str(bad.error)
    assert good.token_ids == expected.token_ids
    assert_all_pages_free(engine())
