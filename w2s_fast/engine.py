"""Engine: requests in, results out."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Iterator, Sequence, Sized
from itertools import repeat
from typing import Any, Literal

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from w2s_fast.attention import find_backend
from w2s_fast.errors import EngineFailure, InvalidRequest, MismatchedVocabulary, W2SFastError
from w2s_fast.guide import Guide, PagedGuide
from w2s_fast.load import ModelSource, load_model, load_tokenizer, pick_device
from w2s_fast.memory import kv_tokens_that_fit
from w2s_fast.model import PagedModel
from w2s_fast.params import SearchParams
from w2s_fast.progress import progress_bar
from w2s_fast.prompt import Prompt, PromptEncoder, decode_response
from w2s_fast.record import can_record, record_passes, refuse_compile
from w2s_fast.request import Beam, Request
from w2s_fast.result import Hypothesis, SearchResult, Trace, Usage
from w2s_fast.runner import Runner
from w2s_fast.scheduler import Scheduler
from w2s_fast.scoring import Given, check_room, score_given
from w2s_fast.search import Search
from w2s_fast.stats import EngineStats
from w2s_fast.stream import Pieces, StreamPiece
from w2s_fast.vocabulary import check_same_vocabulary, eos_token_ids, tokenizer_size

_MAX_SLOTS = 4096
_READ_AHEAD = 64


class Engine:
    """Weak-to-strong search over one base model and its guides.

    Example::

        engine = Engine(base="gpt2-xl", guides=Guide(tuned="gpt2-imdb", untuned="gpt2"))
        results = engine.generate(["The film begins"], SearchParams(beam_width=4, successors=4))
        print(results[0].text, results[0].score)

    Args:
        base: path, hub id, or a loaded model, which stays usable by itself.
        guides: a guide, several whose scores are added, or None (then only ``"sample"`` runs).
        tokenizer: the base's, where it does not lie with the model.
        device: ``"auto"``, or anything torch accepts.
        dtype: of weights and KV; ``"auto"`` is float32 on a CPU, the checkpoint's own elsewhere.
        kv_cache_tokens: room for tokens in each model; None measures the free memory.
        page_size: tokens in a page.
        attention: what computes attention: ``"triton"`` (on CUDA), ``"flash"`` (on CUDA, where
            flash-attn 2 or 3 is installed) or ``"torch"`` (anywhere); ``"auto"`` is triton where it
            runs, else torch.
        cuda_graphs: on CUDA, with attention ``"triton"``: replay small passes as CUDA graphs. The
            usual ones are recorded at the start, others when their shape comes again.
        compile: run what is recorded through ``torch.compile``, which takes minutes for large
            models. Off as long as no measurement says that it pays.
        prefix_cache: keep prompts' pages as long as nothing else needs them, for prompts to come
            that begin with the same tokens.
        max_rows: candidates decoded in one step over all requests; one request may have more.
        prompt_template: text around every plain prompt of the base, ``{prompt}`` in it; guides
            have their own.

    Raises:
        UnsupportedModel: a model cannot be loaded or served.
        MismatchedVocabulary: a guide does not share the base's vocabulary.
        InvalidRequest: an argument is not allowed.
    """

    def __init__(
        self,
        base: ModelSource,
        guides: Guide | Sequence[Guide] | None = None,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        kv_cache_tokens: int | None = None,
        page_size: int = 16,
        attention: str = "auto",
        cuda_graphs: bool = True,
        compile: bool = False,
        max_rows: int = 256,
        prefix_cache: bool = True,
        prompt_template: str | None = None,
    ) -> None:
        for name, value in (("page_size", page_size), ("max_rows", max_rows)):
            _check_positive(name, value)
        if kv_cache_tokens is not None:
            _check_positive("kv_cache_tokens", kv_cache_tokens)
        guides = [guides] if isinstance(guides, Guide) else list(guides or ())
        for guide in guides:
            if not isinstance(guide.weight, (int, float)) or not math.isfinite(guide.weight):
                raise InvalidRequest(f"weight of a guide is {guide.weight!r}; allowed: a number")
        where = pick_device(device)
        # Refused before models are loaded.
        backend = find_backend(attention, where)
        if compile and not (cuda_graphs and can_record(where, backend)):
            raise refuse_compile()
        loaded: dict[Any, PreTrainedModel] = {}

        def load(source: ModelSource) -> PreTrainedModel:
            key = id(source) if isinstance(source, PreTrainedModel) else str(source)
            if key not in loaded:
                loaded[key] = load_model(source, where, dtype)
            return loaded[key]

        base_model = load(base)
        pairs = [(load(guide.tuned), load(guide.untuned)) for guide in guides]
        models = [base_model, *(model for pair in pairs for model in pair)]
        tokens = kv_cache_tokens or kv_tokens_that_fit(models, _useful_tokens(base_model, max_rows))

        def page(model: PreTrainedModel, name: str) -> PagedModel:
            return PagedModel(
                model,
                name,
                kv_cache_tokens=tokens,
                page_size=page_size,
                max_slots=_MAX_SLOTS,
                prefix_cache=prefix_cache,
                attention=attention,
            )

        self.tokenizer = tokenizer if tokenizer is not None else load_tokenizer(base)
        self.base = page(base_model, _name("base", base))
        paged = [
            (
                page(tuned, _name(f"tuned{_number(g, guides)}", guide.tuned)),
                page(untuned, _name(f"untuned{_number(g, guides)}", guide.untuned)),
            )
            for g, (guide, (tuned, untuned)) in enumerate(zip(guides, pairs))
        ]
        vocab_size = self._shared_vocabulary(guides, paged)
        self.eos_token_ids = eos_token_ids(base_model, self.tokenizer)
        self.guides = [
            PagedGuide(tuned, untuned, guide.weight, vocab_size)
            for guide, (tuned, untuned) in zip(guides, paged)
        ]
        self._encoder = self._prompt_encoder(self.base, prompt_template, vocab_size)
        self._guide_encoders = [
            self._prompt_encoder(tuned, guide.prompt_template, vocab_size)
            for guide, (tuned, _) in zip(guides, paged)
        ]
        # Fast tokenizers keep the options of a call as their own state: one call at a time.
        self._encoding = threading.Lock()
        graphs = None
        if cuda_graphs and can_record(where, backend):
            graphs = record_passes(
                self.base,
                [model for guide in self.guides for model in guide.models],
                vocab_size=vocab_size,
                max_rows=max_rows,
                compile=compile,
            )
        self._search = Search(self.base, self.guides, vocab_size, self.eos_token_ids, graphs)
        self._scheduler = Scheduler(self.base, paged, max_rows)
        self.runner = Runner(self._search, self._scheduler)
        # Requests that one iteration has under way: more than can run, so that none ever waits for
        # the caller's iterable to be read.
        self._read_ahead = max_rows + _READ_AHEAD

    def generate(
        self,
        prompts: Iterable[Prompt] | str,
        params: SearchParams | Iterable[SearchParams] | None = None,
        *,
        priority: int = 0,
        on_error: Literal["raise", "return"] = "raise",
        progress: bool = True,
    ) -> list[SearchResult]:
        """Search a response for every prompt.

        Args:
            prompts: each a string, a list of token ids, or a list of chat messages.
            params: one for all prompts, or one for each.
            priority: the lower, the sooner, among all requests of the engine.
            on_error: a failed request never stops the others. ``"raise"``: the first error is
                raised once all are done, with all results in its ``results``; ``"return"``: a
                failed request's result carries its ``error``.
            progress: show a progress bar while there is more than one prompt to wait for, and
                standard error is a terminal.

        Returns:
            One result for each prompt, in their order.

        Raises:
            InvalidRequest: a prompt or its parameters are not allowed.
            NumericalError: a model produced NaN or infinity.
        """
        many = not isinstance(prompts, str)
        total = len(prompts) if many and isinstance(prompts, Sized) else None
        found = {}
        with progress_bar(total, show=progress and many) as advance:
            for index, result in self.as_completed(prompts, params, priority=priority):
                found[index] = result
                advance(result.usage.completion_tokens)
        results = [found[i] for i in range(len(found))]
        error = next((r.error for r in results if r.error is not None), None)
        if error is not None and on_error == "raise":
            error.results = results
            raise error
        return results

    def as_completed(
        self,
        prompts: Iterable[Prompt] | str,
        params: SearchParams | Iterable[SearchParams] | None = None,
        *,
        priority: int = 0,
    ) -> Iterator[tuple[int, SearchResult]]:
        """Like :meth:`generate`, but yields (index of the prompt, result) as results come.

        ``prompts`` is read as room becomes free, so it may be longer than memory. A failed
        request's result carries its ``error``.
        """
        source = enumerate(_pair(prompts, params))
        own: dict[Request, int] = {}
        try:
            while True:
                for index, (prompt, params_of) in source:
                    try:
                        request = self.make_request(prompt, params_of, priority)
                    except W2SFastError as error:
                        yield index, _failed(error)
                        continue
                    self.runner.submit(request)
                    own[request] = index
                    if len(own) >= self._read_ahead:
                        break
                if not own:
                    return
                self.runner.advance(own)
                for request in [request for request in own if request.ended]:
                    yield own.pop(request), self.result(request)
        finally:
            for request in own:
                self.runner.give_up(request)
            self.runner.settle()

    def stream(
        self, prompt: Prompt, params: SearchParams | None = None, *, priority: int = 0
    ) -> Iterator[StreamPiece]:
        """Search a response for one prompt, and give it out as it becomes certain.

        A piece comes as soon as all hypotheses that can still win agree on it, and is never taken
        back. The last piece carries the result. Leaving the loop gives the request up. Other
        requests of the engine go on meanwhile, whoever takes the steps.

        Raises:
            InvalidRequest: the prompt or its parameters are not allowed.
            NumericalError: a model produced NaN or infinity.
        """
        return self._stream(self.make_request(prompt, params or SearchParams(), priority))

    def _stream(self, request: Request) -> Iterator[StreamPiece]:
        pieces = self.pieces(request)
        request.streams = True
        self.runner.submit(request)
        try:
            while not request.ended:
                self.runner.advance([request])
                piece = pieces.next(request.agreed)
                if piece is not None:
                    yield piece
            result = self.result(request)
            if result.error is not None:
                raise result.error
            yield pieces.last(result)
        finally:
            self.runner.give_up(request)
            self.runner.settle()

    def stats(self) -> EngineStats:
        """What the engine has done since it was made, and what it is doing. Costs next to nothing:
        it does not wait for the step under way."""
        return self.runner.stats()

    def score(
        self, prompts: Sequence[Prompt], responses: Sequence[str | Sequence[int]]
    ) -> list[float]:
        """The guides' score of given responses, in nats.

        A response of token ids is scored as it is. A text is tokenised behind its prompt: it
        begins after the longest common prefix of the tokens of prompt and prompt + text. No EOS
        is added. Where running requests hold the pages that it takes, some are set aside for it
        and recomputed.

        Raises:
            InvalidRequest: no guides, lists of different lengths, an empty response, or a text
                that is longer than the KV cache of a guide. Nothing is scored then.
        """
        if not self.guides:
            raise InvalidRequest("the engine has no guides, so it cannot score")
        if len(prompts) != len(responses):
            raise InvalidRequest(f"{len(prompts)} prompts, but {len(responses)} responses")
        given = [
            [self._given(g, prompt, response) for prompt, response in zip(prompts, responses)]
            for g in range(len(self.guides))
        ]
        scores = [
            score_given(self.runner, guide, texts) for guide, texts in zip(self.guides, given)
        ]
        return [sum(own) for own in zip(*scores)]

    def _given(self, g: int, prompt: Prompt, response: str | Sequence[int]) -> Given:
        """A text as the tokens of one guide. InvalidRequest if it could never be scored."""
        with self._encoding:
            text = Given(*self._guide_encoders[g].encode_with_response(prompt, response))
        models = self.guides[g].models
        _check_length(models, len(text.prompt), len(text.response))
        for model in models:
            check_room(model, text)
        return text

    def make_request(self, prompt: Prompt, params: SearchParams, priority: int = 0) -> Request:
        """Check and encode one prompt, for :attr:`runner`. InvalidRequest, and nothing is held."""
        if not isinstance(params, SearchParams):
            raise InvalidRequest(f"params is {type(params).__name__}; allowed: SearchParams")
        if params.uses_guides and not self.guides:
            raise InvalidRequest(f"method {params.method!r} needs guides; the engine has none")
        if isinstance(priority, bool) or not isinstance(priority, (int, np.integer)):
            raise InvalidRequest(f"priority is {priority!r}; allowed: an integer")
        with self._encoding:
            ids = self._encoder.encode(prompt)
            guide_ids = [e.encode(prompt) for e in self._guide_encoders if params.uses_guides]
        _check_length([self.base], len(ids), params.max_new_tokens)
        for guide, own in zip(self.guides, guide_ids):
            _check_length(guide.models, len(own), params.max_new_tokens)
        for token in params.stop_token_ids:
            if token >= self._search.vocab_size:
                raise InvalidRequest(
                    f"stop_token_ids holds {token}; allowed: below {self._search.vocab_size}"
                )
        request = Request(ids, guide_ids, params, int(priority))
        self._scheduler.check(request)
        return request

    def pieces(self, request: Request) -> Pieces:
        """What cuts its response into pieces."""
        return Pieces(self.tokenizer, request.prompt)

    def result(self, request: Request) -> SearchResult:
        """The result of a request that has ended; carries its error if it failed."""
        if request.error is not None:
            return _failed(request.error, request)
        beams = request.beams[: request.params.n]
        try:
            hypotheses = [self._hypothesis(request, beam) for beam in beams]
        except Exception as error:  # a tokenizer may raise anything
            failure = EngineFailure(f"the response cannot be decoded: {error}")
            failure.__cause__ = error
            return _failed(failure, request)
        trace = Trace(request.rounds) if request.params.trace else None
        return SearchResult(hypotheses, _usage(request, beams), trace, stats=request.stats)

    def _hypothesis(self, request: Request, beam: Beam) -> Hypothesis:
        assert beam.finish_reason is not None
        text = None
        if self.tokenizer is not None:
            shown = beam.tokens if beam.finish_reason == "length" else beam.tokens[:-1]
            text = decode_response(self.tokenizer, request.prompt, shown)
        return Hypothesis(
            text,
            beam.tokens,
            request.score_of(beam),
            beam.finish_reason,
            beam.token_scores,
            beam.logprobs,
        )

    def _shared_vocabulary(
        self, guides: Sequence[Guide], paged: Sequence[tuple[PagedModel, PagedModel]]
    ) -> int:
        """The size of the vocabulary that all models share. MismatchedVocabulary if they do not."""
        sources = [s for guide in guides for s in (guide.tuned, guide.untuned)]
        models = [model for pair in paged for model in pair]
        size = self.base.vocab_size
        if self.tokenizer is not None:
            size = min(size, tokenizer_size(self.tokenizer))
            for source, model in zip(sources, models):
                own = load_tokenizer(source)
                if own is not None:
                    check_same_vocabulary(self.tokenizer, own, model.name)
                if model.vocab_size < size:
                    raise MismatchedVocabulary(
                        f"{model.name} has logits for {model.vocab_size} tokens, but the base's "
                        f"vocabulary has {size}"
                    )
        return min([size, *(model.vocab_size for model in models)])

    def _prompt_encoder(
        self, model: PagedModel, template: str | None, vocab_size: int
    ) -> PromptEncoder:
        bos = getattr(self.tokenizer, "bos_token_id", None)
        if self.tokenizer is None:
            bos = getattr(model.model.config.get_text_config(), "bos_token_id", None)
        if bos is not None and not 0 <= bos < vocab_size:
            bos = None
        return PromptEncoder(
            model.name, self.tokenizer, template, vocab_size=vocab_size, bos_token_id=bos
        )


def _pair(
    prompts: Iterable[Prompt] | str, params: SearchParams | Iterable[SearchParams] | None
) -> Iterator[tuple[Prompt, SearchParams]]:
    if isinstance(prompts, str):
        prompts = [prompts]
    if params is None:
        params = SearchParams()
    if isinstance(params, SearchParams):
        return zip(prompts, repeat(params))
    if isinstance(prompts, Sized) and isinstance(params, Sized) and len(prompts) != len(params):
        raise InvalidRequest(
            f"{len(prompts)} prompts, but {len(params)} params; allowed: one for all, or one each"
        )
    return zip(prompts, params)


def _check_length(models: Sequence[PagedModel], prompt: int, new: int) -> None:
    for model in models:
        limit = model.max_positions
        if limit is not None and prompt + new > limit:
            raise InvalidRequest(
                f"the prompt has {prompt} tokens for {model.name}, and {new} new ones may follow; "
                f"allowed: {limit} together"
            )


def _usage(request: Request, beams: Sequence[Beam]) -> Usage:
    return Usage(
        prompt_tokens=len(request.prompt),
        completion_tokens=sum(len(beam.tokens) for beam in beams),
        sampled_tokens=request.sampled_tokens,
        scored_tokens=request.scored_tokens,
    )


def _failed(error: W2SFastError, request: Request | None = None) -> SearchResult:
    if request is None:
        return SearchResult([], Usage(0, 0, 0, 0), error=error)
    return SearchResult([], _usage(request, []), error=error, stats=request.stats)


def _useful_tokens(base: PreTrainedModel, max_rows: int) -> int:
    longest = getattr(base.config.get_text_config(), "max_position_embeddings", None) or 32768
    return int(max_rows * longest)


def _name(role: str, source: ModelSource) -> str:
    return role if isinstance(source, PreTrainedModel) else f"{role} ({source})"


def _number(g: int, guides: Sequence[Guide]) -> str:
    return f" {g}" if len(guides) > 1 else ""


def _check_positive(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        raise InvalidRequest(f"{name} is {value!r}; allowed: an integer >= 1")
