"""What has happened to a caller's model since we looked last: nothing, other weights, or more."""

from __future__ import annotations

from collections.abc import Iterator
from enum import IntEnum
from typing import Any

from torch import Tensor, nn

from w2s_fast._pages import DictWatch, NumberWatch, same_dicts

# Settings of training, which a pass in eval mode does not depend on.
_OF_TRAINING = frozenset(
    (
        "training",
        "gradient_checkpointing",
        "_gradient_checkpointing_func",
        "_require_grads_hook",
        "_require_grads_hooks",
    )
)


class Change(IntEnum):
    """The larger, the more has to be made anew.

    NOTHING: it computes what it did.
    VALUES: weights have other values, at the same addresses.
    PLACES: weights stand elsewhere, or a setting of a module is another one.
    KIND: it has other modules, or weights of another shape, dtype or device.
    """

    NOTHING = 0
    VALUES = 1
    PLACES = 2
    KIND = 3


class Watch:
    """Notices changes of a model, without reading its weights.

    Changes in place are known by the version counters that torch keeps for autograd. Writing
    through ``tensor.data``, or to a tensor made in inference mode, leaves them as they are: such
    changes have to be announced.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._kind = _kind(model)
        self._known = self._now = _Look(model)

    def change(self) -> Change:
        """What has changed since the last :meth:`accept`. Cheap where nothing has."""
        known = self._known
        if known.still_holds():
            return Change.NOTHING
        self._now = now = _Look(self._model)
        if _kind(self._model) != self._kind:
            return Change.KIND
        if known.addresses != now.addresses or not _equal(known.settings, now.settings):
            return Change.PLACES
        return Change.VALUES if known.versions != now.versions else Change.NOTHING

    def accept(self) -> None:
        """All that follows from the last :meth:`change` has been done; until then it is said
        again."""
        self._known = self._now


class _Look:
    """What a model's modules held when it was looked at."""

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
        self._held = [held for module in modules for held in _dicts(module)]
        self._watch = DictWatch(self._held)
        self._seen = [dict(held) for held in self._held]
        self.settings = [
            {name: value for name, value in seen.items() if name not in _OF_TRAINING}
            for seen in self._seen
        ]
        tensors = [t for module in modules for t in _tensors(module)]
        counted = [t for t in tensors if not t.is_inference()]
        self._numbers = NumberWatch(counted, [t for t in tensors if _has_address(t)])

    @property
    def versions(self) -> list[int]:
        return self._numbers.versions

    @property
    def addresses(self) -> list[int]:
        return self._numbers.addresses

    def still_holds(self) -> bool:
        if self._numbers.changed():
            return False
        if not self._watch.changed():
            return True
        if not same_dicts(self._held, self._seen):
            return False
        self._watch.settle()
        return True


def _dicts(module: nn.Module) -> Iterator[dict[str, Any]]:
    yield vars(module)
    for held in (module._modules, module._parameters, module._buffers):
        if held:
            yield held


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    for held in (module._parameters, module._buffers):
        for tensor in held.values():
            if tensor is not None:
                yield tensor


def _kind(model: nn.Module) -> list[Any]:
    return [
        (module, [(t.shape, t.dtype, t.device) for t in _tensors(module)])
        for module in model.modules()
    ]


def _has_address(tensor: Tensor) -> bool:
    try:
        tensor.data_ptr()
    except RuntimeError:  # made of several tensors, as some quantised ones are
        return False
    return True


def _equal(a: Any, b: Any) -> bool:
    """Whether what both hold is the same or equal; tensors are equal only to themselves."""
    try:
        return bool(a == b)
    except (RuntimeError, ValueError, TypeError):  # an array or a tensor that was replaced
        return False
