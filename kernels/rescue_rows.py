"""Rescue: the nearest code of the rows that the finish left in doubt.

A rival of a row is a code whose score, as screened, may exceed the winner's by the bound. The codes
are screened again for the rows in doubt alone; groups that hold a rival are listed, and their codes
compared by the canonical distance of `vqtriton.reference.squared_distances`, in float64. However
many rows or rivals there are, the result is exact, the memory is the same, and nothing waits for
the device.
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
    num_warps: int = 4
    num_stages: int = 2
    # NVIDIA only; without it ptxas spills a little to reach the next step of occupancy
    max_registers: int = 255
    # of those that share the rows in doubt, however many they are
    programs_per_processor: int = 2
    settle_block_elements: int = 2048
    settle_block_d: int = 64
    settle_num_warps: int = 4


@triton.jit
def _share(num_rows, programs, tiles, BLOCK_N: tl.constexpr):
    """Tiles of rows; parts of the codes, more than one only if there is a program for each."""
    row_tiles = tl.cdiv(num_rows, BLOCK_N)
    splits = tl.minimum(programs // tl.maximum(row_tiles, 1), tiles)
    return row_tiles, tl.maximum(splits, 1)


@triton.jit
def _nearest_of_list(
    x_rows_ptr, codebook_ptr, list_rows_ptr, count, least, index,
    K, stride_xd, stride_ck, stride_cd, D: tl.constexpr, GROUP: tl.constexpr,
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
        # dimension by dimension: the order of `vqtriton.reference.squared_distances`
        for d in range(D):
            offset_d = tl.cast(d, tl.int64)
            x = tl.load(x_rows_ptr + offset_d * stride_xd)
            c = tl.load(codes_ptr + offset_d * stride_cd, mask=is_code, other=0.0)
            difference = x.to(tl.float64)[:, None] - c.to(tl.float64)
            distances += difference * difference
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


# a program must not be compiled for each batch size
@triton.jit(do_not_specialize=["N", "K", "padded_K"])
def rescue_rows_kernel(
    x_ptr,              # [H, N, D] fp32 / fp16 / bf16
    codebook_ptr,       # [H, K, D] fp32 / fp16 / bf16, as given
    codes_ptr,          # [H, padded_K, INNER] fp16, of `vqtriton.planes.CodePlanes`, as the next
    offset_ptr,         # [H, padded_K] fp32
    mean_ptr,           # [H, D] fp32
    scale_ptr,          # [H] fp32
    rows_ptr,           # [H, N] int32, the rows in doubt, of `finish_rows_kernel`, as the next
    thresholds_ptr,     # [H, N] fp32
    num_rows_ptr,       # [H] int32
    counts_ptr,         # [H, programs, BLOCK_N] int32, scratch
    lists_ptr,          # [H, programs, BLOCK_N, LIST] int32, scratch
    indices_ptr,        # [H, N] int64, out: the rows in doubt, if the codes are in one part
    least_ptr,          # [H, programs, BLOCK_N] fp64, out: else what each part has, as the next
    least_index_ptr,    # [H, programs, BLOCK_N] int32, out
    N, K, padded_K, stride_xh, stride_xn, stride_xd, stride_ch, stride_ck, stride_cd,
    D: tl.constexpr, INNER: tl.constexpr, SPLIT: tl.constexpr, BIAS_COLUMNS: tl.constexpr,
    GROUP: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr, HOLD_ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, TAIL: tl.constexpr,
    CHUNK_TILES: tl.constexpr,
):  # fmt: skip
    # int64 before they multiply a stride
    head = tl.program_id(1).to(tl.int64)
    programs = tl.num_programs(0)
    x_ptr += head * stride_xh
    codebook_ptr += head * stride_ch
    mean_ptr += head * D
    rows_ptr += head * N
    thresholds_ptr += head * N
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

    num_rows = tl.load(num_rows_ptr + head)
    tiles = padded_K // BLOCK_K
    row_tiles, splits = _share(num_rows, programs, tiles, BLOCK_N)
    codes_per_split = tl.cdiv(tiles, splits) * BLOCK_K
    for item in range(tl.program_id(0), row_tiles * splits, programs):
        place = tl.cast(item % row_tiles, tl.int64) * BLOCK_N + offs_tile
        is_row = place < num_rows
        # rows beyond the last are the last again, so that loads need no mask
        place = tl.minimum(place, num_rows - 1)
        row = tl.load(rows_ptr + place).to(tl.int64)
        threshold = tl.load(thresholds_ptr + place)
        x_rows_ptr = x_ptr + row * stride_xn
        planes, row_scale, ratio, _high, _low, _rest = row_planes(
            x_rows_ptr, mean_ptr, scale, stride_xd,
            D, INNER, SPLIT, BIAS_COLUMNS, HOLD_ROWS, BLOCK_N, BLOCK_D, TAIL,
        )  # fmt: skip
        least = tl.full((BLOCK_N,), float("inf"), tl.float64)
        # of a row without a finite distance
        index = tl.zeros((BLOCK_N,), tl.int32)
        tl.store(counts_ptrs, tl.zeros((BLOCK_N,), tl.int32))
        tl.debug_barrier()
        first = (item // row_tiles) * codes_per_split
        last = tl.minimum(first + codes_per_split, padded_K)
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
                    slot = tl.atomic_add(counters, 1, mask=is_rival, sem="relaxed")
                    tl.store(
                        list_rows_ptr[:, None, None] + slot.to(tl.int64),
                        tl.broadcast_to((start // GROUP + groups)[None, :, :], is_rival.shape),
                        mask=is_rival,
                    )
            tl.debug_barrier()
            count = tl.load(counts_ptrs, volatile=True)
            if (tl.max(count, 0) > LIST // 2) | (chunk_last == last):
                least, index = _nearest_of_list(
                    x_rows_ptr, codebook_ptr, list_rows_ptr, count, least, index,
                    K, stride_xd, stride_ck, stride_cd, D, GROUP,
                )  # fmt: skip
                tl.debug_barrier()
                tl.store(counts_ptrs, tl.zeros((BLOCK_N,), tl.int32))
                tl.debug_barrier()
        if splits == 1:
            tl.store(indices_ptr + head * N + row, index.to(tl.int64), mask=is_row)
        else:
            tl.store(least_ptr + offs_program, least)
            tl.store(least_index_ptr + offs_program, index)


@triton.jit(do_not_specialize=["N", "rescue_programs", "tiles"])
def settle_rows_kernel(
    x_ptr,              # [H, N, D] fp32 / fp16 / bf16
    codebook_ptr,       # [H, K, D] fp32 / fp16 / bf16, as given
    rows_ptr,           # [H, N] int32
    num_rows_ptr,       # [H] int32
    least_ptr,          # [H, rescue_programs, RESCUE_BLOCK_N] fp64, of `rescue_rows_kernel`
    least_index_ptr,    # [H, rescue_programs, RESCUE_BLOCK_N] int32, likewise
    indices_ptr,        # [H, N] int64, in, out
    quantized_ptr,      # [H, N, D] as x, out if GATHER
    sq_error_ptr,       # [H, N] fp32, out if GATHER
    N, rescue_programs, tiles, stride_xh, stride_xn, stride_xd, stride_ch, stride_ck, stride_cd,
    D: tl.constexpr, GATHER: tl.constexpr, RESCUE_BLOCK_N: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The nearest code of all parts for each row that was in doubt, and its outputs."""
    head = tl.program_id(1).to(tl.int64)
    num_rows = tl.load(num_rows_ptr + head)
    row_tiles, splits = _share(num_rows, rescue_programs, tiles, RESCUE_BLOCK_N)
    for start in range(tl.program_id(0) * BLOCK_N, num_rows, tl.num_programs(0) * BLOCK_N):
        place = tl.cast(start, tl.int64) + tl.arange(0, BLOCK_N)
        is_row = place < num_rows
        row = tl.load(rows_ptr + head * N + place, mask=is_row, other=0).to(tl.int64)
        index_ptrs = indices_ptr + head * N + row
        index = tl.load(index_ptrs, mask=is_row, other=0)
        if splits > 1:
            least = tl.full((BLOCK_N,), float("inf"), tl.float64)
            index = tl.zeros((BLOCK_N,), tl.int64)
            for split in range(splits):
                item = split * row_tiles + place // RESCUE_BLOCK_N
                offs = (head * rescue_programs + item) * RESCUE_BLOCK_N + place % RESCUE_BLOCK_N
                split_least = tl.load(least_ptr + offs, mask=is_row, other=float("inf"))
                split_index = tl.load(least_index_ptr + offs, mask=is_row, other=0).to(tl.int64)
                # parts are in order: the first keeps a tie
                index = tl.where(split_least < least, split_index, index)
                least = tl.minimum(least, split_least)
            tl.store(index_ptrs, index, mask=is_row)
        if GATHER:
            write_rows(
                x_ptr + head * stride_xh + row * stride_xn,
                codebook_ptr + head * stride_ch + index * stride_ck,
                quantized_ptr + (head * N + row) * D, sq_error_ptr + head * N + row, is_row, is_row,
                stride_xd, stride_cd, D, BLOCK_D,
            )  # fmt: skip
