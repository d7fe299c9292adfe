"""Beam search of the base alone: beams grow by their likeliest continuations, a token a round."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from w2s_fast._pages import advance_beams, broken_continuations
from w2s_fast.attention import Reading
from w2s_fast.errors import NumericalError
from w2s_fast.search.base_side import BaseSide
from w2s_fast.search.endings import ended_continuations
from w2s_fast.search.request import Request
from w2s_fast.stats import timed

_BASE = 0  # among the models of a request's beams
# Rows whose logits are ranked at once: the order takes eight bytes for each logit.
_ROWS = 32


class Continuations(NamedTuple):
    """The likeliest continuations of all beams that go on, on their way to the host.

    Attributes:
        requests: whose beams they continue. begun: those of them whose prompt was run for it.
        reading: of what :func:`likeliest` found, a row for each of those beams.
    """

    requests: list[Request]
    begun: list[Request]
    reading: Reading


class BeamSide:
    """Runs beams in the base, and lets csrc/beam_search choose those that go on."""

    def __init__(self, base: BaseSide) -> None:
        self._base = base

    def run(self, requests: Sequence[Request]) -> Continuations:
        """Run all beams of beam searches that go on, by one token; the host waits for nothing."""
        begun = [request for request in requests if request.begins]
        new = [request.stats for request in begun]
        old = [request.stats for request in requests if not request.begins]
        with timed("decode_s", old, begun=new):
            logits = self._base.first_logits(requests)
            count = max(request.continuations for request in requests)
            found = likeliest(logits, min(count, logits.shape[1]))
            self._base.model.agree(found)
        return Continuations(list(requests), begun, Reading(found))

    def keep(self, found: Continuations) -> None:
        """Keep the best continuations, which ends a round of each request.

        A request in which the base produced NaN or infinity gets its ``error``, and stays as it is.
        """
        requests, pool = found.requests, self._base.model.pool
        beams = [request.beams for request in requests]
        with timed("decode_s", [request.stats for request in requests]):
            (packed,) = found.reading.wait()
            tokens, logprobs = packed[0].numpy(), packed[1].view(torch.float32).numpy()
            for index, _, position in broken_continuations(beams, tokens, logprobs):
                requests[index].error = NumericalError.at(self._base.model.name, position)
            sound = [request for request in found.begun if request.error is None]
            slots = [int(request.beams.kept_slots(_BASE)[0]) for request in sound]
            pool.remember(slots, [request.prompt for request in sound])
            ended = ended_continuations(requests, tokens, logprobs)
            pool.copy_pages(advance_beams(beams, tokens, logprobs, pool.manager, ended))


def likeliest(logits: Tensor, count: int) -> Tensor:
    """The likeliest tokens of each row, and their log-probs.

    Args:
        logits: [S, V].

    Returns:
        int32 [2, S, count]: tokens, the likeliest first and of equal ones the lowest; and the bits
        of their log-probs, float32 at temperature 1, NaN throughout where a row has any NaN or no
        largest finite logit.
    """
    found = [_likeliest(rows.float(), count) for rows in torch.split(logits, _ROWS)]
    return torch.cat(found, dim=1) if len(found) > 1 else found[0]


def _likeliest(logits: Tensor, count: int) -> Tensor:
    # As integers, numbers of float32 are in order if the negative ones are turned around. Behind
    # each its token, so that no two are equal: which of equal ones is found would be left to topk.
    bits = logits.view(torch.int32)
    order = (bits >> 31).bitwise_and_(0x7FFFFFFF).bitwise_xor_(bits).long()
    order.bitwise_left_shift_(32).sub_(torch.arange(logits.shape[1], device=logits.device))
    tokens = order.topk(count).indices
    largest = logits.amax(1, keepdim=True)
    rest = (logits - largest).exp_().sum(1, keepdim=True).log_()
    logprobs = logits.gather(1, tokens) - largest - rest
    return torch.stack([tokens.int(), logprobs.view(torch.int32)])
