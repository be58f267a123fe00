"""The tiles that a table may hold, and the default, by op and D. All of them give right results."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any, NamedTuple

from vqtriton.kernels import code_sums, ema_update, screen_tiles, vector_quantize_grad
from vqtriton.planes import inner_size
from vqtriton.tiles.problems import Problem


class Tiles(NamedTuple):
    """Of an op."""

    config: type
    # by D; the default is always among what is tried
    candidates: Callable[[int], list[Any]]
    # for a target and D
    default: Callable[[str, int], Any]


def screen_candidates(dim: int) -> list[Any]:
    """For contiguous rows; all of them divide the padded codebook."""
    inner = inner_size(dim)[0]
    defaults = [screen_default(target, dim) for target in screen_tiles.HELD_INNER]
    tried = [
        screen_tiles.ScreenCodesConfig(
            block_n=block_n, block_k=block_k, hold_rows=True, num_warps=warps, num_stages=stages
        )
        for block_n, block_k, (warps, stages) in product(
            (64, 128), (64, 128), ((4, 2), (4, 3), (8, 2), (8, 3))
        )
        if inner <= max(screen_tiles.HELD_INNER.values())
    ]
    tried += [
        screen_tiles.ScreenCodesConfig(
            block_n=128,
            block_k=block_k,
            block_d=block_d,
            hold_rows=False,
            num_warps=8,
            num_stages=stages,
        )
        for block_k, block_d, stages in product((128, 256), (32, 64), (2, 3))
        if inner > min(screen_tiles.HELD_INNER.values())
    ]
    return list(dict.fromkeys(defaults + tried))


def screen_default(target: str, dim: int) -> Any:
    return screen_tiles.screen_codes_config(target, inner_size(dim)[0], screen_tiles.unit_of(dim))


def sums_candidates(dim: int) -> list[Any]:
    return [
        code_sums.CodeSumsConfig(least_chunk=chunk, block_elements=elements, num_warps=warps)
        for chunk, elements, warps in product((32, 64, 128), (512, 1024, 2048), (4, 8))
    ]


def grad_x_candidates(dim: int) -> list[Any]:
    return [
        vector_quantize_grad.GradXConfig(block_elements=elements, num_warps=warps)
        for elements, warps in product((1024, 2048, 4096, 8192), (4, 8))
    ]


def ema_update_candidates(dim: int) -> list[Any]:
    return [
        ema_update.EmaUpdateConfig(block_elements=elements, block_k=block_k, num_warps=8)
        for elements, block_k in product((1024, 2048), (64, 128, 256))
    ]


TILES = {
    "nearest_code": Tiles(screen_tiles.ScreenCodesConfig, screen_candidates, screen_default),
    "code_sums": Tiles(
        code_sums.CodeSumsConfig,
        sums_candidates,
        lambda target, dim: code_sums.CodeSumsConfig(),
    ),
    "grad_x": Tiles(
        vector_quantize_grad.GradXConfig,
        grad_x_candidates,
        lambda target, dim: vector_quantize_grad.GradXConfig(),
    ),
    "ema_update": Tiles(
        ema_update.EmaUpdateConfig,
        ema_update_candidates,
        lambda target, dim: ema_update.EmaUpdateConfig(),
    ),
}


def candidates_of(problem: Problem, target: str) -> list[Any]:
    """The default first."""
    tiles = TILES[problem.op]
    default = tiles.default(target, problem.dim)
    return list(dict.fromkeys([default, *tiles.candidates(problem.dim)]))
