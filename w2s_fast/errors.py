"""Every error the package raises on purpose, in one place.

All derive from :class:`W2SFastError`; each also derives from the built-in that a caller
would expect, so ``except ValueError`` around a bad request works as usual.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any


class W2SFastError(Exception):
    """Base class of all errors of this package.

    Attributes:
        results: set by :meth:`w2s_fast.Engine.generate` when one request of a batch fails:
            every ``SearchResult`` of the batch in the order of the prompts (the failed ones carry
            their ``error``), so that neighbours are never lost.
    """

    results: list[Any] | None = None


class InvalidRequest(W2SFastError, ValueError):
    """A prompt or a search parameter is not allowed; the message says what is."""


class UnsupportedModel(W2SFastError, ValueError):
    """A model cannot be loaded or cannot be served from pages; the message says why."""


class MismatchedVocabulary(UnsupportedModel):
    """A guide's models do not share one vocabulary, or whether it is the base's cannot be told."""


class NumericalError(W2SFastError, ArithmeticError):
    """A model produced NaN or infinity; the message names the model and the position."""

    @classmethod
    def at(cls, model: str, position: int) -> NumericalError:
        """``position``: of the token in the response."""
        return cls(f"model {model!r} gave NaN or infinity at position {position} of the response")


class ScorerFailure(W2SFastError, RuntimeError):
    """A scorer or a choice of the caller's raised an exception for this request's candidates (see
    ``__cause__``), or gave what cannot be used; the message says which."""


class OutOfPages(W2SFastError, RuntimeError):
    """The KV cache has too few free pages (or slots) for what was asked."""


class PageMisuse(W2SFastError, RuntimeError):
    """The page manager was called wrongly; its state is as before the call."""


class Aborted(W2SFastError):
    """The request was given up by its caller before it ended."""


class EngineFailure(W2SFastError, RuntimeError):
    """A model failed in a way that no single request is to blame for; see ``__cause__``."""


class RankFailure(EngineFailure):
    """Of an engine on several ranks one has died or gone another way: the group is of no more use,
    and every request of it ends. The message says what to do; other engines can take them."""


class RemoteFailure(W2SFastError, RuntimeError):
    """The server of a remote base cannot be used, or did not give what it was asked for; the
    message names it, what was asked, and what to change. No key is in it."""


class WriteFailed(W2SFastError, OSError):
    """A file cannot be written any further; what was written before is whole."""


class FetchFailed(W2SFastError, RuntimeError):
    """A model could not be fetched; the message says why. What has arrived is gone on with."""


def some_of(names: Collection[str], most: int = 5) -> str:
    """The first few of many names in their order, for a message."""
    first = ", ".join(sorted(names)[:most])
    more = len(names) - most
    return f"{first} and {more} more" if more > 0 else first
