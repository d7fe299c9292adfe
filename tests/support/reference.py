"""The search, written naively from its definition: the tests' second opinion.

One sequence at a time, whole sequences through the models' own eager forward, no KV cache, no
batching, plain loops and numpy. Only the noise function is shared with the package, since the
noise is part of the definition. Everything else here is written apart from it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, TypeAlias

import numpy as np
import torch
from transformers import PreTrainedModel

from tests.support.stop_reference import completes, text_end
from w2s_fast.kernels.noise import seed_bits, uniform, uniform_of_round
from w2s_fast.params import SearchParams

WEIGHT_ONE = 2**40

# A guide's prompt: one for both of its models, or (for tuned, for untuned).
GuidePrompt: TypeAlias = list[int] | tuple[list[int], list[int]]


@dataclass
class ReferenceGuide:
    """Two models and a weight; the models are put through `forward` below. Without an untuned one
    the tuned one's log-probs count alone."""

    tuned: PreTrainedModel
    untuned: PreTrainedModel | None
    weight: float = 1.0


@dataclass
class ReferenceHypothesis:
    """A partial or whole response. ``parent`` is its place among the previous round's kept."""

    token_ids: list[int] = field(default_factory=list)
    token_scores: list[float] = field(default_factory=list)
    token_logprobs: list[float] = field(default_factory=list)
    finish_reason: str | None = None
    score: float | None = None
    parent: int | None = None
    text: str | None = None  # of one that a stop string ended
    drawn: int = 0  # tokens of this round, whether they were kept or not


@dataclass
class ReferenceRound:
    candidates: list[ReferenceHypothesis]
    kept: list[int]


@dataclass
class ReferenceResult:
    hypotheses: list[ReferenceHypothesis]
    rounds: list[ReferenceRound]
    prompt_tokens: int
    completion_tokens: int
    sampled_tokens: int
    scored_tokens: int
    # The smallest difference between a score that was kept and the best one that was not, and
    # the smallest distance of a draw from the edge of its token's interval: where either is
    # within rounding error, another implementation may rightly decide otherwise.
    score_margin: float
    draw_margin: float


@torch.no_grad()
def forward(model: PreTrainedModel, token_ids: Sequence[int], vocab_size: int) -> np.ndarray:
    """Logits float32 [T, vocab_size] of a whole sequence, padded ids cut off."""
    assert model.config._attn_implementation == "eager"
    ids = torch.tensor([list(token_ids)])
    logits = model(input_ids=ids, use_cache=False).logits[0]
    return logits[:, :vocab_size].float().numpy()


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Of one row, in float32."""
    shifted = (logits - logits.max()).astype(np.float32)
    return shifted - np.log(np.exp(shifted).sum(dtype=np.float32))


def sampling_weights(
    logits: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float
) -> list[int]:
    """The warped distribution of a row as integers, temperature > 0."""
    scaled = (logits - logits.max()) / np.float32(temperature)
    with np.errstate(under="ignore"):
        weights = [math.floor(float(e) * WEIGHT_ONE) for e in np.exp(scaled)]
    if top_k > 0:
        kth = sorted(logits.tolist(), reverse=True)[min(top_k, len(logits)) - 1]
        weights = [w if x >= kth else 0 for w, x in zip(weights, logits.tolist(), strict=True)]
    if top_p < 1:
        total = sum(weights)
        for threshold in sorted({w for w in weights if w > 0}, reverse=True):
            if sum(w for w in weights if w >= threshold) >= top_p * total:
                weights = [w if w >= threshold else 0 for w in weights]
                break
    largest = max(weights)
    return [w if w >= min_p * largest else 0 for w in weights]


def sample_with_margin(
    logits: np.ndarray,
    *,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    seed: int,
    candidate: int,
    position: int,
) -> tuple[int, float]:
    """The token of a row, and how far the draw was from another token, as a probability."""
    logits = logits.astype(np.float32)
    if temperature == 0:
        ordered = np.sort(logits)[::-1]
        gap = float(ordered[0] - ordered[1]) if len(ordered) > 1 else math.inf
        return int(logits.argmax()), gap
    weights = sampling_weights(logits, temperature, top_k, top_p, min_p)
    total = sum(weights)
    keys = (torch.tensor([x]) for x in (seed_bits(seed), candidate, position))
    target = int(uniform(*keys).item() * total)
    running = 0
    for token, weight in enumerate(weights):
        if running <= target < running + weight:
            return token, min(target - running, running + weight - target) / total
        running += weight
    raise AssertionError("the draw lies outside of the distribution")


def sample_token(
    logits: np.ndarray,
    *,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    seed: int,
    candidate: int,
    position: int,
) -> int:
    """The token of a row: the first whose running weight exceeds floor(u * total)."""
    return sample_with_margin(
        logits,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seed=seed,
        candidate=candidate,
        position=position,
    )[0]


def softmax(logits: np.ndarray) -> np.ndarray:
    """Of one row, in float64."""
    weights = np.exp(logits.astype(np.float64) - float(logits.max()))
    return weights / weights.sum()


def kl(p: np.ndarray, q: np.ndarray) -> float:
    """KL(p || q), from its definition."""
    there = p > 0
    return float((p[there] * np.log(p[there] / q[there])).sum())


def choose_beta(
    base: np.ndarray, pairs: Sequence[tuple[np.ndarray, np.ndarray]]
) -> tuple[list[float], float]:
    """Dynamic logit fusion: the betas of a token, of which one is not 0 at most, by the KLs as they
    are written; and by how much the best value of the objective beats the next one."""
    found = []
    for guide, (tuned, untuned) in enumerate(pairs):
        p, q, q_tuned = softmax(base), softmax(untuned), softmax(tuned)
        for step in range(21):
            shifted = softmax(base.astype(np.float64) + step / 10 * (tuned - untuned))
            forward = kl(shifted, p) - kl(q_tuned, q)
            backward = kl(p, shifted) - kl(q, q_tuned)
            found.append((forward**2 + backward**2, guide, step))
    (best, guide, step), second, *_ = sorted(found)
    betas = [0.0] * len(pairs)
    betas[guide] = step / 10
    return betas, second[0] - best


class Reference:
    """One base and its guides; `search` answers one request."""

    def __init__(
        self,
        base: PreTrainedModel,
        guides: Sequence[ReferenceGuide],
        *,
        vocab_size: int,
        eos_token_ids: Sequence[int],
        scorers: Sequence[tuple[Callable[[list[int], bool], float], float]] = (),
        tokenizer: Any = None,
    ) -> None:
        """``scorers``: of a response's tokens, and whether it has ended; each with its weight.
        ``tokenizer``: where stop strings are asked for."""
        self.tokenizer = tokenizer
        self.scorers = list(scorers)
        self.base = base
        self.guides = list(guides)
        self.vocab_size = vocab_size
        self.eos_token_ids = list(eos_token_ids)
        self._logits: dict[tuple[int, ...], np.ndarray] = {}

    def next_logits(self, token_ids: list[int], model: PreTrainedModel | None = None) -> np.ndarray:
        """The logits of a model, the base's if it is None, after a sequence. The same sequence is
        computed once."""
        model = self.base if model is None else model
        key = (id(model), *token_ids)
        if key not in self._logits:
            self._logits[key] = forward(model, token_ids, self.vocab_size)[-1]
        return self._logits[key]

    def fused_logits(
        self,
        prompt: list[int],
        prompts: Sequence[GuidePrompt],
        tokens: list[int],
        p: SearchParams,
        base: np.ndarray | None = None,
    ) -> tuple[np.ndarray, float]:
        """The logits that a fused token is drawn from, float32; and how clear the choice of dynamic
        betas was. ``base``: the base's, where some tokens are barred."""
        base = self.next_logits(prompt + tokens) if base is None else base
        pairs = []
        for guide, own in zip(self.guides, prompts, strict=True):
            of_tuned, of_untuned = own if isinstance(own, tuple) else (own, own)
            tuned = self.next_logits(of_tuned + tokens, guide.tuned)
            if guide.untuned is not None:
                untuned = self.next_logits(of_untuned + tokens, guide.untuned)
            else:
                tuned, untuned = log_softmax(tuned), np.zeros_like(tuned)
            pairs.append((tuned, untuned))
        if p.fuses == "dynamic_fusion":
            betas, clear = choose_beta(base, pairs)
        else:
            clear = math.inf
            if p.beta is None:
                betas = [guide.weight for guide in self.guides]
            else:
                betas = list(p.beta) if isinstance(p.beta, tuple) else [p.beta] * len(self.guides)
        fused = base.astype(np.float64)
        for beta, (tuned, untuned) in zip(betas, pairs):
            fused = fused + beta * (tuned.astype(np.float64) - untuned)
        likely = softmax(base)
        fused[likely < p.plausibility * likely.max()] = -np.inf
        if p.plausibility > 0:
            clear = min(clear, float(np.abs(likely / likely.max() - p.plausibility).min()))
        return fused.astype(np.float32), clear

    def token_scores(self, prompts: Sequence[GuidePrompt], response: list[int]) -> list[float]:
        """Each response token's part of the score: sum_g weight_g * (lp_tuned - lp_untuned).

        ``prompts``: one for each guide.
        """
        scores = [0.0] * len(response) if self.guides else []
        for guide, prompt in zip(self.guides, prompts, strict=True):
            before_tuned, before_untuned = prompt if isinstance(prompt, tuple) else (prompt, prompt)
            tuned = forward(guide.tuned, before_tuned + response, self.vocab_size)
            untuned = None
            if guide.untuned is not None:
                untuned = forward(guide.untuned, before_untuned + response, self.vocab_size)
            for t, token in enumerate(response):
                # The logits that predict this token.
                liked = log_softmax(tuned[len(before_tuned) + t - 1])[token]
                plain = np.float32(0)
                if untuned is not None:
                    plain = log_softmax(untuned[len(before_untuned) + t - 1])[token]
                scores[t] += guide.weight * float(liked - plain)
        return scores

    def search(
        self,
        prompt: list[int],
        params: SearchParams,
        guide_prompts: Sequence[GuidePrompt] | None = None,
    ) -> ReferenceResult:
        """``guide_prompts``: the guides' own; else they are given the base's."""
        p = params
        guide_prompts = guide_prompts or [prompt] * len(self.guides)
        # Of every round that there can be: W, K and L.
        turns = range(p.max_new_tokens)
        successors = [_entry(p.successors, r) for r in turns]
        if p.method == "cbs":
            widths = [_entry(p.beam_width, r) for r in turns]
            chunks = [_entry(p.chunk_length, r) or p.max_new_tokens for r in turns]
            first = widths[0] * successors[0]
            # Where no round ever has a choice, nothing is scored.
            rounds_at_most = next(r + 1 for r in turns if sum(chunks[: r + 1]) >= p.max_new_tokens)
            if p.chunk_stop:  # each of them brings a token
                rounds_at_most = p.max_new_tokens
            scored = (
                p.fuses is not None or first > 1 or any(k > 1 for k in successors[1:rounds_at_most])
            )
        elif p.method == "bon":
            widths, first, chunks, scored = [p.n], successors[0], [p.max_new_tokens], True
        else:
            widths, first, chunks, scored = [p.n], p.n, [p.max_new_tokens], p.fuses is not None

        rounds: list[ReferenceRound] = []
        kept: list[ReferenceHypothesis] = []
        sampled_tokens = 0
        score_margin, draw_margin = math.inf, math.inf
        while not kept or any(h.finish_reason is None for h in kept):
            turn = len(rounds)
            width, chunk = widths[turn], chunks[turn]
            # Expand. Each entry is the place of a candidate's parent, and the parent.
            origins: list[tuple[int | None, ReferenceHypothesis]] = []
            if not rounds:
                origins = [(None, ReferenceHypothesis())] * first
            else:
                for parent, hypothesis in enumerate(kept):
                    held = hypothesis.finish_reason is not None and p.finished == "hold"
                    origins += [(parent, hypothesis)] * (1 if held else successors[turn])
            candidates = []
            for index, (place, origin) in enumerate(origins):
                child, margin = self._extend(prompt, guide_prompts, origin, p, index, chunk)
                child.parent = place
                sampled_tokens += child.drawn
                draw_margin = min(draw_margin, margin)
                candidates.append(child)

            # Score.
            if scored:
                seen: dict[tuple[int, ...], list[float]] = {}
                for child in candidates:
                    key = tuple(child.token_ids)
                    if key not in seen:
                        seen[key] = self.token_scores(guide_prompts, child.token_ids)
                    child.token_scores = seen[key]
                    child.score = math.fsum(seen[key])
                    if p.score == "mean":
                        child.score /= max(1, len(child.token_ids))
                    for scorer, weight in self.scorers:
                        ended = child.finish_reason is not None
                        child.score += weight * scorer(child.token_ids, ended)

            # Select.
            eligible = list(range(len(candidates)))
            if p.dedup and scored:
                texts = [c.token_ids for c in candidates]
                eligible = [i for i in eligible if texts[i] not in texts[:i]]
            if scored and p.method in ("cbs", "bon"):
                eligible.sort(key=lambda i: (-_score(candidates[i]), i))
                score_margin = min(score_margin, _margin(candidates, eligible, width))
            chosen = eligible[:width]
            if scored and p.selection == "resample":
                ranked = _margin(candidates, eligible, len(eligible))
                drawn, margin = _resample(candidates, eligible, width, p, turn + 1)
                chosen = [i for i in eligible for _ in range(drawn.count(i))]
                score_margin, draw_margin = min(score_margin, ranked), min(draw_margin, margin)
            rounds.append(ReferenceRound(candidates, chosen))
            kept = [candidates[i] for i in chosen]

        hypotheses = kept[: p.n]
        return ReferenceResult(
            hypotheses=hypotheses,
            rounds=rounds,
            prompt_tokens=len(prompt),
            completion_tokens=sum(len(h.token_ids) for h in hypotheses),
            sampled_tokens=sampled_tokens,
            scored_tokens=sampled_tokens if scored and self.guides else 0,
            score_margin=score_margin,
            draw_margin=draw_margin,
        )

    def _extend(
        self,
        prompt: list[int],
        guide_prompts: Sequence[GuidePrompt],
        origin: ReferenceHypothesis,
        p: SearchParams,
        candidate: int,
        chunk: int,
    ) -> tuple[ReferenceHypothesis, float]:
        tokens, logprobs = list(origin.token_ids), list(origin.token_logprobs)
        finish, margin = origin.finish_reason, math.inf
        for _ in range(chunk):
            if finish is not None:
                break
            own, clear = self.next_logits(prompt + tokens), math.inf
            logits = own.copy()
            if len(tokens) < p.min_new_tokens:
                ending = [] if p.ignore_eos else self.eos_token_ids
                logits[[*ending, *p.stop_token_ids]] = -np.inf
            if p.fuses is not None:
                logits, clear = self.fused_logits(prompt, guide_prompts, tokens, p, logits)
            token, distance = sample_with_margin(
                logits,
                temperature=p.temperature,
                top_k=p.top_k,
                top_p=p.top_p,
                min_p=p.min_p,
                seed=p.seed,
                candidate=candidate,
                position=len(tokens),
            )
            margin = min(margin, distance, clear)
            tokens.append(token)
            logprobs.append(float(log_softmax(own)[token]))
            if token in self.eos_token_ids and not p.ignore_eos:
                finish = "eos"
            elif token in p.stop_token_ids:
                finish = "stop"
            elif len(tokens) == p.max_new_tokens:
                finish = "length"
            chunk_may_end = finish is None and p.chunk_stop
            if chunk_may_end and completes(self.tokenizer, prompt, tokens, p.chunk_stop):
                break
        drawn = len(tokens) - len(origin.token_ids)
        child = ReferenceHypothesis(
            token_ids=tokens, token_logprobs=logprobs, finish_reason=finish, text=origin.text,
            drawn=drawn,
        )  # fmt: skip
        if p.stop and drawn:
            whole = tokens[:-1] if finish in ("eos", "stop") else tokens
            end = text_end(self.tokenizer, prompt, whole, p.stop, p.min_new_tokens)
            if end is not None:
                kept, child.text, _ = end
                child.token_ids, child.token_logprobs = tokens[:kept], logprobs[:kept]
                child.finish_reason = "stop"
        return child, margin


def _resample(
    candidates: list[ReferenceHypothesis],
    eligible: list[int],
    width: int,
    p: SearchParams,
    number: int,
) -> tuple[list[int], float]:
    """Systematic resampling, point by point; and how near a point came to the edge of a share."""
    eligible = sorted(eligible)
    best = max(_score(candidates[i]) for i in eligible)
    weights = [math.exp((_score(candidates[i]) - best) / p.tau) for i in eligible]
    drawn, margin = [], math.inf
    for k in range(width):
        point = (uniform_of_round(seed_bits(p.seed), number) + k) / width * math.fsum(weights)
        running = 0.0
        for i, weight in zip(eligible, weights, strict=True):
            if running <= point < running + weight:
                drawn.append(i)
            margin = min(margin, abs(point - running - weight))
            running += weight
    return drawn, margin


def _entry(value: Any, turn: int) -> Any:
    """Of a number for all rounds, or of a sequence whose last entry goes on."""
    if not isinstance(value, (list, tuple)):
        return value
    return value[turn] if turn < len(value) else value[-1]


def _score(candidate: ReferenceHypothesis) -> float:
    assert candidate.score is not None
    return candidate.score


def _margin(candidates: list[ReferenceHypothesis], ranked: list[int], width: int) -> float:
    """The smallest gap between neighbours in rank down to the first that is not kept."""
    gaps = [math.inf]
    for better, worse in pairwise(ranked[: width + 1]):
        if candidates[better].token_ids != candidates[worse].token_ids:
            gaps.append(_score(candidates[better]) - _score(candidates[worse]))
    return min(gaps)
