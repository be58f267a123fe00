"""The search of the k nearest codes in plain torch: `vqtriton.torch_backend.nearest_codes`.

Like the search of one code it holds one block of scores and copies of the codebook. The cost of a
code, ‖e_k‖²/2 - y·e_k, is the opposite of its score in `vqtriton.screening`. For "dot", what is
called a distance is the opposite of the dot product. docs/design.md has the reasons.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vqtriton.pairs import (
    BLOCK_PAIRS_ELEMENTS,
    CROWDED,
    distances_of_pairs,
    distances_to_all,
    equals_before,
    sums_in_order,
)
from vqtriton.screening import (
    BLOCK_SCORES,
    GROUP,
    CentredCodebook,
    add_margin,
    centred_codebook,
    error_bound,
    matmul_input_roundoff,
    plain_codebook,
)
from vqtriton.tensors import finite_rows, screen_dtype

# Scores of a search for which it takes longer to look at groups than at all codes.
FEW_SCORES = 1 << 16
# Codes for each wanted one from which on it takes less time to look at groups. At least GROUP.
MANY_CODES = 32
# Bins for each wanted code. More bins bound the costs more tightly, and take longer.
BINS = 4
# Candidates of a block that are listed at most.
BLOCK_CANDIDATES = 1 << 19
# A row may always list twice the wanted codes and this many more.
SPARE = 16


def search(x: Tensor, codebook: Tensor, k: int, metric: str) -> Tensor:
    """x [N, D], codebook [K, D] -> [N, k] int64, in ascending order of distance; k <= K."""
    dtype = screen_dtype(x, codebook)
    plain = plain_codebook(codebook, dtype, metric)
    if plain is not None:
        try:
            return _Search(x, codebook, k, metric, plain).run()
        except _OffCentre:
            pass
    return _Search(x, codebook, k, metric, centred_codebook(codebook, dtype, metric)).run()


class _OffCentre(Exception):
    """Many rows are in doubt, as the codes are far from the origin."""


class _Contested(NamedTuple):
    """Rows whose order the costs leave in doubt."""

    rows: Tensor  # [M], in x
    codes: Tensor  # [M, W], in ascending order of cost
    is_tied: Tensor  # [M, W] bool, whether a code may be nearer than the one before it


class _Search:
    """A search with one form of the codes."""

    def __init__(
        self, x: Tensor, codebook: Tensor, k: int, metric: str, prepared: CentredCodebook
    ) -> None:
        self.x, self.codebook, self.k, self.metric, self.prepared = x, codebook, k, metric, prepared
        dtype = prepared.codes.dtype
        roundoff = matmul_input_roundoff(x.device, dtype)
        self.bound = error_bound(x.shape[1], dtype, roundoff)
        self.indices = torch.empty(len(x), k, dtype=torch.int64, device=x.device)
        # [K], +inf where a code is not finite or was found to be too much
        self.half_sqnorm = prepared.half_sqnorm
        self.is_kept: Tensor | None = None
        self.contested: list[_Contested] = []
        # how many finite distances the rows have that are wanted
        self.wanted = k
        if prepared.mean is not None:
            self.wanted = min(k, int((self.half_sqnorm < torch.inf).sum()))

    def run(self) -> Tensor:
        x, prepared = self.x, self.prepared
        (num_rows, dim), size = x.shape, len(self.codebook)
        if self.wanted < self.k:
            others = (self.half_sqnorm == torch.inf).nonzero()[: self.k - self.wanted, 0]
            self.indices[:, self.wanted :] = others
        if self.wanted == 0:
            # no code is finite, or the squares of none are
            if prepared.max_norm > 0:
                self._look_at_all(torch.arange(num_rows, dtype=torch.int64, device=x.device))
            return self.indices

        codes, padding = prepared.codes.T, 0
        block = BLOCK_SCORES // max(size, 2 * dim)
        is_grouped = size >= MANY_CODES * self.wanted and num_rows * size > FEW_SCORES
        if is_grouped:
            # to whole groups
            padding = -size % GROUP
            codes = torch.nn.functional.pad(codes, (0, padding)) if padding else codes
            block = min(block, BLOCK_CANDIDATES // self._most(size))
        block = min(max(16, block), num_rows)
        # made once: to touch new memory takes longer than to compute what goes there
        dtype = prepared.codes.dtype
        costs = torch.empty(block, size + padding, dtype=dtype, device=x.device)
        is_copied = prepared.mean is not None or x.dtype != dtype
        y = torch.empty(block, dim, dtype=dtype, device=x.device) if is_copied else x
        for start in range(0, num_rows, max(1, block)):
            rows = x[start : start + block]
            block_y, block_costs = y[: len(rows)] if is_copied else rows, costs[: len(rows)]
            if prepared.mean is not None:
                torch.sub(rows, prepared.mean, out=block_y).mul_(prepared.scale)
            elif is_copied:
                block_y.copy_(rows)
            half_sqnorm = self.half_sqnorm
            if padding:
                half_sqnorm = torch.nn.functional.pad(half_sqnorm, (0, padding), value=torch.inf)
            # with `out`, autocast leaves it alone
            torch.addmm(half_sqnorm, block_y, codes, alpha=-prepared.unit, out=block_costs)
            self._rank(start, block_y, block_costs, is_grouped)
        self._settle()
        return self.indices

    def _most(self, size: int) -> int:
        """How many codes of a row are listed; with more in doubt it is compared with all."""
        return max(GROUP * (2 * self.wanted + SPARE), size // CROWDED)

    def _rank(self, start: int, y: Tensor, costs: Tensor, is_grouped: bool) -> None:
        """Writes the indices of some rows, from the costs [n, K] of all codes."""
        margins = torch.zeros_like(costs[:, 0])
        is_sound = add_margin(margins, y, self.prepared, self.bound, self.metric)
        codes = None
        if is_grouped:
            costs, codes, is_crowded = self._candidates(costs, margins)
            if is_crowded is not None:
                is_sound = ~is_crowded if is_sound is None else is_sound & ~is_crowded
        least, order = costs.topk(min(self.wanted + 1, costs.shape[1]), largest=False)
        found = order if codes is None else codes.gather(1, order)
        self.indices[start : start + len(y), : self.wanted] = found[:, : self.wanted]
        # written so that a NaN is in doubt
        is_certain = (least.diff(dim=1) > margins[:, None]).all(1)
        if start == 0 and self._is_off_centre(is_certain):
            raise _OffCentre
        if is_sound is not None:
            (others,) = (~is_sound).nonzero(as_tuple=True)
            self._look_at_all(start + others)
            is_certain |= ~is_sound
        (rows,) = (~is_certain).nonzero(as_tuple=True)
        if len(rows):
            margins = margins[rows]
            limits = least[rows, self.wanted - 1] + margins
            codes = None if codes is None else codes[rows]
            self._contest(start + rows, costs[rows], codes, limits, margins)

    def _is_off_centre(self, is_certain: Tensor) -> bool:
        """Whether centred codes would leave fewer rows in doubt."""
        prepared = self.prepared
        if prepared.mean is not None or self.metric != "l2":
            return False
        if 4 * int(is_certain.sum()) > 3 * len(is_certain):
            return False
        middle = torch.linalg.vector_norm(prepared.codes.mean(0))
        return float(middle) > prepared.max_norm / 2

    def _candidates(self, costs: Tensor, margins: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """The codes of each row that can be among the wanted ones, and few others.

        Returns:
            [n, W] their costs, +inf where a row has fewer; [n, W] the codes; [n] bool, the rows
            that have too many to list, or None if no row has.
        """
        num_rows, size = costs.shape
        by_group = costs.view(num_rows, GROUP, -1)
        least = by_group.amin(1)
        groups = least.shape[1]
        # the least costs of as many bins as codes are wanted: so many codes cost no more
        bins = min(BINS * self.wanted, groups)
        whole = groups // bins * bins
        of_bins = least[:, :whole].unflatten(1, (-1, bins)).amin(1)
        some = of_bins[:, : groups - whole]
        torch.minimum(some, least[:, whole:], out=some)
        limits = of_bins.topk(self.wanted, largest=False, sorted=False).values.amax(1)
        # what costs +inf is no candidate
        limits.add_(margins).clamp_(max=torch.finfo(costs.dtype).max)
        # one number a group, as lists of pairs take longer to read
        (place,) = (least <= limits[:, None]).view(-1).nonzero(as_tuple=True)
        row = place // groups
        is_crowded = torch.bincount(row, minlength=num_rows) > self._most(size) // GROUP
        is_any = bool(is_crowded.any())
        if is_any:
            keep = ~is_crowded[row]
            place, row = place[keep], row[keep]
        column = place - row * groups
        of_members = by_group[row, :, column]
        (place,) = (of_members <= limits[row, None]).view(-1).nonzero(as_tuple=True)
        pair, cost = place // GROUP, of_members.view(-1)[place]
        row, code = row[pair], (place % GROUP).mul_(groups).add_(column[pair])
        number = torch.bincount(row, minlength=num_rows)
        width = max(int(number.amax()), self.wanted)
        # the place of each in a table that has a line for each row
        line = torch.arange(num_rows, dtype=torch.int64, device=row.device).mul_(width)
        place = line.add_(number).sub_(number.cumsum(0))[row]
        place += torch.arange(len(row), dtype=torch.int64, device=row.device)
        table = costs.new_full((num_rows * width,), torch.inf).scatter_(0, place, cost)
        codes = torch.zeros_like(table, dtype=torch.int64).scatter_(0, place, code)
        codes = codes.view(num_rows, width)
        return table.view(num_rows, width), codes, is_crowded if is_any else None

    def _contest(
        self, rows: Tensor, costs: Tensor, codes: Tensor | None, limits: Tensor, margins: Tensor
    ) -> None:
        """Keeps rows in doubt for `_settle`.

        Args:
            rows: [M], in x.
            costs: [M, W], changed.
            codes: [M, W]; None: a code is its column.
            limits: [M], above which no code is among the wanted ones.
            margins: [M], by which costs in the right order differ at least.
        """
        number = (costs <= limits[:, None]).sum(1)
        if int(number.sum()) > 2 * (self.wanted + SPARE) * len(rows):
            is_dropped = ~self._kept()
            costs.masked_fill_(is_dropped if codes is None else is_dropped[codes], torch.inf)
            number = (costs <= limits[:, None]).sum(1)
        is_crowded = number > self._most(len(self.codebook))
        if is_crowded.any():
            self._look_at_all(rows[is_crowded])
            number.masked_fill_(is_crowded, 0)
        width = int(number.amax())
        if width == 0:
            return
        for part in number.nonzero()[:, 0].split(max(1, BLOCK_PAIRS_ELEMENTS // width)):
            least, found = costs[part].topk(width, largest=False)
            if codes is not None:
                found = codes[part].gather(1, found)
            # written so that a NaN is a tie
            is_tied = (least.diff(dim=1) > margins[part, None]).logical_not_()
            is_tied &= least[:, 1:] <= limits[part, None]
            is_tied = torch.nn.functional.pad(is_tied, (1, 0))
            shapes = [found.shape, *(kept.codes.shape for kept in self.contested)]
            height, longest = sum(shape[0] for shape in shapes), max(shape[1] for shape in shapes)
            if height * longest > BLOCK_PAIRS_ELEMENTS:
                self._settle()
            self.contested.append(_Contested(rows[part], found, is_tied))

    def _settle(self) -> None:
        """Writes the indices of the contested rows, by the distances of the codes that are tied."""
        if not self.contested:
            return
        width = max(kept.codes.shape[1] for kept in self.contested)
        rows, found, is_tied = (
            torch.cat([_widened(tensor, width) for tensor in tensors])
            for tensors in zip(*self.contested, strict=True)
        )
        self.contested.clear()
        # codes of a run are put in order by their distances, in the places of the run
        run = (~is_tied).view(-1).cumsum(0)
        is_before = torch.nn.functional.pad(is_tied[:, 1:], (0, 1))
        (place,) = (is_tied | is_before).view(-1).nonzero(as_tuple=True)
        code, run = found.view(-1)[place], run[place]
        distances = distances_of_pairs(
            self.x, self.codebook, rows[place // width], code, self.metric, sums_in_order
        )
        # the lowest index wins a tie
        order = code.argsort(stable=True)
        for key in (distances, run):
            order = order[key[order].argsort(stable=True)]
        found.view(-1)[place] = code[order]
        self.indices[rows, : self.wanted] = found[:, : self.wanted]

    def _kept(self) -> Tensor:
        """[K] bool: the first k of equal codes, as no others can be among the k nearest."""
        if self.is_kept is None:
            self.is_kept = equals_before(self.codebook) < self.k
            # the blocks that follow leave the others out
            self.half_sqnorm = self.half_sqnorm.masked_fill(~self.is_kept, torch.inf)
        return self.is_kept

    def _look_at_all(self, rows: Tensor) -> None:
        """Writes the indices of rows from the distances to all codes, which may overflow."""
        if len(rows) == 0:
            return
        is_finite = finite_rows(self.x[rows])
        first = torch.arange(self.k, dtype=torch.int64, device=rows.device)
        self.indices[rows[~is_finite]] = first
        rows = rows[is_finite]
        if len(rows) == 0:
            return
        (codes,) = self._kept().nonzero(as_tuple=True)
        columns = self.codebook[codes].T.double().contiguous()
        for part in rows.split(max(1, BLOCK_PAIRS_ELEMENTS // len(codes))):
            distances = distances_to_all(self.x[part], columns, self.metric)
            # what is not finite keeps the order of the codes
            self.indices[part] = codes[distances.sort(dim=1, stable=True).indices[:, : self.k]]


def _widened(tensor: Tensor, width: int) -> Tensor:
    """A table with more columns, of zeros; lists stay as they are."""
    if tensor.ndim == 1:
        return tensor
    return torch.nn.functional.pad(tensor, (0, width - tensor.shape[1]))
