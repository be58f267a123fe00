"""k-means on the ops of vector quantization: the nearest codes, and the sums of their rows.

The rows may be more than fit in memory, and be spread over the ranks of a process group: each pass
reads them block by block and ends with one collective.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from vqtriton import distributed, ops
from vqtriton.functional import check_x, vector_quantize
from vqtriton.screening import finite_rows

Batches = Iterable[Tensor] | Callable[[], Iterable[Tensor]]
Callback = Callable[[int, float, int], object]
INITS = ("random", "k-means++")
# elements that are held at a time, beside the rows themselves
BLOCK_ELEMENTS = 1 << 25
# rows for each code among which k-means++ looks for starts
ROWS_PER_CODE = 128


def kmeans(
    x: Tensor | Batches,
    codebook_size: int,
    iters: int = 10,
    generator: torch.Generator | None = None,
    *,
    init: str = "random",
    sync: bool = False,
    callback: Callback | None = None,
    device: torch.device | str | None = None,
    backend: str = "auto",
) -> Tensor:
    """Lloyd's k-means; of a tensor, or of batches that need not fit in memory.

    The same codebook for a seed, bit for bit, however the rows are divided into batches. It ends
    before ``iters`` where an iteration changes nothing. A code that no row chose starts anew from
    a row, drawn with a probability in proportion to its squared distance to its code. Where every
    row is a code already, it stays where it is, and a warning says so at the end.

    Args:
        x: vectors, [..., D]; or batches of them: an iterable that can be read again (a list, a
            ``DataLoader``), or a function that returns an iterator. It is read ``iters + 1`` times
            and must give the same rows each time, in the same order. Rows that are not finite are
            left out. Squared distances are float32: what is less than 1e-19 apart is not, and
            what is more than 1e19 apart is infinitely far.
        codebook_size: K >= 1. With fewer distinct rows than codes, some codes are copies of others
            or are chosen by no row.
        iters: Lloyd iterations, >= 0.
        generator: source of all draws, on the device of the computation; torch's own by default.
            Ranks may have equal seeds: each draws numbers of its own.
        init: "random": start from rows drawn uniformly. "k-means++": from rows that are far from
            each other, each the best of 2 + ln K that are drawn; chosen among 128·K rows drawn
            uniformly, in K steps that take 128·K²·(2 + ln K)·D multiplications in float64.
        sync: over all ranks of `torch.distributed`, each with rows of its own or none (then say
            on which ``device``). Every rank gets the same bits; an error on one is one on all.
        callback: called on every rank after each iteration with its number from 0, the inertia
            (sum of squared distances, of all rows to the codes that the iteration began with),
            and the number of codes that no row chose. What it raises ends k-means.
        device: where to compute; that of the (first) batch by default.
        backend: see `nearest_code`.

    Returns:
        codebook, [K, D] float32.

    Raises:
        ValueError: no finite row, batches that do not fit together, or a number out of range.
        TypeError: a batch is not a float tensor, ``x`` can be read only once, or a number is not
            an int.
        RuntimeError: another rank failed (``sync``).

    Warns:
        UserWarning: x has fewer distinct rows than codes. With ``iters=0`` only if there are so
            few rows that all of them were looked at.

    References: Lloyd 1982; Arthur and Vassilvitskii 2007, "k-means++: The Advantages of Careful
    Seeding"; weighted draws: Efraimidis and Spirakis 2006.
    """
    for name, number, least in (("codebook_size", codebook_size, 1), ("iters", iters, 0)):
        if isinstance(number, bool) or not isinstance(number, int):
            raise TypeError(f"{name} is {number!r:.80}; it must be an int")
        if number < least:
            raise ValueError(f"{name} is {number}; it must be at least {least}")
    if not (generator is None or isinstance(generator, torch.Generator)):
        raise TypeError(f"generator is a {type(generator).__name__}; it must be a torch.Generator")
    if not (callback is None or callable(callback)):
        raise TypeError(f"callback is a {type(callback).__name__}; it must be a function")
    if init not in INITS:
        raise ValueError(f"init is {init!r:.80}; it must be one of {', '.join(INITS)}")
    found = lloyd(
        Rows(x, device),
        codebook_size,
        iters,
        generator,
        init=init,
        sync=sync,
        callback=callback,
        backend=backend,
    )
    if not found.has_rows:
        what = f"has shape {tuple(x.shape)} and" if isinstance(x, Tensor) else "has"
        raise ValueError(f"x {what} no finite row to start from")
    return found.codebook


class Rows:
    """The finite rows of x, pass after pass, in blocks whose size does not depend on its batches.

    Args:
        x: see `kmeans`.
        device: of the blocks; that of the first batch by default.

    Attributes:
        dim: D, once a batch was seen; 0 before.
        device: of the blocks; the CPU before a batch was seen.
    """

    def __init__(self, x: Tensor | Batches, device: torch.device | str | None = None) -> None:
        self._x = x
        self.dim, self._dtype = 0, torch.float32
        self.device, self._wanted = torch.device("cpu"), device
        self._num_rows: int | None = None

    def __iter__(self) -> Iterator[Tensor]:
        """
        Yields:
            [n, D], all of the same n but the last.

        Raises:
            TypeError, ValueError: x or a batch does not fit, or fewer or more rows than before.
        """
        if self._wanted is not None:
            try:
                self.device = torch.device(self._wanted)
            except (RuntimeError, TypeError) as error:
                raise ValueError(f"device is {self._wanted!r:.80}: {error}") from None
        held: list[Tensor] = []
        num_held = num_rows = 0
        for place, batch in enumerate(self._open()):
            rows = self._check(place, batch)
            block = max(1, BLOCK_ELEMENTS // self.dim)
            for piece in rows.split(block):
                # a copy, as a loader may use the memory of a batch for the next
                piece = piece.to(self.device, copy=batch is not self._x)
                # as codes are float32, what is not finite in float32 is not
                keep = finite_rows(piece.float() if piece.dtype == torch.float64 else piece)
                # in one layout: sums over a row may have other last bits in another
                held.append(piece.contiguous() if keep.all() else piece[keep])
                piece = held[-1]
                num_held += piece.shape[0]
                num_rows += piece.shape[0]
                if num_held >= block:
                    joined = torch.cat(held) if len(held) > 1 else piece
                    yield joined[:block]
                    held, num_held = [joined[block:]], num_held - block
        if num_held:
            yield torch.cat(held)
        if self._num_rows not in (None, num_rows):
            raise ValueError(
                f"x gave {self._num_rows} finite rows at first and {num_rows} later; it must give "
                "the same rows each time that it is read"
            )
        self._num_rows = num_rows

    def _open(self) -> Iterable[Tensor]:
        # not before rows are asked for, where the error of one rank is told to the others
        x = self._x
        if isinstance(x, Tensor):
            return (x,)
        if isinstance(x, Iterator):
            raise TypeError(
                f"x is a {type(x).__name__}, which can be read only once; k-means reads it again "
                "and again: give a list, a DataLoader, or a function that returns an iterator"
            )
        batches = x() if callable(x) and not isinstance(x, Iterable) else x
        if not isinstance(batches, Iterable):
            what = f"x is a {type(x).__name__}"
            if batches is not x:
                what = f"x returned a {type(batches).__name__}"
            raise TypeError(
                f"{what}; it must be a tensor, an iterable of tensors, or a function that returns "
                "an iterator of them"
            )
        return batches

    def _check(self, place: int, batch: Tensor) -> Tensor:
        try:
            check_x(batch)
        except (TypeError, ValueError) as error:
            where = "" if batch is self._x else f"batch {place} of x: "
            raise type(error)(f"{where}{error}") from None
        if not self.dim:
            self.dim, self._dtype = batch.shape[-1], batch.dtype
            if self._wanted is None:
                self.device = batch.device
        if batch.shape[-1] != self.dim or batch.dtype != self._dtype:
            raise ValueError(
                f"batch {place} of x has shape {tuple(batch.shape)} and {batch.dtype}; the first "
                f"had D = {self.dim} and {self._dtype}"
            )
        return batch.detach().reshape(-1, self.dim)


class Clusters(NamedTuple):
    """What `lloyd` returns."""

    # [K, D] float32; zeros without rows
    codebook: Tensor
    # [K] float64, rows of each code in the last assignment
    counts: Tensor
    # on any rank
    has_rows: bool


@torch.no_grad()
def lloyd(
    rows: Rows,
    codebook_size: int,
    iters: int,
    generator: torch.Generator | None = None,
    *,
    init: str = "random",
    sync: bool,
    callback: Callback | None = None,
    backend: str = "auto",
) -> Clusters:
    """See `kmeans`; without any row it returns zeros."""
    places = codebook_size * (ROWS_PER_CODE if init == "k-means++" else 1)
    source = distributed.Source(generator, sync)
    drawn = Reservoir(places, source)
    with distributed.together(sync=sync) as agreement:
        for block in rows:
            drawn.add(block, torch.ones(len(block), dtype=torch.float32, device=block.device))
    dim = agreement.settle(rows.dim, rows.device)
    if not dim:
        nothing = torch.zeros(codebook_size, dtype=torch.float64, device=rows.device)
        return Clusters(nothing[:, None].float(), nothing, False)

    samples, is_filled = distributed.draw(*drawn.take(dim, rows.device), places, sync=sync)
    everywhere = torch.ones(codebook_size, dtype=torch.bool, device=rows.device)
    codebook, _ = distributed.take_filled(samples, is_filled, everywhere)
    counts = torch.zeros(codebook_size, dtype=torch.float64, device=rows.device)
    if not is_filled.any():
        return Clusters(codebook, counts, False)
    if init == "k-means++":
        codebook = plus_plus(samples[is_filled], codebook_size, source)
        if sync:
            distributed.broadcast_([codebook])
    # codes without a row of their own, as far as one can tell
    num_spare: Tensor | int = 0
    if iters == 0 and not is_filled.all():
        num_spare = codebook_size - samples[is_filled].unique(dim=0).shape[0]

    called = distributed.Agreement(sync)
    for iteration in range(iters):
        sums = torch.zeros(codebook_size, dim, dtype=torch.float64, device=rows.device)
        counts = torch.zeros(codebook_size, dtype=torch.float64, device=rows.device)
        inertia = counts.new_zeros(())
        far = Reservoir(codebook_size, source)
        with distributed.together(sync=sync) as agreement:
            # the other ranks are told of it where they meet again
            called.raise_own()
            for block in rows:
                sq_error, indices = assign(block, codebook, backend)
                # not rounded before they are divided: the mean of equal rows is that row
                of_block, of_codes = ops.code_sums(
                    block, indices, codebook_size, backend, deterministic=True, double=True
                )
                sums += of_block
                counts += of_codes
                inertia += sq_error.sum()
                if block.dtype == torch.float64:
                    # codes are float32: from a row that is one when rounded, no other can start
                    is_code = (block.float() == codebook[indices]).all(1)
                    sq_error = sq_error.masked_fill(is_code, 0)
                far.add(block, sq_error)
        sums, counts, inertia, failed = distributed.all_reduce(
            (sums, counts, inertia, agreement.failed(rows.device)), sync=sync, dtype=torch.float64
        )
        agreement.raise_if(failed)
        is_empty = counts == 0
        means = (sums / counts.clamp(min=1)[:, None]).float()
        # a sum may overflow where its rows do not
        is_mean = ~is_empty[:, None] & means.isfinite()
        updated = torch.where(is_mean, means, codebook)
        num_empty = int(is_empty.sum())
        num_spare = 0
        if num_empty:
            fresh, is_filled = distributed.draw(
                *far.take(dim, rows.device), codebook_size, sync=sync
            )
            # rows that are no code yet; each code that is not empty has one row at most besides
            num_spare = num_empty - is_filled.sum()
            fresh, is_fresh = distributed.take_filled(fresh, is_filled, is_empty)
            updated = torch.where(is_fresh[:, None], fresh, updated)
        with distributed.together(sync=sync) as called:
            if callback is not None:
                callback(iteration, float(inertia), num_empty)
        is_settled = torch.equal(updated, codebook)
        codebook = updated
        if is_settled:
            break
    (failed,) = distributed.all_reduce([called.failed(rows.device)], sync=sync)
    called.raise_if(failed)
    # on every rank: where warnings are errors, none may go on alone
    if num_spare > 0:
        warnings.warn(
            f"{int(num_spare)} of {codebook_size} codes are copies of others or unused: x has "
            f"fewer distinct rows than codebook_size ({codebook_size})",
            # whoever called `kmeans`
            stacklevel=4,
        )
    return Clusters(codebook, counts, True)


def assign(rows: Tensor, codebook: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """Squared distance of each row to its code, [N] float64, and its index."""
    _, indices, sq_error = vector_quantize(
        rows,
        codebook,
        commitment_weight=1.0,
        codebook_weight=0.0,
        reduction="none",
        backend=backend,
    )
    return sq_error.double(), indices


def weighted_keys(weights: Tensor, source: distributed.Source) -> Tensor:
    """[n] float64; rows with the largest keys are a draw without replacement in proportion to w.

    That of a row whose weight is 0 is -inf.
    """
    generator = source.on(weights.device)
    draws = torch.empty_like(weights, dtype=torch.float64).exponential_(generator=generator)
    return -draws / weights


class Reservoir:
    """Rows drawn from a stream without replacement, in proportion to their weights.

    Args:
        size: how many, at most.
        source: of the draws.
    """

    def __init__(self, size: int, source: distributed.Source) -> None:
        self._size, self._source = size, source
        self._held: tuple[Tensor, Tensor] | None = None

    def add(self, rows: Tensor, weights: Tensor) -> None:
        """
        Args:
            rows: [n, D].
            weights: [n], >= 0.
        """
        keys, places = weighted_keys(weights, self._source).topk(min(self._size, len(rows)))
        drawn = rows[places].float()
        if self._held is not None:
            keys, drawn = torch.cat([self._held[0], keys]), torch.cat([self._held[1], drawn])
            keys, places = keys.topk(min(self._size, len(keys)))
            drawn = drawn[places]
        self._held = keys, drawn

    def take(self, dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """[n] float64 keys, the largest first, and [n, D] float32, their rows."""
        if self._held is None:
            keys = torch.zeros(0, dtype=torch.float64, device=device)
            return keys, torch.zeros(0, dim, dtype=torch.float32, device=device)
        return self._held


def plus_plus(rows: Tensor, codebook_size: int, source: distributed.Source) -> Tensor:
    """Greedy k-means++: [K, D] of the rows [n, D] float32, the first of which is the first code."""
    count = rows.shape[0]
    # far from the origin, squared norms would leave nothing of the distances
    y = rows.double() - rows.double().mean(0)
    sqnorm = y.square().sum(1)
    # what is less than rounding is no distance
    least = 16 * (y.shape[1] + 2) * torch.finfo(torch.float64).eps

    def sq_distances(places: Tensor) -> Tensor:
        scale = sqnorm[places, None] + sqnorm
        distances = scale - 2 * (y[places] @ y.T)
        return distances.where(distances > least * scale, 0)

    trials = min(count, 2 + int(math.log(codebook_size)))
    chosen = torch.arange(codebook_size, dtype=torch.int64, device=rows.device) % count
    closest = sq_distances(chosen[:1])[0]
    for place in range(1, codebook_size):
        keys, drawn = weighted_keys(closest, source).topk(trials)
        candidates = torch.minimum(closest, sq_distances(drawn))
        best = candidates.sum(1).argmin()
        # where every row is a code already, those that were drawn first are taken again
        is_new = keys[0] > -math.inf
        chosen[place] = torch.where(is_new, drawn[best], chosen[place])
        closest = torch.where(is_new, candidates[best], closest)
    return rows[chosen]
