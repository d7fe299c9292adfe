"""Account: what one search has cost its server, and what it may."""

from __future__ import annotations

from dataclasses import dataclass

from w2s_fast.result import RemoteUsage

_NO_END = 1_000_000


@dataclass(frozen=True)
class Budget:
    """Of one search; None: as much as it takes.

    Attributes:
        requests: sent at most, those that are tried again included. tokens: read and sampled.
        prices: of a million tokens that are read, and of a million that are sampled.
    """

    requests: int | None = None
    tokens: int | None = None
    prices: tuple[float, float] | None = None


@dataclass(eq=False)
class Reservation:
    """Room for a request, and tokens that it may take; ``sent``: how often it was."""

    tokens: int
    max_tokens: int
    sent: int = 0


class Account:
    """Counts what is sent for one search. Used in one thread.

    Attributes:
        first_prompt_tokens: of the search's prompt, as the server counts; 0: it did not say.
    """

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self._requests = self._prompt = self._cached = self._completion = 0
        self._longest_prompt = self._longest_sample = 0
        self._reserved_requests = self._reserved_tokens = 0
        self.first_prompt_tokens = 0

    @property
    def usage(self) -> RemoteUsage:
        cost = None
        if self._budget.prices is not None:
            read, sampled = self._budget.prices
            cost = (self._prompt * read + self._completion * sampled) / 1e6
        return RemoteUsage(self._requests, self._prompt, self._cached, self._completion, cost)

    @property
    def spent(self) -> str:
        """Why no more requests may be sent."""
        return f"max_requests ({self._budget.requests}) is used up"

    @property
    def _left(self) -> int:
        """Requests that nobody has reserved."""
        if self._budget.requests is None:
            return _NO_END
        return self._budget.requests - self._requests - self._reserved_requests

    def reserve(self, samples: int, max_tokens: int) -> Reservation | str:
        """Room for a request of samples of so many tokens each, or why it may not be sent."""
        budget = self._budget
        if self._left < 1:
            return self.spent
        # A text that is sent on has grown by a sample since.
        tokens = self._longest_prompt + self._longest_sample + samples * max_tokens
        if budget.tokens is not None:
            known = self._prompt + self._completion + self._reserved_tokens
            if known + tokens > budget.tokens:
                return f"max_total_tokens ({budget.tokens}) is used up"
        self._reserved_requests += 1
        self._reserved_tokens += tokens
        return Reservation(tokens, max_tokens)

    def send(self, room: Reservation) -> bool:
        """Count a request that is being sent; False: it may not be sent again."""
        if room.sent and self._left < 1:
            return False
        self._reserved_requests -= not room.sent
        self._requests += 1
        room.sent += 1
        return True

    def settle(
        self, room: Reservation, *, prompt: int = 0, cached: int = 0, completion: int = 0
    ) -> None:
        """A request that room was reserved for is over: the tokens that it really took."""
        self._reserved_requests -= not room.sent
        self._reserved_tokens -= room.tokens
        self._prompt += prompt
        self._cached += cached
        self._completion += completion
        self._longest_prompt = max(self._longest_prompt, prompt)
        self._longest_sample = max(self._longest_sample, room.max_tokens)
        self.first_prompt_tokens = self.first_prompt_tokens or prompt
