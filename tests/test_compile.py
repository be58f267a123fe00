"""Every kernel as launched, compiled for GPUs: no spills, no overflow, no surprises.

Triton's own representation is looked at for all cases. Machine code is made for those that need the
most of a target, and for sm_90 for each path through the kernels: `make test-targets` makes all.
"""

from __future__ import annotations

import functools
import importlib
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch

from vqtriton.planes import inner_size

pytest.importorskip("triton")

# bench is not installed, and plain `pytest` does not look for modules in the root
sys.path.insert(0, str(Path(__file__).parents[1]))
compiling = importlib.import_module("vqtriton.tuning.compiling")
machines = importlib.import_module("vqtriton.tuning.machines")
sass_kernels = importlib.import_module("bench.sass_kernels")
code_sums = importlib.import_module("vqtriton.kernels.code_sums")
prepare_planes = importlib.import_module("vqtriton.kernels.prepare_planes")
CUDABackend = importlib.import_module("triton.backends.nvidia.compiler").CUDABackend
launches_of, TARGETS = compiling.launches_of, compiling.TARGETS

FLOAT32, FLOAT16, BFLOAT16 = torch.float32, torch.float16, torch.bfloat16
FINISHING = ("finish_parts", "rescue_rows")
Record = Callable[[torch.Tensor, str], list[compiling.Launch]]


def record_double_sums(x: torch.Tensor, target: str) -> list[compiling.Launch]:
    no_code = torch.zeros(1, len(x), dtype=torch.int64)
    return [
        launch
        for config in (None, sass_kernels.SORTED[0])
        for launch in launches_of(
            code_sums, code_sums.code_sums, x[None], no_code, 3, double=True, config=config
        )
    ]


def record_planes(codebook: torch.Tensor, target: str) -> list[compiling.Launch]:
    codebook = codebook.expand(2, -1, -1)
    inner = inner_size(codebook.shape[2])
    return [
        launch
        for config in (None, prepare_planes.PreparePlanesConfig(most_elements=0))
        for launch in launches_of(
            prepare_planes, prepare_planes.prepare_planes, codebook, *inner, config=config
        )
    ]


# how they are launched, which of the kernels are looked at, and D, dtype and layout of x or of the
# codebook: multiples of the tiles and not, each dtype, each layout
KERNELS: tuple[tuple[tuple[Record, ...], tuple[str, ...], tuple], ...] = (
    (
        (sass_kernels.record_nearest_code,),
        ("screen_codes",),
        (
            *((4, FLOAT32, "contiguous"), (8, FLOAT32, "strided"), (12, FLOAT32, "contiguous")),
            *((64, FLOAT32, "contiguous"), (64, FLOAT16, "strided"), (128, FLOAT32, "contiguous")),
            *((100, FLOAT32, "strided"), (256, FLOAT32, "contiguous"), (512, FLOAT32, "strided")),
            *((1024, FLOAT32, "contiguous"), (1024, BFLOAT16, "strided")),
        ),
    ),
    (
        (sass_kernels.record_nearest_code,),
        FINISHING,
        (
            *((1, FLOAT32, "contiguous"), (8, BFLOAT16, "strided"), (64, FLOAT32, "contiguous")),
            *((100, FLOAT32, "strided"), (100, BFLOAT16, "contiguous")),
            (1024, FLOAT16, "contiguous"),
        ),
    ),
    (
        (sass_kernels.record_search_of_dots,),
        ("screen_codes", *FINISHING),
        (
            *((8, FLOAT32, "contiguous"), (64, FLOAT16, "strided"), (100, FLOAT32, "strided")),
            (1024, BFLOAT16, "contiguous"),
        ),
    ),
    (
        (
            *(sass_kernels.record_sums, sass_kernels.record_ema_update, record_double_sums),
            *(sass_kernels.record_draw_rows, sass_kernels.record_fast_search),
            sass_kernels.record_normalize_rows,
            sass_kernels.record_rotate_grad,
            sass_kernels.record_residual_grad_x,
        ),
        (
            *("sum_codes", "place_rows", "segment_keys", "chunk_sums", "combine_chunks"),
            *("atomic_sums", "grad_x", "ema_update", "draw_keys", "count_rows", "reduce_losses"),
            *("normalize_rows", "rotate_grad", "residual_grad_x"),
        ),
        (
            *((1, FLOAT32, "contiguous"), (64, FLOAT16, "strided"), (100, FLOAT32, "strided")),
            (1024, BFLOAT16, "contiguous"),
        ),
    ),
    (
        (sass_kernels.record_residual_quantize,),
        ("residual_quantize", "residual_level"),
        # tests/test_sass.py compiles others
        ((128, FLOAT16, "strided"), (1024, BFLOAT16, "contiguous")),
    ),
    (
        (record_planes,),
        ("code_peaks", "planes"),
        (
            *((1, FLOAT32, "contiguous"), (8, BFLOAT16, "strided"), (100, FLOAT16, "strided")),
            *((256, FLOAT32, "contiguous"), (4094, BFLOAT16, "contiguous")),
        ),
    ),
)
FLAGS = ("IS_GRAD", "IS_CHAIN", "IS_EMA", "REVIVES", "IS_SMALL", "FINISH", "IS_DOT")


@functools.cache
def all_launches(target: str) -> dict[str, compiling.Launch]:
    cases = {}
    for records, names, inputs in KERNELS:
        found = set()
        for dim, dtype, layout in inputs:
            x = torch.zeros(48, dim, dtype=dtype)
            if layout == "strided":
                x = torch.zeros(dim, 47, dtype=dtype).T
            for launch in [launch for record in records for launch in record(x, target)]:
                if launch.name not in names:
                    continue
                found.add(launch.name)
                flag = "".join(f"-{name}" for name in FLAGS if launch.values.get(name))
                sums = launch.values.get("sums_ptr")
                of_sums = ("sum_codes", "chunk_sums", "combine_chunks")
                if launch.name in of_sums and sums.dtype == torch.float64:
                    flag += "-double"
                if launch.name in ("screen_codes", "finish_parts"):
                    flag += f"-{launch.values['BLOCK_N']}-rows"
                name = f"{launch.name}{flag}-{dim}-{str(dtype).removeprefix('torch.')}-{layout}"
                cases[name] = launch
        assert found == set(names)
    return cases


CASES = tuple(all_launches("sm_90"))


@functools.cache
def compiled(case: str, target: str) -> compiling.Compiled:
    return compiling.compile_launch(all_launches(target)[case], target)


@functools.cache
def ttir(case: str) -> str:
    """Of sm_90, as it is before layouts are chosen: what follows takes ten times as long."""
    launch = all_launches("sm_90")[case]
    add_stages = CUDABackend.add_stages

    def add_first_stage(self, stages, *args) -> None:
        add_stages(self, stages, *args)
        make_ttir = stages["ttir"]

        def end_there(module, metadata):
            raise TtirIsMade(str(make_ttir(module, metadata)))

        stages["ttir"] = end_there

    with mock.patch.object(CUDABackend, "add_stages", add_first_stage):
        try:
            # already compiled
            return compiling.compile_launch(launch, "sm_90").ttir
        except TtirIsMade as made:
            return str(made)


class TtirIsMade(Exception):
    pass


ALL_TARGETS = os.environ.get("ALL_TARGETS") == "1"
# cases with a dot that come nearest to the limits of a target: registers or shared memory
NEAREST_TO_LIMITS = (
    "screen_codes-FINISH-128-rows-64-float16-strided",
    "screen_codes-FINISH-128-rows-128-float32-contiguous",
    "screen_codes-FINISH-128-rows-256-float32-contiguous",
    "screen_codes-128-rows-1024-float32-contiguous",
    "finish_parts-128-rows-100-float32-strided",
    "rescue_rows-8-bfloat16-strided",
    "rescue_rows-IS_DOT-64-float16-strided",
)
# for sm_90 also each other path through the kernels; tests/test_sass.py has contiguous float32
OTHER_PATHS = (
    "screen_codes-FINISH-128-rows-8-float32-strided",
    "screen_codes-FINISH-IS_DOT-128-rows-8-float32-contiguous",
    "screen_codes-FINISH-64-rows-128-float32-contiguous",
    "screen_codes-128-rows-100-float32-strided",
    "screen_codes-128-rows-1024-bfloat16-strided",
    "screen_codes-IS_DOT-128-rows-1024-bfloat16-contiguous",
    "finish_parts-64-rows-100-bfloat16-contiguous",
    "finish_parts-IS_DOT-128-rows-1024-bfloat16-contiguous",
    "rescue_rows-100-float32-strided",
    "rescue_rows-1024-float16-contiguous",
    "residual_quantize-128-float16-strided",
)


def is_compiled_for(case: str, target: str) -> bool:
    if case not in all_launches(target):
        # few rows have no tiles of their own there
        return False
    if ALL_TARGETS:
        return True
    if case.startswith(("screen_codes", "residual_quantize", *FINISHING)):
        is_path = target == "sm_90" or (target == "gfx942" and case.startswith("residual"))
        return case in NEAREST_TO_LIMITS or (is_path and case in OTHER_PATHS)
    # what has no dot is compiled alike for all GPUs of a maker: the widest rows will do
    return target in ("sm_90", "gfx942") and ("-1024-" in case or "-4094-" in case)


@pytest.mark.parametrize(
    ("case", "target"),
    [(case, target) for case in CASES for target in TARGETS if is_compiled_for(case, target)],
)
def test_fits_the_target(case: str, target: str) -> None:
    result = compiled(case, target)
    assert result.spilled_bytes == 0
    assert result.shared <= machines.ARCHITECTURES[target].shared_limit
    assert result.registers <= (512 if target == "gfx942" else 255)


def test_each_kernel_is_compiled_for_both_makers() -> None:
    assert {*NEAREST_TO_LIMITS, *OTHER_PATHS} <= set(CASES)
    for target in ("sm_90", "gfx942"):
        kernels = {case.split("-")[0] for case in CASES if is_compiled_for(case, target)}
        assert kernels == {case.split("-")[0] for case in CASES}


@pytest.mark.parametrize("case", CASES)
def test_offsets_are_int64(case: str) -> None:
    # an int32 offset wraps at 2**31 elements: 8 GiB of float32
    offsets = re.findall(r"tt\.addptr .*: (.*), (.*?)(?: loc.*)?$", ttir(case), re.M)
    assert offsets
    assert {offset for _, offset in offsets if not offset.rstrip(">").endswith("i64")} == set()


RESCUES = [case for case in CASES if case.startswith("rescue_rows")]
SCREENS = [case for case in CASES if case.startswith(("screen_codes", "residual_quantize"))]
RESIDUALS = [c for c in CASES if c.startswith(("residual_quantize", "residual_level"))]


@pytest.mark.parametrize("case", RESCUES + SCREENS)
def test_dots_are_those_that_gpus_take(case: str) -> None:
    dots = re.findall(r"tt\.dot .*: tensor<\d+x(\d+)xf16> \* tensor<(\d+)x\d+xf16>", ttir(case))
    assert dots
    assert all(int(inner) >= 16 for pair in dots for inner in pair)


@pytest.mark.parametrize(
    "case", [case for case in RESCUES + RESIDUALS if is_compiled_for(case, "sm_90")]
)
def test_canonical_distance_is_not_fused(case: str) -> None:
    # a fused multiply-add would round once where the definition of the distance rounds twice
    sass = compiled(case, "sm_90").assembly
    assert re.search(r"\bDMUL\b", sass)
    assert not re.search(r"\bDFMA\b", sass)
    if is_compiled_for(case, "gfx942"):
        assert not re.search(r"v_fma(c)?_f64", compiled(case, "gfx942").assembly)


def test_batch_size_is_not_part_of_the_program() -> None:
    names = {"N", "K", "padded_K", "tiles", "codes_per_split", "splits", "codes_per_part"}
    names |= {"num_rows", "num_chunks", "chunk_rows", "num_sums", "num_norms", "known_spans"}
    names |= {"known_tiles", "codes_per_program", "levels", "level", "parts"}
    found = set()
    for launch in all_launches("sm_90").values():
        for param in launch.kernel.params:
            if param.name in names:
                found.add(param.name)
                assert not param.is_constexpr
                assert param.do_not_specialize
    assert found == names


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
