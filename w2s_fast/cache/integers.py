"""Lists and arrays of integers, as the page manager takes them: int32, contiguous."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from w2s_fast.errors import PageMisuse

Int32Array: TypeAlias = NDArray[np.int32]
Ints: TypeAlias = NDArray[np.integer] | Sequence[int]
_INT32 = np.dtype(np.int32)
NO_COPIES: Int32Array = np.empty((0, 2), np.int32)


def as_int32(values: Ints) -> Int32Array:
    """`values` as a contiguous int32 array [n]. PageMisuse if they are not integers that fit."""
    if isinstance(values, np.ndarray) and values.dtype is _INT32 and values.ndim == 1:
        return np.ascontiguousarray(values)  # as nearly all are: the same array
    array = np.asarray(values)
    if array.ndim != 1:
        raise PageMisuse(f"expected one dimension, got {array.ndim}")
    if array.dtype != np.int32:
        if array.size == 0:
            return np.empty(array.shape, np.int32)
        if array.dtype.kind not in "iu":
            raise PageMisuse(f"expected integers, got {array.dtype}")
        info = np.iinfo(np.int32)
        if array.min() < info.min or array.max() > info.max:
            raise PageMisuse("an integer does not fit into 32 bits")
    return np.ascontiguousarray(array, np.int32)


def ragged_int32(sequences: Sequence[Ints]) -> tuple[Int32Array, Int32Array]:
    """Sequences one after the other, int32 [sum of lengths], and their lengths, int32 [n]."""
    arrays = [as_int32(sequence) for sequence in sequences]
    flat = np.concatenate(arrays) if arrays else np.empty(0, np.int32)
    return flat, np.array([len(array) for array in arrays], np.int32)
