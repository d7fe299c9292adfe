"""copy_pages: whole pages, in all layers, keys and values."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from w2s_fast.kernels import copy_pages as module
from w2s_fast.kernels.copy_pages import copy_pages

SOURCE = Path(__file__).parents[2] / "csrc" / "copy_pages.cu"
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(1, 2, 6, 1, 1, 8), (3, 2, 6, 4, 2, 16), (2, 2, 9, 16, 3, 64)]
PAIRS = [[], [[3, 5]], [[3, 5], [2, -1], [0, 1], [3, 4]], [[1, -7]]]


def random_kv(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def as_pairs(pairs: list[list[int]]) -> Tensor:
    return torch.tensor(pairs, dtype=torch.int32).reshape(-1, 2)


def expected(kv: Tensor, pairs: list[list[int]]) -> Tensor:
    """Page by page, plane by plane."""
    result = kv.clone()
    for source, destination in pairs:
        for layer in range(kv.shape[0]):
            for which in range(2):
                if destination >= 0:
                    result[layer, which, destination] = kv[layer, which, source]
    return result


@pytest.mark.parametrize("pairs", PAIRS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_pages_are_copied_in_all_layers_and_negative_destinations_skipped(
    dtype: torch.dtype, shape: tuple[int, ...], pairs: list[list[int]]
) -> None:
    kv = random_kv(shape, dtype)
    wanted = expected(kv, pairs)
    copy_pages(kv, as_pairs(pairs))
    assert torch.equal(kv, wanted)


@pytest.mark.parametrize("shape", [(0, 2, 6, 4, 2, 16), (2, 2, 0, 4, 2, 16)])
def test_nothing_may_be_there_to_copy(shape: tuple[int, ...]) -> None:
    copy_pages(torch.zeros(shape), as_pairs([]))


@pytest.mark.parametrize(
    ("kv", "pairs", "message"),
    [
        (torch.zeros(2, 6, 4, 2, 16), as_pairs([]), "must be .layers, 2, P"),
        (torch.zeros(2, 3, 6, 4, 2, 16), as_pairs([]), "must be .layers, 2, P"),
        (torch.zeros(2, 2, 6, 4, 16, 2).mT, as_pairs([]), "contiguous"),
        (torch.zeros(2, 2, 6, 4, 2, 16), torch.zeros(3, 2), "must be int32"),
        (torch.zeros(2, 2, 6, 4, 2, 16), torch.zeros(3, 3, dtype=torch.int32), "C, 2"),
        (torch.zeros(2, 2, 6, 4, 2, 16), torch.zeros(2, 3, dtype=torch.int32).T, "contiguous"),
        (torch.zeros(2, 2, 6, 4, 2, 16), as_pairs([]).to("meta"), "on cpu"),
    ],
)
def test_other_shapes_are_refused(kv: Tensor, pairs: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        copy_pages(kv, pairs)


def test_the_library_is_declared_as_it_is_written() -> None:
    if module.library_path() is None:
        pytest.skip("built without nvcc")
    written = re.search(r"int w2s_copy_pages\((.*?)\)", SOURCE.read_text(), re.DOTALL)
    assert written is not None
    kinds = [parameter.split()[:-1] for parameter in written[1].split(",")]
    pointers = [kind[-1].endswith("*") or kind == ["cudaStream_t"] for kind in kinds]
    assert all(p or kind == ["std::int64_t"] for p, kind in zip(pointers, kinds))
    function = module._library()
    assert function is not None
    assert function.argtypes == [ctypes.c_void_p if p else ctypes.c_int64 for p in pointers]
    assert function.restype is ctypes.c_int


class Library:
    """In place of the CUDA library: does on the CPU, with its arguments, what it is to do."""

    error = 0
    calls = 0

    def __call__(
        self, kv: int, pairs: int, count: int, planes: int, pages: int, size: int, stream: int
    ) -> int:
        self.calls += 1
        assert stream == 77
        numbers = (ctypes.c_int32 * (2 * count)).from_address(pairs)
        for source, destination in zip(numbers[::2], numbers[1::2]):
            for plane in range(planes if destination >= 0 else 0):
                first = kv + plane * pages * size
                ctypes.memmove(first + destination * size, first + source * size, size)
        return self.error


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    stand_in = Library()
    monkeypatch.setattr(module, "_library", lambda: stand_in)
    stream = SimpleNamespace(cuda_stream=77)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    return stand_in


@pytest.mark.parametrize("pairs", PAIRS[1:])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_library_is_given_what_it_needs(
    dtype: torch.dtype, shape: tuple[int, ...], pairs: list[list[int]], library: Library
) -> None:
    kv = random_kv(shape, dtype)
    wanted = expected(kv, pairs)
    module._cuda(kv, as_pairs(pairs))
    assert library.calls == 1
    assert torch.equal(kv, wanted)


def test_nothing_is_launched_for_nothing(library: Library) -> None:
    module._cuda(random_kv(SHAPES[0]), as_pairs([]))
    module._cuda(random_kv((2, 2, 0, 4, 2, 16)), as_pairs([]))
    assert library.calls == 0


def test_a_page_of_odd_size_or_address_is_copied_by_torch(library: Library) -> None:
    odd_size = random_kv((2, 2, 6, 3, 1, 1))
    odd_address = random_kv((2 * 2 * 6 * 16 + 1,))[1:].view(2, 2, 6, 4, 1, 4)
    for kv in (odd_size, odd_address):
        wanted = expected(kv, PAIRS[2])
        module._cuda(kv, as_pairs(PAIRS[2]))
        assert torch.equal(kv, wanted)
    assert library.calls == 0


def test_without_the_library_torch_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_library", lambda: None)
    kv = random_kv(SHAPES[1])
    wanted = expected(kv, PAIRS[2])
    module._cuda(kv, as_pairs(PAIRS[2]))
    assert torch.equal(kv, wanted)


def test_a_refused_launch_is_an_error_with_its_number(library: Library) -> None:
    library.error = 9
    with pytest.raises(RuntimeError, match="2 pages was not launched: cudaError 9"):
        module._cuda(random_kv(SHAPES[0]), as_pairs([[0, 1], [2, 3]]))
