"""From a request that has ended to its result."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from w2s_fast.errors import EngineFailure, W2SFastError
from w2s_fast.result import Hypothesis, SearchResult, Trace, Usage
from w2s_fast.scorer import ScoredCandidate
from w2s_fast.search import Beam, Request
from w2s_fast.text import decode_response


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
    trace = Trace(request.rounds()) if request.params.trace else None
    return SearchResult(hypotheses, _usage(request, beams), trace, stats=request.stats)


def failed(error: W2SFastError, request: Request | None = None) -> SearchResult:
    """The result of a request that failed, or was never taken on."""
    if request is None:
        return SearchResult([], Usage(0, 0, 0, 0), error=error)
    return SearchResult([], _usage(request, []), error=error, stats=request.stats)


def _hypothesis(
    request: Request, beam: Beam, tokenizer: PreTrainedTokenizerBase | None
) -> Hypothesis:
    assert beam.finish_reason is not None
    return Hypothesis(
        _text(request, beam, tokenizer),
        beam.tokens,
        request.score_of(beam),
        beam.finish_reason,
        beam.token_scores,
        beam.logprobs,
        _stop_reason(request, beam),
    )


def scored_candidate(
    tokenizer: PreTrainedTokenizerBase | None, request: Request, beam: Beam
) -> ScoredCandidate:
    """A candidate as scorers see it. Raises what the tokenizer does."""
    text = _text(request, beam, tokenizer)
    return ScoredCandidate(request.given, text, beam.tokens, beam.finish_reason is not None)


def _text(request: Request, beam: Beam, tokenizer: PreTrainedTokenizerBase | None) -> str | None:
    if tokenizer is None:
        return None
    params = request.params
    if beam.ending is not None:
        end = request.ended_texts[beam.ending]
        text: str = decode_response(tokenizer, request.prompt, beam.tokens) + end.rest
        return text + str(end.stop) if params.include_stop_str_in_output else text
    ended = beam.finish_reason == "eos" or (
        beam.finish_reason == "stop" and not params.include_stop_str_in_output
    )
    return decode_response(tokenizer, request.prompt, beam.tokens[:-1] if ended else beam.tokens)


def _stop_reason(request: Request, beam: Beam) -> str | int | None:
    if beam.ending is not None:
        return str(request.ended_texts[beam.ending].stop)
    return beam.tokens[-1] if beam.finish_reason == "stop" else None


def _usage(request: Request, beams: Sequence[Beam]) -> Usage:
    return Usage(
        prompt_tokens=len(request.prompt),
        completion_tokens=sum(len(beam.tokens) for beam in beams),
        sampled_tokens=request.beams.sampled,
        scored_tokens=request.beams.scored + request.foreign_tokens,
    )
