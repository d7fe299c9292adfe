"""The torch side: what stands in the pages of a PagePool."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from w2s_fast.cache.pages import PagePool
from w2s_fast.errors import OutOfPages, PageMisuse

LAYERS, HEADS, DIM, PAGE_SIZE = 3, 2, 4, 4


def make(
    num_pages: int = 16, dtype: torch.dtype = torch.float32, prefix_cache: bool = False
) -> PagePool:
    return PagePool(
        layers=LAYERS,
        num_kv_heads=HEADS,
        head_dim=DIM,
        num_pages=num_pages,
        page_size=PAGE_SIZE,
        max_slots=8,
        max_tokens_per_slot=14,
        dtype=dtype,
        device="cpu",
        prefix_cache=prefix_cache,
    )


def write(pool: PagePool, slots, values: list[torch.Tensor]) -> None:
    """Appends values[i] [n, LAYERS, 2, HEADS, DIM] to slots[i], as a model's forward pass does."""
    counts = [len(value) for value in values]
    pool.reserve(slots, counts)
    where = pool.places(slots, counts)
    rows = torch.cat(values)
    for layer in range(LAYERS):
        for which in range(2):
            pool.kv[layer, which].view(-1, HEADS, DIM)[where] = rows[:, layer, which]
    pool.extend(slots, counts)


def read(pool: PagePool, slot: int) -> torch.Tensor:
    """What stands in a slot, through the page table: [n, LAYERS, 2, HEADS, DIM]."""
    pages = pool.page_table([slot])[0].long()
    n = int(pool.lengths([slot])[0])
    return pool.kv[:, :, pages].flatten(2, 3)[:, :, :n].permute(2, 0, 1, 3, 4)


def tokens(n: int, seed: int) -> torch.Tensor:
    return torch.randn(n, LAYERS, 2, HEADS, DIM, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def pool():
    pool = make()
    # Poison: a page read without having been written or copied cannot go unnoticed.
    pool.kv.fill_(float("nan"))
    yield pool
    pool.manager.check()


def test_each_slot_reads_back_what_was_written(pool):
    slots = pool.allocate(3)
    values = [tokens(n, n) for n in (5, 0, 9)]
    write(pool, slots, values)
    for slot, value in zip(slots, values, strict=True):
        assert torch.equal(read(pool, slot), value)


def test_children_continue_a_copy_of_their_parent_without_disturbing_it(pool):
    slots = pool.allocate(1)
    prompt = tokens(6, 0)
    write(pool, slots, [prompt])
    family = [*slots, *pool.fork(slots, [2])]
    ends = [tokens(3, seed) for seed in (1, 2, 3)]
    write(pool, family, ends)
    for slot, end in zip(family, ends, strict=True):
        assert torch.equal(read(pool, slot), torch.cat([prompt, end]))
    assert pool.manager.used_pages == 1 + 3 * 2  # the full page of the prompt is shared


def test_rewriting_after_a_rollback_leaves_siblings_alone(pool):
    slots = pool.allocate(1)
    prompt, other = tokens(8, 0), tokens(5, 1)
    write(pool, slots, [prompt])
    child = pool.fork(slots, [1])
    pool.truncate(child, [3])  # into a page that the parent still reads
    write(pool, child, [other])
    assert torch.equal(read(pool, slots[0]), prompt)
    assert torch.equal(read(pool, child[0]), torch.cat([prompt[:3], other]))


def test_a_page_is_copied_in_all_layers_keys_and_values(pool):
    pool.kv.copy_(torch.randn_like(pool.kv))
    before = pool.kv.clone()
    pool.copy_pages(np.array([[3, 5], [0, 1], [3, 7]], np.int32))
    expected = before.clone()
    expected[:, :, [5, 1, 7]] = before[:, :, [3, 0, 3]]
    assert torch.equal(pool.kv, expected)


def test_page_table_is_as_wide_as_its_longest_slot(pool):
    slots = pool.allocate(3)
    write(pool, slots, [tokens(9, 0), tokens(2, 1), tokens(0, 2)])
    table = pool.page_table(slots)
    assert table.dtype == torch.int32
    assert [[page >= 0 for page in row] for row in table.tolist()] == [
        [True, True, True],
        [True, False, False],
        [False, False, False],
    ]
    assert pool.page_table(slots[1:]).shape == (2, 1)
    assert pool.page_table(slots[2:]).shape == (1, 0)
    pool.reserve(slots[1:2], [7])  # reserved pages are in the table before they are written
    assert pool.page_table(slots[1:]).shape == (2, 3)


def test_tables_are_snapshots(pool):
    slots = pool.allocate(1)
    write(pool, slots, [tokens(4, 0)])
    table, lengths = pool.page_table(slots), pool.lengths(slots)
    pool.release(slots)
    assert table.tolist() == [[0]]
    assert lengths.tolist() == [4]


def test_slots_may_be_lists_or_integer_arrays_of_any_width(pool):
    for slots in ([0, 1], np.array([0, 1]), torch.tensor([0, 1]).numpy(), range(2)):
        pool.allocate(2)
        pool.reserve(slots, [1, 1])
        assert pool.places(slots, [1, 1]).dtype == torch.int64
        pool.release(slots)
        pool.manager.check()
        assert sorted(pool.allocate(2).tolist()) == [0, 1]
        pool.release([1, 0])
    pool.release([])
    assert pool.page_table([]).shape == (0, 0)


@pytest.mark.parametrize("slots", [[0.5], [True], ["0"], [2**40], [[0]], [7], [-1], [99]])
def test_anything_else_is_misuse(pool, slots):
    pool.allocate(2)
    for call in (pool.release, pool.trim, pool.lengths, pool.page_table):
        with pytest.raises(PageMisuse):
            call(slots)


def test_exhaustion_copies_nothing(pool):
    slots = pool.allocate(1)
    write(pool, slots, [tokens(13, 0)])
    others = pool.allocate(3)
    pool.reserve(others, [14, 14, 13])
    assert pool.free_pages == 0
    before = pool.kv.clone()
    with pytest.raises(OutOfPages, match="1 pages wanted, 0 free of 16"):
        pool.fork(slots, [1])
    assert torch.equal(pool.kv.isnan(), before.isnan())
    assert pool.free_slots == 4


def test_a_slot_holds_its_maximum_rounded_up_to_whole_pages(pool):
    slots = pool.allocate(1)
    assert pool.max_tokens_per_slot == 16
    pool.reserve(slots, [16])
    with pytest.raises(PageMisuse, match="at most 16"):
        pool.reserve(slots, [17])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_bytes_per_token_is_what_the_tensor_takes(dtype):
    pool = make(dtype=dtype)
    assert pool.bytes_per_token * pool.num_pages * pool.page_size == pool.kv.nbytes


def test_a_prompt_adopted_from_the_cache_reads_back_what_was_written():
    pool = make(prefix_cache=True)
    pool.kv.fill_(float("nan"))
    slots = pool.allocate(2)
    prompts = [[1, 2, 3, 4, 5, 6, 7, 8, 9], [10, 11, 12]]
    values = [tokens(len(prompt), seed) for seed, prompt in enumerate(prompts)]
    write(pool, slots, values)
    assert pool.remember(slots, prompts) == pool.cached_pages == 2
    pool.release(slots)
    assert pool.free_pages == pool.num_pages

    asked = [[10, 11, 12], [1, 2, 3, 4, 5, 6, 7, 8, 0], [1, 2, 3, 4]]
    assert pool.match(asked).tolist() == [0, 8, 4]
    slots = pool.allocate(3)
    assert pool.adopt(slots, asked).tolist() == [0, 8, 4]
    assert torch.equal(read(pool, slots[1]), values[0][:8])
    assert torch.equal(read(pool, slots[2]), values[0][:4])
    statistics = pool.cache_statistics
    assert (statistics.lookups, statistics.lookup_tokens, statistics.hit_tokens) == (3, 16, 12)

    other = tokens(5, 7)  # written into a copy of a cached page
    pool.truncate(slots[1:2], [6])
    write(pool, slots[1:2], [other])
    assert torch.equal(read(pool, slots[1]), torch.cat([values[0][:6], other]))
    again = pool.allocate(1)
    assert pool.adopt(again, prompts[:1]).tolist() == [8]
    assert torch.equal(read(pool, again[0]), values[0][:8])
    pool.drop_cache()
    assert pool.cached_pages == 0
    pool.manager.check()


def test_prompts_may_be_lists_or_integer_arrays_of_any_width_and_there_may_be_none(pool):
    prompt = [1, 2, 3, 4, 5]
    for same in (prompt, np.array(prompt), np.array(prompt, np.uint8), range(1, 6), ()):
        assert pool.match([same]).tolist() == [0]
    slots = pool.allocate(1)
    assert pool.adopt(slots, [[]]).tolist() == [0]
    assert pool.match([]).tolist() == pool.adopt([], []).tolist() == []
    assert pool.remember([], []) == 0
    for wrong in ([[0.5]], [[2**40]], [[[1]]], [1]):
        with pytest.raises(PageMisuse):
            pool.match(wrong)


def test_a_pool_without_a_prefix_cache_remembers_nothing(pool):
    slots = pool.allocate(1)
    write(pool, slots, [tokens(8, 0)])
    assert pool.remember(slots, [list(range(8))]) == 0
    assert pool.cached_pages == 0 and pool.match([range(8)]).tolist() == [0]


LARGE_POOL = """
import re, torch
from pathlib import Path
from w2s_fast.cache import PagePool

def peak():
    # Of this process alone: what getrusage says may be that of who started it.
    return int(re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1])

before = peak()
pool = PagePool(8, 8, 64, 4096, 16, 64, 1024, torch.float32, "cpu")
slots = pool.allocate(2)
pool.reserve(slots, [20, 20])
pool.kv[:, :, pool.page_table(slots).long()] = 1
pool.fork(slots, [2, 2])
grown = peak() - before
assert pool.kv.nbytes == 2 * 2**30
assert grown < 64 * 1024, f"{grown} KiB"
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's peak memory, in KiB")
def test_memory_is_touched_only_where_tokens_are_written():
    subprocess.run([sys.executable, "-c", LARGE_POOL], check=True)


def test_every_slot_but_those_named_is_released(pool) -> None:
    slots = pool.allocate(4)
    write(pool, slots, [tokens(5, seed) for seed in range(4)])
    pool.release_others(slots[1:3])
    assert pool.free_slots == 6
    assert torch.equal(read(pool, slots[1]), tokens(5, 1))
    with pytest.raises(PageMisuse):
        pool.release_others(slots[:1])
    pool.release_others([])
    assert pool.free_pages == pool.num_pages
    pool.manager.check()


def test_the_prefix_cache_can_be_left_aside() -> None:
    pool = make(prefix_cache=True)
    prompt = list(range(8))

    def filled() -> int:
        (slot,) = pool.allocate(1)
        write(pool, [slot], [tokens(8, seed=0)])
        return int(slot)

    first = filled()
    assert pool.remember([first], [prompt[:4]]) == 1
    counted = pool.cache_statistics.lookup_tokens
    with pool.without_cache():
        second = filled()
        (third,) = pool.allocate(1)
        assert pool.match([prompt]).tolist() == pool.adopt([third], [prompt]).tolist() == [0]
        assert pool.remember([second], [prompt]) == 0
    assert pool.cached_pages == 1 and pool.cache_statistics.lookup_tokens == counted
    assert pool.match([prompt]).tolist() == [4]  # what was there before still is
