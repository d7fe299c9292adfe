"""Synthetic film, book and restaurant reviews: what the demo models are trained on.

Every sentence of a review is positive, negative or neutral independently of the others, given a
weak tilt of the whole review. Sentiment is therefore decided again every few tokens, which is the
case in which a search over chunks can do more than a choice among whole responses.
"""

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass

from w2s_fast.demo.grammar import COMMON, DOMAINS, OPENINGS, TITLE_FIRST, TITLE_SECOND

NEUTRAL_SHARE = 0.2  # of the sentences
TILT = 0.15  # a review's share of praise among its polar sentences is 0.5 +- at most this
HELD_OUT_EVERY = 5  # one title in so many is kept out of training


@dataclass(frozen=True)
class Review:
    """One review; `text` begins with `prompt`, which ends in mid-sentence without a space."""

    prompt: str
    text: str


def titles(held_out: bool) -> list[str]:
    """The titles of the training set, or those kept for evaluation; the two are disjoint."""
    return [
        f"{first} {second}"
        for i, first in enumerate(TITLE_FIRST)
        for j, second in enumerate(TITLE_SECOND)
        if ((i + j) % HELD_OUT_EVERY == 0) == held_out
    ]


TITLES = {held_out: titles(held_out) for held_out in (False, True)}


class _Writer:
    """Expands patterns for one review, without using a word or a pattern twice while it can."""

    def __init__(self, rng: random.Random, domain: str, held_out: bool):
        self.rng = rng
        self.held_out = held_out
        own = DOMAINS[domain]
        self.words = {name: COMMON.get(name, []) + own.get(name, []) for name in {*COMMON, *own}}
        self.words["title"] = TITLES[held_out]
        self.words["one"] = ["the " + word for word in self.words["singular"]]
        self.words["many"] = ["the " + word for word in self.words["plural"]]
        self.used: set[tuple[str, str]] = set()

    def expand(self, pattern: str, sign: str = "") -> str:
        """Fills the braces of `pattern`; `sign` is "+", "-" or "" for a neutral sentence."""
        return re.sub(r"\{(\w+)\}", lambda match: self.pick(match[1], sign), pattern)

    def pick(self, name: str, sign: str = "") -> str:
        """One expanded alternative of the entry `name`."""
        if name + sign in self.words:
            name += sign
        fresh = [word for word in self.words[name] if (name, word) not in self.used]
        choice = self.rng.choice(fresh or self.words[name])
        if choice:  # "" stands for leaving a word out, which may happen often
            self.used.add((name, choice))
        return self.expand(choice, sign)

    def sign(self, tilt: float) -> str:
        if self.rng.random() < NEUTRAL_SHARE:
            return ""
        return "+" if self.rng.random() < 0.5 + tilt else "-"

    def sentence(self, sign: str) -> str:
        return _tidy(self.pick("opinion" if sign else "fact", sign))


def _tidy(sentence: str) -> str:
    sentence = re.sub(r"\b([Aa]) (?=[aeio]|un|ug)", r"\1n ", sentence)
    return sentence[0].upper() + sentence[1:]


def _opening(writer: _Writer, domain: str) -> tuple[str, str]:
    """A prompt and the kind of its continuation."""
    patterns = OPENINGS[domain][2:] if writer.held_out else OPENINGS[domain]
    pattern, kind = writer.rng.choice(patterns)
    return writer.expand(pattern), kind


def write_review(rng: random.Random, held_out: bool = False) -> Review:
    """Draws one review; `held_out` says which of the two disjoint sets of titles it may name."""
    domain = rng.choice(sorted(DOMAINS))
    writer = _Writer(rng, domain, held_out)
    tilt = rng.uniform(-TILT, TILT)
    prompt, kind = _opening(writer, domain)
    sign = writer.sign(tilt)
    rest = writer.pick(f"{kind}_rest" + ("_opinion" if sign else ""), sign)
    sentences = [_tidy(prompt + rest)]
    sentences += [writer.sentence(writer.sign(tilt)) for _ in range(rng.randint(3, 5))]
    if rng.random() < 0.5:
        sign = "+" if rng.random() < 0.5 + tilt else "-"
        sentences.append(_tidy(writer.pick("ending", sign)))
    return Review(prompt, " ".join(sentences))


def reviews(seed: int, held_out: bool = False) -> Iterator[Review]:
    """Reviews without end; the same seed gives the same reviews."""
    rng = random.Random(seed)
    while True:
        yield write_review(rng, held_out)


def held_out_prompts(n: int, seed: int = 0) -> list[str]:
    """`n` different review openings whose titles no training review names."""
    prompts: dict[str, None] = {}  # a set that keeps its order
    for review in reviews(seed, held_out=True):
        if len(prompts) == n:
            break
        prompts[review.prompt] = None
    return list(prompts)
