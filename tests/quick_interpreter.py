"""Triton's interpreter in less than half of its time: the same steps, with less done anew.

It takes most of its time for Python around the arithmetic: types are built, checked and compared
for every operation, and all of `triton.language` is patched for every call of a jitted function.
Here that is done once for each type and once for each launch. What the interpreter checks, it still
checks; `tests/test_quick_interpreter.py` compares the two.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
import triton
import triton.language as tl
from triton.runtime import interpreter

# what is replaced is not part of Triton's interface: another version runs as it is
VERSIONS = ("3.7.1",)
Semantic = interpreter.TritonSemantic
tensor, block_type, constexpr = tl.core.tensor, tl.core.block_type, tl.core.constexpr


def replacements() -> Iterator[tuple[object, str, Any]]:
    """What is replaced, its name, and by what."""
    patch_lang, patched = interpreter._patch_lang, set()

    def patch_once(fn: Any) -> Any:
        """What the first call of a launch has put in place is there for the next ones."""
        module = id(fn.__globals__)
        if module in patched:
            return interpreter._LangPatchScope()
        scope = patch_lang(fn)
        if not patched:
            # the launch itself, which ends with this
            restore = scope.restore
            scope.restore = lambda: (patched.clear(), restore())
        patched.add(module)
        return scope

    yield interpreter, "_patch_lang", patch_once

    numpy_dtype, numpy_dtypes = interpreter._get_np_dtype, {}

    def numpy_dtype_once(dtype: Any) -> np.dtype:
        name = dtype.scalar.name
        if name not in numpy_dtypes:
            numpy_dtypes[name] = numpy_dtype(dtype)
        return numpy_dtypes[name]

    yield interpreter, "_get_np_dtype", numpy_dtype_once

    init_block, blocks = block_type.__init__, {}

    def init_block_once(self: Any, element_ty: Any, shape: Any) -> None:
        sizes = tuple(s.value if isinstance(s, constexpr) else s for s in shape)
        key = (element_ty.name, *sizes)
        if key not in blocks:
            # refuses what is no shape
            init_block(self, element_ty, shape)
            blocks[key] = self.__dict__
        self.__dict__.update(blocks[key])

    yield block_type, "__init__", init_block_once

    init_tensor, shapes = tensor.__init__, {}

    def init_tensor_once(self: Any, handle: Any, type: Any) -> None:
        key = tuple(type.shape) if type.is_block() else ()
        if key not in shapes:
            init_tensor(self, handle, type)
            shapes[key] = self.numel, self.shape
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.numel, self.shape = shapes[key]

    yield tensor, "__init__", init_tensor_once

    broadcast, equal = Semantic.broadcast_impl_value, tl.dtype.__eq__

    def broadcast_others(self: Any, lhs: Any, rhs: Any) -> tuple[Any, Any]:
        is_block = lhs.type.is_block()
        if is_block != rhs.type.is_block():
            return broadcast(self, lhs, rhs)
        is_same = not is_block or lhs.type.shape.values == rhs.type.shape.values
        return (lhs, rhs) if is_same else broadcast(self, lhs, rhs)

    yield Semantic, "broadcast_impl_value", broadcast_others
    yield tl.dtype, "__eq__", lambda self, other: self is other or equal(self, other)

    # whether a sum or product fits is computed, and then told to nobody: it takes `options.debug`
    yield Semantic, "binary_op_sanitize_overflow_impl", lambda self, lhs, rhs, operation: None


REPLACED = list(replacements()) if triton.__version__ in VERSIONS else []
OWN = [(where, name, getattr(where, name)) for where, name, _ in REPLACED]


@contextlib.contextmanager
def interpreter_with(parts: list[tuple[object, str, Any]]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for where, name, part in parts:
            stack.enter_context(mock.patch.object(where, name, part))
        yield


def quick_interpreter() -> contextlib.AbstractContextManager[None]:
    return interpreter_with(REPLACED)


def own_interpreter() -> contextlib.AbstractContextManager[None]:
    """Triton's, where the quick one is in place."""
    return interpreter_with(OWN)
