"""Streams: what all hypotheses agree on, as soon as they do, and never taken back."""

from __future__ import annotations

import functools
import gc
import math
import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from tests.support.broken_models import broken_copy
from tests.support.engines import (
    MIXED,
    PROMPTS,
    SEARCH,
    assert_all_pages_free,
    engine,
    found,
    make_engine,
)
from tests.support.tiny_models import byte_tokenizer, tiny_triple
from w2s_fast import Engine, SearchParams, SearchResult, StreamPiece
from w2s_fast.engine.outcome import TokenDecoder
from w2s_fast.engine.stream import Pieces
from w2s_fast.errors import EngineFailure, InvalidRequest, NumericalError
from w2s_fast.search.search import Search
from w2s_fast.text.response import decode_response

METHODS = [
    *MIXED,
    SearchParams(beam_width=1, successors=4, chunk_length=2, max_new_tokens=12, trace=True),
    SearchParams(beam_width=3, successors=3, chunk_length=20, max_new_tokens=26, trace=True),
    SearchParams(finished="replicate", beam_width=2, successors=3, max_new_tokens=18, trace=True),
    SearchParams(dedup=True, score="mean", temperature=0.3, max_new_tokens=18, trace=True),
    SearchParams(method="sample", max_new_tokens=40, ignore_eos=True, trace=True),
    SearchParams(method="beam", beam_width=3, max_new_tokens=20, trace=True),
    SearchParams(method="sample", max_new_tokens=40, stop_token_ids=range(40), trace=True),
]


@functools.cache
def text_engine() -> Engine:
    """Every token is a byte; many of its texts are no valid UTF-8."""
    base, tuned, untuned = tiny_triple(
        vocab_size=258, eos=(257, 10, 60, 90, 130), bos=256, dtype=torch.float32, layers=1
    )
    return make_engine(base, tuned, untuned, tokenizer=byte_tokenizer())


def joined(pieces: Sequence[StreamPiece]) -> tuple[str | None, list[int]]:
    texts = [piece.text for piece in pieces]
    tokens = [token for piece in pieces for token in piece.token_ids]
    if None in texts:
        assert set(texts) == {None}
        return None, tokens
    return "".join(text or "" for text in texts), tokens


def result_of(pieces: Sequence[StreamPiece]) -> SearchResult:
    """The last piece carries it, and no other does."""
    assert [p.result is not None for p in pieces] == [False] * (len(pieces) - 1) + [True]
    result = pieces[-1].result
    assert result is not None
    return result


@pytest.mark.parametrize("params", METHODS)
@pytest.mark.parametrize("prompt", ["Hé ", [200, 30, 40]], ids=["text", "ids"])
def test_all_pieces_together_are_the_answer(params: SearchParams, prompt: Any) -> None:
    e = text_engine()
    seeds = [replace(params, seed=seed) for seed in range(3)]
    for own, expected in zip(seeds, e.generate([prompt] * len(seeds), seeds)):
        pieces = list(e.stream(prompt, own))
        result = result_of(pieces)
        assert joined(pieces) == (result.text, result.token_ids)
        assert found([result]) == found([expected])
    assert_all_pages_free(e)


def test_ahead_what_ends_a_response_is_not_given_out_before() -> None:
    """All may have ended in the middle of a round, which ends with the next step."""
    e = text_engine()
    expected = e.generate(["Hé "] * 3, seeds := [replace(METHODS[-1], seed=s) for s in range(3)])
    with mock.patch.object(e._search, "_ahead", True):
        streams = [list(e.stream("Hé ", own)) for own in seeds]
    for pieces, result in zip(streams, expected):
        assert joined(pieces) == (result.text, result.token_ids)


@pytest.mark.parametrize("params", METHODS)
def test_without_a_tokenizer_pieces_are_tokens(params: SearchParams) -> None:
    e = engine()
    params = replace(params, stop_token_ids=params.stop_token_ids[:10])
    for prompt, expected in zip(PROMPTS, e.generate(PROMPTS, params)):
        pieces = list(e.stream(prompt, params))
        result = result_of(pieces)
        assert joined(pieces) == (None, result.token_ids)
        assert found([result]) == found([expected])


def common(texts: Sequence[Sequence[int]]) -> list[int]:
    agreed = []
    for column in zip(*texts):
        if len(set(column)) > 1:
            break
        agreed.append(column[0])
    return agreed


@pytest.mark.parametrize("params", [p for p in METHODS if p.method == "cbs" and p.uses_guides])
def test_a_piece_comes_when_the_kept_agree_and_begins_every_later_candidate(
    params: SearchParams,
) -> None:
    e = text_engine()
    params = replace(params, chunk_length=min(params.chunk_length or 9, 9))  # a step is a round
    early = 0
    for seed in range(4):
        pieces = list(e.stream("Once", replace(params, seed=seed)))
        trace = result_of(pieces).trace
        assert trace is not None
        given: list[int] = []
        expected = []
        for number, one in enumerate(trace.rounds):
            decoded = decode_response(byte_tokenizer(), [], given)
            for candidate in one.candidates:
                assert candidate.token_ids[: len(given)] == given
                text = decode_response(byte_tokenizer(), [], candidate.token_ids)
                assert text.startswith(decoded.rstrip("\ufffd"))
            kept = [one.candidates[i] for i in one.kept]
            agreed = common([
                c.token_ids[:-1] if c.finish_reason in ("eos", "stop") else c.token_ids
                for c in kept
            ])  # fmt: skip
            if len(agreed) > len(given) and number < len(trace.rounds) - 1:
                expected.append(agreed[len(given) :])
            given = agreed
        assert [p.token_ids for p in pieces[:-1]] == expected
        early += len(expected)
    assert early > 0


def test_a_sample_is_given_out_while_it_is_decoded() -> None:
    params = SearchParams(method="sample", max_new_tokens=60, ignore_eos=True)
    pieces = list(text_engine().stream("A", params))
    counts = [len(p.token_ids) for p in pieces if p.token_ids]
    assert counts == [4] * 13 + [8]
    assert sum(bool(p.text) for p in pieces) > 10  # others end within a character


def test_text_is_given_out_by_whole_characters() -> None:
    text = "naïve 日本語 🎉🏽 e\u0301 \ufffd!"
    tokenizer = byte_tokenizer()
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(tokens) == len(text.encode())
    pieces = Pieces(TokenDecoder(tokenizer, [70, 71]))
    seen = ""
    for end in range(1, len(tokens) + 1):
        piece = pieces.next(tokens[:end])
        assert piece is not None and piece.text is not None
        assert piece.token_ids == tokens[end - 1 : end]
        seen += piece.text
        whole = text.encode()[:end].decode(errors="ignore")
        assert seen == whole.rstrip("\ufffd")
    assert seen == text
    assert pieces.next(tokens) is None


def fallback_tokenizer() -> PreTrainedTokenizerFast:
    """Characters, and single bytes for all others, as Llama 2 and Gemma have it."""
    names = [f"<0x{byte:02X}>" for byte in range(256)] + ["a", "b", "▁"]
    model = models.BPE({name: i for i, name in enumerate(names)}, [], byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


A, B, SPACE = 256, 257, 258


@pytest.mark.parametrize(
    "tokens",
    [
        [A, *"é".encode(), B, *"日本".encode(), SPACE, A],
        [A, *"日".encode(), 0xE6],  # cut within a character: the whole run is replaced
        [A, *"日\n".encode(), 0xE6, 0x97, B],
        [0xFF, A, *"日".encode(), 0xFF, B],
        [*"日本".encode()],
    ],
)
def test_bytes_that_a_decoder_may_replace_are_held_back(tokens: list[int]) -> None:
    tokenizer = fallback_tokenizer()
    pieces = Pieces(TokenDecoder(tokenizer, [B]))
    seen = ""
    final = decode_response(tokenizer, [B], tokens)
    for end in range(1, len(tokens) + 1):
        piece = pieces.next(tokens[:end])
        assert piece is not None and piece.text is not None
        seen += piece.text
        assert final.startswith(seen)
    result = mock.Mock(text=final, token_ids=tokens)
    assert seen + (pieces.last(result).text or "") == final


def test_what_was_given_out_stays_whatever_a_decoder_rewrites() -> None:
    texts = ["ab", "ax!", "abc", "", "abcd"]
    pieces = Pieces(TokenDecoder(byte_tokenizer(), [70]))
    with mock.patch("w2s_fast.engine.outcome.decode_response", side_effect=texts):
        found_pieces = [pieces.next([65] * n) for n in range(1, 6)]
    assert [piece and piece.text for piece in found_pieces] == ["ab", "", "c", "", "d"]


def test_a_request_enters_when_the_stream_is_first_read() -> None:
    e = make_engine(*tiny_triple(eos=()))
    stream = e.stream(PROMPTS[0], replace(SEARCH, beam_width=1, n=1))
    assert e.stats().waiting == 0
    next(stream)
    assert e.stats().running == 1
    del stream
    gc.collect()
    assert e.stats().running == 0
    assert e.stats().aborted == 1
    assert_all_pages_free(e)


def long_stream(e: Engine) -> Any:
    """A stream that has begun."""
    stream = e.stream(PROMPTS[0], replace(SEARCH, beam_width=1, n=1, max_new_tokens=60))
    next(stream)
    return stream


def test_leaving_the_loop_frees_the_pages() -> None:
    e = make_engine(*tiny_triple(eos=()))
    for piece in e.stream(PROMPTS[0], replace(SEARCH, beam_width=1, n=1, max_new_tokens=60)):
        assert piece.result is None
        break
    gc.collect()
    assert_all_pages_free(e)
    stream = long_stream(e)
    closing = threading.Thread(target=stream.close)
    closing.start()
    closing.join()
    assert_all_pages_free(e)


def test_a_stream_closed_in_the_middle_of_a_step_ends_after_it() -> None:
    """By the garbage collector, say: it may come anywhere, in the thread that takes the step."""
    e = make_engine(*tiny_triple(eos=()))
    stream = long_stream(e)
    step = Search.step
    met: list[int] = []

    def closing(self: Search, requests: Any) -> None:
        if not met:
            met.append(len(requests))
            stream.close()
        step(self, requests)

    with mock.patch.object(Search, "step", closing):
        results = e.generate(PROMPTS, MIXED)
    assert met == [6]
    assert found(results) == found(engine(eos=()).generate(PROMPTS, MIXED))
    assert e.stats().aborted == 1
    assert_all_pages_free(e)


def test_a_stream_closed_in_anybodys_turn_ends_with_that_turn() -> None:
    e = make_engine(*tiny_triple(eos=()))
    stream = long_stream(e)
    with e.runner.turn():
        stream.close()
        assert e.stats().running == 1
    assert e.stats().running == 0
    assert_all_pages_free(e)


def test_streams_and_iterations_serve_each_other() -> None:
    e = make_engine(*tiny_triple(eos=(0, 6, 13)))
    params = replace(SEARCH, max_new_tokens=40)
    iteration = e.as_completed(PROMPTS, MIXED)
    first = next(iteration)
    streams = [e.stream(prompt, params) for prompt in PROMPTS]
    pieces: list[list[StreamPiece]] = [[] for _ in streams]
    left = set(range(len(streams)))
    while left:
        for i in sorted(left):
            piece = next(streams[i], None)
            if piece is None:
                left.discard(i)
            else:
                pieces[i].append(piece)
    results = dict([first, *iteration])
    assert found([results[i] for i in range(5)]) == found(engine().generate(PROMPTS, MIXED))
    assert found([result_of(p) for p in pieces]) == found(engine().generate(PROMPTS, params))
    assert_all_pages_free(e)


def test_errors_are_raised_out_of_the_stream_and_harm_nobody() -> None:
    base, tuned, untuned = tiny_triple(("llama", "llama", "llama"), eos=(), dtype=torch.float32)
    e = make_engine(base, broken_copy(tuned, 7, math.nan), untuned)
    with pytest.raises(InvalidRequest):
        e.stream([99], SEARCH)  # before it is read
    iteration = e.as_completed([[19]], SEARCH)
    broken = e.stream([7, 7], SEARCH)
    with pytest.raises(NumericalError, match="tuned"):
        list(broken)
    ((_, result),) = iteration
    assert result.error is None
    assert_all_pages_free(e)


def test_a_response_that_cannot_be_decoded_fails_alone() -> None:
    e = make_engine(*tiny_triple(vocab_size=258, eos=(257,), bos=256), tokenizer=byte_tokenizer())
    decode = decode_response

    def failing(tokenizer: Any, prompt: Sequence[int], tokens: Sequence[int]) -> str:
        if prompt == [5]:
            raise TypeError("no such token")
        return decode(tokenizer, prompt, tokens)

    with mock.patch("w2s_fast.engine.outcome.decode_response", failing):
        results = e.generate([[4], [5], [6]], SEARCH, on_error="return")
        with pytest.raises(EngineFailure, match="no such token"):
            list(e.stream([5], SEARCH))
    assert [type(r.error) for r in results] == [type(None), EngineFailure, type(None)]
    assert_all_pages_free(e)
