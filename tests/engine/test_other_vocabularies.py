"""Guides of other vocabularies score what candidates say, as if each text were scored anew."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.broken_models import broken_copy, failing
from tests.support.cohorts import in_cohorts
from tests.support.engines import assert_all_pages_free, found
from tests.support.probed import probed_once
from tests.support.taken_pages import all_taken_but
from tests.support.tiny_models import tiny_model
from tests.support.trained_tokenizers import trained
from w2s_fast import Engine, Guide, ScoredCandidate, SearchParams, SearchResult
from w2s_fast.errors import (
    EngineFailure,
    InvalidRequest,
    MismatchedVocabulary,
    NumericalError,
    OutOfPages,
)
from w2s_fast.result import Candidate, Round

LAST = "\ufffd"  # for bytes of a character that is not whole
SEARCH = SearchParams(
    beam_width=3, successors=2, chunk_length=4, max_new_tokens=14, trace=True, seed=5
)
PROMPTS = ["the film was a", "hello world", "\u4eca\u5929 it's", "x"]


def model_of(tokenizer: Any, seed: int, family: str = "llama") -> Any:
    return tiny_model(
        family,
        seed=seed,
        vocab_size=len(tokenizer),
        eos=(tokenizer.eos_token_id,),
        bos=tokenizer.bos_token_id,
        dtype=torch.float64,
    )


@cache
def pair(kind: str, seed: int = 1, weight: float = 1.0) -> Guide:
    tokenizer = trained(kind)
    return Guide(
        model_of(tokenizer, seed), model_of(tokenizer, seed + 1), weight, tokenizer=tokenizer
    )


ENDS = tuple(range(9, 600, 12))  # tokens that end a response, so that some do


def make(base: str, guides: Sequence[Guide], ends: Sequence[int] = ENDS, **options: Any) -> Engine:
    tokenizer = trained(base)
    eos = tuple(i for i in ends if i < len(tokenizer))
    model = tiny_model(
        seed=0, vocab_size=len(tokenizer), eos=eos or (tokenizer.eos_token_id,), bos=None
    )
    options = {"kv_cache_tokens": 4096, "page_size": 4, "device": "cpu", **options}
    with probed_once():
        return Engine(model, guides, tokenizer=tokenizer, **options)


@cache
def engine(base: str, *guides: str) -> Engine:
    return make(base, pairs(*guides))


def pairs(*kinds: str) -> list[Guide]:
    return [pair(kind, 1 + 2 * i, 1.0 - 0.25 * i) for i, kind in enumerate(kinds)]


def anew(guide: Guide, prompt: str, text: str, ends: bool) -> float:
    """A guide's score of a text, from a pass over all of it."""
    tokenizer = guide.tokenizer
    assert tokenizer is not None
    before, both = ids_of(tokenizer, prompt), ids_of(tokenizer, prompt + text)
    models = [model for model in (guide.tuned, guide.untuned) if model is not None]
    tuned, *untuned = (total(model, tokenizer, before, both, ends) for model in models)
    return guide.weight * (tuned - sum(untuned))


def ids_of(tokenizer: Any, text: str) -> list[int]:
    """Of a text that goes on: without an EOS that the tokenizer puts behind it."""
    ids: list[int] = tokenizer(text, split_special_tokens=True)["input_ids"]
    return ids[:-1] if ids[-1:] == [tokenizer.eos_token_id] else ids


def total(model: Any, tokenizer: Any, before: list[int], both: list[int], ends: bool) -> float:
    """The log-prob of what comes behind what both have in common, and of an EOS."""
    start = 0
    while start < min(len(before), len(both)) and before[start] == both[start]:
        start += 1
    assert start > 0
    both = both + [tokenizer.eos_token_id] * ends
    with torch.no_grad():
        logits = model(torch.tensor([both])).logits[0, start - 1 : -1].double()
    targets = torch.tensor(both[start:], dtype=torch.int64)
    return float(logits.log_softmax(-1).gather(1, targets[:, None]).sum())


def said_raw(e: Engine, prompt: str, candidate: Candidate) -> str:
    """What a candidate says, with marks for the bytes of a character that is not whole."""
    ids = list(candidate.token_ids)
    if candidate.finish_reason == "eos":
        ids.pop()
    assert e.tokenizer is not None
    before = e.tokenizer(prompt)["input_ids"][-8:]
    text = e.tokenizer.decode([*before, *ids], skip_special_tokens=True)
    return str(text[len(e.tokenizer.decode(before, skip_special_tokens=True)) :])


def said(e: Engine, prompt: str, candidate: Candidate) -> tuple[str, bool]:
    """What a candidate says, as far as it is certain, and whether an EOS ends it."""
    ids, run = list(candidate.token_ids), b""
    assert e.tokenizer is not None
    names = e.tokenizer.convert_ids_to_tokens(ids)
    while candidate.finish_reason is None and names and names[-1].startswith("<0x"):
        run = bytes([int(names.pop()[3:5], 16)]) + run
    text = said_raw(e, prompt, replace(candidate, token_ids=ids[: len(names)]))
    if candidate.finish_reason is None:
        text = text.rstrip(LAST)
    for length in range(len(run), 0, -1):  # what is whole of a run of bytes
        try:
            return text + run[:length].decode(), False
        except UnicodeDecodeError as error:
            if error.reason != "unexpected end of data":
                break
    return text, candidate.finish_reason == "eos"


def rounds(result: SearchResult) -> list[Round]:
    assert result.trace is not None
    return result.trace.rounds


def check(
    e: Engine,
    guides: Sequence[Guide],
    prompt: str,
    result: SearchResult,
    mean: bool = False,
    ranks: bool = True,
) -> None:
    """That all candidates have the scores of their whole texts, and the best were kept."""
    assert rounds(result)
    for number in rounds(result):
        scores = []
        for candidate in number.candidates:
            text, ends = said(e, prompt, candidate)
            score = sum(anew(guide, prompt, text, ends) for guide in guides)
            scores.append(score / len(candidate.token_ids) if mean else score)
        assert [c.score for c in number.candidates] == pytest.approx(scores, abs=1e-4)
        if ranks:
            ranked = sorted(range(len(scores)), key=lambda c: -(number.candidates[c].score or 0.0))
            assert number.kept == ranked[: len(number.kept)]


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


def test_changed_weights_of_a_guide_are_followed() -> None:
    tokenizer = trained("bpe-first")
    tuned = copy.deepcopy(model_of(tokenizer, 1))
    guide = Guide(tuned, model_of(tokenizer, 2), tokenizer=tokenizer)
    e = make("bytes-gpt2", [guide])
    e.generate(PROMPTS, SEARCH, progress=False)
    with torch.no_grad():
        tuned.get_output_embeddings().weight.mul_(-1.0)
    for prompt, result in zip(PROMPTS, e.generate(PROMPTS, SEARCH, progress=False), strict=True):
        check(e, [guide], prompt, result)


def test_weights_that_change_meanwhile() -> None:
    tokenizer = trained("bpe-first")
    tuned = copy.deepcopy(model_of(tokenizer, 1))
    e = make("bytes-gpt2", [Guide(tuned, model_of(tokenizer, 2), tokenizer=tokenizer)], ends=())
    short = SearchParams(**{**vars(SEARCH), "max_new_tokens": 4, "trace": False})
    for index, result in e.as_completed(PROMPTS, [SEARCH, short, SEARCH, SEARCH]):
        assert result.error is None
        if index == 1:
            with torch.no_grad():
                tuned.get_output_embeddings().weight.mul_(-1.0)
    assert_all_pages_free(e)


def test_broken_numbers_end_the_request_alone() -> None:
    tokenizer = trained("bpe-first")
    token = tokenizer.convert_tokens_to_ids("\u2581world")
    broken = broken_copy(model_of(tokenizer, 1), token, float("nan"))
    e = make("bytes-gpt2", [Guide(broken, model_of(tokenizer, 2), tokenizer=tokenizer)])
    failed, fine = e.generate(["hello world", "x"], SEARCH, progress=False, on_error="return")
    assert isinstance(failed.error, NumericalError)
    assert "tuned" in str(failed.error)
    assert fine.error is None
    assert_all_pages_free(e)


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("call", [1, 2, 4])
def test_an_interrupted_step_leaves_nothing_behind(call: int, error: BaseException) -> None:
    guides = pairs("bpe-first")
    e = make("bytes-gpt2", guides)
    expected = found(e.generate(PROMPTS, SEARCH, progress=False))
    broken = failing(guides[0].untuned, call, error)  # type: ignore[arg-type]
    with broken, pytest.raises((EngineFailure, KeyboardInterrupt)):
        e.generate(PROMPTS, SEARCH, progress=False)
    assert_all_pages_free(e)
    assert found(e.generate(PROMPTS, SEARCH, progress=False)) == expected


def test_requests_that_are_given_up_hold_nothing() -> None:
    e = engine("bytes-gpt2", "bpe-first", "wordpiece")
    for _ in e.as_completed(PROMPTS, SEARCH):
        break
    for prompt in PROMPTS:
        for _ in e.stream(prompt, SEARCH):
            break
    assert_all_pages_free(e)
    assert not e._search.foreign._of


def test_streams_and_results_agree() -> None:
    e = engine("bytes-gpt2", "bpe-first")
    for prompt in PROMPTS:
        *pieces, last = e.stream(prompt, SEARCH)
        assert "".join(p.text or "" for p in [*pieces, last]) == last.result.text  # type: ignore[union-attr]


def test_tokens_that_were_run_are_counted() -> None:
    e = make("bytes-gpt2", pairs("bpe-first"), ends=())
    result = e.generate(["the film"], SEARCH, progress=False)[0]
    foreign = e._search.foreign
    assert foreign.run_tokens[0] == foreign.run_tokens[1] == result.usage.scored_tokens > 0
    assert e.stats().scored_tokens == result.usage.scored_tokens


@pytest.mark.parametrize("method", ["fusion", "dynamic_fusion"])
def test_fusion_needs_one_vocabulary_and_says_so(method: Any) -> None:
    e = engine("bytes-gpt2", "bpe-first")
    with pytest.raises(InvalidRequest, match=r"one vocabulary: tuned .* another vocabulary"):
        e.generate(["the"], SearchParams(method=method), progress=False)
    with pytest.raises(InvalidRequest, match="one vocabulary"):
        e.generate(["the"], SearchParams(proposal="fusion"), progress=False)
    e.generate(["the"], SearchParams(method="sample", max_new_tokens=2), progress=False)


def test_models_of_a_guide_share_a_vocabulary(tmp_path: Path) -> None:
    base = trained("bytes-gpt2")
    model = tiny_model(seed=0, vocab_size=len(base), bos=None)
    for name, kind in (("one", "bpe-first"), ("other", "wordpiece"), ("same", "bytes-gpt2")):
        own = trained(kind)
        model_of(own, 1).save_pretrained(tmp_path / name)
        own.save_pretrained(tmp_path / name)
    one, other, same = (str(tmp_path / name) for name in ("one", "other", "same"))
    for guide in (Guide(one, other), Guide(one, same), Guide(same, other)):
        with pytest.raises(MismatchedVocabulary):
            Engine(model, guide, tokenizer=base, device="cpu", kv_cache_tokens=512)
    with pytest.raises(MismatchedVocabulary, match="cannot be told"):
        Engine(copy.deepcopy(model), Guide(one, one), device="cpu", kv_cache_tokens=512)
    # Tokenizers that lie with the models: read from two files, they are one.
    e = Engine(model, Guide(one, one), tokenizer=base, device="cpu", kv_cache_tokens=512)
    assert e._models.foreign is not None
    e = Engine(model, Guide(same, same), tokenizer=base, device="cpu", kv_cache_tokens=512)
    assert e._models.foreign is None
