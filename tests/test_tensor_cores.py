"""What the played tensor cores do, by hand, and that the bound of their sums is one, and close."""

from __future__ import annotations

import emulation
import oracle
import pytest
import tensor_cores
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensor_cores import dot
from torch import Tensor

from vqtriton.kernels.constants import SLACK
from vqtriton.planes import (
    TENSOR_CORES,
    WORST_TENSOR_CORE,
    TensorCore,
    accumulation_bound,
    prepare_planes,
    screen_bound,
)

UNITS = sorted(set(TENSOR_CORES.values()))
OF_UNIT = pytest.mark.parametrize("unit", UNITS, ids=str)
INNERS = (16, 32, 64, 112, 128, 256, 512, 1024)
ULP = 2.0**-23


def total(products: list[float], unit: TensorCore, start: float = 0.0) -> float:
    """Of products that have few bits each, in this order; both signs at once."""
    codes = torch.tensor([products]).double()
    row = torch.ones(1, len(products)).double()
    above, below = (
        dot(row, sign * codes, unit, torch.tensor([[sign * start]])).item() for sign in (1, -1)
    )
    # cut toward zero, not down
    assert above == -below
    return above


# --- by hand ---


@OF_UNIT
def test_terms_are_cut_when_they_are_aligned(unit: TensorCore) -> None:
    cut = ULP * 2.0**-unit.extra_bits
    # beside 1, each of the others keeps one cut of its one and a half: 3, 3.5 and 3.75 ulp, of
    # which float32 keeps 3. To nearest they would be 6 or 7, and with one bit more 4 or 5.
    assert total([1.0] + [1.5 * cut] * (unit.products - 1), unit) == 1 + 3 * ULP
    assert total([1.0] + [(1 - 2**-10) * cut] * (unit.products - 1), unit) == 1


@OF_UNIT
def test_products_are_not_normalized(unit: TensorCore) -> None:
    cut = ULP * 2.0**-unit.extra_bits
    # 1.5·1.5 has the exponent of 1, though float32 keeps every other of these bits
    a = torch.tensor([[1.5] + [1.0] * (unit.products - 1)])
    b = torch.tensor([[1.5] + [cut] * (unit.products - 1)])
    assert dot(a, b, unit).item() == 2.25 + 2 * ULP


@OF_UNIT
def test_what_was_added_before_is_one_of_the_terms(unit: TensorCore) -> None:
    least = 2.0 ** (1 + unit.extra_bits)
    # its last bit is half of what is kept beside the product
    assert total([least], unit, start=-(1 + ULP)) == least - 1
    assert total([least / 2], unit, start=-(1 + ULP)) == truncated(least / 2 - 1 - ULP)


def truncated(value: float) -> float:
    return tensor_cores.truncated(torch.tensor([value], dtype=torch.float64)).item()


@OF_UNIT
def test_steps_have_as_many_products_as_they_are_said_to(unit: TensorCore) -> None:
    small = ULP / 2 * 2.0**-unit.extra_bits
    # two steps: what is small is added up before it is beside 1
    assert total([small] * unit.products + [1.0], unit) == 1 + 2 * ULP
    assert total([small] * (unit.products - 1) + [1.0], unit) == 1
    assert total([1.0] + [small] * unit.products, unit) == 1


@OF_UNIT
def test_zeros_are_aligned_to_nothing(unit: TensorCore) -> None:
    a = torch.tensor([[0.0, 2.0**-14, 2.0**15]])
    b = torch.tensor([[2.0**15, 2.0**-14, 0.0]])
    assert dot(a, b, unit).item() == 2.0**-28


# --- the bound ---


def share(rows: Tensor, codes: Tensor, unit: TensorCore, bound: float) -> float:
    """The largest error over what the bound allows. float64 sums products of fp16 exactly."""
    found = dot(rows, codes, unit).double()
    rows, codes = rows.double(), codes.double()
    allowed = bound * (rows.abs() @ codes.abs().T)
    return ((found - rows @ codes.T).abs() / allowed).max().item()


@pytest.mark.parametrize("inner", INNERS)
@OF_UNIT
def test_bound_is_reached_by_most_of_it_and_no_more(unit: TensorCore, inner: int) -> None:
    bound = accumulation_bound(inner, unit)
    # one fifth of the bound is what the sums lose, and they lose it only where bits below
    # float32's are kept and have the sign of the sum; the first step has one term less
    for sign in (1, -1):
        row, code = tensor_cores.lossy(inner, unit, sign)
        found = share(row[None], code[None], unit, bound)
        assert found >= (0.84 if sign > 0 and unit.extra_bits > 0 else 0.74)
        assert found <= 1


def test_bounds_of_the_units() -> None:
    """In ulp of float32 a product: what docs/exactness.md says."""
    bounds = [accumulation_bound(16, unit) / 16 / ULP for unit in UNITS]
    assert bounds == [1.25, 0.625, 0.3125]
    assert accumulation_bound(16) / 16 / ULP == 2
    # steps are whole
    assert accumulation_bound(17, UNITS[-1]) == accumulation_bound(32, UNITS[-1])


@given(
    unit=st.sampled_from([*UNITS, WORST_TENSOR_CORE]),
    inner=st.sampled_from([16, 48, 160]),
    spread=st.sampled_from([0, 1, 4, 8, 13]),
    signs=st.sampled_from(["one", "any", "cancelling"]),
    seed=st.integers(0, 2**32 - 1),
)
def test_no_sum_errs_more_than_its_bound(unit, inner, spread, signs, seed) -> None:
    generator = torch.Generator().manual_seed(seed)

    def draw(count: int) -> Tensor:
        values = 1 + torch.randint(1024, (count, inner), generator=generator) / 1024
        exponents = torch.randint(-spread, spread + 1, (count, inner), generator=generator)
        if signs != "one":
            values *= 1 - 2 * torch.randint(2, (count, inner), generator=generator)
        return (values * 2.0**exponents).half()

    rows, codes = draw(8), draw(16)
    if signs == "cancelling":
        half = inner // 2
        rows[:, half:], codes[:, half:] = rows[:, :half], -codes[:, :half]
    for bound in (accumulation_bound(inner, unit), accumulation_bound(inner)):
        assert share(rows, codes, unit, bound) <= 1


# --- which GPU has which ---


@pytest.mark.parametrize(
    ("capability", "unit"),
    [
        # V100; A100; A2, RTX 3060; L40S; H100, H200; B200
        ((7, 0), TensorCore(4, 0)),
        *((capability, TensorCore(8, 1)) for capability in ((8, 0), (8, 6), (8, 9))),
        *((capability, TensorCore(16, 2)) for capability in ((9, 0), (10, 0))),
        # Turing, Orin, GPUs of Blackwell that the table does not have
        *((capability, None) for capability in ((7, 5), (8, 7), (10, 3), (12, 0))),
    ],
)
def test_units_by_compute_capability(monkeypatch, capability, unit) -> None:
    pytest.importorskip("triton")
    from vqtriton.triton_backend import tensor_core

    gpu = torch.device("cuda", 0)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", {gpu: capability}.__getitem__)
    assert tensor_core(gpu) == (unit or WORST_TENSOR_CORE)
    assert tensor_core(torch.device("cpu")) == WORST_TENSOR_CORE
    # sums of numpy, and AMD's GPUs, whose capability may be that of another of NVIDIA's
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert tensor_core(gpu) == WORST_TENSOR_CORE
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert tensor_core(gpu) == WORST_TENSOR_CORE


def test_a_search_is_certified_by_the_bound_of_its_gpu(monkeypatch) -> None:
    pytest.importorskip("triton")
    from vqtriton import triton_backend

    unit, bounds = UNITS[-1], []
    monkeypatch.setattr(triton_backend, "tensor_core", lambda device: unit)
    monkeypatch.setattr(
        triton_backend, "nearest_code_kernels", lambda *args, **_: bounds.append(args[3])
    )
    codebook = torch.randn(40, 64)
    planes = prepare_planes(codebook[None], group=8)
    triton_backend.run_kernels(torch.randn(8, 64), codebook, planes.tensors, exact=True)
    block_k = triton_backend.config_for(torch.empty(1, 8, 64), 64).screen.block_k
    assert bounds == [screen_bound(planes, block_k, unit)]
    assert bounds[0].products < 0.4 * screen_bound(planes, block_k).products


# --- the screen with them ---


@pytest.mark.parametrize("dim", [256, 512, 1024])
@OF_UNIT
def test_half_of_the_accumulation_would_certify_a_wrong_code(unit: TensorCore, dim: int) -> None:
    """Products that are cut, all of them gains of the nearest code and losses of the next."""
    cut = 2.0**-unit.extra_bits
    # scaled by 1 as they are. The first product is 2**23; half a cut less would be lost as well
    x = torch.full((1, dim), (1 - 2.0**-10) * cut)
    x[0, 0] = 2.0**14
    code = torch.ones(dim)
    code[0] = 2.0**9
    # half of what the sums lose: multiples of what is kept
    x[0, -1] = 0.75 * (dim - 2) * cut // 1
    other = -code
    other[0], other[-1] = code[0], 1
    code[-1] = -1
    # in different groups, around the origin so that the mean rounds nothing
    codes = torch.stack([code] + [torch.zeros(dim)] * 8 + [other])
    codebook = torch.cat([codes, -codes])
    planes = prepare_planes(codebook[None], group=8)
    assert planes.scale.item() == 1
    assert not planes.mean.any()
    assert oracle.nearest_code(x, codebook).item() == 0

    bound = screen_bound(planes, 64, unit)
    accumulation = SLACK * accumulation_bound(planes.codes.shape[2], unit)
    half = bound._replace(products=bound.products - accumulation / 2)
    for one, is_certified in ((bound, False), (half, True)):
        result = emulation.screen(x, planes, one, unit=unit)
        assert result.groups.item() == 9 // planes.group
        assert result.is_certified.item() == is_certified
