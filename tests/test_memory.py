"""No tensor of N×K elements, and nothing else that grows with N·K."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from backends import Backend, on_every_backend
from conftest import INTERPRETED
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vqtriton import blocked, ops, reference

pytestmark = pytest.mark.kernel


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation made."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.numel = max(self.numel, leaf.numel())
        return result


def largest(function, *args) -> int:
    with LargestTensor() as mode:
        function(*args)
    return mode.numel


@on_every_backend
def test_nothing_is_as_large_as_n_times_k(backend: Backend) -> None:
    n, k, d = (1000, 700, 4) if INTERPRETED else (20_000, 5_000, 4)
    x = torch.randn(n, d, device=backend.device)
    codebook = torch.randn(k, d, device=backend.device)
    indices = torch.randint(k, (n,), device=backend.device)
    # a few copies of the inputs, or a block of scores, or the lists of rivals (the interpreter
    # copies them byte by byte)
    constant = 65536 if backend.name == "triton" else blocked.BLOCK_SCORES
    if backend.device == "cuda":
        constant *= torch.cuda.get_device_properties(0).multi_processor_count
    limit = max(4 * (n + k) * d, constant)
    assert limit < n * k / 10
    # the implementations, since the ops that call them are one operation each
    assert largest(ops._nearest_code, x, codebook, "exact", backend.name) <= limit
    layer = (x, codebook, None, 0.25, 1.0, "exact", backend.name)
    assert largest(ops._vector_quantize, *layer) <= limit
    assert largest(ops._code_sums, x, indices, k, backend.name) <= limit


@pytest.mark.once
def test_the_measure_sees_what_is_large() -> None:
    x, codebook = torch.randn(50, 4), torch.randn(40, 4)
    assert largest(reference.squared_distances, x, codebook) == 50 * 40


LIMIT = 64 << 20
SHAPES = [(16384, 8192, 64), (4096, 65536, 16)]
can_measure = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="needs /proc/self/clear_refs"
)


def check_peak_memory(n: int, k: int, d: int, *cases: str) -> None:
    script = Path(__file__).with_name("peak_memory.py")
    command = [sys.executable, str(script), *map(str, (n, k, d)), *cases]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    peaks = json.loads(done.stdout)
    assert peaks.keys() == set(cases)
    assert {case: peak for case, peak in peaks.items() if not 0 < peak <= LIMIT} == {}


@pytest.mark.once
@can_measure
@pytest.mark.parametrize(("n", "k", "d"), SHAPES)
def test_peak_memory_is_bounded(n: int, k: int, d: int) -> None:
    check_peak_memory(n, k, d, "gaussian", "collapsed", "lattice", "duplicates")
    # where nearly all pairs are in doubt a search takes long; two blocks of rows show it
    cases = ("very_different_norms", "unit_norm", "permuted_codes", "no_finite_code")
    check_peak_memory(2 * blocked.BLOCK_SCORES // k, k, d, *cases)
