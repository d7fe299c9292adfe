"""Beams and rounds in C++ do what lists of tokens say, and hold the slots that they should."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.csrc.beams_model import ModelRequest
from tests.csrc.beams_world import (
    EOS,
    PAGE,
    World,
    scoring,
    seen,
    take,
    take_scored,
    take_where_selected,
)
from tests.support.drawn import drawn
from w2s_fast import SearchParams
from w2s_fast._pages import (
    PageManager,
    advance_beams,
    any_broken,
    begin_rounds,
    broken_continuations,
    end_rounds,
    entering,
    fork_beams,
    held_slots,
    lacking,
    take_scores,
    take_selected,
)
from w2s_fast.errors import OutOfPages
from w2s_fast.search import Request


@drawn(150)
@given(st.data())
def test_rounds_of_many_requests_are_what_lists_of_tokens_say(data: st.DataObject) -> None:
    world = World(data)
    for _ in range(data.draw(st.integers(1, 12))):
        live = [i for i, r in enumerate(world.requests) if not r.beams.done]
        if not live:
            break
        which = data.draw(st.lists(st.sampled_from(live), unique=True, min_size=1))
        world.begin(which)
        world.check()
        world.expand(which)
        world.check()
        world.close(which)
        world.check()
        if data.draw(st.integers(0, 5)) == 0:
            world.interrupt(data.draw(st.sampled_from(which)))
            world.check()
    for request, trace in zip(world.requests, world.traces):
        if request.params.trace:
            rounds = request.beams.trace()
            found = [([seen(c) for c in one.candidates], one.kept) for one in rounds]
            assert found == trace
        request.beams.abort(world.managers)
    for m, manager in enumerate(world.managers):
        assert manager.free_slots == manager.max_slots, m
        assert manager.free_pages == manager.num_pages


def request(**params: Any) -> Request:
    options = {"beam_width": 2, "successors": 2, "chunk_length": 3, "max_new_tokens": 9, **params}
    return Request([1, 2], [[1, 2], [1, 2]], SearchParams(**options), eos_ids=EOS)


def score(one: Request, chunk: int) -> None:
    """Zeros, for chunks of so many tokens."""
    rows = len(one.beams.candidates)
    cu_tokens = np.arange(rows + 1) * chunk
    take_scored([one.beams], cu_tokens, np.zeros(rows * chunk), np.zeros(rows), np.full(rows, -1))


def test_a_broken_log_prob_is_named_once_and_nothing_behind_it_counts() -> None:
    one = request()
    begin_rounds([one.beams])
    logprobs = np.zeros((4, 3), np.float32)
    logprobs[1, 2], logprobs[2, 0], logprobs[3] = np.nan, np.inf, -np.inf
    assert take([one.beams], np.full((4, 3), 7), logprobs) == [(0, -1, 2)]
    assert [beam.tokens for beam in one.beams.candidates] == [[7, 7, 7], [7, 7], [], []]
    assert one.beams.sampled == 5


def test_a_broken_number_behind_the_end_of_a_response_is_nobodys() -> None:
    one = request()
    begin_rounds([one.beams])
    tokens = np.full((4, 3), 7)
    tokens[:, 1] = 0
    logprobs = np.zeros((4, 3), np.float32)
    logprobs[:, 2] = np.nan
    assert take([one.beams], tokens, logprobs) == []
    assert {beam.finish_reason for beam in one.beams.candidates} == {"eos"}


def test_the_first_broken_score_of_a_request_is_named() -> None:
    one, two = request(), request()
    beams = [one.beams, two.beams]
    begin_rounds(beams)
    tokens = np.full((8, 2), 7)
    tokens[:, 0] = [7, 7, 7, 7, 0, 7, 7, 7]
    take(beams, tokens, np.zeros((8, 2), np.float32))
    broken = np.array([-1, -1, -1, -1, -1, 11, 13, -1])
    found = take_scored(beams, np.arange(0, 18, 2), np.arange(16.0), np.zeros(8), broken)
    assert found == [(1, 11, 1)]
    # What stands behind the end of a chunk is nobody's score.
    assert [b.tokens for b in two.beams.candidates] == [[0], *[[7, 7]] * 3]
    end_rounds(beams, np.array([[3, 1], [0, 3]]), [])
    assert [b.token_scores for b in one.beams.kept] == [[6.0, 7.0], [2.0, 3.0]]
    assert [b.token_scores for b in two.beams.kept] == [[8.0], [14.0, 15.0]]


def test_no_slot_changes_hands_where_there_is_no_room() -> None:
    manager = PageManager(8, PAGE, 3, 4)
    one = request()
    begin_rounds([one.beams])
    (slot,) = manager.allocate(1)
    one.beams.set_kept_slots(0, np.array([slot], np.int32))
    with pytest.raises(OutOfPages):
        fork_beams([one.beams], manager, 0)
    assert held_slots([one.beams], 0).tolist() == [slot]
    assert not one.beams.forked


def test_a_request_waits_until_its_texts_stand() -> None:
    params = SearchParams(beam_width=2, successors=2, chunk_length=3, max_new_tokens=9)
    one = Request([1, 2, 3, 4], [[1, 2], [1, 2, 3, 4, 5]], params, eos_ids=EOS)
    beams = [one.beams]
    managers = [PageManager(64, PAGE, 32, 8) for _ in range(3)]

    def lacks() -> list[bool]:
        return [bool(lacking(beams, manager, m)[0]) for m, manager in enumerate(managers)]

    def grow(m: int, slots: Any, count: int) -> None:
        counts = np.full(len(slots), count, np.int32)
        managers[m].reserve(slots, counts)
        managers[m].extend(slots, counts)

    begin_rounds(beams)
    assert one.beams.kept_slots(0).tolist() == [-1]
    assert lacks() == [True] * 3
    for m in (0, 2):
        root = managers[m].allocate(1)
        one.beams.set_kept_slots(m, root)
        assert one.beams.kept_slots(m).tolist() == root.tolist()
        grow(m, root, 2)
        assert entering(beams, managers)
    grow(0, one.beams.kept_slots(0), 1)
    # It draws before the guides have its prompt; and waits for them with what it drew.
    assert not entering(beams, managers)
    assert lacks() == [False, True, True]
    grow(2, one.beams.kept_slots(2), 2)
    assert lacks() == [False, True, False]
    fork_beams(beams, managers[0], 0)
    assert not entering(beams, managers)
    take(beams, np.full((4, 3), 7), np.zeros((4, 3), np.float32))
    score(one, 3)
    end_rounds(beams, np.array([[3, 1]]), managers)
    # It comes back: two texts in three models, of which each says what it lacks.
    one.beams.set_aside(managers)
    one.beams.resume()
    begin_rounds(beams)
    for m, prompt in enumerate((4, 2, 5)):
        assert entering(beams, managers)
        slots = managers[m].allocate(2)
        one.beams.set_kept_slots(m, np.array([slots[0], -1], np.int32))
        grow(m, slots[:1], prompt + 3 - 1)
        assert one.beams.kept_slots(m).tolist() == [slots[0], -1]
        assert held_slots(beams, m).tolist() == [slots[0]]
        one.beams.set_kept_slots(m, slots)
        grow(m, slots[1:], prompt + 3 - 2)
        assert lacks()[m]
        grow(m, slots[1:], 1)
        assert not lacks()[m]
    assert not entering(beams, managers)


def test_a_history_is_stored_once() -> None:
    """What a round adds does not depend on how long the response is."""
    one = request(max_new_tokens=30_000, chunk_length=10)
    sizes = []
    for _ in range(3000):
        begin_rounds([one.beams])
        rows = len(one.beams.candidates)
        take([one.beams], np.full((rows, 10), 7), np.zeros((rows, 10), np.float32))
        score(one, 10)
        end_rounds([one.beams], np.array([[1, 3]]), [])
        sizes.append(one.beams.blocks)
    # Two histories, each block of them once, and those of losers are used again.
    assert sizes[-1] <= 2 * 3000 + 4
    assert [len(beam.tokens) for beam in one.beams.kept] == [30_000] * 2


def test_what_does_not_fit_is_refused() -> None:
    one = request()
    with pytest.raises(ValueError, match="rows, steps"):
        take([one.beams], np.zeros((1, 1), np.int64), np.zeros((1, 1), np.float32))
    begin_rounds([one.beams])
    with pytest.raises(ValueError, match="scores must be"):
        take_scored([one.beams], np.zeros(4, np.int64), np.zeros(0), np.zeros(3), np.full(3, -1))
    with pytest.raises(ValueError, match="more candidates"):
        take_scored([one.beams], np.zeros(9, np.int64), np.zeros(0), np.zeros(3), np.full(3, -1))
    with pytest.raises(ValueError, match="other words"):
        take_scores([one.beams], np.zeros(5, np.int64), np.zeros(30, np.int64), 3, 4, 0)


def test_broken_numbers_are_counted_among_those_who_draw() -> None:
    """Of a selection among more."""
    drawing, other = [request(), request()], request()
    begin_rounds([one.beams for one in (*drawing, other)])
    take([other.beams], np.full((4, 3), 7), np.zeros((4, 3), np.float32))
    tokens, logprobs = np.full((8, 3), 5), np.zeros((8, 3), np.float32)
    logprobs[6, 1:] = np.nan, np.inf
    requests = [drawing[0].beams, other.beams, drawing[1].beams]
    assert take_where_selected(requests, [one.beams for one in drawing], tokens, logprobs) == [
        (1, -1, 1)
    ]
    assert [c.tokens for c in other.beams.candidates] == [[7] * 3] * 4
    assert [c.tokens for c in drawing[1].beams.candidates] == [[5] * n for n in (3, 3, 1, 3)]


def test_what_was_not_selected_from_is_refused() -> None:
    one, other = request(), request()
    begin_rounds([one.beams, other.beams])
    with pytest.raises(ValueError, match="new tokens"):
        scoring([one.beams], [other.beams], 3)
    with pytest.raises(ValueError, match="not among those"):
        take_selected([one.beams], [other.beams], np.arange(5) * 3, *words(12), 3)
    with pytest.raises(ValueError, match="draws twice"):
        take_selected([one.beams], [one.beams] * 2, np.arange(5) * 3, *words(12), 3)
    for steps, cu_tokens, match in (
        (4, np.arange(5) * 3, "than chunks have"),
        (3, np.arange(6) * 3, r"\[T\]"),
        (3, np.arange(4) * 3, "more candidates"),
        (3, np.arange(5) * 9, r"\[T\]"),
    ):
        with pytest.raises(ValueError, match=match):
            take_selected([one.beams], [one.beams], cu_tokens, *words(12), steps)
    assert [c.tokens for c in one.beams.candidates] == [[]] * 4


def words(tokens: int) -> tuple[Any, ...]:
    """A selection of four candidates, of whom none is kept, and what it has room for."""
    return np.zeros(4 * 4 + 3 * tokens, np.int64), 0, 4, tokens


def test_any_broken_looks_at_those_who_are_there() -> None:
    packed, *sizes = words(0)
    packed[8:12] = -1, -1, -1, 3
    assert not any_broken(packed, *sizes, 3)
    assert any_broken(packed, *sizes, 4)
    with pytest.raises(ValueError, match="more candidates"):
        any_broken(packed, *sizes, 5)


def test_equal_tokens_of_other_parents_are_siblings() -> None:
    """They are told by their tokens, not by where these come from."""
    one = request(chunk_length=1)
    begin_rounds([one.beams])
    zeros = np.zeros((4, 1), np.float32)
    for tokens, kept in (([3, 4, 3, 5], [0, 2]), ([6, 7, 6, 7], [1, 3])):
        take([one.beams], np.array(tokens)[:, None], zeros)
        score(one, 1)
        end_rounds([one.beams], np.array([kept]), [])
        begin_rounds([one.beams])
        assert set(scoring([one.beams], [one.beams], 1)[2]["siblings"].tolist()) == {0}


def beams(width: int, manager: PageManager) -> Request:
    """A beam search whose prompt stands, in its first round."""
    params = SearchParams(method="beam", beam_width=width, max_new_tokens=9)
    one = Request([1, 2], [], params, eos_ids=EOS)
    begin_rounds([one.beams])
    root = manager.allocate(1)
    manager.reserve(root, np.array([2], np.int32))
    manager.extend(root, np.array([2], np.int32))
    one.beams.set_kept_slots(0, root)
    return one


def continuations(*rows: list[tuple[int, float]]) -> tuple[Any, Any]:
    tokens = [[token for token, _ in row] for row in rows]
    logprobs = [[logprob for _, logprob in row] for row in rows]
    return np.array(tokens, np.int32), np.array(logprobs, np.float32)


def test_an_end_behind_the_first_in_rank_is_no_end() -> None:
    manager = PageManager(64, PAGE, 8, 8)
    one = beams(2, manager)
    # Of two beams the first two in rank may end; what goes on is looked for behind them, too.
    row = [(5, -1.0), (0, -2.0), (6, -3.0), (7, -4.0)]
    advance_beams([one.beams], *continuations(row), manager)
    assert [(b.tokens, b.total) for b in one.beams.kept] == [([5], -1.0), ([6], -3.0), ([0], -2.0)]
    begin_rounds([one.beams])
    rows = [[(7, -1.0), (8, -1.5), (0, -2.5)], [(9, -4.0), (0, -5.0), (8, -6.0)]]
    advance_beams([one.beams], *continuations(*rows), manager)
    assert [(b.tokens, b.parent) for b in one.beams.kept] == [([5, 7], 0), ([5, 8], 0), ([0], 2)]
    assert one.beams.sampled == 5
    manager.check()
    assert manager.max_slots - manager.free_slots == 2


def test_a_broken_beam_search_stays_as_it_is() -> None:
    manager = PageManager(64, PAGE, 8, 8)
    broken, sound = beams(1, manager), beams(1, manager)
    found = continuations([(5, np.nan), (6, -1.0)], [(7, -1.0), (8, -np.inf)])
    both = [broken.beams, sound.beams]
    assert broken_continuations(both, *found) == [(0, -1, 0)]
    slots = held_slots([broken.beams], 0).tolist()
    advance_beams(both, *found, manager)
    assert [b.tokens for b in sound.beams.kept] == [[7]]
    assert broken.beams.open
    assert held_slots([broken.beams], 0).tolist() == slots


def test_continuations_of_other_rows_are_refused() -> None:
    manager = PageManager(64, PAGE, 8, 8)
    one, two = beams(2, manager), beams(2, manager)
    both = [one.beams, two.beams]
    tokens, logprobs = continuations([(5, -1.0), (6, -2.0), (7, -3.0)])
    for wrong in (logprobs, logprobs[:, :0]):
        with pytest.raises(ValueError, match="rows, k"):
            broken_continuations(both, wrong.astype(np.int32), wrong)
    with pytest.raises(ValueError, match="as many tokens"):
        advance_beams([one.beams], tokens[:, :2].copy(), logprobs, manager)
    other = request()
    begin_rounds([other.beams])
    with pytest.raises(ValueError, match="a round of its own"):
        advance_beams([other.beams], tokens, logprobs, manager)
    assert one.beams.open
    assert one.beams.candidates[0].tokens == []


def test_what_is_recomputed_is_shared_only_as_far_as_all_share_it() -> None:
    manager = PageManager(64, PAGE, 16, 8)
    one = beams(3, manager)
    advance_beams([one.beams], *continuations([(5, -1.0), (6, -2.0), (7, -9.0)]), manager)
    rows = [[(1, -1.0), (2, -1.5), (3, -9.0)], [(4, -1.0), (5, -9.0), (6, -9.0)], [(1, -9.0)] * 3]
    begin_rounds([one.beams])
    advance_beams([one.beams], *continuations(*rows), manager)
    assert [b.tokens for b in one.beams.kept] == [[5, 1], [5, 2], [6, 4]]
    one.beams.set_aside([manager])
    one.beams.set_kept_slots(0, manager.allocate(3))
    one.beams.resume()
    begin_rounds([one.beams])
    rows = [[(1, -1.0), (2, -1.1), (3, -9.0)], [(4, -1.0), (5, -9.0), (6, -9.0)], [(1, -9.0)] * 3]
    advance_beams([one.beams], *continuations(*rows), manager)
    assert [b.tokens[:2] for b in one.beams.kept] == [[5, 1], [5, 1], [5, 2]]
    assert one.beams.shared == 0  # and not 1: the first token was run for each by itself


def test_a_text_ends_among_its_new_tokens() -> None:
    one = request(beam_width=3, successors=1)
    begin_rounds([one.beams])
    take([one.beams], np.array([[7, 8, 9], [4, 5, 6], [0, 1, 1]]), np.zeros((3, 3), np.float32))
    assert one.beams.new_texts() == [(0, 0, [7, 8, 9]), (1, 0, [4, 5, 6]), (2, 0, [])]
    one.beams.end_text(0, 1, 5)
    assert [text[0] for text in one.beams.new_texts()] == [1, 2]
    with pytest.raises(ValueError, match="a text ends once"):
        one.beams.end_text(0, 1, 6)
    with pytest.raises(ValueError, match="a text ends once"):
        one.beams.end_text(1, 4, 6)
    cu_tokens = np.array([0, 1, 4, 5])
    assert (
        take_scored([one.beams], cu_tokens, np.arange(1.0, 6), np.arange(3.0), np.full(3, -1)) == []
    )
    end_rounds([one.beams], np.array([[0, 1, 2]]), [])
    first, second, third = one.beams.kept
    assert (first.tokens, first.token_scores, first.finish_reason) == ([7], [1.0], "stop")
    assert (first.ending, second.ending, third.ending) == (5, None, None)
    assert second.token_scores == [2.0, 3.0, 4.0] and third.finish_reason == "eos"


def test_a_text_ends_among_tokens_of_earlier_rounds() -> None:
    """Its siblings keep what it gives up, and its score is that of what it keeps."""
    one = request(beam_width=2, successors=2)
    begin_rounds([one.beams])
    first = np.array([[7, 8, 9], [4, 5, 6], [7, 8, 9], [4, 5, 6]])
    take([one.beams], first, np.zeros((4, 3), np.float32))
    token_scores = np.arange(12.0)
    totals = token_scores.reshape(4, 3).sum(1)
    take_scored([one.beams], np.arange(0, 15, 3), token_scores, totals, np.full(4, -1))
    end_rounds([one.beams], np.array([[0, 1]]), [])
    begin_rounds([one.beams])
    take([one.beams], np.array([[1, 1], [2, 2], [3, 3], [9, 9]]), np.zeros((4, 2), np.float32))
    one.beams.end_text(0, 2, 0)
    one.beams.end_text(1, 0, 1)
    found = [(b.tokens, b.total, b.token_scores) for b in one.beams.candidates]
    assert found[0] == ([7, 8], 0.0 + 1.0, [0.0, 1.0])
    assert found[1] == ([], 0.0, [])
    assert found[2] == ([4, 5, 6, 3, 3], 3.0 + 4.0 + 5.0, [3.0, 4.0, 5.0])
    laid_out = scoring([one.beams], [], 0)[2]
    assert laid_out["cu_tokens"].tolist() == [0, 0, 0, 2, 4]
    assert laid_out["previous"].tolist() == [1.0, 0.0, 12.0, 12.0]
    # A mean is over one token at least; nobody else has the tokens of those two.
    assert laid_out["lengths"].tolist() == [2, 1, 3, 3]
    assert laid_out["siblings"].tolist() == [-1, -2, 1, 1]
    one.beams.end_text(2, 2, 2)
    assert one.beams.candidates[2].tokens == [4, 5] and one.beams.grown == 5


def of_texts(**params: Any) -> Request:
    """Of which only texts are known: no model of this process has its beams."""
    options = {"beam_width": 2, "successors": 2, "chunk_length": 3, "max_new_tokens": 9, **params}
    one = Request([256], [], SearchParams(**options), eos_ids=[256], has_guides=False)
    begin_rounds([one.beams])
    return one


def test_texts_that_somebody_else_has_sampled_are_taken_as_they_are() -> None:
    one = of_texts(trace=True)
    one.beams.take_text(0, [7, 8, 9, 10, 11], sampled=3, ends=False)  # more ids than tokens
    one.beams.take_text(1, [7, 256], sampled=2, ends=False)
    one.beams.take_text(2, [], sampled=3, ends=False)
    one.beams.take_text(3, [5], sampled=0, ends=True)
    assert one.beams.sampled == 8
    assert [(b.tokens, b.finish_reason) for b in one.beams.candidates] == [
        ([7, 8, 9, 10, 11], None), ([7, 256], "eos"), ([], None), ([5], "length"),
    ]  # fmt: skip
    for candidate in (1, 3):
        with pytest.raises(ValueError, match="only who grows"):
            one.beams.take_text(candidate, [1], sampled=1, ends=False)
    with pytest.raises(ValueError, match="only who grows"):
        one.beams.take_text(0, [1], sampled=-1, ends=False)
    one.beams.pause_growing()
    with pytest.raises(ValueError, match="only who grows"):
        one.beams.take_text(0, [1], sampled=1, ends=False)
    assert one.beams.tokens_left == 0 and not one.beams.done
    end_rounds([one.beams], np.array([[0, 2]]), [])
    begin_rounds([one.beams])
    assert [b.tokens for b in one.beams.candidates] == [[7, 8, 9, 10, 11]] * 2 + [[]] * 2
    for candidate in range(4):
        one.beams.take_text(candidate, [candidate, 256], sampled=1, ends=False)
    end_rounds([one.beams], np.array([[3, 0]]), [])
    assert one.beams.done and one.beams.sampled == 12
    assert [b.tokens for b in one.beams.kept] == [[3, 256], [7, 8, 9, 10, 11, 0, 256]]
    assert [b.parent for b in one.beams.kept] == [1, 0]
    assert [r.kept for r in one.beams.trace()] == [[0, 2], [3, 0]]


def test_texts_are_kept_more_than_once_where_nobody_holds_slots() -> None:
    one = of_texts(selection="resample")
    for candidate in range(4):
        one.beams.take_text(candidate, [candidate + 1], sampled=1, ends=False)
    one.beams.pause_growing()
    end_rounds([one.beams], np.array([[2, 2]]), [])
    begin_rounds([one.beams])
    assert [(b.tokens, b.parent) for b in one.beams.candidates] == [([3], 0)] * 2 + [([3], 1)] * 2
    one.beams.take_text(1, [9], sampled=1, ends=True)
    one.beams.take_text(3, [8], sampled=1, ends=True)
    assert [b.tokens for b in one.beams.candidates] == [[3], [3, 9], [3], [3, 8]]


def test_a_round_of_texts_begins_again() -> None:
    one = of_texts()
    one.beams.take_text(0, [7], sampled=1, ends=False)
    one.beams.start_over([])
    begin_rounds([one.beams])
    assert [b.tokens for b in one.beams.candidates] == [[]] * 4
    for candidate in range(4):
        one.beams.take_text(candidate, [candidate], sampled=1, ends=False)
    one.beams.end_text(1, 0, 4)
    one.beams.pause_growing()
    end_rounds([one.beams], np.array([[1, 0]]), [])
    one.beams.set_aside([])
    begin_rounds([one.beams])
    assert [(b.tokens, b.finish_reason) for b in one.beams.candidates] == [
        ([], "stop"), ([0], None), ([0], None),
    ]  # fmt: skip
    one.beams.abort([])


@drawn(100)
@given(st.data())
def test_rounds_of_texts_are_what_lists_of_ids_say(data: st.DataObject) -> None:
    """Without a manager of pages."""
    params = SearchParams(
        beam_width=data.draw(st.integers(1, 3)), successors=data.draw(st.integers(1, 3)),
        finished=data.draw(st.sampled_from(["hold", "replicate"])), selection="resample",
        chunk_length=3, max_new_tokens=9,
    )  # fmt: skip
    one = Request([256], [], params, eos_ids=[256], has_guides=False)
    model = ModelRequest(params, {256})
    sampled = 0
    for _ in range(data.draw(st.integers(1, 5))):
        begin_rounds([one.beams])
        model.begin()
        for c, beam in enumerate(model.candidates):
            if beam.reason is not None:
                continue
            ids = data.draw(st.lists(st.integers(0, 3), max_size=4))
            ids += [256] * data.draw(st.booleans())
            count, ends = data.draw(st.integers(0, 5)), data.draw(st.booleans())
            one.beams.take_text(c, ids, sampled=count, ends=ends)
            sampled += count
            beam.tokens += ids
            beam.logprobs += [0.0] * len(ids)
            beam.reason = "eos" if ids[-1:] == [256] else "length" if ends else None
        one.beams.pause_growing()
        for c, beam in enumerate(model.candidates):
            new = len(beam.tokens) - (beam.reason == "eos")
            if beam.inherited < len(beam.tokens) and data.draw(st.integers(0, 4)) == 0:
                if beam.paused or one.beams.candidates[c].finish_reason is None:
                    continue  # its chunk has ended
                length = data.draw(st.integers(0, new))
                one.beams.end_text(c, length, 0)
                beam.tokens, beam.logprobs = beam.tokens[:length], beam.logprobs[:length]
                beam.inherited, beam.reason = min(beam.inherited, length), "stop"
        found = [(b.parent, b.tokens, b.finish_reason) for b in one.beams.candidates]
        assert found == [(b.parent, b.tokens, b.reason) for b in model.candidates]
        places = st.integers(0, len(model.candidates) - 1)
        kept = data.draw(st.lists(places, min_size=1, max_size=params.kept))
        end_rounds([one.beams], np.array([kept]), [])
        model.close(kept)
        assert [b.tokens for b in one.beams.kept] == [b.tokens for b in model.kept]
        assert one.beams.sampled == sampled
        if one.beams.done:
            break
    assert one.beams.done == all(beam.reason is not None for beam in model.kept)
