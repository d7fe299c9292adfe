"""A dispatch mode that knows which operators make the host wait for the device."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
# Values go to the host, or decide on a shape.
WAITING = {
    aten._local_scalar_dense,
    aten.item,
    aten.is_nonzero,
    aten.equal,
    aten.nonzero,
    aten.nonzero_numpy,
    aten.masked_select,
    aten._unique2,
    aten.unique_dim,
    aten.unique_consecutive,
    aten.bincount,
    aten.repeat_interleave,
    aten._assert_async,
}
SEEN: set[str] = set()


class NoHost(TorchDispatchMode):
    """Fails on any operator that would make the host wait for a GPU."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        SEEN.add(str(func.overloadpacket))
        if func.overloadpacket in WAITING and not (kwargs or {}).get("output_size"):
            raise AssertionError(f"{func} waits for the device")
        if func.overloadpacket in (aten.index, aten.index_put, aten.index_put_):
            masks = [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)]
            if masks:
                raise AssertionError(f"{func} with a mask waits for the device")
        return func(*args, **(kwargs or {}))
