"""Draws: a part of them is a view, in which what is drawn later is seen."""

from __future__ import annotations

import torch

from w2s_fast.decoding.draws import Draw, Draws


def test_a_part_is_a_view_of_the_first_steps_and_rows() -> None:
    draws = Draws.empty(4, 8, torch.device("cpu"))
    draws.memory.zero_()
    part = draws.part(3, 5)
    assert (len(part), part.rows, part.room) == (3, 5, 8)
    tokens, logprobs = torch.arange(8), -torch.arange(8.0)
    draws.put(2, Draw(tokens, logprobs))
    assert part.tokens[2].tolist() == [0, 1, 2, 3, 4]
    assert part.logprobs[2].tolist() == [0, -1, -2, -3, -4]


def test_a_part_has_the_steps_and_rows_that_are_asked_for_last() -> None:
    draws = Draws.empty(4, 8, torch.device("cpu"))
    for steps, rows in ((3, 5), (3, 5), (2, 5), (2, 6), (3, 6)):
        part = draws.part(steps, rows)
        assert (len(part), part.rows) == part.tokens.shape == (steps, rows)
        assert part.memory.data_ptr() == draws.memory.data_ptr()
