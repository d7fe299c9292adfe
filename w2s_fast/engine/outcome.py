"""From a request that has ended to its result."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from transformers import PreTrainedTokenizerBase

from w2s_fast.errors import EngineFailure, W2SFastError
from w2s_fast.remote import to_text
from w2s_fast.result import Hypothesis, SearchResult, Trace, Usage
from w2s_fast.scorer import ScoredCandidate
from w2s_fast.search import Beam, Request
from w2s_fast.text import INCOMPLETE, decode_response, open_bytes


class ResponseDecoder(Protocol):
    """From what a request's search holds as tokens to what its caller gets."""

    def text(self, tokens: Sequence[int]) -> str | None:
        """Of a response; None without a tokenizer."""
        ...

    def certain(self, tokens: Sequence[int]) -> str | None:
        """The same of one that goes on, without what further tokens may change."""
        ...

    def ids(self, tokens: list[int]) -> list[int]:
        """Tokens as the base's own; none where these are not known."""
        ...


class TokenDecoder:
    """Of a base that runs here."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._prompt = prompt

    def text(self, tokens: Sequence[int]) -> str | None:
        if self._tokenizer is None:
            return None
        return decode_response(self._tokenizer, self._prompt, tokens)

    def certain(self, tokens: Sequence[int]) -> str | None:
        if self._tokenizer is None:
            return None
        whole = tokens[: len(tokens) - open_bytes(self._tokenizer, tokens)]
        return decode_response(self._tokenizer, self._prompt, whole).rstrip(INCOMPLETE)

    def ids(self, tokens: list[int]) -> list[int]:
        return tokens


class TextDecoder:
    """Of a remote base."""

    def text(self, tokens: Sequence[int]) -> str:
        return to_text(tokens)

    def certain(self, tokens: Sequence[int]) -> str:
        return to_text(tokens)

    def ids(self, tokens: list[int]) -> list[int]:
        return []


def response_decoder(
    request: Request, tokenizer: PreTrainedTokenizerBase | None
) -> ResponseDecoder:
    """``tokenizer``: the base's."""
    return TokenDecoder(tokenizer, request.prompt) if request.remote is None else TextDecoder()


def result_of(request: Request, tokenizer: PreTrainedTokenizerBase | None) -> SearchResult:
    """The result of a request that has ended; carries its error if it failed."""
    request.stats.candidates, request.stats.kept = request.beams.judged, request.beams.chosen
    if request.error is not None:
        return failed(request.error, request)
    beams = request.beams.kept[: request.params.n]
    try:
        hypotheses = [_hypothesis(request, beam, tokenizer) for beam in beams]
    except Exception as error:  # a tokenizer may raise anything
        failure = EngineFailure(f"the response cannot be decoded: {error}")
        failure.__cause__ = error
        return failed(failure, request)
    return SearchResult(
        hypotheses,
        _usage(request, beams),
        _trace(request) if request.params.trace else None,
        stats=request.stats,
        ended_early=request.ended_early,
    )


def failed(error: W2SFastError, request: Request | None = None) -> SearchResult:
    """The result of a request that failed, or was never taken on."""
    if request is None:
        return SearchResult([], Usage(0, 0, 0, 0), error=error)
    return SearchResult([], _usage(request, []), error=error, stats=request.stats)


def _trace(request: Request) -> Trace:
    if request.remote is None:
        return Trace(request.rounds())
    return Trace(request.rounds(), request.remote.content, request.draws)


def _hypothesis(
    request: Request, beam: Beam, tokenizer: PreTrainedTokenizerBase | None
) -> Hypothesis:
    assert beam.finish_reason is not None
    here = request.remote is None
    return Hypothesis(
        _text(request, beam, tokenizer),
        beam.tokens if here else [],
        request.score_of(beam),
        beam.finish_reason,
        beam.token_scores,
        beam.logprobs if here else [],
        _stop_reason(request, beam),
    )


def scored_candidate(
    tokenizer: PreTrainedTokenizerBase | None, request: Request, beam: Beam
) -> ScoredCandidate:
    """A candidate as scorers see it. Raises what the tokenizer does."""
    text = _text(request, beam, tokenizer)
    ids = beam.tokens if request.remote is None else []
    return ScoredCandidate(request.given, text, ids, beam.finish_reason is not None)


def _text(request: Request, beam: Beam, tokenizer: PreTrainedTokenizerBase | None) -> str | None:
    params, decoder = request.params, response_decoder(request, tokenizer)
    ended = beam.finish_reason == "eos" or (
        beam.finish_reason == "stop" and not params.include_stop_str_in_output
    )
    own = beam.ending is None and ended
    text = decoder.text(beam.tokens[:-1] if own else beam.tokens)
    if beam.ending is None or text is None:
        return text
    end = request.ended_texts[beam.ending]
    text = f"{text}{end.rest}"
    return text + str(end.stop) if params.include_stop_str_in_output else text


def _stop_reason(request: Request, beam: Beam) -> str | int | None:
    if beam.ending is not None:
        return str(request.ended_texts[beam.ending].stop)
    return beam.tokens[-1] if beam.finish_reason == "stop" else None


def _usage(request: Request, beams: Sequence[Beam]) -> Usage:
    scored = request.beams.scored + request.foreign_tokens
    sampled = request.beams.sampled
    if request.remote is None:
        completion = sum(len(beam.tokens) for beam in beams)
        return Usage(len(request.prompt), completion, sampled, scored)
    account, completion = request.remote.account, sum(request.token_counts[: len(beams)])
    return Usage(account.first_prompt_tokens, completion, sampled, scored, account.usage)
