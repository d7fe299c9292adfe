"""The interpreter's products, for tests that compare bits."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest import mock

import numpy as np

from tests.interpret.rule import DEVICE


def products_in_order() -> AbstractContextManager[Any]:
    """Each sum of a product is taken in an order that follows from its length alone.

    A tensor core's is. What numpy calls may add in another order for 16 rows than for 32, or for
    the last rows of a tile: it depends on the processor.
    """
    if DEVICE != "cpu":
        return nullcontext()
    from triton.runtime import interpreter

    def create_dot(self: Any, a: Any, b: Any, d: Any, *_: Any) -> Any:
        left, right = (x.data.astype(d.data.dtype) for x in (a, b))
        terms = left[..., :, None, :] * right.swapaxes(-1, -2)[..., None, :, :]
        sums = np.ascontiguousarray(terms).sum(-1)
        return interpreter.TensorHandle(sums + d.data, d.dtype.scalar)

    return mock.patch.object(interpreter.InterpreterBuilder, "create_dot", create_dot)
