"""k-means on the ops of vector quantization: the nearest codes, and the sums of their rows.

The rows may be more than fit in memory, and be spread over the ranks of a process group: each pass
reads them block by block and ends with one collective.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vqtriton import distributed, ops
from vqtriton.checks import check_x
from vqtriton.functional import vector_quantize
from vqtriton.tensors import finite_rows, has_float64

Vectors = Tensor | np.ndarray
# a batch may be a tuple or a list of one
Batches = Iterable[Any] | Callable[[], Iterable[Any]]
Callback = Callable[[int, float, int], object]
NUMPY_DTYPES = {
    np.dtype(np.float16): torch.float16,
    np.dtype(np.float32): torch.float32,
    np.dtype(np.float64): torch.float64,
}
WANTED = (
    "it must be a floating-point tensor or numpy array, an iterable of them that can be read "
    "again, such as a list or a DataLoader, or a function that returns an iterator of them"
)
INITS = ("random", "k-means++")
# elements that are held at a time, beside the rows themselves
BLOCK_ELEMENTS = 1 << 25
# rows for each code among which k-means++ looks for starts
ROWS_PER_CODE = 128


def kmeans(
    x: Vectors | Batches,
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
    """Lloyd's k-means, of a tensor or of batches that need not fit in memory together.

    It returns the codebook alone; `nearest_code` then gives the indices. The same seed gives the
    same codebook, bit for bit, however the rows are divided into batches. It ends before ``iters``
    if an iteration changes nothing. A code that no row chose moves to a row, drawn with a
    probability in proportion to its squared distance to its code. If every row already is a code,
    the code stays where it is, and a warning at the end says so.

    Args:
        x: vectors, [..., D], a tensor or a numpy array of floats; a ``numpy.memmap`` is read block
            by block. Or batches of them: an iterable that can be read again (a list, a
            ``DataLoader``), or a function that returns an iterator. A batch may be a tuple or list
            of one tensor, as those of a ``TensorDataset`` are. Batches are read ``iters + 1`` times
            and must give the same rows each time, in the same order. Rows that are not finite are
            left out. Squared distances are float32: rows less than 1e-19 apart count as equal, and
            rows more than 1e19 apart as infinitely far.
        codebook_size: K >= 1. With fewer distinct rows than codes, some codes are copies of others
            or are chosen by no row.
        iters: Lloyd iterations, >= 0.
        generator: source of all draws, on the device of the computation; torch's own by default.
            For ``x`` on MPS, which has no float64, it must be a generator of the CPU. Ranks may
            have equal seeds: each draws numbers of its own.
        init: "random" starts from rows drawn uniformly. "k-means++" starts from rows that are far
            from each other, each the best of 2 + ln K draws. It looks for them among 128·K rows
            drawn uniformly, in K steps that take 128·K²·(2 + ln K)·D multiplications in float64.
        sync: use the rows of all ranks of `torch.distributed`. A rank may have no rows, but must
            then say on which ``device`` to compute. Every rank gets the same bits, and an error on
            one rank raises on all.
        callback: called on every rank after each iteration with its number from 0, the inertia
            (sum of squared distances of all rows to the codes that the iteration began with), and
            the number of codes that no row chose. An exception from it ends k-means.
        device: where to compute; that of the (first) batch by default. For a device without
            float64 (MPS) the CPU computes, and the codebook is moved to the device at the end.
        backend: see `nearest_code`.

    Returns:
        codebook, [K, D] float32, on ``device``.

    Raises:
        ValueError: no finite row, batches that do not fit together, or a number out of range.
        TypeError: a batch holds no float vectors, ``x`` can be read only once, or a number is not
            an int.
        RuntimeError: another rank failed (``sync``).

    Warns:
        UserWarning: ``x`` has fewer distinct rows than codes. With ``iters=0``, only if there are
            so few rows that all of them were looked at.

    Example:
        >>> x = torch.randn(10000, 16)
        >>> codebook = vqtriton.kmeans(x, 64, 20, init="k-means++")  # [64, 16]
        >>> indices = vqtriton.nearest_code(x, codebook)  # [10000]

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
        what = f"has shape {tuple(x.shape)} and" if isinstance(x, Vectors) else "has"
        raise ValueError(f"x {what} no finite row to start from")
    return found.codebook


class Rows:
    """The finite rows of x, pass after pass, in blocks whose size does not depend on its batches.

    Args:
        x: see `kmeans`.
        device: of the blocks; that of the first batch by default.

    Attributes:
        dim: D, once a batch was seen; 0 before.
        device: of the blocks; the CPU before a batch was seen, or where the wanted device has no
            float64.
        home: the wanted device, where the codebook goes.
    """

    def __init__(self, x: Vectors | Batches, device: torch.device | str | None = None) -> None:
        self._x = x
        self.dim, self._dtype = 0, torch.float32
        self.device = self.home = torch.device("cpu")
        self._wanted = device
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
                self._settle(torch.device(self._wanted))
            except (RuntimeError, TypeError) as error:
                raise ValueError(f"device is {self._wanted!r:.80}: {error}") from None
        held: list[Tensor] = []
        num_held = num_rows = 0
        for place, batch in enumerate(self._open()):
            vectors = self._check(place, batch)
            block = max(1, BLOCK_ELEMENTS // self.dim)
            for piece in self._pieces(vectors, block):
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

    def _settle(self, device: torch.device) -> None:
        self.home = device
        self.device = device if has_float64(device) else torch.device("cpu")

    def _pieces(self, vectors: Vectors, block: int) -> Iterator[Tensor]:
        """[n, D], n at most ``block``, on the device; in memory that nobody uses again."""
        if isinstance(vectors, Tensor):
            for piece in vectors.detach().reshape(-1, self.dim).split(block):
                # a copy, as a loader may use the memory of a batch for the next
                yield piece.to(self.device, copy=vectors is not self._x)
        elif vectors.ndim > 2 and not vectors.flags.c_contiguous:
            # to reshape all of it would be to read all of it into memory
            for part in vectors:
                yield from self._pieces(part, block)
        else:
            rows = vectors.reshape(-1, self.dim)
            native = rows.dtype.newbyteorder("=")
            for start in range(0, len(rows), block):
                # a copy: of memory that may not be written, torch warns
                copied = np.array(rows[start : start + block], dtype=native, order="C")
                yield torch.from_numpy(copied).to(self.device)

    def _open(self) -> Iterable[Any]:
        # not before rows are asked for, where the error of one rank is told to the others
        x = self._x
        if isinstance(x, Vectors):
            return (x,)
        if isinstance(x, Mapping | str | bytes):
            raise TypeError(f"x is a {type(x).__name__}; {WANTED}")
        if isinstance(x, Iterator):
            raise TypeError(
                f"x is a {type(x).__name__}, which can be read only once; k-means reads it again "
                "and again: give a list, a DataLoader, or a function that returns an iterator"
            )
        batches = x() if callable(x) and not isinstance(x, Iterable) else x
        if isinstance(batches, Vectors):
            return (batches,)
        if not isinstance(batches, Iterable):
            what = f"x is a {type(x).__name__}"
            if batches is not x:
                what = f"x returned a {type(batches).__name__}"
            raise TypeError(f"{what}; {WANTED}")
        return batches

    def _check(self, place: int, batch: Any) -> Vectors:
        """The vectors of a batch: itself, or the one thing in it."""
        try:
            vectors = unwrapped(batch)
            dtype = checked_dtype(vectors)
        except (TypeError, ValueError) as error:
            where = "" if batch is self._x else f"batch {place} of x: "
            raise type(error)(f"{where}{error}") from None
        if not self.dim:
            self.dim, self._dtype = vectors.shape[-1], dtype
            if self._wanted is None:
                is_tensor = isinstance(vectors, Tensor)
                self._settle(vectors.device if is_tensor else torch.device("cpu"))
        if vectors.shape[-1] != self.dim or dtype != self._dtype:
            raise ValueError(
                f"batch {place} of x has shape {tuple(vectors.shape)} and {dtype}; the first "
                f"had D = {self.dim} and {self._dtype}"
            )
        return vectors


def unwrapped(batch: Any) -> Any:
    """The tensor or array that a batch is, or that is alone in it.

    Raises:
        TypeError: there are several, or it is a batch of another kind.
    """
    what = f"x is a {type(batch).__name__}"
    remedy = "give a function that yields the vectors alone, for example lambda: "
    if isinstance(batch, Mapping):
        raise TypeError(f'{what}; {remedy}(batch["x"] for batch in loader)')
    if isinstance(batch, tuple | list) and any(isinstance(item, Vectors) for item in batch):
        if len(batch) > 1:
            raise TypeError(f"{what} of {len(batch)}; {remedy}(x for x, *_ in loader)")
        return batch[0]
    if not isinstance(batch, Vectors):
        raise TypeError(f"{what}; it must be a floating-point tensor or numpy array")
    return batch


def checked_dtype(vectors: Vectors) -> torch.dtype:
    """As what torch takes the vectors.

    Raises:
        TypeError: they are no floats of a kind that torch and numpy share, or a masked array.
        ValueError: they are not [..., D] with D >= 1.
    """
    if isinstance(vectors, Tensor):
        check_x(vectors)
        return vectors.dtype
    if isinstance(vectors, np.ma.MaskedArray):
        raise TypeError(
            "x is a masked array; give x.filled(numpy.nan): rows with a NaN are left out"
        )
    dtype = NUMPY_DTYPES.get(vectors.dtype.newbyteorder("="))
    if dtype is None:
        raise TypeError(
            f"x is a numpy array of {vectors.dtype}; it must be of float16, float32 or float64"
        )
    if vectors.ndim == 0 or vectors.shape[-1] == 0:
        raise ValueError(f"x has shape {vectors.shape}; it must be [..., D] with D >= 1")
    return dtype


class Clusters(NamedTuple):
    """What `lloyd` returns."""

    # [K, D] float32, at the home of the rows; zeros without rows
    codebook: Tensor
    # [K] float64, rows of each code in the last assignment; where they were counted
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
        return Clusters(nothing[:, None].float().to(rows.home), nothing, False)

    samples, is_filled = distributed.draw(*drawn.take(dim, rows.device), places, sync=sync)
    everywhere = torch.ones(codebook_size, dtype=torch.bool, device=rows.device)
    codebook, _ = distributed.take_filled(samples, is_filled, everywhere)
    counts = torch.zeros(codebook_size, dtype=torch.float64, device=rows.device)
    if not is_filled.any():
        return Clusters(codebook.to(rows.home), counts, False)
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
    return Clusters(codebook.to(rows.home), counts, True)


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
