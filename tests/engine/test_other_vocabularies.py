"""Guides of other vocabularies score what candidates say, as if each text were scored anew."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from tests.support.cohorts import in_cohorts
from tests.support.engines import assert_all_pages_free, found
from tests.support.foreign_guides import (
    LAST,
    PROMPTS,
    SEARCH,
    anew,
    check,
    engine,
    ids_of,
    make,
    model_of,
    pairs,
    rounds,
    said,
    said_raw,
    total,
)
from tests.support.taken_pages import all_taken_but
from tests.support.tiny_models import tiny_model
from tests.support.trained_tokenizers import trained
from w2s_fast import Guide, ScoredCandidate, SearchParams
from w2s_fast.errors import (
    InvalidRequest,
    OutOfPages,
)


@pytest.mark.parametrize("base", ["bytes-gpt2", "bpe-first"])
@pytest.mark.parametrize("kind", ["bpe-legacy", "unigram-bytes", "wordpiece", "bytes-llama3"])
def test_scores_are_those_of_whole_texts(base: str, kind: str) -> None:
    if base == "bytes-gpt2" or kind == "bytes-llama3":
        e, guides = engine(base, kind), pairs(kind)
        results = e.generate(PROMPTS, SEARCH, progress=False)
        for prompt, result in zip(PROMPTS, results, strict=True):
            check(e, guides, prompt, result)
        assert_all_pages_free(e)
        reasons = {c.finish_reason for r in results for n in rounds(r) for c in n.candidates}
        assert reasons == {None, "eos", "length"}
        # Some ended in the middle of a character, and went on from there.
        held = [
            said_raw(e, p, c).endswith(LAST)
            for p, r in zip(PROMPTS, results)
            for n in rounds(r)
            for c in n.candidates
        ]
        assert any(held)


@pytest.mark.parametrize(
    "changes",
    [
        {"score": "mean", "chunk_length": 3},
        {"method": "bon", "successors": 4, "n": 2},
        {"finished": "replicate", "chunk_length": 5},
        {"chunk_length": 1, "max_new_tokens": 9},
        {"dedup": True, "temperature": 0.0},
        {"beam_width": 1, "successors": 5, "chunk_length": 30, "max_new_tokens": 33},
    ],
    ids=str,
)
def test_every_kind_of_search(changes: dict[str, Any]) -> None:
    e, guides = engine("bytes-gpt2", "bpe-first", "wordpiece"), pairs("bpe-first", "wordpiece")
    params = SearchParams(**{**vars(SEARCH), **changes})
    results = e.generate(PROMPTS, params, progress=False)
    for prompt, result in zip(PROMPTS, results, strict=True):
        check(e, guides, prompt, result, mean=params.score == "mean", ranks=not params.dedup)
        best = result.hypotheses[0]
        assert best.score == pytest.approx(max(h.score or 0.0 for h in result.hypotheses), abs=1e-9)
    assert_all_pages_free(e)


def test_beside_a_guide_of_the_same_vocabulary() -> None:
    tokenizer = trained("bytes-gpt2")
    own = Guide(
        tiny_model(seed=7, vocab_size=len(tokenizer), bos=None),
        tiny_model(seed=8, vocab_size=len(tokenizer), bos=None),
        0.5,
        tokenizer=tokenizer,
    )
    guides = pairs("bpe-first")
    e = make("bytes-gpt2", [own, *guides])
    alone = make("bytes-gpt2", [own])
    for prompt, result in zip(PROMPTS, e.generate(PROMPTS, SEARCH, progress=False), strict=True):
        for number in rounds(result):
            for c in number.candidates:
                text, ends = said(e, prompt, c)
                both = alone.score([prompt], [c.token_ids])[0] + anew(guides[0], prompt, text, ends)
                assert c.score == pytest.approx(both, abs=1e-4)
        best = result.hypotheses[0]
        assert sum(best.token_scores) == pytest.approx(
            alone.score([prompt], [best.token_ids])[0], abs=1e-4
        )
    assert_all_pages_free(e)


def test_models_that_several_guides_have_run_once() -> None:
    tokenizer = trained("bpe-first")
    tuned, other, untuned = (model_of(tokenizer, seed) for seed in (1, 3, 2))
    guides = [
        Guide(tuned, untuned, tokenizer=tokenizer),
        Guide(other, untuned, -0.5, tokenizer=tokenizer),
        Guide(tuned, None, 0.25, tokenizer=tokenizer),
    ]
    e = make("bytes-gpt2", guides)
    foreign = e._search.foreign
    assert len(foreign.models) == 3
    for prompt, result in zip(PROMPTS, e.generate(PROMPTS, SEARCH, progress=False), strict=True):
        check(e, guides, prompt, result)
    assert len(set(foreign.run_tokens)) == 1
    assert_all_pages_free(e)


def test_alone_as_among_others() -> None:
    e = engine("bytes-gpt2", "bpe-first", "wordpiece")
    alone = [e.generate([p], SEARCH, progress=False)[0] for p in PROMPTS]
    assert found(alone) == found(e.generate(PROMPTS, SEARCH, progress=False))


def test_in_cohorts_as_in_one() -> None:
    guides = pairs("bpe-first")
    apart = in_cohorts(make("bytes-gpt2", guides, prefix_cache=False))
    together = make("bytes-gpt2", guides, prefix_cache=False)
    assert found(apart.generate(PROMPTS, SEARCH, progress=False)) == found(
        together.generate(PROMPTS, SEARCH, progress=False)
    )
    assert_all_pages_free(apart)


def test_where_pages_are_few_texts_are_run_again() -> None:
    guides = pairs("bpe-first")
    params = SearchParams(**{**vars(SEARCH), "max_new_tokens": 24})
    roomy = make("bytes-gpt2", guides, prefix_cache=False)
    expected = found(roomy.generate(PROMPTS, params, progress=False))
    tight = make("bytes-gpt2", guides, prefix_cache=False, kv_cache_tokens=320)
    results = tight.generate(PROMPTS, params, progress=False)
    assert found(results) == expected
    assert_all_pages_free(tight)


@pytest.mark.parametrize("most", [5, 12])
def test_long_prompts_are_read_in_pieces(most: int) -> None:
    guides = pairs("bpe-first")
    prompts = ["hello world " * 9, "the film " * 6 + "was", "x", "hello world " * 8]
    expected = make("bytes-gpt2", guides).generate(prompts, SEARCH, progress=False)
    e = make("bytes-gpt2", guides, max_pass_tokens=most)
    passes: list[int] = []
    hooks = [
        model.get_input_embeddings().register_forward_hook(
            lambda _module, args, _output: passes.append(args[0].numel())
        )
        for model in (guides[0].tuned, guides[0].untuned)
    ]
    try:
        results = e.generate(prompts, SEARCH, progress=False)
    finally:
        for hook in hooks:
            hook.remove()
    assert found(results) == found(expected)
    assert max(passes) == most
    assert_all_pages_free(e)


def test_who_does_not_fit_at_all_is_told_so_and_harms_nobody() -> None:
    guides = pairs("bpe-first")
    e = make("bytes-gpt2", guides, kv_cache_tokens=160, ends=())
    large = SearchParams(beam_width=6, successors=4, chunk_length=3, max_new_tokens=9)
    small = SearchParams(beam_width=1, successors=2, chunk_length=3, max_new_tokens=6)
    failed, fine = e.generate(["the", "hello"], [large, small], progress=False, on_error="return")
    assert fine.error is None
    assert isinstance(failed.error, (OutOfPages, InvalidRequest))
    assert "kv_cache_tokens" in str(failed.error)
    assert_all_pages_free(e)


def test_a_text_that_becomes_too_long_for_a_guide_is_an_error_of_its_own() -> None:
    e = engine("bytes-gpt2", "bpe-first")
    long = SearchParams(
        beam_width=2, successors=1, chunk_length=40, max_new_tokens=100, ignore_eos=True
    )
    failed, fine = e.generate(["hello", "the"], [long, SEARCH], progress=False, on_error="return")
    assert isinstance(failed.error, InvalidRequest)
    assert "tuned" in str(failed.error)
    assert fine.error is None
    assert_all_pages_free(e)


def test_templates_and_chats_of_each_model() -> None:
    tokenizer = trained("bpe-first")
    chat = copy.deepcopy(tokenizer)
    chat.chat_template = (
        "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>\n{% endfor %}"
    )
    models = model_of(tokenizer, 1), model_of(tokenizer, 2)
    guide = Guide(*models, tokenizer=chat, prompt_template=("Q: {prompt}\nA:", None))
    e = make("bytes-gpt2", [guide])
    result = e.generate(["the film"], SEARCH, progress=False)[0]
    for number in rounds(result):
        for c in number.candidates:
            text, ends = said(e, "the film", c)
            parts = [
                total(
                    model,
                    chat,
                    chat(prompt, add_special_tokens=bos)["input_ids"],
                    chat(prompt + text, add_special_tokens=bos)["input_ids"],
                    ends,
                )
                for model, prompt, bos in zip(
                    models, ("Q: the film\nA:", "the film"), (False, True)
                )
            ]
            assert c.score == pytest.approx(parts[0] - parts[1], abs=1e-4)

    messages = [{"role": "user", "content": "hello </s> world"}]
    e.tokenizer.chat_template = "{{ messages[0]['content'] }}"  # type: ignore[union-attr]
    try:
        result = e.generate([messages], SEARCH, progress=False)[0]
    finally:
        e.tokenizer.chat_template = None  # type: ignore[union-attr]
    # What the user wrote spells no special token.
    before = e._models.encoder_of[e.guides[0].models[0]].encode(messages)
    assert before.count(tokenizer.eos_token_id) == 1
    for number in rounds(result):
        for c in number.candidates:
            text, ends = said(e, "hello </s> world", c)
            if "<" in text:
                continue  # it may spell what is special
            behind = chat("</s>\n" + text, add_special_tokens=False)["input_ids"]
            assert behind[0] == tokenizer.eos_token_id
            both = before[: before.index(tokenizer.eos_token_id)] + behind
            parts = [total(model, chat, before, both, ends) for model in models]
            assert c.score == pytest.approx(parts[0] - parts[1], abs=1e-4)


def test_a_prompt_of_token_ids_is_read_as_its_text() -> None:
    e = engine("bytes-gpt2", "bpe-first")
    assert e.tokenizer is not None
    ids = e.tokenizer("hello world")["input_ids"]
    given, written = e.generate([ids, "hello world"], SEARCH, progress=False)
    assert found([given]) == found([written])
    with pytest.raises(InvalidRequest, match="special tokens"):
        e.generate([[*ids, e.tokenizer.eos_token_id, *ids]], SEARCH, progress=False)


def test_given_texts_are_scored_as_candidates_are() -> None:
    guides = pairs("bpe-first", "wordpiece")
    e = engine("bytes-gpt2", "bpe-first", "wordpiece")
    texts = [" film was a", "\u4eca\u5929", " x"]
    expected = [sum(anew(guide, "the", text, False) for guide in guides) for text in texts]
    assert e.score(["the"] * 3, texts) == pytest.approx(expected, abs=1e-4)
    ids = [e.tokenizer(text)["input_ids"] for text in texts]  # type: ignore[misc]
    assert e.score(["the"] * 3, ids) == pytest.approx(expected, abs=1e-4)


def test_scoring_given_texts_takes_pages_from_running_requests() -> None:
    e = make("bytes-gpt2", pairs("bpe-first"), prefix_cache=False)
    params = [replace(SEARCH, max_new_tokens=4), SEARCH, SEARCH, SEARCH]
    expected = found(e.generate(PROMPTS, params, progress=False))
    text = ("hello", " world" * 60)
    alone = e.score(*([one] for one in text))
    foreign = e._search.foreign
    pool = foreign.models[0].pool
    needed = -(-(len(ids_of(trained("bpe-first"), "".join(text))) - 1) // pool.page_size)
    done, evicted = {}, 0
    for index, result in e.as_completed(PROMPTS, params):
        done[index] = result
        held = pool.num_pages - pool.free_pages
        with all_taken_but(pool, held + needed - 1):
            if held > 0:  # what is missing, requests in flight have
                assert e.score(*([one] for one in text)) == alone
                evicted += not any(own.slots(0) for own in foreign._of.values())
    assert evicted > 0
    assert found([done[i] for i in range(len(PROMPTS))]) == expected
    assert_all_pages_free(e)


def test_scorers_have_their_say_beside_the_guides() -> None:
    def length(candidates: Sequence[ScoredCandidate]) -> list[float]:
        return [0.25 * len(c.token_ids) for c in candidates]

    guides = pairs("bpe-first")
    e = make("bytes-gpt2", guides, scorers=[length])
    for prompt, result in zip(PROMPTS, e.generate(PROMPTS, SEARCH, progress=False), strict=True):
        for number in rounds(result):
            for c in number.candidates:
                text, ends = said(e, prompt, c)
                expected = anew(guides[0], prompt, text, ends) + 0.25 * len(c.token_ids)
                assert c.score == pytest.approx(expected, abs=1e-4)
    assert_all_pages_free(e)


def test_hypotheses_that_are_kept_more_than_once_go_on_apart() -> None:
    e = engine("bytes-gpt2", "bpe-first")
    params = SearchParams(**{**vars(SEARCH), "selection": "resample", "tau": 0.5})
    results = e.generate(PROMPTS, params, progress=False)
    assert any(len(set(n.kept)) < len(n.kept) for r in results for n in rounds(r))
    for prompt, result in zip(PROMPTS, results, strict=True):
        check(e, pairs("bpe-first"), prompt, result, ranks=False)
    assert_all_pages_free(e)


def test_stop_strings_cut_what_is_scored() -> None:
    guides = pairs("bpe-first")
    e = make("bytes-gpt2", guides, ends=())
    params = SearchParams(**{**vars(SEARCH), "stop": ("e", "\u0e2a", " ")})
    stopped = 0
    for prompt, result in zip(PROMPTS, e.generate(PROMPTS, params, progress=False), strict=True):
        for number in rounds(result):
            for c in number.candidates:
                stopped += c.finish_reason == "stop"
                text, ends = said(e, prompt, c)
                assert not any(stop in text for stop in params.stop)
                assert c.score == pytest.approx(anew(guides[0], prompt, text, ends), abs=1e-4)
    assert stopped
    assert_all_pages_free(e)


def test_chunks_that_end_at_strings() -> None:
    e = engine("bytes-gpt2", "bpe-first")
    params = SearchParams(**{**vars(SEARCH), "chunk_stop": ("e", "\u0e2a", " "), "chunk_length": 8})
    results = e.generate(PROMPTS, params, progress=False)
    lengths = set()
    for prompt, result in zip(PROMPTS, results, strict=True):
        check(e, pairs("bpe-first"), prompt, result)
        for number in rounds(result):
            lengths.add(len({len(c.token_ids) for c in number.candidates if not c.finish_reason}))
    assert max(lengths) > 1
    assert_all_pages_free(e)
