"""Every model has a prompt of its own: base, tuned and untuned, of any lengths."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tests.support.drawn import drawn
from tests.support.engines import assert_all_pages_free, forwarded, models_of
from tests.support.reference import Reference, ReferenceGuide, ReferenceResult
from tests.support.results import assert_same
from tests.support.tiny_models import VOCABULARY, tiny_model
from w2s_fast import Engine, Guide, SearchParams, SearchResult
from w2s_fast.search.request import Request

Pair = tuple[list[int], list[int]]
EOS = (3, 7)


@functools.cache
def guides() -> list[tuple[Any, Any, float]]:
    """Of different families and weights."""
    families = (("gpt2", "gpt2", 1.0), ("llama", "mistral", -0.5))
    return [
        (tiny_model(t, seed=10 + g, layers=1), tiny_model(u, seed=20 + g, layers=1), weight)
        for g, (t, u, weight) in enumerate(families)
    ]


@functools.cache
def engine(page_size: int, kv_cache_tokens: int = 4096, eos: tuple[int, ...] = EOS) -> Engine:
    return Engine(
        base=tiny_model("llama", eos=eos),
        guides=[Guide(tuned, untuned, weight) for tuned, untuned, weight in guides()],
        device="cpu",
        page_size=page_size,
        kv_cache_tokens=kv_cache_tokens,
    )


@functools.cache
def reference(eos: tuple[int, ...] = EOS) -> Reference:
    models = [ReferenceGuide(*guide) for guide in guides()]
    return Reference(tiny_model("llama", eos=eos), models, vocab_size=VOCABULARY, eos_token_ids=eos)


class Asked(NamedTuple):
    """What a request is made of."""

    prompt: list[int]
    guide_prompts: Sequence[Pair]
    params: SearchParams

    def request(self, e: Engine) -> Request:
        of_guides = [own for both in self.guide_prompts for own in both]
        return Request(self.prompt, of_guides, self.params, eos_ids=e.eos_token_ids)


def search(e: Engine, asked: Sequence[Asked]) -> list[SearchResult]:
    requests = [one.request(e) for one in asked]
    for request in requests:
        e.runner.submit(request)
    while left := [request for request in requests if not request.ended]:
        e.runner.advance(left)
    assert_all_pages_free(e)
    return [e.result(request) for request in requests]


def expected(asked: Asked, eos: tuple[int, ...] = EOS) -> ReferenceResult:
    return reference(eos).search(asked.prompt, asked.params, asked.guide_prompts)


def assert_found(results: Sequence[SearchResult], wanted: Sequence[ReferenceResult]) -> None:
    for result, own in zip(results, wanted, strict=True):
        assert_same(result, own)


tokens = st.integers(0, VOCABULARY - 1)
prompts = st.lists(tokens, min_size=1, max_size=20)
# As templates make them: some text of the model, and the user's behind it or within.
pairs = st.tuples(prompts, prompts)


@st.composite
def params(draw: st.DrawFn) -> SearchParams:
    return SearchParams(
        beam_width=draw(st.integers(1, 2)),
        successors=draw(st.integers(2, 3)),
        chunk_length=draw(st.sampled_from([1, 2, 3, 5])),
        max_new_tokens=draw(st.sampled_from([9, 6, 4])),
        seed=draw(st.integers(0, 99)),
        finished=draw(st.sampled_from(["hold", "replicate"])),
        trace=True,
    )


asked = st.builds(Asked, prompts, st.tuples(pairs, pairs), params())


@drawn(6)
@given(page_size=st.sampled_from([1, 3, 16]), requests=st.lists(asked, min_size=1, max_size=2))
def test_any_prompts_of_the_models_find_what_the_reference_finds(
    page_size: int, requests: list[Asked]
) -> None:
    """In one engine for all examples: what it remembers of prompts is each model's own."""
    wanted = [expected(one) for one in requests]
    # Rounding may decide otherwise where a draw or two scores are as close as this.
    assume(all(min(own.draw_margin, own.score_margin) > 2e-5 for own in wanted))
    assert_found(search(engine(page_size), requests), wanted)


OWN: list[Pair] = [([5] * 17 + [2, 9], [1, 4]), ([6, 8, 11], [12, 3] * 12)]
LONG = SearchParams(beam_width=2, successors=2, chunk_length=3, max_new_tokens=15, n=2, trace=True)
SEEDS = [Asked([4, i, 1], OWN, replace(LONG, seed=i)) for i in range(3)]


@functools.cache
def wanted_of_seeds() -> list[ReferenceResult]:
    return [expected(one, ()) for one in SEEDS]


@pytest.mark.parametrize("page_size", [1, 3, 16])
def test_requests_set_aside_are_recomputed_behind_each_models_own_prompt(page_size: int) -> None:
    # Room for the longest of the guides' prompts and little more.
    e = engine(page_size, {1: 75, 3: 96, 16: 160}[page_size], ())
    assert_found(search(e, SEEDS), wanted_of_seeds())
    assert e.stats().set_aside > 0


@pytest.mark.parametrize("page_size", [1, 3, 16])
def test_each_model_finds_its_own_prompt_in_the_prefix_cache(page_size: int) -> None:
    e = engine(page_size, 4000, ())
    models = [model.model for model in models_of(e)]
    for model in models_of(e):
        model.pool.drop_cache()
    swapped = SEEDS[0]._replace(guide_prompts=[(untuned, tuned) for tuned, untuned in OWN])
    run = []
    for one in (SEEDS[0], SEEDS[0], swapped):
        with forwarded(*models) as tokens:
            found = search(e, [one])
        if one is not swapped:
            assert_found(found, wanted_of_seeds()[:1])
        run.append(tokens)
    lengths = [3, *(len(prompt) for pair in OWN for prompt in pair)]
    saved = [(n - 1) // page_size * page_size for n in lengths]  # the last token is always run
    assert [a - b for a, b in zip(run[0], run[1], strict=True)] == saved
    # What the guide's other model has of a prompt is nothing to a model.
    assert sum(run[2][1:]) == sum(run[0][1:])


@pytest.mark.parametrize("page_size", [1, 3])
def test_a_model_is_promised_pages_for_its_own_prompt(page_size: int) -> None:
    e = engine(page_size, 4000, ())
    request = SEEDS[0].request(e)
    e.runner.submit(request)
    held, promised = [], []
    while not request.ended:
        e.runner.advance([request])
        held.append([m.pool.num_pages - m.pool.free_pages for m in models_of(e)])
        promised.append(list(request.promised))
    assert all(h <= p for hs, ps in zip(held, promised) for h, p in zip(hs, ps, strict=True))
    _, tuned, untuned, other_tuned, other_untuned = map(max, zip(*promised))
    assert tuned > untuned
    assert other_tuned < other_untuned


def test_the_token_before_a_response_is_each_models_own() -> None:
    """With prompts of one token nothing stands in a model before the first chunk."""
    one = Asked([2], [([5], [6]), ([7, 1], [8])], SEEDS[0].params)
    assert_found(search(engine(3), [one]), [expected(one)])
