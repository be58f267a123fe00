"""Every kernel as launched, compiled for every target: no spills, no overflow, no surprises."""

from __future__ import annotations

import functools
import re

import pytest
import torch

pytest.importorskip("triton")

from compiling import SHARED_LIMIT, TARGETS, Compiled, Launch, Recorder, compile_launch

from vqtriton.kernels import code_sums, gather_codes, nearest_code
from vqtriton.screening import error_bound, prepare_codebook

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


def launches_of(module, launcher, *args, **kwargs) -> list[Launch]:
    """What the launcher would launch from its module."""
    launches: list[Launch] = []
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            patch.setattr(module, name, Recorder(getattr(module, name), launches))
        launcher(*args, **kwargs)
    assert launches
    return launches


@functools.cache
def all_launches() -> dict[str, Launch]:
    cases = {}
    for dim, dtype, layout in INPUTS:
        x = torch.zeros(48, dim, dtype=dtype)
        if layout == "strided":
            x = torch.zeros(dim, 47, dtype=dtype).T
        codebook = torch.randn(40, dim)
        indices = torch.zeros(x.shape[0], dtype=torch.int64)
        launches = (
            launches_of(
                nearest_code,
                nearest_code.nearest_code,
                x,
                codebook,
                prepare_codebook(codebook, torch.float32),
                error_bound(dim, torch.float32),
                exact=True,
            )
            + launches_of(gather_codes, gather_codes.gather_codes, x, codebook, indices)
            + launches_of(code_sums, code_sums.code_sums, x, indices, 40)
        )
        for launch in launches:
            name = launch.kernel.__name__.removesuffix("_kernel")
            cases[f"{name}-{dim}-{str(dtype).removeprefix('torch.')}-{layout}"] = launch
    return cases


@functools.cache
def compiled(case: str, target: str) -> Compiled:
    return compile_launch(all_launches()[case], target)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("case", all_launches())
def test_fits_the_target(case: str, target: str) -> None:
    result = compiled(case, target)
    assert result.spilled_bytes == 0
    assert result.shared <= SHARED_LIMIT[target]
    assert result.registers <= (512 if target == "gfx942" else 255)


@pytest.mark.parametrize("case", all_launches())
def test_offsets_are_int64(case: str) -> None:
    # an int32 offset wraps at 2**31 elements: 8 GiB of float32
    offsets = re.findall(
        r"tt\.addptr .*: (.*), (.*?)(?: loc.*)?$", compiled(case, "sm_90").ttir, re.M
    )
    assert offsets
    assert {offset for _, offset in offsets if not offset.rstrip(">").endswith("i64")} == set()


@pytest.mark.parametrize("case", [case for case in all_launches() if case.startswith("screen")])
def test_dot_has_an_inner_size_that_gpus_take(case: str) -> None:
    dots = re.findall(r"tt\.dot .*: tensor<(\d+)x(\d+)x\w+> \* ", compiled(case, "sm_90").ttir)
    assert dots
    assert all(int(inner) >= 16 for _, inner in dots)
    # the bound of the screen is that of IEEE float32
    assert "tf32" not in compiled(case, "sm_90").ttir
    assert "HMMA" not in compiled(case, "sm_90").assembly


@pytest.mark.parametrize("case", [case for case in all_launches() if case.startswith("resolve")])
def test_canonical_distance_is_not_fused(case: str) -> None:
    # a fused multiply-add would round once where the definition of the distance rounds twice
    sass = compiled(case, "sm_90").assembly
    assert re.search(r"\bDMUL\b", sass)
    assert not re.search(r"\bDFMA\b", sass)
    assert not re.search(r"v_fma(c)?_f64", compiled(case, "gfx942").assembly)


def test_batch_size_is_not_part_of_the_program() -> None:
    for launch in all_launches().values():
        for param in launch.kernel.params:
            if param.name in ("N", "K"):
                assert not param.is_constexpr
                assert param.do_not_specialize
