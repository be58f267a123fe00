"""`exact` beside float64 on hard data: 10⁸ rows on a GPU, made, searched and checked there.

Every case of tests/data.py, again and again, each time with another D, K and dtype, until there are
enough rows. The truth is `bench.check.nearest_codes`: torch in float64, block by block, close calls
by the definition; the first rows are held to the numpy oracle as well.
"""

from __future__ import annotations

import importlib
import itertools
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import data
import gpu_check
import oracle
import pytest
import torch
from conftest import DEVICE
from torch import Tensor

from vqtriton import torch_backend, triton_backend

# bench is not installed, and plain `pytest` does not look for modules in the root
sys.path.insert(0, str(Path(__file__).parents[1]))
checks = importlib.import_module("bench.check")

ROWS = 10**8
DIMS = (1, 2, 3, 4, 8, 12, 16, 32, 64, 100, 128, 256, 512, 1024)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# K·D, one of these: small ones cost the truth little, large ones fill the device
CODE_ELEMENTS = (1 << 9, 1 << 11, 1 << 13, 1 << 15, 1 << 17)
MOST_CODES, LEAST_CODES = 4096, 17
# rows of a trial, and its elements
MOST_ROWS, MOST_ELEMENTS = 1 << 20, 1 << 26
# triples of row, code and dimension: what a trial costs where every row is a close call
MOST_PRODUCTS = 1 << 37
TINY_ROWS, TINY_DIMS = 24, (2, 8, 33)
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


def trials(case: str, is_full: bool) -> Iterator[Trial]:
    """Without end; always the same. Three meet every dtype."""
    draw = random.Random(case)
    # Triton's interpreter widens bfloat16 wrongly where it is subnormal
    for dtype in itertools.cycle(DTYPES if is_full else DTYPES[:2]):
        dim = draw.choice(DIMS if is_full else TINY_DIMS)
        # not a multiple of anything
        codes = min(MOST_CODES, draw.choice(CODE_ELEMENTS) // dim) - draw.randrange(8)
        codes = max(LEAST_CODES, codes)
        rows = min(MOST_ROWS, MOST_ELEMENTS // dim, MOST_PRODUCTS // (codes * dim))
        if not is_full:
            rows, codes = TINY_ROWS, min(codes, TINY_ROWS)
        name = str(dtype).removeprefix("torch.")
        yield Trial(case, rows, codes, dim, name, draw.randrange(1 << 30))


def of_case(case: str, is_full: bool) -> Iterator[Trial]:
    """As many as make this case's part of all rows."""
    rows = 0
    for place, trial in enumerate(trials(case, is_full)):
        if place >= (3 if is_full else 1) and rows >= ROWS / len(data.HARD) * is_full:
            return
        rows += trial.rows
        yield trial


def run_kernels(x: Tensor, codebook: Tensor) -> tuple[Tensor, int]:
    out = triton_backend.run_kernels(x, codebook, exact=True)
    return out.indices[0], int(out.num_doubtful)


def check(trial: Trial, device: str, search: Search) -> dict[str, Any]:
    """Counts, and the first of the rows that are wrong."""
    x, codebook = (
        t.to(getattr(torch, trial.dtype))
        for t in gpu_check.hard_data(
            trial.case, trial.rows, trial.codes, trial.dim, device, trial.seed
        )
    )
    found, in_doubt = search(x, codebook)
    want = checks.nearest_codes(x, codebook)
    few = slice(min(ORACLE_ROWS, trial.rows))
    by_numpy = oracle.nearest_code(x[few].cpu(), codebook.cpu())
    assert torch.equal(want[few].cpu(), by_numpy), "the truth is not what the oracle says"
    wrong = (found != want).nonzero()[:, 0]
    first = [[int(row), int(found[row]), int(want[row])] for row in wrong[:3]]
    return {**asdict(trial), "mismatches": len(wrong), "in_doubt": in_doubt, "first": first}


@pytest.mark.kernel
@pytest.mark.needs_kernels
@pytest.mark.parametrize("case", data.HARD)
def test_every_index_is_that_of_float64(case: str) -> None:
    for trial in of_case(case, gpu_check.IS_FULL):
        row = check(trial, DEVICE, run_kernels)
        gpu_check.note("exactness", **row)
        assert row["mismatches"] == 0


def test_trials_meet_every_dim_and_dtype_in_enough_rows() -> None:
    found = [trial for case in data.HARD for trial in of_case(case, True)]
    assert sum(trial.rows for trial in found) >= ROWS
    assert {trial.dim for trial in found} == set(DIMS)
    assert len({(trial.case, trial.dtype) for trial in found}) == 3 * len(data.HARD)
    for trial in found:
        assert trial.codes <= MOST_CODES
        assert trial.rows * trial.dim <= MOST_ELEMENTS
        assert trial.rows * trial.codes * trial.dim <= MOST_PRODUCTS


@pytest.mark.parametrize("case", ["gaussian", "near_ties", "not_finite", "collapsed"])
def test_one_index_off_by_one_is_found(case: str) -> None:
    def search(x: Tensor, codebook: Tensor) -> tuple[Tensor, int]:
        indices, in_doubt = torch_backend.search(x, codebook, "exact")
        indices[17] = (indices[17] + 1) % len(codebook)
        return indices, in_doubt

    trial = Trial(case, 24, 20, 5, "float32", 3)
    row = check(trial, "cpu", search)
    assert row["mismatches"] == 1
    assert row["first"][0][0] == 17
    honest = check(trial, "cpu", lambda x, codebook: torch_backend.search(x, codebook, "exact"))
    assert honest["mismatches"] == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_truth_is_the_oracle_on_all_hard_data(dtype: torch.dtype) -> None:
    """What is not finite included, which the searches of the bench never hold."""
    for place, case in enumerate(data.HARD):
        for codes in (1, 19):
            torch.manual_seed(place)
            x, codebook = (t.to(dtype) for t in data.HARD[case](40, codes, 6))
            want = oracle.nearest_code(x, codebook)
            assert torch.equal(checks.nearest_codes(x, codebook), want), case
