"""The search over a server's plain HTTP API, written naively: the tests' second opinion.

A request for each hypothesis, whole texts through whole models, lists of strings. The seeds of
requests are the package's, since they are part of the definition.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import httpx2
import numpy as np
import pytest

from tests.support.foreign_guides import anew
from w2s_fast import Guide, SearchParams, SearchResult
from w2s_fast.kernels.noise import seed_bits, uniform_of_round
from w2s_fast.search.remote_side import _seed

LAST = "\ufffd"


@dataclass
class Hypothesis:
    """A response. ``tokens``: sampled for it; ``in_vain``: for chunks that brought nothing."""

    text: str = ""
    reason: str | None = None
    stop: str | None = None
    tokens: int = 0
    in_vain: int = 0
    score: float | None = None
    parent: int | None = None

    @property
    def key(self) -> tuple[str, bool]:
        return self.text, self.reason == "eos"


@dataclass
class Found:
    rounds: list[tuple[list[Hypothesis], list[int]]] = field(default_factory=list)
    hypotheses: list[Hypothesis] = field(default_factory=list)
    requests: int = 0
    read: int = 0
    sampled: int = 0
    margin: float = math.inf  # the smallest difference of two scores that decided


class RemoteReference:
    """A server, and guides that read texts."""

    def __init__(
        self,
        url: str,
        guides: Sequence[Guide] = (),
        scorers: Sequence[tuple[Callable[[str, bool], float], float]] = (),
        model: str = "words",
    ) -> None:
        self._url, self._model = url, model
        self._guides, self._scorers = guides, scorers
        self._http = httpx2.Client(timeout=60)
        self._scores: dict[tuple[str, str, bool], float] = {}

    def search(self, prompt: str, p: SearchParams) -> Found:
        found, kept, number = Found(), [Hypothesis()], 0
        ranks = p.uses_guides and bool(self._guides or self._scorers)
        while any(h.reason is None for h in kept):
            number += 1
            candidates: list[Hypothesis] = []
            for place, parent in enumerate(kept):
                copies = _of(p.successors, number)
                if number == 1:
                    copies = p.first_candidates
                parent_place = None if number == 1 else place
                if parent.reason is not None:
                    copies = copies if p.finished == "replicate" else 1
                    own = Hypothesis(**{**vars(parent), "parent": parent_place})
                    candidates += [own] * copies
                    continue
                chunk = p.max_new_tokens - parent.tokens
                if p.method == "cbs" and p.uses_guides:
                    length = _of(p.chunk_length, number) or p.max_new_tokens
                    chunk = min(chunk, length + parent.in_vain)
                seed = _seed(p.seed, number, place)
                answer = self._ask(prompt + parent.text, copies, chunk, seed, p, found)
                for text, ended, tokens in answer:
                    child = self._grown(parent, text, ended, tokens, p)
                    child.parent = parent_place
                    candidates.append(child)
            width = _of(p.beam_width, number) if p.method == "cbs" else p.n
            order = list(range(len(candidates)))
            if ranks:
                order = self._select(prompt, candidates, width, number, p, found)
            order = order[:width]
            found.rounds.append((candidates, order))
            kept = [candidates[i] for i in order]
        found.hypotheses = kept[: p.n]
        return found

    def _ask(
        self, text: str, n: int, length: int, seed: int, p: SearchParams, found: Found
    ) -> list[tuple[str, bool, int]]:
        """Texts, whether they have ended, and how many tokens they are."""
        own = 1 if p.temperature == 0 else n
        body: dict[str, Any] = {"model": self._model, "prompt": text, "n": own}
        body |= {"max_tokens": length, "seed": seed, "temperature": p.temperature}
        if p.temperature > 0:
            body |= {"top_k": p.top_k, "top_p": p.top_p, "min_p": p.min_p}
        answer = self._http.post(f"{self._url}/completions", json=body).raise_for_status().json()
        found.requests += 1
        found.read += answer["usage"]["prompt_tokens"]
        found.sampled += (sampled := answer["usage"]["completion_tokens"])
        ended = [choice["finish_reason"] == "stop" for choice in answer["choices"]]
        # Of those that ended only all together are known: shared out by what they say.
        rest = sampled - length * ended.count(False)
        texts = [choice["text"] for choice in answer["choices"]]
        sizes = [(len(text.encode()) + 1) * has for text, has in zip(texts, ended, strict=True)]
        shares = [rest * sum(sizes[:i]) // (sum(sizes) or 1) for i in range(len(sizes) + 1)]
        own_tokens = [b - a if has else length for (a, b), has in zip(pairwise(shares), ended)]
        return list(zip(texts, ended, own_tokens)) * (n // own)

    def _grown(
        self, parent: Hypothesis, new: str, ended: bool, tokens: int, p: SearchParams
    ) -> Hypothesis:
        last = parent.tokens + tokens >= p.max_new_tokens
        if not ended and not last:
            new = new.rstrip(LAST)
        text = parent.text + new
        reason = "eos" if ended else "length" if last else None
        size = len(new.encode()) + ended
        cut = min(
            (at + len(s) for s in p.chunk_stop if (at := _first(text, s, len(parent.text))) >= 0),
            default=None,
        )
        stop = min(
            (
                (at + len(s), -len(s), s)
                for s in p.stop
                if (at := _first(text[:cut], s, len(parent.text))) >= 0
            ),
            default=None,
        )
        if stop is not None:
            text = text[: stop[0] + stop[1]]
            return Hypothesis(text, "stop", stop[2], parent.tokens + tokens)
        if cut is not None:
            kept = len(text[len(parent.text) : cut].encode())
            if kept < size:
                tokens = math.ceil(tokens * kept / size)
            over = parent.tokens + tokens >= p.max_new_tokens
            return Hypothesis(text[:cut], "length" if over else None, None, parent.tokens + tokens)
        child = Hypothesis(text, reason, None, parent.tokens + tokens)
        child.in_vain = 0 if new or ended else parent.in_vain + tokens
        return child

    def _select(
        self,
        prompt: str,
        candidates: Sequence[Hypothesis],
        width: int,
        number: int,
        p: SearchParams,
        found: Found,
    ) -> list[int]:
        for c in candidates:
            c.score = self.score(prompt, c)
            if p.score == "mean":
                c.score /= max(1, c.tokens)
            for scorer, weight in self._scorers:
                c.score += weight * scorer(c.text, c.reason is not None)
        order = list(range(len(candidates)))
        if p.dedup:
            keys = [c.key for c in candidates]
            order = [i for i in order if keys[i] not in keys[:i]]
        order.sort(key=lambda i: (-(candidates[i].score or 0.0), i))
        if p.selection == "resample":
            values = np.array([candidates[i].score for i in order])
            weights = np.exp((values - values.max()) / p.tau)
            edges = np.cumsum(weights) / weights.sum()
            # Shares lie in the order of the candidates.
            by_index = sorted(order)
            shares = dict(zip(order, (weights / weights.sum()).tolist()))
            edges = np.cumsum([shares[i] for i in by_index])
            points = (uniform_of_round(seed_bits(p.seed), number) + np.arange(width)) / width
            chosen = [by_index[int(np.searchsorted(edges, x, side="right"))] for x in points]
            found.margin = min(found.margin, float(np.abs(points[:, None] - edges).min()))
            return [i for i in order for _ in range(chosen.count(i))]
        for better, worse in pairwise(order[: width + 1]):
            if candidates[better].key != candidates[worse].key:
                gap = (candidates[better].score or 0.0) - (candidates[worse].score or 0.0)
                found.margin = min(found.margin, gap)
        return order

    def score(self, prompt: str, c: Hypothesis) -> float:
        key = (prompt, *c.key)
        if key not in self._scores:
            own = (anew(guide, prompt, *c.key) for guide in self._guides)
            self._scores[key] = sum(own)
        return self._scores[key]


def _of(value: Any, number: int) -> Any:
    """The entry of a round, from 1."""
    return value[min(number, len(value)) - 1] if isinstance(value, tuple) else value


def _first(text: str, string: str, known: int) -> int:
    """Where a string first ends behind what is known."""
    return text.find(string, max(0, known - len(string) + 1))


def assert_same(result: SearchResult, expected: Found) -> None:
    """That a search has found what the reference has."""
    assert result.error is None, result.error
    assert result.trace is not None
    assert expected.margin > 1e-4, "another seed is needed: rounding decides"
    for number, (ours, (theirs, kept)) in enumerate(
        zip(result.trace.rounds, expected.rounds, strict=True), 1
    ):
        for i, (a, b) in enumerate(zip(ours.candidates, theirs, strict=True)):
            where = f"round {number}, candidate {i}"
            assert (a.text, a.parent, a.finish_reason) == (b.text, b.parent, b.reason), where
            assert a.token_ids == []
            _close(a.score, b.score)
        assert list(ours.kept) == kept, number
    for h, theirs_h in zip(result.hypotheses, expected.hypotheses, strict=True):
        assert (h.text, h.finish_reason, h.stop_reason) == (
            theirs_h.text, theirs_h.reason, theirs_h.stop,
        )  # fmt: skip
        _close(h.score, theirs_h.score)
        assert h.token_ids == [] and h.token_scores == [] and h.token_logprobs == []


def _close(ours: float | None, theirs: float | None) -> None:
    assert ours is theirs if theirs is None else ours == pytest.approx(theirs, abs=1e-4)
