"""What must hold for a search whatever the models are: special cases, limits, and neighbours."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from tests.reference import Reference, ReferenceGuide
from tests.tiny_models import (
    BYTE_VOCABULARY,
    FAMILIES,
    MAX_POSITIONS,
    VOCABULARY,
    byte_tokenizer,
    save_tiny,
    tiny_model,
    tiny_triple,
)
from tests.w2s_fast.test_guide import forwarded
from tests.w2s_fast.test_search_reference import assert_same
from w2s_fast import Engine, Guide, SearchParams, SearchResult
from w2s_fast.errors import (
    InvalidRequest,
    MismatchedVocabulary,
    NumericalError,
    UnsupportedModel,
    W2SFastError,
)

PROMPTS = [[3, 1, 4], [15], [9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3], [2, 7], [18, 2, 8, 1, 8]]


def make_engine(
    base: PreTrainedModel, tuned: PreTrainedModel, untuned: PreTrainedModel, **options: Any
) -> Engine:
    options = {"kv_cache_tokens": 4096, "page_size": 4, "device": "cpu", **options}
    return Engine(base=base, guides=Guide(tuned=tuned, untuned=untuned), **options)


@functools.cache
def engine(
    eos: tuple[int, ...] = (0, 6, 13), dtype: torch.dtype = torch.float64, **options: Any
) -> Engine:
    return make_engine(*tiny_triple(eos=eos, dtype=dtype), **options)


def models_of(e: Engine) -> list[Any]:
    return [e.base, *(model for guide in e.guides for model in guide.models)]


def assert_all_pages_free(e: Engine) -> None:
    for model in models_of(e):
        assert model.pool.free_pages == model.pool.num_pages, model.name
        assert model.pool.free_slots == model.pool.manager.max_slots, model.name
        model.pool.manager.check()


class Floats(list[float]):
    """Equal up to the differences of batched matrix products."""

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Floats):
            return NotImplemented
        return list(self) == pytest.approx(list(other), abs=1e-4)

    __hash__ = None  # type: ignore[assignment]


def found(results: Sequence[SearchResult]) -> list[Any]:
    """What results say, to be compared."""
    return [
        (
            [(h.token_ids, h.finish_reason) for h in r.hypotheses],
            Floats(s for h in r.hypotheses for s in (*h.token_scores, *h.token_logprobs)),
            r.usage,
            r.trace and [(x.kept, [c.token_ids for c in x.candidates]) for x in r.trace.rounds],
        )
        for r in results
    ]


SEARCH = SearchParams(
    beam_width=2, successors=3, chunk_length=3, max_new_tokens=11, n=2, trace=True
)
MIXED = [
    SEARCH,
    SearchParams(method="bon", successors=5, max_new_tokens=9, n=3, seed=4, trace=True),
    SearchParams(method="sample", n=4, max_new_tokens=7, temperature=1.3, top_p=0.8, trace=True),
    SearchParams(beam_width=3, successors=2, chunk_length=1, max_new_tokens=6, top_k=4, trace=True),
    SearchParams(beam_width=1, successors=1, max_new_tokens=20, temperature=0.0, trace=True),
]


# Special cases of the search.


@pytest.mark.parametrize("seed", range(4))
def test_best_of_n_is_a_search_of_width_1_over_whole_responses(seed: int) -> None:
    shared: dict[str, Any] = {"successors": 6, "max_new_tokens": 12, "seed": seed, "trace": True}
    bon = SearchParams(method="bon", **shared)
    cbs = SearchParams(method="cbs", beam_width=1, chunk_length=None, **shared)
    long = replace(cbs, chunk_length=12)
    for prompt in PROMPTS:
        first, second, third = engine().generate([prompt] * 3, [bon, cbs, long])
        assert found([first]) == found([second]) == found([third])
        assert first.score == second.score


def test_best_of_n_returns_its_n_best_in_order() -> None:
    params = SearchParams(method="bon", successors=8, max_new_tokens=10, n=8, trace=True)
    for result in engine().generate(PROMPTS, params):
        scores = [h.score for h in result.hypotheses]
        assert len(scores) == 8
        assert scores == sorted(scores, reverse=True)
        assert result.trace is not None
        (only,) = result.trace.rounds
        assert [only.candidates[i].token_ids for i in only.kept] == [
            h.token_ids for h in result.hypotheses
        ]


@pytest.mark.parametrize("chunk_length", [1, 4, None])
def test_one_beam_with_one_successor_is_plain_sampling_and_runs_no_guide(
    chunk_length: int | None,
) -> None:
    single = SearchParams(
        beam_width=1, successors=1, chunk_length=chunk_length, max_new_tokens=12, seed=5
    )
    sample = SearchParams(method="sample", max_new_tokens=12, seed=5)
    e = engine()
    guide_models = [m.model for m in e.guides[0].models]
    with forwarded(*guide_models) as totals:
        ours = e.generate(PROMPTS, single)
        theirs = e.generate(PROMPTS, sample)
    assert totals == [0, 0]
    assert [r.token_ids for r in ours] == [r.token_ids for r in theirs]
    for result in ours + theirs:
        assert result.score is None
        assert result.hypotheses[0].token_scores == []
        assert result.usage.scored_tokens == 0
        assert len(result.hypotheses[0].token_logprobs) == len(result.token_ids)


def test_samples_come_unordered_and_their_first_is_the_only_one_of_n_1() -> None:
    many = SearchParams(method="sample", n=6, max_new_tokens=12, seed=3)
    one = replace(many, n=1)
    for all_six, first in zip(
        engine().generate(PROMPTS, many), engine().generate(PROMPTS, one), strict=True
    ):
        assert len(all_six.hypotheses) == 6
        assert all_six.token_ids == first.token_ids
        assert len({tuple(h.token_ids) for h in all_six.hypotheses}) > 1


@pytest.mark.parametrize("family", FAMILIES)
def test_temperature_0_writes_what_transformers_greedy_generation_writes(family: str) -> None:
    eos = (0, 6)
    base = tiny_model(family, eos=eos, dtype=torch.float32)
    tuned, untuned = (tiny_model("gpt2", seed=s, dtype=torch.float32) for s in (1, 2))
    e = make_engine(base, tuned, untuned)
    params = [
        SearchParams(method="sample", temperature=0.0, max_new_tokens=20),
        SearchParams(temperature=0, max_new_tokens=20, chunk_length=3, top_p=0.5),
    ]
    for prompt in PROMPTS:
        text = base.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            max_new_tokens=20,
            do_sample=False,
            pad_token_id=0,
        )
        expected = text[0, len(prompt) :].tolist()
        for result in e.generate([prompt] * 2, params):
            assert result.token_ids == expected
            assert result.finish_reason == ("eos" if expected[-1] in eos else "length")


def test_equal_candidates_score_the_same_and_the_lower_index_is_kept() -> None:
    # However the rounding of a batched product may differ from row to row.
    triple = tiny_triple(dtype=torch.float32)
    e = make_engine(*triple)
    params = SearchParams(
        temperature=0.0, beam_width=3, successors=4, chunk_length=2, max_new_tokens=10, trace=True
    )

    def round_anew(_: Any, __: Any, output: torch.Tensor) -> torch.Tensor:
        return output * (1 + 1e-5 * torch.rand_like(output))

    handle = triple.tuned.get_input_embeddings().register_forward_hook(round_anew)
    try:
        results = e.generate(PROMPTS, [replace(params, seed=i) for i in range(5)])
    finally:
        handle.remove()
    for result in results:
        assert result.trace is not None
        for one in result.trace.rounds:
            assert len({c.score for c in one.candidates}) == 1
            assert one.kept == [0, 1, 2]


def test_candidates_that_meet_again_score_the_same() -> None:
    # Two tokens to choose from: different parents soon have equal children.
    e = engine(eos=(), dtype=torch.float32)
    params = SearchParams(
        top_k=2, temperature=2.0, beam_width=4, successors=4, chunk_length=1, max_new_tokens=8,
        trace=True,
    )  # fmt: skip
    equal = 0
    for result in e.generate(PROMPTS * 2, [replace(params, seed=i) for i in range(10)]):
        assert result.trace is not None
        for one in result.trace.rounds:
            scores: dict[tuple[int, ...], float | None] = {}
            for c in one.candidates:
                key = tuple(c.token_ids)
                equal += key in scores
                assert scores.setdefault(key, c.score) == c.score
            ranked = [(-one.candidates[i].score, i) for i in one.kept]  # type: ignore[operator]
            assert ranked == sorted(ranked)
    assert equal > 100


# Randomness.


def test_children_of_one_parent_draw_different_noise() -> None:
    base = tiny_model("llama", peak=0.1, eos=())  # equal chunks by chance: 1 in 20^5
    e = make_engine(base, *tiny_triple()[1:])
    params = SearchParams(
        beam_width=3, successors=4, chunk_length=5, max_new_tokens=20, temperature=1.0, top_k=0,
        trace=True,
    )  # fmt: skip
    for result in e.generate(PROMPTS, params):
        assert result.trace is not None
        for one in result.trace.rounds:
            chunks = [tuple(c.token_ids[-5:]) for c in one.candidates]
            assert len(set(chunks)) == len(chunks) == 12


def test_a_seed_decides_the_tokens_and_another_seed_gives_others() -> None:
    seeds = [0, 1, 2**32, 2**63, 2**64 - 1]
    params = [replace(SEARCH, seed=s) for s in seeds]
    prompt = PROMPTS[2]
    first = engine().generate([prompt] * 5, params)
    again = make_engine(*tiny_triple(eos=(0, 6, 13))).generate([prompt] * 5, params)
    assert found(first) == found(again)
    candidates = [
        tuple(tuple(c.token_ids) for c in r.trace.rounds[0].candidates)
        for r in first
        if r.trace is not None
    ]
    assert len(set(candidates)) == 5


def test_no_global_generator_is_read_or_moved() -> None:
    torch.manual_seed(1)
    first = engine().generate(PROMPTS, SEARCH)
    state = torch.get_rng_state()
    torch.manual_seed(2)
    second = engine().generate(PROMPTS, SEARCH)
    assert found(first) == found(second)
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)


# Requests and their neighbours.


def test_a_request_finds_the_same_alone_among_others_and_in_any_order() -> None:
    e = engine()
    prompts = [p for p in PROMPTS for _ in MIXED]
    params = [replace(m, seed=i) for i, m in enumerate(MIXED * len(PROMPTS))]
    alone = [e.generate([p], [s])[0] for p, s in zip(prompts, params, strict=True)]
    together = e.generate(prompts, params)
    assert found(together) == found(alone)
    backwards = e.generate(prompts[::-1], params[::-1])[::-1]
    assert found(backwards) == found(alone)
    assert_all_pages_free(e)


@pytest.mark.parametrize("max_rows", [1, 7, 1000])
def test_how_many_rows_run_together_changes_no_result(max_rows: int) -> None:
    e = make_engine(*tiny_triple(eos=(0, 6, 13)), max_rows=max_rows)
    assert found(e.generate(PROMPTS, MIXED)) == found(engine().generate(PROMPTS, MIXED))


@pytest.mark.parametrize("page_size", [1, 2, 5, 16, 64])
def test_the_size_of_pages_changes_no_result(page_size: int) -> None:
    e = make_engine(*tiny_triple(eos=(0, 6, 13)), page_size=page_size)
    assert found(e.generate(PROMPTS, MIXED)) == found(engine().generate(PROMPTS, MIXED))
    assert_all_pages_free(e)


@pytest.mark.parametrize("page_size", [1, 4, 16])
def test_requests_wait_where_pages_are_few_and_find_the_same(page_size: int) -> None:
    def with_room_for(tokens: int) -> Engine:
        triple = tiny_triple(eos=(0, 6, 13))
        return make_engine(*triple, page_size=page_size, kv_cache_tokens=tokens)

    # The smallest cache, to the page, in which each request is accepted at all.
    for tokens in range(6 * page_size, 1024, page_size):
        try:
            e = with_room_for(tokens)
        except W2SFastError:
            continue
        results = e.generate(PROMPTS, MIXED, on_error="return")
        if all(r.error is None for r in results):
            break
        assert all("kv_cache_tokens" in str(r.error) for r in results if r.error is not None)
    else:
        pytest.fail("no size was enough")
    assert found(results) == found(engine().generate(PROMPTS, MIXED))
    assert_all_pages_free(e)
    assert tokens <= 40 * 11 // page_size * page_size  # and it is not a wasteful size


def test_a_request_that_can_never_fit_is_refused_and_its_neighbours_run() -> None:
    e = make_engine(*tiny_triple(eos=(0, 6, 13)), kv_cache_tokens=160)
    large = SearchParams(beam_width=4, successors=8, chunk_length=20, max_new_tokens=60)
    small = SearchParams(beam_width=2, successors=2, chunk_length=4, max_new_tokens=8, trace=True)
    results = e.generate([[1, 2], [1, 2], [4]], [small, large, small], on_error="return")
    assert isinstance(results[1].error, InvalidRequest)
    assert "kv_cache_tokens" in str(results[1].error)
    assert found([results[0], results[2]]) == found(engine().generate([[1, 2], [4]], small))
    assert_all_pages_free(e)


def test_results_come_as_they_end_each_once() -> None:
    e = engine()
    params = [replace(SEARCH, max_new_tokens=n) for n in (30, 2, 14, 1, 5)]
    seen = list(e.as_completed(PROMPTS, params))
    assert sorted(index for index, _ in seen) == list(range(5))
    assert [index for index, _ in seen][-1] == 0 or dict(seen)[0].finish_reason == "eos"
    expected = e.generate(PROMPTS, params)
    assert found([dict(seen)[i] for i in range(5)]) == found(expected)


def test_an_iteration_that_is_given_up_gives_its_pages_back() -> None:
    e = make_engine(*tiny_triple(eos=()))
    iteration = e.as_completed(
        PROMPTS, [replace(SEARCH, max_new_tokens=3 + 9 * i) for i in range(5)]
    )
    next(iteration)
    assert e.base.pool.free_pages < e.base.pool.num_pages
    iteration.close()
    assert_all_pages_free(e)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5])
def test_an_iteration_given_up_in_the_middle_of_a_round_gives_its_pages_back(steps: int) -> None:
    # Short requests end while the long one is at some point of its first or a later round.
    e = make_engine(*tiny_triple(eos=()))
    long = replace(SEARCH, chunk_length=20, max_new_tokens=60)
    short = [replace(SEARCH, method="sample", max_new_tokens=7 * i) for i in range(1, 6)]
    iteration = e.as_completed([[1]] * 6, [long, *short])
    for _ in range(steps):
        index, result = next(iteration)
        assert index > 0
        assert result.error is None
    iteration.close()
    assert_all_pages_free(e)
    assert found(e.generate(PROMPTS, MIXED)) == found(engine(eos=()).generate(PROMPTS, MIXED))


def test_prompts_may_be_an_endless_source() -> None:
    def source() -> Any:
        index = 0
        while True:
            yield [index % VOCABULARY, 1]
            index += 1

    iteration = engine().as_completed(source(), replace(SEARCH, max_new_tokens=3))
    seen = {next(iteration)[0] for _ in range(80)}
    iteration.close()
    assert len(seen) == 80
    assert_all_pages_free(engine())


def test_two_iterations_over_one_engine_do_not_disturb_each_other() -> None:
    e = engine()
    first = e.as_completed(PROMPTS, SEARCH)
    second = e.as_completed(PROMPTS[::-1], MIXED)
    a, b = [next(first)], [next(second)]
    a += list(first)
    b += list(second)
    assert found([r for _, r in sorted(a, key=lambda x: x[0])]) == found(
        e.generate(PROMPTS, SEARCH)
    )
    assert found([r for _, r in sorted(b, key=lambda x: x[0])]) == found(
        e.generate(PROMPTS[::-1], MIXED)
    )
    assert_all_pages_free(e)


def test_a_prompt_is_computed_once_and_a_survivor_once_for_all_its_children() -> None:
    triple = tiny_triple(eos=())
    e = make_engine(*triple)
    params = SearchParams(beam_width=2, successors=3, chunk_length=4, max_new_tokens=11, trace=True)
    with forwarded(*triple) as totals:
        results = e.generate(PROMPTS, params)
    expected = 0
    for prompt, result in zip(PROMPTS, results, strict=True):
        assert result.trace is not None
        first, *later = result.trace.rounds
        # A chunk's last token waits for its selection; then only survivors' are run.
        expected += len(prompt) + (4 - 1) * len(first.candidates)
        for one, chunk in zip(later, (4, 3), strict=True):
            expected += params.beam_width + (chunk - 1) * len(one.candidates)
    assert totals[0] == expected
    sampled = sum(r.usage.sampled_tokens for r in results)
    assert totals[1:] == [sampled + sum(len(p) - 1 for p in PROMPTS)] * 2


def test_a_trace_is_recorded_only_where_it_was_asked_for() -> None:
    with_trace, without = engine().generate([[5]] * 2, [SEARCH, replace(SEARCH, trace=False)])
    assert with_trace.trace is not None
    assert without.trace is None
    assert with_trace.hypotheses == without.hypotheses


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64", torch.bfloat16])
def test_models_run_in_the_type_asked_for(dtype: Any, folders: dict[str, Path]) -> None:
    e = Engine(
        base=folders["base"],
        guides=Guide(folders["tuned"], folders["untuned"]),
        device="cpu",
        dtype=dtype,
        kv_cache_tokens=1024,
    )
    expected = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    for model in models_of(e):
        assert model.model.dtype == expected
        assert model.pool.kv.dtype == expected
    prompt = [7, 8, 9]
    (result,) = e.generate([prompt], SearchParams(beam_width=2, successors=2, max_new_tokens=12))
    (again,) = e.score([prompt], [result.token_ids])
    assert result.score == pytest.approx(again, abs=0.5)
    assert len(result.token_ids) <= 12


# EOS, stop tokens and length.


def test_eos_has_a_share_in_the_score_only_where_it_was_sampled() -> None:
    e = engine()
    params = SearchParams(beam_width=3, successors=3, chunk_length=2, max_new_tokens=6, n=3)
    reasons = set()
    for seed in range(6):
        for prompt, result in zip(
            PROMPTS, e.generate(PROMPTS, replace(params, seed=seed)), strict=True
        ):
            for h in result.hypotheses:
                reasons.add(h.finish_reason)
                assert len(h.token_scores) == len(h.token_logprobs) == len(h.token_ids)
                assert h.score == pytest.approx(sum(h.token_scores), abs=1e-6)
                assert h.score == pytest.approx(e.score([prompt], [h.token_ids])[0], abs=1e-4)
                ends = h.token_ids[-1] in (0, 6, 13)
                assert ends == (h.finish_reason == "eos")
                assert not set(h.token_ids[:-1]) & {0, 6, 13}
                if h.finish_reason == "length":
                    assert len(h.token_ids) == 6
                    with_eos = e.score([prompt], [[*h.token_ids, 0]])[0]
                    assert abs(with_eos - h.score) > 1e-3  # an EOS term would have been seen
    assert reasons == {"eos", "length"}


def test_eos_comes_before_a_stop_token_and_either_before_length() -> None:
    always = SearchParams(
        method="sample", n=200, max_new_tokens=1, temperature=9.0, top_k=0, stop_token_ids=(6, 9)
    )
    (result,) = engine().generate([[4]], always)
    for h in result.hypotheses:
        token = h.token_ids[0]
        expected = "eos" if token in (0, 6, 13) else "stop" if token == 9 else "length"
        assert h.finish_reason == expected
    assert {h.finish_reason for h in result.hypotheses} == {"eos", "stop", "length"}
    (ignoring,) = engine().generate([[4]], replace(always, ignore_eos=True))
    for ours, h in zip(ignoring.hypotheses, result.hypotheses, strict=True):
        assert ours.token_ids == h.token_ids
        assert ours.finish_reason == ("stop" if ours.token_ids[0] in (6, 9) else "length")


@pytest.mark.parametrize("chunk_length", [1, 5, 9, 10, 11, None])
def test_a_response_never_grows_beyond_max_new_tokens(chunk_length: int | None) -> None:
    e = engine(eos=())
    params = SearchParams(
        beam_width=2, successors=2, chunk_length=chunk_length, max_new_tokens=10, trace=True
    )
    for result in e.generate(PROMPTS, params):
        assert result.finish_reason == "length"
        assert len(result.token_ids) == 10
        assert result.trace is not None
        length = chunk_length or 10
        assert [len(r.candidates[0].token_ids) for r in result.trace.rounds] == [
            *range(length, 10, length),
            10,
        ]


def test_long_chunks_and_responses_equal_the_reference() -> None:
    # Longer than any number of tokens that is handled at once.
    triple = tiny_triple(eos=(0,), seed=2)
    e = make_engine(*triple)
    reference = Reference(
        triple.base, [ReferenceGuide(*triple[1:])], vocab_size=VOCABULARY, eos_token_ids=[0]
    )
    lengths = set()
    for seed, chunk_length in enumerate((33, 17, None, 40, 16)):
        params = SearchParams(
            beam_width=2, successors=2, chunk_length=chunk_length, max_new_tokens=70, trace=True,
            temperature=0.5, seed=seed,
        )  # fmt: skip
        expected = reference.search([5, 11], params)
        lengths |= {len(c.token_ids) for r in expected.rounds for c in r.candidates}
        assert_same(e.generate([[5, 11]], params)[0], expected)
    assert max(lengths) > 34
    assert min(lengths) < 16


# Numbers that are none.


def broken_copy(model: PreTrainedModel, token: int, value: float) -> PreTrainedModel:
    """A model that breaks on every text with the token in it, and on no other."""
    copied = copy.deepcopy(model)
    assert copied.get_input_embeddings().weight is not copied.get_output_embeddings().weight
    with torch.no_grad():
        copied.get_input_embeddings().weight[token] = value
    return copied


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("which", ["base", "tuned", "untuned"])
def test_nan_in_a_model_fails_the_requests_it_touches_and_no_others(
    which: str, value: float
) -> None:
    token = 7
    triple = tiny_triple(("llama", "llama", "llama"), eos=(0,), dtype=torch.float32)
    good = make_engine(*triple)
    bad = make_engine(*(
        broken_copy(model, token, value) if name == which else model
        for name, model in triple._asdict().items()
    ))  # fmt: skip
    params = SearchParams(beam_width=2, successors=2, chunk_length=2, max_new_tokens=6, trace=True)
    prompts = [[i, 3] for i in range(12)] + [[7, 7, 7], [1, 7, 2], [19]]
    expected = good.generate(prompts, params)
    results = bad.generate(prompts, params, on_error="return")
    failed = clean = 0
    for prompt, result, good_result in zip(prompts, results, expected, strict=True):
        assert good_result.trace is not None
        sampled = {t for r in good_result.trace.rounds for c in r.candidates for t in c.token_ids}
        if token in prompt:
            assert isinstance(result.error, NumericalError)
            assert which in str(result.error)
            assert result.finish_reason == "error"
            assert result.hypotheses == []
            failed += 1
        elif token not in sampled:
            assert found([result]) == found([good_result])
            clean += 1
    assert failed == 3
    assert clean >= 3
    assert_all_pages_free(bad)
    with pytest.raises(NumericalError) as caught:
        bad.generate(prompts, params)
    assert caught.value.results is not None
    assert [r.error is None for r in caught.value.results] == [r.error is None for r in results]
    assert found(bad.generate([[19]], params)) == found([expected[-1]])  # it goes on serving


def newcomer(result: SearchResult, prompt: list[int]) -> int | None:
    """A token of a kept hypothesis that is in no candidate of the first two rounds."""
    assert result.trace is not None
    rounds = result.trace.rounds
    early = {t for r in rounds[:2] for c in r.candidates for t in c.token_ids} | set(prompt)
    late = [t for i in rounds[2].kept for t in rounds[2].candidates[i].token_ids]
    return next((t for t in late if t not in early), None)


@pytest.mark.parametrize("which", ["base", "tuned", "untuned"])
def test_a_model_that_turns_nan_in_mid_search_names_itself_and_harms_no_neighbour(
    which: str,
) -> None:
    triple = tiny_triple(("llama", "llama", "llama"), eos=(), dtype=torch.float32)
    good = make_engine(*triple)
    params = [
        SearchParams(
            beam_width=2, successors=2, chunk_length=1, max_new_tokens=8, seed=i, trace=True
        )
        for i in range(12)
    ]
    prompts = [[2]] * 12
    expected = good.generate(prompts, params)
    token = next(t for r in expected if (t := newcomer(r, [2])) is not None)
    bad = make_engine(*(
        broken_copy(model, token, math.nan) if name == which else model
        for name, model in triple._asdict().items()
    ))  # fmt: skip
    results = bad.generate(prompts, params, on_error="return")
    assert sum(r.error is not None for r in results) >= 1
    for result, good_result in zip(results, expected, strict=True):
        assert good_result.trace is not None
        fed = {
            t for r in good_result.trace.rounds[:-1] for i in r.kept
            for t in r.candidates[i].token_ids
        }  # fmt: skip
        assert (result.error is not None) == (token in fed)
        if result.error is not None:
            assert isinstance(result.error, NumericalError)
            assert which in str(result.error)
            assert any(f"position {i} " in str(result.error) for i in range(1, 8))
        else:
            assert found([result]) == found([good_result])
    assert_all_pages_free(bad)


@pytest.mark.parametrize("weight", [math.nan, math.inf, -math.inf, "1", None])
def test_a_weight_that_is_no_finite_number_is_refused_by_name(weight: Any) -> None:
    base, tuned, untuned = tiny_triple()
    with pytest.raises(InvalidRequest, match="weight"):
        Engine(base, Guide(tuned, untuned, weight=weight), device="cpu", kv_cache_tokens=512)


@pytest.mark.parametrize("call", range(1, 8))
@pytest.mark.parametrize("which", [0, 1, 2], ids=["base", "tuned", "untuned"])
def test_an_exception_out_of_a_model_leaves_no_page_behind(which: int, call: int) -> None:
    triple = tiny_triple(eos=(0, 6, 13))
    e = make_engine(*triple)
    calls = 0

    def fail(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == call:
            raise MemoryError("for the test")

    handle = triple[which].get_input_embeddings().register_forward_hook(fail)
    try:
        with pytest.raises(MemoryError):
            e.generate(PROMPTS, replace(SEARCH, chunk_length=1))
    finally:
        handle.remove()
    assert_all_pages_free(e)
    assert found(e.generate(PROMPTS, MIXED)) == found(engine().generate(PROMPTS, MIXED))


# Vocabularies.


@pytest.mark.parametrize(("base_width", "guide_width"), [(20, 27), (27, 20), (24, 21)])
def test_padded_ids_are_never_sampled_and_never_scored(base_width: int, guide_width: int) -> None:
    shared = min(base_width, guide_width)
    base = copy.deepcopy(tiny_model("llama", vocab_size=base_width, eos=(0,)))
    tuned, untuned = (
        copy.deepcopy(tiny_model("phi3", vocab_size=guide_width, seed=s)) for s in (1, 2)
    )
    for model in (base, tuned, untuned):  # whatever stands there
        model.get_output_embeddings().weight.data[shared:] *= 20
    tuned.get_output_embeddings().weight.data[shared:] = math.nan
    e = make_engine(base, tuned, untuned)
    reference = Reference(
        base, [ReferenceGuide(tuned, untuned)], vocab_size=shared, eos_token_ids=[0]
    )
    params = SearchParams(
        temperature=2.0, top_k=0, beam_width=2, successors=3, chunk_length=4, max_new_tokens=12,
        trace=True,
    )  # fmt: skip
    for prompt in PROMPTS:
        result = e.generate([prompt], params)[0]
        assert_same(result, reference.search(prompt, params))
        assert max(h for h in result.token_ids) < shared
    with pytest.raises(InvalidRequest, match=str(shared)):
        e.generate([[shared]], params)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Base, tuned and untuned models with their tokenizers, as folders; logits are padded."""
    root = tmp_path_factory.mktemp("models")
    return {
        "base": save_tiny(root / "base", "llama", seed=0, vocab_size=270, peak=1.0),
        "tuned": save_tiny(root / "tuned", "gpt2", seed=1, vocab_size=264),
        "untuned": save_tiny(root / "untuned", "gpt2", seed=2, vocab_size=BYTE_VOCABULARY),
    }


@pytest.fixture(scope="module")
def path_engine(folders: dict[str, Path]) -> Engine:
    return Engine(
        base=str(folders["base"]),
        guides=Guide(tuned=str(folders["tuned"]), untuned=folders["untuned"]),
        device="cpu",
        kv_cache_tokens=4096,
    )


def test_ids_that_the_tokenizer_does_not_know_are_never_sampled(path_engine: Engine) -> None:
    params = SearchParams(
        method="sample", n=60, max_new_tokens=40, temperature=5.0, top_k=0, ignore_eos=True
    )
    (result,) = path_engine.generate(["a"], params)
    sampled = {t for h in result.hypotheses for t in h.token_ids}
    assert max(sampled) == BYTE_VOCABULARY - 1
    assert len(sampled) > 250


def with_swapped_tokens() -> Any:
    tokenizer = byte_tokenizer()
    text = tokenizer.backend_tokenizer.to_str()
    from tokenizers import Tokenizer

    changed = text.replace('"a":', '"\u0000":').replace('"b":', '"a":').replace('"\u0000":', '"b":')
    assert changed != text
    tokenizer._tokenizer = Tokenizer.from_str(changed)
    return tokenizer


@pytest.mark.parametrize("which", ["tuned", "untuned"])
@pytest.mark.parametrize("kind", ["two tokens swapped", "other special tokens", "too few logits"])
def test_a_guide_with_another_vocabulary_is_refused_by_name(
    which: str, kind: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    if kind == "two tokens swapped":
        wrong = save_tiny(tmp_path / "w", "gpt2", tokenizer=with_swapped_tokens())
    elif kind == "other special tokens":
        wrong = save_tiny(tmp_path / "w", "gpt2", tokenizer=byte_tokenizer(bos=None))
    else:
        wrong = save_tiny(tmp_path / "w", "gpt2", vocab_size=200, eos=(0,), bos=1)
    guides = {"tuned": folders["tuned"], "untuned": folders["untuned"], which: wrong}
    with pytest.raises(MismatchedVocabulary) as caught:
        Engine(base=str(folders["base"]), guides=Guide(**guides), device="cpu", kv_cache_tokens=512)
    assert str(caught.value).startswith(which)


# Text.


def test_text_is_the_response_without_prompt_and_special_tokens(path_engine: Engine) -> None:
    tokenizer = path_engine.tokenizer
    assert tokenizer is not None
    params = SearchParams(
        method="sample", n=30, max_new_tokens=30, temperature=1.5, stop_token_ids=(40,)
    )
    (result,) = path_engine.generate(["Once upon"], params)
    assert {h.finish_reason for h in result.hypotheses} >= {"stop", "length"}
    for h in result.hypotheses:
        shown = h.token_ids if h.finish_reason == "length" else h.token_ids[:-1]
        assert h.text == tokenizer.decode(shown, skip_special_tokens=True)
        assert h.text is not None
        assert "<eos>" not in h.text
    assert result.text == result.hypotheses[0].text


def test_a_text_its_token_ids_and_its_bos_are_one_prompt(path_engine: Engine) -> None:
    tokenizer = path_engine.tokenizer
    assert tokenizer is not None
    ids = tokenizer("The film {begins} %s")["input_ids"]
    assert ids.count(256) == 1
    params = SearchParams(beam_width=2, successors=2, max_new_tokens=8)
    by_text, by_ids = path_engine.generate(["The film {begins} %s", ids], params)
    assert found([by_text]) == found([by_ids])
    assert by_text.usage.prompt_tokens == len(ids) == 21


def test_what_a_user_writes_is_never_a_special_token(path_engine: Engine) -> None:
    params = SearchParams(method="sample", max_new_tokens=1)
    (result,) = path_engine.generate(["a<eos>b<bos>"], params)
    assert result.usage.prompt_tokens == 1 + len("a<eos>b<bos>")


def test_a_single_string_is_one_prompt(path_engine: Engine) -> None:
    params = SearchParams(method="sample", max_new_tokens=3)
    results = path_engine.generate("abc", params)
    assert len(results) == 1
    assert found(results) == found(path_engine.generate(["abc"], params))


def test_given_texts_are_scored_behind_their_prompts(path_engine: Engine) -> None:
    (by_text,) = path_engine.score(["The film"], [" was good"])
    tokenizer = path_engine.tokenizer
    assert tokenizer is not None
    ids = tokenizer("The film was good")["input_ids"]
    (by_ids,) = path_engine.score([ids[:9]], [ids[9:]])
    assert by_text == pytest.approx(by_ids, abs=1e-5)


TEMPLATE = "Q: {prompt} <eos>\nA:"


def test_each_model_has_a_prompt_of_its_own(folders: dict[str, Path]) -> None:
    e = Engine(
        base=folders["base"],
        guides=Guide(folders["tuned"], folders["untuned"], prompt_template=TEMPLATE),
        device="cpu",
        kv_cache_tokens=4096,
    )
    assert e.tokenizer is not None
    for text in ("Hi {there}", "a<eos>b", "%s {0} {prompt}"):
        # Template text may hold special tokens and brings no BOS; a user's text never does.
        middle = [e.tokenizer.convert_tokens_to_ids(c.replace(" ", "\u0120")) for c in text]
        head = [e.tokenizer.convert_tokens_to_ids(c) for c in "Q:\u0120"]
        tail = [e.tokenizer.convert_tokens_to_ids(c) for c in ("\u0120", "<eos>", *"\u010aA:")]
        guide_prompt = head + middle + tail
        reference = Reference(
            e.base.model,
            [ReferenceGuide(*(m.model for m in e.guides[0].models))],
            vocab_size=BYTE_VOCABULARY,
            eos_token_ids=[257],
        )
        for model in models_of(e):
            model.model.set_attn_implementation("eager")
        params = SearchParams(beam_width=2, successors=2, max_new_tokens=10)
        expected = reference.search([256, *middle], params, [guide_prompt])
        (result,) = e.generate([text], params)
        assert result.token_ids == expected.hypotheses[0].token_ids
        assert result.score == pytest.approx(expected.hypotheses[0].score, abs=1e-3)


CHAT = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def test_chat_messages_go_through_the_chat_template_as_data(folders: dict[str, Path]) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT
    e = Engine(base=folders["base"], tokenizer=tokenizer, device="cpu", kv_cache_tokens=1024)
    params = SearchParams(method="sample", max_new_tokens=5)
    messages = [{"role": "system", "content": "Be {brief}"}, {"role": "user", "content": "Hi"}]
    plain = tokenizer("[system]Be {brief}")["input_ids"][1:]
    hi = tokenizer("[user]Hi")["input_ids"][1:]
    start = tokenizer("[assistant]")["input_ids"][1:]
    by_chat, by_ids = e.generate([messages, [256, *plain, 257, *hi, 257, *start]], params)
    assert found([by_chat]) == found([by_ids])
    assert by_chat.usage.prompt_tokens == by_ids.usage.prompt_tokens
    sly = [{"role": "user", "content": "a<eos>[user]{{ x }}<bos>"}]
    typed = tokenizer("[user]a<eos>[user]{{ x }}<bos>", split_special_tokens=True)["input_ids"]
    by_chat, by_ids = e.generate([sly, [*typed, 257, *start]], params)
    assert found([by_chat]) == found([by_ids])


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user"}],
        [{"content": "a"}],
        [{"role": "user", "content": 5}],
        [{"role": "user", "content": "a"}, "b"],
        [{"role": "user", "content": "a"}, 5],
    ],
    ids=str,
)
def test_messages_of_another_shape_are_refused(folders: dict[str, Path], messages: Any) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT
    e = Engine(base=folders["base"], tokenizer=tokenizer, device="cpu", kv_cache_tokens=1024)
    with pytest.raises(InvalidRequest):
        e.generate([messages], SearchParams(method="sample"))


@pytest.mark.parametrize("text", ["\ud800", "a\udfffb", "\x00", "\U0001f600" * 3, "\ufeff \r\n"])
def test_any_string_is_a_prompt_or_is_refused_and_harms_no_neighbour(
    path_engine: Engine, text: str
) -> None:
    params = SearchParams(method="sample", max_new_tokens=4)
    first, odd, last = path_engine.generate(["ab", text, "cd"], params, on_error="return")
    assert odd.error is None or isinstance(odd.error, InvalidRequest)
    assert found([first, last]) == found(path_engine.generate(["ab", "cd"], params))


# Prompts that are none.


def test_an_empty_prompt_starts_from_bos() -> None:
    empty, bos = engine().generate([[], [1]], SEARCH)
    assert found([empty]) == found([bos])
    assert empty.usage.prompt_tokens == 1


@pytest.mark.parametrize("which", ["base", "tuned"])
def test_an_empty_prompt_of_a_model_without_bos_is_refused(which: str) -> None:
    triple = [
        tiny_model(f, seed=s, bos=None if name == which else 1)
        for s, (name, f) in enumerate([("base", "llama"), ("tuned", "gpt2"), ("untuned", "gpt2")])
    ]
    e = make_engine(*triple)
    with pytest.raises(InvalidRequest, match=rf"{which}.*BOS"):
        e.generate([[]], SEARCH)
    assert e.generate([[2]], SEARCH)[0].error is None


BAD_PROMPTS: dict[str, tuple[Any, str]] = {
    "id beyond the vocabulary": ([1, VOCABULARY], "20"),
    "negative id": ([1, -1], "-1"),
    "a float": ([1, 2.0], "2.0"),
    "a bool": ([True], "True"),
    "nothing": (None, "NoneType"),
    "a number": (5, "int"),
    "bytes": (b"abc", "bytes"),
    "text without a tokenizer": ("abc", "tokenizer"),
    "messages without a tokenizer": ([{"role": "user", "content": "a"}], "tokenizer"),
    "too long": ([1] * MAX_POSITIONS, str(MAX_POSITIONS)),
    "too long with its response": ([1] * (MAX_POSITIONS - 10), str(MAX_POSITIONS)),
}


@pytest.mark.parametrize("name", BAD_PROMPTS)
def test_a_bad_prompt_is_refused_with_the_reason_and_harms_no_neighbour(name: str) -> None:
    prompt, reason = BAD_PROMPTS[name]
    e = engine()
    with pytest.raises(InvalidRequest, match=reason) as caught:
        e.generate([[1, 2], prompt, [3]], SEARCH)
    assert caught.value.results is not None
    first, bad, last = caught.value.results
    assert bad.error is caught.value
    assert bad.finish_reason == "error"
    assert found([first, last]) == found(e.generate([[1, 2], [3]], SEARCH))
    assert_all_pages_free(e)


def test_a_prompt_as_long_as_fits_is_served_to_its_end() -> None:
    e = engine(eos=(), page_size=16)
    prompt = [i % VOCABULARY for i in range(MAX_POSITIONS - SEARCH.max_new_tokens)]
    (result,) = e.generate([prompt], SEARCH)
    assert len(result.token_ids) == SEARCH.max_new_tokens


@pytest.mark.parametrize(
    ("params", "reason"),
    [
        ([SEARCH], "params"),
        ([SEARCH] * 3, "params"),
        ({"beam_width": 2}, "params"),
        ([SEARCH, None], "params"),
        (SearchParams(stop_token_ids=[VOCABULARY]), "stop_token_ids"),
    ],
    ids=["too few", "too many", "a dict", "a hole", "a stop token beyond the vocabulary"],
)
def test_params_that_do_not_fit_the_prompts_are_refused(params: Any, reason: str) -> None:
    with pytest.raises(InvalidRequest, match=reason):
        engine().generate([[1], [2]], params)
    assert_all_pages_free(engine())


@pytest.mark.parametrize(
    "values",
    [
        {"top_k": 2**62},
        {"top_k": 2**63},
        {"top_k": 10**30},
        {"temperature": 1e39},
        {"temperature": 1e-50},
        {"temperature": 10**400},
        {"min_p": 1e-320},
        {"top_p": 5e-324},
        {"beam_width": 10**12},
        {"successors": 10**12},
        {"max_new_tokens": 10**30},
        {"chunk_length": 10**30},
        {"method": "sample", "n": 10**9},
        {"stop_token_ids": [10**30]},
    ],
    ids=str,
)
def test_values_beyond_all_measure_are_served_or_refused_and_harm_no_neighbour(
    values: dict[str, Any],
) -> None:
    try:
        params = SearchParams(**{"max_new_tokens": 4, **values})
    except InvalidRequest:
        return
    small = replace(SEARCH, max_new_tokens=4)
    results = engine().generate([[1], [2], [3]], [small, params, small], on_error="return")
    assert results[1].error is None or isinstance(results[1].error, InvalidRequest)
    assert found([results[0], results[2]]) == found(engine().generate([[1], [3]], small))
    assert_all_pages_free(engine())


def test_a_search_needs_guides_and_a_sample_does_not() -> None:
    e = Engine(base=tiny_model("llama"), device="cpu", kv_cache_tokens=1024)
    for params in (SearchParams(), SearchParams(method="bon")):
        with pytest.raises(InvalidRequest, match="guide"):
            e.generate([[1]], params)
    with pytest.raises(InvalidRequest, match="guide"):
        e.score([[1]], [[2]])
    single = SearchParams(beam_width=1, successors=1, max_new_tokens=4)
    for params in (SearchParams(method="sample", n=2, max_new_tokens=4), single):
        assert e.generate([[1]], params)[0].score is None


def test_no_prompts_give_no_results() -> None:
    assert engine().generate([], SEARCH) == []
    assert engine().generate([], []) == []


@pytest.mark.parametrize("name", ["page_size", "max_rows", "kv_cache_tokens"])
@pytest.mark.parametrize("value", [0, -1, 1.5, "4", True])
def test_a_bad_size_of_the_engine_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequest, match=name):
        Engine(base=tiny_model("llama"), device="cpu", **{name: value})


@pytest.mark.parametrize("source", ["/no/such/folder", "", "./nowhere"])
def test_a_model_that_is_not_there_is_refused_by_name(source: str) -> None:
    with pytest.raises(UnsupportedModel, match=source or "empty"):
        Engine(base=source, device="cpu", kv_cache_tokens=256)


@pytest.mark.parametrize("tokens", [1, 3, 8, 20, 30])
@pytest.mark.parametrize("page_size", [1, 16])
def test_a_cache_too_small_for_anything_is_refused_by_name_or_serves_what_fits(
    tokens: int, page_size: int
) -> None:
    single = SearchParams(method="sample", max_new_tokens=1)
    message, results = None, []
    try:
        e = Engine(
            base=tiny_model("llama"), device="cpu", kv_cache_tokens=tokens, page_size=page_size
        )
        results = e.generate([[1]], single)
    except W2SFastError as error:
        message = str(error)
    if message is None:
        assert found(results) == found(engine().generate([[1]], single))
    else:
        assert "kv_cache_tokens" in message
