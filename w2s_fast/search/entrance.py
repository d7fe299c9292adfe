"""Requests that enter, or come back after they were set aside: the texts that they go on from.

These are run in pieces, so many tokens a step, and the requests wait as long. How far a text has
come, the length of its slot says.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from w2s_fast._pages import lacking
from w2s_fast.models import PagedModel
from w2s_fast.search.beginnings import advance
from w2s_fast.search.request import Request

_NO_SLOT = -1


class Entered(NamedTuple):
    """How far requests came in one model.

    Attributes:
        waiting: those whose texts do not stand yet.
        adopted: tokens of their prompts that new ones found in the cache.
        rows: for each pass that was taken, how many texts it ran.
        left: tokens that may still be run in this step.
    """

    waiting: list[Request]
    adopted: dict[Request, int]
    rows: list[int]
    left: int


def enter(
    model: PagedModel,
    index: int,
    requests: Sequence[Request],
    prompts: Sequence[Sequence[int]],
    most: int,
    *,
    finishes: bool = False,
) -> Entered:
    """Run texts of requests in the middle of a round, the most urgent first.

    Args:
        index: the model's, among those of a request's beams.
        prompts: theirs, of this model.
        most: tokens that may be run.
        finishes: the caller runs the rest of new prompts, their last token included, as soon as all
            of it fits into ``most``.

    Raises:
        OutOfPages: there is no room.
    """
    pool = model.pool
    lacks = lacking([request.beams for request in requests], pool.manager, index)
    order = sorted(np.flatnonzero(lacks).tolist(), key=lambda i: requests[i].urgency)
    entrants = [_Entrant(requests[i], index, prompts[i]) for i in order]
    new = [one for one in entrants if one.slots[0] == _NO_SLOT]
    for one, slot in zip(new, pool.allocate(len(new)).tolist()):
        one.hold([slot])
    roots = [one for one in entrants if one.runs_root(model)]
    ran = advance(
        model,
        np.array([one.slots[0] for one in roots], np.int32),
        [one.root for one in roots],
        most,
        [finishes and one.new for one in roots],
    )
    rows = ran.rows
    waits = {one.request for one, ready in zip(roots, ran.ready) if not ready}
    back = [one for one in entrants if not one.new and one.request not in waits]
    _fork(model, [one for one in back if _NO_SLOT in one.slots])
    rest = advance(
        model,
        np.array([slot for one in back for slot in one.slots], np.int32),
        [text for one in back for text in one.texts],
        ran.left,
    )
    owners = [one.request for one in back for _ in one.texts]
    waits |= {request for request, ready in zip(owners, rest.ready) if not ready}
    return Entered(
        [request for request in requests if request in waits],
        {one.request: int(found) for one, found in zip(roots, ran.adopted) if one.new},
        rows + rest.rows,
        rest.left,
    )


class _Entrant:
    """A request in a model where not all of its texts stand.

    Attributes:
        new: whether it is in its first round.
        texts: that are to stand: its prompt, or each hypothesis that goes on; without the last
            token. slots: of each; the first one's comes first, and the others are forked from it.
        root: what the texts have in common.
    """

    def __init__(self, request: Request, index: int, prompt: Sequence[int]) -> None:
        self.request, self._index = request, index
        self.new = request.beams.round == 1
        self.slots = request.beams.kept_slots(index).tolist()
        if self.new:
            self.texts = [prompt[:-1]]
            self.root = self.texts[0]
            return
        alive = [beam.tokens for beam in request.beams.kept if beam.finish_reason is None]
        self.texts = [[*prompt, *tokens][:-1] for tokens in alive]
        shared = min(request.beams.shared, len(alive[0]) - 1)
        self.root = self.texts[0][: len(prompt) + shared]

    def runs_root(self, model: PagedModel) -> bool:
        """Whether the root is still to be run, or the others to be forked from it."""
        return _NO_SLOT in self.slots or model.pool.lengths(self.slots[:1])[0] < len(self.root)

    def hold(self, slots: Sequence[int]) -> None:
        """Take slots: the root's, or all."""
        self.slots = [*slots, *[_NO_SLOT] * (len(self.texts) - len(slots))]
        self.request.beams.set_kept_slots(self._index, np.array(self.slots, np.int32))


def _fork(model: PagedModel, entrants: Sequence[_Entrant]) -> None:
    """Slots for all texts, from roots that stand."""
    counts = [len(one.texts) - 1 for one in entrants]
    others = iter(model.pool.fork([one.slots[0] for one in entrants], counts).tolist())
    for one in entrants:
        one.hold([one.slots[0], *(next(others) for _ in one.texts[1:])])
