"""Copy whole pages of one model, in all layers at once: what forking a sequence costs."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from w2s_fast.kernels.library import register

_VECTOR = 16  # bytes that a thread of the CUDA kernel moves at once
_SMALL_PAGE = 2**17  # bytes in all layers


def copy_pages(kv: Tensor, pairs: Tensor) -> None:
    """Copy pages of a pool, in place.

        kv[:, :, destination] = kv[:, :, source]      for each (source, destination) in pairs

    On CUDA it is one launch of csrc/copy_pages.cu for all layers, keys, values and pairs; torch
    copies where that library was not built, or where a page is no multiple of 16 bytes.

    Args:
        kv: [layers, 2, P, page_size, Hkv, D] of any dtype, contiguous. Changed in place.
        pairs: int32 [C, 2], contiguous, on kv's device: (source, destination), pages below P. A
            pair whose destination is negative is skipped, so that a list of fixed length can be
            padded. No other destination may occur twice, or be a source.

    Raises:
        RuntimeError: CUDA refused the launch; names its error number.
    """
    if kv.ndim != 6 or kv.shape[1] != 2 or not kv.is_contiguous():
        raise ValueError(
            f"kv {tuple(kv.shape)} must be [layers, 2, P, page_size, Hkv, D] and contiguous"
        )
    if pairs.ndim != 2 or pairs.shape[1] != 2 or pairs.dtype != torch.int32:
        raise ValueError(f"pairs {tuple(pairs.shape)} of {pairs.dtype} must be int32 [C, 2]")
    if pairs.device != kv.device or not pairs.is_contiguous():
        raise ValueError(f"pairs must be contiguous and on {kv.device}, where kv is")
    _operator(kv, pairs)


def _torch(kv: Tensor, pairs: Tensor) -> None:
    if kv.is_cuda:
        sources, destinations = pairs[pairs[:, 1] >= 0].long().unbind(1)
        kv[:, :, destinations] = kv[:, :, sources]
        return
    # One strided copy a page took 0.2 to 0.5 of the time of one indexed copy of them all (12
    # layers, 4 to 64 pages of 16 x 12 x 64): no temporary tensor, no index. Small pages go to
    # NumPy, which begins a copy in a third of torch's time (1 layer, 64 pages of 16 x 2 x 16: 0.2
    # ms to 0.7); for pages of 1.2 MB torch took 0.7 of NumPy's. All on one core.
    small = kv.numel() * kv.element_size() <= _SMALL_PAGE * kv.shape[2]
    there: Any = kv.view(torch.int8).flatten(3).numpy() if small else kv
    for source, destination in pairs.tolist():
        if destination >= 0:
            there[:, :, destination] = there[:, :, source]


def _fake(kv: Tensor, pairs: Tensor) -> None:
    return None


def _cuda(kv: Tensor, pairs: Tensor) -> None:
    launch = _library()
    if launch is None or not _in_vectors(kv):
        return _torch(kv, pairs)
    layers, two, pages = kv.shape[:3]
    page_bytes = math.prod(kv.shape[3:]) * kv.element_size()
    if pairs.numel() == 0 or kv.numel() == 0:
        return None
    stream = torch.cuda.current_stream(kv.device).cuda_stream
    error = launch(
        kv.data_ptr(), pairs.data_ptr(), len(pairs), layers * two, pages, page_bytes, stream
    )
    if error:
        raise RuntimeError(f"the copy of {len(pairs)} pages was not launched: cudaError {error}")
    return None


def is_one_launch(kv: Tensor) -> bool:
    """Whether copying pages of this pool is one launch that a CUDA graph can hold."""
    return not kv.is_cuda or (_library() is not None and _in_vectors(kv))


def _in_vectors(kv: Tensor) -> bool:
    """Whether the CUDA kernel can move these pages."""
    page_bytes = math.prod(kv.shape[3:]) * kv.element_size()
    return page_bytes % _VECTOR == 0 and kv.data_ptr() % _VECTOR == 0


def library_path() -> str | None:
    """Where the library of csrc/*.cu is; None if the package was built without nvcc."""
    spec = find_spec("w2s_fast._cuda")
    return None if spec is None else spec.origin


@cache
def _library() -> Callable[..., int] | None:
    """``w2s_copy_pages`` of csrc/copy_pages.cu, loaded once; None where it was not built."""
    path = library_path()
    if path is None:
        return None
    function = ctypes.CDLL(path).w2s_copy_pages
    function.argtypes = [
        ctypes.c_void_p,  # kv
        ctypes.c_void_p,  # pairs
        ctypes.c_int64,  # num_pairs
        ctypes.c_int64,  # planes
        ctypes.c_int64,  # num_pages
        ctypes.c_int64,  # page_bytes
        ctypes.c_void_p,  # stream
    ]
    function.restype = ctypes.c_int
    return function


_operator = register(
    "copy_pages(Tensor(a!) kv, Tensor pairs) -> ()",
    torch_path=_torch,
    cuda_path=_cuda,
    fake=_fake,
)
