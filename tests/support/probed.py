"""Probes of models that many engines of a run are made over, once for each model."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import w2s_fast.models.model
from w2s_fast.models import PagedModel
from w2s_fast.models.probe import kv_shape

_known: weakref.WeakKeyDictionary[Any, dict[Any, Any]] = weakref.WeakKeyDictionary()
_compare = PagedModel.compare_with_eager


def _shape(model: Any, name: str) -> Any:
    known = _known.setdefault(model, {})
    if "shape" not in known:
        known["shape"] = kv_shape(model, name)
    return known["shape"]


def _compared(paged: PagedModel) -> tuple[int, int]:
    known = _known.setdefault(paged.model, {})
    way = type(paged.backend)
    if way not in known:
        known[way] = _compare(paged)
    return known[way]  # type: ignore[no-any-return]


@contextmanager
def probed_once() -> Iterator[None]:
    """For ``with``: a model that was probed here before is not probed again. It takes most of the
    time in which an engine over tiny models is made; tests/models are about probes."""
    with (
        mock.patch.object(w2s_fast.models.model, "kv_shape", _shape),
        mock.patch.object(PagedModel, "compare_with_eager", _compared),
    ):
        yield
