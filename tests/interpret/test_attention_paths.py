"""Every path through the attention kernels is taken, and gives the definition."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.interpret.attention import check, launched
from tests.interpret.rule import INTERPRETED
from tests.kernels.forests import Forest, Request, attend, make_forest, strewn_tables
from w2s_fast.attention.kernel import KernelPlan
from w2s_fast.kernels import paged_attention_tiles as kernels


def launches(forest: Forest, plan: KernelPlan, **rule: Any) -> list[tuple[str, dict[str, Any]]]:
    """Which tiles a call really walks over, and what is finished: (kind, what it was given)."""
    found: list[tuple[str, dict[str, Any]]] = []
    with pytest.MonkeyPatch.context() as patch:
        parts = ("_shared_tile", "_own_tail", "_walk", "_store_part", "_few_keys", "_normalised")
        for name in parts:
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


def numbers(value: Any) -> list[int]:
    """Of each item."""
    return [int(x) for x in value.handle.data.reshape(-1)]


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
        elif name == "_few_keys":
            kind = "finished"
            lengths = [b - a + 1 for a, b in zip(numbers(x["origin"]), numbers(x["last"]))]
            found |= {"few keys"} if max(lengths) > 0 else {"no few keys"}
            found |= {"few keys twice"} if max(lengths) > number(x["AT_ONCE"]) else set()
        elif name == "_normalised" and kind == "own":
            found.add("written by the tail")
    return found


@INTERPRETED  # which tells what it runs
def test_no_split_is_launched_for_rows_that_have_none() -> None:
    """A prompt's keys are not cut; those of a row of few new tokens beside it are."""
    prompt, heads = Request(70, new=(17, 17), shares=False), 2
    with launched():
        for requests, splits in (([prompt], 1), ([prompt, Request(40, shares=False)], 2)):
            forest = make_forest(requests)
            plan = forest.plan()
            assert plan.shared is None
            tails = [x for name, x in launches(forest, plan, scale=0.25) if name == "_own_tail"]
            blocks = -(-17 * 4 // heads // 16)
            assert len(tails) == len(requests) * blocks * splits * heads
            check(forest, plan, scale=0.25)


@INTERPRETED  # which tells what it runs
@pytest.mark.parametrize("window", [None, 45])
def test_entries_that_no_row_needs_are_not_read(window: int | None) -> None:
    forest = make_forest([Request(70, ((2, 18, 30), (3, 1, 4)), (1, 2)), Request(20, shares=False)])
    plan, size = forest.plan(), forest.pool.page_size
    table, start = strewn_tables(forest, plan, seed=0)
    plan = replace(plan, page_table=table, table_start=start)
    (bad,) = forest.pool.page_table([0])[0].tolist()
    read = set()
    with launched():
        for name, x in launches(forest, plan, scale=0.25, window=window):
            walked = []
            if name == "_walk":
                walked = [(number(x["table"]), number(x["begin"]), number(x["end"]))]
            elif name == "_few_keys":
                ends = [last + 1 for last in numbers(x["last"])]
                walked = list(zip(numbers(x["table"]), numbers(x["origin"]), ends))
            for address, begin, end in walked:
                if begin < end:
                    entry = (address - table.data_ptr()) // table.itemsize
                    read |= set(range(entry + begin // size, entry + (end - 1) // size + 1))
    assert min(read) >= 0 and bad not in table[sorted(read)]
    # All that is needed is read; in a window, some of it.
    assert (len(read) == int((table != bad).sum())) == (window is None)


@INTERPRETED  # which tells what it runs
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
    everywhere = {"tile", "walked", "shared part", "own part", "written by the tail"}
    for name, more in {
        "several blocks": {
            "full tile", "part of a tile", "several blocks", "idle block",
            "other splits of a segment", "few keys", "few keys twice",
        },
        "a window": {"hidden by the window", "hidden part", "begins late", "few keys"},
        "full tiles, long tails": {"full tile", "other splits of a tail", "no few keys"},
        "room in a graph": {"padding", "idle block"},
    }.items():  # fmt: skip
        assert everywhere | more <= taken[name], (name, (everywhere | more) - taken[name])
    assert "hidden part" not in taken["several blocks"] | taken["room in a graph"]
    assert "padding" not in taken["a window"]
