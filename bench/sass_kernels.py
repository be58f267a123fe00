"""What `python -m bench.sass` compiles, and what it holds each kernel to.

To add a kernel, add a `Kernel` to `KERNELS`: the rest follows from what its launcher launches.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch

from vqtriton.kernels import (
    atomic_sums,
    code_sums,
    draw_rows,
    ema_update,
    nearest_code,
    normalize_rows,
    residual_grad_x,
    residual_level,
    residual_quantize,
    rotate_grad,
    screen_codes,
    screen_tiles,
    vector_quantize_grad,
)
from vqtriton.kernels import prepare_planes as planes_kernels
from vqtriton.kernels.arguments import Pull, Update
from vqtriton.kernels.code_planes import CodePlanes
from vqtriton.planes import inner_size, prepare_planes, screen_bound
from vqtriton.screening import error_bound
from vqtriton.tuning.compiling import Launch, launches_of
from vqtriton.tuning.machines import Work
from vqtriton.tuning.tunables import screen_work

NUM_ROWS, CODEBOOK_SIZE = 48, 40
# what a kernel was launched with, by parameter
Values = Mapping[str, Any]


@dataclass(frozen=True)
class Limit:
    """Figures of the rows of one target and D that must not be larger, whatever the Triton."""

    target: str
    dim: int
    most: Mapping[str, float]


@dataclass(frozen=True)
class Kernel:
    """One kernel, as one launcher launches it."""

    # of the jitted function, without its _kernel
    name: str
    # runs the launcher on x, [48, D], for a target; launches of other kernels are passed over
    record: Callable[[torch.Tensor, str], list[Launch]]
    # D and dtype of x
    inputs: tuple[tuple[int, torch.dtype], ...]
    # (row, code) pairs that a CTA deals with in one iteration of its loop over the codes, as
    # written; None for a kernel that has no such loop
    pairs: Callable[[Values], int] | None = None
    # what is done for a pair: needed with `pairs`
    work: Callable[[Launch], Work] | None = None
    limits: tuple[Limit, ...] = ()
    # whether it goes through all rows and codes, so that it alone is a floor under a search
    takes_all_rows: bool = False

    def launches(self, target: str) -> dict[tuple[int, str], Launch]:
        """Launches by D and configuration."""
        found = {}
        for dim, dtype in self.inputs:
            for launch in self.record(torch.zeros(NUM_ROWS, dim, dtype=dtype), target):
                if launch.name == self.name:
                    found[dim, configuration(launch, dtype)] = launch
        if not found:
            raise ValueError(f"no launch of {self.name}_kernel was recorded")
        return found


def configuration(launch: Launch, dtype: torch.dtype) -> str:
    """dtype of x, tiles, flags and options."""
    words = [str(dtype).removeprefix("torch.")]
    for param in launch.kernel.params:
        value = launch.values[param.name]
        if param.is_constexpr and param.name != "D" and value is not False:
            words.append(param.name if value is True else f"{param.name}={value}")
    options = {k: v for k, v in launch.options.items() if k != "enable_fp_fusion"}
    return " ".join(words + [f"{name}={value}" for name, value in options.items()])


@functools.cache
def codebook_of(dim: int) -> torch.Tensor:
    return torch.randn(CODEBOOK_SIZE, dim, generator=torch.Generator().manual_seed(0))


def accumulator_of(target: str) -> str:
    """A key of `screen_tiles.ACCUMULATOR_ORDER`: consumer Blackwell multiplies as Ampere does."""
    return {"sm_120": "sm_80"}.get(target, target)


def record_nearest_code(x: torch.Tensor, target: str) -> list[Launch]:
    """As it is launched on the target: many rows and few, with codes in one part and in two."""
    target = accumulator_of(target)
    lanes, vec = screen_tiles.ACCUMULATOR_ORDER[target]
    # of two tiles at least
    codebook = codebook_of(x.shape[1]).repeat(8, 1)[None]
    planes = prepare_planes(codebook, lanes=lanes, vec=vec)
    return [
        launch
        for is_few, splits in product((False, True), (1, 2))
        for launch in launches_of_search(
            x, codebook, planes, target, is_few, exact=True, reduction="mean", splits=splits
        )
    ]


def record_search_of_dots(x: torch.Tensor, target: str) -> list[Launch]:
    """As `record_nearest_code`, with many rows and codes in one part and in two."""
    target = accumulator_of(target)
    lanes, vec = screen_tiles.ACCUMULATOR_ORDER[target]
    codebook = codebook_of(x.shape[1]).repeat(8, 1)[None]
    planes = prepare_planes(codebook, lanes=lanes, vec=vec, is_dot=True)
    return [
        launch
        for splits in (1, 2)
        for launch in launches_of_search(
            x, codebook, planes, target, False, exact=True, gather=False, splits=splits
        )
    ]


def record_searches(x: torch.Tensor, target: str) -> list[Launch]:
    """By distance; for D = 64 also by dot product, which differs outside of the hot loop only."""
    of_dots = record_search_of_dots(x, target) if x.shape[1] == 64 else []
    return record_nearest_code(x, target) + of_dots


def launches_of_search(
    x: torch.Tensor,
    codebook: torch.Tensor,
    planes: CodePlanes,
    target: str,
    is_few: bool,
    **options: Any,
) -> list[Launch]:
    """Of a search with the default tiles of a target."""
    inner = planes.codes.shape[2]
    config = nearest_code.nearest_code_config(
        target, inner, screen_tiles.row_unit(x[None]), is_few=is_few
    )
    return launches_of(
        (screen_codes, nearest_code),
        nearest_code.nearest_code,
        x[None],
        codebook,
        planes,
        screen_bound(planes, config.screen.block_k),
        error_bound(x.shape[1], torch.float32),
        config=config,
        **{"gather": True, **options},
    )


def record_fast_search(x: torch.Tensor, target: str) -> list[Launch]:
    """Without a rescue."""
    codebook = codebook_of(x.shape[1])[None]
    planes = prepare_planes(codebook)
    options = {"exact": False, "reduction": "sum"}
    return launches_of_search(x, codebook, planes, accumulator_of(target), False, **options)


# tiles with which the rows are sorted, as they are where they are many: by counting, and by torch
SORTED = (
    code_sums.CodeSumsConfig(most_elements=0),
    code_sums.CodeSumsConfig(most_elements=0, most_counted=0),
)


def record_sums(x: torch.Tensor, target: str) -> list[Launch]:
    """Sums per code in each way, and both gradients."""
    modules = (atomic_sums, code_sums, vector_quantize_grad)
    x, codebook = x[None], codebook_of(x.shape[1])[None]
    indices = torch.zeros(x.shape[:2], dtype=torch.int64)
    grad_loss = torch.ones(x.shape[:2])
    pull = Pull(grad_loss, x, codebook, indices, 1.0)
    return [
        *(
            launch
            for config in (None, *SORTED)
            for launch in launches_of(
                modules, code_sums.code_sums, x, indices, CODEBOOK_SIZE, config=config
            )
        ),
        *record_sums_of_levels(x[0]),
        *launches_of(modules, atomic_sums.atomic_sums, x, indices, CODEBOOK_SIZE),
        *launches_of(modules, vector_quantize_grad.grad_x, x, pull),
        *launches_of(modules, vector_quantize_grad.grad_codebook, pull),
        *launches_of(modules, vector_quantize_grad.grad_codebook, pull, config=SORTED[0]),
    ]


def record_sums_of_levels(x: torch.Tensor) -> list[Launch]:
    """Sums of the residuals of three levels, and the gradient of their codes."""
    rows, codebooks = x.expand(3, *x.shape), codebook_of(x.shape[1]).repeat(3, 1, 1)
    indices = torch.zeros(3, len(x), dtype=torch.int64)
    pull = Pull(torch.ones(3, len(x)), rows, codebooks, indices, 1.0)
    return [
        launch
        for config in (code_sums.CodeSumsConfig(), SORTED[0])
        for pulled in (None, pull)
        for launch in launches_of(
            code_sums,
            code_sums.segment_sums,
            *(rows, indices, CODEBOOK_SIZE),
            config=config,
            pull=pulled,
            chain=codebooks,
        )
    ]


def record_residual_grad_x(x: torch.Tensor, target: str) -> list[Launch]:
    codebooks = codebook_of(x.shape[1]).repeat(3, 1, 1)
    indices = torch.zeros(len(x), 3, dtype=torch.int64)
    pulls = torch.ones(len(x), 3)
    launcher = residual_grad_x.residual_grad_x
    return launches_of(residual_grad_x, launcher, x, pulls, x, codebooks, indices)


def record_ema_update(x: torch.Tensor, target: str) -> list[Launch]:
    """Moving averages with revival, each of them alone."""
    codes, size = codebook_of(x.shape[1]), torch.ones(CODEBOOK_SIZE)
    launches = []
    for sums, *drawn in ((codes, codes, size), (codes, None, None), (None, codes, size)):
        update = Update(size, codes, size, sums, *drawn, torch.ones(2))
        launches += launches_of(ema_update, ema_update.ema_update_, update)
    return launches


def record_prepare_planes(x: torch.Tensor, target: str) -> list[Launch]:
    """Of a small codebook and of a large one."""
    return [
        launch
        for config in (None, planes_kernels.PreparePlanesConfig(most_elements=0))
        for launch in launches_of(
            planes_kernels,
            planes_kernels.prepare_planes,
            codebook_of(x.shape[1])[None],
            *inner_size(x.shape[1]),
            config=config,
        )
    ]


def record_residual_quantize(x: torch.Tensor, target: str) -> list[Launch]:
    """Of many rows and of few, with depths and without."""
    target = accumulator_of(target)
    lanes, vec = screen_tiles.ACCUMULATOR_ORDER[target]
    codebooks = codebook_of(x.shape[1]).repeat(2, 8, 1)
    planes = prepare_planes(codebooks, group=residual_quantize.GROUP, lanes=lanes, vec=vec)
    config = residual_quantize.residual_quantize_config(target, planes.codes.shape[2])
    config = replace(config, few=replace(config.few, most_parts=128))
    few = x[: config.few.most_rows]
    return [
        launch
        for rows, depths in ((x, None), (few, torch.ones(len(few), dtype=torch.int64)))
        for launch in launches_of(
            (residual_level, residual_quantize),
            residual_quantize.residual_quantize,
            rows,
            codebooks,
            planes,
            screen_bound(planes, config.chain.block_k),
            error_bound(x.shape[1], torch.float32),
            depths=depths,
            config=config,
        )
    ]


def record_normalize_rows(x: torch.Tensor, target: str) -> list[Launch]:
    return launches_of((normalize_rows,), normalize_rows.normalize_rows, x)


def record_rotate_grad(x: torch.Tensor, target: str) -> list[Launch]:
    return launches_of((rotate_grad,), rotate_grad.rotate_grad, x, x, x, False)


def record_draw_rows(x: torch.Tensor, target: str) -> list[Launch]:
    indices = torch.zeros(len(x), dtype=torch.int64)
    return launches_of(
        (code_sums, draw_rows),
        draw_rows.draw_rows,
        x,
        indices,
        torch.ones(CODEBOOK_SIZE),
        torch.zeros(1, dtype=torch.int64),
    )


def block_of_pairs(values: Values) -> int:
    return values["BLOCK_N"] * values["BLOCK_K"]


# limits of the screen's loop: with these it takes less time than the dot product of D=64.
# tests/test_search_model.py checks how many programs fit into a multiprocessor
TENSOR_CORE_SCREEN = {"alu_per_pair": 2.0, "total_per_pair": 3.6}

KERNELS = (
    Kernel(
        "screen_codes",
        record_searches,
        tuple((dim, torch.float32) for dim in (4, 8, 12, 32, 64, 128, 256, 512, 1024)),
        block_of_pairs,
        screen_work,
        tuple(Limit("sm_90", dim, TENSOR_CORE_SCREEN) for dim in (4, 8, 12, 32, 64)),
        takes_all_rows=True,
    ),
    *(
        Kernel(
            name,
            record_searches,
            ((8, torch.float32), (64, torch.float32), (512, torch.float16)),
        )
        for name in ("finish_parts", "rescue_rows")
    ),
    *(
        Kernel(name, record_residual_quantize, tuple((d, torch.float32) for d in dims))
        for name, dims in (("residual_quantize", (8, 128, 512)), ("residual_level", (256,)))
    ),
    Kernel("normalize_rows", record_normalize_rows, ((64, torch.float32),)),
    Kernel(
        "rotate_grad",
        record_rotate_grad,
        ((8, torch.float32), (64, torch.float32), (512, torch.float16)),
    ),
    Kernel(
        "residual_grad_x",
        record_residual_grad_x,
        ((8, torch.float32), (128, torch.float32), (512, torch.float16)),
    ),
    *(
        Kernel(name, record_sums, ((64, torch.float32),))
        for name in (
            "sum_codes",
            "place_rows",
            "segment_keys",
            "chunk_sums",
            "combine_chunks",
            "atomic_sums",
            "grad_x",
        )
    ),
    *(
        Kernel(name, record_draw_rows, ((64, torch.float32),))
        for name in ("draw_keys", "count_rows")
    ),
    Kernel("reduce_losses", record_fast_search, ((64, torch.float32),)),
    Kernel("ema_update", record_ema_update, tuple((d, torch.float32) for d in (8, 64, 512))),
    Kernel("code_peaks", record_prepare_planes, ((64, torch.float32), (256, torch.float32))),
    Kernel("planes", record_prepare_planes, tuple((d, torch.float32) for d in (8, 64, 256))),
)
