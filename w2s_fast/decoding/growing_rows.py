"""GrowingRows: slots of one model that grow by the same number of tokens."""

from __future__ import annotations

from typing import NamedTuple

from w2s_fast.attention import RowTree
from w2s_fast.cache import NO_COPIES, Int32Array, Ints


class GrowingRows(NamedTuple):
    """S rows of one model.

    Attributes:
        slots: int32 [S]. tree: what they share.
        copies: pages to be copied before the second step; see :meth:`PagePool.copy_pages`.
    """

    slots: Ints
    tree: RowTree
    copies: Int32Array = NO_COPIES
