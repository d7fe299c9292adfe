"""Engine: requests in, results out."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable, Iterator, Sequence, Sized
from contextlib import AbstractContextManager, closing, nullcontext
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from w2s_fast.attention import find_backend
from w2s_fast.decoding import can_record, record_passes, refuse_compile
from w2s_fast.engine.intake import Intake, as_prompts, pair
from w2s_fast.engine.named import device_of
from w2s_fast.engine.outcome import failed, response_decoder, result_of, scored_candidate
from w2s_fast.engine.progress import progress_bar
from w2s_fast.engine.remote_intake import RemoteIntake
from w2s_fast.engine.served import attention_on, serve_models
from w2s_fast.engine.stream import Pieces, StreamPiece
from w2s_fast.errors import InvalidRequest, W2SFastError
from w2s_fast.models import (
    ModelSource,
    PagedModel,
    Ranks,
    check_shardable,
    device_of_rank,
    pick_device,
    total_bytes,
    usual_rows,
)
from w2s_fast.params import SearchParams
from w2s_fast.remote import RemoteBase, connect
from w2s_fast.result import SearchResult, TokenLogProbs
from w2s_fast.scheduling import (
    Claim,
    Judge,
    Runner,
    Scheduler,
    read_given,
    rehearse,
    score_given,
    works_of,
)
from w2s_fast.scorer import Scorer, with_weights
from w2s_fast.search import (
    Guide,
    PagedGuide,
    RemoteSearch,
    Request,
    ScoreGraphs,
    Search,
    roles_of,
)
from w2s_fast.stats import EngineStats
from w2s_fast.text import Prompt

_READ_AHEAD = 64


class Engine:
    """Weak-to-strong search over one base model and its guides.

    Example::

        engine = Engine(base="gpt2-xl", guides=Guide(tuned="gpt2-imdb", untuned="gpt2"))
        results = engine.generate(["The film begins"], SearchParams(beam_width=4, successors=4))
        print(results[0].text, results[0].score)

    Args:
        base: path, hub id, a loaded model, or a :class:`w2s_fast.RemoteBase`. Of a loaded model the
            weights are shared and nothing else is touched: it stays usable by itself, in training
            too; see :meth:`weights_changed`.
        guides: a guide, several whose scores are added, or None (then only ``"sample"`` runs,
            unless there are scorers).
        scorers: functions of one's own that value partial responses, beside the guides or in their
            place, each alone or as (scorer, weight); see :class:`w2s_fast.Scorer`. Their values,
            weighted, are added to the guides' score of every ``cbs`` and ``bon`` request; plain
            sampling, W = K = 1 included, asks nobody.
        tokenizer: the base's, where it does not lie with the model.
        device: ``"auto"``, or anything torch accepts; guides may have one of their own.
        dtype: of weights and KV; ``"auto"`` is float32 on a CPU. Elsewhere it is the checkpoint's
            own, but that of a checkpoint in float32 is bfloat16 on CUDA from compute capability
            8.0 on. A loaded model keeps its own.
        kv_cache_tokens: room for tokens in each model; None measures the free memory, of several
            devices that of the one with the least room.
        page_size: tokens in a page.
        attention: what computes attention: ``"triton"`` (on CUDA), ``"flash"`` (on CUDA, where
            flash-attn 2 or 3 is installed) or ``"torch"`` (anywhere); ``"auto"`` is triton where it
            runs, else torch. Guides on a CPU, beside a base that is on none, take ``"auto"``.
        cuda_graphs: on CUDA, with attention ``"triton"``: replay small passes as CUDA graphs. The
            usual ones are recorded at the start, others when their shape comes again.
        compile: run what is recorded through ``torch.compile``, which takes minutes for large
            models. Off as long as no measurement says that it pays.
        prefix_cache: keep prompts' pages as long as nothing else needs them, for prompts to come
            that begin with the same tokens.
        max_rows: candidates decoded in one step over all requests; one request may have more. None
            is 1,024 on a GPU of 80 GB or more, and 256 elsewhere.
        max_pass_tokens: the most tokens of a pass that reads prompts or given texts, or scores
            chunks; more of them run in several passes, and between those of prompts the running
            requests go on. None is 2,048 on a CPU, and on CUDA 8,192, or fewer where memory is
            tight. There the room for such a pass is measured, and no pages take it.
        prompt_template: text around every plain prompt of the base, ``{prompt}`` in it; guides
            have their own. Chat messages go through each model's own chat template.
        tensor_parallel: how many processes hold the base together, each on a device of its own. All
            of them run the same program, as torchrun starts it, and get the same results, or
            follow the first: see :meth:`lead` and docs/parallel.md. Nothing is recorded then.

    Attributes:
        server: of a remote base, what it was found to be and to take, in a line; else None.
        tensor_parallel: how many processes hold the base together. rank: which one this is, from 0.

    It serves the process that made it. In a child by ``os.fork`` every way to ask raises
    :class:`EngineFailure` at once; make another one there, or start children with ``spawn``.

    Raises:
        UnsupportedModel: a model cannot be loaded or served.
        MismatchedVocabulary: a guide's models do not share one vocabulary, or it cannot be told.
        RemoteFailure: the server of a remote base cannot be used.
        EngineFailure: of several processes not all come together; RankFailure: one has died since.
        InvalidRequest: an argument is not allowed.
    """

    def __init__(
        self,
        base: ModelSource | RemoteBase,
        guides: Guide | Sequence[Guide] | None = None,
        *,
        scorers: Sequence[Scorer | tuple[Scorer, float]] = (),
        tokenizer: PreTrainedTokenizerBase | None = None,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        kv_cache_tokens: int | None = None,
        page_size: int = 16,
        attention: str = "auto",
        cuda_graphs: bool = True,
        compile: bool = False,
        max_rows: int | None = None,
        max_pass_tokens: int | None = None,
        prefix_cache: bool = True,
        prompt_template: str | None = None,
        tensor_parallel: int = 1,
    ) -> None:
        _check_positive("page_size", page_size)
        for name, value in (
            ("max_rows", max_rows),
            ("max_pass_tokens", max_pass_tokens),
            ("kv_cache_tokens", kv_cache_tokens),
        ):
            if value is not None:
                _check_positive(name, value)
        _check_positive("tensor_parallel", tensor_parallel)
        guides = _checked_guides(guides)
        weighted = with_weights(scorers)
        # Refused before models are loaded, and before the ranks wait for each other.
        if tensor_parallel == 1:
            where = pick_device(device)
        else:
            where = device_of_rank(device, tensor_parallel)
            _check_divisible(base, guides, compile, tensor_parallel)
            cuda_graphs = False
        backend = find_backend(attention, where)
        for guide in guides:
            there = device_of(guide, where)
            find_backend(attention_on(there, attention, where), there)
        if compile and not (cuda_graphs and can_record(where, backend)):
            raise refuse_compile()
        if max_rows is None:
            max_rows = usual_rows(where.type, total_bytes(where))
        ranks = None
        if tensor_parallel > 1:
            ranks = Ranks(tensor_parallel, where)
            (max_rows,) = ranks.least([max_rows])
        self.rank = 0 if ranks is None else ranks.rank
        self.tensor_parallel = tensor_parallel
        # The server, too, is asked before.
        source = connect(base) if isinstance(base, RemoteBase) else None
        self.server = None if source is None else source.about
        with nullcontext() if ranks is None else ranks.staying():
            self._models = serve_models(
                base,
                guides,
                tokenizer=tokenizer,
                device=where,
                dtype=dtype,
                kv_cache_tokens=kv_cache_tokens,
                page_size=page_size,
                attention=attention,
                max_rows=max_rows,
                max_pass_tokens=max_pass_tokens,
                prefix_cache=prefix_cache,
                prompt_template=None if source else prompt_template,
                ranks=ranks,
            )
        judge = Judge(weighted, partial(scored_candidate, self.tokenizer), ranks)
        self._search: Search | RemoteSearch
        if source is not None:
            self._search = RemoteSearch(source, judge.news.tell, self._models.foreign)
        else:
            records = cuda_graphs and can_record(where, backend)
            self._search = self._search_here(records, max_rows, compile)
        self._scheduler = Scheduler(self._search.models, max_rows)
        self._intake = Intake(self._models, self._scheduler, has_scorers=bool(weighted))
        self._to_request = self._intake.request
        if isinstance(base, RemoteBase) and source is not None:
            self._to_request = RemoteIntake(
                source, base.budget, self._models, prompt_template, has_scorers=bool(weighted)
            ).request
        self.runner = Runner(self._search, self._scheduler, judge, ranks=ranks)
        # Requests that one iteration has under way: more than can run, so that none ever waits for
        # the caller's iterable to be read.
        self._read_ahead = max_rows + _READ_AHEAD
        if isinstance(self._search, Search) and self._search.records:
            self.warm_up()

    def _search_here(self, records: bool, max_rows: int, compile: bool) -> Search:
        """``records``: whether passes are recorded."""
        graphs = score_graphs = None
        models, device = self._models.models, self.base.device
        apart = any(model.device != device for model in models)
        if records:
            graphs = record_passes(
                self.base,
                [m for m in self._models.of_guides if can_record(m.device, m.backend)],
                # What several devices do together is no recording of one.
                roles=() if apart else roles_of(self._models.sharing, models),
                vocab_size=self._models.vocab_size,
                max_rows=max_rows,
                compile=compile,
            )
            if self._models.of_guides and not apart:
                score_graphs = ScoreGraphs(
                    self._models.sharing,
                    self._models.models,
                    graphs.alone.recorder,
                    max_rows=max_rows,
                    vocab_size=self._models.vocab_size,
                )
        return Search(
            self.base,
            self._models.sharing,
            self._models.vocab_size,
            graphs,
            score_graphs,
            # A guide on a CPU would run what is drawn behind an end, while nobody else works.
            ahead=(records or device.type == "cuda")
            and not (apart and any(model.device.type == "cpu" for model in models)),
            foreign=self._models.foreign,
        )

    @property
    def base(self) -> PagedModel:
        """The base model over its pages. InvalidRequest: it is remote, see :attr:`server`."""
        return self._models.base

    @property
    def guides(self) -> list[PagedGuide]:
        """The guides over their pages."""
        return self._models.guides

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The base's; None: prompts are token ids, and results have no text; or it is remote."""
        return self._models.tokenizer

    @property
    def vocab_size(self) -> int:
        """Of the base: token ids are below. InvalidRequest: it is remote."""
        return min(self._models.vocab_size, self.base.vocab_size)

    @property
    def max_tokens(self) -> int:
        """Of a prompt and its response together, at most."""
        pool = self.base.pool
        room = pool.num_pages * pool.page_size
        return room if self.base.max_positions is None else min(self.base.max_positions, room)

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """What ends a response."""
        return self._models.eos_token_ids

    def generate(
        self,
        prompts: Iterable[Prompt] | Prompt,
        params: SearchParams | Iterable[SearchParams] | None = None,
        *,
        priority: int = 0,
        on_error: Literal["raise", "return"] = "raise",
        progress: bool = True,
    ) -> list[SearchResult]:
        """Search a response for every prompt.

        Args:
            prompts: each a string, a list (or a tensor of one dimension) of token ids, a list of
                chat messages, or a :class:`w2s_fast.Chat`. One alone needs no list around it.
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
            ScorerFailure: a scorer or a choice failed.
        """
        prompts = as_prompts(prompts)
        total = len(prompts) if isinstance(prompts, Sized) else None
        found = {}
        progress = progress and self.rank == 0
        # Closed here, even where an exception, and with it this frame, is kept.
        completing = closing(self.as_completed(prompts, params, priority=priority))
        with progress_bar(total, show=progress) as advance, completing as completed:
            for index, result in completed:
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
        prompts: Iterable[Prompt] | Prompt,
        params: SearchParams | Iterable[SearchParams] | None = None,
        *,
        priority: int = 0,
        at_once: int | None = None,
    ) -> Generator[tuple[int, SearchResult], None, None]:
        """Like :meth:`generate`, but yields (index of the prompt, result) as results come.

        ``prompts`` is read as room becomes free, so it may be longer than memory. A failed
        request's result carries its ``error``.

        Args:
            at_once: so many prompts at most begin before each step. Those that begin together end
                together where they are equally long, so that results come in waves. None: as many
                as there is room for.
        """
        if at_once is not None:
            _check_positive("at_once", at_once)
        self.runner.check()
        source = enumerate(pair(as_prompts(prompts), params))
        own = Claim(self.runner)
        indices: dict[Request, int] = {}
        try:
            while True:
                begun = 0
                for index, (prompt, params_of) in source:
                    try:
                        request = self.make_request(prompt, params_of, priority)
                    except W2SFastError as error:
                        yield index, failed(error)
                        continue
                    indices[request] = index
                    own.submit(request)
                    begun += 1
                    if len(own) >= self._read_ahead or begun == at_once:
                        break
                if not own:
                    return
                for request in own.advance():
                    yield indices.pop(request), self.result(request)
        finally:
            own.let_go()

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
        own = Claim(self.runner)
        try:
            own.submit(request)
            while not request.ended:
                own.advance()
                piece = pieces.next(request.agreed)
                if piece is not None:
                    yield piece
            result = self.result(request)
            if result.error is not None:
                raise result.error
            yield pieces.last(result)
        finally:
            own.let_go()

    def weights_changed(self) -> None:
        """Say that weights of loaded models were changed in place.

        Most changes are noticed without: what an optimizer, ``load_state_dict`` and everything
        else does that torch's version counters see. To be called after writing through
        ``tensor.data``, or to weights made in inference mode. May be called from any thread, does
        not wait, and takes effect before the next step: cached prompts go, and running requests
        are recomputed from the hypotheses that they have kept. Weights must not change *during* a
        step, that is, while another thread runs requests of this engine.

        Raises:
            InvalidRequest: this rank leads others, whose weights it says nothing of.
        """
        self.runner.weights_changed()

    def lead(self) -> AbstractContextManager[None]:
        """For ``with``, on rank 0 of several: it alone is asked within, in any way and from any
        thread, and the others do what it does, in :meth:`follow`.

        At the end the others go on behind :meth:`follow`; what is still under way is
        :class:`Aborted`. Of one process alone nothing is changed. An
        :class:`w2s_fast.AsyncEngine` leads by itself.

        Raises:
            InvalidRequest: this is another rank, or it leads already.
            RankFailure: on entering: one has died, or does not follow.
        """
        if self.tensor_parallel == 1:
            return nullcontext()
        if self.rank != 0:
            raise InvalidRequest(
                f"rank {self.rank} leads; allowed: rank 0, and Engine.follow on the others"
            )
        return self.runner.lead()

    def follow(self) -> None:
        """On every rank but 0: do what rank 0 is asked for, until it leads no longer.

        Prompts are read, and scorers and choices are called, on rank 0 only; but the engines have
        to be made alike, with as many scorers, and the same tokenizer for stop strings.

        Raises:
            InvalidRequest: this is rank 0, or the only process.
            RankFailure: one has died, or rank 0 does not lead.
        """
        if self.rank == 0:
            raise InvalidRequest("rank 0 follows; allowed: Engine.lead, and AsyncEngine")
        assert isinstance(self._search, Search)  # of remote bases there is one rank
        size = self._models.vocab_size
        works = works_of(self.runner, self._search, self._scheduler, size)
        self.runner.follow(self._intake.same, works)

    def warm_up(self) -> None:
        """Do what the first requests would else wait for: compile kernels, record passes.

        Runs a usual search (W=K=4, L=5, two rounds) on random tokens, which leaves no trace in
        statistics or prefix caches. An engine that records passes does so when it is made;
        on a CPU, and where there is no room for such a search, there is nothing to do.
        """
        self.runner.check()
        search = self._search
        if isinstance(search, RemoteSearch):
            return
        if self.base.device.type != "cpu" or self.base.recorded:
            rehearse(self.runner, search, self._scheduler, self._models.vocab_size)

    def stats(self) -> EngineStats:
        """What the engine has done since it was made, and what it is doing. Costs next to nothing:
        it does not wait for the step under way."""
        return self.runner.stats()

    def score(
        self, prompts: Sequence[Prompt], responses: Sequence[str | Sequence[int]]
    ) -> list[float]:
        """The guides' score of given responses, in nats.

        A response of token ids is scored as it is. A text is tokenised behind its prompt, template
        or chat and all: it begins after the longest common prefix of the tokens of prompt and
        prompt + text. Where that gives other tokens for a guide's tuned model than for its untuned
        one, each behind its own prompt, the text is tokenised by itself, by the tuned model's
        tokenizer. No EOS is added. Where running requests hold the pages that it takes, some are
        set aside for it and recomputed.

        Raises:
            InvalidRequest: no guides, lists of different lengths, an empty response, or a text
                that is longer than the KV cache of a guide. Nothing is scored then.
            NumericalError: a model gave NaN or infinity for a text; says which one, and where.
        """
        found = self._scores(self.guides, prompts, responses)
        return [sum(map(sum, own)) for own in zip(*found)]

    def token_scores(
        self,
        prompts: Sequence[Prompt],
        responses: Sequence[str | Sequence[int]],
        *,
        model: str | None = None,
    ) -> list[list[float]]:
        """What each token of given responses adds to their :meth:`score`, in nats.

        Args:
            model: in the place of the guides, whose log-probs to tell: ``"base"``, ``"tuned"`` or
                ``"untuned"``; of several guides ``"tuned 0"`` and so on.

        Raises:
            InvalidRequest: as :meth:`score`; a model that is not there; or guides that read a
                response as different tokens, so that only their sums can be added.
            NumericalError: a model gave NaN or infinity for a text; says which one, and where.
        """
        guides = self.guides if model is None else [self._models.alone(model)]
        found = [list(own) for own in zip(*self._scores(guides, prompts, responses))]
        if any(len(set(map(len, own))) > 1 for own in found):
            raise InvalidRequest(
                "the guides read a response as different tokens; allowed: the log-probs of one "
                "model, or the score of the whole response"
            )
        return [[sum(of_one) for of_one in zip(*own)] for own in found]

    @property
    def scores_by_token(self) -> bool:
        """Whether all guides surely read a response as the same tokens: they share the base's
        vocabulary, or there is one."""
        return self._models.foreign is None or len(self.guides) == 1

    def _scores(
        self,
        guides: Sequence[PagedGuide],
        prompts: Sequence[Prompt],
        responses: Sequence[str | Sequence[int]],
    ) -> list[list[list[float]]]:
        """Of each guide, each response, and each of its tokens."""
        self.runner.check()
        given = self._intake.given(guides, prompts, responses)
        return [score_given(self.runner, guide, texts) for guide, texts in zip(guides, given)]

    def log_probs(
        self, texts: Sequence[str | Sequence[int]], *, top: int = 0
    ) -> list[TokenLogProbs]:
        """What the base says of every token of given texts, at temperature 1.

        A text is tokenised as a prompt is. Each runs from its first token on, in a pass of its own.

        Args:
            top: how many of the likeliest tokens to tell of each place. That of the likeliest is
                the same number, to the last bit, as that of the text's own token, if it is that.

        Raises:
            InvalidRequest: not a text, or one that is too long. Nothing is read then.
            NumericalError: the base gave NaN or infinity in a text.
        """
        self.runner.check()
        found = self._intake.readable(texts)
        size = self._models.vocab_size
        return list(read_given(self.runner, self.base, found, top, size))

    def encode(self, prompt: Prompt) -> list[int]:
        """The base's tokens of a prompt: what it is continued behind. InvalidRequest."""
        return self._intake.encode(prompt)

    def encode_behind(self, text: str) -> list[int]:
        """The base's tokens of a text that goes on: no BOS, no template. InvalidRequest."""
        return self._intake.encode_behind(text)

    def make_request(self, prompt: Prompt, params: SearchParams, priority: int = 0) -> Request:
        """Check and encode one prompt, for :attr:`runner`. InvalidRequest, and nothing is held."""
        self.runner.check()
        return self._to_request(prompt, params, priority)

    def pieces(self, request: Request) -> Pieces:
        """What cuts its response into pieces."""
        return Pieces(response_decoder(request, self.tokenizer), request.ends)

    def result(self, request: Request) -> SearchResult:
        """The result of a request that has ended; carries its error if it failed."""
        return result_of(request, self.tokenizer)


def _checked_guides(given: Any) -> list[Guide]:
    """One, several or none, as a list."""
    guides = list(given) if isinstance(given, (list, tuple)) else [] if given is None else [given]
    for guide in guides:
        if not isinstance(guide, Guide):
            kind = type(guide).__name__
            raise InvalidRequest(f"a guide is of type {kind}; allowed: a Guide, or several of them")
        if not isinstance(guide.weight, (int, float)) or not math.isfinite(guide.weight):
            raise InvalidRequest(f"weight of a guide is {guide.weight!r}; allowed: a number")
    return guides


def _check_divisible(
    base: ModelSource | RemoteBase, guides: Sequence[Guide], compile: bool, ranks: int
) -> None:
    """Whether this base can be divided among so many ranks; see :func:`check_shardable`."""
    if isinstance(base, RemoteBase):
        raise InvalidRequest(
            "tensor_parallel with a remote base; allowed: a model that is read here"
        )
    if any(guide.device is not None for guide in guides):
        raise InvalidRequest(
            "a guide's device with tensor_parallel; allowed: none, for each rank has the guides on "
            "its own device"
        )
    if compile:
        raise InvalidRequest("compile with tensor_parallel; allowed: either of them")
    check_shardable(base, ranks)


def _check_positive(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        raise InvalidRequest(f"{name} is {value!r}; allowed: an integer >= 1")
