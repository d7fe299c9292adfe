"""A stand-in for the capture of CUDA graphs that runs on the CPU, with the same limits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from tests.support.no_host import NoHost
from w2s_fast.decoding import Recorder, record_passes


class Log(NoHost):
    """Runs and keeps every operator call; fails on one that reads values on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, list[Tensor]]] = []  # the last: what came of each

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        self.calls.append((func, args, kwargs or {}, tensors(out)))
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
        for func, args, kwargs, made in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(made, tensors(again), strict=True):
                if old.untyped_storage().data_ptr() != new.untyped_storage().data_ptr():
                    old.copy_(new)


@contextmanager
def set_up_as_on_cuda(recorder_for: Callable[[torch.device], Recorder]) -> Iterator[None]:
    """Engines made within attend through our operators, and replay what these recorders record."""

    def record(*args: Any, **kwargs: Any) -> Any:
        return record_passes(*args, **kwargs, recorder_for=recorder_for)

    with (
        mock.patch("w2s_fast.attention.backends.runs_triton", return_value=True),
        mock.patch("w2s_fast.engine.engine.can_record", return_value=True),
        mock.patch("w2s_fast.engine.engine.record_passes", record),
    ):
        yield
