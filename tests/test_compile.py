"""Every kernel as launched, compiled for every target: no spills, no overflow, no surprises."""

from __future__ import annotations

import functools
import importlib
import re
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

# bench is not installed, and plain `pytest` does not look for modules in the root
sys.path.insert(0, str(Path(__file__).parents[1]))
compiling = importlib.import_module("vqtriton.tuning.compiling")
machines = importlib.import_module("vqtriton.tuning.machines")
sass_kernels = importlib.import_module("bench.sass_kernels")
code_sums = importlib.import_module("vqtriton.kernels.code_sums")
launches_of, TARGETS = compiling.launches_of, compiling.TARGETS

# D, dtype and layout of x: multiples of the tiles and not, each dtype, each layout
INPUTS = (
    (1, torch.float32, "contiguous"),
    (8, torch.bfloat16, "strided"),
    (64, torch.float32, "contiguous"),
    (64, torch.float16, "strided"),
    (100, torch.float32, "strided"),
    (100, torch.bfloat16, "contiguous"),
    (1024, torch.float16, "contiguous"),
)


# of nearest_code: tests/test_screen_codes.py has the screen
FINISHING = ("finish_rows", "rescue_rows", "settle_rows")
CUTTING = ("segment_keys", "segment_bounds", "chunk_segments")
SUMS = (*CUTTING, "chunk_sums", "combine_chunks", "atomic_sums", "grad_x", "ema_update")
NAMES = (*FINISHING, *SUMS)


@functools.cache
def all_launches(target: str) -> dict[str, compiling.Launch]:
    cases = {}
    for dim, dtype, layout in INPUTS:
        x = torch.zeros(48, dim, dtype=dtype)
        if layout == "strided":
            x = torch.zeros(dim, 47, dtype=dtype).T
        no_code = torch.zeros(1, len(x), dtype=torch.int64)
        launches = [
            *sass_kernels.record_nearest_code(x, target),
            *sass_kernels.record_sums(x, target),
            *sass_kernels.record_ema_update(x, target),
            *launches_of(code_sums, code_sums.code_sums, x[None], no_code, 3, double=True),
        ]
        for launch in launches:
            if launch.name in NAMES:
                dtype_name = str(dtype).removeprefix("torch.")
                flags = ("IS_GRAD", "IS_EMA", "REVIVES")
                flag = "".join(f"-{name}" for name in flags if launch.values.get(name))
                sums = launch.values.get("sums_ptr")
                if launch.name in ("chunk_sums", "combine_chunks") and sums.dtype == torch.float64:
                    flag += "-double"
                cases[f"{launch.name}{flag}-{dim}-{dtype_name}-{layout}"] = launch
    return cases


CASES = tuple(all_launches("sm_90"))


@functools.cache
def compiled(case: str, target: str) -> compiling.Compiled:
    return compiling.compile_launch(all_launches(target)[case], target)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("case", CASES)
def test_fits_the_target(case: str, target: str) -> None:
    result = compiled(case, target)
    assert result.spilled_bytes == 0
    assert result.shared <= machines.ARCHITECTURES[target].shared_limit
    assert result.registers <= (512 if target == "gfx942" else 255)


@pytest.mark.parametrize("case", CASES)
def test_offsets_are_int64(case: str) -> None:
    # an int32 offset wraps at 2**31 elements: 8 GiB of float32
    offsets = re.findall(
        r"tt\.addptr .*: (.*), (.*?)(?: loc.*)?$", compiled(case, "sm_90").ttir, re.M
    )
    assert offsets
    assert {offset for _, offset in offsets if not offset.rstrip(">").endswith("i64")} == set()


RESCUES = [case for case in CASES if case.startswith("rescue_rows")]


@pytest.mark.parametrize("case", RESCUES)
def test_rescue_has_dots_that_gpus_take(case: str) -> None:
    dots = re.findall(
        r"tt\.dot .*: tensor<\d+x(\d+)xf16> \* tensor<(\d+)x\d+xf16>", compiled(case, "sm_90").ttir
    )
    assert dots
    assert all(int(inner) >= 16 for pair in dots for inner in pair)


@pytest.mark.parametrize("case", RESCUES)
def test_canonical_distance_is_not_fused(case: str) -> None:
    # a fused multiply-add would round once where the definition of the distance rounds twice
    sass = compiled(case, "sm_90").assembly
    assert re.search(r"\bDMUL\b", sass)
    assert not re.search(r"\bDFMA\b", sass)
    assert not re.search(r"v_fma(c)?_f64", compiled(case, "gfx942").assembly)


def test_batch_size_is_not_part_of_the_program() -> None:
    for launch in all_launches("sm_90").values():
        for param in launch.kernel.params:
            if param.name in ("N", "K", "padded_K", "tiles", "rescue_programs"):
                assert not param.is_constexpr
                assert param.do_not_specialize


def test_batch_size_changes_no_alignment() -> None:
    # of 12 columns: the stride of the only head would be a multiple of 16 for some sizes alone
    def specialized(num_rows: int) -> list[tuple]:
        launches = sass_kernels.record_nearest_code(torch.zeros(num_rows, 12), "sm_90")
        return [
            (param.name, value == 1, value % 16 == 0)
            for launch in launches
            for param in launch.kernel.params
            if type(value := launch.values[param.name]) is int
            and not (param.is_constexpr or param.do_not_specialize)
        ]

    assert specialized(48)
    assert specialized(47) == specialized(48)
