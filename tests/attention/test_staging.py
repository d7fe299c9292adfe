"""Tensors side by side in one buffer: none touches another, and what is spare is as said."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from w2s_fast.attention.staging import Field, Fields, Room, host_buffer
from w2s_fast.errors import PageMisuse

DTYPES = [torch.int32, torch.int64, torch.float32, torch.float64]
NUMPY = {dtype: torch.empty(0, dtype=dtype).numpy().dtype for dtype in DTYPES}
CPU = torch.device("cpu")

fields_of = st.lists(
    st.builds(
        Field,
        dtype=st.sampled_from(DTYPES),
        shape=st.integers(0, 9).map(lambda size: (size,)),
        spare=st.sampled_from([0, 1]),
    ),
    min_size=1,
    max_size=6,
).map(lambda drawn: {f"f{i}": field for i, field in enumerate(drawn)})


@given(wanted=fields_of, data=st.data())
def test_every_field_keeps_what_was_filled_in(
    wanted: dict[str, Field], data: st.DataObject
) -> None:
    fields = Fields(wanted)
    buffer = host_buffer(fields.nbytes, CPU).fill_(77)
    assert len(buffer) % 16 == 0
    values = {
        name: np.arange(1, 1 + data.draw(st.integers(0, field.shape[0])), dtype=NUMPY[field.dtype])
        for name, field in wanted.items()
    }
    fields.fill(buffer.numpy(), values)
    views = fields.tensors(buffer)
    assert views.keys() == wanted.keys()
    for name, (dtype, (size,), spare) in wanted.items():
        assert views[name].dtype == dtype and views[name].data_ptr() % 16 == 0
        filled = values[name].tolist()
        assert views[name].tolist() == filled + [spare] * (size - len(filled))


def test_views_of_a_part_of_a_buffer() -> None:
    fields = Fields({"a": Field(torch.int32, (2, 3)), "b": Field(torch.int64, (2,))})
    buffer = torch.zeros(16 + fields.nbytes, dtype=torch.uint8)
    views = fields.tensors(buffer[16:])
    views["a"].copy_(torch.arange(6).view(2, 3))
    views["b"].fill_(-1)
    assert buffer[:16].eq(0).all()
    assert buffer[16:40].view(torch.int32).tolist() == list(range(6))
    assert buffer[48:64].view(torch.int64).tolist() == [-1, -1]


def test_a_room_gives_the_same_memory_until_it_is_too_small() -> None:
    room = Room(CPU)
    first = room.take(64)
    assert room.take(16).data_ptr() == first.data_ptr()
    # As much again finds room behind it.
    assert room.take(128).data_ptr() == first.data_ptr()
    larger = room.take(129)
    assert len(larger) == 129 and larger.data_ptr() != first.data_ptr()
    assert room.take(128).data_ptr() == larger.data_ptr()
    first.fill_(1)  # still its holder's
    assert first.eq(1).all()


@pytest.mark.parametrize(
    "values",
    [np.zeros(3), np.zeros(3, np.int32), np.zeros(5, np.int64), np.zeros(6, np.int64)[::2]],
)
def test_a_value_that_does_not_fit_is_refused(values: np.ndarray) -> None:
    fields = Fields({"a": Field(torch.int64, (4,))})
    buffer = np.zeros(fields.nbytes, np.uint8)
    with pytest.raises(PageMisuse, match="does not fit"):
        fields.fill(buffer, {"a": values})
