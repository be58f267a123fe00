"""`residual_quantize`: tokens by definition, gradients by autograd, on every backend."""

from __future__ import annotations

import functools
from typing import Any

import data
import oracle
import pytest
import torch
from backends import BACKENDS, Backend, on_every_backend
from conftest import INTERPRETED
from torch import Tensor

import vqtriton
from vqtriton import reference, residual_quantize
from vqtriton.residual import ops

pytestmark = pytest.mark.kernel
LEVELS = 4


def chain(seed: int = 0, n: int = 60, k: int = 20, d: int = 6, even: bool = False, **options: Any):
    """Rows, and codebooks of levels that get finer."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=g, **options)
    sizes = [k] * LEVELS if even else [k, k + 3, k - 5, k]
    codebooks = [
        torch.randn(size, d, generator=g, **options) / 2**q for q, size in enumerate(sizes)
    ]
    return x, codebooks


def by_hand(x: Tensor, codebooks: list[Tensor], depths: Tensor | None = None):
    """The definition, with the oracle's search: quantized, indices, squared errors."""
    residual = x.float()
    total = torch.zeros_like(residual)
    indices, errors = [], []
    for level, codebook in enumerate(codebooks):
        found = oracle.nearest_code(residual, codebook)
        codes = codebook[found].float()
        if depths is not None:
            is_left_out = depths <= level
            found = found.masked_fill(is_left_out, -1)
            codes = codes.masked_fill(is_left_out[:, None], 0)
        residual, total = residual - codes, total + codes
        indices.append(found)
        errors.append(residual.double().square().sum(1).masked_fill(found < 0, 0))
    return total.to(x.dtype), torch.stack(indices, 1), torch.stack(errors, 1)


def on(backend: Backend, *tensors: Any) -> list[Any]:
    return [
        [t.to(backend.device) for t in tensor]
        if isinstance(tensor, list)
        else tensor.to(backend.device)
        for tensor in tensors
    ]


@on_every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_tokens_are_those_of_the_definition(backend: Backend, dtype: torch.dtype) -> None:
    x, codebooks = chain()
    x = x.to(dtype)
    depths = torch.arange(len(x)) % (LEVELS + 1)
    for limit in (None, depths):
        quantized, indices, errors = by_hand(x, codebooks, limit)
        rows, codes = on(backend, x, codebooks)
        options = {} if limit is None else {"depths": limit.to(backend.device)}
        found = residual_quantize(
            rows, codes, reduction="none", backend=backend.name, commitment_weight=1, **options
        )
        assert torch.equal(found.indices.cpu(), indices)
        # the interpreter cuts bfloat16, where a GPU rounds
        is_cut = INTERPRETED and dtype == torch.bfloat16
        options = {"rtol": 2.0**-7 if is_cut else 0, "atol": 0}
        torch.testing.assert_close(found.quantized.cpu(), quantized, **options)
        torch.testing.assert_close(found.loss.cpu().double(), 2 * errors, rtol=1e-5, atol=1e-7)


HARD = [
    *(data.not_finite, data.ulp_codes, data.beyond_float32),
    *(data.far_from_the_origin, data.tiny, data.duplicates, data.lattice, data.midpoints),
    data.very_different_norms,
][: 3 if INTERPRETED else None]


@on_every_backend
@pytest.mark.parametrize("make", HARD, ids=lambda make: make.__name__)
def test_hard_rows_have_the_tokens_of_the_definition(backend: Backend, make: Any) -> None:
    torch.manual_seed(0)
    x, first = make(40, 24, 5)
    codebooks = [first, make(1, 16, 5)[1], first / 2, first[:7]]
    _, indices, _ = by_hand(x, codebooks)
    rows, codes = on(backend, x, codebooks)
    found = residual_quantize(rows, codes, backend=backend.name, reduction="none")
    assert torch.equal(found.indices.cpu(), indices)
    if make is not data.beyond_float32:
        want = reference.residual_quantize(x, codebooks, reduction="none")
        torch.testing.assert_close(found.loss.cpu(), want.loss, equal_nan=True)


@pytest.mark.once
@pytest.mark.slow
@pytest.mark.parametrize("levels", [1, 4, 32])
@pytest.mark.parametrize("make", [data.lattice, data.midpoints, data.duplicates])
def test_a_hundred_thousand_hard_rows(levels: int, make: Any) -> None:
    torch.manual_seed(levels)
    x, codebook = make(100_000, 64, 8)
    codebooks = [codebook * 2.0 ** -(q % 5) for q in range(levels)]
    quantized, indices, _ = by_hand(x, codebooks)
    found = residual_quantize(x, codebooks)
    assert torch.equal(found.indices, indices)
    assert torch.equal(found.quantized, quantized)


@on_every_backend
def test_tokens_depend_on_no_batch_and_no_later_level(backend: Backend) -> None:
    x, codebooks = on(backend, *chain())
    options = {"backend": backend.name}
    whole = residual_quantize(x, codebooks, **options)
    assert torch.equal(whole.indices, residual_quantize(x, codebooks, **options).indices)
    for num in (1, 3):
        short = residual_quantize(x, codebooks[:num], **options)
        assert torch.equal(short.indices, whole.indices[:, :num])
        torch.testing.assert_close(short.loss, whole.loss[:num])
    for size, count in ((1, 4), (17, 34)):
        parts = [residual_quantize(rows, codebooks, **options) for rows in x[:count].split(size)]
        assert torch.equal(torch.cat([part.indices for part in parts]), whole.indices[:count])
        assert torch.equal(torch.cat([part.quantized for part in parts]), whole.quantized[:count])
    strided = torch.empty(6, 60, device=x.device).t().copy_(x)
    assert torch.equal(residual_quantize(strided, codebooks, **options).indices, whole.indices)


@on_every_backend
def test_prepared_codebooks_give_the_same_tokens(backend: Backend) -> None:
    x, codebooks = on(backend, *chain())
    prepared = vqtriton.prepare_codebooks(codebooks, backend=backend.name)
    # copies
    for codes in prepared.codebooks:
        assert all(codes.data_ptr() != other.data_ptr() for other in codebooks)
    for levels in (1, 3, LEVELS):
        found = residual_quantize(x, prepared.first(levels))
        want = residual_quantize(x, codebooks[:levels], backend=backend.name)
        assert all(torch.equal(one, other) for one, other in zip(found, want, strict=True))
    few = residual_quantize(x[:2], prepared)
    assert torch.equal(few.indices, want.indices[:2])


@pytest.mark.once
@pytest.mark.parametrize("levels", [1, 4, 32])
def test_the_gradient_of_x_is_one_straight_through(levels: int) -> None:
    x, _ = chain()
    codebooks = [torch.randn(8, 6) / (q + 1) for q in range(levels)]
    x.requires_grad_()
    weights = torch.randn(60, 6)
    found = residual_quantize(x, codebooks, commitment_weight=0.0, codebook_weight=0.0)
    ((found.quantized * weights).sum() + found.loss.sum()).backward()
    assert torch.equal(x.grad, weights)


@on_every_backend
@pytest.mark.parametrize(
    ("reduction", "frac", "even"),
    [("mean", 0.25, True), ("none", 0.0, False)]
    if INTERPRETED
    else [("mean", 0.0, True), ("mean", 0.25, False), ("sum", 1.0, True), ("none", 0.25, False)],
)
def test_gradients_are_those_of_the_eager_reference(
    backend: Backend, reduction: str, frac: float, even: bool
) -> None:
    is_torch = backend.name == "torch"
    x, codebooks = chain(dtype=torch.float64 if is_torch else torch.float32, even=even)
    x[3] = torch.nan
    mask, depths = torch.arange(60) % 7 > 0, torch.arange(60) % 5
    weights, pulls = torch.randn_like(x), torch.rand(LEVELS, dtype=x.dtype)
    results = []
    for function, device in (
        (reference.residual_quantize, "cpu"),
        (residual_quantize, backend.device),
    ):
        leaves = [t.detach().to(device).requires_grad_() for t in (x, *codebooks)]
        quantized, indices, loss = function(
            leaves[0],
            leaves[1:],
            mask=mask.to(device),
            depths=depths.to(device),
            reduction=reduction,
            quant_grad_frac=frac,
            commitment_weight=0.3,
            codebook_weight=0.7,
            backend=backend.name if function is residual_quantize else "auto",
        )
        told = loss.nan_to_num() * pulls.to(device)
        value = (quantized * weights.to(device)).sum() + told.sum()
        grads = [g.clone() for g in torch.autograd.grad(value, leaves)]
        # of a row that is not finite nobody wants a gradient
        grads[0][3] = 0
        results.append([t.cpu() for t in (quantized, indices, loss, *grads)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, equal_nan=True)


@pytest.mark.once
def test_gradients_can_be_differentiated_again() -> None:
    x, codebooks = chain(n=9, k=7, d=3, dtype=torch.float64)
    depths = torch.arange(9) % 5
    leaves = [t.requires_grad_() for t in (x, *codebooks)]

    def penalty(function: Any) -> list[Tensor]:
        quantized, _, loss = function(leaves[0], leaves[1:], depths=depths, quant_grad_frac=0.5)
        value = quantized.square().sum() + loss.sum()
        grads = torch.autograd.grad(value, leaves, create_graph=True)
        return list(torch.autograd.grad(sum(g.square().sum() for g in grads), leaves))

    for one, other in zip(
        penalty(residual_quantize), penalty(reference.residual_quantize), strict=True
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.once
def test_ops_are_what_their_schemas_say() -> None:
    x, codebooks = chain()
    found = residual_quantize(x, codebooks)
    pulls, depths = torch.rand(60, LEVELS), torch.arange(60) % 5
    places = [torch.tensor([4, 2])] * LEVELS
    tests = ["test_schema", "test_faketensor"]
    chain_of = x, torch.cat(codebooks), [len(codes) for codes in codebooks], found.indices
    for op, arguments in (
        (ops.residual_quantize, (x, codebooks, depths, "exact", [], None, "torch")),
        (ops.residual_prepare, (codebooks, "torch")),
        (ops.residual_sums, (*chain_of, places, "torch")),
        (ops.residual_grad_x, (x, pulls, *chain_of, "torch")),
        (ops.residual_grad_codes, (pulls, *chain_of, "torch")),
    ):
        torch.library.opcheck(op, arguments, test_utils=tests)


@on_every_backend
@pytest.mark.parametrize(
    "limits",
    # ways in which the kernels sort rows; without limits, the levels have other sizes
    [None, {}, {"most_elements": 0}, {"most_elements": 0, "most_counted": 0}][
        : None if INTERPRETED else 2
    ],
)
def test_sums_are_those_of_the_residuals(
    backend: Backend, limits: dict[str, int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, codebooks = chain(even=limits is not None)
    if backend.name == "triton":
        from vqtriton.kernels.code_sums import CodeSumsConfig
        from vqtriton.residual import triton_backend

        config = functools.partial(CodeSumsConfig, least_chunk=16, **(limits or {}))
        monkeypatch.setattr(triton_backend, "CodeSumsConfig", config)
    x[5] = torch.inf
    _, indices, _ = by_hand(x, codebooks, torch.arange(60) % 5)
    places = [torch.tensor([7, 8, 2])] * LEVELS
    rows, codes, chosen, wanted = on(backend, x, codebooks, indices, places)
    sizes = [len(codebook) for codebook in codebooks]
    arguments = rows, torch.cat(codes), sizes, chosen, wanted, backend.name
    *found, samples = ops.residual_sums(*arguments)
    sums, counts = (tensor.cpu().split(sizes) for tensor in found)
    residual = x
    for q, codebook in enumerate(codebooks):
        want, number = reference.code_sums(residual, indices[:, q], len(codebook))
        torch.testing.assert_close(sums[q], want)
        assert torch.equal(counts[q], number)
        assert torch.equal(samples[q].cpu(), residual[[7, 8, 2]])
        codes_of = codebook[indices[:, q].clamp(min=0)]
        residual = residual - codes_of.masked_fill(indices[:, q, None] < 0, 0)


@pytest.mark.once
def test_a_compiled_chain_is_that_of_eager() -> None:
    torch._dynamo.reset()
    x, codebooks = chain()
    step = torch.compile(residual_quantize, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (60, 31):
        results = []
        for function in (residual_quantize, step):
            rows = x[:n].clone().requires_grad_()
            quantized, indices, loss = function(rows, codebooks)
            (quantized.square().sum() + loss.sum()).backward()
            results.append((quantized, indices, loss, rows.grad))
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other)


def all_paths(x: Tensor, codebooks: list[Tensor], beam_size: int) -> Tensor:
    """Beam search with all distances: [N, Q]."""
    found = []
    for row in x:
        beams = [((), row)]
        for codebook in codebooks:
            ranked = []
            for order, (path, residual) in enumerate(beams):
                squares = oracle.distances(residual[None], codebook)[0]
                nearest = sorted(range(len(codebook)), key=lambda k, s=squares: (s[k], k))
                for rank, k in enumerate(nearest[:beam_size]):
                    after = (float(torch.tensor(squares[k]).float()), order, rank)
                    ranked.append((after, (*path, k), residual - codebook[k]))
            ranked.sort(key=lambda each: each[0])
            beams = [(path, residual) for _, path, residual in ranked[:beam_size]]
        found.append(beams[0][0])
    return torch.tensor(found)


@pytest.mark.once
@pytest.mark.parametrize("beam_size", [2, 5, 30])
def test_beams_are_those_of_the_definition(beam_size: int) -> None:
    x, codebooks = chain(n=20)
    codebooks[1][5] = codebooks[1][4]
    found = residual_quantize(x, codebooks, beam_size=beam_size)
    assert torch.equal(found.indices, all_paths(x, codebooks, beam_size))
    want = reference.residual_quantize(x, codebooks, beam_size=beam_size)
    assert torch.equal(found.indices, want.indices)
    torch.testing.assert_close(found.loss, want.loss)
    greedy = residual_quantize(x, codebooks)
    assert found.loss[-1] < greedy.loss[-1]
    total = sum(codebooks[q][found.indices[:, q]] for q in range(LEVELS))
    torch.testing.assert_close(found.quantized, total)
    parts = [residual_quantize(row[None], codebooks, beam_size=beam_size) for row in x]
    assert torch.equal(torch.cat([part.indices for part in parts]), found.indices)
    # at least as near as all others, where all are followed
    if beam_size == 30:
        few = [codes[:5] for codes in codebooks[:2]]
        sums = few[0][:, None] + few[1][None]
        best = (x[:, None, None] - sums).square().sum(-1).amin((1, 2))
        error = residual_quantize(x, few, beam_size=30, reduction="none", commitment_weight=0.0)
        torch.testing.assert_close(error.loss[:, 1], best)


@pytest.mark.once
def test_beams_with_depths_masks_and_gradients() -> None:
    x, codebooks = chain()
    depths, mask = torch.arange(60) % 5, torch.arange(60) % 7 > 0
    x.requires_grad_()
    leaves = [codes.requires_grad_() for codes in codebooks]
    quantized, indices, loss = residual_quantize(x, leaves, beam_size=3, depths=depths, mask=mask)
    want = (depths * mask)[:, None] > torch.arange(LEVELS)
    assert torch.equal(indices >= 0, want)
    for row in (1, 2, 8, 34):
        alone = residual_quantize(x[row], leaves[: depths[row]], beam_size=3)
        assert torch.equal(alone.indices, indices[row, : depths[row]])
        assert torch.equal(alone.quantized, quantized[row])
    weights = torch.randn(60, 6)
    grads = torch.autograd.grad((quantized * weights).sum(), x, retain_graph=True)
    assert torch.equal(grads[0], weights * want[:, :1])
    assert all((g != 0).any() for g in torch.autograd.grad(loss.sum(), leaves))


X, CODEBOOKS = chain()


@pytest.mark.once
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"codebooks": []}, ValueError, "codebooks is empty"),
        ({"codebooks": CODEBOOKS[0]}, ValueError, r"codebooks has shape .*\[Q, K, D\]"),
        ({"codebooks": [*CODEBOOKS[:2], torch.zeros(3, 5)]}, ValueError, "codebook has 5 columns"),
        (
            {"codebooks": vqtriton.prepare_codebooks(CODEBOOKS), "backend": "triton"},
            ValueError,
            "codebooks was prepared for 'torch'",
        ),
        ({"codebooks": [CODEBOOKS[0], CODEBOOKS[1].half()]}, TypeError, "codebooks have dtypes"),
        ({"depths": torch.zeros(60)}, TypeError, "depths is torch.float32"),
        ({"depths": torch.zeros(59, dtype=torch.int64)}, ValueError, "depths has shape"),
        ({"mask": torch.zeros(59, dtype=torch.bool)}, ValueError, "mask has shape"),
        ({"quant_grad_frac": 2.0}, ValueError, "quant_grad_frac is 2.0"),
        ({"beam_size": 33}, ValueError, "beam_size is 33"),
        ({"commitment_weight": "1"}, TypeError, "commitment_weight is '1'"),
        ({"reduction": "average"}, ValueError, "reduction is 'average'"),
        ({"precision": "best"}, ValueError, "precision is 'best'"),
        ({"backend": "cuda"}, ValueError, "backend is 'cuda'"),
    ],
)
def test_arguments_that_do_not_fit(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        residual_quantize(**({"x": X, "codebooks": CODEBOOKS} | change))


@pytest.mark.once
def test_no_rows_and_no_row_that_counts() -> None:
    x, codebooks = chain()
    found = residual_quantize(x[:0], codebooks)
    assert found.indices.shape == (0, LEVELS)
    assert torch.equal(found.loss, torch.zeros(LEVELS))
    found = residual_quantize(x, codebooks, mask=torch.zeros(60, dtype=torch.bool))
    assert (found.indices == -1).all()
    assert torch.equal(found.loss, torch.zeros(LEVELS))
    assert torch.equal(found.quantized, torch.zeros(60, 6))


def test_both_backends_are_tried() -> None:
    assert {b.name for b in BACKENDS} >= {"triton" if INTERPRETED else "torch"}
