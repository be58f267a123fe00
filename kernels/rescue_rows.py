"""Rescue: the nearest code of the rows that the finish left in doubt.

A rival of a row is a code whose score, as screened, may exceed the winner's by the bound. The codes
are screened again for the rows in doubt alone; groups that hold a rival are listed, and their codes
compared by the canonical distance of `vqtriton.reference.squared_distances`, in float64. However
many rows or rivals there are, the result is exact, the memory is the same, and nothing waits for
the device.

The rows of some tiles of the screen, a span, are taken together. Where there are few spans, several
programs divide the codes of each. No program waits for another: the last to arrive, by a counter,
merges what the others have found. Likewise the last of all adds up the loss.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from vqtriton.kernels.finish_rows import write_rows
from vqtriton.kernels.row_planes import row_planes, tile_scores


@dataclass(frozen=True)
class RescueRowsConfig:
    """Tiles of the rescue."""

    block_n: int = 64
    block_k: int = 64
    block_d: int = 64
    hold_rows: bool = True
    # tiles of codes between two looks at the lists, which hold twice what these can add
    chunk_tiles: int = 8
    num_warps: int = 8
    num_stages: int = 2
    # NVIDIA only; without it ptxas spills a little to reach the next step of occupancy
    max_registers: int = 255
    # programs share the spans; where there are fewer spans than programs, they share the codes too
    programs_per_processor: int = 2
    # rows of a span
    span_rows: int = 2048
    # dimensions of a tile of rows that are written
    gather_d: int = 16


@triton.jit
def _nearest_of_list(
    x_rows_ptr, codebook_ptr, list_rows_ptr, count, least, index,
    K, stride_xd, stride_ck, stride_cd, D: tl.constexpr, IS_DOT: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """least, index [BLOCK_N], or what the listed groups of the row have that is nearer."""
    members = tl.arange(0, GROUP)[None, :]
    for i in range(tl.max(count, 0)):
        is_listed = i < count
        group = tl.load(list_rows_ptr + tl.cast(i, tl.int64), mask=is_listed, other=0)
        code = group[:, None] * GROUP + members
        is_code = is_listed[:, None] & (code < K)
        codes_ptr = codebook_ptr + code.to(tl.int64) * stride_ck
        distances = tl.zeros(code.shape, tl.float64)
        # dimension by dimension: the order of `vqtriton.reference.squared_distances`; if IS_DOT, of
        # `dot_products` there, and the distance is the opposite of the dot product
        for d in range(D):
            offset_d = tl.cast(d, tl.int64)
            x = tl.load(x_rows_ptr + offset_d * stride_xd)
            c = tl.load(codes_ptr + offset_d * stride_cd, mask=is_code, other=0.0)
            if IS_DOT:
                distances -= x.to(tl.float64)[:, None] * c.to(tl.float64)
            else:
                difference = x.to(tl.float64)[:, None] - c.to(tl.float64)
                distances += difference * difference
        if IS_DOT:
            distances = tl.where(tl.abs(distances) < float("inf"), distances, float("inf"))
        # a NaN is not below inf either
        distances = tl.where((distances < float("inf")) & is_code, distances, float("inf"))
        group_least = tl.min(distances, 1)
        is_least = distances == group_least[:, None]
        # the lowest index keeps a tie
        group_index = tl.min(tl.where(is_least, code, 2147483647), 1)
        is_nearer = (group_least < least) | ((group_least == least) & (group_index < index))
        index = tl.where(is_nearer, group_index, index)
        least = tl.where(is_nearer, group_least, least)
    return least, index


@triton.jit
def _span_of(doubts_ptr, head, span, tiles, SPAN: tl.constexpr):
    """How many rows in doubt each tile of a span has, and where the rows of the next begin."""
    offs = span * SPAN + tl.arange(0, SPAN)
    doubts = tl.load(doubts_ptr + (head * tiles + offs), mask=offs < tiles, other=0)
    return doubts, tl.cumsum(doubts, 0)


@triton.jit
def _slots(place, doubts, ends, head, span, tiles, SPAN: tl.constexpr, TILE_N: tl.constexpr):
    """Where the rows at places of a span's list are in `rows`, whose tiles have gaps between."""
    is_before = ends[None, :] <= place[:, None]
    tile = tl.sum(is_before.to(tl.int32), 1).to(tl.int64)
    first = tl.sum(tl.where(is_before, doubts[None, :], 0), 1)
    return (head * tiles + span * SPAN + tile) * TILE_N + (place - first)


@triton.jit
def _write_found(
    index, row, is_row, x_ptr, codebook_ptr, indices_ptr, quantized_ptr, losses_ptr, weight, offs_h,
    stride_xn, stride_xd, stride_ck, stride_cd,
    D: tl.constexpr, GATHER: tl.constexpr, GATHER_D: tl.constexpr,
):  # fmt: skip
    """Indices of rows, codes and losses, whose sum is returned, fp64."""
    index = index.to(tl.int64)
    tl.store(indices_ptr + offs_h + row, index, mask=is_row)
    total = tl.full((), 0.0, tl.float64)
    if GATHER:
        losses = write_rows(
            x_ptr + row * stride_xn, codebook_ptr + index * stride_ck,
            quantized_ptr + (offs_h + row) * D, losses_ptr + offs_h + row, weight, is_row, is_row,
            stride_xd, stride_cd, D, GATHER_D,
        )  # fmt: skip
        total = tl.sum(tl.where(is_row, losses, 0.0).to(tl.float64), 0)
    return total


@triton.jit
def _arrive(counter_ptr):
    """How many programs were here before; what these have stored can be read, past the L1 cache."""
    # the stores of all threads, before the one of the counter
    tl.debug_barrier()
    before = tl.atomic_add(counter_ptr, 1, sem="acq_rel")
    tl.debug_barrier()
    return before


@triton.jit
def reduce_losses(
    sums_ptr, valid_ptr, loss_ptr, share_ptr, head, tiles, num_sums,
    D: tl.constexpr, IS_MEAN: tl.constexpr,
):  # fmt: skip
    """The loss of a head, from the sums of tiles and spans; what it was multiplied by."""
    BLOCK: tl.constexpr = 1024
    total = tl.zeros((BLOCK,), tl.float64)
    count = tl.zeros((BLOCK,), tl.int64)
    for start in range(0, num_sums, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        ptrs = sums_ptr + (head * num_sums + offs)
        total += tl.load(ptrs, mask=offs < num_sums, other=0.0, volatile=True)
        ptrs = valid_ptr + (head * tiles + offs)
        count += tl.load(ptrs, mask=offs < tiles, other=0).to(tl.int64)
    share = tl.full((), 1.0, tl.float32)
    if IS_MEAN:
        # in float32: a division in float64 is made of fused multiply-adds, and no distance is to be
        share = tl.div_rn(share, tl.maximum(tl.sum(count, 0) * D, 1).to(tl.float32))
    tl.store(loss_ptr + head, (tl.sum(total, 0) * share.to(tl.float64)).to(tl.float32))
    tl.store(share_ptr + head, share)


# a program must not be compiled for each batch size
@triton.jit(do_not_specialize=["N", "K", "padded_K", "tiles", "splits", "codes_per_split"])
def rescue_rows_kernel(
    x_ptr,              # [H, N, D] fp32 / fp16 / bf16
    codebook_ptr,       # [H, K, D] fp32 / fp16 / bf16, as given
    codes_ptr,          # [H, padded_K, INNER] fp16, of `vqtriton.planes.CodePlanes`, as the next
    offset_ptr,         # [H, padded_K] fp32
    mean_ptr,           # [H, D] fp32
    scale_ptr,          # [H] fp32
    indices_ptr,        # [H, N] int64, out: of the rows in doubt, as the next two
    quantized_ptr,      # [H, N, D] as x, out if GATHER
    losses_ptr,         # [H, N] fp32, out if GATHER
    rows_ptr,           # [H, N'] int32, of `vqtriton.kernels.finish_rows.Finish`, as the next five
    thresholds_ptr,     # [H, N'] fp32
    doubts_ptr,         # [H, T] int32
    arrivals_ptr,       # [H, T + 1] int32, in 0
    valid_ptr,          # [H, T] int32, if REDUCES
    sums_ptr,           # [H, T + S] fp64, if REDUCES; out: of the losses of the rows in doubt
    counts_ptr,         # [H, programs, BLOCK_N] int32, scratch
    lists_ptr,          # [H, programs, BLOCK_N, LIST] int32, scratch
    least_ptr,          # [splits, H, N'] fp64, scratch: what each part has, as the next
    least_index_ptr,    # [splits, H, N'] int32, scratch
    loss_ptr,           # [H] fp32, out if REDUCES
    share_ptr,          # [H] fp32, out if REDUCES: what the sum of the losses was multiplied by
    weight,
    N, K, padded_K, tiles, splits, codes_per_split,
    stride_xh, stride_xn, stride_xd, stride_ch, stride_ck, stride_cd,
    D: tl.constexpr, IS_DOT: tl.constexpr, INNER: tl.constexpr, SPLIT: tl.constexpr,
    BIAS_COLUMNS: tl.constexpr, GROUP: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr,
    HOLD_ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    TAIL: tl.constexpr, CHUNK_TILES: tl.constexpr, TILE_N: tl.constexpr, SPAN: tl.constexpr,
    GATHER: tl.constexpr, GATHER_D: tl.constexpr, REDUCES: tl.constexpr, IS_MEAN: tl.constexpr,
):  # fmt: skip
    # int64 before they multiply a stride
    head = tl.program_id(1).to(tl.int64)
    heads = tl.num_programs(1)
    programs = tl.num_programs(0)
    spans = programs // splits
    span = (tl.program_id(0) % spans).to(tl.int64)
    split = (tl.program_id(0) // spans).to(tl.int64)
    offs_h = head * N
    x_ptr += head * stride_xh
    codebook_ptr += head * stride_ch
    mean_ptr += head * D
    scale = tl.load(scale_ptr + head)
    # what the compiler cannot see: K is padded to whole tiles
    head_k = tl.multiple_of(head * padded_K, BLOCK_K)
    codes_ptr += head_k * INNER
    offset_ptr += head_k

    GROUPS: tl.constexpr = BLOCK_K // GROUP
    LIST: tl.constexpr = 2 * CHUNK_TILES * GROUPS
    offs_tile = tl.arange(0, BLOCK_N)
    offs_program = (head * programs + tl.program_id(0)) * BLOCK_N + offs_tile
    counts_ptrs = counts_ptr + offs_program
    list_rows_ptr = lists_ptr + offs_program * LIST
    NUM: tl.constexpr = GROUPS // LANES
    # group of each score of a tile, from the first of the tile on
    groups = tl.arange(0, NUM)[:, None] * LANES + tl.arange(0, LANES)[None, :]

    doubts, ends = _span_of(doubts_ptr, head, span, tiles, SPAN)
    num_rows = tl.sum(doubts, 0)
    # where this part of the codes keeps its results for the rows of the span
    offs_found = ((split * heads + head) * tiles + span * SPAN) * TILE_N
    first = tl.program_id(0) // spans * codes_per_split
    last = tl.minimum(first + codes_per_split, padded_K)
    total = tl.full((), 0.0, tl.float64)
    for start_n in range(0, num_rows, BLOCK_N):
        place = start_n + offs_tile
        is_row = place < num_rows
        # rows beyond the last are the last again, so that loads need no mask
        slot = _slots(
            tl.minimum(place, num_rows - 1), doubts, ends, head, span, tiles, SPAN, TILE_N
        )
        row = tl.load(rows_ptr + slot).to(tl.int64)
        threshold = tl.load(thresholds_ptr + slot)
        x_rows_ptr = x_ptr + row * stride_xn
        planes, row_scale, ratio, _high, _low, _rest = row_planes(
            x_rows_ptr, mean_ptr, scale, stride_xd,
            D, IS_DOT, INNER, SPLIT, BIAS_COLUMNS, HOLD_ROWS, BLOCK_N, BLOCK_D, TAIL,
        )  # fmt: skip
        least = tl.full((BLOCK_N,), float("inf"), tl.float64)
        # of a row without a finite distance
        index = tl.zeros((BLOCK_N,), tl.int32)
        tl.store(counts_ptrs, tl.zeros((BLOCK_N,), tl.int32))
        tl.debug_barrier()
        for chunk in range(first, last, CHUNK_TILES * BLOCK_K):
            chunk_last = tl.minimum(chunk + CHUNK_TILES * BLOCK_K, last)
            for start in range(chunk, chunk_last, BLOCK_K):
                start_k = tl.multiple_of(tl.cast(start, tl.int64), BLOCK_K)
                scores = tile_scores(
                    planes, x_rows_ptr, mean_ptr, row_scale, ratio, codes_ptr, offset_ptr, start_k,
                    stride_xd, D, INNER, BIAS_COLUMNS, HOLD_ROWS, BLOCK_N, BLOCK_K, BLOCK_D, TAIL,
                )  # fmt: skip
                # written so that a NaN, from a row that overflows, is a rival
                is_rival = (scores < threshold[:, None]) == 0
                is_rival = (is_rival & is_row[:, None]).to(tl.int32)
                is_rival = tl.reshape(is_rival, (BLOCK_N, NUM, GROUP // VEC, LANES, VEC))
                is_rival = tl.permute(is_rival, (0, 1, 3, 2, 4))
                is_rival = tl.max(tl.reshape(is_rival, (BLOCK_N, NUM, LANES, GROUP)), 3) > 0
                if tl.max(tl.reshape(is_rival.to(tl.int32), (BLOCK_N * GROUPS,)), 0) > 0:
                    counters = tl.broadcast_to(counts_ptrs[:, None, None], is_rival.shape)
                    slots = tl.atomic_add(counters, 1, mask=is_rival, sem="relaxed")
                    tl.store(
                        list_rows_ptr[:, None, None] + slots.to(tl.int64),
                        tl.broadcast_to((start // GROUP + groups)[None, :, :], is_rival.shape),
                        mask=is_rival,
                    )
            tl.debug_barrier()
            count = tl.load(counts_ptrs, volatile=True)
            if (tl.max(count, 0) > LIST // 2) | (chunk_last == last):
                least, index = _nearest_of_list(
                    x_rows_ptr, codebook_ptr, list_rows_ptr, count, least, index,
                    K, stride_xd, stride_ck, stride_cd, D, IS_DOT, GROUP,
                )  # fmt: skip
                tl.debug_barrier()
                tl.store(counts_ptrs, tl.zeros((BLOCK_N,), tl.int32))
                tl.debug_barrier()
        if splits == 1:
            total += _write_found(
                index, row, is_row, x_ptr, codebook_ptr, indices_ptr, quantized_ptr, losses_ptr,
                weight, offs_h, stride_xn, stride_xd, stride_ck, stride_cd, D, GATHER, GATHER_D,
            )  # fmt: skip
        else:
            tl.store(least_ptr + (offs_found + place), least, mask=is_row)
            tl.store(least_index_ptr + (offs_found + place), index, mask=is_row)

    is_last = splits == 1
    if splits > 1:
        is_last = _arrive(arrivals_ptr + (head * (tiles + 1) + span)) == splits - 1
        if is_last:
            for start_n in range(0, num_rows, BLOCK_N):
                place = start_n + offs_tile
                is_row = place < num_rows
                least = tl.full((BLOCK_N,), float("inf"), tl.float64)
                index = tl.zeros((BLOCK_N,), tl.int32)
                for other in range(splits):
                    offs = (tl.cast(other, tl.int64) * heads + head) * tiles + span * SPAN
                    offs = offs * TILE_N + place
                    found = tl.load(
                        least_ptr + offs, mask=is_row, other=float("inf"), volatile=True
                    )
                    found_index = tl.load(
                        least_index_ptr + offs, mask=is_row, other=0, volatile=True
                    )
                    # parts are in order: the first keeps a tie
                    index = tl.where(found < least, found_index, index)
                    least = tl.minimum(least, found)
                slot = _slots(
                    tl.minimum(place, num_rows - 1), doubts, ends, head, span, tiles, SPAN, TILE_N
                )
                row = tl.load(rows_ptr + slot).to(tl.int64)
                total += _write_found(
                    index, row, is_row, x_ptr, codebook_ptr, indices_ptr, quantized_ptr, losses_ptr,
                    weight, offs_h, stride_xn, stride_xd, stride_ck, stride_cd, D, GATHER, GATHER_D,
                )  # fmt: skip
    if REDUCES:
        if is_last:
            tl.store(sums_ptr + (head * (tiles + spans) + tiles + span), total)
        if _arrive(arrivals_ptr + (head * (tiles + 1) + tiles)) == programs - 1:
            reduce_losses(
                sums_ptr, valid_ptr, loss_ptr, share_ptr, head, tiles, tiles + spans, D, IS_MEAN
            )


@triton.jit(do_not_specialize=["tiles", "num_sums"])
def reduce_losses_kernel(
    sums_ptr,   # [H, num_sums] fp64, of tiles and spans
    valid_ptr,  # [H, tiles] int32
    loss_ptr,   # [H] fp32, out
    share_ptr,  # [H] fp32, out
    tiles, num_sums,
    D: tl.constexpr, IS_MEAN: tl.constexpr,
):  # fmt: skip
    """Adds up the losses of a search that is not exact. In an exact one, the rescue does it."""
    head = tl.program_id(0).to(tl.int64)
    reduce_losses(sums_ptr, valid_ptr, loss_ptr, share_ptr, head, tiles, num_sums, D, IS_MEAN)
