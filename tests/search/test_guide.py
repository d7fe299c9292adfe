"""A guide's log-ratios do not depend on the chunks they were computed in, and cost no more."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.support.engines import forwarded
from tests.support.reference import ReferenceGuide, forward, log_softmax
from tests.support.tiny_models import FAMILIES, VOCABULARY, tiny_model
from w2s_fast import Engine, Guide, SearchParams
from w2s_fast.errors import OutOfPages
from w2s_fast.models.model import PagedModel
from w2s_fast.search.guide import PagedGuide


def make(
    family: str, vocab_size: int = VOCABULARY, dtype: torch.dtype = torch.float32
) -> tuple[PagedGuide, ReferenceGuide]:
    tuned, untuned = (tiny_model(family, seed=seed, dtype=dtype) for seed in (1, 2))
    models = [PagedModel(m, kv_cache_tokens=1024, page_size=4) for m in (tuned, untuned)]
    return PagedGuide(*models, 1.0, vocab_size), ReferenceGuide(tuned, untuned)


def recomputed(
    guide: ReferenceGuide, prompt: list[int], response: list[int], vocab_size: int = VOCABULARY
) -> np.ndarray:
    """Log-ratio of each response token, from whole forwards."""
    rows = range(len(prompt) - 1, len(prompt) + len(response) - 1)
    tuned, untuned = (
        forward(m, prompt + response, vocab_size) for m in (guide.tuned, guide.untuned)
    )
    return np.array(
        [
            log_softmax(tuned[row])[token] - log_softmax(untuned[row])[token]
            for row, token in zip(rows, response, strict=True)
        ]
    )


def random_tokens(n: int, seed: int, below: int = VOCABULARY) -> list[int]:
    return np.random.default_rng(seed).integers(0, below, n).tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_log_ratios_over_several_chunks_equal_a_full_recomputation(family: str) -> None:
    guide, reference = make(family)
    prompts = [random_tokens(n, n) for n in (1, 6, 11)]
    responses = [random_tokens(12, 20 + i) for i in range(3)]
    slots = guide.prefill([prompts] * 2)
    cuts = [[0, 1, 5, 12], [0, 4, 5, 12], [0, 7, 11, 12]]
    ratios: list[list[float]] = [[], [], []]
    for step in range(3):
        chunks = [r[c[step] : c[step + 1]] for r, c in zip(responses, cuts, strict=True)]
        before = [(p + r[: c[step]])[-1] for p, r, c in zip(prompts, responses, cuts, strict=True)]
        tuned, untuned = guide.append(slots, [before] * 2, chunks)
        pieces = (tuned - untuned).split([len(c) for c in chunks])
        for own, piece in zip(ratios, pieces, strict=True):
            own += piece.tolist()
    for own, prompt, response in zip(ratios, prompts, responses, strict=True):
        np.testing.assert_allclose(own, recomputed(reference, prompt, response), atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_forked_sequences_are_scored_from_their_common_history(family: str) -> None:
    guide, reference = make(family)
    prompt, first = random_tokens(5, 0), random_tokens(3, 1)
    slots = guide.prefill([[prompt]] * 2)
    guide.append(slots, [prompt[-1:]] * 2, [first])
    children = np.stack([m.pool.fork(own, [3]) for m, own in zip(guide.models, slots)])
    guide.release(slots)
    chunks = [random_tokens(n, 9 + n) for n in (4, 1, 6)]
    tuned, untuned = guide.append(children, [[first[-1]] * 3] * 2, chunks)
    for own, chunk in zip((tuned - untuned).split([4, 1, 6]), chunks, strict=True):
        expected = recomputed(reference, prompt, first + chunk)[len(first) :]
        np.testing.assert_allclose(own.numpy(), expected, atol=1e-4)
    guide.release(children)
    assert all(m.pool.free_pages == m.pool.num_pages for m in guide.models)


def test_a_chunk_of_n_tokens_forwards_exactly_n_tokens_a_row() -> None:
    guide, reference = make("llama")
    models = (reference.tuned, reference.untuned)
    with forwarded(*models) as totals:
        slots = guide.prefill([[random_tokens(7, 0), random_tokens(4, 1)]] * 2)
        assert totals == [6 + 3] * 2  # the last prompt token waits for the first chunk
        for length in (5, 1, 3):
            before = list(totals)
            guide.append(slots, [[3, 3]] * 2, [random_tokens(length, 2)] * 2)
            assert totals == [b + 2 * length for b in before]


def test_a_search_puts_prompt_and_sampled_tokens_through_each_guide_once() -> None:
    models = [tiny_model("llama", seed=s, eos=(0, 3, 6)) for s in range(5)]
    engine = Engine(
        base=models[0],
        guides=[Guide(models[1], models[2]), Guide(models[3], models[4], weight=0.5)],
        device="cpu",
        kv_cache_tokens=2048,
    )
    prompts = [random_tokens(n, n) for n in (9, 1, 4)]
    params = SearchParams(beam_width=3, successors=2, chunk_length=4, max_new_tokens=13)
    with forwarded(*models) as totals:
        results = engine.generate(prompts, params)
    scored = sum(r.usage.scored_tokens for r in results)
    assert scored == sum(r.usage.sampled_tokens for r in results)
    assert totals[1:] == [scored + sum(len(p) - 1 for p in prompts)] * 4


def test_padded_ids_have_no_share_in_a_guides_probabilities() -> None:
    guide, reference = make("gpt2", vocab_size=13)
    prompt, response = random_tokens(4, 0, 13), random_tokens(6, 1, 13)
    tuned, untuned = guide.append(guide.prefill([[prompt]] * 2), [prompt[-1:]] * 2, [response])
    expected = recomputed(reference, prompt, response, vocab_size=13)
    np.testing.assert_allclose((tuned - untuned).numpy(), expected, atol=1e-4)


def test_given_responses_are_scored_like_sampled_ones() -> None:
    models = [
        tiny_model(f, seed=s) for s, f in enumerate(["llama", "gpt2", "gpt2", "phi3", "phi3"])
    ]
    guides = [Guide(models[1], models[2], weight=0.7), Guide(models[3], models[4], weight=-0.3)]
    engine = Engine(base=models[0], guides=guides, device="cpu", kv_cache_tokens=2048)
    prompts = [random_tokens(5, 0), random_tokens(2, 1)]
    results = engine.generate(prompts, SearchParams(max_new_tokens=12, beam_width=2, n=2))
    for prompt, result in zip(prompts, results, strict=True):
        for hypothesis in result.hypotheses:
            (score,) = engine.score([prompt], [hypothesis.token_ids])
            assert score == pytest.approx(hypothesis.score, abs=1e-4)
            assert sum(hypothesis.token_scores) == pytest.approx(score, abs=1e-4)
    expected = [
        sum(
            w * recomputed(ReferenceGuide(models[i], models[i + 1]), prompt, [4, 0, 7]).sum()
            for i, w in ((1, 0.7), (3, -0.3))
        )
        for prompt in prompts
    ]
    assert engine.score(prompts, [[4, 0, 7]] * 2) == pytest.approx(expected, abs=1e-4)


def test_a_guide_that_is_compared_with_itself_scores_nothing() -> None:
    base, model = tiny_model("llama"), tiny_model("gpt2", seed=1)
    engine = Engine(base=base, guides=Guide(model, model), device="cpu", kv_cache_tokens=1024)
    result = engine.generate([[1, 2]], SearchParams(max_new_tokens=6, beam_width=2, trace=True))[0]
    assert result.score == 0
    assert result.trace is not None
    assert all(r.kept == [0, 1] for r in result.trace.rounds)  # ties go to the lower index


def test_where_one_model_has_no_room_the_other_gives_its_slots_back() -> None:
    tuned, untuned = (
        PagedModel(tiny_model("llama", seed=seed), kv_cache_tokens=tokens, page_size=4, max_slots=4)
        for seed, tokens in ((0, 400), (1, 16))
    )
    guide = PagedGuide(tuned, untuned, 1.0, VOCABULARY)
    slots = guide.prefill([[[1, 2, 3, 4, 5, 6]]] * 2)  # a full page and a partial one
    with pytest.raises(OutOfPages):
        untuned.pool.fork(slots[1], [3])
    assert tuned.pool.free_slots == untuned.pool.free_slots == 3
    with pytest.raises(OutOfPages):
        guide.prefill([[[1] * 6, [2] * 6, [3] * 6]] * 2)
    assert tuned.pool.free_slots == untuned.pool.free_slots == 3
    guide.release(slots)
    assert tuned.pool.free_pages == tuned.pool.num_pages
