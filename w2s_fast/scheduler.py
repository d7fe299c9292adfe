"""Which requests run: those whose pages surely fit, in the order in which they came."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from w2s_fast.errors import InvalidRequest
from w2s_fast.model import PagedModel
from w2s_fast.request import Request


def rows_at_most(request: Request) -> int:
    """Rows that a request can have in a decoding step, each with a slot of its own."""
    params = request.params
    if params.method == "cbs":
        return max(params.first_candidates, params.kept)
    return params.first_candidates


def pages_at_most(request: Request, prompt_tokens: int, page_size: int) -> int:
    """Pages that a request can hold in one model at one time.

    The prompt once, each hypothesis's history once, and each candidate's chunk; the latter two
    begin inside a page, which is why each of them may touch one page more.
    """
    params = request.params
    chunk = _pages(params.tokens_per_round, page_size) + 1
    pages = _pages(prompt_tokens, page_size) + rows_at_most(request) * chunk
    if params.tokens_per_round < params.max_new_tokens:
        pages += params.kept * (_pages(params.max_new_tokens, page_size) + 1)
    return pages


@dataclass
class _Share:
    model: PagedModel
    guide: int | None  # whose prompt it runs; None: the base's
    free: int


class Scheduler:
    """Keeps count of the pages and rows promised to running requests.

    A request is admitted when the most it can ever need is free, so a round never runs out of
    pages half way.
    """

    def __init__(
        self, base: PagedModel, guides: Sequence[tuple[PagedModel, PagedModel]], max_rows: int
    ) -> None:
        """``max_rows``: rows of a decoding step; one request alone may have more."""
        self.max_rows = max_rows
        self._shares = [_Share(base, None, base.pool.num_pages)]
        for g, models in enumerate(guides):
            self._shares += [_Share(model, g, model.pool.num_pages) for model in models]
        self._rows = 0
        self._running = 0

    def check(self, request: Request) -> None:
        """Whether the request could run alone.

        Raises:
            InvalidRequest: names the model, what is needed and what there is.
        """
        for share, needed in self._needs(request):
            pool = share.model.pool
            if needed > pool.num_pages:
                raise InvalidRequest(
                    f"the request can need {needed * pool.page_size} tokens of KV cache in "
                    f"{share.model.name}, which has {pool.num_pages * pool.page_size}; allowed: a "
                    "shorter prompt, fewer candidates or new tokens, or a larger kv_cache_tokens"
                )
            if rows_at_most(request) > pool.manager.max_slots:
                raise InvalidRequest(
                    f"the request has {rows_at_most(request)} candidates; allowed: "
                    f"{pool.manager.max_slots}"
                )

    def admit(self, request: Request) -> bool:
        """Promise the request its pages and rows, if they are free."""
        needs = self._needs(request)
        rows = rows_at_most(request)
        if any(needed > share.free for share, needed in needs):
            return False
        if self._running and self._rows + rows > self.max_rows:
            return False
        for share, needed in needs:
            share.free -= needed
        self._rows += rows
        self._running += 1
        return True

    def leave(self, request: Request) -> None:
        """Take the promise of :meth:`admit` back; the request has given up its slots."""
        for share, needed in self._needs(request):
            share.free += needed
        self._rows -= rows_at_most(request)
        self._running -= 1

    def _needs(self, request: Request) -> list[tuple[_Share, int]]:
        needs = []
        for share in self._shares:
            if share.guide is None:
                tokens = len(request.prompt)
            elif request.params.uses_guides:
                tokens = len(request.guide_prompts[share.guide])
            else:
                continue
            needs.append((share, pages_at_most(request, tokens, share.model.pool.page_size)))
        return needs


def _pages(tokens: int, page_size: int) -> int:
    return -(-tokens // page_size)
