"""What a search returns: SearchResult, Hypothesis, Usage, and the Trace of its rounds.

Of a remote base (:class:`w2s_fast.RemoteBase`) only texts are known: lists of token ids are empty,
and numbers of tokens are what its server says.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from w2s_fast.errors import W2SFastError
from w2s_fast.stats import RequestStats

FinishReason = Literal["eos", "stop", "length"]


@dataclass(frozen=True)
class Hypothesis:
    """One response.

    Attributes:
        text: the response without prompt, special tokens and stop token, up to a stop string if it
            ended with one; None if the engine has no tokenizer.
        token_ids: the sampled tokens, EOS or stop token included where one was sampled; where a
            stop string ended the text, those before the token that it begins in.
        score: guides' score of the whole response (a log-ratio in nats), plus the weighted values
            of the engine's scorers; None where neither said anything. Of beam search what ranks it:
            the base's log-prob of the whole, over its length to the power of ``length_penalty``.
        finish_reason: ``"eos"``, ``"stop"`` or ``"length"``.
        token_scores: each token's part of the score, in nats, as far as guides share the base's
            vocabulary; empty where none of them ran.
        token_logprobs: the base's own log-prob of each token, at temperature 1, unwarped.
        stop_reason: the stop string or the stop token that ended it; None for other reasons.
    """

    text: str | None
    token_ids: list[int]
    score: float | None
    finish_reason: FinishReason
    token_scores: list[float]
    token_logprobs: list[float]
    stop_reason: str | int | None = None


@dataclass(frozen=True)
class Candidate:
    """A hypothesis after expansion, before selection.

    Attributes:
        parent: index into the previous round's ``kept``; None in round 1.
        token_ids: the whole response so far.
        score: its score; None where nobody scores. Of beam search its log-prob as long as it can be
            extended, and then what ranks it.
        finish_reason: None while it can still be extended.
        text: of a remote base, the whole response so far; else None.
    """

    parent: int | None
    token_ids: list[int]
    score: float | None
    finish_reason: FinishReason | None
    text: str | None = None


@dataclass(frozen=True)
class Round:
    """One round: its candidates, and the indices of those kept, best first.

    A round of beam search is a token. Its candidates are the continuations that became beams, and
    those that ended before; kept are first those that go on, and then those that ended.
    """

    candidates: list[Candidate]
    kept: list[int]


@dataclass(frozen=True)
class Sample:
    """What a remote base's server gave for one candidate.

    Attributes:
        text: as it came. finish_reason: the server's; ``"length"``: it can go on.
        tokens: of it; shared out by their lengths where several of one answer have ended.
    """

    text: str
    finish_reason: str
    tokens: int


@dataclass(frozen=True)
class Draw:
    """What was asked of a remote base for one hypothesis of a round, and what came.

    Attributes:
        behind: the response that the samples go on from. max_tokens: of each sample.
        seed: of the first request that was sent for them.
        samples: one for each candidate, in their order.
        ended: why there are fewer than were asked for, or none; None: there are not.
    """

    behind: str
    max_tokens: int
    seed: int
    samples: list[Sample]
    ended: str | None = None


@dataclass(frozen=True)
class Trace:
    """The search tree of one request.

    Attributes:
        prompt: of a remote base, as its server was sent it: a text, or messages.
        draws: of a remote base, by round, for each hypothesis that went on: enough to search again
            without the server (:meth:`w2s_fast.RemoteBase.replay`).
    """

    rounds: list[Round] = field(default_factory=list)
    prompt: Any = None
    draws: list[list[Draw]] = field(default_factory=list)


@dataclass(frozen=True)
class RemoteUsage:
    """What a remote base's server was asked for one request, as it counts itself.

    Attributes:
        requests: sent to it, those that were tried again included.
        prompt_tokens: read by it, each time anew. cached_tokens: those of them that it had already.
        completion_tokens: sampled.
        cost: of these, where prices were given.
    """

    requests: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    cost: float | None = None


@dataclass(frozen=True)
class Usage:
    """Tokens of one request.

    Attributes:
        prompt_tokens: of the base's prompt.
        completion_tokens: of the returned hypotheses together.
        sampled_tokens: sampled from the base, losers' tokens included; of beam search, those that
            beams were continued by.
        scored_tokens: run through each guide; of guides of other vocabularies, through the first.
        remote: what a remote base's server was asked; None: the base runs here.
    """

    prompt_tokens: int
    completion_tokens: int
    sampled_tokens: int
    scored_tokens: int
    remote: RemoteUsage | None = None


@dataclass(frozen=True)
class SearchResult:
    """The answer to one request; ``hypotheses`` are best first and never empty unless it failed.

    ``text``, ``token_ids``, ``score`` and ``finish_reason`` are those of the best hypothesis.
    A failed request has ``error`` set, no hypotheses, and finish reason ``"error"``. ``stats`` says
    where its time went; None for a request that was refused. ``ended_early`` says why a search in a
    remote base ended before its parameters would have it: a budget was used up, or the context of
    the model was full; its hypotheses that could not go on then have finish reason ``"length"``.
    """

    hypotheses: list[Hypothesis]
    usage: Usage
    trace: Trace | None = None
    error: W2SFastError | None = None
    stats: RequestStats | None = field(default=None, compare=False)
    ended_early: str | None = None

    @property
    def text(self) -> str | None:
        return self.hypotheses[0].text if self.hypotheses else None

    @property
    def token_ids(self) -> list[int]:
        return self.hypotheses[0].token_ids if self.hypotheses else []

    @property
    def score(self) -> float | None:
        return self.hypotheses[0].score if self.hypotheses else None

    @property
    def finish_reason(self) -> Literal["eos", "stop", "length", "error"]:
        return self.hypotheses[0].finish_reason if self.hypotheses else "error"


@dataclass(frozen=True)
class TokenLogProbs:
    """What a model says of every token of a text, at temperature 1.

    Attributes:
        token_ids: of the text.
        logprobs: of each token, in nats; None for the first.
        top: of each place the likeliest token ids and their log-probs, likeliest first; None for
            the first.
    """

    token_ids: list[int]
    logprobs: list[float | None]
    top: list[dict[int, float] | None]
