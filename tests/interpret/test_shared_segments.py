"""Attention over a forest of hypotheses is dense attention, whoever reads the shared keys."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.interpret.rule import DEVICE, DTYPES, assert_as_exact_as_torch
from tests.kernels.forests import Forest, Request, attend, make_forest
from tests.kernels.test_paged_attention import NAN, exact
from w2s_fast import kernel_attention as plans
from w2s_fast.gathered_attention import LayerOptions
from w2s_fast.kernel_attention import KernelPlan
from w2s_fast.kernels import paged_attention as operator
from w2s_fast.kernels import paged_attention_triton as kernels


@contextmanager
def launched(tile: int = 16, shared_tile: int = 16, split_keys: int = 32) -> Iterator[None]:
    """Blocks of 16 keys, so that few keys are many blocks and splits."""
    launch = kernels._Launch(tile, shared_tile, keys=16, num_warps=4, num_stages=2)
    with (
        mock.patch.object(kernels, "_launch", return_value=launch),
        mock.patch.object(kernels, "SPLIT_KEYS", split_keys),
        mock.patch.object(plans, "SPLIT_KEYS", split_keys),
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


@settings(max_examples=30)
@given(
    requests=trees(),
    heads=st.sampled_from([(1, 1), (2, 2), (4, 2), (7, 1)]),
    dim=st.sampled_from([16, 24]),
    page_size=st.sampled_from([1, 3, 16, 48]),
    tiles=st.sampled_from([(16, 16), (16, 32), (32, 16)]),
    split_keys=st.sampled_from([16, 32, 512]),
    window=st.sampled_from([None, None, 1, 9, 17, 40]),
    softcap=st.sampled_from([None, None, 3.0]),
    with_sinks=st.booleans(),
    aborted=st.sampled_from([0.0, 0.0, 0.4]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**16),
)
def test_every_forest_gives_the_definition(
    requests: list[Request],
    heads: tuple[int, int],
    dim: int,
    page_size: int,
    tiles: tuple[int, int],
    split_keys: int,
    window: int | None,
    softcap: float | None,
    with_sinks: bool,
    aborted: float,
    dtype: torch.dtype,
    seed: int,
) -> None:
    forest = make_forest(requests, *heads, dim, page_size, dtype, DEVICE, aborted, seed)
    draw = torch.Generator().manual_seed(seed)
    sinks = torch.randn(heads[0], generator=draw).to(dtype).to(DEVICE) if with_sinks else None
    with launched(*tiles, split_keys):
        check(forest, forest.plan(), scale=dim**-0.5, window=window, softcap=softcap, sinks=sinks)


SEARCH = Request(61, ((3, 18, 70), (2, 1, 4)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [64, 80, 256])
def test_the_launch_table_gives_the_definition(dim: int, dtype: torch.dtype) -> None:
    request = Request(70, ((2, 18, 30), (2, 1, 4)), (1, 2))
    forest = make_forest([request], dim=dim, dtype=dtype, device=DEVICE)
    check(forest, forest.plan(), scale=dim**-0.5)


def needed(forest: Forest, plan: KernelPlan) -> Tensor:
    """bool [pages, page_size]: what stands where the launch has to read it."""
    assert plan.shared is not None
    size = forest.pool.page_size
    read = torch.zeros(forest.pool.kv.shape[2:4], dtype=torch.bool)
    runs = [(row, begin, end) for _, _, begin, end, row, _ in plan.shared.splits.tolist()]
    runs += zip(range(len(plan.lengths)), plan.shared.own.tolist(), plan.lengths.tolist())
    for row, begin, end in runs:
        for t in range(begin, end):
            read[plan.page_table[row, t // size], t % size] = True
    return read


@contextmanager
def new_tensors_of_nan() -> Iterator[None]:
    """What torch.empty gives may be anything, so nothing may be read before it is written."""
    empty = torch.empty
    with mock.patch.object(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(NAN)):
        yield


@pytest.mark.parametrize("page_size", [3, 16])
@pytest.mark.parametrize("window", [None, 40, 60])
def test_a_segment_is_read_from_its_first_rows_pages_alone(
    window: int | None, page_size: int
) -> None:
    """Everything else may be garbage: copies in the other rows' pages, and all free pages."""
    forest = make_forest([SEARCH, Request(33, ((3, 2, 5),))], page_size=page_size, device=DEVICE)
    with launched():
        plan = forest.plan()
        expected = check(forest, plan, scale=0.25, window=window)
        unread = ~needed(forest, plan)
        copies = unread & forest.pool.kv[0, 0, :, :, 0, 0].cpu().isfinite()
        assert copies.any()
        forest.pool.kv[0][:, unread.to(DEVICE)] = NAN
        with new_tensors_of_nan():
            got = attend(forest, plan, scale=0.25, window=window)
        assert torch.equal(got, expected)


def rows_of(forest: Forest, out: Tensor, rows: np.ndarray[Any, Any]) -> Tensor:
    parts = out.split(forest.counts.tolist())
    return torch.cat([parts[row] for row in rows])


@pytest.mark.parametrize("window", [None, 33])
@pytest.mark.parametrize("seed", range(2))
def test_a_row_gives_the_same_bits_whichever_rows_run_beside_it(
    seed: int, window: int | None
) -> None:
    requests = [
        Request(50, ((2, 18, 30), (2, 1, 4)), (1, 2)),
        Request(35, ((2, 0, 5), (2, 1, 4)), (1, 3)),
        Request(40, shares=False),
    ]
    forest = make_forest(requests, device=DEVICE, seed=seed)
    draw = np.random.default_rng(seed)
    count = len(forest.slots)
    chosen = [
        np.flatnonzero(forest.request == 1),  # a request alone
        np.argsort(-forest.request, kind="stable"),  # other neighbours
        np.flatnonzero(draw.random(count) < 0.5),  # some are aborted
        np.array([draw.integers(count)]),  # a row alone
    ]
    rule = {"scale": 0.25, "window": window, "sinks": torch.randn(4).to(DEVICE)}
    with launched():
        everyone = attend(forest, forest.plan(), **rule)
        for rows in chosen:
            if len(rows):
                got = attend(forest, forest.plan(rows), forest.queries_of(rows), **rule)
                assert torch.equal(got, rows_of(forest, everyone, rows))
        # A row that shares nothing gives what it gives where nobody does.
        alone = np.flatnonzero(forest.request == 2)
        plain = attend(forest, forest.plan(shared=False), **rule)
        assert torch.equal(rows_of(forest, plain, alone), rows_of(forest, everyone, alone))
        assert not torch.equal(plain, everyone)  # other sums: the plan does make a difference


def test_the_table_of_float32_gives_the_same_bits_whoever_runs() -> None:
    forest = make_forest([Request(600, ((2, 18, 30), (2, 1, 4))), Request(40)], device=DEVICE)
    everyone = attend(forest, forest.plan(), scale=0.25)
    rows = np.array([1, 2])
    got = attend(forest, forest.plan(rows), forest.queries_of(rows), scale=0.25)
    assert torch.equal(got, rows_of(forest, everyone, rows))


def launches(forest: Forest, plan: KernelPlan, **rule: Any) -> list[tuple[str, dict[str, Any]]]:
    """Which tiles a call really walks over, and what is merged: (kind, what it was given)."""
    found: list[tuple[str, dict[str, Any]]] = []
    with pytest.MonkeyPatch.context() as patch:
        for name in ("_shared_tile", "_own_tail", "_walk", "_store_part", "_normalised"):
            inner = getattr(kernels, name)

            def seen(*args: Any, _name: str = name, _inner: Any = inner) -> Any:
                given = dict(zip(_inner.arg_names, args))
                found.append((_name, given))
                return _inner(*args)

            patch.setattr(kernels, name, seen)
        attend(forest, plan, **rule)
    return found


def number(value: Any) -> int:
    return int(value.handle.data.reshape(-1)[0]) if hasattr(value, "handle") else int(value)


def paths(forest: Forest, plan: KernelPlan, **rule: Any) -> set[str]:
    """Names of what happened in a call."""
    found: set[str] = set()
    kind = ""
    entry: list[int] = []
    tile = 0
    walked = False
    assert plan.shared is not None
    for name, x in launches(forest, plan, **rule):
        if name == "_shared_tile":
            kind, tile, walked = "shared", number(x["TILE"]), False
            entry = plan.shared.splits[number(x["entry"])].tolist()
            items = entry[1] * number(x["GROUP"]) - number(x["block"]) * tile
            found.add("padding" if entry[1] == 0 else "idle block" if items <= 0 else "tile")
            found |= {"full tile"} if items >= tile else {"part of a tile"} if items > 0 else set()
            found |= {"several blocks"} if number(x["block"]) > 0 and items > 0 else set()
            found |= {"other splits of a segment"} if entry[2] > 0 and entry[5] > 0 else set()
        elif name == "_own_tail":
            kind = "own"
            found |= {"other splits of a tail"} if number(x["split"]) > 0 else set()
        elif name == "_walk":
            walked = number(x["begin"]) < number(x["end"])
            if kind == "shared":
                found.add("hidden by the window" if not walked else "walked")
                found |= {"begins late"} if walked and number(x["begin"]) > entry[2] else set()
        elif name == "_store_part":
            found.add(f"{kind} part")
            found |= {"hidden part"} if kind == "shared" and not walked else set()
        elif name == "_normalised" and kind:
            found.add("merged" if x["acc"].shape[0] == 1 else "written by the tail")
    return found


@pytest.mark.skipif(DEVICE != "cpu", reason="only the interpreter tells what it runs")
def test_every_path_is_taken_and_gives_the_definition() -> None:
    plain = Request(20, shares=False)
    taken: dict[str, set[str]] = {}
    with launched():
        forest = make_forest([Request(70, ((2, 18, 30), (4, 1, 4)), (1, 2)), plain])
        taken["several blocks"] = paths(forest, forest.plan(), scale=0.25)
        check(forest, forest.plan(), scale=0.25)
        taken["a window"] = paths(forest, forest.plan(), scale=0.25, window=45)
        check(forest, forest.plan(), scale=0.25, window=45)
        forest = make_forest([Request(64, ((4, 0, 0), (2, 40, 50))), plain])
        taken["full tiles, long tails"] = paths(forest, forest.plan(), scale=0.25)
        check(forest, forest.plan(), scale=0.25)
        plan = forest.plan()
        expected = attend(forest, plan, scale=0.25)
        assert plan.shared is not None
        room = torch.zeros(3, 6, dtype=torch.int32)
        room[1] = torch.tensor([9, 0, 0, 10**6, 10**6, 99])  # whatever else it says
        splits = torch.cat([room, plan.shared.splits, room])
        plan.shared = plan.shared._replace(splits=splits, max_parts=9, max_own=99, max_tokens=40)
        taken["room in a graph"] = paths(forest, plan, scale=0.25)
        assert torch.equal(check(forest, plan, scale=0.25), expected)
    everywhere = {"tile", "walked", "shared part", "own part", "merged", "written by the tail"}
    for name, more in {
        "several blocks": {
            "full tile", "part of a tile", "several blocks", "idle block",
            "other splits of a segment",
        },
        "a window": {"hidden by the window", "hidden part", "begins late"},
        "full tiles, long tails": {"full tile", "other splits of a tail"},
        "room in a graph": {"padding", "idle block"},
    }.items():  # fmt: skip
        assert everywhere | more <= taken[name], (name, (everywhere | more) - taken[name])
    assert "hidden part" not in taken["several blocks"] | taken["room in a graph"]
    assert "padding" not in taken["a window"]


@pytest.mark.parametrize("window", [None, 20])
def test_steps_under_one_plan_equal_steps_under_new_plans(window: int | None) -> None:
    """Tails that grow over the border of a block and a split, and of a page."""
    forest = make_forest([Request(40, ((2, 17, 30), (2, 10, 14))), Request(21)], device=DEVICE)
    pool, slots, ones = forest.pool, forest.slots, forest.counts
    options = LayerOptions(scale=0.25, window=window, softcap=None, sinks=None)
    steps, tree = 7, forest.tree()
    pool.reserve(slots, ones * steps)
    with launched(split_keys=16):
        plan = KernelPlan.make(pool, slots, ones, tree, ahead=steps - 1)
        shared, begins = plan.shared, plan.positions.clone()
        for step in range(steps):
            if step:
                plan.advance()
            q, (k, v) = torch.randn(len(slots), 4, 16), torch.randn(2, len(slots), 2, 16)
            tensors = [x.to(DEVICE) for x in (q, k, v)]
            got = plan.attend(0, *tensors, options)
            new = KernelPlan.make(pool, slots, ones, tree)
            assert torch.equal(got, new.attend(0, *tensors, options))
            for ours, theirs in zip(
                (plan.write, plan.positions, plan.lengths, plan.cu_seqlens_q),
                (new.write, new.positions, new.lengths, new.cu_seqlens_q),
            ):
                assert torch.equal(ours, theirs)
            assert plan.shared is shared and new.shared is not None and shared is not None
            for a, b in zip(shared[:4], new.shared[:4]):
                assert torch.equal(a, b)
            pool.extend(slots, ones)
        assert torch.equal(plan.positions, begins + steps - 1)
