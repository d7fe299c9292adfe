"""Many tokens in passes of bounded size: the memory that a pass needs follows from its tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from torch import Tensor

from w2s_fast.attention import RowTree
from w2s_fast.cache import NO_COPIES, Int32Array, Ints, as_int32
from w2s_fast.models.model import PagedModel


class Part(NamedTuple):
    """What one of several passes runs.

    Attributes:
        rows: which of all rows. tokens: which of all tokens.
        counts: int32, how many of them each of those rows has here.
    """

    rows: slice
    tokens: slice
    counts: Int32Array


def cut(counts: Ints, most: int) -> list[Part]:
    """Rows of so many tokens, in passes of at most ``most`` tokens, in their order.

    A row is cut only if it is longer than a pass, and a pass has each row once.
    """
    parts: list[Part] = []
    own: list[int] = []
    first = begin = size = 0

    def close(row: int) -> None:
        nonlocal own, first, begin, size
        rows, tokens = slice(first, first + len(own)), slice(begin, begin + size)
        parts.append(Part(rows, tokens, np.array(own, np.int32)))
        own, first, begin, size = [], row, begin + size, 0

    for row, count in enumerate(np.asarray(counts).tolist()):
        if own and size + count > most:
            close(row)
        while count > most:
            own, size, count = [most], most, count - most
            close(row)
        own.append(count)
        size += count
    if own:
        close(len(counts))
    return parts


def forward_in_passes(
    model: PagedModel,
    slots: Ints,
    tokens: Tensor | Ints,
    counts: Ints,
    tree: RowTree | None = None,
    copies: Int32Array = NO_COPIES,
) -> Iterator[tuple[Part, Tensor]]:
    """:meth:`PagedModel.forward` in passes of at most the model's ``max_pass_tokens`` tokens.

    Yields each pass's part and its last hidden states [tokens, D], which nobody else keeps.

    Raises:
        OutOfPages: nothing was appended.
    """
    if len(tokens) <= model.max_pass_tokens:
        everything = Part(slice(0, len(slots)), slice(0, len(tokens)), as_int32(counts))
        yield everything, model.forward(slots, tokens, counts, tree, copies)
        return
    model.pool.reserve(slots, counts)
    model.pool.copy_pages(copies)
    for part in cut(counts, model.max_pass_tokens):
        own = None if tree is None else tree.of_rows(part.rows.start, part.rows.stop)
        yield part, model.forward(slots[part.rows], tokens[part.tokens], part.counts, own)
