"""Intake: from prompts and parameters to requests, or an InvalidRequest that says why not."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from itertools import repeat
from typing import Any

import numpy as np
import torch

from w2s_fast._pages import Hold
from w2s_fast.engine.foreign import foreign_prompt, in_words
from w2s_fast.engine.served import ServedModels
from w2s_fast.errors import InvalidRequest
from w2s_fast.models import PagedModel
from w2s_fast.params import SearchParams
from w2s_fast.scheduling import Given, Scheduler, check_readable, check_room
from w2s_fast.search import ForeignPrompt, PagedGuide, Request
from w2s_fast.text import Breaks, Chat, Prompt, PromptEncoder, StopStrings, decode_response


class Intake:
    """Checks and encodes what comes in. Any thread may call it, and nothing is held."""

    def __init__(
        self, models: ServedModels, scheduler: Scheduler, *, has_scorers: bool = False
    ) -> None:
        """``has_scorers``: of the engine's own, so that a search needs no guides."""
        self._models = models
        self._scheduler = scheduler
        self._has_scorers = has_scorers
        # Fast tokenizers keep the options of a call as their own state: one call at a time.
        self._encoding = threading.Lock()

    def request(self, prompt: Prompt, params: SearchParams, priority: int) -> Request:
        """One prompt as a request that the engine can serve. InvalidRequest."""
        models = self._models
        if not isinstance(params, SearchParams):
            raise InvalidRequest(f"params is {type(params).__name__}; allowed: SearchParams")
        scored = self._has_scorers and params.method in ("cbs", "bon") and params.fuses is None
        if params.uses_guides and not models.guides and not scored:
            raise InvalidRequest(f"method {params.method!r} needs guides; the engine has none")
        if params.fuses == "dynamic_fusion" and any(len(g.models) < 2 for g in models.guides):
            raise InvalidRequest(
                "dynamic_fusion compares a guide's tuned model with its untuned one; allowed: "
                "guides that have both"
            )
        if isinstance(priority, bool) or not isinstance(priority, (int, np.integer)):
            raise InvalidRequest(f"priority is {priority!r}; allowed: an integer")
        foreign = models.foreign if params.uses_guides else None
        if foreign is not None and params.fuses is not None:
            raise InvalidRequest(
                f"{params.fuses} adds logits token by token, so it needs one vocabulary: "
                f"{foreign.guides[0].why}"
            )
        with Hold(self._encoding):
            encoders = models.encoders if params.uses_guides else models.encoders[:1]
            prompts = [encoder.encode(prompt) for encoder in encoders]
            in_foreign = None
            if foreign is not None and models.tokenizer is not None:
                in_foreign = foreign_prompt(foreign, prompt, models.encoder_of, models.tokenizer)
                for model, text in zip(foreign.translators, in_foreign.texts):
                    _check_prompt(model, text.ids, 1)
        for model, own in zip(models.models, prompts):
            _check_prompt(model, own, params.max_new_tokens)
        for token in params.stop_token_ids:
            if token >= models.vocab_size:
                raise InvalidRequest(
                    f"stop_token_ids holds {token}; allowed: below {models.vocab_size}"
                )
        request = self._made(prompts, in_foreign, params, int(priority), given=prompt)
        self._scheduler.check(request)
        return request

    def same(
        self,
        prompts: Sequence[Sequence[int]],
        foreign: ForeignPrompt | None,
        params: SearchParams,
        priority: int,
    ) -> Request:
        """The request that :meth:`request` has made on another rank, of what it holds there."""
        return self._made(prompts, foreign, params, priority)

    def _made(
        self,
        prompts: Sequence[Sequence[int]],
        foreign: ForeignPrompt | None,
        params: SearchParams,
        priority: int,
        given: Any = None,
    ) -> Request:
        models = self._models
        base, *of_guides = prompts
        ends = None
        if params.stop:
            if models.tokenizer is None:
                raise InvalidRequest("stop strings need a tokenizer; the engine has none")
            ends = StopStrings(models.tokenizer, base, params.stop, params.min_new_tokens)
        breaks = None
        if params.chunk_stop:
            if models.tokenizer is None:
                raise InvalidRequest("chunk_stop needs a tokenizer; the engine has none")
            breaks = Breaks(models.tokenizer, base, params.chunk_stop)
        return Request(
            base,
            of_guides,
            params,
            priority,
            models.eos_token_ids,
            params.betas([guide.weight for guide in models.guides]) if params.fuses else (),
            given=given,
            has_scorers=self._has_scorers,
            ends=ends,
            breaks=breaks,
            foreign=foreign,
            has_guides=None if foreign is None else bool(models.sharing),
        )

    def given(
        self,
        guides: Sequence[PagedGuide],
        prompts: Sequence[Prompt],
        responses: Sequence[str | Sequence[int]],
    ) -> list[list[Given]]:
        """Texts to be scored, for each guide. InvalidRequest if one could never be."""
        if not guides:
            raise InvalidRequest("the engine has no guides, so it cannot score")
        if len(prompts) != len(responses):
            raise InvalidRequest(f"{len(prompts)} prompts, but {len(responses)} responses")
        return [
            [self._given(guide, prompt, response) for prompt, response in zip(prompts, responses)]
            for guide in guides
        ]

    def encode(self, prompt: Prompt) -> list[int]:
        """The base's tokens of a prompt. InvalidRequest."""
        with Hold(self._encoding):
            return self._models.encoder_of[self._models.base].encode(prompt)

    def encode_behind(self, text: str) -> list[int]:
        """The base's tokens of a text that goes on. InvalidRequest."""
        with Hold(self._encoding):
            return self._models.encoder_of[self._models.base].encode_response(text)

    def readable(self, texts: Sequence[str | Sequence[int]]) -> list[list[int]]:
        """Texts that the base is to read, as its tokens. InvalidRequest if one could never be."""
        base = self._models.base
        with Hold(self._encoding):
            found = [self._models.encoder_of[base].encode(text) for text in texts]
        for text in found:
            check_readable(base, text)
        return found

    def _given(self, guide: PagedGuide, prompt: Prompt, response: str | Sequence[int]) -> Given:
        with Hold(self._encoding):
            if self._models.is_foreign(guide):
                prompt, response = self._in_words(guide, prompt, response)
            text = _encode_given(self._models.encoders_of(guide), prompt, response)
        models = guide.models
        for model, own in zip(models, text.prompts):
            _check_prompt(model, own, len(text.response))
        check_room(models, text)
        if max(text.response) >= guide.vocab_size:
            raise InvalidRequest(
                f"a response holds token {max(text.response)}; allowed: below {guide.vocab_size}"
            )
        return text

    def _in_words(
        self, guide: PagedGuide, prompt: Prompt, response: str | Sequence[int]
    ) -> tuple[Prompt, str]:
        """A text for a guide that has no use for the base's token ids."""
        tokenizer = self._models.tokenizer
        if tokenizer is None:  # the base is remote
            if not isinstance(response, str):
                raise InvalidRequest("a response is token ids, which a remote base has none of")
            return prompt, response
        if not isinstance(response, str):
            before = self._models.encoder_of[self._models.base].encode(prompt)
            response = decode_response(tokenizer, before, list(response))
        return in_words(prompt, tokenizer, guide.models[0].name), response


def as_prompts(given: Iterable[Prompt] | Prompt) -> Iterable[Prompt]:
    """What a caller gives, as prompts: one that stands alone needs no list around it.

    Raises:
        InvalidRequest: an encoding, or a tensor of several rows: whether they end with padding
            cannot be told.
    """
    untyped: Any = given
    rows = getattr(untyped, "ndim", 0)
    if isinstance(untyped, Mapping) and "role" not in untyped:
        raise InvalidRequest(
            f"prompts are {type(given).__name__}; allowed: a list of prompts. Of an encoding that "
            "is input_ids, as a tokenizer makes them without padding and return_tensors"
        )
    if isinstance(untyped, (torch.Tensor, np.ndarray)) and rows > 1:
        raise InvalidRequest(
            f"prompts are {type(given).__name__} of {rows} dimensions; allowed: a list of prompts, "
            "each a list or a tensor of one dimension, without padding"
        )
    if isinstance(untyped, Mapping):
        return [[untyped]]
    alone = isinstance(untyped, (str, Chat)) or _are_ids(untyped) or _are_messages(untyped)
    return [untyped] if alone else untyped


def _are_ids(given: Any) -> bool:
    if isinstance(given, (torch.Tensor, np.ndarray)):
        return given.ndim == 1 and "int" in str(given.dtype)
    if not isinstance(given, Sequence) or isinstance(given, (str, bytes)):
        return False
    return len(given) > 0 and all(isinstance(token, (int, np.integer)) for token in given)


def _are_messages(given: Any) -> bool:
    return (
        isinstance(given, Sequence)
        and len(given) > 0
        and all(isinstance(each, Mapping) and "role" in each for each in given)
    )


def pair(
    prompts: Iterable[Prompt], params: SearchParams | Iterable[SearchParams] | None
) -> Iterator[tuple[Prompt, SearchParams]]:
    """Each prompt with its parameters. InvalidRequest if they are not as many."""
    if params is None:
        params = SearchParams()
    if isinstance(params, SearchParams):
        return zip(prompts, repeat(params))
    if isinstance(prompts, Sized) and isinstance(params, Sized) and len(prompts) != len(params):
        raise InvalidRequest(
            f"{len(prompts)} prompts, but {len(params)} params; allowed: one for all, or one each"
        )
    return zip(prompts, params)


def _encode_given(
    encoders: Sequence[PromptEncoder], prompt: Prompt, response: str | Sequence[int]
) -> Given:
    """A text for a guide: its response has the same tokens for all of its models."""
    texts = [encoder.encode_with_response(prompt, response) for encoder in encoders]
    before, (after, *others) = [own for own, _ in texts], [own for _, own in texts]
    if any(other != after for other in others):
        # For one of them a token may reach from the prompt into the response, and for the other,
        # which has a template, not. So the response stands by itself, as it does behind any ids.
        after = encoders[0].encode_response(response)
        before = [encoder.encode(prompt) for encoder in encoders]
    return Given(before, after)


def _check_prompt(model: PagedModel, prompt: Sequence[int], new: int) -> None:
    """Whether a model can run its prompt, and ``new`` tokens behind it. InvalidRequest."""
    limit = model.max_positions
    if limit is not None and len(prompt) + new > limit:
        raise InvalidRequest(
            f"the prompt has {len(prompt)} tokens for {model.name}, and {new} new ones may follow; "
            f"allowed: {limit} together"
        )
    # A tokenizer may know tokens that were added to it alone.
    if max(prompt) >= model.vocab_size:
        raise InvalidRequest(
            f"the prompt holds token {max(prompt)} for {model.name}; allowed: below "
            f"{model.vocab_size}"
        )
