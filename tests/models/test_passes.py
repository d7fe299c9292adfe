"""Rows in passes of bounded size: what is cut, and that it comes out the same."""

from __future__ import annotations

import functools
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support.drawn import drawn
from tests.support.tiny_models import tiny_model
from w2s_fast.errors import OutOfPages
from w2s_fast.models import PagedModel, forward_in_passes
from w2s_fast.models.passes import cut

COUNTS = st.lists(st.integers(1, 12), min_size=1, max_size=8)


@given(counts=COUNTS, most=st.integers(1, 30))
def test_rows_are_cut_only_where_they_are_longer_than_a_pass(counts: list[int], most: int) -> None:
    parts = cut(counts, most)
    ran: list[list[int]] = [[] for _ in counts]
    tokens = 0
    for part in parts:
        assert 0 < part.counts.sum() <= most
        assert part.tokens == slice(tokens, tokens + part.counts.sum())
        tokens = part.tokens.stop
        assert len(part.counts) == part.rows.stop - part.rows.start
        for row, count in zip(range(part.rows.start, part.rows.stop), part.counts, strict=True):
            ran[row].append(int(count))
    assert [sum(own) for own in ran] == counts
    for own, count in zip(ran, counts, strict=True):
        assert len(own) == -(-count // most)
    for one, other in pairwise(parts):
        # Nobody is left for the next pass who would have fitted into this one.
        assert one.counts.sum() == most or one.counts.sum() + counts[other.rows.start] > most


@functools.cache
def model(bound: int) -> PagedModel:
    return PagedModel(tiny_model("gemma2"), kv_cache_tokens=256, page_size=4, max_pass_tokens=bound)


@drawn(30)
@given(counts=COUNTS, bound=st.sampled_from([1, 3, 7, 64]), on_device=st.booleans())
def test_passes_give_what_one_pass_gives(counts: list[int], bound: int, on_device: bool) -> None:
    tokens = [t * 7 % 19 + 1 for t in range(sum(counts))]
    found = []
    for paged in (model(bound), model(1000)):
        slots = paged.pool.allocate(len(counts))
        paged.forward(slots, [5] * len(slots), [1] * len(slots))
        given = torch.tensor(tokens) if on_device else tokens
        passes = list(forward_in_passes(paged, slots, given, counts))
        assert max(len(hidden) for _, hidden in passes) <= paged.max_pass_tokens
        assert paged.pool.lengths(slots).tolist() == [1 + count for count in counts]
        found.append(torch.cat([hidden for _, hidden in passes]))
        paged.pool.release(slots)
    torch.testing.assert_close(*found, rtol=0, atol=1e-6)


def test_without_room_for_all_passes_none_is_run() -> None:
    paged = model(3)
    slots = paged.pool.allocate(3)
    with pytest.raises(OutOfPages):
        next(iter(forward_in_passes(paged, slots, [1] * 300, [100] * 3)))
    assert paged.pool.lengths(slots).tolist() == [0] * 3
    assert paged.pool.free_pages == paged.pool.num_pages
    paged.pool.release(slots)
