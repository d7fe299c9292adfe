"""An outbox gives out memory again, and never before what is copied from it has been copied."""

from __future__ import annotations

import pytest
import torch

import w2s_fast.attention.outbox
from w2s_fast.attention import Outbox

CPU = torch.device("cpu")


class Mark:
    """Of a device that does nothing until it is told so."""

    def __init__(self) -> None:
        self.recorded = self.reached = 0

    def record(self) -> None:
        self.recorded += 1

    def query(self) -> bool:
        return self.reached == self.recorded


def test_a_sheet_that_was_sent_is_taken_again() -> None:
    outbox = Outbox(48, CPU)
    first, second = outbox.take(), outbox.take()
    assert first.tensor.data_ptr() != second.tensor.data_ptr()
    first.array[:] = 7
    assert first.tensor.tolist() == [7] * 48
    outbox.send(first)
    assert outbox.take() is first
    outbox.send(second)
    outbox.send(first)
    assert [outbox.take() for _ in range(2)] == [second, first]


def test_no_sheet_is_taken_before_it_was_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(w2s_fast.attention.outbox, "mark_on", lambda _: Mark())
    outbox = Outbox(48, CPU)
    sheets = [outbox.take() for _ in range(2)]
    for sheet in sheets:
        outbox.send(sheet)
    other = outbox.take()
    assert all(other is not sheet for sheet in sheets)
    marks = [sheet.copied for sheet in sheets]
    assert all(isinstance(mark, Mark) and mark.recorded == 1 for mark in marks)
    marks[0].reached = 1  # type: ignore[union-attr]
    assert outbox.take() is sheets[0]
    assert outbox.take() is not sheets[1]
