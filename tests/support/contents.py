"""What stands in the pages of a slot, and what a recomputation of its tokens gives."""

from __future__ import annotations

import torch

from w2s_fast.models import PagedModel


def contents(model: PagedModel, slot: int, length: int) -> torch.Tensor:
    """Keys and values of a slot's first tokens: [layers, 2, length, heads, dim]."""
    pages = model.pool.page_table([slot])[0].long()
    return model.pool.kv[:, :, pages].flatten(2, 3)[:, :, :length]


def assert_recomputed(model: PagedModel, slot: int, text: list[int], other: PagedModel) -> None:
    """The slot holds what ``other``, the same model over its own pages, makes of the text."""
    assert int(model.pool.lengths([slot])[0]) == len(text)
    own = other.pool.allocate(1)
    other.forward(own, torch.tensor(text), [len(text)])
    expected = contents(other, int(own[0]), len(text))
    torch.testing.assert_close(contents(model, slot, len(text)), expected, atol=1e-5, rtol=1e-5)
    other.pool.release(own)
