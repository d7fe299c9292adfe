"""SearchParams: every knob of a request, its check, and its error."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from w2s_fast.errors import InvalidRequest
from w2s_fast.generation import settings_of
from w2s_fast.scorer import Choice
from w2s_fast.widths import RoundShape, Widths, by_round

Method = Literal["cbs", "bon", "sample", "beam", "fusion", "dynamic_fusion"]
Proposal = Literal["base", "fusion", "dynamic_fusion"]
Finished = Literal["hold", "replicate"]
ScoreKind = Literal["sum", "mean"]
Selection = Literal["top", "resample"]

_MOST_STOPS, _LONGEST_STOP = 64, 1024
_FLOAT32_MAX = 3.4028234663852886e38  # logits are divided by a temperature in float32


@dataclass(frozen=True)
class SearchParams:
    """How one request is searched and sampled. Checked on construction.

    Args:
        method: ``"cbs"`` chunk-level beam search; ``"bon"`` best-of-N: ``successors`` whole
            responses, ranked by score; ``"sample"``: ``n`` independent samples, no guide runs;
            ``"beam"``: beam search of the base alone, by its own log-probs, nothing is drawn;
            ``"fusion"``: ``n`` independent samples from the base's logits plus weighted
            differences of the guides'; ``"dynamic_fusion"``: the same, with weights chosen anew
            for every token.
        beam_width: W, hypotheses kept after each round (``cbs``), or the beams (``beam``).
        successors: K, candidates sampled from each kept hypothesis; N of best-of-N.
        chunk_length: L, tokens a candidate samples in a round. None: a whole response.
            In ``cbs`` each of these three is a number, or a sequence with an entry for each round,
            of which the last one goes on: ``beam_width=(64, 32, 16, 8), successors=1`` is
            speculative rejection. Round 1 draws W * K candidates from the prompt.
        chunk_stop: of ``cbs``: strings that end a candidate's chunk before it has L tokens, as the
            steps of its reasoning, or sentences: with the token in which one of them is complete in
            its text, and that token stays. The next round goes on behind it. As many and as long as
            those of ``stop``, which come first where both are complete in one token.
        max_new_tokens: tokens of a response at most.
        temperature: of sampling. 0 means greedy.
        top_k: sample only from the k likeliest tokens, ties with the k-th included. 0: off.
        top_p: sample only from the smallest set of likeliest tokens that holds this mass, ties
            with the last one included. 1: off.
        min_p: drop tokens less likely than this share of the likeliest one. 0: off.
            The order of warping is temperature, top-k, top-p, min-p.
        seed: 0 <= seed < 2**64. Same request, same seed, same tokens: equal prompts get equal
            answers unless their seeds differ. Where that ends: docs/determinism.md.
        stop: strings that end a response where one of them is complete in its text; the text ends
            before it. Of several it is the one that is complete first. Tokens from the one that it
            begins in on are neither kept nor scored nor returned, so the text may have a piece of
            a token more than they have. A special token's text stands for that token. At most 64,
            of up to 1,024 characters each; they need a tokenizer.
        include_stop_str_in_output: end the text behind the stop string, or the stop token's text.
        stop_token_ids: a sampled token among these ends the response with ``"stop"``.
        min_new_tokens: so many tokens come before any that ends a response, EOS and stop tokens;
            a stop string that is complete within them ends nothing.
        ignore_eos: treat EOS as any other token.
        n: hypotheses to return, best first: at most ``beam_width`` (``cbs``, ``beam``), as the
            last round that there can be has it, or ``successors`` (``bon``); any number for those
            that draw independent samples. Fewer come back where a search ends before its beams
            are so wide, or where ``dedup`` left fewer.
        trace: record every round's candidates in the result.
        finished: ``"hold"``: a finished hypothesis stays one candidate with its final score;
            ``"replicate"``: it is copied K times like any other, as the paper's code does.
        dedup: keep only the first of several candidates with the same tokens.
        score: ``"sum"`` of the log-ratios of all response tokens, or their ``"mean"``.
        selection: which candidates of ``cbs`` and ``bon`` are kept. ``"top"``: those with the best
            values, that is, the guides' score plus what the engine's scorers add, weighted.
            ``"resample"``: W are drawn with replacement, with weights softmax(value / tau)
            (systematic resampling, as particle filters have it). A callable gets the values and
            the candidates, and returns indices, W at most, best first.
        tau: temperature of ``"resample"``.
        proposal: what candidates of ``cbs`` and ``bon`` are sampled from: the ``"base"``, or its
            logits fused with the guides', as the methods of those names do. They are ranked by
            the guides' score all the same.
        beta: factor of each guide's logits in ``fusion``: one for all, or one a guide. None: the
            guide's weight.
        plausibility: alpha of contrastive decoding: tokens less likely under the base than this
            share of its likeliest one are dropped before fusion. 0: off.
        length_penalty: of ``beam``: responses that have ended are ranked by their log-prob over
            length to the power of this, which is their score.
        early_stopping: of ``beam``, as transformers has it: True ends when ``beam_width``
            responses have ended, False where no better one is likely, ``"never"`` where none can
            come.

    ``beam`` is deterministic, and reads of these only ``beam_width``, ``n``, ``max_new_tokens``,
    ``stop``, ``include_stop_str_in_output``, ``stop_token_ids``, ``min_new_tokens``,
    ``ignore_eos``, ``trace`` and its own two. A stop token counts as a further EOS, and so does one
    that completes a stop string: what is kept is ranked by the log-prob of all that was drawn. One
    beam is greedy decoding, as it is in transformers.

    Raises:
        InvalidRequest: names the field, the value given and the values allowed.
    """

    method: Method = "cbs"
    beam_width: int | Sequence[int] = 4
    successors: int | Sequence[int] = 4
    chunk_length: int | Sequence[int | None] | None = 5
    chunk_stop: str | Sequence[str] = ()
    max_new_tokens: int = 50
    temperature: float = 0.7
    top_k: int = 50
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    stop: str | Sequence[str] = ()
    include_stop_str_in_output: bool = False
    stop_token_ids: Sequence[int] = ()
    min_new_tokens: int = 0
    ignore_eos: bool = False
    n: int = 1
    trace: bool = False
    finished: Finished = "hold"
    dedup: bool = False
    score: ScoreKind = "sum"
    selection: Selection | Choice = "top"
    tau: float = 1.0
    proposal: Proposal = "base"
    beta: float | Sequence[float] | None = None
    plausibility: float = 0.0
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False

    def __post_init__(self) -> None:
        _check_choice("method", self.method, get_args(Method))
        _check_choice("finished", self.finished, get_args(Finished))
        _check_choice("score", self.score, get_args(ScoreKind))
        for name in ("max_new_tokens", "n"):
            _check_int(name, getattr(self, name), low=1)
        self._check_widths()
        _check_int("top_k", self.top_k, low=0, high=2**31 - 1)
        _check_int("seed", self.seed, low=0, high=2**64 - 1)
        allowed = "a number >= 0 (0: greedy)"
        _check_number("temperature", self.temperature, 0.0, _FLOAT32_MAX, allowed)
        _check_number("top_p", self.top_p, 0.0, 1.0, "in (0, 1]", open_low=True)
        _check_number("min_p", self.min_p, 0.0, 1.0, "in [0, 1]")
        if not callable(self.selection) and self.selection not in get_args(Selection):
            raise _invalid("selection", self.selection, "'top', 'resample', or a callable")
        if self.selection != "top" and self.method not in ("cbs", "bon"):
            raise _invalid("selection", self.selection, f"'top' for method {self.method!r}")
        _check_number("tau", self.tau, 0.0, _FLOAT32_MAX, "a number > 0", open_low=True)
        _check_choice("proposal", self.proposal, get_args(Proposal))
        if self.proposal != "base" and self.method not in ("cbs", "bon"):
            raise _invalid("proposal", self.proposal, f"'base' for method {self.method!r}")
        self._check_beta()
        _check_number("plausibility", self.plausibility, 0.0, 1.0, "in [0, 1]")
        _check_number(
            "length_penalty", self.length_penalty, -_FLOAT32_MAX, _FLOAT32_MAX, "a finite number"
        )
        if not (isinstance(self.early_stopping, bool) or self.early_stopping == "never"):
            raise _invalid("early_stopping", self.early_stopping, "True, False or 'never'")
        for name in ("ignore_eos", "trace", "dedup", "include_stop_str_in_output"):
            if not isinstance(getattr(self, name), bool):
                raise _invalid(name, getattr(self, name), "True or False")
        self._check_stop()
        _check_int("min_new_tokens", self.min_new_tokens, low=0, high=self.max_new_tokens)
        if self.method in ("cbs", "beam", "bon"):
            limit = self.last_shape.kept if self.method != "bon" else self.first_candidates
            if self.n > limit:
                which = "successors" if self.method == "bon" else "beam_width"
                if isinstance(getattr(self, which), tuple):
                    which += " of the last round"
                raise _invalid("n", self.n, f"at most {which} ({limit}) for method {self.method!r}")

    @classmethod
    def from_generation_config(cls, source: Any, **overrides: Any) -> SearchParams:
        """What a model's generation config says about sampling; engines do not read it themselves.

        What it leaves open is as in ``SearchParams()``, and ``do_sample=False`` is temperature 0.
        Settings without a counterpart here, as ``repetition_penalty``, are warned of. What ends a
        response is not read: engines take its EOS ids anyway.

        Args:
            source: a loaded model, its generation config, the same as a dict, or the folder where
                it lies.
            overrides: fields, in the place of what is found.

        Raises:
            InvalidRequest: ``source`` is nothing of these, or a value is not allowed here.
        """
        return cls(**{**settings_of(source), **overrides})

    def _check_widths(self) -> None:
        for name in ("beam_width", "successors", "chunk_length"):
            value = getattr(self, name)
            also = "None (whole responses)" if name == "chunk_length" else None
            if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
                if not value:
                    raise _invalid(name, value, "a number, or a sequence of at least one")
                if (self.method, name) in (("beam", "beam_width"), ("bon", "successors")):
                    raise _invalid(name, value, f"one number for method {self.method!r}")
                object.__setattr__(self, name, tuple(value))
            for one in by_round(getattr(self, name)):
                if one is not None or also is None:
                    _check_int(name, one, low=1, also=also)

    def _check_stop(self) -> None:
        for name in ("stop", "chunk_stop"):
            object.__setattr__(self, name, _checked_strings(name, getattr(self, name)))
        if self.chunk_stop and self.method != "cbs":
            allowed = f"() for method {self.method!r}, strings for 'cbs'"
            raise _invalid("chunk_stop", self.chunk_stop, allowed)
        ids = self.stop_token_ids
        if isinstance(ids, str) or not isinstance(ids, Sequence):
            raise _invalid("stop_token_ids", ids, "a sequence of token ids")
        object.__setattr__(self, "stop_token_ids", tuple(ids))
        for token in self.stop_token_ids:
            _check_int("stop_token_ids", token, low=0)

    def _check_beta(self) -> None:
        allowed = "a finite number, a sequence of one for each guide, or None"
        if self.beta is None:
            return
        if (
            isinstance(self.beta, Sequence)
            and not isinstance(self.beta, (str, bytes))
            and self.beta
        ):
            object.__setattr__(self, "beta", tuple(self.beta))
            for one in self.beta:
                _check_number("beta", one, -_FLOAT32_MAX, _FLOAT32_MAX, allowed)
        else:
            _check_number("beta", self.beta, -_FLOAT32_MAX, _FLOAT32_MAX, allowed)

    def betas(self, weights: Sequence[float]) -> Sequence[float]:
        """The factor of each guide's logits, where the guides have these weights.

        Raises:
            InvalidRequest: ``beta`` has one for each of fewer guides, or of more.
        """
        if self.beta is None:
            return weights
        if not isinstance(self.beta, Sequence):
            return [self.beta] * len(weights)
        if len(self.beta) != len(weights):
            raise InvalidRequest(
                f"beta has {len(self.beta)} numbers; allowed: one for each of {len(weights)} "
                "guides, or one number for all"
            )
        return self.beta

    @property
    def fuses(self) -> Literal["fusion", "dynamic_fusion"] | None:
        """How tokens are drawn from fused logits; None: they are not."""
        if self.method in ("fusion", "dynamic_fusion"):
            return "dynamic_fusion" if self.method == "dynamic_fusion" else "fusion"
        return None if self.proposal == "base" else self.proposal

    @property
    def widths(self) -> Widths:
        """The rounds, as the method has them."""
        whole = self.max_new_tokens
        if self.method == "cbs":
            kept, successors = by_round(self.beam_width), by_round(self.successors)
            chunks = tuple(
                whole if length is None else min(length, whole)
                for length in by_round(self.chunk_length)
            )
            first = kept[0] * successors[0]
            return Widths(
                first, kept, successors, chunks, whole, self.keeps_copies, bool(self.chunk_stop)
            )
        if self.method == "beam":
            (width,) = by_round(self.beam_width)
            return Widths(width, (width,), (1,), (1,), whole)
        first = by_round(self.successors)[0] if self.method == "bon" else self.n
        return Widths(first, (self.n,), (1,), (whole,), whole, self.keeps_copies)

    @property
    def keeps_copies(self) -> bool:
        """Whether a candidate may be kept more than once."""
        return self.selection != "top"

    @property
    def first_candidates(self) -> int:
        """Candidates sampled from the prompt in round 1."""
        return self.widths.first_candidates

    @property
    def kept(self) -> int:
        """Candidates kept by a selection, at most."""
        return max(self.widths.kept)

    @property
    def rows(self) -> int:
        """Rows of a decoding step at most, in any round; each has a slot of its own."""
        return max(max(shape.rows, shape.kept) for shape in self.widths.shapes())

    @property
    def last_shape(self) -> RoundShape:
        """The last round that there can be, or the first that all others are like."""
        *_, last = self.widths.shapes()
        return last

    @property
    def tokens_per_round(self) -> int:
        """Tokens a candidate samples before the next selection, at most."""
        return max(self.widths.chunks)

    @property
    def uses_guides(self) -> bool:
        """Whether guides run: never for plain sampling, W = K = 1 included."""
        if self.fuses is not None:
            return True
        if self.method == "cbs":
            return self.rows > 1
        return self.method == "bon"


def _invalid(name: str, value: Any, allowed: str) -> InvalidRequest:
    return InvalidRequest(f"{name} is {value!r}; allowed: {allowed}")


def _checked_strings(name: str, value: Any) -> tuple[str, ...]:
    strings = (value,) if isinstance(value, str) else value
    sound = isinstance(strings, Sequence) and len(strings) <= _MOST_STOPS
    if not sound or not all(isinstance(s, str) and 0 < len(s) <= _LONGEST_STOP for s in strings):
        raise _invalid(
            name,
            value,
            f"a string, or a sequence of at most {_MOST_STOPS}, of 1 to {_LONGEST_STOP} characters",
        )
    return tuple(strings)


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise _invalid(name, value, ", ".join(repr(c) for c in choices))


def _check_int(
    name: str, value: Any, *, low: int, high: int | None = None, also: str | None = None
) -> None:
    if (
        isinstance(value, bool)
        or not isinstance(value, int)
        or value < low
        or (high is not None and value > high)
    ):
        allowed = f"an integer >= {low}" + (f" and <= {high}" if high is not None else "")
        raise _invalid(name, value, allowed + (f", or {also}" if also else ""))


def _check_number(
    name: str, value: Any, low: float, high: float, allowed: str, open_low: bool = False
) -> None:
    ok = isinstance(value, (int, float)) and not isinstance(value, bool)
    # An integer may be too large for a float: compare it as it is.
    ok = ok and (isinstance(value, int) or math.isfinite(value))
    if not ok or value < low or value > high or (open_low and value == low):
        raise _invalid(name, value, allowed)
