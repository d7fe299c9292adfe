"""The gold reward: VADER's sentiment, averaged over sentences.

It ranks the preference pairs that the tuned guide is trained on, and evaluates results. No search
ever sees it.
"""

import re
from functools import cache
from typing import Any

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


@cache
def _analyzer() -> Any:  # vaderSentiment carries no types
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()


def sentences(text: str) -> list[str]:
    """Splits after ".", "!" and "?"; a last sentence that was cut off counts only if alone."""
    parts = [part for part in _SENTENCE_END.split(text.strip()) if part]
    if len(parts) > 1 and parts[-1][-1] not in ".!?":
        parts.pop()
    return parts


def gold_reward(text: str) -> float:
    """Mean over the sentences of `text` of VADER's compound score, in [-1, 1]; 0 for no text.

    A whole review's compound score grows with its number of kind words and saturates near 1 after
    a few; the mean over sentences does not, for one dull sentence keeps it down.
    """
    parts = sentences(text)
    if not parts:
        return 0.0
    compounds: list[float] = [_analyzer().polarity_scores(part)["compound"] for part in parts]
    return sum(compounds) / len(compounds)
