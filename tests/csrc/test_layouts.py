"""What recordings are given, with room for more than there is: what is there, and what is spare."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.csrc.beams_world import EOS, PAGE, scoring, take
from w2s_fast import SearchParams
from w2s_fast._pages import (
    DrawLayout,
    PageManager,
    ScoringLayout,
    begin_rounds,
    lay_out_rows,
    lay_out_sources,
)
from w2s_fast.attention import SPLIT_KEYS, SPLIT_QUERIES, SPLIT_RULE, Columns
from w2s_fast.attention.kernel import PassFields
from w2s_fast.errors import PageMisuse
from w2s_fast.search import Request

STEPS = 4
ROWS = ("temperature", "top_k", "top_p", "min_p", "seed", "candidate", "position")
DTYPES = ("float32", "int64", "float64", "float64", "int64", "int64", "int64")


@pytest.fixture
def manager() -> PageManager:
    return PageManager(200, PAGE, 64, 20)


def drawing(manager: PageManager) -> list[Any]:
    """Two requests whose prompts stand in part, in the middle of a page."""
    made = []
    for seed, prompt in enumerate(([1, 2, 3, 4, 5, 6], [7, 8, 9])):
        params = SearchParams(
            beam_width=2, successors=2, chunk_length=5, max_new_tokens=9, top_p=0.9, seed=seed
        )
        made.append(Request(prompt, [prompt, prompt], params, eos_ids=EOS).beams)
    begin_rounds(made)
    for beams, held in zip(made, (4, 1)):
        root = manager.allocate(1)
        manager.reserve(root, np.array([held], np.int32))
        manager.extend(root, np.array([held], np.int32))
        beams.set_kept_slots(0, root)
    return made


def fields(bucket: tuple[int, ...], more: int) -> tuple[PassFields, tuple[int, ...]]:
    rows, tokens, _, splits, *_, pages = (size + more for size in bucket)
    return PassFields(rows, tokens, splits, pages, shares=True, spare=True), (rows, tokens)


def columns(layout: list[tuple[str, str, int]]) -> tuple[Columns, torch.Tensor]:
    made = Columns(layout)
    return made, torch.full((made.nbytes,), 77, dtype=torch.uint8)


@pytest.mark.parametrize("more", [0, 3])
def test_a_draw_as_a_recording_is_given_it(manager: PageManager, more: int) -> None:
    beams = drawing(manager)
    slots, counts, children, tokens, _ = lay_out_sources(beams, manager, 0)
    lengths = manager.lengths[slots] + counts
    layout = DrawLayout(beams, [manager])
    assert (layout.rows, layout.tokens, layout.max_new) == (8, 4, 2)
    assert layout.num_sources == len(slots) == 2
    layout.begin(STEPS, SPLIT_KEYS, SPLIT_QUERIES)
    # The tokens of the sources count, and those of all steps but the last.
    own, of_rows, *_ = lay_out_rows(beams, 0)
    assert manager.lengths[own].tolist() == np.repeat(lengths + STEPS - 1, children).tolist()
    ((of_sources,), (of_children,)) = layout.buckets(SPLIT_RULE, 8, 2, 100, [20])
    assert of_sources[:3] == (2, 4, 2) and of_children[:3] == (8, 8, 1)
    # Few shapes: sources have the room that the rows behind them have.
    assert of_sources[-1] == of_children[-1] == 8 * 20

    plan, (rows, count) = fields(of_sources, more)
    sizes = {"tokens": count, "last": rows, "source": 8 + more}
    made, buffer = columns([(name, "int64", size) for name, size in sizes.items()])
    whole = torch.cat([buffer, torch.zeros(plan.fields.nbytes, dtype=torch.uint8)])
    layout.write_sources(whole.numpy(), [plan.room_at(len(buffer))], [made.offsets], 8 + more)
    found = {name: column.tolist() for name, column in made.cut(whole).items()}
    assert found["tokens"] == [*tokens.tolist(), *[0] * more] == [5, 6, 8, 9, *[0] * more]
    assert found["last"] == [1, 3, *[0] * more]
    assert found["source"] == [0] * 4 + [1] * 4 + [0] * more

    plan, (rows, _) = fields(of_children, more)
    made, buffer = columns(
        [(name, dtype, rows) for name, dtype in zip(ROWS, DTYPES)]
        + [("taken", "int64", 1), ("copies", "int32", 2 * rows)]
    )
    whole = torch.cat([buffer, torch.zeros(plan.fields.nbytes, dtype=torch.uint8)])
    layout.write_rows(whole.numpy(), [plan.room_at(len(buffer))], [made.offsets])
    views = made.cut(whole)
    for name, wanted in zip(ROWS, of_rows, strict=True):
        spare = [1.0 if name == "top_p" else 0] * more
        assert views[name].tolist() == [*wanted.tolist(), *spare], name
    assert views["taken"].tolist() == [0]
    copies = views["copies"].view(-1, 2).tolist()
    # The second prompt ends in a page, which each sibling of the first child gets a copy of.
    assert layout.num_copies == [6] and copies[6:] == [[-1, -1]] * (rows - 6)
    assert (
        len({there for _, there in copies[:6]}) == 6 and len({here for here, _ in copies[:6]}) == 2
    )
    with pytest.raises(PageMisuse, match="fit"):
        layout.write_rows(whole.numpy(), [fields(of_sources, 0)[0].room_at(0)], [made.offsets])


@pytest.mark.parametrize("more", [0, 3])
def test_a_draw_of_several_models_as_a_recording_is_given_it(more: int) -> None:
    managers = [PageManager(200, PAGE, 64, 20) for _ in range(3)]
    prompts = ([1, 2, 3, 4, 5, 6], [7, 8, 9], [2, 4])  # of base and guide, all but one token there
    params = SearchParams(method="fusion", n=3, max_new_tokens=9, beta=0.25, plausibility=0.5)
    beams = [Request(prompts[0], prompts[1:], params, eos_ids=EOS, betas=[0.25, -1]).beams]
    begin_rounds(beams)
    for model, (manager, prompt) in enumerate(zip(managers, prompts)):
        root = manager.allocate(1)
        manager.reserve(root, np.array([len(prompt) - 1], np.int32))
        manager.extend(root, np.array([len(prompt) - 1], np.int32))
        beams[0].set_kept_slots(model, root)
    layout = DrawLayout(beams, managers)
    assert (layout.rows, layout.tokens, layout.max_new, layout.num_sources) == (3, 1, 1, 1)
    layout.begin(STEPS, SPLIT_KEYS, SPLIT_QUERIES)
    assert layout.some_plausible and not layout.some_dynamic
    for model, (manager, prompt) in enumerate(zip(managers, prompts)):
        slots, *_ = lay_out_rows(beams, model)
        assert manager.lengths[slots].tolist() == [len(prompt) + STEPS - 1] * 3

    def laid_out(which: int, wanted: list[list[tuple[str, str, int]]], write: Any) -> list[Any]:
        """What is written for each model: its columns first, and its plan behind them."""
        pieces, rooms, offsets, begin = [], [], [], 0
        buckets = layout.buckets(SPLIT_RULE, 3, 1, 100, [20] * 3)[which]
        for bucket, own in zip(buckets, wanted):
            made, _ = columns(own)
            plan, _ = fields(bucket, more)
            rooms.append(plan.room_at(begin + made.nbytes))
            offsets.append(made.offsets + begin)
            pieces.append((made, slice(begin, begin + made.nbytes)))
            begin += made.nbytes + plan.fields.nbytes
        whole = torch.full((begin,), 77, dtype=torch.uint8)
        write(whole.numpy(), rooms, offsets)
        return [
            {n: c.tolist() for n, c in made.cut(whole[own].clone()).items()} for made, own in pieces
        ]

    of_sources = [[("tokens", "int64", 1 + more), ("last", "int64", 1 + more)] for _ in range(3)]
    of_sources[0].append(("source", "int64", 3 + more))
    found = laid_out(0, of_sources, lambda *to: layout.write_sources(*to, 3 + more))
    assert [one["tokens"] for one in found] == [[p[-1], *[0] * more] for p in prompts]
    assert [one["last"] for one in found] == [[0] * (1 + more)] * 3
    assert found[0]["source"] == [0] * (3 + more)

    rows = 3 + more
    settings = [(name, dtype, rows) for name, dtype in zip(ROWS, DTYPES)]
    copies = ("copies", "int32", 2 * rows)
    fused = [("beta", "float32", 2 * rows), ("plausibility", "float32", rows)]
    first = [*settings, ("taken", "int64", 1), copies, *fused, ("dynamic", "bool", rows)]
    found = laid_out(1, [first, [copies], [copies]], layout.write_rows)
    assert found[0]["beta"] == [0.25, -1.0] * 3 + [0.0, 0.0] * more
    assert found[0]["plausibility"] == pytest.approx([np.log(0.5)] * 3 + [-np.inf] * more)
    assert found[0]["dynamic"] == [False] * rows
    assert found[0]["candidate"] == [0, 1, 2, *[0] * more]
    for one, count, prompt in zip(found, layout.num_copies, prompts):
        # Prompts that end within a page: each child but the first gets a copy of it.
        assert count == (2 if len(prompt) % PAGE else 0)
        pairs = np.reshape(one["copies"], (-1, 2)).tolist()
        assert pairs[count:] == [[-1, -1]] * (rows - count)
    with pytest.raises(PageMisuse, match="other columns"):
        laid_out(1, [first[:9], [copies], [copies]], layout.write_rows)
    with pytest.raises(PageMisuse, match="other models"):
        laid_out(1, [first, [copies]], layout.write_rows)


@pytest.mark.parametrize("more", [0, 3])
def test_a_selection_as_a_recording_is_given_it(manager: PageManager, more: int) -> None:
    """Indices of tokens are those of a buffer with more rows than were drawn."""
    beams = drawing(manager)
    DrawLayout(beams, [manager]).begin(STEPS, SPLIT_KEYS, SPLIT_QUERIES)
    known = np.arange(1, 9)[:, None]
    take(beams, known, -known.astype(np.float32))
    drawn = np.arange(100, 100 + STEPS * 8).reshape(STEPS, 8)
    _, _, exact, *_ = scoring(beams, beams, STEPS)
    pool = np.concatenate([drawn.ravel(), exact["tokens"]])

    layout = ScoringLayout(beams, beams, STEPS, [1.0, -0.5])
    assert layout.num_drawn == 8
    made, buffer = columns([(name, kind, count + more) for name, kind, count in layout.columns])
    layout.write(buffer.numpy(), made.offsets, made.items, 8 + more, [])
    padded = {name: column.numpy() for name, column in made.cut(buffer).items()}
    room = np.full((STEPS, 8 + more), -7)
    room[:, :8] = drawn
    larger = np.concatenate([room.ravel(), padded["tokens"]])
    for name, column in exact.items():
        own, spare = padded[name][: len(column)], padded[name][len(column) :]
        if name == "targets" or name.startswith("inputs"):
            assert larger[own].tolist() == pool[column].tolist()
            assert (larger[spare] >= 0).all(), "what is spare can be embedded"
            continue
        assert own.tolist() == column.tolist(), name
        wanted = own[-1] if name.startswith("cu_") else -1 if name == "parents" else 0
        assert (spare == wanted).all(), name
