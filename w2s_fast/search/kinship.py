"""What the rows of a search have in common: prompts, and what siblings inherited."""

from __future__ import annotations

from collections.abc import Sequence

from w2s_fast.attention import Level, RowTree
from w2s_fast.search.beam import Beam
from w2s_fast.search.request import Request


def family_tree(rows: Sequence[tuple[Request, Beam]], prompts: Sequence[int]) -> RowTree:
    """What rows share: those of a request its prompt and more, siblings what they inherited.

    Args:
        rows: candidates, or the beams that they come from; request by request, and siblings
            together.
        prompts: for each row, how many tokens of the prompt stand in the KV.
    """
    requests: list[int] = []
    families: list[int] = []
    together, inherited = [], []
    before: tuple[Request, int | None] | None = None
    for (request, beam), prompt in zip(rows, prompts):
        fresh = before is None or before[0] is not request
        requests.append(requests[-1] + fresh if requests else 0)
        fresh = fresh or before is None or before[1] != beam.parent
        families.append(families[-1] + fresh if families else 0)
        before = (request, beam.parent)
        # A parent stands in the KV without its last token.
        together.append(prompt + min(request.shared_tokens, beam.inherited))
        inherited.append(prompt + beam.inherited)
    return RowTree.of([Level(requests, together), Level(families, inherited)], len(rows))
