"""Texts that enter side by side: what several of them begin with is run once."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support.broken_models import broken_copy
from tests.support.drawn import drawn
from tests.support.engines import forwarded
from tests.support.tiny_models import tiny_model
from w2s_fast.errors import OutOfPages
from w2s_fast.models.model import PagedModel
from w2s_fast.search.beginnings import Advance, advance, leader_of, prefill

# Few different tokens, so that many texts begin alike.
TEXT = st.lists(st.integers(1, 2), max_size=14)
TEXTS = st.lists(TEXT, min_size=1, max_size=9)


def pages_of(text: list[int], page_size: int) -> list[tuple[int, ...]]:
    """The full pages of a text, each named by all tokens up to its end."""
    return [tuple(text[:end]) for end in range(page_size, len(text) + 1, page_size)]


@given(texts=TEXTS, known=TEXTS, page_size=st.integers(1, 4), data=st.data())
def test_leaders_by_their_definition(
    texts: list[list[int]], known: list[list[int]], page_size: int, data: st.DataObject
) -> None:
    cached = {page for text in known for page in pages_of(text, page_size)}
    missing = [[p for p in pages_of(t, page_size) if p not in cached] for t in texts]
    found = [len(t) // page_size * page_size - len(m) * page_size for t, m in zip(texts, missing)]
    begun = data.draw(st.lists(st.booleans(), min_size=len(texts), max_size=len(texts)))
    leaders = leader_of(texts, found, begun, page_size)
    for i, (first, pages) in enumerate(zip(leaders, missing, strict=True)):
        wanted = [j for j, other in enumerate(missing) if pages and other[:1] == pages[:1]]
        if begun[i] or not pages:
            assert first == i
        elif any(begun[j] for j in wanted):
            assert begun[first] and first in wanted
        else:  # one for each page that several need next, and of these the longest
            assert {leaders[j] for j in wanted} == {first}
            assert len(texts[first]) == max(len(texts[j]) for j in wanted)
    # Those that go first side by side run no page twice, but for what had begun before.
    run = [page for i in {*leaders} if not begun[i] for page in missing[i][:1]]
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


@drawn(60)
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


def begin(
    paged: PagedModel, texts: list[list[int]], most: int = 1000
) -> tuple[np.ndarray, Advance]:
    """Texts whose rest the caller would run."""
    slots = paged.pool.allocate(len(texts))
    return slots, advance(paged, slots, texts, most, [True] * len(texts))


def test_beginnings_of_one_another_take_two_passes() -> None:
    paged = model(1, True)
    paged.pool.drop_cache()
    longest = [1, 2, 1, 1, 2, 2, 1]
    slots, begun = begin(paged, [longest[:n] for n in (3, 1, 7, 5, 7)])
    assert begun.ready.all()
    assert begun.rows == [1]  # and in the second pass there is nothing left to run
    assert begun.adopted.tolist() == [3, 1, 0, 5, 7]
    paged.pool.release(slots)


def test_texts_that_share_nothing_wait_for_nobody() -> None:
    paged = model(4, True)
    paged.pool.drop_cache()
    slots, begun = begin(paged, [[1, 2, 1, 2, 1], [1, 2, 1, 1, 1], [1, 2, 1], []])
    assert begun.rows == []
    assert begun.left == 1000 - (6 + 6 + 4 + 1)
    assert paged.pool.lengths(slots).tolist() == [0] * 4
    paged.pool.release(slots)


def test_groups_within_groups_take_a_pass_for_each_level() -> None:
    paged = model(2, True)
    paged.pool.drop_cache()
    groups = [[1, 1, a, a, b, b] for a in (1, 2, 3) for b in (1, 2)]
    slots, begun = begin(paged, groups)
    assert begun.rows == [1, 2]
    assert paged.pool.lengths(slots).tolist() == [6, 4, 6, 4, 6, 4]
    assert begun.adopted.tolist() == [0, 4, 2, 4, 2, 4]
    paged.pool.release(slots)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_where_a_model_breaks_on_what_is_shared_nobody_waits_twice(value: float) -> None:
    broken = broken_copy(tiny_model("llama"), 7, value)
    paged = PagedModel(broken, kv_cache_tokens=400, page_size=2, prefix_cache=True)
    sound = [[3, 3, 1, 1, i] for i in range(3)]
    slots, begun = begin(paged, [*([1, 7, i, i] for i in range(3)), *sound])
    assert begun.rows == [2]
    assert begun.adopted.tolist() == [0, 0, 0, 0, 4, 4]
    assert paged.pool.match([[1, 7], [3, 3, 1, 1]]).tolist() == [0, 4]
    paged.pool.release(slots)


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


@drawn(60)
@given(
    texts=TEXTS, page_size=st.sampled_from([1, 2, 4]), most=st.integers(1, 9), warm=st.booleans()
)
def test_pieces_end_in_the_same_pages(
    texts: list[list[int]], page_size: int, most: int, warm: bool
) -> None:
    paged, cold = model(page_size, warm), model(page_size, False)
    paged.pool.drop_cache()
    slots = paged.pool.allocate(len(texts))
    adopted = np.zeros(len(texts), np.int32)
    steps = 0
    with forwarded(paged.model) as tokens:
        while True:
            before, ran = paged.pool.lengths(slots).sum(), tokens[0]
            found = advance(paged, slots, texts, most)
            adopted += found.adopted
            assert tokens[0] - ran == most - found.left <= most
            after = paged.pool.lengths(slots)
            assert after.sum() - before == tokens[0] - ran + found.adopted.sum()
            assert found.ready.tolist() == [n == len(t) for n, t in zip(after, texts)]
            if found.ready.all():
                break
            assert tokens[0] - ran == most  # nobody waits while there is something to run
            steps += 1
    assert steps <= sum(len(text) for text in texts) // most
    total = sum(len(text) for text in texts)
    assert tokens[0] == total - adopted.sum()
    paged.pool.manager.check()
    torch.testing.assert_close(last_logits(paged, slots), last_logits(cold, prefill(cold, texts)))
    assert paged.pool.free_pages == paged.pool.num_pages


@pytest.mark.parametrize("most", [1, 3, 4, 6])
def test_a_long_beginning_in_pieces_is_run_once(most: int) -> None:
    paged = model(2, True)
    paged.pool.drop_cache()
    beginning = [1, 2, 2, 1, 1, 2, 1, 1]
    texts = [[*beginning, 3, i, i, i] for i in range(4)]
    slots = paged.pool.allocate(4)
    with forwarded(paged.model) as tokens:
        while not advance(paged, slots, texts, most).ready.all():
            pass
    assert tokens[0] == 8 + 4 * 4
    paged.pool.release(slots)


def test_a_text_that_comes_later_finds_the_pieces_of_one_under_way() -> None:
    paged = model(2, True)
    paged.pool.drop_cache()
    long = [1, 2] * 7
    slots = paged.pool.allocate(2)
    advance(paged, slots[:1], [long], 6)
    found = advance(paged, slots, [long, [*long[:8], 1, 1]], 100)
    assert found.rows == [1, 1]  # the second waits for what both need next
    assert found.adopted.tolist() == [0, 8]
    paged.pool.release(slots)


def test_what_was_broken_is_not_remembered_with_a_later_piece() -> None:
    # Behind the window of its layers nothing shows any more that a token was broken.
    broken = broken_copy(tiny_model("mistral", layers=1), 7, math.nan)
    paged = PagedModel(broken, kv_cache_tokens=400, page_size=2, prefix_cache=True)
    text = [1, 7, *[2] * 20]
    slots = paged.pool.allocate(1)
    for _ in range(2):
        advance(paged, slots, [text], 8)
    hidden = paged.forward(slots, [3], [1])
    assert hidden.isfinite().all()
    assert paged.pool.match([text]).tolist() == [0]
    paged.pool.release(slots)
