"""What csrc/beams and csrc/rounds say of one request, by lists of tokens: simple, and slow."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from w2s_fast import SearchParams

Slots = list[int]


@dataclass
class ModelBeam:
    """A beam with the whole of its history."""

    parent: int | None
    inherited: int
    tokens: list[int]
    logprobs: list[float]
    scores: list[float]
    total: float = 0.0
    extra: float = 0.0
    reason: str | None = None
    paused: bool = False

    def child(self, parent: int | None) -> ModelBeam:
        return ModelBeam(
            parent,
            len(self.tokens),
            list(self.tokens),
            list(self.logprobs),
            list(self.scores),
            self.total,
            self.extra,
            self.reason,
        )

    def seen(self) -> tuple[Any, ...]:
        return (
            self.parent,
            self.tokens,
            self.logprobs,
            self.scores,
            self.total,
            self.extra,
            self.reason,
        )


@dataclass
class ModelRequest:
    """The state of one search."""

    params: SearchParams
    eos: set[int]
    kept: list[ModelBeam] = field(default_factory=list)
    families: list[tuple[ModelBeam, list[ModelBeam]]] = field(default_factory=list)
    # Of each two of the kept, how many of their tokens they have from one ancestor.
    common: list[list[int]] = field(default_factory=list)
    sampled: int = 0
    scored: int = 0
    rounds: int = 0  # begun

    def setting(self, name: str) -> int:
        """Of the round under way: a number for all, or a sequence whose last entry goes on."""
        value = getattr(self.params, name)
        if isinstance(value, tuple):
            value = (*value, *value[-1:] * self.rounds)[self.rounds - 1]
        return self.params.max_new_tokens if value is None else value

    @property
    def width(self) -> int:
        return self.setting("beam_width") if self.params.method == "cbs" else self.params.n

    @property
    def candidates(self) -> list[ModelBeam]:
        return [child for _, children in self.families for child in children]

    def begin(self) -> None:
        self.rounds += 1
        if not self.kept:
            root = ModelBeam(None, 0, [], [], [])
            children = [root.child(None) for _ in range(self.params.first_candidates)]
            self.families = [(root, children)]
            return
        for i, beam in enumerate(self.kept):
            held = beam.reason is not None and self.params.finished == "hold"
            count = 1 if held else self.setting("successors")
            self.families.append((beam, [beam.child(i) for _ in range(count)]))

    @property
    def growing(self) -> list[ModelBeam]:
        return [beam for beam in self.candidates if beam.reason is None and not beam.paused]

    def left(self) -> list[int]:
        """Of each candidate that grows, in this round."""
        whole = self.params.max_new_tokens
        chunk = self.setting("chunk_length") if self.params.method == "cbs" else whole
        return [min(beam.inherited + chunk, whole) - len(beam.tokens) for beam in self.growing]

    def take(self, beam: ModelBeam, tokens: list[int], logprobs: list[float]) -> None:
        for token, logprob in zip(tokens, logprobs):
            beam.tokens.append(token)
            beam.logprobs.append(logprob)
            self.sampled += 1
            if token in self.eos and not self.params.ignore_eos:
                beam.reason = "eos"
            elif token in self.params.stop_token_ids:
                beam.reason = "stop"
            elif len(beam.tokens) == self.params.max_new_tokens:
                beam.reason = "length"
            if beam.reason is not None:
                return

    def pause(self, beam: ModelBeam, length: int) -> None:
        del beam.tokens[length:], beam.logprobs[length:]
        beam.reason = "length" if length == self.params.max_new_tokens else None
        beam.paused = beam.reason is None

    def score(self, beam: ModelBeam, scores: list[float], total: float) -> None:
        beam.scores += scores
        beam.total = total
        self.scored += len(scores)

    def close(self, winners: list[int]) -> None:
        chosen = [self.candidates[i] for i in winners]

        def shared(i: int, j: int) -> int:
            a, b = chosen[i], chosen[j]
            if i == j:
                return len(a.tokens)
            if winners[i] == winners[j]:
                return len(a.tokens) - 1  # what stood in the KV when it was copied
            if a.parent == b.parent:
                return a.inherited
            assert a.parent is not None and b.parent is not None
            return self.common[a.parent][b.parent]

        span = range(len(chosen))
        self.common = [[shared(i, j) for j in span] for i in span]
        self.kept, self.families = chosen, []

    def give_up(self) -> None:
        """What is recomputed, they have in common only up to where all have it."""
        shared = self.shared
        for i, row in enumerate(self.common):
            row[:] = [n if i == j else min(n, shared) for j, n in enumerate(row)]

    @property
    def shared(self) -> int:
        alive = [i for i, beam in enumerate(self.kept) if beam.reason is None]
        return min((self.common[i][j] for i in alive for j in alive), default=0)

    @property
    def agreed(self) -> list[int]:
        texts = [beam.tokens for beam in self.candidates or self.kept]
        count = 0
        while texts and all(len(text) > count and text[count] == texts[0][count] for text in texts):
            count += 1
        return texts[0][:count] if texts else []
