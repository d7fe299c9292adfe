"""Blocks of attention over pages: like runs of tokens and keys, computed as one dense product."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from w2s_fast.attention.contract import LayerOptions
from w2s_fast.attention.dense import Part, additive_mask, fused, partial_attention
from w2s_fast.cache import PagePool

_NEVER = 2**40  # the position of a key that does not exist: in every query's future

Int64Array = NDArray[np.int64]


@dataclass(frozen=True)
class Runs:
    """Products to compute: runs of tokens of the pass with runs of positions of a row.

    Attributes, all int64 [N]:
        token, count: tokens token : token + count; all tokens of one row or of several.
        row: the row whose keys are read. begin, end: their positions, those of this pass included.
        last: ``end`` in the last of the passes ahead.
        low, high: the least and the greatest position of the tokens.
    """

    token: Int64Array
    count: Int64Array
    row: Int64Array
    begin: Int64Array
    end: Int64Array
    last: Int64Array
    low: Int64Array
    high: Int64Array

    def __getitem__(self, which: Int64Array | slice) -> Runs:
        return Runs(*(getattr(self, column.name)[which] for column in fields(self)))


@dataclass
class Block:
    """Runs that are computed as one dense product, padded to Q queries and L keys.

    Attributes:
        tokens: the tokens of the runs, one after the other: int64 [N], or a slice of them all.
        padded: int64 [S * Q], the same with padding, which repeats a run's first token; None if
            nothing is padded.
        real: int64 [N], which of those S * Q are no padding; None if all.
        sequences, queries, length: S, Q and L.
        places: where the keys are in the pages: int64 [S, L and the keys of passes ahead], or a
            slice if S is 1. Padding repeats a run's first key: unwritten pages may hold NaN,
            which no mask would stop.
        key_positions: int64, as places; padding is ``_NEVER``.
        newest: int64 [S], the position of the last key, in a block that grows by a key a pass;
            else None.
        even: all runs have L keys.
        causal: query i of a run has the position of its key i, and there are no others.
        lead: the least distance of a run's first key behind a query of the run.
        reach: the greatest.
    """

    tokens: Tensor | slice
    padded: Tensor | None
    real: Tensor | None
    sequences: int
    queries: int
    length: int
    places: Tensor | slice
    key_positions: Tensor
    newest: Tensor | None
    even: bool
    causal: bool
    lead: int
    reach: int
    _masks: dict[object, tuple[Tensor, Tensor | None]] = field(default_factory=dict)

    def advance(self) -> None:
        self.lead += 1
        self.reach += 1
        self._masks.clear()
        if self.newest is not None:
            self.newest += 1
            self.length += 1

    def beyond(self, window: int | None) -> int:
        """How many of the first keys lie outside of every query's window."""
        return 0 if window is None else max(0, self.lead - window + 1)

    def attend(
        self,
        query: Tensor,
        kv: Tensor,
        positions: Tensor,
        options: LayerOptions,
        workspace: Tensor,
    ) -> Part:
        """query [T, H, D], kv [2, P, Hkv, D]: out [N, H, D] and lse [N, H] of ``tokens``.

        The workspace [2, at least ``gathered``, Hkv, D] is overwritten.
        """
        key, value = self._gather(kv, self.beyond(options.window), workspace)
        q = take_rows(query, self.tokens if self.padded is None else self.padded)
        q = q.view(self.sequences, self.queries, *q.shape[1:])
        mask, blind, causal = None, None, False
        narrow = options.window is not None and options.window <= self.reach
        if narrow or not self.even or (self.newest is not None and self.queries > 1):
            causal = self.causal and not narrow and fused(query, options)
            if not causal:
                groups = query.shape[1] // key.shape[2]
                mask, blind = self._mask(options.window, positions, groups, q.dtype)
        out, lse = partial_attention(q, key, value, mask, options, causal)
        if blind is not None:
            lse = lse.masked_fill(blind, -torch.inf)
        out, lse = out.flatten(0, 1), lse.flatten(0, 1)
        if self.real is not None:
            out, lse = out.index_select(0, self.real), lse.index_select(0, self.real)
        return Part(out, lse)

    @property
    def gathered(self) -> int:
        """The most keys that a pass copies."""
        return 0 if isinstance(self.places, slice) else self.places.numel()

    def _gather(self, kv: Tensor, first: int, workspace: Tensor) -> Tensor:
        """kv [2, P, Hkv, D] -> [2, S, L - first, Hkv, D]."""
        if isinstance(self.places, slice):
            return kv[:, self.places][:, None, first : self.length]
        places = self.places[:, first : self.length]
        if self.newest is not None and not self.even:
            written = self.key_positions[:, first : self.length] <= self.newest[:, None]
            places = torch.where(written, places, self.places[:, :1])
        flat, copies = places.flatten(), workspace[:, : places.numel()]
        for pages, copy in zip(kv, copies):
            torch.index_select(pages, 0, flat, out=copy)
        return copies.view(2, *places.shape, *kv.shape[2:])

    def _mask(
        self, window: int | None, positions: Tensor, groups: int, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor | None]:
        """The mask, and bool [S, Q, 1]: which queries have no key in their window. For all layers.

        Those see every key, so that their softmax is not 0 / 0; their lse is to be -inf.
        """
        kind = (window, groups, dtype)
        if kind not in self._masks:
            query = take_rows(positions, self.tokens if self.padded is None else self.padded)
            key = self.key_positions[:, self.beyond(window) : self.length]
            distance = query.view(self.sequences, self.queries, 1) - key[:, None]
            seen, blind = distance >= 0, None
            if window is not None:
                seen &= distance < window
                blind = ~seen.any(-1, keepdim=True)
                seen |= blind
            self._masks[kind] = additive_mask(seen, groups, dtype), blind
        return self._masks[kind]


def _consecutive(pages: Int64Array, begin: int, end: int, page_size: int) -> bool:
    return bool((np.diff(pages[begin // page_size : -(-end // page_size)]) == 1).all())


def make_block(runs: Runs, table: Int64Array, pool: PagePool, own: bool) -> Block:
    def on_device(array: NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(array).to(pool.device)

    length, room = runs.end - runs.begin, runs.last - runs.begin
    queries, size = int(runs.count.max()), pool.page_size
    q, k = np.arange(queries), np.arange(room.max())
    real = q < runs.count[:, None]
    padded = np.where(real, runs.token[:, None] + q, runs.token[:, None])
    tokens = padded[real]
    exists = k < room[:, None]
    position = runs.begin[:, None] + np.where(exists, k, 0)
    places = table[runs.row[:, None], position // size] * size + position % size
    begin, last = int(runs.begin[0]), int(runs.last[0])
    view = len(length) == 1 and _consecutive(table[runs.row[0]], begin, last, size)
    in_order = bool((np.diff(tokens) == 1).all())
    return Block(
        tokens=slice(int(tokens[0]), int(tokens[-1]) + 1) if in_order else on_device(tokens),
        padded=None if real.all() else on_device(padded.ravel()),
        real=None if real.all() else on_device(real.ravel().nonzero()[0]),
        sequences=len(length),
        queries=queries,
        length=int(length.max()),
        places=slice(int(places[0, 0]), int(places[0, -1]) + 1) if view else on_device(places),
        key_positions=on_device(np.where(exists, position, _NEVER)),
        newest=on_device(runs.end - 1) if own else None,
        even=bool((length == length[0]).all()),
        causal=own and bool(((runs.low == runs.begin) & (runs.count == length)).all()),
        lead=int((runs.low - runs.begin).min()),
        reach=int((runs.high - runs.begin).max()),
    )


def take_rows(tensor: Tensor, rows: Tensor | slice) -> Tensor:
    """A view of a slice of rows, a copy of others."""
    return tensor[rows] if isinstance(rows, slice) else tensor.index_select(0, rows)
