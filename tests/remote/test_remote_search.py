"""Searches over somebody else's server choose what a naive search over its plain HTTP API does."""

from __future__ import annotations

import asyncio
import copy
import gc
import threading
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.support.async_tasks import run, until
from tests.support.device import DEVICE, Device
from tests.support.engines import quiet
from tests.support.foreign_guides import pair, pairs
from tests.support.remote_engines import PROMPTS, SAMPLE, SEARCH, remote, told
from tests.support.remote_reference import Hypothesis, RemoteReference, assert_same
from tests.support.scripted_server import Asked, Choice, Script, never_ending, scripted
from w2s_fast import AsyncEngine, Engine, Guide, ScoredCandidate, SearchParams
from w2s_fast.errors import Aborted, InvalidRequest

KINDS = ("bpe-first", "wordpiece")


@pytest.fixture(scope="module")
def own(own_url: str) -> tuple[Engine, RemoteReference]:
    """Over this project's own server."""
    return remote(own_url, KINDS), RemoteReference(own_url, pairs(*KINDS), model="own")


@pytest.fixture(scope="module")
def scripted_engine(words: Script) -> Engine:
    return remote(words.url)


@pytest.fixture(scope="module")
def reference(words: Script) -> RemoteReference:
    return RemoteReference(words.url, pairs("bpe-first"))


@pytest.fixture(scope="module")
def endless() -> Iterator[Script]:
    """No text ends by itself."""
    with scripted(choice=never_ending) as found:
        yield found


STOPS = ("film", "s.", "\u4eca", "\n", "ing ")
SEARCHES: list[dict[str, Any]] = [
    {},
    {"stop": STOPS, "seed": 2},
    {"stop": ("s", "\u5929"), "include_stop_str_in_output": False, "chunk_length": 6},
    {"chunk_stop": (".", "\n", "s", "\u4eca"), "chunk_length": 7, "max_new_tokens": 20},
    {"chunk_stop": (" film", " "), "stop": ("film.", "a"), "chunk_length": 9},
    {"finished": "replicate", "seed": 8},
    {"dedup": True, "temperature": 0.0},
    {"dedup": True, "chunk_length": 1, "max_new_tokens": 5},
    {"selection": "resample", "tau": 0.5},
    {"beam_width": (4, 2, 1), "successors": (1, 3), "chunk_length": (2, 5, 3)},
    {"beam_width": 1, "successors": 6, "chunk_length": None, "seed": 11},
    {"method": "bon", "successors": 5, "n": 3},
    {"method": "sample", "n": 4},
    {"beam_width": 1, "successors": 1, "max_new_tokens": 9},
    {"n": 3, "seed": 2**64 - 1, "top_k": 0, "top_p": 0.9, "min_p": 0.01},
]


@pytest.mark.parametrize("changes", SEARCHES, ids=str)
def test_every_kind_of_search_is_the_naive_one(
    changes: dict[str, Any], words: Script, scripted_engine: Engine, reference: RemoteReference
) -> None:
    params = replace(SEARCH, **changes)
    prompt = PROMPTS[len(changes) % 4]
    words.begin()
    (result,) = scripted_engine.generate([prompt], params)
    expected = reference.search(prompt, params)
    assert_same(result, expected)
    assert result.usage.remote is not None
    cost = result.usage.remote
    assert (cost.requests, cost.prompt_tokens) == (expected.requests, expected.read)
    assert cost.completion_tokens == expected.sampled
    assert len(words.asked) == 2 * expected.requests
    assert all("stop" not in asked.body for asked in words.asked)
    assert_all_guides_free(scripted_engine)


@pytest.mark.parametrize(
    "changes", [{}, {"stop": ("e", "a "), "finished": "replicate"}, {"chunk_stop": ("e", " ")}],
    ids=str,
)  # fmt: skip
def test_over_a_model_as_over_a_script(
    changes: dict[str, Any], own: tuple[Engine, RemoteReference]
) -> None:
    engine, reference = own
    params = replace(SEARCH, **changes)
    results = engine.generate(PROMPTS[:2], params)
    for prompt, result in zip(PROMPTS, results):
        assert_same(result, reference.search(prompt, params))
    assert_all_guides_free(engine)


def assert_all_guides_free(e: Engine) -> None:
    for guide in e.guides:
        for model in guide.models:
            assert model.pool.free_pages == model.pool.num_pages, model.name
            assert model.pool.free_slots == model.pool.manager.max_slots, model.name


def test_a_mean_is_over_the_tokens_that_the_server_counts(endless: Script) -> None:
    params = replace(SEARCH, score="mean", chunk_length=3)
    (result,) = remote(endless.url).generate(["hello"], params)
    reference = RemoteReference(endless.url, pairs("bpe-first"))
    assert_same(result, reference.search("hello", params))


def values(candidates: Sequence[ScoredCandidate]) -> list[float]:
    assert all(c.token_ids == [] and c.prompt == PROMPTS[0] for c in candidates)
    return [value(c.text or "", c.finished) for c in candidates]


def value(text: str, ended: bool) -> float:
    return zlib.crc32(text.encode()) % 1000 / 100 + 3 * ended


def test_scorers_have_their_say_with_guides_and_without(words: Script) -> None:
    for kinds in (("bpe-first",), ()):
        e = remote(words.url, kinds, scorers=[(values, -0.25)])
        reference = RemoteReference(words.url, pairs(*kinds), [(value, -0.25)])
        (result,) = e.generate(PROMPTS[:1], SEARCH)
        assert_same(result, reference.search(PROMPTS[0], SEARCH))


def test_a_choice_of_ones_own_sees_the_texts(scripted_engine: Engine) -> None:
    def last(values: Sequence[float], candidates: Sequence[ScoredCandidate]) -> list[int]:
        assert len(values) == len(candidates)
        return [max(range(len(candidates)), key=lambda i: candidates[i].text or "")]

    (result,) = scripted_engine.generate(["x"], replace(SEARCH, selection=last, stop=".", n=1))
    assert result.trace is not None
    for r in result.trace.rounds:
        assert [c.text for c in r.candidates][r.kept[0]] == max(c.text or "" for c in r.candidates)


def test_scores_are_those_that_the_engine_gives_texts(scripted_engine: Engine) -> None:
    (result,) = scripted_engine.generate(["hello"], replace(SEARCH, seed=3, n=3))
    some = [h for h in result.hypotheses if h.finish_reason == "length"]
    assert some
    found = scripted_engine.score(["hello"] * len(some), [h.text or "" for h in some])
    assert found == pytest.approx([h.score for h in some], abs=1e-4)


def test_asked_together_each_finds_what_it_finds_alone(scripted_engine: Engine) -> None:
    prompts = [f"{PROMPTS[i % 4]} {i}" for i in range(24)]
    params = [replace(SEARCH, seed=i, finished="hold" if i % 2 else "replicate", max_new_tokens=9)
              for i in range(24)]  # fmt: skip
    together = scripted_engine.generate(prompts, params)
    for i in (0, 7, 23):
        (alone,) = scripted_engine.generate([prompts[i]], params[i])
        # A batched pass may round otherwise.
        for ours, theirs in zip(told(alone), told(together[i])):
            assert strip(ours) == strip(theirs)
    assert_all_guides_free(scripted_engine)


def strip(found: Any) -> Any:
    """Without scores."""
    if isinstance(found, list) and found and isinstance(found[0], tuple):
        return [own[:3] for own in found]
    return found


PIECES = ["caf", "\u00e9 \u4e2d", "\u6587 \U0001f468\u200d\U0001f469", "\r\n\t", "e\u0301 ", "\x00"]


def pieces(asked: Asked, index: int) -> Choice:
    """A text that goes on where it was left, whatever stands in it."""
    before = asked.text.removeprefix("p")
    whole = "".join(PIECES)
    assert whole.startswith(before)
    number = next(i for i in range(9) if "".join(PIECES[:i]) == before)
    if number == len(PIECES):
        return Choice("", "stop", 1)
    return Choice(PIECES[number], "length", asked.max_tokens)


def test_in_cohorts_each_finds_the_same(words: Script, scripted_engine: Engine) -> None:
    e = remote(words.url)
    e.runner._cohorts = 2
    expected = scripted_engine.generate(PROMPTS, SEARCH)
    assert [*map(told, e.generate(PROMPTS, SEARCH))] == [*map(told, expected)]


@pytest.mark.parametrize("method", ["cbs", "chat"])
def test_what_came_is_sent_on_and_given_out_byte_for_byte(method: str) -> None:
    with scripted(choice=pieces, texts=method == "cbs") as server:
        server.choice = lambda asked, i: Choice("1")
        e = remote(server.url)
        server.choice = pieces if method == "cbs" else last_message
        server.begin()
        params = SearchParams(beam_width=1, successors=2, chunk_length=3, max_new_tokens=60)
        streamed = list(e.stream("p", params))
        assert streamed[-1].result is not None
        assert streamed[-1].result.text == "".join(PIECES)
        assert "".join(piece.text or "" for piece in streamed) == "".join(PIECES)
        assert len(streamed) > len(PIECES) / 2
        assert all(piece.token_ids == [] for piece in streamed)
        behind = [asked.text for asked in server.asked]
        if method == "cbs":
            assert behind == ["p" + "".join(PIECES[:i]) for i in range(len(PIECES) + 1)]


def last_message(asked: Asked, index: int) -> Choice:
    *_, last = asked.body["messages"]
    text = last["content"] if last["role"] == "assistant" else ""
    return pieces(replace(asked, text="p" + text), index)


@pytest.mark.parametrize("changes", [{}, {"stop": ("s.", "film was")}, {"chunk_stop": (" ",)}])
def test_a_stream_is_its_result_in_pieces(scripted_engine: Engine, changes: Any) -> None:
    for seed in range(2):
        params = replace(SEARCH, seed=seed, **changes)
        (result,) = scripted_engine.generate(["hello"], params)
        pieces = list(scripted_engine.stream("hello", params))
        assert "".join(piece.text or "" for piece in pieces) == result.text
        assert pieces[-1].result is not None and told(pieces[-1].result) == told(result)


def test_many_tasks_share_an_engine(words: Script, scripted_engine: Engine) -> None:
    async def main() -> list[Any]:
        async with AsyncEngine(scripted_engine) as a:
            tasks = [a.generate(prompt, replace(SEARCH, seed=4)) for prompt in PROMPTS]
            return await asyncio.gather(*tasks)

    results = run(main())
    expected = scripted_engine.generate(PROMPTS, replace(SEARCH, seed=4))
    for ours, theirs in zip(results, expected):
        assert [h.text for h in ours.hypotheses] == [h.text for h in theirs.hypotheses]


def test_who_is_given_up_leaves_the_server(endless: Script) -> None:
    e = remote(endless.url)
    endless.begin()
    endless.delay = 20.0

    async def main() -> None:
        async with AsyncEngine(e) as a:
            task = asyncio.create_task(a.generate("hello", replace(SEARCH, max_new_tokens=200)))
            await until(lambda: len(endless.asked) == 1)
            task.cancel()
            await until(lambda: endless.left == 1 and quiet(e))
            endless.delay = 0.0
            result = await a.generate("hello", SAMPLE)
            assert result.error is None

    try:
        run(main())
    finally:
        endless.delay = 0.0
    assert e.stats().aborted == 1
    assert_all_guides_free(e)


def test_a_loop_that_is_left_leaves_the_server(endless: Script) -> None:
    e = remote(endless.url)
    for _ in e.stream("hello", replace(SEARCH, beam_width=1, max_new_tokens=2000)):
        break
    deadline = time.perf_counter() + 10
    while not quiet(e) and time.perf_counter() < deadline:
        time.sleep(0.002)
    assert quiet(e)
    before = len(endless.asked)
    time.sleep(0.05)
    assert len(endless.asked) <= before + 1
    assert_all_guides_free(e)


def test_one_that_fails_harms_no_neighbour(endless: Script) -> None:
    e = remote(endless.url)
    long = replace(SEARCH, chunk_length=60, max_new_tokens=400)
    failed, fine = e.generate(["hello", "hello"], [long, SEARCH], on_error="return")
    assert isinstance(failed.error, InvalidRequest) and "tuned" in str(failed.error)
    assert told(fine) == told(e.generate(["hello"], SEARCH)[0])
    assert_all_guides_free(e)


def test_changed_guides_count_from_the_next_step_on(words: Script) -> None:
    """What was drawn for the round under way still counts: nothing is asked for twice."""
    given = pair("bpe-first")
    tuned, untuned = copy.deepcopy(given.tuned), copy.deepcopy(given.untuned)
    guide = Guide(tuned, untuned, tokenizer=given.tokenizer)
    e = remote(words.url, guides=[guide])
    params = replace(SEARCH, seed=1)
    words.begin()
    words.delay = 0.02
    try:
        request = e.make_request("hello", params)
        e.runner.submit(request)
        while len(words.asked) < 2:  # the second round is being drawn
            e.runner.advance([request])
        with torch.no_grad():
            for parameter in tuned.parameters():
                parameter.mul_(1.1)
        while not request.ended:
            e.runner.advance([request])
    finally:
        words.delay = 0.0
    result = e.result(request)
    assert result.error is None and result.trace is not None
    old, new = (RemoteReference(words.url, [own]) for own in (given, guide))
    as_before, anew = 0, 0
    for number, r in enumerate(result.trace.rounds[:2]):
        for c in r.candidates:
            own = Hypothesis(c.text or "", c.finish_reason)
            as_before += c.score == pytest.approx(old.score("hello", own), abs=1e-4)
            if number == 1:  # what was kept has its scores, and what is new has new ones
                assert c.parent is not None
                parent = result.trace.rounds[0].candidates[result.trace.rounds[0].kept[c.parent]]
                before = Hypothesis(parent.text or "", parent.finish_reason)
                added = new.score("hello", own) - new.score("hello", before)
                anew += c.score == pytest.approx((parent.score or 0) + added, abs=1e-4)
    first, second, *_ = (len(r.candidates) for r in result.trace.rounds)
    assert as_before == first and anew >= second / 2  # tokens of the others have moved
    asked = [(a.text, a.body["seed"]) for a in words.asked]
    assert len(asked) == len(set(asked)) == sum(map(len, result.trace.draws))
    assert_all_guides_free(e)


def test_scoring_between_two_rounds_takes_pages_that_come_back(words: Script) -> None:
    e = remote(words.url)
    expected = told(e.generate(["hello"], SEARCH)[0])
    text = " world" * 50
    alone = e.score(["hello"], [text])
    scored = 0
    for piece in e.stream("hello", SEARCH):
        scored += 1
        assert e.score(["hello"], [text]) == pytest.approx(alone, abs=1e-4)
        if piece.result is not None:
            assert told(piece.result) == expected
    assert scored
    assert_all_guides_free(e)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "fusion"}, "method is 'fusion'.*'cbs', 'bon', 'sample'"),
        ({"method": "beam"}, "method is 'beam'"),
        ({"proposal": "fusion"}, "proposal is 'fusion'"),
        ({"stop_token_ids": (3,)}, "stop_token_ids"),
        ({"min_new_tokens": 2}, "min_new_tokens"),
        ({"ignore_eos": True}, "ignore_eos"),
    ],
)
def test_what_needs_the_bases_own_tokens_is_refused(
    scripted_engine: Engine, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidRequest, match=message):
        scripted_engine.generate(["x"], SearchParams(**changes))


def test_what_only_a_base_here_can_do_is_refused(words: Script, scripted_engine: Engine) -> None:
    with pytest.raises(InvalidRequest, match="the base is remote"):
        scripted_engine.log_probs(["x"])
    with pytest.raises(InvalidRequest, match="the base is remote"):
        scripted_engine.encode("x")
    with pytest.raises(InvalidRequest, match="token ids"):
        scripted_engine.generate([[1, 2]], SEARCH)
    with pytest.raises(InvalidRequest, match="needs guides"):
        remote(words.url, ()).generate(["x"], SEARCH)
    assert scripted_engine.server is not None and scripted_engine.tokenizer is None


def test_without_guides_texts_are_sampled(words: Script) -> None:
    e = remote(words.url, ())
    (result,) = e.generate(["hello"], replace(SAMPLE, n=3))
    assert len(result.hypotheses) == 3 and result.score is None
    assert_same(result, RemoteReference(words.url).search("hello", replace(SAMPLE, n=3)))


def test_an_engine_that_is_gone_leaves_no_thread_behind(words: Script) -> None:
    before = set(threading.enumerate())
    e = remote(words.url, ())
    e.generate(["hello"], SAMPLE)
    (own,) = (t for t in set(threading.enumerate()) - before if t.name == "w2s-fast remote")
    del e
    gc.collect()
    own.join(10)
    assert not own.is_alive()


def test_aborted_requests_say_so(endless: Script) -> None:
    e = remote(endless.url)
    request = e.make_request("hello", SEARCH)
    e.runner.submit(request)
    e.runner.give_up(request)
    e.runner.settle()
    assert isinstance(e.result(request).error, Aborted)
    assert_all_guides_free(e)


def test_guides_on_a_device_of_their_own(words: Script) -> None:
    """And each on another: what they say is read together."""
    wanted = [told(own) for own in remote(words.url, KINDS).generate(PROMPTS, SEARCH)]

    def there(*devices: torch.device | str) -> list[Guide]:
        return [
            replace(
                guide,
                tuned=copy.deepcopy(guide.tuned),
                untuned=copy.deepcopy(guide.untuned),
                device=device,
            )
            for guide, device in zip(pairs(*KINDS), devices)
        ]

    with Device():
        for devices in ((DEVICE, DEVICE), ("cpu", DEVICE)):
            engine = remote(words.url, guides=there(*devices))
            assert [guide.models[0].device for guide in engine.guides] == [
                *map(torch.device, devices)
            ]
            assert [told(own) for own in engine.generate(PROMPTS, SEARCH)] == wanted
