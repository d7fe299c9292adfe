"""Every operator is a proper torch operator: its schema, its fake and torch.compile agree with it.

A new operator is one more line in ``OPERATORS``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from w2s_fast.kernels.choose_beta import choose_beta
from w2s_fast.kernels.copy_pages import copy_pages
from w2s_fast.kernels.fuse_logits import fuse_logits
from w2s_fast.kernels.linear_logprob import linear_logprob
from w2s_fast.kernels.linear_logprob_partials import Partials, linear_logprob_partials
from w2s_fast.kernels.paged_attention import SharedSegments, paged_attention
from w2s_fast.kernels.rms_norm import rms_norm
from w2s_fast.kernels.rotate import rotate
from w2s_fast.kernels.sample_tokens import sample_tokens
from w2s_fast.kernels.score_select import score_select
from w2s_fast.kernels.select_beams import select_beams
from w2s_fast.kernels.token_logprob import token_logprob
from w2s_fast.kernels.write_kv import write_kv

# name: (the public function, arguments and keyword arguments of it, arguments of the operator).
Operator = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], tuple[Any, ...]]


def operators() -> dict[str, Operator]:
    logits, tokens = torch.randn(5, 40), torch.randint(33, (5,))
    hidden, weight, bias = torch.randn(5, 12), torch.randn(40, 12), torch.randn(40)
    tuned, untuned, beta = torch.randn(2, 5, 40), torch.randn(2, 5, 40), torch.rand(2, 5)
    row = torch.arange(5)
    sampling = (row / 4, row, 1 - row.double() / 8, row.double() / 50, row, row, row)
    # Two requests with two candidates each, of two new tokens.
    ones, flags = torch.ones(4, dtype=torch.float64), torch.tensor([False, True])
    round_: tuple[Any, ...] = (
        -torch.rand(1, 8), -torch.rand(1, 8), ones[:1], torch.randint(9, (8,)),
        torch.arange(0, 9, 2), 0 * ones, torch.full((4,), 2), torch.zeros(4, dtype=torch.int32),
        torch.arange(4), torch.tensor([0, 2, 4]), torch.tensor([1, 2]), flags, flags, 2, 2,
    )  # fmt: skip
    # The same as drawn, with two guides and a stop id each.
    models = [Partials(-torch.rand(8, 3), torch.rand(8, 3), -torch.rand(8) - 1) for _ in range(4)]
    guides = [(models[0], models[1]), (models[2], models[3])]
    stops, cu_stops = torch.tensor([3, 5]), torch.tensor([0, 1, 2])
    drawn = (ones[:2], round_[3], -torch.rand(8), *round_[4:10], stops, cu_stops, *round_[10:])
    # Three rows of 1, 2 and 0 new tokens in five pages of four.
    pages, q, sinks = torch.randn(2, 5, 4, 2, 8), torch.randn(3, 4, 8), torch.randn(4)
    table = torch.tensor([[3, 0], [1, 4], [2, -1]], dtype=torch.int32)
    lengths, cu_seqlens = torch.tensor([5, 7, 4]).int(), torch.tensor([0, 1, 3, 3]).int()
    paged = (q, pages, table, lengths, cu_seqlens)
    attention = {
        "scale": 0.3, "window": 3, "softcap": 9.0, "sinks": sinks, "max_q": 2, "max_k": 7,
    }  # fmt: skip
    # The first two rows share their first four keys.
    shared = SharedSegments(
        own=torch.tensor([4, 4, 0]).int(), parts=torch.tensor([1, 1, 0]).int(),
        token_rows=torch.tensor([0, 1, 1]).int(),
        splits=torch.tensor([[0, 3, 0, 4, 0, 0]]).int(), max_tokens=3, max_parts=1, max_own=4,
    )  # fmt: skip
    pages[:, 1] = pages[:, 3]
    # Only the first one's table has the page of these.
    ragged = (torch.tensor([3, 0, 4, 2]).int(), torch.tensor([0, 1, 3]).int())
    k, v, slots = torch.randn(3, 2, 8), torch.randn(3, 2, 8), torch.tensor([12, -1, 6])
    turned = (
        torch.randn(2, 3, 4, 8),
        torch.randn(2, 4, 1, 8).transpose(1, 2),
        *torch.rand(2, 1, 4, 8),
    )
    kv, pairs = torch.randn(3, 2, 5, 4, 2, 8), torch.tensor([[4, 1], [0, -1], [4, 2]]).int()
    return {
        "rms_norm": (rms_norm, (hidden, weight[0], 1e-6), {}, (hidden, weight[0], 1e-6, False)),
        "rms_norm with an offset": (
            rms_norm,
            (hidden, weight[0], 1e-6),
            {"offset": True},
            (hidden, weight[0], 1e-6, True),
        ),
        "rotate": (rotate, turned, {}, turned),
        "copy_pages": (copy_pages, (kv, pairs), {}, (kv, pairs)),
        "write_kv": (write_kv, (k, v, pages, slots), {}, (k, v, pages, slots)),
        "paged_attention": (
            paged_attention,
            paged,
            attention,
            (*paged, *attention.values(), *[None] * 4, 0, 0, 0),
        ),
        "paged_attention of shared segments": (
            paged_attention,
            paged,
            {**attention, "shared": shared},
            (*paged, *attention.values(), *shared),
        ),
        "paged_attention by ragged tables": (
            paged_attention,
            (*paged[:2], ragged[0], *paged[3:]),
            {**attention, "shared": shared, "table_start": ragged[1]},
            (*paged[:2], ragged[0], *paged[3:], *attention.values(), *shared, ragged[1]),
        ),
        "token_logprob": (
            token_logprob,
            (logits, tokens),
            {"vocab_size": 33, "scale": 0.5, "softcap": 9.0},
            (logits, tokens, 33, 0.5, 9.0),
        ),
        "linear_logprob": (
            linear_logprob,
            (hidden, weight, tokens, bias, 9.0, 0.5, 33),
            {},
            (hidden, weight, tokens, bias, 9.0, 0.5, 33),
        ),
        "linear_logprob_partials": (
            linear_logprob_partials,
            (hidden, weight, tokens, bias, 9.0, 0.5, 33),
            {},
            (hidden, weight, tokens, bias, 9.0, 0.5, 33),
        ),
        "sample_tokens": (sample_tokens, (logits, *sampling), {}, (logits, *sampling)),
        "fuse_logits": (
            fuse_logits,
            (logits, tuned, untuned, beta),
            {},
            (logits, tuned, untuned, beta),
        ),
        "choose_beta": (choose_beta, (logits, tuned, untuned), {}, (logits, tuned, untuned)),
        "select_beams": (select_beams, round_, {}, round_),
        "score_select": (
            score_select,
            (guides, *drawn),
            {},
            (drawn[1], *map(list, zip(*models)), drawn[0], *drawn[2:]),
        ),
    }


OPERATORS = list(operators())


@pytest.mark.parametrize("name", OPERATORS)
def test_schema_and_fake_agree_with_the_operator(name: str) -> None:
    *_, arguments = operators()[name]
    torch.library.opcheck(getattr(torch.ops.w2s_fast, name.split()[0]).default, arguments)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", OPERATORS)
def test_the_public_function_compiles_without_a_graph_break(name: str, dynamic: bool) -> None:
    function, arguments, keywords, _ = operators()[name]
    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    torch.testing.assert_close(compiled(*arguments, **keywords), function(*arguments, **keywords))
