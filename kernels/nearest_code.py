"""Nearest code: screen on tensor cores, finish with a certificate, rescue the rows left in doubt.

Two launches that nothing waits for: the finish is the end of the screen. It has a launch of its own
where rows are streamed, and where they are few and the codes so many that they are screened in
parts. docs/exactness.md shows why the result is the argmin of the float64 distances. The kernels
are in screen_codes.py, finish_rows.py and rescue_rows.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from vqtriton.kernels.code_planes import CodePlanes, OwnBound, ScreenBound
from vqtriton.kernels.finish_rows import Finish
from vqtriton.kernels.grids import cdiv, next_power_of_2
from vqtriton.kernels.launch import launch
from vqtriton.kernels.rescue_rows import (
    MOST_TILES,
    PAIR,
    RescueRowsConfig,
    reduce_losses_kernel,
    rescue_rows_kernel,
)
from vqtriton.kernels.row_planes import plane_constants, register_limit, strides_of
from vqtriton.kernels.screen_codes import (
    Screened,
    classes_of,
    finish_parts,
    num_listed,
    parts_of,
    screen_codes,
)
from vqtriton.kernels.screen_tiles import (
    ScreenCodesConfig,
    architecture,
    needs_addresses,
    num_processors,
    row_unit,
    screen_codes_config,
)

# each part of the scratch starts at a multiple of this many elements
ALIGNMENT = 32


@dataclass(frozen=True)
class NearestCodeConfig:
    """Tiles of both kernels."""

    screen: ScreenCodesConfig = field(default_factory=ScreenCodesConfig)
    rescue: RescueRowsConfig = field(default_factory=RescueRowsConfig)


class NearestCode(NamedTuple):
    """What `nearest_code` returns."""

    indices: Tensor  # [H, N] int64, -1 where masked
    quantized: Tensor | None  # [H, N, D] in the dtype of x
    losses: Tensor | None  # [H, N] fp32: weight times the squared distance to x, NaN if not finite
    loss: Tensor | None  # [H] fp32, their sum or mean
    share: (
        Tensor | None
    )  # [H] fp32, what their sum was multiplied by: 1, or 1 / elements that count
    tile_rows: int
    known: Tensor  # [H·T and more] int32, rows of each tile that the rescue decided: between rivals
    unknown: Tensor  # [H·T and more] int32, likewise: by another search

    @property
    def num_doubtful(self) -> Tensor:
        """[H] int64, rows that the rescue of an exact search decided."""
        return self._total(self.known) + self.num_searched

    @property
    def num_searched(self) -> Tensor:
        """[H] int64, rows for which the rescue had to search again."""
        return self._total(self.unknown)

    def _total(self, of_tiles: Tensor) -> Tensor:
        heads, num_rows = self.indices.shape
        tiles = cdiv(num_rows, self.tile_rows)
        return of_tiles[: heads * tiles].view(heads, tiles).sum(1)


class FinishedRows(NamedTuple):
    """The tensors of `Finish` that are not returned, in its order."""

    chosen: Tensor
    best: Tensor
    gaps: Tensor
    rows: Tensor
    thresholds: Tensor
    rivals: Tensor
    rival_counts: Tensor
    known: Tensor
    unknown: Tensor
    arrivals: Tensor
    valid: Tensor
    sums: Tensor


class Scratch(NamedTuple):
    """What the kernels leave for each other; T tiles of rows, N' rows of all of these."""

    screened: Screened
    rows: FinishedRows
    counts: Tensor  # [H·searches·BLOCK_N] int32
    lists: Tensor  # [H·searches·BLOCK_N·LIST] int32
    least_index: Tensor  # [splits·H·N'] int32
    least: Tensor  # [splits·H·N'] fp64


class Rescue(NamedTuple):
    """How the rescue is divided."""

    tiles: int  # tiles of rows that the screen has
    known_tiles: int  # how many tiles a program takes whose rows have known rivals
    known_spans: int
    span: int  # how many tiles a program takes whose rows are searched again
    spans: int
    splits: int  # parts that the codes are divided into for that
    codes: int  # codes in each part; the last may have fewer

    @property
    def searches(self) -> int:
        """Programs that search again."""
        return self.spans * self.splits


def config_for(x: Tensor, inner: int) -> NearestCodeConfig:
    """The default tiles for x [H, N, D] and planes of ``inner`` columns."""
    is_few = x.shape[0] * cdiv(x.shape[1], 128) < 2 * num_processors(x.device)
    return nearest_code_config(architecture(x.device), inner, row_unit(x), is_few=is_few)


def nearest_code_config(
    target: str, inner: int, unit: int = 8, *, is_few: bool = False
) -> NearestCodeConfig:
    """Tiles that neither spill nor overflow shared memory: see `screen_codes_config`."""
    narrow = needs_addresses(target, inner, unit)
    hold_rows = inner <= 128 and not narrow
    rescue = RescueRowsConfig(
        block_n=64 if hold_rows else 16,
        block_d=16 if narrow else 64,
        hold_rows=hold_rows,
        num_stages=1 if narrow else 2,
    )
    return NearestCodeConfig(screen_codes_config(target, inner, unit, is_few=is_few), rescue)


def nearest_code(
    x: Tensor,
    codebook: Tensor,
    planes: CodePlanes,
    screen_bound: ScreenBound,
    own_bound: OwnBound,
    *,
    exact: bool,
    mask: Tensor | None = None,
    gather: bool = False,
    reduction: str = "none",
    weight: float = 1.0,
    splits: int | None = None,
    config: NearestCodeConfig | None = None,
) -> NearestCode:
    """Index of the nearest code, the code itself and its squared distance.

    Args:
        x: [H, N, D] float32 / float16 / bfloat16, N >= 1, any strides.
        codebook: [H, K, D], likewise.
        planes: of ``codebook``.
        screen_bound: `vqtriton.planes.screen_bound` for these planes and ``config.screen.block_k``.
        own_bound: `vqtriton.screening.error_bound` for D in float32.
        exact: certify, and rescue what is not certified; else the best of the group that the
            screen found.
        mask: [H, N] bool, False for rows that get index -1, zeros and no loss.
        gather: fill ``quantized`` and ``losses``; else they are None.
        reduction: "mean" or "sum" of the losses, or "none": ``loss`` is None.
        weight: of the losses.
        splits: see `parts_of`.
        config: tiles.

    Raises:
        ValueError: a reduction without gather, or as `parts_of` does.
    """
    if reduction != "none" and not gather:
        raise ValueError(
            f"reduction is {reduction!r} without gather: there are no losses to add up"
        )
    heads, num_rows, dim = x.shape
    config = config or config_for(x, planes.codes.shape[2])
    parts = parts_of(heads, num_rows, planes, config.screen, splits)
    rescue = _divide_rescue(x, planes, config)

    def empty(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=x.device)

    indices = empty(heads, num_rows, dtype=torch.int64)
    quantized = empty(heads, num_rows, dim, dtype=x.dtype) if gather else None
    losses = empty(heads, num_rows, dtype=torch.float32) if gather else None
    loss, share = None, None
    if reduction != "none":
        loss, share = (empty(heads, dtype=torch.float32) for _ in range(2))
    # where rows are streamed, the screen has no registers to spare
    finishes = parts.splits == 1 and config.screen.hold_rows
    scratch = _make_scratch(x, planes, 0 if finishes else parts.splits, rescue, config)
    num_sums = rescue.tiles + (rescue.known_spans + rescue.spans if exact else 0)
    finish = Finish(
        # neighbours in a group are loaded from one address
        codebook.contiguous(),
        None if mask is None else mask.contiguous(),
        indices,
        quantized,
        losses,
        *scratch.rows,
        *own_bound,
        weight,
        codebook.shape[1],
        num_sums,
    )
    screen = scratch.screened, parts, config.screen
    with torch.cuda.device_of(x):
        if finishes:
            screen_codes(x, planes, screen_bound, *screen, finish, exact=exact)
        else:
            screen_codes(x, planes, screen_bound, *screen)
            finish_parts(x, planes, *screen, finish, exact=exact)
        if exact:
            _rescue_rows(x, planes, finish, scratch, rescue, loss, share, reduction, config)
        elif loss is not None:
            launch(
                reduce_losses_kernel,
                (heads,),
                *(finish.sums, finish.valid, loss, share),
                # none of spans
                *(rescue.tiles, rescue.tiles),
                D=dim,
                IS_MEAN=reduction == "mean",
                num_warps=4,
                enable_fp_fusion=True,
            )
    tile_rows = config.screen.block_n
    doubts = finish.known, finish.unknown
    return NearestCode(indices, quantized, losses, loss, share, tile_rows, *doubts)


def _divide_rescue(x: Tensor, planes: CodePlanes, config: NearestCodeConfig) -> Rescue:
    heads, num_rows, _ = x.shape
    tile_n, rescue = config.screen.block_n, config.rescue
    tiles = cdiv(num_rows, tile_n)
    # not by the number of rows, for which it would be compiled
    span = max(1, rescue.span_rows // tile_n)
    spans = cdiv(tiles, span)
    programs = rescue.programs_per_processor * num_processors(x.device)
    known_tiles = min(MOST_TILES, cdiv(heads * tiles, programs))
    code_tiles = planes.codes.shape[1] // rescue.block_k
    code_tiles_of_split = cdiv(code_tiles, max(1, min(programs // (heads * spans), code_tiles)))
    splits = cdiv(code_tiles, code_tiles_of_split)
    codes = code_tiles_of_split * rescue.block_k
    return Rescue(tiles, known_tiles, cdiv(tiles, known_tiles), span, spans, splits, codes)


def _make_scratch(
    x: Tensor, planes: CodePlanes, parts: int, rescue: Rescue, config: NearestCodeConfig
) -> Scratch:
    """``parts``: of the codes, where the screen leaves them to a finish."""
    heads, num_rows, _ = x.shape
    tiles, block_n = rescue.tiles, config.rescue.block_n
    all_rows, padded_rows = heads * num_rows, heads * tiles * config.screen.block_n
    classes = planes.lanes * classes_of(planes, config.screen)[1]
    listed = heads * tiles * num_listed(config.screen)
    list_size = 2 * config.rescue.chunk_tiles * config.rescue.block_k // planes.group
    of_searches = heads * rescue.searches * block_n
    of_parts = parts * all_rows
    found = rescue.splits * padded_rows if rescue.splits > 1 else 0
    of_tiles = heads * tiles, heads * tiles, heads * (tiles + 1), heads * tiles
    of_lists = of_searches, of_searches * list_size, found
    groups, chosen, rows, rivals, rival_counts, known, unknown, arrivals, valid, *lists = _slices(
        x,
        torch.int32,
        of_parts * classes,
        *(padded_rows, padded_rows, listed * classes, listed),
        *of_tiles,
        *of_lists,
    )
    scores, others, error, row_scale, norm, best, gaps, thresholds = _slices(
        x,
        torch.float32,
        *(of_parts * classes, of_parts, all_rows, all_rows, all_rows),
        *(padded_rows, padded_rows, padded_rows),
    )
    sums, least = _slices(
        x, torch.float64, heads * (tiles + rescue.known_spans + rescue.spans), found
    )
    of_part = (groups, scores, others) if of_parts else (None, None, None)
    finished = FinishedRows(
        *(chosen, best, gaps, rows, thresholds, rivals, rival_counts),
        *(known, unknown, arrivals, valid, sums),
    )
    return Scratch(Screened(*of_part, error, row_scale, norm), finished, *lists, least)


def _slices(x: Tensor, dtype: torch.dtype, *sizes: int) -> tuple[Tensor, ...]:
    """Of one allocation; each is at least as large as asked for."""
    padded = [cdiv(size, ALIGNMENT) * ALIGNMENT for size in sizes]
    return torch.empty(sum(padded), dtype=dtype, device=x.device).split(padded)


def _rescue_rows(
    x: Tensor,
    planes: CodePlanes,
    finish: Finish,
    scratch: Scratch,
    rescue: Rescue,
    loss: Tensor | None,
    share: Tensor | None,
    reduction: str,
    config: NearestCodeConfig,
) -> None:
    heads, num_rows, dim = x.shape
    tiles = config.rescue
    # a code for each thread
    threads = 32 * tiles.num_warps
    known_n = threads // (PAIR * planes.group)
    codes_of_group = tiles.block_n * planes.group
    is_lean = planes.lanes == 4 and row_unit(x) >= 4
    launch(
        rescue_rows_kernel,
        (rescue.searches + rescue.known_spans, heads),
        x,
        finish.codebook,
        planes.codes,
        planes.offset,
        planes.mean,
        planes.scale,
        finish.indices,
        finish.quantized,
        finish.losses,
        finish.rows,
        finish.thresholds,
        finish.rivals,
        finish.rival_counts,
        finish.known,
        finish.unknown,
        finish.arrivals,
        finish.valid,
        finish.sums,
        scratch.counts,
        scratch.lists,
        scratch.least,
        scratch.least_index,
        loss,
        share,
        finish.weight,
        num_rows,
        finish.num_codes,
        planes.codes.shape[1],
        rescue.tiles,
        rescue.known_spans,
        rescue.known_tiles,
        rescue.splits,
        rescue.codes,
        finish.num_sums,
        *strides_of(x),
        **plane_constants(planes, tiles.block_d, tiles.hold_rows),
        BLOCK_N=tiles.block_n,
        BLOCK_K=tiles.block_k,
        CHUNK_TILES=tiles.chunk_tiles,
        TILE_N=config.screen.block_n,
        SPAN=rescue.span,
        CLASSES=planes.lanes * classes_of(planes, config.screen)[1],
        LISTED=num_listed(config.screen),
        KNOWN_N=known_n,
        TOGETHER=max(1, threads // codes_of_group),
        # with more codes for a thread, there are fewer registers: on sm_90 just enough, unless each
        # element of a row has an address
        SEARCH_CHUNKS=4 if codes_of_group <= threads or is_lean else 2,
        GATHER=finish.quantized is not None,
        GATHER_D=min(next_power_of_2(dim), tiles.gather_elements // known_n),
        SEARCH_D=min(next_power_of_2(dim), tiles.gather_elements // tiles.block_n),
        REDUCES=loss is not None,
        X_UNIT=max(1, row_unit(x)),
        IS_MEAN=reduction == "mean",
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        # a fused multiply-add rounds once where the definition rounds twice
        enable_fp_fusion=False,
        **register_limit(tiles.max_registers),
    )
