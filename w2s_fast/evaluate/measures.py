"""What is measured of a method's answers: reward, fluency, variety, speed."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from w2s_fast.demo import Mean, mean_with_interval

NGRAMS = (1, 2, 3)


@dataclass(frozen=True)
class Answer:
    """One answer, and what it took.

    Attributes:
        prompt: which one it answers, from 0; several seeds answer the same.
        reward: the gold reward. fluency: the base's mean log-prob of its tokens, in nats; None for
            an answer without tokens.
        tokens: of the answer. sampled: those of discarded candidates included.
        seconds: its share of the wall time.
    """

    prompt: int
    text: str
    reward: float
    fluency: float | None
    tokens: int
    sampled: int
    seconds: float


@dataclass(frozen=True)
class Row:
    """A method's row in a table.

    A prompt's value is the mean over its seeds; intervals are of 95 %, by Student's t over prompts,
    which are independent of each other, as seeds of one prompt are not.

    Attributes:
        base, method: names.
        prompts, seeds: how many there are.
        reward: mean of the gold reward.
        over_base, over_best: how much more reward than the base alone, and than best-of-N, prompt
            by prompt; None for those themselves.
        fluency: mean over prompts, in nats a token; the likelier the base finds its answers, the
            nearer to 0.
        fluency_change: against the base alone, in percent; above 0: likelier.
        distinct: for n = 1, 2, 3, distinct n-grams of words by all n-grams of all answers.
        length: mean tokens of an answer.
        answer_tokens_per_s, sampled_tokens_per_s: over the wall time of the method.
        cost: wall time of an answer's token by that of the base alone.
    """

    base: str
    method: str
    prompts: int
    seeds: int
    reward: Mean
    over_base: Mean | None
    over_best: Mean | None
    fluency: float
    fluency_change: float
    distinct: tuple[float, ...]
    length: float
    answer_tokens_per_s: float
    sampled_tokens_per_s: float
    cost: float


def measured(
    base: str, answers: dict[str, list[Answer]], first: str, best: str | None
) -> list[Row]:
    """One row a method.

    Args:
        base: its name. answers: of each method.
        first: the method that others are compared with in fluency and cost. best: best-of-N, if it
            is among them.
    """
    rewards = {name: _by_prompt(own, lambda a: a.reward) for name, own in answers.items()}
    fluency = {
        name: statistics.fmean(_by_prompt(own, lambda a: a.fluency).values())
        for name, own in answers.items()
    }
    of_base = fluency[first]
    pace = _seconds(answers[first]) / _tokens(answers[first])
    rows = []
    for name, own in answers.items():
        tokens, seconds = _tokens(own), _seconds(own)
        prompts = {answer.prompt for answer in own}
        rows.append(
            Row(
                base=base,
                method=name,
                prompts=len(prompts),
                seeds=len(own) // len(prompts),
                reward=mean_with_interval(list(rewards[name].values())),
                over_base=_gap(rewards, name, first),
                over_best=_gap(rewards, name, best),
                fluency=fluency[name],
                fluency_change=100 * (fluency[name] - of_base) / abs(of_base),
                distinct=tuple(distinct_ngrams([a.text for a in own], n) for n in NGRAMS),
                length=tokens / len(own),
                answer_tokens_per_s=tokens / seconds,
                sampled_tokens_per_s=sum(answer.sampled for answer in own) / seconds,
                cost=seconds / tokens / pace,
            )
        )
    return rows


def distinct_ngrams(texts: Sequence[str], n: int) -> float:
    """Distinct n-grams of lower-case words by all of them; 1 where there are none."""
    found = [
        tuple(words[i : i + n])
        for words in (text.lower().split() for text in texts)
        for i in range(len(words) - n + 1)
    ]
    return len(set(found)) / len(found) if found else 1.0


def _by_prompt(
    answers: Sequence[Answer], value: Callable[[Answer], float | None]
) -> dict[int, float]:
    """The mean over a prompt's seeds, as far as they have the value."""
    found: dict[int, list[float]] = {}
    for answer in answers:
        if (one := value(answer)) is not None:
            found.setdefault(answer.prompt, []).append(one)
    return {prompt: statistics.fmean(found[prompt]) for prompt in sorted(found)}


def _gap(rewards: dict[str, dict[int, float]], name: str, other: str | None) -> Mean | None:
    if other is None or name == other or other not in rewards:
        return None
    both = [prompt for prompt in rewards[name] if prompt in rewards[other]]
    return mean_with_interval([rewards[name][p] - rewards[other][p] for p in both])


def _tokens(answers: Sequence[Answer]) -> int:
    return max(1, sum(answer.tokens for answer in answers))


def _seconds(answers: Sequence[Answer]) -> float:
    return max(1e-9, sum(answer.seconds for answer in answers))
