"""The ops in plain torch, block by block: ``backend="torch"``, for CPU and whatever has no kernels.

Beyond inputs and outputs they hold one block of scores and copies of the codebook, so the extra
memory is O(N + K·D), never O(N·K), whatever the data.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vqtriton.distributed import sample_rows, take_filled
from vqtriton.kernels.code_planes import OwnBound
from vqtriton.screening import CentredCodebook, centred_codebook, error_bound
from vqtriton.tensors import finite_rows, screen_dtype

# Scores held at a time: 8 MiB in float32, about what stays in a cache between two passes.
BLOCK_SCORES = 1 << 21
# Codes whose scores are reduced together: strided `amax` is vectorised, `argmax` is not.
GROUP = 8
# Scores up to which all of a search is done at once.
FEW_SCORES = 1 << 18
# Groups whose codes in doubt are listed at a time: hard data can have all of them in doubt.
BLOCK_GROUPS = 1 << 14
# Elements of the vectors whose float64 distances are evaluated at a time: more leave the cache.
BLOCK_PAIRS_ELEMENTS = 1 << 17
# Elements of the codes that are averaged at a time.
BLOCK_CODES_ELEMENTS = 1 << 18
# Rows that are converted to another dtype at a time.
BLOCK_ROWS = 1 << 14


def nearest_code(
    x: Tensor, codebook: Tensor, precision: str, prepared: Sequence[Tensor] = ()
) -> Tensor:
    """x [N, D], codebook [K, D], perhaps what `prepare_codebook` made of it -> [N] int64."""
    return search(x, codebook, precision, prepared)[0]


def search(
    x: Tensor, codebook: Tensor, precision: str, tensors: Sequence[Tensor] = ()
) -> tuple[Tensor, int]:
    """The indices, and how many rows were in doubt: those with more than one candidate."""
    num_rows, dim = x.shape
    size = codebook.shape[0]
    dtype = screen_dtype(x, codebook)
    if tensors and tensors[0].dtype == dtype:
        prepared = CentredCodebook(*tensors)
    else:
        prepared = centred_codebook(codebook, dtype)
    bound = error_bound(dim, dtype, matmul_input_roundoff(x.device, dtype))

    if num_rows * size <= FEW_SCORES and dtype == torch.float32:
        return _search_few(x, codebook, precision, prepared, bound)

    # padding to whole groups: a code with an infinite norm has the score -inf
    num_groups = -(-size // GROUP)
    padding = num_groups * GROUP - size
    codes, bias = prepared.codes.T, -prepared.half_sqnorm
    if padding:
        codes = torch.nn.functional.pad(codes, (0, padding))
        bias = torch.nn.functional.pad(bias, (0, padding), value=-torch.inf)
    is_candidate = bias > -torch.inf
    if dtype == torch.float64:
        # there, norms of finite codes may be infinite
        is_candidate[:size] = finite_rows(codebook)

    # rows without a finite distance keep index 0
    indices = torch.zeros(num_rows, dtype=torch.int64, device=x.device)
    block = max(16, min(BLOCK_SCORES // bias.numel(), BLOCK_ROWS))
    scores = torch.empty(min(block, num_rows), bias.numel(), dtype=dtype, device=x.device)
    has_repeats = precision == "exact"
    in_doubt = 0
    for start in range(0, num_rows, block):
        rows = x[start : start + block]
        y, is_finite = _centred(rows, prepared)
        # with `out`, autocast leaves it alone
        block_scores = torch.addmm(bias, y, codes, out=scores[: rows.shape[0]])

        by_group = block_scores.view(-1, GROUP, num_groups)
        group_best = by_group.amax(1)
        best = group_best.amax(1)
        threshold = best
        if precision == "exact":
            threshold = best - 2 * _score_error(y, prepared, bound)
        # `not below`, so that a NaN from overflow leaves the code in the race
        row, group = (~(group_best < threshold[:, None]) & is_finite[:, None]).nonzero().unbind(1)
        if has_repeats and row.numel() > 2 * rows.shape[0]:
            # of equal codes the first will do; the others are out from now on
            is_candidate[:size] &= _is_first(codebook)
            bias = bias.where(is_candidate, -torch.inf)
            has_repeats = False

        groups_per_row = torch.bincount(row, minlength=rows.shape[0])
        least = torch.full_like(groups_per_row, torch.inf, dtype=torch.float64)
        is_contested = groups_per_row > 1
        for part in range(0, row.numel(), BLOCK_GROUPS):
            part_row, part_group = (t[part : part + BLOCK_GROUPS] for t in (row, group))
            member_scores = by_group[part_row, :, part_group]
            pair, member = (~(member_scores < threshold[part_row, None])).nonzero().unbind(1)
            pair_row, code = part_row[pair], member * num_groups + part_group[pair]
            # padding and codes that are not finite are no candidates
            keep = is_candidate[code]
            pair_row, code = pair_row[keep], code[keep]
            is_contested |= torch.bincount(pair_row, minlength=rows.shape[0]) > 1
            # a row's only candidate is taken unseen, unless its distance may overflow
            evaluated = is_contested[pair_row] | (dtype == torch.float64)
            distances = torch.zeros_like(code, dtype=torch.float64)
            if precision == "exact":
                distances[evaluated] = _distances_of_pairs(
                    rows, codebook, pair_row[evaluated], code[evaluated]
                )
            _keep_nearest(least, indices[start : start + block], pair_row, code, distances)
        in_doubt += int(is_contested.sum())
    return indices, in_doubt


def _centred(rows: Tensor, prepared: CentredCodebook) -> tuple[Tensor, Tensor]:
    """y [N, D], zeros for rows that are not finite; [N] bool, which are finite."""
    y = (rows.to(prepared.codes.dtype) - prepared.mean) * prepared.scale
    is_finite = finite_rows(rows)
    return y.where(is_finite[:, None], 0), is_finite


def _score_error(y: Tensor, prepared: CentredCodebook, bound: OwnBound) -> Tensor:
    """[N], of `vqtriton.screening.error_bound`."""
    norm = torch.linalg.vector_norm(y, dim=1)
    products = bound.products * prepared.max_norm
    error = norm.square().mul_(bound.distances).add_(bound.tiny)
    return error.addcmul_(norm + prepared.max_norm / 2, products)


def _search_few(
    x: Tensor, codebook: Tensor, precision: str, prepared: CentredCodebook, bound: OwnBound
) -> tuple[Tensor, int]:
    """`search` where the scores are few, and what is done for all codes would take longest."""
    y, is_finite = _centred(x, prepared)
    # with `out`, autocast leaves it alone
    scores = torch.empty(len(x), len(codebook), dtype=y.dtype, device=x.device)
    torch.addmm(-prepared.half_sqnorm, y, prepared.codes.T, out=scores)
    best, indices = scores.max(1)
    indices *= is_finite
    if precision != "exact":
        return indices, 0
    threshold = best - 2 * _score_error(y, prepared, bound)
    # `not below`, so that a NaN from overflow leaves the code in the race
    in_race = (scores < threshold[:, None]).logical_not_()
    (contested,) = ((in_race.sum(1) > 1) & is_finite).nonzero(as_tuple=True)
    if len(contested):
        pair, code = in_race[contested].nonzero(as_tuple=True)
        # codes that are not finite are no candidates
        keep = prepared.half_sqnorm[code] < torch.inf
        pair, code = pair[keep], code[keep]
        distances = _distances_of_pairs(x, codebook, contested[pair], code)
        found = torch.zeros_like(contested)
        least = torch.full_like(found, torch.inf, dtype=torch.float64)
        _keep_nearest(least, found, pair, code, distances)
        indices[contested] = found
    return indices, len(contested)


def _keep_nearest(
    least: Tensor, indices: Tensor, row: Tensor, code: Tensor, distances: Tensor
) -> None:
    """Update what is the nearest so far in each row; of equal distances, the lowest index."""
    before = least.clone()
    least.scatter_reduce_(0, row, distances, "amin")
    indices[least < before] = torch.iinfo(indices.dtype).max
    is_least = (distances == least[row]) & (distances < torch.inf)
    indices.scatter_reduce_(0, row[is_least], code[is_least], "amin")


def _distances_of_pairs(x: Tensor, codebook: Tensor, row: Tensor, code: Tensor) -> Tensor:
    """[P] float64 distances between x[row] and codebook[code]; a NaN ranks as +inf."""
    distances = torch.empty(row.shape, dtype=torch.float64, device=x.device)
    block = max(256, BLOCK_PAIRS_ELEMENTS // x.shape[1])
    for start in range(0, distances.numel(), block):
        pairs = slice(start, start + block)
        distances[pairs] = _squared_distances(x[row[pairs]], codebook[code[pairs]])
    return distances.where(distances < torch.inf, torch.inf)


def _squared_distances(x: Tensor, codes: Tensor) -> Tensor:
    """Row by row, in the order of operations that `vqtriton.reference` lays down."""
    # a copy with the dimensions first, so that each step reads contiguous memory
    x, codes = x.T.double().contiguous(), codes.T.double().contiguous()
    distances = x.new_zeros(x.shape[1])
    for x_column, code_column in zip(x, codes, strict=True):
        difference = x_column.sub_(code_column)
        distances += difference.mul_(difference)
    return distances


def _is_first(codebook: Tensor) -> Tensor:
    """[K] whether no code with the same values has a lower index."""
    # of halves it fails under autocast to the other half (torch 2.13); widening changes no equality
    codebook = codebook.to(torch.promote_types(codebook.dtype, torch.float32))
    _, group = torch.unique(codebook, dim=0, return_inverse=True)
    index = torch.arange(codebook.shape[0], dtype=torch.int64, device=codebook.device)
    first = torch.full_like(index, codebook.shape[0]).scatter_reduce_(0, group, index, "amin")
    return first[group] == index


def matmul_input_roundoff(device: torch.device, dtype: torch.dtype) -> float:
    """What the process-wide settings allow a float32 matmul to do to its inputs."""
    if dtype != torch.float32:
        return 0.0
    backend = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
    # torch refuses the older question once this newer setting has been used
    setting = getattr(getattr(backend, "matmul", None), "fp32_precision", None)
    if setting is None:
        setting = torch.get_float32_matmul_precision()
    return 0.0 if setting in ("ieee", "none", "highest") else 2.0**-9


def prepare_codebook(codebook: Tensor) -> list[Tensor]:
    """The tensors of its `CentredCodebook`."""
    return list(centred_codebook(codebook, screen_dtype(codebook, codebook)))


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
    indices = nearest_code(x, codebook, precision, prepared)
    if mask is not None:
        indices = indices.where(mask, -1)
    quantized, losses = gather_codes(x, codebook, indices)
    losses *= commitment_weight + codebook_weight
    if reduction == "none":
        return quantized, losses, indices, losses.new_empty(0)
    share = torch.ones((), dtype=torch.float64, device=x.device)
    if reduction == "mean" and mask is None:
        share /= max(x.numel(), 1)
    elif reduction == "mean":
        # 1 if no row counts, so that the mean is 0
        share /= ((indices >= 0).sum() * x.shape[1]).clamp(min=1)
    # float64, so that a sum over millions of rows keeps the digits of float32
    loss = (losses.sum(dtype=torch.float64) * share).to(losses.dtype)
    return quantized, loss, indices, share.to(losses.dtype)


def vector_quantize_ema_(
    x: Tensor,
    codebook: Tensor,
    mask: Tensor | None,
    cluster_size: Tensor,
    rates: Tensor,
    commitment_weight: float,
    reduction: str,
    revives: bool,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`vector_quantize`, and then a step of the codes; also the codes as they were."""
    before = codebook.clone(memory_format=torch.contiguous_format)
    found = vector_quantize(x, before, mask, commitment_weight, 0.0, reduction, precision)
    indices = found[2]
    sums, counts = code_sums(x, indices, len(codebook))
    samples, is_filled = None, None
    if revives:
        keep = (indices >= 0) & finite_rows(x)
        samples, is_filled = sample_rows(x, len(codebook), keep=keep, sync=False)
    statistics = counts.float(), sums.float(), samples, is_filled, rates
    ema_update_(cluster_size, codebook, *statistics)
    return *found, before


def gather_codes(x: Tensor, codebook: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """x [N, D], indices [N] -> codebook[indices] in x's dtype, row sums of squared differences."""
    dtype = screen_dtype(x, codebook)
    quantized = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    sq_error = torch.empty(x.shape[0], dtype=dtype, device=x.device)
    for block in _blocks(x):
        is_masked = indices[block] < 0
        # in one layout, as the order in which a row is summed follows it
        rows = x[block].to(dtype).contiguous()
        codes = codebook[indices[block].clamp(min=0)].to(dtype)
        quantized[block] = codes.masked_fill(is_masked[:, None], 0)
        # inf - inf: an infinite x gives NaN, as a NaN does
        error = (rows - codes).square().sum(1) + (rows - rows).sum(1)
        sq_error[block] = error.masked_fill_(is_masked, 0)
    return quantized, sq_error


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
    for block in _blocks(x):
        pull = _differences(x[block], codebook, indices[block], grad_loss[block], -weight)
        out[block] = pull.add_(grad_quantized[block]).masked_fill_(indices[block, None] < 0, 0)
    return out


def grad_codebook(
    grad_loss: Tensor, x: Tensor, codebook: Tensor, indices: Tensor, weight: float
) -> Tensor:
    """Σ weight·grad_loss·(codebook[k] - x) over the finite rows of each code."""
    sums = torch.zeros(codebook.shape[0] + 1, x.shape[1], dtype=torch.float64, device=x.device)
    for block in _blocks(x):
        index = _counted(x[block], indices[block], codebook.shape[0])
        pull = _differences(x[block], codebook, indices[block], grad_loss[block], weight)
        sums.index_put_((index,), pull.double(), accumulate=True)
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
    sums = torch.zeros(codebook_size + 1, x.shape[1], dtype=torch.float64, device=x.device)
    counts = torch.zeros(codebook_size + 1, dtype=torch.int64, device=x.device)
    for block in _blocks(x):
        index = _counted(x[block], indices[block], codebook_size)
        # index_put_ with accumulate is deterministic on every device, index_add_ is not
        sums.index_put_((index,), x[block].double(), accumulate=True)
        counts.index_put_((index,), torch.ones_like(index), accumulate=True)
    dtype = torch.float64 if double or x.dtype == torch.float64 else torch.float32
    return sums[:-1].to(dtype), counts[:-1]


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
    """
    # a batch in which no row counts is no step
    weight = rates[0] * (counts.sum() > 0)
    cluster_size.lerp_(counts, weight)
    if sums is not None:
        share = (weight * counts / cluster_size).nan_to_num_(0).clamp_(max=1)[:, None]
        rows = counts.clamp(min=1)[:, None]
        # some codes at a time, so that what is held beside them is small
        block = max(1, BLOCK_CODES_ELEMENTS // codebook.shape[1])
        for part in (slice(start, start + block) for start in range(0, len(codebook), block)):
            _average_(codebook[part], sums[part], rows[part], share[part])
    if samples is not None and is_filled is not None:
        is_dead = cluster_size < rates[1]
        samples, is_dead = take_filled(samples, is_filled, is_dead)
        size = cluster_size.sum(dtype=torch.float64).div_(len(cluster_size)).float()
        torch.where(is_dead[:, None], samples, codebook, out=samples)
        codebook.copy_(samples)
        cluster_size.copy_(size.maximum(rates[1]).where(is_dead, cluster_size))


def _average_(codes: Tensor, sums: Tensor, rows: Tensor, share: Tensor) -> None:
    """Moves codes [K, D] to the means of their new rows, by the share [K, 1] that these have."""
    largest = torch.finfo(sums.dtype).max
    means = sums.clamp(-largest, largest).div_(rows)
    # as lerp, but for what overflows: exact at both ends, and where they are equal
    step = (means - codes).clamp_(-largest, largest)
    is_near = share < 0.5
    start = codes.where(is_near, means)
    step.mul_(share.where(is_near, share - 1)).add_(start).clamp_(-largest, largest)
    # a sum of several ranks may be inf - inf: it moves nothing
    codes.copy_(step.where((share > 0) & ~sums.isnan(), codes))


def _blocks(x: Tensor) -> list[slice]:
    return [slice(start, start + BLOCK_ROWS) for start in range(0, x.shape[0], BLOCK_ROWS)]


def _counted(x: Tensor, indices: Tensor, codebook_size: int) -> Tensor:
    """The indices of rows that count, codebook_size for the others."""
    keep = (indices >= 0) & (indices < codebook_size) & finite_rows(x)
    return indices.where(keep, codebook_size)


def _differences(
    x: Tensor, codebook: Tensor, indices: Tensor, grad_loss: Tensor, weight: float
) -> Tensor:
    """weight·grad_loss·(codebook[indices] - x) in the dtype of the loss.

    In that of halves a difference may overflow.
    """
    codes = codebook[indices.clamp(min=0)].to(grad_loss.dtype)
    return codes.sub_(x).mul_((weight * grad_loss)[:, None])
