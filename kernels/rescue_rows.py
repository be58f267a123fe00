"""Rescue: the nearest code of the rows that the finish left in doubt.

A rival of a row is a code whose score, as screened, may exceed the winner's by the bound. Of most
rows in doubt, the groups that hold rivals are known from the screen. For the other rows, the codes
are screened again, and the groups that hold a rival are listed. Then the codes of these groups are
compared by the canonical distance of `vqtriton.reference.squared_distances`, in float64. However
many rows or rivals there are, the result is exact, the memory is the same, and nothing waits for
the device.

Both kinds of rows are dealt with in one launch, by programs of their own. Each takes the rows of
some tiles of the screen, a span. Where few rows are searched again, several programs divide the
codes. No program waits for another: the last to arrive, by a counter, merges what the others have
found. Likewise the last of all adds up the loss.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from vqtriton.kernels.finish_rows import take_codes
from vqtriton.kernels.row_planes import row_planes, tile_scores


@dataclass(frozen=True)
class RescueRowsConfig:
    """Tiles of the rescue."""

    # rows that are screened again together
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
    # rows of a span that is searched again
    span_rows: int = 2048
    # elements of a tile of rows that are written
    gather_elements: int = 2048


# groups of a row that are compared together, where they are known: most rows in doubt have two
PAIR = 2
_PAIR = tl.constexpr(PAIR)
# parts that are merged at a time
PARTS = tl.constexpr(8)
# most tiles of a span of rows with known rivals
MOST_TILES = 32
_MOST_TILES = tl.constexpr(MOST_TILES)


@triton.jit
def _add_in_order(distances, terms):
    """distances [R, C] fp64 plus the terms [R, C, 4], one after the other."""
    even, odd = tl.split(tl.reshape(terms, (terms.shape[0], terms.shape[1], 2, 2)))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return (((distances + first) + second) + third) + fourth


@triton.jit
def nearest_of_groups(
    x_rows_ptr, codebook_ptr, groups, is_listed, least, index,
    K, end_d, stride_xd,
    D: tl.constexpr, IS_DOT: tl.constexpr, GROUP: tl.constexpr, MOST_CHUNKS: tl.constexpr,
):  # fmt: skip
    """least, index [R], or what the groups [R, G] of a row have that is nearer."""
    R: tl.constexpr = groups.shape[0]
    CODES: tl.constexpr = groups.shape[1] * GROUP
    code = groups[:, :, None] * GROUP + tl.arange(0, GROUP)[None, None, :]
    is_code = is_listed[:, :, None] & (code < K)
    code = tl.reshape(code, (R, CODES))
    is_code = tl.reshape(is_code, (R, CODES))
    # codes that are not there are the first again, so that loads need no mask
    code = tl.where(is_code, code, 0)
    codes_ptr = codebook_ptr + code.to(tl.int64) * D
    distances = tl.zeros((R, CODES), tl.float64)
    # loads are four elements wide, and several run at once; but the terms are added in the order
    # that `squared_distances` of vqtriton.reference defines, or `dot_products` if IS_DOT. Then the
    # distance is the negative dot product
    CHUNKS: tl.constexpr = MOST_CHUNKS if D % (4 * MOST_CHUNKS) == 0 else 1
    for start_d in range(0, end_d, 4 * CHUNKS):
        for i in tl.static_range(CHUNKS):
            offs_d = (start_d + 4 * i + tl.arange(0, 4)).to(tl.int64)
            codes_ptrs = codes_ptr[:, :, None] + offs_d[None, None, :]
            x_ptrs = x_rows_ptr[:, None, None] + offs_d[None, None, :] * stride_xd
            # each thread loads its own: to pass them on, threads would have to wait
            x_ptrs = tl.broadcast_to(x_ptrs, codes_ptrs.shape)
            if D % (4 * CHUNKS) == 0:
                x = tl.load(x_ptrs)
                c = tl.load(codes_ptrs)
            else:
                # zeros add nothing
                is_dim = tl.broadcast_to((offs_d < D)[None, None, :], codes_ptrs.shape)
                x = tl.load(x_ptrs, mask=is_dim, other=0.0)
                c = tl.load(codes_ptrs, mask=is_dim, other=0.0)
            x = x.to(tl.float64)
            c = c.to(tl.float64)
            if IS_DOT:
                distances = _add_in_order(distances, -(x * c))
            else:
                distances = _add_in_order(distances, (x - c) * (x - c))
    if IS_DOT:
        distances = tl.where(tl.abs(distances) < float("inf"), distances, float("inf"))
    # a NaN is not below inf either
    distances = tl.where((distances < float("inf")) & is_code, distances, float("inf"))
    row_least = tl.min(distances, 1)
    # the lowest index keeps a tie
    is_least = (distances == row_least[:, None]) & is_code
    row_index = tl.min(tl.where(is_least, code, 2147483647), 1)
    is_nearer = (row_least < least) | ((row_least == least) & (row_index < index))
    return tl.where(is_nearer, row_least, least), tl.where(is_nearer, row_index, index)


@triton.jit
def _span_of(doubts_ptr, head, first_tile, num_tiles, tiles, MOST: tl.constexpr):
    """How many rows in doubt each tile of a span has, and where the rows of the next begin."""
    offs = tl.arange(0, MOST)
    is_tile = (offs < num_tiles) & (first_tile + offs < tiles)
    doubts = tl.load(doubts_ptr + (head * tiles + first_tile + offs), mask=is_tile, other=0)
    return doubts, tl.cumsum(doubts, 0)


@triton.jit
def _place_in_tile(place, doubts, ends):
    """Of rows at places of a span's list: the tile, from the first of the span on, and the rank."""
    is_before = ends[None, :] <= place[:, None]
    tile = tl.sum(is_before.to(tl.int32), 1)
    return tile.to(tl.int64), place - tl.sum(tl.where(is_before, doubts[None, :], 0), 1)


@triton.jit
def _write_found(
    index, row, is_row, x_ptr, codebook_ptr, indices_ptr, quantized_ptr, losses_ptr, weight, offs_h,
    end_d, stride_xn, stride_xd, D: tl.constexpr, GATHER: tl.constexpr, GATHER_D: tl.constexpr,
):  # fmt: skip
    """Indices of rows, codes and losses, whose sum is returned, fp64."""
    index = index.to(tl.int64)
    tl.store(indices_ptr + offs_h + row, index, mask=is_row)
    total = tl.full((), 0.0, tl.float64)
    if GATHER:
        _score, sq_error = take_codes(
            x_ptr + row * stride_xn, codebook_ptr + index * D, quantized_ptr + (offs_h + row) * D,
            None, None, None, None, is_row, is_row, end_d, stride_xd,
            D, False, False, True, False, False, GATHER_D,
        )  # fmt: skip
        losses = weight * sq_error
        tl.store(losses_ptr + offs_h + row, losses, mask=is_row)
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


@triton.jit
def _settle_known(
    x_ptr, codebook_ptr, indices_ptr, quantized_ptr, losses_ptr, rows_ptr, rivals_ptr,
    rival_counts_ptr, known_ptr, weight, head, span, span_tiles, tiles, offs_h,
    K, end_d, stride_xn, stride_xd,
    D: tl.constexpr, IS_DOT: tl.constexpr, GROUP: tl.constexpr, CLASSES: tl.constexpr,
    LISTED: tl.constexpr, TILE_N: tl.constexpr, KNOWN_N: tl.constexpr, MOST_TILES: tl.constexpr,
    GATHER: tl.constexpr, GATHER_D: tl.constexpr,
):  # fmt: skip
    """Writes the nearest code of rows whose rivals are listed; returns their loss, fp64."""
    first_tile = span * span_tiles
    doubts, ends = _span_of(known_ptr, head, first_tile, span_tiles, tiles, MOST_TILES)
    num_rows = tl.sum(doubts, 0)
    total = tl.full((), 0.0, tl.float64)
    for start_n in range(0, num_rows, KNOWN_N):
        place = start_n + tl.arange(0, KNOWN_N)
        is_row = place < num_rows
        # rows beyond the last are the last again, so that loads need no mask
        tile, rank = _place_in_tile(tl.minimum(place, num_rows - 1), doubts, ends)
        offs_tile = head * tiles + first_tile + tile
        row = tl.load(rows_ptr + (offs_tile * TILE_N + rank)).to(tl.int64)
        offs_list = offs_tile * LISTED + rank
        count = tl.load(rival_counts_ptr + offs_list)
        x_rows_ptr = x_ptr + row * stride_xn
        least = tl.full((KNOWN_N,), float("inf"), tl.float64)
        # index 0 for a row that has no finite distance
        index = tl.zeros((KNOWN_N,), tl.int32)
        for i in range(0, tl.max(count, 0), _PAIR):
            offs_rival = i + tl.arange(0, _PAIR)[None, :]
            is_listed = offs_rival < count[:, None]
            groups_ptrs = rivals_ptr + (offs_list[:, None] * CLASSES + offs_rival)
            groups = tl.load(groups_ptrs, mask=is_listed, other=0)
            least, index = nearest_of_groups(
                x_rows_ptr, codebook_ptr, groups, is_listed, least, index,
                K, end_d, stride_xd, D, IS_DOT, GROUP, 4,
            )  # fmt: skip
        total += _write_found(
            index, row, is_row, x_ptr, codebook_ptr, indices_ptr, quantized_ptr, losses_ptr,
            weight, offs_h, end_d, stride_xn, stride_xd, D, GATHER, GATHER_D,
        )  # fmt: skip
    return total


# a program must not be compiled for each batch size
@triton.jit(
    do_not_specialize=[
        *("N", "K", "padded_K", "tiles", "known_spans", "known_tiles", "splits"),
        *("codes_per_split", "num_sums"),
    ]
)
def rescue_rows_kernel(
    x_ptr,              # [H, N, D] fp32 / fp16 / bf16
    codebook_ptr,       # [H, K, D] fp32 / fp16 / bf16, contiguous
    codes_ptr,          # [H, padded_K, INNER] fp16, of `vqtriton.planes.CodePlanes`, as the next
    offset_ptr,         # [H, padded_K] fp32
    mean_ptr,           # [H, D] fp32
    scale_ptr,          # [H] fp32
    indices_ptr,        # [H, N] int64, out: of the rows in doubt, as the next two
    quantized_ptr,      # [H, N, D] as x, out if GATHER
    losses_ptr,         # [H, N] fp32, out if GATHER
    rows_ptr,           # [H, N'] int32, of `vqtriton.kernels.finish_rows.Finish`, as the next eight
    thresholds_ptr,     # [H, N'] fp32
    rivals_ptr,         # [H, T, LISTED, CLASSES] int32
    rival_counts_ptr,   # [H, T, LISTED] int32
    known_ptr,          # [H, T] int32
    unknown_ptr,        # [H, T] int32
    arrivals_ptr,       # [H, T + 1] int32, in 0
    valid_ptr,          # [H, T] int32, if REDUCES
    sums_ptr,           # [H, num_sums] fp64, if REDUCES; out: of the losses of the rows in doubt
    counts_ptr,         # [H, programs, BLOCK_N] int32, scratch
    lists_ptr,          # [H, programs, BLOCK_N, LIST] int32, scratch
    least_ptr,          # [splits, H, N'] fp64, scratch: what each part has, as the next
    least_index_ptr,    # [splits, H, N'] int32, scratch
    loss_ptr,           # [H] fp32, out if REDUCES
    share_ptr,          # [H] fp32, out if REDUCES: what the sum of the losses was multiplied by
    weight,
    N, K, padded_K, tiles, known_spans, known_tiles, splits, codes_per_split, num_sums,
    stride_xh, stride_xn, stride_xd,
    D: tl.constexpr, IS_DOT: tl.constexpr, INNER: tl.constexpr, SPLIT: tl.constexpr,
    BIAS_COLUMNS: tl.constexpr, GROUP: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr,
    HOLD_ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    TAIL: tl.constexpr, LOAD_D: tl.constexpr, CHUNK_TILES: tl.constexpr, TILE_N: tl.constexpr,
    SPAN: tl.constexpr, CLASSES: tl.constexpr, LISTED: tl.constexpr, KNOWN_N: tl.constexpr,
    GATHER: tl.constexpr, GATHER_D: tl.constexpr, SEARCH_D: tl.constexpr, TOGETHER: tl.constexpr,
    SEARCH_CHUNKS: tl.constexpr, REDUCES: tl.constexpr, IS_MEAN: tl.constexpr,
    X_UNIT: tl.constexpr,
):  # fmt: skip
    # tells the compiler that strides are multiples of X_UNIT; by itself it finds out only for 16
    stride_xh = stride_xh // X_UNIT * X_UNIT
    stride_xn = stride_xn // X_UNIT * X_UNIT
    # int64 before they multiply a stride
    head = tl.program_id(1).to(tl.int64)
    heads = tl.num_programs(1)
    offs_h = head * N
    x_ptr += head * stride_xh
    codebook_ptr += head * K * D
    # it is D, but the compiler does not know: unrolled, loops need too many registers
    end_d = tl.minimum(K, 1) * D
    # the programs that search come first, since they take longest
    programs = tl.num_programs(0) - known_spans
    program = tl.program_id(0)
    if program >= programs:
        known_span = (program - programs).to(tl.int64)
        total = _settle_known(
            x_ptr, codebook_ptr, indices_ptr, quantized_ptr, losses_ptr, rows_ptr, rivals_ptr,
            rival_counts_ptr, known_ptr, weight, head, known_span, known_tiles, tiles, offs_h,
            K, end_d, stride_xn, stride_xd, D, IS_DOT, GROUP, CLASSES, LISTED, TILE_N, KNOWN_N,
            _MOST_TILES, GATHER, GATHER_D,
        )  # fmt: skip
        if REDUCES:
            tl.store(sums_ptr + (head * num_sums + tiles + known_span), total)
    else:
        spans = programs // splits
        span = (program % spans).to(tl.int64)
        split = (program // spans).to(tl.int64)
        mean_ptr += head * D
        scale = tl.load(scale_ptr + head)
        # what the compiler cannot see: K is padded to whole tiles
        head_k = tl.multiple_of(head * padded_K, BLOCK_K)
        codes_ptr += head_k * INNER
        offset_ptr += head_k

        GROUPS: tl.constexpr = BLOCK_K // GROUP
        LIST: tl.constexpr = 2 * CHUNK_TILES * GROUPS
        offs_tile = tl.arange(0, BLOCK_N)
        offs_program = (head * programs + program) * BLOCK_N + offs_tile
        counts_ptrs = counts_ptr + offs_program
        list_rows_ptr = lists_ptr + offs_program * LIST
        NUM: tl.constexpr = GROUPS // LANES
        # group of each score of a tile, from the first of the tile on
        groups = tl.arange(0, NUM)[:, None] * LANES + tl.arange(0, LANES)[None, :]

        first_tile = span * SPAN
        doubts, ends = _span_of(unknown_ptr, head, first_tile, SPAN, tiles, SPAN)
        num_rows = tl.sum(doubts, 0)
        # where this part of the codes keeps its results for the rows of the span
        offs_found = ((split * heads + head) * tiles + first_tile) * TILE_N
        first = program // spans * codes_per_split
        last = tl.minimum(first + codes_per_split, padded_K)
        total = tl.full((), 0.0, tl.float64)
        for start_n in range(0, num_rows, BLOCK_N):
            place = start_n + offs_tile
            is_row = place < num_rows
            # rows beyond the last are the last again, so that loads need no mask
            tile, rank = _place_in_tile(tl.minimum(place, num_rows - 1), doubts, ends)
            # they are the last of their tile
            slot = (head * tiles + first_tile + tile) * TILE_N + (TILE_N - 1 - rank)
            row = tl.load(rows_ptr + slot).to(tl.int64)
            threshold = tl.load(thresholds_ptr + slot)
            x_rows_ptr = x_ptr + row * stride_xn
            planes, row_scale, ratio, _high, _low, _rest = row_planes(
                x_rows_ptr, mean_ptr, scale, stride_xd,
                D, IS_DOT, INNER, SPLIT, BIAS_COLUMNS, HOLD_ROWS, BLOCK_N, BLOCK_D, TAIL, LOAD_D,
            )  # fmt: skip
            least = tl.full((BLOCK_N,), float("inf"), tl.float64)
            # index 0 for a row that has no finite distance
            index = tl.zeros((BLOCK_N,), tl.int32)
            tl.store(counts_ptrs, tl.zeros((BLOCK_N,), tl.int32))
            tl.debug_barrier()
            for chunk in range(first, last, CHUNK_TILES * BLOCK_K):
                chunk_last = tl.minimum(chunk + CHUNK_TILES * BLOCK_K, last)
                for start in range(chunk, chunk_last, BLOCK_K):
                    start_k = tl.multiple_of(tl.cast(start, tl.int64), BLOCK_K)
                    scores = tile_scores(
                        planes, x_rows_ptr, mean_ptr, row_scale, ratio, codes_ptr, offset_ptr,
                        start_k, stride_xd,
                        D, INNER, BIAS_COLUMNS, HOLD_ROWS, BLOCK_N, BLOCK_K, BLOCK_D, TAIL,
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
                    for i in range(0, tl.max(count, 0), TOGETHER):
                        offs_list = i + tl.arange(0, TOGETHER)[None, :]
                        is_listed = offs_list < count[:, None]
                        list_ptrs = list_rows_ptr[:, None] + offs_list.to(tl.int64)
                        listed = tl.load(list_ptrs, mask=is_listed, other=0)
                        least, index = nearest_of_groups(
                            x_rows_ptr, codebook_ptr, listed, is_listed,
                            least, index, K, end_d, stride_xd, D, IS_DOT, GROUP, SEARCH_CHUNKS,
                        )  # fmt: skip
                    tl.debug_barrier()
                    tl.store(counts_ptrs, tl.zeros((BLOCK_N,), tl.int32))
                    tl.debug_barrier()
            if splits == 1:
                total += _write_found(
                    index, row, is_row, x_ptr, codebook_ptr, indices_ptr, quantized_ptr, losses_ptr,
                    weight, offs_h, end_d, stride_xn, stride_xd, D, GATHER, SEARCH_D,
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
                    for start in range(0, splits, PARTS):
                        other = start + tl.arange(0, PARTS)[None, :]
                        offs = (other.to(tl.int64) * heads + head) * tiles + first_tile
                        offs = offs * TILE_N + place[:, None]
                        is_found = is_row[:, None] & (other < splits)
                        found = tl.load(
                            least_ptr + offs, mask=is_found, other=float("inf"), volatile=True
                        )
                        found_index = tl.load(
                            least_index_ptr + offs, mask=is_found, other=0, volatile=True
                        )
                        parts_least = tl.min(found, 1)
                        # the lowest index keeps a tie; what is not there has no finite distance
                        is_least = (found == parts_least[:, None]) & is_found
                        parts_index = tl.min(tl.where(is_least, found_index, 2147483647), 1)
                        index = tl.where(parts_least < least, parts_index, index)
                        least = tl.minimum(least, parts_least)
                    tile, rank = _place_in_tile(tl.minimum(place, num_rows - 1), doubts, ends)
                    slot = (head * tiles + first_tile + tile) * TILE_N + (TILE_N - 1 - rank)
                    row = tl.load(rows_ptr + slot).to(tl.int64)
                    total += _write_found(
                        index, row, is_row, x_ptr, codebook_ptr, indices_ptr, quantized_ptr,
                        losses_ptr, weight, offs_h, end_d, stride_xn, stride_xd,
                        D, GATHER, SEARCH_D,
                    )  # fmt: skip
        if REDUCES and is_last:
            tl.store(sums_ptr + (head * num_sums + tiles + known_spans + span), total)
    # two nested ifs: Triton cannot `and` a constant with a value of the device
    if REDUCES:  # noqa: SIM102
        if _arrive(arrivals_ptr + (head * (tiles + 1) + tiles)) == tl.num_programs(0) - 1:
            reduce_losses(
                sums_ptr, valid_ptr, loss_ptr, share_ptr, head, tiles, num_sums, D, IS_MEAN
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
