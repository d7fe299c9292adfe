"""Whether dicts were written to: what a look at thousands of modules before every step rests on."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from w2s_fast._pages import DictWatch, NumberWatch, same_dicts

# Elsewhere dicts do not say so, and whoever asks has to compare them.
tells = pytest.mark.skipif(sys.version_info >= (3, 13), reason="Python 3.13 keeps no account of it")

WRITES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "another value": lambda d: d.update(a=3),
    "a new key": lambda d: d.update(c=3),
    "a key less": lambda d: d.pop("b"),
    "nothing left": lambda d: d.clear(),
}


@tells
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
@pytest.mark.parametrize("which", [0, 1])
def test_what_is_written_is_noticed(which: int, write: Callable[[dict[str, Any]], Any]) -> None:
    dicts: list[dict[str, Any]] = [{"a": 1, "b": 2}, {"a": 1, "b": 2}]
    watch, other = DictWatch(dicts), DictWatch(dicts)
    assert not watch.changed()
    dicts[0]["a"], dicts[1].get("a"), list(dicts[1])  # reading is not writing
    assert not watch.changed()
    write(dicts[which])
    assert watch.changed() and watch.changed()
    watch.settle()
    assert not watch.changed() and other.changed()
    write({"a": 1, "b": 2})  # nobody watches it
    del other
    dicts[which]["z"] = 1
    assert watch.changed()


@tells
def test_attributes_of_a_module_are_noticed() -> None:
    module: Any = nn.Linear(2, 2)
    watch = DictWatch([vars(module), module._parameters])
    assert not watch.changed()
    for write in (
        lambda: setattr(module, "in_features", 3),
        lambda: setattr(module, "anything", 1),
        lambda: delattr(module, "anything"),
        lambda: module.eval(),
        lambda: setattr(module, "weight", nn.Parameter(module.weight.data)),
        lambda: module.register_parameter("bias", None),
    ):
        write()
        assert watch.changed()
        watch.settle()
        assert not watch.changed()


def test_only_dicts_are_watched() -> None:
    with pytest.raises(TypeError, match="not a dict"):
        DictWatch([{}, []])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="not a dict"):
        same_dicts([{}], [1])  # type: ignore[list-item]


def test_dicts_are_the_same_as_they_are_equal() -> None:
    class Strange:
        def __eq__(self, other: object) -> bool:
            raise ValueError("cannot be compared")

        __hash__ = None  # type: ignore[assignment]

    one: dict[str, Any] = {"a": 1.5, "b": "text", "c": Strange()}
    assert same_dicts([one, {}], [dict(one), {}])
    assert same_dicts([{"a": [1]}], [{"a": [1]}])
    assert same_dicts([{"a": 1, "b": 2}], [{"b": 2, "a": 1}])
    assert not same_dicts([one], [{**one, "c": Strange()}])
    assert not same_dicts([{"a": 1}], [{"a": 2}])
    assert not same_dicts([{"a": 1}], [{"a": 1, "b": 2}])
    assert not same_dicts([{}], [])


def test_numbers_of_tensors_are_asked_for() -> None:
    class Counted:
        _version = 3

        def data_ptr(self) -> int:
            return 1 << 63

    made = [Counted(), Counted()]
    watch = NumberWatch(made, made[1:])
    assert (watch.versions, watch.addresses) == ([3, 3], [1 << 63])
    assert not watch.changed()
    made[1]._version = 4
    assert watch.changed()
    made[1]._version = 3
    assert not watch.changed()
    made[1].data_ptr = lambda: 16  # type: ignore[method-assign]
    assert watch.changed()


def test_what_has_no_numbers_says_so() -> None:
    with pytest.raises(AttributeError):
        NumberWatch([object()], [])
    with pytest.raises(AttributeError):
        NumberWatch([], [object()])


@pytest.mark.parametrize("make", [torch.zeros, lambda n: nn.Parameter(torch.zeros(n))])
def test_writes_and_moves_of_tensors_are_noticed(make: Callable[[int], torch.Tensor]) -> None:
    tensor, other = make(2), make(2)
    watch = NumberWatch([other, tensor], [other, tensor])
    assert watch.addresses == [other.data_ptr(), tensor.data_ptr()]
    with torch.no_grad():
        tensor.add_(1)
    assert watch.changed()
    watch = NumberWatch([other, tensor], [other, tensor])
    assert watch.versions == [other._version, tensor._version]
    assert not watch.changed()
    tensor.data = torch.ones(2)
    assert watch.changed()
