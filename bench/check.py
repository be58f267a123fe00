"""What a subject has to get right before it is timed: a wrong answer has no time.

Indices are held to the argmin of the float64 distances, ties to the lowest index. Every row is
looked at, unless the case has more products than fit in `Device.check_products`; then rows drawn
evenly from all of it are, and how many is part of the result. The other outputs are held to
float64, given the indices, all of them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bench.cases import Case
from bench.subjects import COMMITMENT_WEIGHT, DECAY, EPS, STATE, Inputs, Outputs, Run, Subject
from vqtriton import reference

# distances that are held at a time
BLOCK = 1 << 22
MIB = 1 << 20


class Refused(ValueError):
    """A subject that breaks a promise, and how."""


class Truth(NamedTuple):
    """The nearest codes of some rows."""

    rows: Tensor  # [R] int64
    nearest: Tensor  # [R] int64


class Checked(NamedTuple):
    mismatches: int
    rows_checked: int
    is_repeatable: bool


def find_truth(inputs: Inputs, most_products: float) -> Truth:
    """Of as many rows as the products allow, drawn evenly."""
    num_rows, dim = inputs.x.shape
    count = max(1, int(min(num_rows, most_products / (len(inputs.codebook) * dim))))
    rows = torch.arange(count, device=inputs.x.device) * num_rows // count
    return Truth(rows, nearest_codes(inputs.x.detach(), inputs.codebook, rows))


def nearest_codes(x: Tensor, codebook: Tensor, rows: Tensor | None = None) -> Tensor:
    """By float64 scores; where those are too close to tell, by `vqtriton.reference`.

    Runs on the device of ``x``, block by block, for all rows or for some. What is not finite is
    ranked as `vqtriton.nearest_code` says.
    """
    dim, size = x.shape[1], codebook.shape[0]
    codes = codebook.double()
    # no distance to a code that is not finite is finite: it is never the least
    is_finite = codes.isfinite().all(1)
    codes = codes.where(is_finite[:, None], 0)
    half_sqnorm = (codes.square().sum(1) / 2).where(is_finite, torch.inf)
    longest = codes.norm(dim=1).max()
    if rows is None:
        rows = torch.arange(x.shape[0], device=x.device)
    parts = []
    for block in rows.split(max(1, BLOCK // size)):
        y = x[block].double()
        scores = torch.addmm(half_sqnorm, y, codes.T, alpha=-1)
        least, nearest = scores.min(1)
        # twice what D products, the half norm and the canonical distance can be wrong by, halved
        error = (dim + 8) * 2.0**-52 * (y.norm(dim=1) + longest).square()
        # a row that is not finite has NaNs, which are below nothing: it is no clear case
        is_clear = (scores <= (least + error)[:, None]).sum(1) == 1
        for few in (~is_clear).nonzero()[:, 0].split(max(1, BLOCK // size)):
            nearest[few] = reference.nearest_code(x[block[few]], codebook)
        parts.append(nearest)
    return torch.cat(parts)


def count_mismatches(subject: Subject, inputs: Inputs, truth: Truth, indices: Tensor) -> int:
    """Rows whose index is not the nearest code's.

    Raises:
        Refused: more of them, or worse ones, than the subject may have.
    """
    (num_rows, dim), size = inputs.x.shape, inputs.codebook.shape[0]
    if indices.shape != (num_rows,) or indices.min() < 0 or indices.max() >= size:
        raise Refused(f"{subject.name}: indices are not one of {size} codes for each row")
    chosen = indices[truth.rows].long()
    wrong = (chosen != truth.nearest).nonzero()[:, 0]
    x = inputs.x.detach()[truth.rows[wrong]].double()
    codes = inputs.codebook[chosen[wrong]].double()
    nearest = inputs.codebook[truth.nearest[wrong]].double()
    gap = (x - codes).square().sum(1) - (x - nearest).square().sum(1)
    # ‖x‖² - 2x·c + ‖c‖² of either code, summed in float32, factors and result in its own precision
    longest = inputs.codebook.double().norm(dim=1).max()
    scale = (x.norm(dim=1) + longest).square()
    roundoff = max(subject.roundoff, torch.finfo(inputs.x.dtype).eps / 2)
    bound = 2 * (dim * 2.0**-24 + 6 * roundoff) * scale
    inexcusable = len(wrong) if subject.is_exact else int((gap >= bound).sum())
    if inexcusable:
        raise Refused(
            f"{subject.name}: {len(wrong)} of {len(truth.rows)} indices are not the nearest code, "
            f"{inexcusable} of them beyond what its precision excuses; it is not timed"
        )
    return len(wrong)


def expected_outputs(inputs: Inputs, indices: Tensor, has_sums: bool = False) -> Outputs:
    """What a training step gives if these are the indices, in float64.

    ``has_sums``: of a peer whose codes are averaged sums over smoothed cluster sizes.
    """
    x, codebook = inputs.x.detach().double(), inputs.codebook.double()
    size, codes = codebook.shape[0], codebook[indices]
    counts = torch.bincount(indices, minlength=size).double()
    sums = torch.zeros_like(codebook).index_put_((indices,), x, accumulate=True)
    state = {
        "codebook": (sums / counts[:, None]).where(counts[:, None] > 0, codebook),
        "cluster_size": (1 - DECAY) * counts,
    }
    if has_sums:
        cluster_size = torch.ones_like(counts).lerp_(counts, 1 - DECAY)
        total = cluster_size.sum()
        smoothed = (cluster_size + EPS) / (total + size * EPS) * total
        embed_sum = sums * (1 - DECAY)
        state = {
            "codebook": embed_sum / smoothed[:, None],
            "cluster_size": cluster_size,
            "embed_sum": embed_sum,
        }
    pull = 2 * COMMITMENT_WEIGHT * (x - codes) / x.numel()
    return {
        "quantized": codes,
        "loss": COMMITMENT_WEIGHT * (x - codes).square().mean(),
        "grad_x": inputs.grad_quantized.double() + pull,
        **state,
    }


def check_outputs(run: Run, outputs: Outputs) -> None:
    """All but the indices.

    Raises:
        Refused: one of them is beyond rounding.
    """
    if run.scope == "assign":
        return
    expected = expected_outputs(run.inputs, outputs["indices"], "embed_sum" in outputs)
    for name in outputs.keys() - {"indices"}:
        # codebook and statistics are float32 whatever x is
        dtype = torch.float32 if name in STATE else run.inputs.x.dtype
        tolerance = 16 * torch.finfo(dtype).eps
        value, right = outputs[name].double().reshape(expected[name].shape), expected[name]
        error = (value - right).abs().max() / right.abs().max()
        if not error <= tolerance:
            raise Refused(
                f"{run.subject.name}: {name} is {float(error):.1e} of its largest value "
                f"beside float64, more than {tolerance:.1e}; it is not timed"
            )


def check(run: Run, truth: Truth) -> Checked:
    """Takes two steps from the same start.

    Raises:
        Refused: indices or outputs are wrong, or differ although they are promised not to.
    """
    first, second = run.from_start(), run.from_start()
    mismatches = count_mismatches(run.subject, run.inputs, truth, first["indices"])
    check_outputs(run, first)
    differing = [name for name in first if not torch.equal(first[name], second[name])]
    if differing and run.subject.is_repeatable:
        raise Refused(
            f"{run.subject.name}: {', '.join(sorted(differing))} of a step that is repeated differ "
            f"in their bits; it is not timed"
        )
    return Checked(mismatches, len(truth.rows), not differing)


def memory_limit(case: Case) -> int:
    """Bytes that O(N + K·D) may be: eight copies of x and codebook in float32, and 32 MiB."""
    return 8 * 4 * case.dim * (case.num_rows + case.codebook_size) + 32 * MIB


def check_memory(subject: Subject, case: Case, peak: int) -> None:
    """
    Raises:
        Refused: it is more than is promised.
    """
    if subject.holds_no_matrix and peak > memory_limit(case):
        raise Refused(
            f"{subject.name}: a step takes {peak / MIB:.0f} MiB, more than the "
            f"{memory_limit(case) / MIB:.0f} MiB of O(N + K·D); an N×K matrix of float32 is "
            f"{case.matrix_bytes / MIB:.0f} MiB"
        )
