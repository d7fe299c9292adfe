"""The operator copy_pages on the device, through the CUDA library and without it."""

from __future__ import annotations

import pytest
import torch

from w2s_fast.cache.pages import PagePool
from w2s_fast.kernels import copy_pages as module
from w2s_fast.kernels.copy_pages import copy_pages

PAIRS = [[3, 5], [2, -1], [0, 1], [3, 7]]


@pytest.mark.parametrize("library", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "shape",
    [(1, 2, 9, 1, 1, 8), (2, 2, 9, 3, 1, 1), (12, 2, 64, 16, 12, 64), (3, 2, 9, 256, 8, 128)],
)
def test_pages_are_copied_in_all_layers_and_negative_destinations_skipped(
    shape: tuple[int, ...], dtype: torch.dtype, library: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not library:
        monkeypatch.setattr(module, "_library", lambda: None)
    elif module.library_path() is None:
        pytest.skip("built without nvcc")
    kv = torch.randn(shape, device="cuda").to(dtype)
    expected = kv.clone()
    expected[:, :, [5, 1, 7]] = kv[:, :, [3, 0, 3]]
    copy_pages(kv, torch.tensor(PAIRS, dtype=torch.int32, device="cuda"))
    assert torch.equal(kv, expected)


def test_copies_keep_their_place_in_the_current_stream() -> None:
    kv = torch.zeros(24, 2, 64, 16, 8, 64, device="cuda", dtype=torch.float16)
    pairs = torch.tensor([[0, 1], [1, 2]], dtype=torch.int32, device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for step in range(1, 20):
            kv[:, :, 0] = step
            copy_pages(kv, pairs[:1])
            copy_pages(kv, pairs[1:])
            kv[:, :, 0] = -1
    side.synchronize()
    assert bool((kv[:, :, 1:3] == 19).all())


def test_a_child_reads_its_parents_partial_page() -> None:
    pool = PagePool(3, 2, 64, 8, 4, 8, 16, torch.float16, "cuda")
    pool.kv.normal_()
    (parent,) = pool.allocate(1)
    pool.reserve([parent], [6])
    pool.extend([parent], [6])
    children = pool.fork([parent], [2])
    tables = pool.page_table([parent, *children]).long()
    assert bool((tables[:, 0] == tables[0, 0]).all())
    for page in tables[1:, 1]:
        assert int(page) != int(tables[0, 1])
        assert torch.equal(pool.kv[:, :, page], pool.kv[:, :, tables[0, 1]])
