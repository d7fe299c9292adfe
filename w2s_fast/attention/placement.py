"""Placement: where the new tokens of a pass stand, in their sequences and in the pages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from w2s_fast.cache import Int32Array, Ints, PagePool, as_int32


class Spans(NamedTuple):
    """The rows of a pass, on the host.

    Attributes:
        old, new: int32 [S], tokens of each row before the pass, and in it.
        start: int32 [S + 1], where each row's new tokens begin among those of the pass.
    """

    old: Int32Array
    new: Int32Array
    start: Int32Array

    @classmethod
    def of(cls, pool: PagePool, slots: Ints, counts: Ints) -> Spans:
        new = as_int32(counts)
        start = np.concatenate(([0], new.cumsum())).astype(np.int32)
        return cls(pool.lengths(slots), new, start)


@dataclass(kw_only=True)
class Placement:
    """Where T new tokens of S rows stand.

    Attributes:
        pool: the pages of the model that runs.
        page_table: int32 [S, M], the rows' pages.
        positions: int64 [T], each token's position in its sequence.
        write: int64 [T], where its keys and values go: page * page_size + offset. Negative:
            nowhere.
        stride: by how many tokens each row moves on; a tensor int64 [T] where some do not.
    """

    pool: PagePool
    page_table: Tensor
    positions: Tensor
    write: Tensor
    stride: Tensor | int = 1

    @classmethod
    def at(cls, pool: PagePool, slots: Ints, spans: Spans) -> Placement:
        """After ``reserve``, before ``extend``."""
        old, new, start = spans
        offset = np.arange(start[-1]) - np.repeat(start[:-1], new)
        positions = torch.from_numpy(np.repeat(old, new) + offset)
        return Placement(
            pool=pool,
            page_table=pool.page_table(slots),
            positions=positions.to(pool.device, non_blocking=True),
            write=pool.places(slots, new),
        )

    def advance(self) -> None:
        """Move on by a token a row, in place: with one new token a row, and room reserved."""
        self.positions += self.stride
        size = self.pool.page_size
        place = self.page_of(self.positions // size) * size + self.positions % size
        if isinstance(self.stride, Tensor):
            place = torch.where(self.stride > 0, place, -1)
        self.write.copy_(place)

    def page_of(self, entry: Tensor) -> Tensor:
        """The page of an entry of each row's table; int64 [S] -> int32 [S].

        With one token a row. What comes of rows that have no page is not defined.
        """
        return self.page_table.gather(1, entry[:, None])[:, 0]
