"""Engines over remote bases, with guides that are tiny."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tests.support.foreign_guides import pairs
from tests.support.probed import probed_once
from w2s_fast import Engine, Guide, RemoteBase, SearchParams, SearchResult

SEARCH = SearchParams(
    beam_width=3, successors=2, chunk_length=4, max_new_tokens=11, trace=True, seed=5
)
SAMPLE = SearchParams(method="sample", max_new_tokens=5, trace=True)
PROMPTS = ["the film was a", "hello world", "\u4eca\u5929 it's", "x"]


def remote(
    url: str,
    kinds: Sequence[str] = ("bpe-first",),
    *,
    guides: Sequence[Guide] | None = None,
    scorers: Sequence[Any] = (),
    template: str | None = None,
    **base: Any,
) -> Engine:
    """``kinds``: of the guides' tokenizers. ``base``: options of :class:`RemoteBase`."""
    with probed_once():
        return Engine(
            base=RemoteBase(url, **base),
            guides=list(pairs(*kinds) if guides is None else guides),
            scorers=scorers,
            prompt_template=template,
            kv_cache_tokens=4096,
            page_size=4,
            device="cpu",
        )


def told(result: SearchResult) -> Any:
    """What a result says, but for what it cost."""
    assert result.error is None, result.error
    assert result.trace is not None
    return (
        [(h.text, h.finish_reason, h.stop_reason, h.score) for h in result.hypotheses],
        [(r.kept, [(c.text, c.parent, c.finish_reason) for c in r.candidates])
         for r in result.trace.rounds],
        result.trace.draws,
        result.ended_early,
    )  # fmt: skip
