"""The CUDA page copies: the library loads and refuses anywhere; it copies where there is a GPU."""

import ctypes
from pathlib import Path

import pytest
import torch

import w2s_fast

INVALID_VALUE = 1  # cudaErrorInvalidValue


@pytest.fixture(scope="module")
def copy_pages():
    built = sorted(Path(w2s_fast.__file__).parent.glob("_cuda*.so"))
    if not built:
        pytest.skip("built without nvcc")
    function = ctypes.CDLL(str(built[0])).w2s_copy_pages
    function.argtypes = [ctypes.c_void_p] * 2 + [ctypes.c_int64] * 4 + [ctypes.c_void_p]
    return function


def test_nothing_to_copy_launches_nothing(copy_pages):
    assert copy_pages(None, None, 0, 2, 4, 64, None) == 0


@pytest.mark.parametrize(
    ("address", "pairs", "planes", "page_bytes"),
    [(8, 1, 2, 64), (0, 1, 2, 24), (0, -1, 2, 64), (0, 1, 0, 64), (0, 1, 65536, 64), (0, 1, 2, 0)],
)
def test_what_the_launch_cannot_do_is_refused(copy_pages, address, pairs, planes, page_bytes):
    assert copy_pages(address, None, pairs, planes, 4, page_bytes, None) == INVALID_VALUE


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("shape", [(2, 2, 9, 16, 2, 64), (1, 2, 9, 1, 1, 8), (3, 2, 9, 16, 12, 64)])
def test_pages_are_copied_in_all_layers_and_negative_destinations_skipped(copy_pages, shape):
    kv = torch.randn(shape, device="cuda", dtype=torch.float16)
    expected = kv.clone()
    expected[:, :, [5, 1, 7]] = kv[:, :, [3, 0, 3]]
    pairs = torch.tensor([[3, 5], [2, -1], [0, 1], [3, 7]], dtype=torch.int32, device="cuda")
    error = copy_pages(
        kv.data_ptr(),
        pairs.data_ptr(),
        len(pairs),
        shape[0] * shape[1],
        shape[2],
        kv[0, 0, 0].nbytes,
        torch.cuda.current_stream().cuda_stream,
    )
    assert error == 0
    assert torch.equal(kv, expected)
