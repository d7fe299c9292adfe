"""Guides of another vocabulary than the base's: they read the text that candidates say.

No token id of one vocabulary ever reaches the other. What turns tokens to text and text to tokens
is handed in; of its results only what is named here is looked at.
"""

from __future__ import annotations

from array import array
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from w2s_fast.models import PagedModel
from w2s_fast.search.guide import PagedGuide


class Said(Protocol):
    """What a response of the base says."""

    @property
    def text(self) -> str:
        """All of it that is certain."""
        ...


class Listens(Protocol):
    """Decodes the base's responses as they grow."""

    def extend(
        self, texts: Sequence[tuple[Sequence[int], Sequence[int], Any, bool]]
    ) -> Sequence[Said | Exception]:
        """What each says now, or why that is not known.

        ``texts``: of each the prompt's tokens, the response's without one that ends it by itself,
        what it said before, and whether it has ended: then nothing is held back.
        """
        ...


class Text(Protocol):
    """A prompt and a response in a guide's vocabulary.

    Attributes:
        ids: int32, of both. start: where the response begins, at least 1.
    """

    @property
    def ids(self) -> array[int]: ...

    @property
    def start(self) -> int: ...


class Grown(Protocol):
    """A text that has grown, and how many of its first tokens are those that it had before."""

    @property
    def text(self) -> Text: ...

    @property
    def common(self) -> int: ...


class Translates(Protocol):
    """Encodes responses behind their prompts, as they grow."""

    def extend(self, texts: Sequence[Any], responses: Sequence[str]) -> Sequence[Grown | Exception]:
        """Each text with the whole response that it has now, or why it cannot be encoded."""
        ...


class ForeignGuide(NamedTuple):
    """A guide of another vocabulary.

    Attributes:
        guide: its models over their pages.
        eos_token_id: what the base's EOS becomes; None: nothing.
        why: how its vocabulary differs from the base's.
    """

    guide: PagedGuide
    eos_token_id: int | None
    why: str


class ForeignPrompt(NamedTuple):
    """A request's prompt, as foreign guides have it.

    Attributes:
        said: the empty response. texts: the prompt in each of their models; the same object where
            two of them have the same.
    """

    said: Said
    texts: Sequence[Text]


class ForeignGuides(NamedTuple):
    """All of an engine's.

    Attributes:
        guides: at least one. translators: of each of their models, each once.
        listener: of the base. silent_ids: tokens of the base that no text shows.
    """

    guides: Sequence[ForeignGuide]
    translators: Mapping[PagedModel, Translates]
    listener: Listens
    silent_ids: Collection[int]
