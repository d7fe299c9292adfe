"""Scorers of the caller's run beside the steps, fail alone, and may be slow, left or closed."""

from __future__ import annotations

import asyncio
import math
import runpy
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

import w2s_fast.demo
from tests.support.async_tasks import run, until
from tests.support.cohorts import in_cohorts
from tests.support.engines import (
    LONG,
    PROMPTS,
    SEARCH,
    assert_all_pages_free,
    found,
    make_engine,
    quiet,
)
from tests.support.tiny_models import byte_tokenizer, save_tiny, tiny_triple
from w2s_fast import AsyncEngine, Engine, Guide, ScoredCandidate, SearchParams
from w2s_fast.demo import DemoModels
from w2s_fast.errors import Aborted, InvalidRequest, ScorerFailure
from w2s_fast.scheduling import Judge, Runner

PATIENCE = 60  # seconds; only a test that fails needs them
SAMPLE = SearchParams(method="sample", n=2, max_new_tokens=60, ignore_eos=True, trace=True)
ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "reward_model.py"
PAGE = ROOT / "docs" / "scorers.md"


def length_and_last(candidates: Sequence[ScoredCandidate]) -> list[float]:
    return [0.3 * c.token_ids[-1] + 0.01 * sum(c.token_ids) for c in candidates]


def scored(scorer: Any, **options: Any) -> Engine:
    return make_engine(*tiny_triple(eos=()), scorers=[scorer], prefix_cache=False, **options)


class Held:
    """A scorer that waits until it may go on, in its first call or for one prompt."""

    def __init__(self) -> None:
        self.entered, self.released = threading.Event(), threading.Event()
        self.calls: list[list[Any]] = []

    def __call__(self, candidates: Sequence[ScoredCandidate]) -> list[float]:
        self.calls.append([candidate.prompt for candidate in candidates])
        self.entered.set()
        assert self.released.wait(PATIENCE)
        return length_and_last(candidates)


def expected(prompts: Sequence[Any], params: Any) -> list[Any]:
    """What these find where the scorer is quick, each alone."""
    e = scored(length_and_last)
    every = [params] * len(prompts) if isinstance(params, SearchParams) else params
    return found([e.generate([p], own)[0] for p, own in zip(prompts, every, strict=True)])


def test_a_slow_scorer_stops_nobody_elses_chunks() -> None:
    scorer = Held()
    e = scored(scorer)
    results = {}
    for index, result in e.as_completed(PROMPTS[:3], [SEARCH, SAMPLE, SEARCH]):
        results[index] = result
        if index == 1:
            # Rounds of the others are with the scorer, and this one is through with all of its own.
            assert scorer.entered.is_set() and not scorer.released.is_set()
            scorer.released.set()
    assert next(iter(results)) == 1
    assert found([results[i] for i in range(3)]) == expected(PROMPTS[:3], [SEARCH, SAMPLE, SEARCH])
    assert_all_pages_free(e)


def test_rounds_that_end_together_are_scored_in_one_call() -> None:
    scorer = Held()
    scorer.released.set()
    e = scored(scorer)
    results = e.generate(PROMPTS[:3], SEARCH)
    assert [len(call) for call in scorer.calls] == [18] * 4
    assert [*map(tuple, scorer.calls[0])] == [tuple(p) for p in PROMPTS[:3] for _ in range(6)]
    assert found(results) == expected(PROMPTS[:3], SEARCH)


@pytest.mark.parametrize("page_size", [4, 16])
def test_scorers_and_cohorts_and_tight_memory_change_nothing(page_size: int) -> None:
    e = scored(length_and_last, page_size=page_size, kv_cache_tokens=480)
    e.runner = Runner(e._search, e._scheduler, Judge(e.runner._judge._scorers), cohorts=2)
    e._search._ahead = True
    kinds: list[Any] = ["top", "resample"]
    params = [replace(SEARCH, seed=i, selection=kinds[i % 2]) for i in range(5)]
    assert found(e.generate(PROMPTS, params)) == expected(PROMPTS, params)
    assert_all_pages_free(e)
    assert in_cohorts(e).generate(PROMPTS[:1], SAMPLE)


def only_for(prompt: Any, fail: Callable[[int], list[float]]) -> Any:
    """A scorer that fails where candidates of this prompt are among those it is given."""

    def scorer(candidates: Sequence[ScoredCandidate]) -> list[float]:
        if any(candidate.prompt == prompt for candidate in candidates):
            return fail(len(candidates))
        return length_and_last(candidates)

    return scorer


def raises(count: int) -> list[float]:
    raise KeyError("no such thing")


@pytest.mark.parametrize(
    ("fail", "told", "cause"),
    [
        (raises, "KeyError: 'no such thing'", KeyError),
        (lambda count: [0.0] * (count - 1), "values for 6 candidates", None),
        (lambda count: [0.0] * (count + 1), "gave 7 values", None),
        (lambda count: ["much"] * count, "could not convert", ValueError),
        (lambda count: None, "NoneType", TypeError),
    ],
    ids=["raises", "few", "many", "words", "none"],
)
def test_what_fails_for_one_request_is_its_own_error(
    fail: Any, told: str, cause: type[Exception] | None
) -> None:
    e = scored(only_for(PROMPTS[1], fail))
    results = e.generate(PROMPTS[:3], SEARCH, on_error="return")
    error = results[1].error
    assert isinstance(error, ScorerFailure) and told in str(error)
    assert cause is None or isinstance(error.__cause__, cause)
    assert found([results[0], results[2]]) == expected([PROMPTS[0], PROMPTS[2]], SEARCH)
    assert e.stats().failed == 1
    assert_all_pages_free(e)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_no_number_is_named(bad: float) -> None:
    def scorer(candidates: Sequence[ScoredCandidate]) -> list[float]:
        values = length_and_last(candidates)
        where = [i for i, c in enumerate(candidates) if c.prompt == PROMPTS[1]]
        if where:
            values[where[2]] = bad
        return values

    e = scored((scorer, -1.0))
    results = e.generate(PROMPTS[:3], SEARCH, on_error="return")
    assert [r.error is None for r in results] == [True, False, True]
    with pytest.raises(ScorerFailure, match=f"candidate 2 of round 1 is {-bad}"):
        raise results[1].error or AssertionError
    assert_all_pages_free(e)


def test_a_scorer_that_wants_to_end_its_thread_ends_only_the_requests() -> None:
    def leaves(candidates: Sequence[ScoredCandidate]) -> list[float]:
        raise SystemExit("enough")

    with pytest.raises(ScorerFailure, match="SystemExit"):
        scored(leaves).generate(PROMPTS[:2], SEARCH)


def test_an_interrupt_while_all_wait_for_the_scorer_leaves_nothing_behind() -> None:
    """Ctrl-C reaches whoever waits, and the engine serves on."""
    first = threading.Event()

    def scorer(candidates: Sequence[ScoredCandidate]) -> list[float]:
        if not first.is_set():
            first.set()
            signal.raise_signal(signal.SIGINT)
        return length_and_last(candidates)

    e = scored(scorer)
    with pytest.raises(KeyboardInterrupt):
        e.generate(PROMPTS[:2], SEARCH)
    assert quiet(e)
    assert_all_pages_free(e)
    assert found(e.generate(PROMPTS[:2], SEARCH)) == expected(PROMPTS[:2], SEARCH)


@contextmanager
def interrupted_once(owner: type, name: str, before: bool) -> Iterator[None]:
    own, hits = getattr(owner, name), []

    def interrupted(self: Any, *args: Any) -> Any:
        result = own(self, *args) if not before or hits else None
        if not hits:
            hits.append(1)
            raise KeyboardInterrupt
        return result

    with mock.patch.object(owner, name, interrupted):
        yield
    assert hits


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("name", ["hand_over", "close"])
def test_an_interrupt_around_a_decision_harms_nobody_who_waits_elsewhere(
    name: str, before: bool
) -> None:
    from w2s_fast.search import Search

    e = scored(length_and_last)
    other = e.make_request(PROMPTS[1], SEARCH)
    e.runner.submit(other)
    with (
        interrupted_once(Judge if name == "hand_over" else Search, name, before),
        pytest.raises(KeyboardInterrupt),
    ):
        e.generate(PROMPTS[:1], SEARCH)
    while not other.ended:
        e.runner.advance([other])
    # Who was in the middle of being closed ends, and says so; who was not finds what it would have.
    result = e.result(other)
    if name == "hand_over":
        assert found([result]) == expected([PROMPTS[1]], SEARCH)
    else:
        assert result.error is not None
    assert quiet(e)
    assert_all_pages_free(e)


def test_changed_weights_begin_the_round_again() -> None:
    calls = []

    def scorer(candidates: Sequence[ScoredCandidate]) -> list[float]:
        calls.append(len(candidates))
        if len(calls) == 2:
            e.weights_changed()
        return length_and_last(candidates)

    e = scored(scorer)
    results = e.generate(PROMPTS[:1], SEARCH)
    assert found(results)[0][0] == expected(PROMPTS[:1], SEARCH)[0][0]
    assert len(calls) == 5  # one of them for a round that was drawn anew
    assert_all_pages_free(e)


def test_who_is_with_the_scorer_can_be_given_up_at_once() -> None:
    scorer = Held()
    e = scored(scorer)

    async def main() -> None:
        async with AsyncEngine(e) as a:
            task = asyncio.create_task(a.generate(PROMPTS[0], SEARCH))
            await until(lambda: scorer.entered.is_set())
            task.cancel()
            await asyncio.wait([task])
            await until(lambda: quiet(e))
            assert_all_pages_free(e)
            # And whoever comes then is not kept waiting.
            result = await a.generate(PROMPTS[1], SAMPLE)
            assert found([result]) == expected([PROMPTS[1]], SAMPLE)
            scorer.released.set()
            result = await a.generate(PROMPTS[1], SEARCH)
            assert found([result]) == expected([PROMPTS[1]], SEARCH)

    run(main())
    assert_all_pages_free(e)


def test_closing_waits_for_no_scorer() -> None:
    scorer = Held()
    e = scored(scorer)

    async def main() -> None:
        a = AsyncEngine(e)
        task = asyncio.create_task(a.generate(PROMPTS[0], SEARCH))
        await until(lambda: scorer.entered.is_set())
        await a.close()
        assert not scorer.released.is_set()
        with pytest.raises(Aborted):
            await task

    run(main())
    assert_all_pages_free(e)
    scorer.released.set()
    assert found(e.generate(PROMPTS[:1], SEARCH)) == expected(PROMPTS[:1], SEARCH)


def test_many_callers_share_the_scorers() -> None:
    e = scored(length_and_last, max_rows=16)
    params = [replace(SEARCH, seed=i) for i in range(5)]

    async def main() -> list[Any]:
        async with AsyncEngine(e) as a:
            return await asyncio.gather(*(a.generate(p, q) for p, q in zip(PROMPTS, params)))

    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.extend(e.generate(PROMPTS, params)))
    thread.start()
    assert found(run(main())) == expected(PROMPTS, params)
    thread.join(PATIENCE)
    assert found(results) == expected(PROMPTS, params)
    assert_all_pages_free(e)


def test_a_stream_gives_out_what_is_certain_and_the_same_result() -> None:
    e = scored(length_and_last)
    *pieces, last = e.stream(PROMPTS[0], LONG)
    assert last.result is not None
    assert found([last.result]) == expected([PROMPTS[0]], LONG)
    tokens = [token for piece in (*pieces, last) for token in piece.token_ids]
    assert tokens == last.result.token_ids


def test_given_texts_find_room_while_others_are_with_the_scorer() -> None:
    """`score` wants the pages of a request that cannot be set aside before it is decided."""
    scorer = Held()
    e = scored(scorer, kv_cache_tokens=160)
    scores: list[float] = []
    results: list[Any] = []
    runs = threading.Thread(target=lambda: results.extend(e.generate(PROMPTS[:1], SEARCH)))
    runs.start()
    assert scorer.entered.wait(PATIENCE)
    text = [t % 17 + 1 for t in range(100)]
    scores_it = threading.Thread(target=lambda: scores.extend(e.score([[1, 2]], [text])))
    scores_it.start()
    scorer.released.set()
    for thread in (runs, scores_it):
        thread.join(PATIENCE)
        assert not thread.is_alive()
    assert found(results) == expected(PROMPTS[:1], SEARCH)
    alone = make_engine(*tiny_triple(eos=()))
    assert scores == pytest.approx(alone.score([[1, 2]], [text]), abs=1e-6)
    assert_all_pages_free(e)


def test_scorers_may_stand_in_for_guides() -> None:
    base = tiny_triple(eos=()).base
    e = Engine(base, scorers=[length_and_last], device="cpu", kv_cache_tokens=999)
    for params in (SEARCH, SearchParams(method="bon", successors=5, n=2, max_new_tokens=6)):
        (result,) = e.generate(PROMPTS[:1], params)
        assert result.usage.scored_tokens == 0
        for hypothesis in result.hypotheses:
            seen = ScoredCandidate(PROMPTS[0], None, hypothesis.token_ids, True)
            assert hypothesis.score == pytest.approx(length_and_last([seen])[0])
            assert hypothesis.token_scores == []
    with pytest.raises(InvalidRequest, match="needs guides"):
        e.generate(PROMPTS[:1], SearchParams(method="fusion"))


@pytest.mark.parametrize(
    "bad", [5, (length_and_last,), (length_and_last, "1"), (length_and_last, float("nan"))]
)
def test_what_is_no_scorer_is_refused(bad: Any) -> None:
    with pytest.raises(InvalidRequest, match="scorer is"):
        scored(bad)


def test_scorers_are_a_sequence() -> None:
    with pytest.raises(InvalidRequest, match="scorers is"):
        make_engine(*tiny_triple(), scorers=length_and_last)


@pytest.fixture
def models(tmp_path: Path) -> DemoModels:
    names = ("base", "tuned", "untuned")
    return DemoModels(*(save_tiny(tmp_path / name, seed=i) for i, name in enumerate(names)))


def test_a_scorer_reads_prompt_and_text(models: DemoModels) -> None:
    seen: list[ScoredCandidate] = []

    def letters(candidates: Sequence[ScoredCandidate]) -> list[int]:
        seen.extend(candidates)
        return [(c.text or "").count("e") for c in candidates]

    e = Engine(
        models.base,
        Guide(models.tuned, models.untuned),
        scorers=[(letters, 1000.0)],
        device="cpu",
        kv_cache_tokens=4096,
    )
    params = SearchParams(method="bon", successors=8, n=8, max_new_tokens=12, temperature=2.0)
    (result,) = e.generate(["The film"], params)
    counts = [(h.text or "").count("e") for h in result.hypotheses]
    assert counts == sorted(counts, reverse=True)
    assert {c.prompt for c in seen} == {"The film"}
    assert sorted(h.text or "" for h in result.hypotheses) == sorted(c.text or "" for c in seen)


def test_the_example_of_the_page_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = (block.split("```")[0] for block in PAGE.read_text().split("```python\n")[1:])
    exec(compile(example, str(PAGE), "exec"), {})
    score, text = capsys.readouterr().out.split(" ", 1)
    assert math.isfinite(float(score)) and text.strip()


def test_a_sequence_classifier_is_a_reward_model(
    models: DemoModels,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The example: it is short, it runs, and says what the classifier says of each text."""
    assert len(EXAMPLE.read_text().splitlines()) < 30
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=258, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=24, max_position_embeddings=128, num_labels=2,
    )  # fmt: skip
    classifier = BertForSequenceClassification(config).eval()
    classifier.save_pretrained(tmp_path / "reward")
    tokenizer = byte_tokenizer(bos=None)
    tokenizer.pad_token = "<eos>"
    tokenizer.save_pretrained(tmp_path / "reward")
    monkeypatch.setattr(w2s_fast.demo, "demo_model_paths", lambda: models)
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), str(tmp_path / "reward")])
    reward = runpy.run_path(str(EXAMPLE), run_name="__main__")["Reward"](tmp_path / "reward")
    assert capsys.readouterr().out.strip()
    e = Engine(
        models.base, Guide(models.tuned, models.untuned), scorers=[(reward, 2.0)],
        device="cpu", kv_cache_tokens=4096,
    )  # fmt: skip
    (result,) = e.generate(["The film"], SearchParams(beam_width=2, successors=2, n=2))
    for hypothesis in result.hypotheses:
        ids = tokenizer("The film" + (hypothesis.text or ""), return_tensors="pt")
        with torch.inference_mode():
            value = float(classifier(**ids).logits[0, -1])
        assert hypothesis.score == pytest.approx(sum(hypothesis.token_scores) + 2 * value, abs=1e-3)
