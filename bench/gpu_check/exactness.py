"""`exact` beside float64 on hard data that is made, searched and checked on the device.

Every case of tests/data.py, again and again, each time with another D, K and dtype, until there
are enough rows. The truth is `bench.check.nearest_codes`: torch in float64, block by block, close
calls by the definition; the first rows are held to the numpy oracle of the tests as well.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from bench.check import nearest_codes
from bench.gpu_check.check import Check
from vqtriton import ops

DIMS = (1, 2, 3, 4, 8, 12, 16, 32, 64, 100, 128, 256, 512, 1024)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ROWS = 10**8
# of a trial in a dry walk, and its codes at most
DRY_ROWS = 24
# K·D, one of these: small ones cost the truth little, large ones fill the device
CODE_ELEMENTS = (1 << 9, 1 << 11, 1 << 13, 1 << 15, 1 << 17)
MOST_CODES, LEAST_CODES = 4096, 17
# rows of a trial, and its elements
MOST_ROWS, MOST_ELEMENTS = 1 << 20, 1 << 26
# pairs of row and dimension of a code: what a trial costs where every row is a close call
MOST_PRODUCTS = 1 << 37
# trials that end in an error, not in a wrong index
MOST_ERRORS = 5
# rows that numpy looks at too
ORACLE_ROWS = 16

# indices, and how many rows were in doubt
Search = Callable[[Tensor, Tensor], tuple[Tensor, int]]


@dataclass(frozen=True)
class Trial:
    case: str
    rows: int
    codes: int
    dim: int
    dtype: str
    seed: int


def trials(cases: list[str], is_dry: bool) -> Iterator[Trial]:
    """Without end; always the same. Each case meets every dtype in three rounds."""
    draw = random.Random(0)
    for turn in itertools.count():
        for place, case in enumerate(cases):
            dim = draw.choice((2, 8, 33) if is_dry else DIMS)
            # not a multiple of anything
            codes = min(MOST_CODES, draw.choice(CODE_ELEMENTS) // dim) - draw.randrange(8)
            codes = max(LEAST_CODES, codes)
            rows = min(MOST_ROWS, MOST_ELEMENTS // dim, MOST_PRODUCTS // (codes * dim))
            dtype = DTYPES[(place + turn) % 3]
            if is_dry:
                rows, codes = DRY_ROWS, min(codes, DRY_ROWS)
                # Triton's interpreter widens bfloat16 wrongly where it is subnormal
                dtype = DTYPES[(place + turn) % 2]
            name = str(dtype).removeprefix("torch.")
            yield Trial(case, rows, codes, dim, name, draw.randrange(1 << 30))


def make_data(trial: Trial, device: torch.device) -> tuple[Tensor, Tensor]:
    # of tests/, which `check.run_here` has put on the path
    import data

    torch.manual_seed(trial.seed)
    with device:
        x, codebook = data.HARD[trial.case](trial.rows, trial.codes, trial.dim)
    dtype = getattr(torch, trial.dtype)
    return x.to(dtype), codebook.to(dtype)


def run_kernels(x: Tensor, codebook: Tensor) -> tuple[Tensor, int]:
    out = ops.run_kernels(x, codebook, exact=True)
    return out.indices[0], int(out.num_doubtful)


def check_trial(trial: Trial, device: torch.device, search: Search = run_kernels) -> dict[str, Any]:
    """Counts, and the first of the rows that are wrong."""
    import oracle

    x, codebook = make_data(trial, device)
    truth = nearest_codes(x, codebook)
    few = oracle.nearest_code(x[:ORACLE_ROWS], codebook)
    if not torch.equal(truth[:ORACLE_ROWS].cpu(), few):
        raise ValueError(f"torch on {device} and numpy differ in float64: {trial}")
    indices, in_doubt = search(x, codebook)
    if indices.shape != truth.shape or indices.dtype != torch.int64:
        raise ValueError(f"indices are {indices.dtype} {tuple(indices.shape)}: {trial}")
    wrong = (indices != truth).nonzero()[:, 0]
    first = wrong[:4]
    return asdict(trial) | {
        "mismatches": len(wrong),
        "in_doubt": in_doubt,
        # row, index, the right one
        "first": torch.stack([first, indices[first], truth[first]], 1).tolist(),
    }


def run(check: Check, search: Search = run_kernels) -> str:
    import data

    cases = list(data.HARD)
    wanted = DRY_ROWS * len(cases) if check.is_dry else ROWS
    found: list[dict[str, Any]] = []
    rows = 0
    for begun, trial in enumerate(trials(cases, check.is_dry)):
        if rows >= wanted and len(found) >= len(cases):
            break
        if check.time_left() < 0:
            check.expect(False, f"the time was up after {rows:.3g} rows of {wanted:.3g}")
            break
        if begun - len(found) >= MOST_ERRORS:
            check.expect(False, f"given up after {MOST_ERRORS} errors and {rows:.3g} rows")
            break
        with check.step(str(trial)):
            found.append(check_trial(trial, check.device, search))
            rows += trial.rows
            check.note(**found[-1])
            check.expect(
                not found[-1]["mismatches"],
                f"{found[-1]['mismatches']} of {trial.rows} indices are wrong: {trial}",
            )
    print(f"{'':24} {'rows':>10} {'mismatches':>10} {'in doubt':>10}")
    for case in cases:
        of_case = [row for row in found if row["case"] == case]
        total = {name: sum(row[name] for row in of_case) for name in ("rows", "in_doubt")}
        mismatches = sum(row["mismatches"] for row in of_case)
        share = total["in_doubt"] / max(1, total["rows"])
        print(f"{case:24} {total['rows']:>10} {mismatches:>10} {share:>10.2%}")
        # after the trials, so that the table of a case can be read from the rows as well
        check.note(case_total=case, **total, mismatches=mismatches, share_in_doubt=share)
    wrong, doubtful = (sum(row[name] for row in found) for name in ("mismatches", "in_doubt"))
    return (
        f"{wrong} wrong of {rows} rows, {len({row['case'] for row in found})} of {len(cases)} "
        f"cases, {doubtful / max(1, rows):.1%} were in doubt"
    )
