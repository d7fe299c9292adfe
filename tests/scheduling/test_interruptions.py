"""An exception at any line: no page, slot or request is left behind, and the engine goes on.

``W2S_FAST_INTERRUPTIONS`` is how many places are tried in each piece of work besides the first time
of each line (default: 10).
"""

from __future__ import annotations

import functools
import gc
import os
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest
import torch

import w2s_fast
from tests.support.cohorts import in_cohorts
from tests.support.drawn import TIMES
from tests.support.engines import assert_all_pages_free, found, make_engine, models_of, quiet
from tests.support.tiny_models import tiny_model
from w2s_fast import Engine, ScoredCandidate, SearchParams
from w2s_fast.errors import EngineFailure
from w2s_fast.search import Request

PACKAGE = Path(w2s_fast.__file__).resolve().parent
KERNELS = PACKAGE.parent / "kernels"
# Where it matters at which line: what stands below holds nothing, so some places are enough.
OWNERS = tuple(str(PACKAGE / room) for room in ("engine", "scheduling", "search", "cache"))

CBS = SearchParams(beam_width=2, successors=2, chunk_length=2, max_new_tokens=4)
BON = SearchParams(method="bon", successors=2, max_new_tokens=2)
SAMPLE = SearchParams(method="sample", n=2, max_new_tokens=2)
BEAM = SearchParams(method="beam", beam_width=2, max_new_tokens=3, ignore_eos=True)
PROMPTS = [[3, 1, 4, 1, 5, 9], [3, 1, 4, 1, 5, 8], [3, 1, 4, 1, 5, 9, 2], [2, 7], [2, 8]]
PARAMS = [CBS, CBS, BON, SAMPLE, BEAM]
OTHER = [8, 1, 8]

Line = tuple[str, int]
Place = tuple[Line, int]  # the n-th time that it runs
Work = Callable[[Engine], object]


def generate(e: Engine) -> None:
    e.generate(PROMPTS, PARAMS)


def generate_two(e: Engine) -> None:
    """Of which one ends earlier."""
    e.generate(PROMPTS[2:], PARAMS[2:])


def score(e: Engine) -> None:
    e.score(PROMPTS[:2], [[3, 5], [8]])


def leave_a_stream(e: Engine) -> None:
    params = SearchParams(beam_width=1, successors=2, chunk_length=1, max_new_tokens=4)
    for _ in e.stream(PROMPTS[0], params):
        break


@functools.cache
def is_ours(code: CodeType) -> bool:
    return os.path.realpath(code.co_filename).startswith((str(PACKAGE), str(KERNELS)))


class Lines:
    """What runs within ``with``, line by line, of the package's own code.

    Args:
        at: before this line ``error`` is raised, when it comes for the n-th time.
        again: after that a KeyboardInterrupt is raised, behind so many calls and returns.
    """

    def __init__(
        self,
        at: Place | None = None,
        error: type[BaseException] = KeyboardInterrupt,
        again: int = -1,
    ) -> None:
        self.seen: list[Line] = []
        self.raised = 0
        self._at, self._left = at or (None, 0)
        self._error = error
        self._again = again

    def __enter__(self) -> Lines:
        self._before = sys.gettrace()
        sys.settrace(self._frame)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)
        sys.settrace(self._before)

    def _frame(self, frame: FrameType, *_: object) -> Any:
        at, code = self._at, frame.f_code
        wanted = is_ours(code) if at is None else code.co_filename == at[0]
        return self._line if wanted else None

    def _line(self, frame: FrameType, kind: str, _: object) -> Any:
        if kind == "line":
            place = (frame.f_code.co_filename, frame.f_lineno)
            if self._at is None:
                self.seen.append(place)
            elif place == self._at:
                self._left -= 1
                if self._left == 0:
                    self.raised += 1
                    if self._again >= 0:
                        sys.setprofile(self._call)
                    raise self._error("for the test")  # which ends the tracing
        return self._line

    def _call(self, frame: FrameType, kind: str, _: object) -> None:
        if is_ours(frame.f_code):
            self._again -= 1
            if self._again < 0:
                sys.setprofile(None)
                self.raised += 1
                raise KeyboardInterrupt("once more")


def small_engine(**options: Any) -> Engine:
    """With room for few requests at a time, so that some wait and some are set aside; prompts enter
    in pieces."""
    models = [tiny_model("llama", seed=s, layers=1, dtype=torch.float64) for s in (0, 1, 2)]
    base, tuned, untuned = models
    return make_engine(
        base,
        tuned,
        untuned,
        kv_cache_tokens=44,
        page_size=2,
        max_rows=8,
        max_pass_tokens=4,
        **options,
    )


def bystander(e: Engine) -> Request:
    """Somebody else's request, that waits as long as the others take all room."""
    request = e.make_request(OTHER, CBS, priority=9)
    e.runner.submit(request)
    return request


def start(e: Engine) -> None:
    for model in models_of(e):
        model.pool.drop_cache()  # so that every run takes the same lines


def check(e: Engine, other: Request, answer: Any, to_its_end: bool = True) -> None:
    """Nothing is left behind but the bystander, which goes on if it did not take part."""
    if to_its_end:
        while not other.ended:
            e.runner.advance([other])
    if other.ended:
        ended = [e.result(other)]
        assert isinstance(other.error, EngineFailure) or found(ended) == answer
    else:
        e.runner.give_up(other)
        e.runner.settle()
    assert quiet(e)
    for model in models_of(e):
        assert model.pool.free_pages == model.pool.num_pages, model.name
        assert model.pool.free_slots == model.pool.manager.max_slots, model.name
    runner = e.runner
    assert not (runner._under_way or runner._arrived or runner._given_up or runner._stepping)
    locks = (runner._turn, runner._next_turn, e._intake._encoding)
    assert not any(lock.locked() for lock in locks)
    assert {model.model.config._attn_implementation for model in models_of(e)} == {"eager"}
    assert not torch.is_inference_mode_enabled()


def every_place(works: Sequence[Work], e: Engine) -> Iterator[tuple[Work, Place]]:
    """Each line of those who own something once, and some later times, and some of the others."""
    more = int(os.environ.get("W2S_FAST_INTERRUPTIONS", str(5 * TIMES)))
    known: set[Line] = set()
    for work in works:
        start(e)
        with Lines() as lines:
            work(e)
        seen: Counter[Line] = Counter()
        places = []
        for line in lines.seen:
            seen[line] += 1
            places.append((line, seen[line]))
        own = {line for line in seen if line[0].startswith(OWNERS)} - known
        yield from ((work, (line, 1)) for line in sorted(own))
        chosen = random.Random(0).sample(places, min(more, len(places)))
        yield from ((work, place) for place in chosen)
        known |= own


@pytest.fixture
def repeatable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Garbage is collected between two runs alone; what is raised in a finaliser ends there."""
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("repeatable")
@pytest.mark.long
@pytest.mark.thorough
def test_an_exception_at_any_line_leaves_nothing_behind() -> None:
    e = small_engine()
    expected = found(e.generate(PROMPTS, PARAMS))
    answer = found(e.generate([OTHER], CBS))
    missed = 0
    for i, (work, at) in enumerate(
        list(every_place([score, leave_a_stream, generate_two, generate], e))
    ):
        start(e)
        error = (KeyboardInterrupt, MemoryError, RuntimeError)[i % 3 if i % 5 == 0 else 0]
        other = bystander(e)
        with suppress(error, EngineFailure), Lines(at, error) as interrupted:
            work(e)
        missed += not interrupted.raised
        thorough = i % 25 == 0
        try:
            check(e, other, answer, thorough)
            if thorough:
                gc.collect()
                assert_all_pages_free(e)
        except BaseException as failure:
            raise AssertionError(f"{error.__name__} in {work.__name__} at {at}") from failure
    # Which lines of the attention run follows from where pages lie.
    assert missed <= i // 50
    assert found(e.generate(PROMPTS, PARAMS)) == expected


@pytest.mark.usefixtures("repeatable")
def test_nothing_is_left_behind_while_the_exception_is_kept() -> None:
    """An interactive shell keeps the last one, and with it all frames it went through."""
    e = small_engine()
    answer = found(e.generate([OTHER], CBS))
    lines = [(work, at) for work, at in every_place([generate], e) if "/scheduling/" in at[0][0]]
    for work, at in lines[::10]:
        other = bystander(e)
        kept = None
        try:
            with Lines(at):
                work(e)
        except KeyboardInterrupt as interrupt:
            kept = interrupt
        assert kept is not None, at
        check(e, other, answer, to_its_end=False)


@pytest.mark.usefixtures("repeatable")
def test_the_next_turn_mends_what_a_second_interrupt_left() -> None:
    e = small_engine()
    answer = found(e.generate([OTHER], CBS))
    raised: Counter[int] = Counter()
    for i, (work, at) in enumerate(list(every_place([leave_a_stream, generate], e))[::12]):
        start(e)
        other = bystander(e)
        with suppress(KeyboardInterrupt), Lines(at, again=i * i % 97) as interrupted:
            work(e)
        raised[interrupted.raised] += 1
        try:
            check(e, other, answer)
        except BaseException as failure:
            raise AssertionError(f"{work.__name__} at {at}, and again") from failure
    assert raised[2] > raised[1]


@pytest.mark.thorough
@pytest.mark.usefixtures("repeatable")
def test_steps_in_flight_leave_nothing_behind_either() -> None:
    """Wherever steps of two cohorts are chosen, launched and finished; and twice, now and then."""
    e = in_cohorts(small_engine())
    answer = found(e.generate([OTHER], CBS))
    owners = ("scheduling/runner.py", "scheduling/scheduler.py", "search/search.py")
    places = list(every_place([generate_two, generate, leave_a_stream, score], e))
    ours = [(work, at) for work, at in places if at[0][0].endswith(owners)]
    assert len(ours) > 100
    for i, (work, at) in enumerate(ours):
        start(e)
        other = bystander(e)
        again = i * i % 97 if i % 3 == 0 else -1
        with suppress(KeyboardInterrupt, EngineFailure), Lines(at, again=again):
            work(e)
        try:
            check(e, other, answer, i % 5 == 0)
            assert not e.runner._in_flight
        except BaseException as failure:
            raise AssertionError(f"{work.__name__} at {at}, again {again}") from failure


def generate_chosen(e: Engine) -> None:
    """Some resampled, as all engines can; where one has scorers, all but the last are judged."""
    e.generate(PROMPTS, [replace(CBS, selection="resample"), *PARAMS[1:]])


def last_tokens(candidates: Sequence[ScoredCandidate]) -> list[float]:
    return [candidate.token_ids[-1] / 7 for candidate in candidates]


@pytest.mark.thorough
@pytest.mark.usefixtures("repeatable")
@pytest.mark.parametrize("scorers", [(), (last_tokens,)], ids=["resampled", "scored"])
def test_rounds_that_the_host_decides_leave_nothing_behind_either(scorers: Any) -> None:
    """Wherever choices are opened, handed over, waited for and closed; and twice, now and then."""
    e = small_engine(scorers=scorers)
    answer = found(e.generate([OTHER], CBS))
    owners = ("runner.py", "judge.py", "news.py", "search.py", "choice.py")
    places = list(every_place([generate_chosen], e))
    ours = [(work, at) for work, at in places if at[0][0].endswith(owners)]
    assert len(ours) > 100
    ours = ours[len(scorers) :: 2]
    raised = 0
    for i, (work, at) in enumerate(ours):
        start(e)
        other = bystander(e)
        again = i * i % 97 if i % 3 == 0 else -1
        with suppress(KeyboardInterrupt, EngineFailure), Lines(at, again=again) as interrupted:
            work(e)
        raised += interrupted.raised > 0
        try:
            check(e, other, answer, i % 5 == 0)
        except BaseException as failure:
            raise AssertionError(f"{work.__name__} at {at}, again {again}") from failure
    # Who waits for whom depends on how quick the scorers' thread is.
    assert raised > 0.8 * len(ours)
    assert found(e.generate([OTHER], CBS)) == answer


OPERATIONS = ("allocate", "reserve", "extend", "fork_beams", "take_tokens", "release_finished")
OPERATIONS += ("begin_rounds", "set_kept_slots", "take_scores", "end_rounds", "advance_beams")
OPERATIONS += ("fork_in_guides",)


@pytest.mark.usefixtures("repeatable")
@pytest.mark.parametrize("operation", OPERATIONS)
def test_what_was_done_in_one_call_may_stay_unknown(operation: str) -> None:
    """A signal that comes while it works is met behind it, before anybody has its result."""
    e = small_engine()
    answer = found(e.generate([OTHER], CBS))

    def interrupt(_: FrameType, kind: str, function: Any) -> None:
        nonlocal left
        if kind == "c_return" and function.__name__ == operation:
            left -= 1
            if left == 0:
                sys.setprofile(None)
                raise KeyboardInterrupt

    for n in (1, 2, 3):
        start(e)
        other = bystander(e)
        left = n
        sys.setprofile(interrupt)
        try:
            generate(e)
        except KeyboardInterrupt:
            pass
        finally:
            sys.setprofile(None)
        assert left <= 0, "it is called less often"
        check(e, other, answer)
