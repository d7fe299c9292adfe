"""A stand-in for the capture of CUDA graphs that runs on the CPU, with the same limits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from tests.support.no_host import NoHost


class Log(NoHost):
    """Runs and keeps every operator call; fails on one that reads values on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        self.calls.append((func, args, kwargs or {}, out))
        return out


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


class Recording:
    """Operator calls that are repeated on the same tensors, wherever they lay when recorded.

    Nothing of Python is repeated: a number that the host looked up, and a tensor that it replaced,
    stay what they were, just as in a CUDA graph.
    """

    def __init__(self, run: Callable[[], None]) -> None:
        with Log() as log:
            run()
        self.calls = log.calls
        self.replays = 0

    @classmethod
    def of(cls, calls: list[Any]) -> Recording:
        """From what was logged by somebody else."""
        recording = cls(lambda: None)
        recording.calls = calls
        return recording

    def __call__(self) -> None:
        self.replays += 1
        for func, args, kwargs, out in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(tensors(out), tensors(again), strict=True):
                if old.untyped_storage().data_ptr() != new.untyped_storage().data_ptr():
                    old.copy_(new)
