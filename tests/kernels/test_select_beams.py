"""select_beams keeps each request's best candidates, best first, the lower index at a tie."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from w2s_fast.kernels.select_beams import select_beams


@dataclass(frozen=True)
class Request:
    scores: list[float]
    eligible: list[bool]
    width: int


def naive(requests: list[Request]) -> list[int]:
    kept, start = [], 0
    for r in requests:
        indices = [i for i in range(len(r.scores)) if r.eligible[i]]
        indices.sort(key=lambda i: (-r.scores[i], i))
        kept += [start + i for i in indices[: r.width]]
        start += len(r.scores)
    return kept


def select(requests: list[Request]) -> list[int]:
    return select_beams(
        torch.tensor([s for r in requests for s in r.scores], dtype=torch.float64),
        torch.tensor([i for i, r in enumerate(requests) for _ in r.scores]),
        torch.tensor([r.width for r in requests]),
        torch.tensor([e for r in requests for e in r.eligible]),
    ).tolist()


# Few different scores, so that ties are common.
scores = st.one_of(st.integers(-2, 2).map(float), st.floats(-1e6, 1e6), st.just(-0.0))
requests = st.lists(
    st.lists(
        st.tuples(scores, st.sampled_from([True, True, True, False])), min_size=1, max_size=12
    ).flatmap(
        lambda rows: st.builds(
            Request,
            st.just([s for s, _ in rows]),
            st.just([e for _, e in rows]),
            st.integers(1, 14),
        )
    ),
    min_size=1,
    max_size=6,
)


@settings(max_examples=300)
@given(requests)
def test_it_selects_what_a_plain_sort_selects(requests: list[Request]) -> None:
    assert select(requests) == naive(requests)


def test_equal_scores_go_to_the_lower_index() -> None:
    assert select([Request([1.0, 2.0, 2.0, 1.0, 2.0], [True] * 5, 4)]) == [1, 2, 4, 0]
    assert select([Request([0.0] * 40, [True] * 40, 7)]) == list(range(7))


def test_a_dropped_duplicate_leaves_its_place_to_the_next() -> None:
    assert select([Request([3.0, 3.0, 2.0, 1.0], [True, False, True, True], 3)]) == [0, 2, 3]


def test_fewer_candidates_than_places_are_all_kept() -> None:
    assert select([Request([1.0, 5.0], [True, True], 4)]) == [1, 0]
    assert select([Request([1.0, 5.0, 2.0], [False, True, False], 4)]) == [1]


def test_a_request_has_no_share_in_the_places_of_another() -> None:
    low, high = Request([-9.0, -8.0], [True] * 2, 1), Request([7.0, 9.0, 8.0], [True] * 3, 2)
    assert select([low, high]) == [1, 3, 4]
    assert select([high, low]) == [1, 2, 4]


def test_scores_closer_than_float32_can_tell_are_told_apart() -> None:
    assert select([Request([1000.0, 1000.0 + 1e-9, 1000.0], [True] * 3, 2)]) == [1, 0]
