"""Buckets: large enough for every pass, not much larger, and few."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.engines import (
    SEARCH,
)
from tests.support.recorded import (
    Recorded,
    unrecorded_steps,
)
from tests.support.tiny_models import tiny_triple
from w2s_fast.attention.kernel import Bounds
from w2s_fast.attention.static_plan import Bucket
from w2s_fast.decoding.graphs import round_up_rows, rows_recorded
from w2s_fast.kernels.paged_attention_triton import SPLIT_KEYS, SPLIT_QUERIES


def bounds_of(rows: int, max_q: int, shared: tuple[int, int, int, int], pages: int) -> Bounds:
    """Bounds of a pass: splits, max_tokens, max_parts, max_own; entries of all its tables."""
    splits, max_tokens, max_parts, max_own = shared
    return Bounds(
        rows, rows * max_q, splits, pages, max_q, 16 * pages, max_own, max_tokens, max_parts
    )


@given(
    rows=st.integers(1, 1500),
    max_q=st.integers(1, 64),
    shared=st.tuples(*[st.integers(1, 5000)] * 4)
    | st.integers(0, 20000).map(lambda own: (0, 0, 0, own)),
    most=st.integers(1, 3000),
    filled=st.floats(0, 1),
)
def test_a_bucket_is_never_too_small(
    rows: int, max_q: int, shared: tuple[int, int, int, int], most: int, filled: float
) -> None:
    """``filled``: the share of their tables that rows have, of ``most`` pages a row."""
    padded, pages = round_up_rows(rows, 1500), int(filled * rows * most)
    bucket = Bucket.of(bounds_of(rows, max_q, shared, pages), padded, padded * max_q, most)
    wanted = (rows, rows * max_q, max_q, *shared, pages)
    assert all(have >= want for have, want in zip(bucket, wanted, strict=True))
    assert bucket.pages <= padded * most
    # Not much too large either, once past the smallest.
    smallest = Bucket.smallest(padded, padded * max_q, bucket.max_q, most)
    assert bucket.max_q < 2 * max_q
    assert all(
        have < 4 * want or have in (least, SPLIT_KEYS) or have == want == 0
        for have, want, least in zip(bucket[3:], wanted[3:], smallest[3:], strict=True)
    )
    if max_q > SPLIT_QUERIES and not shared[0]:
        assert bucket.splits == bucket.max_tokens == bucket.max_parts == 0


@pytest.mark.parametrize("requests", [2, 16, 64])
def test_usual_requests_leave_no_split_of_the_smallest_bucket_empty(requests: int) -> None:
    """With prompts of 512 tokens: two splits of each, one behind it, and four histories."""
    smallest = Bucket.smallest(16 * requests, 16 * requests, 1, 128)
    assert smallest.splits == (2 + 1 + 4) * requests


@given(rows=st.integers(1, 300), max_rows=st.integers(1, 300))
def test_numbers_of_rows(rows: int, max_rows: int) -> None:
    recorded = rows_recorded(max_rows)
    assert list(recorded) == sorted(set(recorded)) and recorded[-1] == max_rows
    if rows <= max_rows:
        assert rows <= round_up_rows(rows, max_rows) <= max(2 * rows, rows + 31)


def test_the_usual_search_needs_the_smallest_buckets_only() -> None:
    """4 x 4 candidates a request; what was recorded at the start serves all their steps."""
    engine, steps, _ = Recorded.of(tiny_triple(eos=()))
    before = len(steps.recordings)
    wide = replace(SEARCH, beam_width=4, successors=4, chunk_length=5, max_new_tokens=40)
    with unrecorded_steps() as unrecorded:
        for count in (1, 2, 4):
            prompts = [[(p + i) % 18 + 1 for p in range(80)] for i in range(count)]
            engine.generate(prompts, wide)
    assert not unrecorded and len(steps.recordings) == before
    assert {b.rows for b in steps.recordings if steps.recordings[b].replay.replays} == {16, 32, 64}  # type: ignore[attr-defined]
