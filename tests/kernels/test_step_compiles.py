"""A step of the search compiles without a graph break: the operators fit into torch.compile."""

from __future__ import annotations

import torch
from torch import Tensor

from w2s_fast.kernels.linear_logprob import linear_logprob
from w2s_fast.kernels.sample_tokens import sample_tokens
from w2s_fast.kernels.select_beams import Selection, select_beams

REQUESTS, CANDIDATES, LENGTH, WIDTH, VOCABULARY = 3, 4, 2, 16, 40
ROWS = REQUESTS * CANDIDATES


def step(base: Tensor, tuned: Tensor, untuned: Tensor, heads: list[Tensor]) -> Selection:
    """Sample a chunk from the base's hidden states, score it with the guide's, select.

    base, tuned, untuned: hidden states [LENGTH, ROWS, WIDTH]; heads: [VOCABULARY, WIDTH] each.
    """
    row = torch.arange(ROWS)
    ones = torch.ones(ROWS, dtype=torch.float64)
    tokens = torch.stack(
        [
            sample_tokens(
                hidden @ heads[0].T, 0.7 * ones.float(), 0 * row + 5, 0.9 * ones, 0 * ones,
                row // CANDIDATES, row % CANDIDATES, 0 * row + t,
            )[0]
            for t, hidden in enumerate(base)
        ]
    )  # fmt: skip
    chunks = tokens.T.flatten()
    logprobs = [
        linear_logprob(hidden.transpose(0, 1).flatten(0, 1), head, chunks)[None]
        for hidden, head in ((tuned, heads[1]), (untuned, heads[2]))
    ]
    flag = torch.zeros(REQUESTS, dtype=torch.bool)
    return select_beams(
        *logprobs, torch.ones(1, dtype=torch.float64), chunks,
        torch.arange(0, ROWS * LENGTH + 1, LENGTH), 0 * ones, 0 * row + LENGTH, row.int(),
        row // 2, torch.arange(0, ROWS + 1, CANDIDATES), torch.full((REQUESTS,), 2), flag, flag,
        CANDIDATES, 2,
    )  # fmt: skip


def test_a_step_of_the_search_is_one_graph() -> None:
    hidden = [torch.randn(LENGTH, ROWS, WIDTH) for _ in range(3)]
    heads = [torch.randn(VOCABULARY, WIDTH) for _ in range(3)]
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for found, expected in zip(compiled(*hidden, heads), step(*hidden, heads), strict=True):
        torch.testing.assert_close(found, expected)
