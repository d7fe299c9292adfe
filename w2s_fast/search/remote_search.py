"""The search over a remote base: its samples come when they come, guides score them here.

A step asks for what rounds begin with, and closes rounds of which everything has come. Between the
two a request rests, and holds nobody up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch

from w2s_fast._pages import begin_rounds
from w2s_fast.models import PagedModel, inference
from w2s_fast.remote import Source
from w2s_fast.search.choices import Choices
from w2s_fast.search.expansion import Decoded
from w2s_fast.search.foreign_guide import ForeignGuides
from w2s_fast.search.foreign_side import ForeignSide
from w2s_fast.search.remote_side import RemoteSide
from w2s_fast.search.request import Request
from w2s_fast.search.search import InFlight
from w2s_fast.stats import timed


class RemoteSearch:
    """As :class:`Search`, over guides that all have vocabularies of their own.

    Attributes:
        models: that share a vocabulary with the base: none.
        foreign: the guides.
        ahead: whether steps are launched before the host has read the last: never.
    """

    ahead = False

    def __init__(
        self,
        source: Source,
        told: Callable[[], None],
        foreign: ForeignGuides | None,
    ) -> None:
        """``told``: called when samples have come, in any thread."""
        self.models: list[PagedModel] = []
        self.foreign = ForeignSide(foreign)
        self._remote = RemoteSide(source, told)
        self._choices = Choices([], self.foreign, [self.foreign, self._remote])

    @property
    def all_models(self) -> list[PagedModel]:
        return list(self.foreign.models)

    @property
    def devices(self) -> list[torch.device]:
        """The guides'."""
        return list(dict.fromkeys(model.device for model in self.all_models))

    @property
    def decoded(self) -> Decoded:
        """Samples that have been asked for, and behind how many texts."""
        return Decoded(self._remote.samples, self._remote.asked)

    @inference
    def step(self, requests: Sequence[Request]) -> None:
        """Ask for what is missing, and close the rounds of which everything has come.

        What fails for one request is its own ``error``.
        """
        begin_rounds([request.beams for request in requests])
        new = [request for request in requests if request.drawing is None]
        self._remote.ask(new)
        came = [r for r in requests if r.drawing is not None and r.drawing.complete]
        for request in came:
            if request.drawing is not None and not request.drawing.taken:
                self._remote.take(request)
        self._abort_failed(came)
        # Of those that have just asked, too: guides read their prompts while samples are drawn.
        reading = [r for r in requests if r.error is None and r.foreign is not None]
        with timed("prefill_s", [request.stats for request in reading]):
            waiting = self.foreign.enter(reading)
        complete = [r for r in came if r.error is None and r not in waiting]
        self._choices.open([request for request in complete if request.host_chooses])
        plain = [request for request in complete if not request.host_chooses]
        self._choices.end(plain, [_came(request) for request in plain])
        self._abort_failed(complete)

    def launch(self, requests: Sequence[Request]) -> InFlight:
        """Nothing of a step is left for :meth:`finish`."""
        self.step(requests)
        return InFlight(requests, [], [], None, None, False, None, None, None)

    def finish(self, step: InFlight) -> None:
        """A step is over when it was launched."""

    @inference
    def close(self, requests: Sequence[Request]) -> None:
        """Close rounds of which it was decided who is kept."""
        self._choices.close(requests)
        self._abort_failed(requests)

    def set_aside(self, request: Request) -> None:
        """Give back all slots of a request between two rounds; its next step recomputes them."""
        request.beams.set_aside([])
        self.foreign.give_up(request)

    def start_over(self, request: Request) -> None:
        """Give back all slots of a request. Its round begins again, with what was drawn for it."""
        request.choice = None
        request.beams.start_over([])
        self.foreign.give_up(request)
        self._remote.start_over(request)

    def abort(self, request: Request) -> None:
        """Give back all slots of a request, and have nothing drawn for it any longer."""
        request.choice = None
        request.beams.abort([])
        self.foreign.forget(request)
        self._remote.forget(request)

    def keep_only(self, requests: Sequence[Request]) -> None:
        """Give back every slot that none of these requests holds, and draw for them alone."""
        self.foreign.keep_only(requests)
        self._remote.keep_only(requests)

    def _abort_failed(self, requests: Iterable[Request]) -> None:
        for request in requests:
            if request.error is not None:
                self.abort(request)


def _came(request: Request) -> list[int]:
    """Those of its candidates for which something has come."""
    assert request.drawing is not None
    count = len(request.beams.candidates)
    return [c for c in range(count) if c not in request.drawing.dropped]
