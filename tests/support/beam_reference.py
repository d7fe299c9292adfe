"""Beam search of the base, written naively from its definition: a second opinion beside
transformers' own.

Whole sequences through the model's own eager forward, plain lists, and every continuation of every
beam is looked at.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import pairwise

from tests.support.reference import Reference, log_softmax
from tests.support.stop_reference import text_end
from w2s_fast import SearchParams


@dataclass
class ReferenceBeam:
    """A response so far. ``score``: its log-prob, and once it has ended what it is ranked by."""

    token_ids: list[int] = field(default_factory=list)
    token_logprobs: list[float] = field(default_factory=list)
    score: float = 0.0
    finish_reason: str | None = None
    text: str | None = None  # of one that a stop string ended
    kept: int | None = None  # of its tokens, which count all in what it is ranked by


@dataclass
class ReferenceBeams:
    """What a beam search returns.

    Attributes:
        sampled_tokens: of all beams that went on, or were kept when they ended.
        margin: the smallest difference that decided anything.
    """

    hypotheses: list[ReferenceBeam]
    sampled_tokens: int
    margin: float


def beam_search(reference: Reference, prompt: list[int], params: SearchParams) -> ReferenceBeams:
    """All as SearchParams defines it, with the base of ``reference``."""
    width, margin, sampled = params.beam_width, math.inf, 0
    running, ended = [ReferenceBeam()], list[ReferenceBeam]()
    while running:
        grown = [c for beam in running for c in _children(reference, prompt, beam, params)]
        grown.sort(key=lambda beam: -beam.score)
        running = [beam for beam in grown if beam.finish_reason is None][:width]
        # Of those behind, only the first one is near to being chosen.
        last = max([width, *(grown.index(beam) + 1 for beam in running)])
        margin = min(margin, _smallest_gap(grown[: last + 1]))
        just_ended = [beam for beam in grown[:width] if beam.finish_reason is not None]
        for beam in just_ended:
            beam.score = _normalised(beam.score, len(beam.token_ids), params)
        ended = sorted([*ended, *just_ended], key=lambda beam: -beam.score)
        margin = min(margin, _smallest_gap(ended))
        ended = ended[:width]
        if running and len(ended) == width:
            hope = _hope(running[0], params)
            margin = min(margin, abs(hope - ended[-1].score))
            if hope <= ended[-1].score:
                running = []
        for beam in just_ended:
            beam.token_ids = beam.token_ids[: beam.kept]
            beam.token_logprobs = beam.token_logprobs[: beam.kept]
        sampled += len(running) + sum(beam in ended for beam in just_ended)
    return ReferenceBeams(ended[: params.n], sampled, margin)


def _children(
    reference: Reference, prompt: list[int], beam: ReferenceBeam, params: SearchParams
) -> list[ReferenceBeam]:
    children = []
    row = log_softmax(reference.next_logits(prompt + beam.token_ids))
    for token, logprob in enumerate(row.tolist()):
        child = ReferenceBeam(
            [*beam.token_ids, token], [*beam.token_logprobs, logprob], beam.score + logprob
        )
        ends = token in params.stop_token_ids
        ends |= token in reference.eos_token_ids and not params.ignore_eos
        if ends and len(beam.token_ids) < params.min_new_tokens:
            continue
        if token in reference.eos_token_ids and not params.ignore_eos:
            child.finish_reason = "eos"
        elif token in params.stop_token_ids:
            child.finish_reason = "stop"
        elif len(child.token_ids) == params.max_new_tokens:
            child.finish_reason = "length"
        if params.stop and not ends:
            end = text_end(
                reference.tokenizer, prompt, child.token_ids, params.stop, params.min_new_tokens
            )
            if end is not None:
                kept, child.text, _ = end
                child.finish_reason, child.kept = "stop", kept
        children.append(child)
    return children


def _hope(best: ReferenceBeam, params: SearchParams) -> float:
    """What is expected of the best beam that goes on."""
    if params.early_stopping is True or params.beam_width == 1:
        return -math.inf
    longest = params.early_stopping == "never" and params.length_penalty > 0
    length = params.max_new_tokens if longest else len(best.token_ids)
    return _normalised(best.score, length, params)


def _normalised(logprob: float, length: int, params: SearchParams) -> float:
    return logprob / length**params.length_penalty


def _smallest_gap(ranked: list[ReferenceBeam]) -> float:
    return min((a.score - b.score for a, b in pairwise(ranked)), default=math.inf)
