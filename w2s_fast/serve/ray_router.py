"""Which replica a request goes to: the one that has its beginning's pages, unless it is busier.

Serve's own extension point: a request router, in every process that sends requests to replicas.
"""

from __future__ import annotations

import hashlib
import random
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from w2s_fast.serve.carried import Asked


class Beginnings:
    """Who was sent which beginnings of texts; the oldest are forgotten."""

    def __init__(self, block: int, most: int) -> None:
        """``block``: characters after which a shared beginning counts. ``most``: kept."""
        self._block = block
        self._most = most
        self._found: OrderedDict[bytes, Any] = OrderedDict()

    def sent(self, text: str, to: Any) -> None:
        for key in self._keys(text):
            self._found[key] = to
            self._found.move_to_end(key)
        while len(self._found) > self._most:
            self._found.popitem(last=False)

    def longest(self, text: str) -> Iterator[Any]:
        """Who was sent a text that begins like this one, the longest common beginning first."""
        for key in reversed(list(self._keys(text))):
            if key in self._found:
                yield self._found[key]

    def _keys(self, text: str) -> Iterator[bytes]:
        """One for every block, of all that stands up to its end; and of a text that fills none."""
        digest = hashlib.blake2b(digest_size=16)
        for begin in range(0, len(text) - self._block + 1, self._block):
            digest.update(text[begin : begin + self._block].encode("utf-8", "surrogatepass"))
            yield digest.digest()
        if text and len(text) < self._block:
            yield hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


class PrefixRouter(RequestRouter):  # type: ignore[misc]
    """Prefers the replica that was sent the longest beginning of a request's text.

    As long as it has no more than ``most_ahead`` requests more than the least busy one: affinity
    saves a prompt's pass, and an idle replica saves a whole search. Else, and for what nobody has
    seen, the less busy of two at random, as Serve does it. Each router knows what it has sent
    itself.

    Args (``request_router_kwargs``):
        block: characters; a shared beginning counts by whole blocks, about a page of tokens each.
        remembered: blocks. most_ahead: requests.
    """

    def initialize_state(
        self, block: int = 64, remembered: int = 1 << 18, most_ahead: int = 4
    ) -> None:
        self._beginnings = Beginnings(block, remembered)
        self._most_ahead = most_ahead

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Ranks of replicas: of the first one that has room, the least busy is taken."""
        ranks = [random.sample(candidate_replicas, min(2, len(candidate_replicas)))]
        if len(candidate_replicas) > 2:
            ranks.append(candidate_replicas)  # those two may be full
        if pending_request is None:
            return ranks
        pending_request.routing_context.should_backoff = True
        by_id = {replica.replica_id: replica for replica in candidate_replicas}
        for replica_id in self._beginnings.longest(_beginning(pending_request)):
            if replica_id in by_id:
                if self._ahead(replica_id, candidate_replicas) <= self._most_ahead:
                    ranks.insert(0, [by_id[replica_id]])
                break
        return ranks

    def on_request_routed(
        self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any
    ) -> None:
        self._beginnings.sent(_beginning(pending_request), replica_id)

    def _ahead(self, replica_id: ReplicaID, replicas: list[RunningReplica]) -> int:
        """By what was heard last; of whom nothing was heard, nothing is known."""
        heard = {r.replica_id: self.replica_queue_len_cache.get(r.replica_id) for r in replicas}
        own = heard[replica_id]
        known = [length for length in heard.values() if length is not None]
        return 0 if own is None else int(own - min(known))


def _beginning(pending: PendingRequest) -> str:
    return next((arg.beginning for arg in pending.args if isinstance(arg, Asked)), "")
