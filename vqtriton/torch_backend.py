"""The ops in plain torch, block by block: ``backend="torch"``, for CPU and whatever has no kernels.

Beyond inputs and outputs they hold one block of scores and copies of the codebook, so the extra
memory is O(N + K·D), never O(N·K), whatever the data.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import inf, isfinite

import torch
from torch import Tensor

from vqtriton import several_codes
from vqtriton.distributed import sample_rows, take_filled
from vqtriton.kernels.code_planes import OwnBound
from vqtriton.kernels.constants import LEAST_LENGTH, LEAST_NORM, SLACK
from vqtriton.pairs import (
    BLOCK_GROUPS,
    BLOCK_PAIRS_ELEMENTS,
    CROWDED,
    distances_of_pairs,
    distances_to_all,
    equals_before,
    parts,
    sums_in_any_order,
    sums_in_order,
)
from vqtriton.screening import (
    BLOCK_SCORES,
    GROUP,
    LARGEST_NORM,
    U64,
    CentredCodebook,
    add_margin,
    centred_codebook,
    centred_codebook_of,
    error_bound,
    margin_terms,
    matmul_input_roundoff,
    plain_codebook,
)
from vqtriton.tensors import finite_rows, screen_dtype

# Elements that a pass holds at a time, so that they stay in a cache until the next pass.
BLOCK_ELEMENTS = 1 << 20
# Scores of a search that is done all at once.
FEW_SCORES = 1 << 18
# Elements of x up to which differences take less time than products.
FEWEST_ELEMENTS = 1 << 7
# Elements of codes in doubt up to which lists take less time than tensors.
FEW_ELEMENTS = 1 << 10


def nearest_code(
    x: Tensor,
    codebook: Tensor,
    precision: str,
    metric: str = "l2",
    prepared: Sequence[Tensor] = (),
) -> Tensor:
    """x [N, D], codebook [K, D], perhaps what `prepare_codebook` made of it -> [N] int64.

    ``metric`` is "l2" or "dot": for cosines, vectors and codes are normalized before.
    """
    return search(x, codebook, precision, metric, prepared)[0]


def nearest_codes(
    x: Tensor, codebook: Tensor, k: int, metric: str, return_distances: bool
) -> tuple[Tensor, Tensor]:
    """x [N, D], codebook [K, D] -> [N, k] int64, [N, k] distances; k <= K.

    Without ``return_distances`` the latter are [0, k].
    """
    if k == 1:
        indices = nearest_code(x, codebook, "exact", metric)[:, None]
    else:
        indices = several_codes.search(x, codebook, k, metric)
    return indices, distances_of(x, codebook, indices if return_distances else indices[:0], metric)


def distances_of(x: Tensor, codebook: Tensor, indices: Tensor, metric: str) -> Tensor:
    """The distances of codes ``indices`` [N, k], rounded once; +inf if not finite."""
    row = torch.arange(len(indices), dtype=torch.int64, device=x.device)
    pairs = row.repeat_interleave(indices.shape[1]), indices.reshape(-1)
    distances = distances_of_pairs(x, codebook, *pairs, metric, sums_in_order)
    distances.nan_to_num_(torch.inf, posinf=torch.inf, neginf=torch.inf)
    return distances.to(screen_dtype(x, codebook)).view(indices.shape)


def search(
    x: Tensor,
    codebook: Tensor,
    precision: str,
    metric: str = "l2",
    tensors: Sequence[Tensor] = (),
) -> tuple[Tensor, int]:
    """The indices, and how many rows were in doubt: those with more than one candidate.

    The cost of a code, ‖e_k‖²/2 - y·e_k, is the opposite of its score in `vqtriton.screening`. What
    is called a distance is, for "dot", the opposite of the dot product.
    """
    dtype = screen_dtype(x, codebook)
    if 0 < x.numel() <= FEWEST_ELEMENTS and dtype == torch.float32 and metric == "l2":
        found = _search_by_differences(x, codebook)
        if found is not None:
            return found, 0
    if tensors and tensors[0].dtype == dtype:
        return _search(x, codebook, precision, metric, centred_codebook_of(tensors))
    plain = plain_codebook(codebook, dtype, metric)
    if plain is not None:
        try:
            return _search(x, codebook, precision, metric, plain)
        except _OffCentre:
            pass
    return _search(x, codebook, precision, metric, centred_codebook(codebook, dtype, metric))


class _OffCentre(Exception):
    """Many rows are in doubt, as the codes are far from the origin."""


def _search(
    x: Tensor, codebook: Tensor, precision: str, metric: str, prepared: CentredCodebook
) -> tuple[Tensor, int]:
    """`search` with one form of the codes.

    Raises:
        _OffCentre: many of the first rows are in doubt, and fewer would be with centred codes.
    """
    num_rows, dim = x.shape
    size, dtype = codebook.shape[0], prepared.codes.dtype
    max_norm, bound = prepared.max_norm, None
    is_plain = prepared.mean is None
    if precision == "exact":
        bound = error_bound(dim, dtype, matmul_input_roundoff(x.device, dtype))
    if 0 < num_rows * size <= FEW_SCORES and size > 1:
        few = _search_few(x, codebook, prepared, bound, metric)
        if few is not None:
            return few
    if max_norm == 0 and not (prepared.half_sqnorm < torch.inf).any():
        # no code is finite
        return torch.zeros(num_rows, dtype=torch.int64, device=x.device), 0

    codes, half_sqnorm = prepared.codes.T, prepared.half_sqnorm
    group = GROUP if num_rows * size > FEW_SCORES else 1
    padding = -size % group
    if padding:
        # to whole groups
        codes = torch.nn.functional.pad(codes, (0, padding))
        half_sqnorm = torch.nn.functional.pad(half_sqnorm, (0, padding), value=torch.inf)

    indices = torch.empty(num_rows, dtype=torch.int64, device=x.device)
    block = max(16, min(BLOCK_SCORES // (size + padding), BLOCK_ELEMENTS // dim))
    # made once: to touch new memory takes longer than to compute what goes there
    costs = torch.empty(min(block, num_rows), size + padding, dtype=dtype, device=x.device)
    is_copied = not is_plain or x.dtype != dtype
    y = torch.empty(len(costs), dim, dtype=dtype, device=x.device) if is_copied else x
    is_first: Tensor | None = None
    in_doubt = 0
    for start in range(0, num_rows, block):
        rows, found, block_y, block_costs = x, indices, y, costs
        if num_rows > block:
            rows, found = x[start : start + block], indices[start : start + block]
            block_y, block_costs = y[: len(rows)] if is_copied else rows, costs[: len(rows)]
        if prepared.mean is not None:
            torch.sub(rows, prepared.mean, out=block_y).mul_(prepared.scale)
        elif is_copied:
            block_y.copy_(rows)
        # with `out`, autocast leaves it alone
        torch.addmm(half_sqnorm, block_y, codes, alpha=-prepared.unit, out=block_costs)
        least_of_groups = block_costs
        if group > 1:
            by_group = block_costs.view(len(rows), group, -1)
            least_of_groups = by_group.amin(1)
        limits = least_of_groups.amin(1)
        is_sound = add_margin(limits, block_y, prepared, bound, metric)
        row, column = (least_of_groups <= limits[:, None]).nonzero().unbind(1)
        if group == 1 and is_sound is None and len(row) == len(rows):
            # one candidate each
            found.copy_(column)
            continue
        is_doubtful = is_plain and start == 0 and 8 * (len(row) - len(rows)) > len(rows)
        if is_doubtful and metric == "l2" and float(prepared.codes.mean(0).norm()) > max_norm / 2:
            raise _OffCentre
        if bound is not None and len(row) > 2 * len(rows):
            if is_first is None:
                # among equal codes only the first can win, so the others are left out from now on
                is_first = equals_before(codebook) == 0
                half_sqnorm = half_sqnorm.clone()
                half_sqnorm[:size].masked_fill_(~is_first, torch.inf)
            # where a row has very many candidates, it is faster to look at all codes
            many = torch.bincount(row, minlength=len(rows)) > least_of_groups.shape[1] // CROWDED
            in_doubt += int(many.sum())
            is_sound = ~many if is_sound is None else is_sound & ~many
            row, column = row[~many[row]], column[~many[row]]
        for part_row, part_column in parts(row, column, len(rows), BLOCK_GROUPS):
            pair_row, code = part_row, part_column
            if group > 1:
                of_members = by_group[part_row, :, part_column]
                pair, member = (of_members <= limits[part_row, None]).nonzero().unbind(1)
                pair_row, code = part_row[pair], member * by_group.shape[2] + part_column[pair]
            if is_first is not None:
                keep = is_first[code]
                pair_row, code = pair_row[keep], code[keep]
            in_doubt += _choose(rows, codebook, pair_row, code, found, precision, metric)
        if is_sound is not None:
            (others,) = (~is_sound).nonzero(as_tuple=True)
            if is_first is None and finite_rows(rows[others]).any():
                is_first = equals_before(codebook) == 0
            found[others] = _nearest_of_all(rows[others], codebook, is_first, metric)
    return indices, in_doubt


def _search_by_differences(x: Tensor, codebook: Tensor) -> Tensor | None:
    """[N], from float32 distances that need no norms; None if a row is in doubt.

    A sum of squared differences errs relative to itself, by less than (D + 3)·2⁻²⁴, and its root by
    half of that and a rounding. docs/design.md has the rest.
    """
    if codebook.shape[0] == 1:
        return None
    rows, codes = x.to(torch.float32), codebook.to(torch.float32)
    distances = torch.cdist(rows, codes, compute_mode="donot_use_mm_for_euclid_dist")
    two, columns = distances.topk(2, dim=1, largest=False)
    ratio = 1 + SLACK * (x.shape[1] + 12) * 2.0**-24
    for first, second in two.tolist():
        # written so that a NaN is in doubt, and squares that under- or overflow as well
        if not (max(first * ratio, 2.0**-30) < second and first < 2.0**60):
            return None
    return columns[:, 0].contiguous()


def _search_few(
    x: Tensor, codebook: Tensor, prepared: CentredCodebook, bound: OwnBound | None, metric: str
) -> tuple[Tensor, int] | None:
    """`_search` in few operations; None if too many codes are in doubt, or numbers may overflow."""
    dtype = prepared.codes.dtype
    y = x if x.dtype == dtype else x.to(dtype)
    if prepared.mean is not None:
        y = torch.sub(y, prepared.mean).mul_(prepared.scale)
    norm = float(torch.linalg.vector_norm(y, dim=1).amax())
    if not norm < LARGEST_NORM[dtype] - prepared.max_norm:
        return None
    # the margin of the longest row for all
    slope, constant = margin_terms(prepared, bound, norm, metric)
    margin = slope * norm + constant
    costs = torch.empty(x.shape[0], prepared.codes.shape[0], dtype=dtype, device=x.device)
    # with `out`, autocast leaves it alone
    torch.addmm(prepared.half_sqnorm, y, prepared.codes.T, alpha=-prepared.unit, out=costs)
    least, indices = costs.min(1)
    chosen = indices[:, None]
    ahead = costs.scatter_(1, chosen, torch.inf).amin(1).sub_(least)
    # written so that a NaN is in doubt
    if float(ahead.amin()) > margin:
        return indices, 0
    (rows,) = (ahead > margin).logical_not_().nonzero(as_tuple=True)
    if bound is None:
        return None
    costs.scatter_(1, chosen, least[:, None])
    place, code = (costs[rows] <= (least[rows] + margin)[:, None]).nonzero().unbind(1)
    if code.shape[0] > GROUP * rows.shape[0]:
        return None
    return indices, _choose(x, codebook, rows[place], code, indices, "exact", metric)


def _choose(
    x: Tensor,
    codebook: Tensor,
    row: Tensor,
    code: Tensor,
    indices: Tensor,
    precision: str,
    metric: str,
) -> int:
    """Writes the nearest of its candidates into the index [N] of each row of x that has any.

    Candidates are pairs (row, code), [P] each. Returns how many rows have several.
    """
    if precision == "exact" and code.shape[0] * x.shape[1] <= FEW_ELEMENTS:
        return _choose_of_few(x, codebook, row, code, indices, metric)
    is_contested = torch.bincount(row, minlength=len(x)) > 1
    contested = int(is_contested.sum())
    if contested and precision == "exact":
        in_doubt = is_contested[row]
        is_nearest = torch.ones_like(in_doubt)
        pairs = row[in_doubt], code[in_doubt]
        is_nearest[in_doubt] = _are_nearest(x, codebook, *pairs, contested, metric)
        row, code = row[is_nearest], code[is_nearest]
    # the lowest index wins a tie
    none = torch.iinfo(indices.dtype).max
    chosen = torch.full_like(indices, none).scatter_reduce_(0, row, code, "amin")
    torch.where(chosen < none, chosen, indices, out=indices)
    return contested


def _choose_of_few(
    x: Tensor, codebook: Tensor, row: Tensor, code: Tensor, indices: Tensor, metric: str
) -> int:
    """`_choose` in Python's floats, which are float64 without fused operations.

    For few numbers this takes less time than tensors of them.
    """
    best: dict[int, tuple[float, int]] = {}
    several = set()
    vectors, codes = x[row].tolist(), codebook[code].tolist()
    for i, k, vector, values in zip(row.tolist(), code.tolist(), vectors, codes, strict=True):
        distance = 0.0
        # in the order of operations that `vqtriton.reference` lays down
        if metric == "dot":
            for a, b in zip(vector, values, strict=True):
                distance -= a * b
        else:
            for a, b in zip(vector, values, strict=True):
                distance += (a - b) * (a - b)
        if i in best:
            several.add(i)
        # the lowest index wins a tie
        best[i] = min(best.get(i, (inf, k)), (distance, k))
    if best:
        indices[list(best)] = indices.new_tensor([k for _, k in best.values()])
    return len(several)


def _are_nearest(
    x: Tensor, codebook: Tensor, row: Tensor, code: Tensor, num_rows: int, metric: str
) -> Tensor:
    """[P] bool: whether no other candidate of the row is nearer. All distances are finite."""
    # the rounding of a dot product may be large beside it: no relative slack covers it
    if metric == "dot" or torch.float64 in (x.dtype, codebook.dtype):
        is_near = torch.ones_like(row, dtype=torch.bool)
    else:
        # summed in any order; what is beyond the rounding of both sums needs no exact one
        distances = distances_of_pairs(x, codebook, row, code, metric, sums_in_any_order)
        slack = 1 + 8 * (x.shape[1] + 2) * U64
        is_near = distances <= slack * _least(distances, row, len(x))[row]
    if int(is_near.sum()) == num_rows:
        return is_near
    row, code = row[is_near], code[is_near]
    distances = distances_of_pairs(x, codebook, row, code, metric, sums_in_order)
    return is_near.masked_scatter(is_near, distances == _least(distances, row, len(x))[row])


def _least(distances: Tensor, row: Tensor, num_rows: int) -> Tensor:
    least = torch.full((num_rows,), torch.inf, dtype=distances.dtype, device=distances.device)
    return least.scatter_reduce_(0, row, distances, "amin")


def _nearest_of_all(x: Tensor, codebook: Tensor, is_first: Tensor | None, metric: str) -> Tensor:
    """[N]: the nearest codes, from the distances to all codes. Some may overflow; 0 if all do.

    ``is_first`` [K] says which codes have no equal before them. Where no row is finite it is not
    needed.
    """
    indices = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    (rows,) = finite_rows(x).nonzero(as_tuple=True)
    if len(rows) == 0 or is_first is None:
        return indices
    (codes,) = (finite_rows(codebook) & is_first).nonzero(as_tuple=True)
    if len(codes) == 0:
        return indices
    columns = codebook[codes].T.double().contiguous()
    for part in rows.split(max(1, BLOCK_PAIRS_ELEMENTS // len(codes))):
        distances = distances_to_all(x[part], columns, metric)
        least, place = distances.min(1)
        indices[part] = codes[place].masked_fill_(least == torch.inf, 0)
    return indices


def prepare_codebook(codebook: Tensor, metric: str = "l2") -> list[Tensor]:
    """The tensors of its `CentredCodebook`."""
    return centred_codebook(codebook, screen_dtype(codebook, codebook), metric).tensors


def normalize_rows(x: Tensor) -> Tensor:
    """x [N, D] -> `vqtriton.reference.normalized`, some rows at a time."""
    out = torch.empty(x.shape, dtype=screen_dtype(x, x), device=x.device)
    for block in _blocks(x):
        wide = x[block].double()
        norms = sums_in_order(wide.square()).sqrt_().clamp_(min=LEAST_NORM)
        out[block] = wide / norms[:, None]
    return out


def vector_quantize(
    x: Tensor,
    codebook: Tensor,
    mask: Tensor | None,
    commitment_weight: float,
    codebook_weight: float,
    reduction: str,
    precision: str,
    prepared: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes; the loss; indices, -1 where ``mask`` [N] is false; what the loss was multiplied by.

    The loss is of each row with "none", when the last is empty; else [], as the last. The two terms
    have one value, the squared distance; the weights part where it is differentiated.
    """
    quantized, errors, total, indices = _quantize(x, codebook, mask, precision, prepared)
    weight = commitment_weight + codebook_weight
    loss, share = _reduced(errors, total, mask, weight, reduction, x.shape[1])
    return quantized, loss, indices, share


def _reduced(
    errors: Tensor, total: float, mask: Tensor | None, weight: float, reduction: str, dim: int
) -> tuple[Tensor, Tensor]:
    """The loss of all rows, and what their sum was multiplied by."""
    if reduction == "none":
        return errors.mul_(weight), errors.new_empty(0)
    share = 1.0
    if reduction == "mean":
        # 1 if no row counts, so that the mean is 0
        share /= max(dim * (len(errors) if mask is None else int(mask.sum())), 1)
    # by way of float64, as what overflows is infinite
    loss = errors.new_full((), total * weight * share, dtype=torch.float64)
    return loss.to(errors.dtype), errors.new_full((), share)


def _quantize(
    x: Tensor,
    codebook: Tensor,
    mask: Tensor | None,
    precision: str,
    prepared: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor, float, Tensor]:
    """Codes in x's dtype, [N] sums of squared differences, their sum, indices."""
    indices = nearest_code(x, codebook, precision, "l2", prepared)
    if mask is not None:
        indices.masked_fill_(~mask, -1)
    dtype = screen_dtype(x, codebook)
    quantized = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    errors = torch.empty(len(x), dtype=dtype, device=x.device)
    chosen = indices if mask is None else indices.clamp(min=0)
    for block in _blocks(x):
        codes = codebook.index_select(0, chosen[block]).to(dtype)
        if mask is not None:
            codes.masked_fill_(~mask[block, None], 0)
        quantized[block] = codes
        # in one layout, as the order in which a row is summed follows it
        torch.sum(codes.sub_(x[block]).square_(), 1, out=errors[block])
    if mask is not None:
        errors.masked_fill_(~mask, 0)
    # float64, so that a sum over millions of rows keeps the digits of float32
    total = float(errors.sum(dtype=torch.float64))
    if not isfinite(total):
        # an infinite x gives NaN, as a NaN does
        is_wrong = ~finite_rows(x)
        errors.masked_fill_(is_wrong if mask is None else is_wrong & mask, torch.nan)
        total = float(errors.sum(dtype=torch.float64))
    return quantized, errors, total, indices


def vector_quantize_update_(
    x: Tensor,
    codebook: Tensor,
    mask: Tensor | None,
    cluster_size: Tensor,
    rates: Tensor,
    commitment_weight: float,
    codebook_weight: float,
    reduction: str,
    averages: bool,
    revives: bool,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`vector_quantize`, and then `ema_update_`; also the codes as they were.

    With ``averages`` the codes follow moving averages; with ``revives`` dead ones become rows of x.
    """
    before = codebook.clone(memory_format=torch.contiguous_format)
    quantized, errors, total, indices = _quantize(x, before, mask, precision)
    weight = commitment_weight + codebook_weight
    loss, share = _reduced(errors, total, mask, weight, reduction, x.shape[1])
    if mask is None and isfinite(total):
        # all rows count
        sums, counts = _sums(x, indices, len(codebook))
    else:
        sums, counts = code_sums(x, indices, len(codebook))
    samples, is_filled = None, None
    if revives:
        keep = (indices >= 0) & finite_rows(x)
        samples, is_filled = sample_rows(x, len(codebook), keep=keep, sync=False)
    statistics = counts.float(), sums.float() if averages else None, samples, is_filled
    ema_update_(cluster_size, codebook, *statistics, rates)
    return quantized, loss, indices, share, before


def grad_x(
    grad_quantized: Tensor,
    grad_loss: Tensor,
    x: Tensor,
    codebook: Tensor,
    indices: Tensor,
    weight: float,
) -> Tensor:
    """grad_quantized + weight·grad_loss·(x - codebook[indices]), zero where the index is -1."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    is_masked = None
    if len(x) and int(indices.amin()) < 0:
        is_masked, indices = indices < 0, indices.clamp(min=0)
    for block in _blocks(x):
        pull = _differences(x[block], codebook, indices[block], grad_loss[block], -weight)
        out[block] = pull.add_(grad_quantized[block])
    return out if is_masked is None else out.masked_fill_(is_masked[:, None], 0)


def rotate_grad(grad: Tensor, x: Tensor, quantized: Tensor, is_forward: bool) -> Tensor:
    """λRᵀ·grad for each row, or λR·grad with ``is_forward``; all are [N, D].

    R rotates x to the direction of ``quantized``, and λ is the ratio of their lengths.
    """
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dtype = screen_dtype(x, quantized)
    for block in _blocks(x):
        of, to, turned = (t[block].to(dtype) for t in (x, quantized, grad))
        length, target = (torch.linalg.vector_norm(t, dim=1, keepdim=True) for t in (of, to))
        of = of / length.clamp(min=LEAST_LENGTH)
        scaled = to / target.clamp(min=LEAST_LENGTH)
        middle = of + scaled
        norm = torch.linalg.vector_norm(middle, dim=1, keepdim=True)
        middle = middle / norm.clamp(min=LEAST_LENGTH)
        ends = (of, scaled) if is_forward else (scaled, of)
        across = (turned * ends[0]).sum(1, keepdim=True)
        turned = turned - 2 * middle * (turned * middle).sum(1, keepdim=True)
        out[block] = (turned + 2 * ends[1] * across) * (target / length.clamp(min=LEAST_LENGTH))
    return out


def grad_codebook(
    grad_loss: Tensor, x: Tensor, codebook: Tensor, indices: Tensor, weight: float
) -> Tensor:
    """Σ weight·grad_loss·(codebook[k] - x) over the finite rows of each code."""
    sums = torch.zeros(len(codebook) + 1, x.shape[1], dtype=torch.float64, device=x.device)
    index = _counted(x, indices, len(codebook))
    chosen = indices.clamp(min=0)
    for block in _blocks(x):
        pull = _differences(x[block], codebook, chosen[block], grad_loss[block], weight)
        _add_rows(sums, index[block], pull)
    return sums[:-1].to(grad_loss.dtype)


def code_sums(
    x: Tensor,
    indices: Tensor,
    codebook_size: int,
    deterministic: bool = True,
    double: bool = False,
) -> tuple[Tensor, Tensor]:
    """x [N, D], indices [N] -> sums [K, D], counts [K], summed in float64.

    Always deterministic. The sums are rounded to float32 unless x is float64, or ``double`` asks
    for them as they are, for who divides them before they are rounded.
    """
    # rows that are left out go to an extra code, so that no shape depends on the data
    sums, counts = _sums(x, _counted(x, indices, codebook_size), codebook_size + 1)
    dtype = torch.float64 if double or x.dtype == torch.float64 else torch.float32
    return sums[:-1].to(dtype), counts[:-1]


def _sums(x: Tensor, indices: Tensor, codebook_size: int) -> tuple[Tensor, Tensor]:
    """`code_sums` in float64, where all rows count."""
    sums = torch.zeros(codebook_size, x.shape[1], dtype=torch.float64, device=x.device)
    for block in _blocks(x):
        _add_rows(sums, indices[block], x[block])
    return sums, torch.bincount(indices, minlength=codebook_size)


def _add_rows(sums: Tensor, index: Tensor, rows: Tensor) -> None:
    """sums[index[n]] += rows[n], the same whenever it is done again."""
    rows = rows.to(sums.dtype)
    if sums.device.type == "cpu":
        sums.index_add_(0, index, rows)
    else:
        # where index_add_ is not deterministic
        sums.index_put_((index,), rows, accumulate=True)


def ema_update_(
    cluster_size: Tensor,
    codebook: Tensor,
    counts: Tensor,
    sums: Tensor | None,
    samples: Tensor | None,
    is_filled: Tensor | None,
    rates: Tensor,
) -> None:
    """One step of the moving averages of the codes, and of dead codes.

    Changes cluster_size [K] and codebook [K, D]; counts [K] and sums [K, D] are those of the batch,
    and without sums the codes follow no moving average. With d = 1 - rates[0]::

        size' = d·size + (1 - d)·counts
        code' = (d·size·code + (1 - d)·sums) / size'

    A code that no row chose stays where it is, bit for bit. A code whose cluster size is below
    rates[1] gets one of the samples [K, D], those with is_filled [K] in turn, and the mean cluster
    size. What overflows is the largest float32, and is forgotten like all else.

    Or of several codebooks, [H, K, D], and so all but the rates.
    """
    if codebook.ndim == 3:
        update = cluster_size, codebook, counts, sums, samples, is_filled
        for head in range(len(codebook)):
            ema_update_(*(None if t is None else t[head] for t in update), rates)  # type: ignore
        return
    counts = counts.to(cluster_size.dtype)
    # a batch in which no row counts is no step
    rate, threshold = rates.tolist()
    weight = rate if counts.any() else 0.0
    cluster_size.lerp_(counts, weight)
    if sums is not None:
        share = (counts * weight).div_(cluster_size).nan_to_num_(0).clamp_(max=1)[:, None]
        rows = counts.clamp(min=1)[:, None]
        # some codes at a time, so that what is held beside them is small
        for part in _blocks(codebook):
            _average_(codebook[part], sums[part], rows[part], share[part])
    if samples is not None and is_filled is not None:
        is_dead = cluster_size < threshold
        samples, is_dead = take_filled(samples, is_filled, is_dead)
        size = cluster_size.sum(dtype=torch.float64).div_(len(cluster_size)).float()
        torch.where(is_dead[:, None], samples, codebook, out=samples)
        codebook.copy_(samples)
        cluster_size.copy_(size.clamp(min=threshold).where(is_dead, cluster_size))


def _average_(codes: Tensor, sums: Tensor, rows: Tensor, share: Tensor) -> None:
    """Moves codes [K, D] to the means of their new rows, by the share [K, 1] that these have."""
    moved = _averaged(codes, sums, rows, share, lambda tensor: tensor)
    # one number says that nothing overflows
    if not isfinite(float(moved.sum())):
        largest = torch.finfo(sums.dtype).max
        moved = _averaged(codes, sums, rows, share, lambda t: t.clamp(-largest, largest))
        # a sum of several ranks may be inf - inf: it moves nothing
        moved = moved.where(~sums.isnan(), codes)
    codes.copy_(moved)


def _averaged(
    codes: Tensor, sums: Tensor, rows: Tensor, share: Tensor, limited: Callable[[Tensor], Tensor]
) -> Tensor:
    means = limited(sums) / rows
    # as lerp, but for what overflows: exact at both ends, and where they are equal
    step = limited(means - codes)
    is_near = share < 0.5
    start = codes.where(is_near, means)
    moved = limited(step.mul_(share.where(is_near, share - 1)).add_(start))
    # a code without rows stays, bit for bit
    return moved.where(share > 0, codes)


def _blocks(x: Tensor) -> list[slice]:
    rows = max(16, BLOCK_ELEMENTS // x.shape[1])
    return [slice(start, start + rows) for start in range(0, len(x), rows)]


def _counted(x: Tensor, indices: Tensor, codebook_size: int) -> Tensor:
    """The indices of rows that count, codebook_size for the others."""
    keep = (indices >= 0) & (indices < codebook_size)
    # one number says that all rows are finite
    if not isfinite(float(x.sum(dtype=torch.float32))):
        keep &= finite_rows(x)
    return indices.where(keep, codebook_size)


def _differences(
    x: Tensor, codebook: Tensor, indices: Tensor, grad_loss: Tensor, weight: float
) -> Tensor:
    """weight·grad_loss·(codebook[indices] - x) in the dtype of the loss.

    In that of halves a difference may overflow.
    """
    codes = codebook.index_select(0, indices).to(grad_loss.dtype)
    return codes.sub_(x).mul_((weight * grad_loss)[:, None])
