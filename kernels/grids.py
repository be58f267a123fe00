"""Sizes of grids and tiles. Triton's own functions take longer, since kernels can call them too."""

from __future__ import annotations


def cdiv(number: int, divisor: int) -> int:
    """The quotient, rounded up."""
    return -(-number // divisor)


def next_power_of_2(number: int) -> int:
    """The smallest power of 2 that is not less than ``number``, which is at least 1."""
    return 1 << (number - 1).bit_length()
