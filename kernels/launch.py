"""Launches kernels: by Triton's JIT the first time, and from then on what it has compiled.

The JIT finds out anew in each call which of its programs is meant, which takes most of the time of a
launch. Here that is a tuple of what Triton compiles for: of a tensor its dtype and whether 16 divides
its address, of an integer whether it is 1, whether 16 divides it and whether it needs 64 bits.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from triton.runtime.jit import JITFunction

# A first launch compiles, so Triton parses source. Two threads of Python 3.11 must not parse at
# once, and Triton's interpreter cannot run two kernels at once.
_one_at_a_time = threading.RLock()


class Variant:
    """The constexprs and options of launches, of one or several kernels.

    Make it once for all launches of a kind: what they compile is kept in it.
    """

    def __init__(self, **constants_and_options: Any) -> None:
        self.given = constants_and_options
        # of a kernel: how its arguments specialize, its constexprs in order, what is compiled
        self._of_kernels: dict[Any, tuple[tuple[bool, ...], tuple[Any, ...], dict[Any, Any]]] = {}

    def of(self, kernel: Any) -> tuple[tuple[bool, ...], tuple[Any, ...], dict[Any, Any]]:
        try:
            return self._of_kernels[kernel]
        except KeyError:
            params = kernel.params
            specializes = tuple(not p.do_not_specialize for p in params if not p.is_constexpr)
            constants = tuple(self.given[p.name] for p in params[len(specializes) :])
            return self._of_kernels.setdefault(kernel, (specializes, constants, {}))


def launch(kernel: Any, grid: tuple[int, int, int], variant: Variant, *args: Any) -> None:
    """Runs ``kernel`` on the current device and stream.

    Args:
        kernel: a function under `triton.jit`, whose constexprs are its last parameters.
        grid: programs along the three axes.
        variant: its constexprs and options.
        args: the other arguments: tensors, integers, floats or None.
    """
    # AMD's compiler looks at sizes of tensors, too
    if type(kernel) is not JITFunction or torch.version.hip:
        with _one_at_a_time:
            kernel[grid](*args, **variant.given)
        return
    specializes, constants, compiled = variant.of(kernel)
    key: list[Any] = [torch.cuda.current_device() if torch.cuda.is_initialized() else None]
    for arg, may_specialize in zip(args, specializes, strict=True):
        kind = type(arg)
        if kind is int:
            if not may_specialize:
                key.append(arg >> 31)
            elif arg == 1:
                key.append(None)
            else:
                key.append((arg >> 31, arg & 15 == 0))
        elif kind is float or arg is None:
            key.append(kind)
        else:
            key.append((arg.dtype, arg.data_ptr() & 15 == 0))
    place = tuple(key)
    program = compiled.get(place)
    if program is not None:
        program[grid](*args, *constants)
        return
    with _one_at_a_time:
        program = kernel[grid](*args, **variant.given)
    # nothing where a hook has kept it from compiling
    if hasattr(program, "packed_metadata"):
        compiled[place] = program
