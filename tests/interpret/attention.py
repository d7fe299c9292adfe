"""The attention kernels with small blocks, and trees of hypotheses to launch them on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from hypothesis import strategies as st
from torch import Tensor

from tests.interpret.products import products_in_order
from tests.interpret.rule import assert_as_exact_as_torch
from tests.kernels.forests import Forest, Request, attend
from tests.kernels.test_paged_attention import exact
from w2s_fast.attention import kernel as plans
from w2s_fast.attention import static_plan
from w2s_fast.attention.kernel import KernelPlan
from w2s_fast.kernels import paged_attention as operator
from w2s_fast.kernels import paged_attention_triton as kernels


@contextmanager
def launched(
    tile: int = 16,
    split_keys: int = 32,
    split_queries: int = 16,
    shared_tile: int = 16,
    few_keys: int = 3,
) -> Iterator[None]:
    """Blocks of 16 keys, so that few keys are many blocks and splits; 2 are finished at a time."""
    launch = kernels._Launch(tile, shared_tile, keys=16, num_warps=4, num_stages=2)
    with (
        mock.patch.object(kernels, "_launch", return_value=launch),
        mock.patch.object(kernels, "SPLIT_QUERIES", split_queries),
        mock.patch.object(kernels, "SPLIT_KEYS", split_keys),
        mock.patch.object(kernels, "FEW_KEYS", few_keys),
        mock.patch.object(kernels, "_finish", return_value=kernels._Finish(4, 2, 4)),
        mock.patch.object(plans, "SPLIT_KEYS", split_keys),
        mock.patch.object(static_plan, "SPLIT_KEYS", split_keys),
        products_in_order(),
    ):
        yield


def check(forest: Forest, plan: KernelPlan, **rule: Any) -> Tensor:
    got = attend(forest, plan, **rule)
    case = forest.case(plan)
    given = {"window": None, "softcap": None, "sinks": None, **rule}
    if given["sinks"] is not None:
        given["sinks"] = given["sinks"].cpu()
    nothing = operator._NOTHING_SHARED
    plain = operator._torch(
        *case.tensors(), *(given[k] for k in ("scale", "window", "softcap", "sinks")),
        case.max_q, case.max_k, *nothing,
    )  # fmt: skip
    assert_as_exact_as_torch(got, plain, exact(case, **given), forest.queries.dtype)
    return got


@st.composite
def trees(draw: Callable[..., Any]) -> list[Request]:
    """Up to three requests: W and K up to 3, one to three levels, lengths around borders."""
    found = []
    for _ in range(draw(st.integers(1, 3))):
        prompt = draw(st.one_of(st.integers(1, 70), st.sampled_from([15, 16, 17, 32, 33, 48, 64])))
        levels = []
        for fewest, most in draw(st.sampled_from([(), ((0, 5),), ((0, 33), (0, 5)),
                                                  ((16, 16), (16, 20), (1, 1))])):  # fmt: skip
            levels.append((draw(st.integers(1, 2 if len(levels) else 3)), fewest, most))
        new = draw(st.sampled_from([(1, 1), (1, 1), (1, 4), (3, 3)]))
        found.append(
            Request(prompt, tuple(levels), new, draw(st.sampled_from([True] * 4 + [False])))
        )
    return found
