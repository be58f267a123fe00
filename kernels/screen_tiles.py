"""Tiles of the screen: what is known to fit, by device, width and alignment of the rows."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vqtriton.kernels.row_planes import strides_of


@dataclass(frozen=True)
class ScreenCodesConfig:
    """Tiles of the screen."""

    block_n: int = 128
    block_k: int = 64
    # the part of the inner dimension that is multiplied at a time
    block_d: int = 64
    # True: the rows stay in shared memory or registers; False: they are read again for each tile
    hold_rows: bool = True
    num_warps: int = 4
    num_stages: int = 3
    # NVIDIA only
    max_registers: int | None = None
    # classes of groups for each lane; a row whose rivals are the best of their classes needs no
    # second search
    classes: int = 4
    # tiles of dimensions that the finish has on their way at a time
    finish_ahead: int = 1


# threads that share a row of an accumulator, and columns that follow one another in a thread
ACCUMULATOR_ORDER = {"sm_80": (8, 2), "sm_90": (4, 2), "sm_100": (1, 2), "gfx942": (2, 4)}
# a part of the codes has at least so many bytes, unless it has many tiles
LEAST_PART_BYTES = 1 << 18
# inner columns up to which the rows are held
HELD_INNER = {"sm_80": 128, "sm_90": 256, "sm_100": 256, "gfx942": 128}


def architecture(device: torch.device) -> str:
    """The key of the tables above that fits ``device``: what its accumulators look like."""
    if torch.version.hip:
        return "gfx942"
    if device.type != "cuda":
        return "sm_90"
    # consumer Blackwell, 12, multiplies as Ampere does
    return {9: "sm_90", 10: "sm_100"}.get(torch.cuda.get_device_capability(device)[0], "sm_80")


def screen_codes_config(
    target: str, inner: int, unit: int = 8, *, is_few: bool = False
) -> ScreenCodesConfig:
    """Tiles that neither spill nor overflow shared memory; sm_80's fit 99 KiB, for sm_86 and up.

    Those of sm_90 are the fastest that were measured on an H200: bench/results/h200/tiles.jsonl.

    Args:
        target: a key of `ACCUMULATOR_ORDER`.
        inner: columns of the planes.
        unit: of `row_unit`.
        is_few: so few rows that smaller tiles are to fill the processors.
    """
    config = _config_of_many(target, inner, unit)
    if is_few and config.hold_rows and config.block_n == 128:
        # each thread holds as many elements as before; with more loads on their way at a time, the
        # finish needs more registers
        ahead = 4 if target == "sm_90" and unit >= 4 else 1
        stages = config.num_stages if inner <= 128 else 2
        config = replace(config, block_n=64, block_k=128, block_d=64, num_stages=stages)
        return replace(config, num_warps=4, max_registers=255, finish_ahead=ahead)
    return config


def needs_addresses(target: str, inner: int, unit: int) -> bool:
    """Whether wide rows have an address for each element, and cannot be held for lack of registers.

    Then tiles are narrow, and rows are read again for each tile of codes.
    """
    return inner > 64 and (unit == 0 or (unit == 1 and target == "sm_80"))


def _config_of_many(target: str, inner: int, unit: int) -> ScreenCodesConfig:
    if needs_addresses(target, inner, unit):
        # sm_100 spills with 16
        block_d = 32 if target == "sm_100" else 16
        return ScreenCodesConfig(block_d=block_d, hold_rows=False, num_warps=8, num_stages=2)
    if inner > HELD_INNER[target]:
        # wide tiles: the rows are converted again for each of them
        is_small = target == "sm_80"
        return ScreenCodesConfig(
            block_k=128 if is_small else 256,
            block_d=32 if is_small else 64,
            hold_rows=False,
            num_warps=8,
            num_stages=3 if target in ("sm_90", "sm_100") else 2,
            classes={"sm_90": 4, "sm_80": 2}.get(target, 1),
        )
    if inner > 128 and target == "sm_90":
        return ScreenCodesConfig(num_warps=8, finish_ahead=2)
    if inner > 64 or (inner > 32 and unit < 4):
        # half as many elements a thread; on sm_90 there is room for two CTAs
        registers = 128 if target == "sm_90" and unit >= 4 else None
        return ScreenCodesConfig(block_k=128, num_warps=8, num_stages=2, max_registers=registers)
    if inner <= 32 and target == "sm_90":
        return ScreenCodesConfig(block_k=128, max_registers=255)
    if target == "sm_90" and unit >= 4:
        # room for three CTAs of a multiprocessor: with all of the rows in flight, ptxas would spill
        return ScreenCodesConfig(block_d=32, max_registers=168)
    return ScreenCodesConfig(max_registers=255)


def row_unit(x: Tensor) -> int:
    """Elements of x [H, N, D] that can be loaded at a time wherever a row begins: 8, 4 or 1.

    0: elements that follow one another in a row do not do so in memory.
    """
    if x.stride(-1) != 1:
        return 0
    return 1 if x.data_ptr() % 16 else unit_of(*strides_of(x)[:-1])


def unit_of(*strides: int) -> int:
    """`row_unit` of rows that are so many elements apart."""
    unit = math.gcd(8, *strides)
    return unit if unit >= 4 else 1


def num_processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def choose_splits(programs: int, tiles: int, tile_bytes: int, processors: int, inner: int) -> int:
    """Parts of the codes, so that all programs that fit have work if the rows do not suffice.

    Parts cost a launch, so they are worth it only where a program would go through many tiles, or
    through so many bytes of codes that to fetch them takes longer.
    """
    least_tiles = min(64, max(4, LEAST_PART_BYTES // tile_bytes))
    # wide rows fill the shared memory of a processor
    resident = processors if inner > 128 else 2 * processors
    return max(1, min(resident // programs, tiles // least_tiles))
