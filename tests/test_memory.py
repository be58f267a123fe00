"""Resident memory of a search, whoever allocates it. tests/test_step.py: what torch allocates."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from vqtriton import torch_backend

LIMIT = 64 << 20


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="needs /proc/self/clear_refs"
)
@pytest.mark.parametrize(
    ("number", "n", "k", "d"),
    [(1, 16384, 8192, 64), (1, 4096, 65536, 16), (8, 8192, 8192, 64), (32, 16384, 1024, 16)],
)
def test_peak_memory_is_bounded(number: int, n: int, k: int, d: int) -> None:
    rows = dict.fromkeys(("gaussian", "collapsed", "lattice", "duplicates"), n)
    # where nearly all pairs are in doubt a search takes long; two blocks of rows show it
    slow = ("very_different_norms", "unit_norm", "permuted_codes", "no_finite_code")
    rows |= dict.fromkeys(slow, 2 * torch_backend.BLOCK_SCORES // k)
    script = Path(__file__).with_name("peak_memory.py")
    command = [sys.executable, str(script), str(number), str(k), str(d)]
    command += [f"{case}={number}" for case, number in rows.items()]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    peaks = json.loads(done.stdout)
    assert peaks.keys() == rows.keys()
    assert {case: peak for case, peak in peaks.items() if not 0 < peak <= LIMIT} == {}
