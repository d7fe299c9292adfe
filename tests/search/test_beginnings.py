"""Texts that enter side by side: what several of them begin with is run once."""

from __future__ import annotations

import functools
import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.broken_models import broken_copy
from tests.support.engines import forwarded
from tests.support.tiny_models import tiny_model
from w2s_fast.errors import OutOfPages
from w2s_fast.models.model import PagedModel
from w2s_fast.search.beginnings import begin, leaders, prefill

# Few different tokens, so that many texts begin alike.
TEXT = st.lists(st.integers(1, 2), max_size=14)
TEXTS = st.lists(TEXT, min_size=1, max_size=9)


def pages_of(text: list[int], page_size: int) -> list[tuple[int, ...]]:
    """The full pages of a text, each named by all tokens up to its end."""
    return [tuple(text[:end]) for end in range(page_size, len(text) + 1, page_size)]


@given(texts=TEXTS, known=TEXTS, page_size=st.integers(1, 4))
def test_leaders_by_their_definition(
    texts: list[list[int]], known: list[list[int]], page_size: int
) -> None:
    cached = {page for text in known for page in pages_of(text, page_size)}
    missing = [[p for p in pages_of(t, page_size) if p not in cached] for t in texts]
    found = [len(t) // page_size * page_size - len(m) * page_size for t, m in zip(texts, missing)]
    first = leaders(texts, found, page_size)
    wanted = Counter(pages[0] for pages in missing if pages)
    # One for each page that several need next, and of these the longest.
    assert sorted(missing[i][0] for i in first) == sorted(p for p, n in wanted.items() if n > 1)
    for i in first:
        assert all(
            len(text) <= len(texts[i])
            for text, pages in zip(texts, missing)
            if pages and pages[0] == missing[i][0]
        )
    # Side by side they run no page twice.
    run = [page for i in first for page in missing[i]]
    assert len(run) == len(set(run))


@functools.cache
def model(page_size: int, prefix_cache: bool) -> PagedModel:
    """A small pool: 40 tokens more than the longest texts of a case can need."""
    return PagedModel(
        tiny_model(dtype=torch.float64),
        kv_cache_tokens=9 * 16 + 40,
        page_size=page_size,
        prefix_cache=prefix_cache,
    )


def last_logits(paged: PagedModel, slots: np.ndarray) -> torch.Tensor:
    """The logits after one more token in each slot; gives the slots back."""
    hidden = paged.forward(slots, torch.full((len(slots),), 5), [1] * len(slots))
    paged.pool.release(slots)
    return paged.logits(hidden)


@settings(max_examples=60, deadline=None)
@given(texts=TEXTS, known=st.none() | TEXT, page_size=st.sampled_from([1, 2, 4]))
def test_every_page_is_run_once_and_holds_what_it_should(
    texts: list[list[int]], known: list[int] | None, page_size: int
) -> None:
    warm, cold = model(page_size, True), model(page_size, False)
    warm.pool.drop_cache()
    cached = set()
    if known is not None:
        slots = prefill(warm, [known])
        warm.pool.remember(slots, [known])
        warm.pool.release(slots)
        cached = set(pages_of(known, page_size))
    with forwarded(warm.model) as tokens:
        slots = prefill(warm, texts)
    pages = {page for text in texts for page in pages_of(text, page_size)}
    assert tokens[0] == len(pages - cached) * page_size + sum(len(t) % page_size for t in texts)
    assert warm.pool.lengths(slots).tolist() == [len(text) for text in texts]
    assert warm.pool.manager.used_pages <= sum(-(-len(text) // page_size) for text in texts)
    warm.pool.manager.check()
    torch.testing.assert_close(last_logits(warm, slots), last_logits(cold, prefill(cold, texts)))
    assert warm.pool.free_pages == warm.pool.num_pages


def test_beginnings_of_one_another_take_two_passes() -> None:
    paged = model(1, True)
    paged.pool.drop_cache()
    longest = [1, 2, 1, 1, 2, 2, 1]
    begun = begin(paged, [longest[:n] for n in (3, 1, 7, 5, 7)])
    assert begun.rows == [1]  # and in the second pass there is nothing left to run
    assert begun.adopted.tolist() == [3, 1, 0, 5, 7]
    paged.pool.release(begun.slots)


def test_texts_that_share_nothing_wait_for_nobody() -> None:
    paged = model(4, True)
    paged.pool.drop_cache()
    begun = begin(paged, [[1, 2, 1, 2, 1], [1, 2, 1, 1, 1], [1, 2, 1], []])
    assert begun.rows == []
    assert paged.pool.lengths(begun.slots).tolist() == [0] * 4
    paged.pool.release(begun.slots)


def test_groups_within_groups_take_a_pass_for_each_level() -> None:
    paged = model(2, True)
    paged.pool.drop_cache()
    groups = [[1, 1, a, a, b, b] for a in (1, 2, 3) for b in (1, 2)]
    begun = begin(paged, groups)
    assert begun.rows == [1, 2]
    assert paged.pool.lengths(begun.slots).tolist() == [6, 4, 6, 4, 6, 4]
    assert begun.adopted.tolist() == [0, 4, 2, 4, 2, 4]
    paged.pool.release(begun.slots)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_where_a_model_breaks_on_what_is_shared_nobody_waits_twice(value: float) -> None:
    broken = broken_copy(tiny_model("llama"), 7, value)
    paged = PagedModel(broken, kv_cache_tokens=400, page_size=2, prefix_cache=True)
    sound = [[3, 3, 1, 1, i] for i in range(3)]
    begun = begin(paged, [*([1, 7, i, i] for i in range(3)), *sound])
    assert begun.rows == [2]
    assert begun.adopted.tolist() == [0, 0, 0, 0, 4, 4]
    assert paged.pool.match([[1, 7], [3, 3, 1, 1]]).tolist() == [0, 4]
    paged.pool.release(begun.slots)


@pytest.mark.parametrize("taken", [0, 1, 3])
def test_without_room_for_all_of_them_nothing_is_held(taken: int) -> None:
    # Six pages, as many as are needed: 4 for the first, which goes alone, and 1 for each other.
    paged = PagedModel(tiny_model(), kv_cache_tokens=24, page_size=4, prefix_cache=True)
    other = prefill(paged, [[2] * 4 * taken])
    texts = [[*[1] * 12, i, 3, 3, 3] for i in range(3)]
    if taken:
        with pytest.raises(OutOfPages):
            prefill(paged, texts)
    else:
        paged.pool.release(prefill(paged, texts))
    paged.pool.release(other)
    assert paged.pool.free_pages == paged.pool.num_pages
    assert paged.pool.free_slots == paged.pool.manager.max_slots
    paged.pool.manager.check()
