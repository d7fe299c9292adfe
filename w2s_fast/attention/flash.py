"""Attention through flash-attn 2 or 3, where one of them is installed: plain paged attention.

FlashAttention-2 is arXiv 2307.08691, FlashAttention-3 arXiv 2407.08608 (``flash_attn_interface``,
built from the folder ``hopper`` of the same repository). Their functions are called with pages as
they stand in a pool. They know nothing of which rows share keys, so each row reads its own.

**Not run on a device yet.** The tests prove which arguments are passed, against stand-ins with the
libraries' signatures; and a model is compared with its own eager forward whenever it is loaded.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from w2s_fast.attention.contract import LayerOptions
from w2s_fast.attention.placement import Placement, Spans
from w2s_fast.attention.row_tree import RowTree
from w2s_fast.cache import Ints, PagePool
from w2s_fast.errors import InvalidRequest
from w2s_fast.kernels.library import gpu
from w2s_fast.kernels.write_kv import write_kv


class _Library(NamedTuple):
    """Where a version's function is, and which of its parameters older releases lack."""

    module: str
    function: str
    needs: frozenset[str]


_LIBRARIES: dict[Literal[2, 3], _Library] = {
    2: _Library(
        "flash_attn", "flash_attn_varlen_func", frozenset({"block_table", "softcap", "window_size"})
    ),
    3: _Library(
        "flash_attn_interface",
        "flash_attn_with_kvcache",
        frozenset({"page_table", "cu_seqlens_q", "max_seqlen_q", "softcap", "num_splits"}),
    ),
}
_DTYPES = (torch.float16, torch.bfloat16)
_LARGEST_DIM = 256
_PAGE_2 = 256  # flash-attn 2 reads a block of keys, of up to 256, from one page
# From here on flash-attn 3 may fetch a page's values whole, unwritten positions included, which it
# weights by 0: a NaN there spoils the row (its issue 1745). In smaller pages it clears them.
_PAGE_3 = 64


@dataclass(frozen=True)
class FlashAttention:
    """The flash-attn that serves a device.

    Attributes:
        version: 2 or 3. call: ``flash_attn_varlen_func`` of 2, ``flash_attn_with_kvcache`` of 3.
    """

    version: Literal[2, 3]
    call: Callable[..., Tensor]

    @classmethod
    def find(cls, device: torch.device) -> FlashAttention:
        """Version 3 on Hopper if it is there, else version 2.

        Raises:
            InvalidRequest: neither can run on this device; says why.
        """
        if device.type != "cuda":
            raise InvalidRequest(
                f"attention 'flash' runs on CUDA devices, and this is {device}: pass "
                "attention='torch', or 'auto'"
            )
        arch = gpu(device).arch
        if arch < 80:
            raise InvalidRequest(
                f"attention 'flash' needs a GPU of sm_80 or newer, and this is sm_{arch}: pass "
                "attention='auto'"
            )
        versions: tuple[Literal[2, 3], ...] = (3, 2) if arch == 90 else (2,)
        missing = []
        for version in versions:
            try:
                return cls(version, _import(version))
            except ImportError as error:
                missing.append(f"flash-attn {version} {error}")
        raise InvalidRequest(
            f"attention 'flash' cannot run: {'; '.join(missing)}. To install it: pip install "
            "flash-attn --no-build-isolation; or pass attention='auto'"
        )

    def check(
        self, model: str, dtype: torch.dtype, page_size: int, head_dim: int, sinks: bool
    ) -> None:
        """InvalidRequest if keys and values like these cannot be served; says what to do."""
        name = f"flash-attn {self.version}"
        kind = str(dtype).removeprefix("torch.")
        if dtype not in _DTYPES:
            raise InvalidRequest(
                f"{name} serves float16 and bfloat16, and {model} is {kind}: pass "
                "dtype='bfloat16', or attention='auto'"
            )
        if self.version == 2 and page_size % _PAGE_2:
            raise InvalidRequest(
                f"{name} wants page_size to be a multiple of {_PAGE_2}, and it is {page_size}: "
                f"pass page_size={_PAGE_2}"
            )
        if self.version == 3 and page_size >= _PAGE_3:
            raise InvalidRequest(
                f"{name} wants page_size below {_PAGE_3}, since it does not mask what is unwritten "
                f"in larger pages, and it is {page_size}: pass page_size=16"
            )
        if head_dim > _LARGEST_DIM or head_dim % 8:
            raise InvalidRequest(
                f"{name} serves head sizes up to {_LARGEST_DIM} that are multiples of 8, and "
                f"{model} has {head_dim}: pass attention='auto'"
            )
        if sinks:
            raise InvalidRequest(
                f"{name} knows no attention sinks, and {model} has them: pass attention='auto'"
            )

    def make(
        self,
        pool: PagePool,
        slots: Ints,
        counts: Ints,
        tree: RowTree | None = None,
        ahead: int = 0,
    ) -> FlashPlan:
        """See :class:`w2s_fast.attention.Backend`. The tree is left aside."""
        spans = Spans.of(pool, slots, counts)
        keys = spans.old + spans.new
        placed = Placement.at(pool, slots, spans)
        # Rows with fewer pages end in -1, which a library might follow before it masks.
        placed.page_table.clamp_(min=0)

        def on_device(array: NDArray[np.integer]) -> Tensor:
            return torch.from_numpy(array).to(pool.device, non_blocking=True)

        return FlashPlan(
            **vars(placed),
            flash=self,
            lengths=on_device(keys),
            cu_seqlens_q=on_device(spans.start),
            cu_seqlens_k=on_device(np.concatenate(([0], keys.cumsum())).astype(np.int32)),
            max_q=int(spans.new.max()),
            max_k=int(keys.max()) + ahead,
        )


def _import(version: Literal[2, 3]) -> Callable[..., Tensor]:
    """The function of that version; else an ImportError that goes on where its name ends."""
    module, name, needs = _LIBRARIES[version]
    try:
        function: Callable[..., Tensor] = getattr(import_module(module), name)
    except AttributeError:
        raise ImportError(f"is not installed: {module} has no {name}") from None
    except ModuleNotFoundError as error:
        if error.name != module:
            raise ImportError(f"cannot be imported: {error}") from error
        raise ImportError("is not installed") from None
    except ImportError as error:  # built for another torch, for example
        raise ImportError(f"cannot be imported: {error}") from error
    if lacking := needs - set(inspect.signature(function).parameters):
        raise ImportError(f"is too old: {name} has no {', '.join(sorted(lacking))}")
    return function


@dataclass(kw_only=True)
class FlashPlan(Placement):
    """Passes over a pool through flash-attn.

    Attributes:
        flash: the function that serves it.
        lengths: int32 [S], the tokens of each row, new ones included. cu_seqlens_q,
            cu_seqlens_k: int32 [S + 1], sums of new tokens and of lengths.
        max_q, max_k: the most new tokens and the most keys of a row.
    """

    flash: FlashAttention
    lengths: Tensor
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_q: int
    max_k: int

    def advance(self) -> None:
        """Move on by a token a row, in place."""
        super().advance()
        self.lengths += self.stride
        self.cu_seqlens_k += self.cu_seqlens_q  # with one token a row it counts the rows before

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        options: LayerOptions,
    ) -> Tensor:
        """Write the new keys and values, then attend over all of each sequence's pages."""
        pages = self.pool.kv[layer]
        write_kv(key, value, pages, self.write)
        shared: dict[str, Any] = {
            "cu_seqlens_q": self.cu_seqlens_q,
            "max_seqlen_q": self.max_q,
            "softmax_scale": options.scale,
            "causal": True,
            # Keys before and behind the query's own, which our window counts. -1: no bound.
            "window_size": (-1, -1) if options.window is None else (options.window - 1, 0),
            "softcap": options.softcap or 0.0,
        }
        if self.flash.version == 2:
            return self.flash.call(
                query,
                pages[0],
                pages[1],
                cu_seqlens_k=self.cu_seqlens_k,
                max_seqlen_k=self.max_k,
                block_table=self.page_table,
                **shared,
            )
        return self.flash.call(
            query,
            pages[0],
            pages[1],
            cache_seqlens=self.lengths,
            page_table=self.page_table,
            # How a row's sums are cut must not depend on which other rows there are, as the
            # library's own choice (0) does. Version 2 chooses by itself when it decodes.
            num_splits=1,
            **shared,
        )
