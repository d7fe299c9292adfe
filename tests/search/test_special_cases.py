"""Special cases of the search that must come out exactly."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.support.engines import (
    PROMPTS,
    engine,
    forwarded,
    found,
    make_engine,
)
from tests.support.tiny_models import (
    FAMILIES,
    tiny_model,
    tiny_triple,
)
from w2s_fast import SearchParams


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
