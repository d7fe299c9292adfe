"""Passes that are loaded together lie together, unless their room has grown in between."""

from __future__ import annotations

import pytest
import torch

from tests.support.tiny_models import tiny_model
from w2s_fast.attention import Bucket, Room
from w2s_fast.decoding.static_passes import StaticPasses
from w2s_fast.models import PagedModel


@pytest.mark.parametrize("grows", [False, True])
def test_one_buffer_of_the_host_fills_both(grows: bool) -> None:
    model = PagedModel(tiny_model("llama", dtype=torch.float32), kv_cache_tokens=256)
    room = Room(model.device)

    def cut(rows: int, behind: StaticPasses | None = None) -> StaticPasses:
        bucket = Bucket.smallest(rows, rows, 1, 4)
        return StaticPasses.cut([model], [bucket], [{}], [["copies"]], room, behind)

    first = cut(4)
    if grows:
        room.take(100 * first.nbytes)
    second = cut(2, behind=first)
    together = second.buffer.data_ptr() == first.buffer.data_ptr() + first.nbytes
    assert together == (not grows)
    assert second.nbytes == len(first.buffer) + len(second.buffer)

    sheet = second.outbox.take()
    host = sheet.tensor.copy_(torch.arange(second.nbytes) % 251)
    second.take(sheet)
    assert torch.equal(torch.cat([first.buffer, second.buffer]), host)
    # Where what is laid out goes to: the plan reads it from there.
    (offset,) = second.columns[0].tolist()
    pairs = second.plans[0].more["copies"]
    assert torch.equal(pairs.view(torch.uint8), host[offset : offset + 4 * len(pairs)])
