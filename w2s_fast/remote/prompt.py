"""RemotePrompt: what a search sends its server, before the response."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from w2s_fast.remote.account import Account
from w2s_fast.remote.utf8 import Utf8Breaks


@dataclass(eq=False)
class RemotePrompt:
    """A prompt, and how its samples are drawn.

    Attributes:
        content: a text, or chat messages. continues: the response goes on with the last of these.
        options: of a chat, more fields of each request.
        sampling: fields of each request, as ``temperature``, by the names that servers have.
        greedy: all samples behind one text are the same.
        account: of this search.
        breaks: where chunks end before their lengths; None: they do not.
    """

    content: str | Sequence[Mapping[str, Any]]
    sampling: Mapping[str, Any]
    account: Account
    breaks: Utf8Breaks | None = None
    greedy: bool = False
    continues: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
