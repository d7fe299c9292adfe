"""Runs the demo's methods over held-out prompts and sums up what came out."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from w2s_fast.demo.gold import gold_reward
from w2s_fast.params import SearchParams
from w2s_fast.result import SearchResult

if TYPE_CHECKING:
    from w2s_fast import Engine

MAX_NEW_TOKENS = 60


@dataclass(frozen=True)
class Method:
    """A row of the demo's table."""

    name: str
    params: SearchParams


def demo_methods() -> list[Method]:
    """Plain sampling; tokens from all models' logits together; and two searches that sample 16
    candidates at a time."""
    common = SearchParams(method="sample", temperature=0.7, top_k=50, max_new_tokens=MAX_NEW_TOKENS)
    return [
        Method("base alone", common),
        Method("EFT beta=1", replace(common, method="fusion", beta=1.0)),
        Method("best-of-16", replace(common, method="bon", successors=16)),
        Method(
            "CBS W=4 K=4 L=5",
            replace(common, method="cbs", beam_width=4, successors=4, chunk_length=5),
        ),
    ]


@dataclass(frozen=True)
class Measurement:
    """What a method wrote, prompt by prompt, and how long all of it took.

    Attributes:
        rewards: gold reward of prompt and answer, one a prompt.
        fluency: the base's mean log-prob of the answer's tokens, in nats, one a prompt.
        seconds: wall time from the first prompt in to the last answer out, prefill included.
    """

    method: Method
    results: list[SearchResult]
    rewards: list[float]
    fluency: list[float]
    seconds: float

    @property
    def answer_tokens_per_s(self) -> float:
        """Tokens of the returned answers, over the wall time."""
        return sum(result.usage.completion_tokens for result in self.results) / self.seconds

    @property
    def sampled_tokens_per_s(self) -> float:
        """Tokens sampled from the base, those of discarded candidates included, likewise."""
        return sum(result.usage.sampled_tokens for result in self.results) / self.seconds


def measure(
    engine: Engine,
    method: Method,
    prompts: Sequence[str],
    seed: int,
    done: Callable[[], None] = lambda: None,
) -> Measurement:
    """Answers all prompts, each with a seed of its own; `done` is called after each.

    The first prompt's search is traced.
    """
    # Prompts that shared one seed would share their noise, and the confidence interval of their
    # mean would be wrong.
    seeds = random.Random(seed)
    params = [
        replace(method.params, seed=seeds.getrandbits(64), trace=i == 0)
        for i in range(len(prompts))
    ]
    results: list[SearchResult | None] = [None] * len(prompts)
    start = time.perf_counter()
    for index, result in engine.as_completed(prompts, params):
        if result.error is not None:
            raise result.error
        results[index] = result
        done()
    seconds = time.perf_counter() - start
    answers = [result for result in results if result is not None]
    return Measurement(
        method,
        answers,
        [gold_reward(prompt + (r.text or "")) for prompt, r in zip(prompts, answers, strict=True)],
        [statistics.fmean(r.hypotheses[0].token_logprobs) for r in answers],
        seconds,
    )


@dataclass(frozen=True)
class Mean:
    """A mean and the half-width of its 95 % confidence interval (NaN for a single value)."""

    value: float
    half_width: float

    def shown(self, ascii_only: bool = False) -> str:
        return f"{self.value:+.3f} {'+-' if ascii_only else '±'} {self.half_width:.3f}"


def mean_with_interval(values: Sequence[float]) -> Mean:
    """Mean of independent values with its 95 % interval by Student's t."""
    value = statistics.fmean(values)
    if len(values) < 2:
        return Mean(value, float("nan"))
    error = statistics.stdev(values) / len(values) ** 0.5
    return Mean(value, _t_quantile(len(values) - 1) * error)


def _t_quantile(freedom: int) -> float:
    """97.5 % quantile of Student's t by its expansion in 1/freedom (Abramowitz & Stegun 26.7.5).

    Off by less than 0.002 from 5 degrees of freedom on, too small below.
    """
    z = statistics.NormalDist().inv_cdf(0.975)
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3
