"""Triton's interpreter, with the same operations on the same numbers in less than half of the time.

Most of its time goes into Python objects that describe types, made anew for every operation, and
into looking through all of triton.language whenever one kernel calls another. Here this is done
once. The results are those of Triton's own: test_quick.py.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

_PATCH = pytest.MonkeyPatch()


def quicken() -> None:
    """Prepares the interpreter, once a session."""
    _prepare_kernels_once(_PATCH)
    _call_builtins_directly(_PATCH)
    _make_types_once(_PATCH)
    _check_sizes_once(_PATCH)
    _convert_numbers_once(_PATCH)
    _check_overflow(_PATCH)


@contextmanager
def as_it_is() -> Iterator[None]:
    """Triton's own interpreter, until the end of the block."""
    _PATCH.undo()
    try:
        yield
    finally:
        quicken()


def _prepare_kernels_once(patch: pytest.MonkeyPatch) -> None:
    """It looks through the language at every call, for what it has prepared already."""
    import triton.language as tl
    from triton.runtime import interpreter

    @functools.cache
    def first_builtin(language: Any) -> str | None:
        members = inspect.getmembers(language)
        return next((name for name, member in members if tl.core.is_builtin(member)), None)

    @functools.cache
    def languages(kernel: Any) -> list[Any]:
        return [seen for seen in kernel.__globals__.values() if seen is tl or seen is tl.core]

    prepare = interpreter._patch_lang
    nothing_to_undo = getattr(interpreter, "_LangPatchScope", lambda: None)

    def prepared(language: Any) -> bool:
        name = first_builtin(language)
        return name is None or not tl.core.is_builtin(getattr(language, name))

    def prepare_once(kernel: Any) -> Any:
        if all(prepared(language) for language in languages(kernel)):
            return nothing_to_undo()
        return prepare(kernel)

    patch.setattr(interpreter, "_patch_lang", prepare_once)


def _call_builtins_directly(patch: pytest.MonkeyPatch) -> None:
    """Two functions stand between a kernel and a builtin; one hands over the semantics as well."""
    from triton.runtime import interpreter

    semantic = interpreter.interpreter_semantic

    def direct(member: Any) -> Any:
        builtin = getattr(member, "__wrapped__", member)

        def call(*args: Any, **kwargs: Any) -> Any:
            kwargs["_semantic"] = semantic
            return builtin(*args, **kwargs)

        return call

    direct = functools.cache(direct)

    def set_direct(place: Any, name: str, member: Any, _builder: Any, *scope: Any) -> None:
        set_attribute = scope[0].set_attr if scope else setattr
        set_attribute(place, name, direct(member))

    patch.setattr(interpreter, "_patch_attr", set_direct)


def _make_types_once(patch: pytest.MonkeyPatch) -> None:
    """Types of blocks by element and shape, shapes of tensors by type, numpy's types by theirs."""
    import triton.language as tl
    from triton.runtime import interpreter

    core = tl.core
    make_block_type, make_tensor = core.block_type.__init__, core.tensor.__init__
    blocks: dict[Any, dict[str, Any]] = {}
    shapes: dict[Any, tuple[Any, Any]] = {}

    def block_type(self: Any, element_ty: Any, shape: Any) -> None:
        key = (element_ty.name, *[getattr(size, "value", size) for size in shape])
        if key in blocks:
            vars(self).update(blocks[key])
        else:
            make_block_type(self, element_ty, shape)
            blocks[key] = dict(vars(self))

    def tensor(self: Any, handle: Any, type: Any) -> None:
        if type.name in shapes:
            self.handle, self.type, self.dtype = handle, type, type.scalar
            self.shape, self.numel = shapes[type.name]
        else:
            make_tensor(self, handle, type)
            sizes = tuple(size.value for size in self.shape)
            shapes[type.name] = shapes.setdefault(sizes, (self.shape, self.numel))
            self.shape, self.numel = shapes[type.name]

    patch.setattr(core.block_type, "__init__", block_type)
    patch.setattr(core.tensor, "__init__", tensor)
    with_element_ty, to_ir = core.block_type.with_element_ty, core.block_type.to_ir
    patch.setattr(core.block_type, "with_element_ty", _once_a_name(with_element_ty))
    patch.setattr(core.block_type, "to_ir", _once_a_name(to_ir))
    patch.setattr(interpreter, "_get_np_dtype", _once_a_name(interpreter._get_np_dtype))
    for kind in (core.dtype, core.block_type):
        patch.setattr(kind, "__eq__", _equal_to_itself(kind.__eq__))


def _once_a_name(function: Any) -> Any:
    """What it returned last time, for arguments whose names are the same."""
    results: dict[Any, Any] = {}

    def once(first: Any, *rest: Any) -> Any:
        key = (first.name, getattr(rest[0], "name", None)) if rest else first.name
        if key not in results:
            results[key] = function(first, *rest)
        return results[key]

    return once


def _equal_to_itself(equal: Any) -> Any:
    return lambda self, other: self is other or equal(self, other)


def _check_sizes_once(patch: pytest.MonkeyPatch) -> None:
    """Every result is a handle, of which numpy's type has to be small enough for Triton's."""
    from triton.runtime.interpreter import TensorHandle

    make_handle = TensorHandle.__init__
    fit: set[tuple[np.dtype[Any], str]] = set()

    def handle(self: Any, data: Any, dtype: Any, *attr: Any) -> None:
        key = (data.dtype, dtype.name)
        if attr or key not in fit:
            make_handle(self, data, dtype, *attr)
            fit.add(key)
        else:
            self.data, self.dtype, self.attr = data, dtype, {}

    patch.setattr(TensorHandle, "__init__", handle)


def _convert_numbers_once(patch: pytest.MonkeyPatch) -> None:
    """A number beside a tensor becomes a tensor of that type; two of a type stay as they are."""
    import triton.language as tl
    from triton.runtime import interpreter

    tensor = tl.core.tensor
    semantic = type(interpreter.interpreter_semantic)
    check, broadcast = semantic.binary_op_type_checking_impl, semantic.broadcast_impl_value
    # Not pointers, and not what division makes wider.
    stay = {f"{sign}int{bits}" for sign in ("", "u") for bits in (1, 8, 16, 32, 64)}
    stay |= {"fp32", "fp64"}
    numbers: dict[Any, Any] = {}

    def check_types(self: Any, lhs: Any, rhs: Any, *flags: Any, **named: Any) -> Any:
        if type(lhs) is type(rhs) is tensor and lhs.dtype.name == rhs.dtype.name in stay:
            return self.broadcast_impl_value(lhs, rhs)
        if type(lhs) is not tensor or type(rhs) not in (int, float, bool):
            return check(self, lhs, rhs, *flags, **named)
        # 0.0 and -0.0 are one key of a dictionary.
        key = (lhs.type.name, type(rhs), rhs or str(rhs), flags, *named.items())
        if key in numbers:
            return lhs, numbers[key]
        left, right = check(self, lhs, rhs, *flags, **named)
        if left is lhs:
            numbers[key] = right
        return left, right

    def broadcast_values(self: Any, lhs: Any, rhs: Any) -> Any:
        return (lhs, rhs) if lhs.shape is rhs.shape else broadcast(self, lhs, rhs)

    patch.setattr(semantic, "binary_op_type_checking_impl", check_types)
    patch.setattr(semantic, "broadcast_impl_value", broadcast_values)

    unwrap = tl.core._unwrap_if_constexpr
    plain = {tensor, int, float, bool}
    patch.setattr(tl.core, "_unwrap_if_constexpr", lambda x: x if type(x) in plain else unwrap(x))


def _check_overflow(patch: pytest.MonkeyPatch) -> None:
    """Integers that overflow are an error. Triton's interpreter looks for them, but is silent."""
    from triton.runtime import interpreter

    exact = {"add": np.add, "sub": np.subtract, "mul": np.multiply}

    def check(self: Any, lhs: Any, rhs: Any, operation: Any) -> None:
        dtype, name = lhs.type.scalar, operation.__name__
        if dtype.int_bitwidth < 64:
            result = exact[name](lhs.handle.data, rhs.handle.data, dtype=np.int64)
            least, most = dtype.get_int_min_value(), dtype.get_int_max_value()
            assert least <= result.min() and result.max() <= most, f"{name}: {dtype} overflows"

    semantic = type(interpreter.interpreter_semantic)
    patch.setattr(semantic, "binary_op_sanitize_overflow_impl", check)
