"""Models that give NaN, or fail, when a test wants them to."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

from tests.support.tiny_models import Triple


def broken_copy(model: PreTrainedModel, token: int, value: float) -> PreTrainedModel:
    """A model that breaks on every text with the token in it, and on no other."""
    copied = copy.deepcopy(model)
    assert copied.get_input_embeddings().weight is not copied.get_output_embeddings().weight
    with torch.no_grad():
        copied.get_input_embeddings().weight[token] = value
    return copied


def broken_triple(triple: Triple, which: str, token: int, value: float) -> Triple:
    """The same models, but for a broken copy of the one that is named."""
    return triple._replace(**{which: broken_copy(getattr(triple, which), token, value)})


@contextmanager
def failing(model: PreTrainedModel, call: int, error: BaseException) -> Iterator[None]:
    """The model raises the error in its ``call``-th pass from here on, counted from 1."""
    calls = 0

    def fail(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == call:
            raise error

    handle = model.get_input_embeddings().register_forward_hook(fail)
    try:
        yield
    finally:
        handle.remove()
