"""What a request cost, and how an engine is doing."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal


@dataclass
class RequestStats:
    """Where one request spent its time; seconds of wall clock.

    A pass runs many requests at once and counts fully for each of them. On a GPU the host runs
    ahead of the device, so that time is found where the host waits: in decode and scoring.

    Attributes:
        queue_s: from its arrival to its first step, and while it was set aside.
        prefill_s: passes in which the base or a guide ran its prompt, or recomputed it.
        decode_s: all other passes of the base, with sampling and forks.
        scoring_s: passes of the guides over new tokens, and selections.
        rounds: selections; without a guide there is one, at the end.
        candidates: of all of them; kept: those that went on, or were the answer.
        set_aside: how often it gave up its pages and was recomputed.
        cached_tokens: prompt tokens that the base did not run for it, but found in the prefix
            cache: an earlier request ran them, or one that entered in the same step.
    """

    queue_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    scoring_s: float = 0.0
    rounds: int = 0
    candidates: int = 0
    kept: int = 0
    set_aside: int = 0
    cached_tokens: int = 0
    waiting_since: float = field(default_factory=time.perf_counter, repr=False)

    def arrive(self) -> None:
        """It begins to wait."""
        self.waiting_since = time.perf_counter()

    def enter(self) -> None:
        """It waits no longer."""
        now = time.perf_counter()
        self.queue_s += now - self.waiting_since
        self.waiting_since = now

    def wait(self) -> None:
        """It waits again."""
        self.arrive()
        self.set_aside += 1


Phase = Literal["prefill_s", "decode_s", "scoring_s"]


class timed:
    """For ``with``: add the time within to one phase of each of these; of ``begun`` to prefill."""

    __slots__ = ("_begin", "_begun", "_phase", "_stats")

    def __init__(
        self, phase: Phase, stats: Sequence[RequestStats], begun: Sequence[RequestStats] = ()
    ) -> None:
        self._phase = phase
        self._stats = stats
        self._begun = begun

    def __enter__(self) -> None:
        self._begin = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        elapsed = time.perf_counter() - self._begin
        for one in self._stats:
            setattr(one, self._phase, getattr(one, self._phase) + elapsed)
        for one in self._begun:
            one.prefill_s += elapsed


@dataclass(frozen=True)
class PoolStats:
    """Pages of one model.

    Attributes:
        used_pages: held by requests. cached_pages: of the prefix cache; those that no request
            holds are free for others. num_pages: all there are, of ``page_size`` tokens each.
        cache_lookup_tokens: of prompts that were looked for in the prefix cache.
        cache_hit_tokens: those that were found.
    """

    used_pages: int
    cached_pages: int
    num_pages: int
    page_size: int
    cache_lookup_tokens: int
    cache_hit_tokens: int


@dataclass(frozen=True)
class EngineStats:
    """An engine since it was made.

    Attributes:
        waiting, running: requests that have not ended.
        finished: requests that ended with a result.
        failed: requests that ended with an error.
        aborted: requests that their callers gave up.
        set_aside: how often a request gave up its pages for others and was recomputed.
        steps: times that all running requests, or of many rows those of one cohort, went a step
            further; a step is a round or, with long chunks, a part of one.
        rounds: selections, of all requests together.
        busy_s: seconds within steps.
        sampled_tokens: by the base.
        scored_tokens: by each guide.
        passes: passes of the base.
        rows: rows of all those passes together; a prompt is one.
        max_rows: candidates that take part in one step at most; one request may have more.
        pools: by the models' names.
    """

    waiting: int
    running: int
    finished: int
    failed: int
    aborted: int
    set_aside: int
    steps: int
    rounds: int
    busy_s: float
    sampled_tokens: int
    scored_tokens: int
    rows: int
    passes: int
    max_rows: int
    pools: dict[str, PoolStats]

    @property
    def steps_per_s(self) -> float:
        """Steps in a second of work."""
        return self.steps / self.busy_s if self.busy_s else 0.0

    @property
    def rounds_per_s(self) -> float:
        """Rounds of single requests in a second of work."""
        return self.rounds / self.busy_s if self.busy_s else 0.0

    @property
    def tokens_per_s(self) -> float:
        """Sampled tokens in a second of work."""
        return self.sampled_tokens / self.busy_s if self.busy_s else 0.0

    @property
    def rows_per_pass(self) -> float:
        """Rows that a pass of the base had on average."""
        return self.rows / self.passes if self.passes else 0.0
