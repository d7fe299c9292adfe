"""Rounds that are launched ahead find what rounds find whose tokens the host has looked at first.

Ahead, the guides run tokens behind an EOS, and rows of requests in which the base gave NaN: neither
may show in anything.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.support.broken_models import broken_copy
from tests.support.drawn import drawn
from tests.support.engines import LONG, MIXED, RAGGED_PROMPTS, SEARCH, make_engine, models_of
from tests.support.tiny_models import tiny_model
from w2s_fast import Engine, Guide, SearchParams
from w2s_fast.search import Request

TOKENS = range(1, 19)
# Nothing ends a response; something does now and then; half of all tokens do.
EOS = ((), (0, 6, 13), tuple(range(0, 19, 2)))
MODELS = ("base", "tuned guide", "untuned guide", "second guide")
BROKEN = 7  # the token that one of the models breaks on

Kind = tuple[tuple[int, ...], str, float, int]  # what ends a response, who breaks how, KV tokens


@functools.cache
def engine(ahead: bool, eos: tuple[int, ...], broken: str, value: float, room: int) -> Engine:
    """``broken``: one of MODELS, or nothing. With the same arguments but the first: the same."""
    models = [tiny_model("llama", seed=seed, eos=eos, layers=1) for seed in range(5)]
    if broken:
        which = MODELS.index(broken)
        models[which] = broken_copy(models[which], BROKEN, value)
    second = Guide(models[3], models[4], -0.5)
    made = make_engine(*models[:3], more_guides=[second], kv_cache_tokens=room)
    made._search._ahead = ahead
    return made


def run(made: Engine, prompts: Sequence[list[int]], params: Sequence[SearchParams]) -> list[Any]:
    """All that can be known of these searches, but for times."""
    for model in models_of(made):
        model.pool.drop_cache()
    before = made.stats()
    requests = [made.make_request(prompt, own) for prompt, own in zip(prompts, params)]
    for request in requests:
        made.runner.submit(request)
    while under_way := [request for request in requests if not request.ended]:
        made.runner.advance(under_way)
    after = made.stats()
    for pool in after.pools.values():
        assert pool.used_pages <= pool.cached_pages
    counts = ("finished", "failed", "set_aside", "steps", "rounds", "sampled_tokens", "rows")
    totals = {name: getattr(after, name) - getattr(before, name) for name in (*counts, "passes")}
    return [totals, *(known_of(made, request) for request in requests)]


def known_of(made: Engine, request: Request) -> Any:
    result = made.result(request)
    stats = (request.stats.rounds, request.stats.set_aside, request.stats.cached_tokens)
    if result.error is not None:
        return type(result.error), str(result.error), stats, request.beams.sampled
    assert result.trace is not None
    return (
        stats,
        result.usage,
        [asdict(hypothesis) for hypothesis in result.hypotheses],
        [asdict(one) for one in result.trace.rounds],
    )


def compare(kind: Kind, prompts: Sequence[list[int]], params: Sequence[SearchParams]) -> list[Any]:
    params = [replace(own, trace=True) for own in params]
    found, expected = (run(engine(ahead, *kind), prompts, params) for ahead in (True, False))
    eos, broken, *_ = kind
    # All that a request draws may end in the middle of its round: ahead, that shows a step later.
    later = found[0].pop("steps") - expected[0].pop("steps")
    may_end = broken or any(own.stop_token_ids or (eos and not own.ignore_eos) for own in params)
    assert later >= 0 if may_end else later == 0
    assert found == expected
    return found


@st.composite
def parameters(draw: st.DrawFn) -> SearchParams:
    method = draw(st.sampled_from(["cbs", "cbs", "cbs", "bon", "sample"]))
    beam_width, successors = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    most = {"cbs": beam_width, "bon": successors, "sample": 3}[method]
    return SearchParams(
        method=method,
        beam_width=beam_width,
        successors=successors,
        chunk_length=draw(st.sampled_from([1, 2, 3, 4, 5, 7, 18, None])),
        max_new_tokens=draw(st.sampled_from([1, 2, 3, 5, 7, 9, 12, 20])),
        temperature=draw(st.sampled_from([0.0, 0.7, 1.5])),
        top_k=draw(st.sampled_from([0, 5])),
        top_p=draw(st.sampled_from([0.9, 1.0])),
        seed=draw(st.integers(0, 2**64 - 1)),
        stop_token_ids=draw(st.lists(st.sampled_from(TOKENS), max_size=2)),
        ignore_eos=draw(st.booleans()),
        n=draw(st.integers(1, most)),
        finished=draw(st.sampled_from(["hold", "replicate"])),
        dedup=draw(st.booleans()),
        score=draw(st.sampled_from(["sum", "mean"])),
    )


def healthy(eos: tuple[int, ...], room: int = 4096) -> Kind:
    return eos, "", 0.0, room


# Each breaks in one of two ways, and each way comes with every model.
BROKEN_KINDS: list[Kind] = [
    (eos, name, (math.nan, math.inf)[(i + j) % 2], 4096)
    for i, eos in enumerate(EOS)
    for j, name in enumerate(MODELS)
]
kinds = st.builds(healthy, st.sampled_from(EOS)) | st.sampled_from(BROKEN_KINDS)
prompt_tokens = st.lists(st.sampled_from(TOKENS), min_size=1, max_size=12)


@drawn(40)
@given(kinds, st.lists(st.tuples(prompt_tokens, parameters()), min_size=1, max_size=4))
@example(healthy(EOS[1]), list(zip(RAGGED_PROMPTS, MIXED)))
@example((EOS[1], "base", math.nan, 4096), list(zip(RAGGED_PROMPTS, MIXED)))
def test_ahead_finds_the_same(kind: Kind, requests: list[tuple[list[int], SearchParams]]) -> None:
    compare(kind, *map(list, zip(*requests)))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("broken", MODELS)
def test_a_model_that_breaks_ends_the_same_requests(broken: str, value: float) -> None:
    """Some of them, at different places, and with every one of the models."""
    prompts = [[3, 1, 8 + i] for i in range(9)]
    params = [
        replace(SEARCH, beam_width=1, max_new_tokens=2 + i, chunk_length=2 + i % 2, n=1, seed=i)
        for i in range(len(prompts))
    ]
    totals, *rest = compare((EOS[1], broken, value, 4096), prompts, params)
    assert 0 < totals["failed"] < len(prompts)
    assert len({one[1] for one in rest if isinstance(one[0], type)}) > 1


@pytest.mark.parametrize("broken", MODELS[1:])
def test_what_breaks_behind_an_end_breaks_nothing(broken: str) -> None:
    """A guide that gives NaN from the token on that ends responses: each of them is sound."""
    params = [
        replace(SEARCH, chunk_length=5, stop_token_ids=[BROKEN], top_k=0, temperature=1.5, seed=i)
        for i in range(4)
    ]
    totals, *rest = compare(((), broken, math.nan, 4096), [[3, 1, 4]] * 4, params)
    assert totals["finished"] == 4
    ends = [
        candidate["finish_reason"]
        for one in rest
        for step in one[3]
        for candidate in step["candidates"]
    ]
    assert ends.count("stop") > 4


def test_requests_that_are_set_aside_find_the_same() -> None:
    params = [replace(LONG, seed=i, chunk_length=3 + i, max_new_tokens=30) for i in range(4)]
    totals, *_ = compare(healthy((), 160), RAGGED_PROMPTS[:4], params)
    assert totals["set_aside"] > 0


def test_what_runs_behind_an_end_is_run_ahead_only() -> None:
    """There is something to be hidden: else these tests would compare a thing with itself."""
    tokens = []
    for ahead in (True, False):
        made = engine(ahead, *healthy(EOS[2]))
        passes: list[int] = []
        for model in made.guides[0].models:
            handle = model.view.get_input_embeddings().register_forward_hook(
                lambda _module, given, _out, passes=passes: passes.append(given[0].numel())
            )
            try:
                run(made, RAGGED_PROMPTS[:1], [replace(MIXED[0], trace=True)])
            finally:
                handle.remove()
        tokens.append(sum(passes))
    assert tokens[0] > tokens[1]
