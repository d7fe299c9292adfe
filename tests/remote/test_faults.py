"""Through a network that drops, cuts and delays, and a server that is busy, every search ends with
what it would have found without; no candidate is lost, and none counts twice."""

from __future__ import annotations

import random
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import pytest

from tests.remote.test_counting import check
from tests.support.engines import quiet
from tests.support.fault_proxy import Fault, Proxy
from tests.support.foreign_guides import pairs
from tests.support.remote_engines import PROMPTS, SEARCH, remote, told
from tests.support.remote_reference import RemoteReference, assert_same
from w2s_fast import Engine, SearchParams, SearchResult
from w2s_fast.errors import RemoteFailure

# What is tried again as it was asked, so that nothing comes of it; and what gives other samples.
HARMLESS: tuple[Fault, ...] = (
    "refused", "dropped", "delayed", "cut", "garbled", "429", "500", "503",
)  # fmt: skip
OTHERS: tuple[Fault, ...] = ("fewer", "none")
PARAMS: list[SearchParams] = [
    SEARCH,
    replace(SEARCH, seed=9, stop=("e", "s"), finished="replicate"),
    replace(SEARCH, method="bon", successors=6, n=2),
    replace(SEARCH, method="sample", n=4),
]


@pytest.fixture(scope="module")
def engine(proxy: Proxy) -> Engine:
    return remote(proxy.url, max_retries=9, max_concurrency=5)


@pytest.fixture(scope="module")
def reference(own_url: str) -> RemoteReference:
    return RemoteReference(own_url, pairs("bpe-first"), model="own")


def drawn(seed: int, faults: Sequence[Fault]) -> list[Fault | None]:
    """About half of the requests fail, and each fault comes soon."""
    drawing, found = random.Random(seed), list[Fault | None]()
    for _ in range(50):
        some = [*faults, *[None] * len(faults)]
        drawing.shuffle(some)
        found += some
    return found


def searched(e: Engine) -> list[SearchResult]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = e.generate(PROMPTS, PARAMS)
    assert quiet(e)
    return results


@pytest.mark.parametrize("fault", HARMLESS)
def test_each_fault_alone_changes_nothing(
    engine: Engine, proxy: Proxy, reference: RemoteReference, fault: Fault, short_pauses: None
) -> None:
    proxy.begin(lambda number: fault if number % 2 == 0 else None)
    (result,) = engine.generate(PROMPTS[:1], SEARCH)
    assert_same(result, reference.search(PROMPTS[0], SEARCH))
    assert {passed.fault for passed in proxy.passed} == {fault, None}
    proxy.begin(())


@pytest.mark.parametrize("seed", [1, 2])
def test_all_of_them_together_change_nothing(
    engine: Engine, proxy: Proxy, seed: int, short_pauses: None
) -> None:
    proxy.begin(())
    expected = searched(engine)
    without = len(proxy.passed)
    proxy.begin(drawn(seed, HARMLESS))
    results = searched(engine)
    assert len({passed.fault for passed in proxy.passed}) >= 7
    for ours, theirs in zip(results, expected):
        assert told(ours) == told(theirs)
        assert ours.usage.remote is not None and theirs.usage.remote is not None
        assert ours.usage.remote.completion_tokens == theirs.usage.remote.completion_tokens
        assert ours.usage.remote.prompt_tokens == theirs.usage.remote.prompt_tokens
        assert ours.usage.sampled_tokens == theirs.usage.sampled_tokens
    sent = sum(r.usage.remote.requests for r in results if r.usage.remote)
    assert sent == len(proxy.passed) > without
    proxy.begin(())


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_no_candidate_is_lost_or_doubled(proxy: Proxy, seed: int, short_pauses: None) -> None:
    """Also where fewer choices come, and others are asked for in their place."""
    proxy.begin(())
    e = remote(proxy.url, max_retries=9)
    proxy.begin(drawn(seed, HARMLESS + OTHERS * 2))
    results = searched(e)
    assert {*OTHERS} <= {passed.fault for passed in proxy.passed}
    for result, params in zip(results, PARAMS):
        check(result, params)
    came = Counter(
        sample.text
        for result in results
        if result.trace is not None
        for draws in result.trace.draws
        for draw in draws
        for sample in draw.samples
    )
    given = Counter(text for passed in proxy.passed for text in passed.given)
    assert came == given  # each choice that was given is one candidate, and each has one
    proxy.begin(())


def test_of_a_server_that_never_answers_the_search_says_so(
    proxy: Proxy, engine: Engine, short_pauses: None
) -> None:
    e = remote(proxy.url, max_retries=2)
    for faults, message in (
        (["cut"] * 99, "no connection: RemoteProtocolError"),
        (["refused"] * 99, "no connection: "),
        (["garbled"] * 99, "answers without any, 3 times"),
        (["none"] * 99, "answers without any, 3 times"),
        (["429"] * 99, "429: not now; give a smaller max_concurrency"),
    ):
        proxy.begin(faults)  # type: ignore[arg-type]
        with pytest.raises(RemoteFailure, match=message):
            e.generate(["hello"], replace(SEARCH, method="sample", n=2))
        assert len(proxy.passed) <= 5
    proxy.begin(())
    assert e.generate(["hello"], SEARCH)[0].error is None  # it is as good as new


def test_an_answer_that_comes_too_late_counts_for_nothing(
    proxy: Proxy, reference: RemoteReference, short_pauses: None
) -> None:
    proxy.begin(())
    e = remote(proxy.url, timeout=1.0, max_retries=3)
    proxy.begin(["late"])
    (result,) = e.generate(PROMPTS[:1], SEARCH)
    assert_same(result, reference.search(PROMPTS[0], SEARCH))
    assert proxy.passed[0].body == proxy.passed[1].body
    proxy.begin(())


def test_one_whose_server_fails_harms_no_other(
    engine: Engine, proxy: Proxy, short_pauses: None
) -> None:
    proxy.begin(())
    (expected,) = engine.generate(["hello"], SEARCH)
    e = remote(proxy.url, max_retries=0)
    proxy.begin(["500"])
    failed, fine = e.generate(["hello", "hello"], SEARCH, on_error="return")
    if failed.error is None:  # whoever came first
        failed, fine = fine, failed
    assert isinstance(failed.error, RemoteFailure) and told(fine) == told(expected)
    proxy.begin(())
