"""Launches kernels: by Triton's JIT the first time, and from then on what it has compiled.

The JIT finds out anew in each call which of its programs is meant, and that takes most of the time
of a launch. Here it is a look into a dictionary, by what Triton compiles for: of a tensor its dtype
and whether 16 divides its address; of an integer whether it fits into 32 bits, whether it is 1 and
whether 16 divides it.
"""

from __future__ import annotations

import functools
import threading
from typing import Any

import torch
from triton.runtime.jit import JITFunction

from vqtriton.kernels import replay

# A first launch compiles, so Triton parses source. Two threads of Python 3.11 must not parse at
# once, and Triton's interpreter cannot run two kernels at once.
_one_at_a_time = threading.RLock()


class Variant:
    """A kernel with the constexprs and options of some launches, and what these have compiled."""

    def __init__(self, kernel: JITFunction, given: dict[str, Any]) -> None:
        params = kernel.params
        # whether Triton compiles for the value of an argument; constexprs are the last parameters
        self.specializes = [not p.do_not_specialize for p in params if not p.is_constexpr]
        self.constants = [given[p.name] for p in params[len(self.specializes) :]]
        self.compiled: dict[tuple[Any, ...], Any] = {}


@functools.lru_cache(maxsize=4096)
def _variant(kernel: JITFunction, given: tuple[tuple[str, Any], ...]) -> Variant:
    return Variant(kernel, dict(given))


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **given: Any) -> None:
    """``kernel[grid](*args, **given)`` on the current device and stream.

    Args:
        kernel: a function under `triton.jit`, whose constexprs are its last parameters.
        grid: programs along the axes.
        args: tensors, integers, floats or None, for all other parameters.
        given: constexprs and options.
    """
    tape = replay.tape()
    # not with the interpreter, nor on AMD, whose compiler looks at sizes of tensors as well
    if type(kernel) is not JITFunction or torch.version.hip:
        with _one_at_a_time:
            kernel[grid](*args, **given)
        if tape is not None:
            tape.note(None, args)
        return
    variant = _variant(kernel, tuple(given.items()))
    # there is a program for each device
    key: list[Any] = [torch.cuda.current_device() if torch.cuda.is_initialized() else None]
    for arg, specializes in zip(args, variant.specializes, strict=True):
        kind = type(arg)
        if kind is int:
            fits = -(1 << 31) <= arg < 1 << 31
            key.append((fits, arg == 1, arg & 15 == 0) if specializes else fits)
        elif kind is float or arg is None:
            key.append(kind)
        else:
            key.append((arg.dtype, arg.data_ptr() & 15 == 0))
    place = tuple(key)
    program = variant.compiled.get(place)
    if program is None:
        with _one_at_a_time:
            program = kernel[grid](*args, **given)
        # a hook may keep Triton from compiling: then there is no program
        if program is not None:
            variant.compiled[place] = program
    else:
        program[(*grid, 1, 1)[:3]](*args, *variant.constants)
    if tape is not None:
        run = None if program is None else program[(*grid, 1, 1)[:3]]
        tape.note(run, (*args, *variant.constants))
