"""rotate computes what transformers' rotary embeddings do."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from w2s_fast.kernels.rotate import rotate


def drawn_heads(
    batch: int, heads: int, kv_heads: int, tokens: int, dim: int, dtype: torch.dtype, one: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As attention has them: heads behind tokens, and the angles of each token."""
    q = torch.randn(batch, tokens, heads, dim).to(dtype).transpose(1, 2)
    k = torch.randn(batch, tokens, kv_heads, dim).to(dtype).transpose(1, 2)
    angles = 9 * torch.rand(1 if one else batch, tokens, dim // 2)
    both = torch.cat([angles, angles], -1)
    return q, k, both.cos().to(dtype), both.sin().to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("one", [True, False])
@pytest.mark.parametrize("shape", [(1, 4, 2, 5, 8), (2, 3, 3, 1, 6), (2, 3, 1, 0, 4)])
def test_it_is_what_transformers_computes(
    shape: tuple[int, int, int, int, int], one: bool, dtype: torch.dtype
) -> None:
    given = drawn_heads(*shape, dtype, one)
    for got, expected, x in zip(rotate(*given), apply_rotary_pos_emb(*given), given):
        assert torch.equal(got, expected) and got.stride() == x.stride()


@pytest.mark.parametrize(
    "shapes",
    [
        [(1, 2, 3, 5), (1, 2, 3, 5), (1, 3, 5), (1, 3, 5)],
        [(2, 3, 4), (1, 2, 3, 4), (1, 3, 4), (1, 3, 4)],
        [(1, 2, 3, 4), (1, 2, 3, 6), (1, 3, 4), (1, 3, 4)],
        [(1, 2, 3, 4), (1, 2, 3, 4), (1, 3, 2), (1, 3, 2)],
        [(1, 2, 3, 4), (1, 2, 3, 4), (2, 3, 4), (2, 3, 4)],
        [(1, 2, 3, 4), (1, 2, 3, 4), (1, 3, 4), (1, 1, 4)],
    ],
)
def test_shapes_that_do_not_fit_are_named(shapes: list[tuple[int, ...]]) -> None:
    with pytest.raises(ValueError, match=r"must be \[B, H, T, D\], \[B, Hkv, T, D\]"):
        rotate(*(torch.zeros(shape) for shape in shapes))


def test_other_dtypes_are_named() -> None:
    q, k, cos, sin = drawn_heads(1, 1, 1, 1, 4, torch.float32, True)
    with pytest.raises(ValueError, match=r"q, k, cos and sin are .*float32, .*float16"):
        rotate(q, k.half(), cos, sin)
