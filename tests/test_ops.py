"""How the ops meet the rest of torch: dispatcher, compiler, export, transforms, autocast."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from backends import Backend, on_every_backend, on_every_real_backend
from conftest import INTERPRETED
from torch._dynamo.testing import CompileCounter

import vqtriton
from vqtriton import ops

pytestmark = pytest.mark.kernel


def places(values: Sequence[object]) -> list[int]:
    """Where the memory of those begins that are tensors with elements."""
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    return [tensor.untyped_storage().data_ptr() for tensor in tensors if tensor.numel()]


@on_every_real_backend
def test_opcheck(backend: Backend) -> None:
    x, codebook = torch.randn(9, 5, device=backend.device), torch.randn(4, 5, device=backend.device)
    indices = torch.randint(-1, 4, (9,), device=backend.device)
    prepared = ops.prepare_codebook_op(codebook, "l2", backend.name)
    of_dots = ops.prepare_codebook_op(codebook, "dot", backend.name)
    for op, args in (
        (ops.nearest_code, (x, codebook, "exact", "l2", backend.name)),
        (ops.nearest_code, (x.half(), codebook.T.contiguous().T, "fast", "dot", backend.name)),
        (ops.nearest_code_prepared, (x, codebook, "exact", "l2", backend.name, prepared)),
        (ops.nearest_code_prepared, (x, codebook, "exact", "dot", backend.name, of_dots)),
        (ops.prepare_codebook_op, (codebook, "l2", backend.name)),
        (ops.prepare_codebook_op, (codebook, "dot", backend.name)),
        (ops.normalize_rows, (x.T.contiguous().T, backend.name)),
        (ops.vector_quantize, (x, codebook, None, 0.25, 1.0, "mean", "exact", backend.name)),
        (ops.vector_quantize, (x, codebook, None, 0.25, 1.0, "none", "exact", backend.name)),
        (
            ops.vector_quantize_prepared,
            (x, codebook, None, 0.25, 0.0, "sum", "exact", backend.name, prepared),
        ),
        (
            ops.vector_quantize,
            (
                *(x.T.contiguous().T.bfloat16(), codebook, indices < 0, 0, 1),
                *("mean", "fast", backend.name),
            ),
        ),
        (
            ops.vector_quantize_update_,
            (
                *(x, codebook.clone(), indices >= 0, torch.ones(4, device=x.device)),
                *(torch.tensor([0.5, 0.0], device=x.device), 0.25, 0.0),
                *("mean", True, False, "exact", backend.name),
            ),
        ),
        (ops.code_sums, (x, indices, 4, backend.name)),
        (ops.code_sums, (x, indices, 4, backend.name, False)),
        (ops.code_sums, (x, indices, 4, backend.name, True, True)),
        (
            ops.ema_update_,
            (
                torch.ones(len(codebook), device=x.device),
                codebook.float().clone(),
                torch.arange(float(len(codebook)), device=x.device),
                codebook.float() - 1,
                codebook.float() + 2,
                torch.ones(len(codebook), device=x.device),
                torch.tensor([0.5, 1.0], device=x.device),
                backend.name,
            ),
        ),
        (ops.grad_x, (x.T.contiguous().T, x[:, 0], x, codebook, indices, 0.5, backend.name)),
        (ops.grad_codebook, (x[:1, 0].expand(9), x, codebook, indices, 2.0, backend.name)),
        (ops.snapshot, (codebook.T,)),
    ):
        torch.library.opcheck(op, args)
        results = op(*args)
        results = [results] if isinstance(results, torch.Tensor) else results or []
        # compilers take no result that shares its memory
        of_results = places(results)
        assert len(of_results) == len(set(of_results))
        assert not set(of_results) & set(places(args))


def step(x, codebook, backend):
    out = vqtriton.vector_quantize(x, codebook, backend=backend.name)
    return out.loss + (out.quantized * torch.arange(5.0, device=x.device)).sum(), out.indices


@on_every_real_backend
@pytest.mark.parametrize("dynamic", [True] if INTERPRETED else [False, True])
def test_compiles_as_one_graph(backend: Backend, dynamic: bool) -> None:
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic)
    for n in (9, 17, 33):
        x = torch.randn(n, 5, device=backend.device, requires_grad=True)
        codebook = torch.randn(4, 5, device=backend.device, requires_grad=True)
        results = []
        for function in (step, compiled):
            objective, indices = function(x, codebook, backend)
            results.append([indices, *torch.autograd.grad(objective, (x, codebook))])
        assert torch.equal(results[0][0], results[1][0])
        torch.testing.assert_close(results[0][1:], results[1][1:])


@on_every_real_backend
def test_batch_sizes_do_not_recompile(backend: Backend) -> None:
    count = CompileCounter()
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=count)
    codebook = torch.randn(4, 5, device=backend.device)
    for n in range(2, 12):
        compiled(torch.randn(n, 5, device=backend.device), codebook, backend)
    assert count.frame_count == 1


@on_every_real_backend
def test_exports(backend: Backend, tmp_path: Path) -> None:
    class Tokenizer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.quantizer = vqtriton.VectorQuantize(5, 4, backend=backend.name)

        def forward(self, x):
            return self.quantizer(x)

    model = Tokenizer().eval().to(backend.device)
    x = torch.randn(6, 7, 5, device=backend.device)
    batch = torch.export.Dim("batch")
    program = torch.export.export(model, (x,), dynamic_shapes={"x": {0: batch}})
    for n in (6, 3):
        x = torch.randn(n, 7, 5, device=backend.device)
        torch.testing.assert_close(tuple(program.module()(x)), tuple(model(x)))
    torch.export.save(program, tmp_path / "program.pt2")
    loaded = torch.export.load(tmp_path / "program.pt2").module()
    torch.testing.assert_close(tuple(loaded(x)), tuple(model(x)))


@on_every_backend
def test_functional_transforms(backend: Backend) -> None:
    x, codebook = torch.randn(9, 5, device=backend.device), torch.randn(4, 5, device=backend.device)

    def objective(x, codebook):
        return step(x, codebook, backend)[0]

    leaf_x, leaf_codebook = x.clone().requires_grad_(), codebook.clone().requires_grad_()
    want = torch.autograd.grad(objective(leaf_x, leaf_codebook), (leaf_x, leaf_codebook))
    got = torch.func.grad(objective, argnums=(0, 1))(x, codebook)
    torch.testing.assert_close(got, want)


@on_every_real_backend
def test_autocast_changes_no_index(backend: Backend) -> None:
    x, codebook = torch.randn(65, 32, device=backend.device), torch.randn(70, 32)
    codebook = codebook.to(backend.device)
    want = vqtriton.vector_quantize(x, codebook, backend=backend.name)
    with torch.autocast(backend.device, dtype=torch.bfloat16):
        got = vqtriton.vector_quantize(x, codebook, backend=backend.name)
        half = vqtriton.vector_quantize(x.bfloat16(), codebook, backend=backend.name)
        fast = vqtriton.nearest_code(x, codebook, precision="fast", backend=backend.name)
    assert torch.equal(got.indices, want.indices)
    assert torch.equal(got.quantized, want.quantized)
    assert got.loss.dtype == torch.float32
    assert half.quantized.dtype == torch.bfloat16
    assert half.loss.dtype == torch.float32
    assert torch.equal(
        half.indices, vqtriton.reference.nearest_code(x.bfloat16().cpu(), codebook.cpu())
    )
    # the screen alone: bfloat16 matmuls would show here
    assert torch.equal(
        fast, vqtriton.nearest_code(x, codebook, precision="fast", backend=backend.name)
    )


@on_every_backend
def test_ambient_matmul_precision_changes_no_index(backend: Backend) -> None:
    # "medium" lets torch round the inputs of a float32 matmul to bfloat16
    x, codebook = torch.randn(130, 64, device=backend.device), torch.randn(257, 64)
    codebook = codebook.to(backend.device)
    want = vqtriton.nearest_code(x, codebook, backend=backend.name)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        got = vqtriton.nearest_code(x, codebook, backend=backend.name)
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(got, want)


@on_every_backend
def test_inference_mode(backend: Backend) -> None:
    x, codebook = torch.randn(9, 5, device=backend.device), torch.randn(4, 5, device=backend.device)
    with torch.inference_mode():
        got = vqtriton.vector_quantize(x, codebook, backend=backend.name)
    want = vqtriton.vector_quantize(x, codebook, backend=backend.name)
    torch.testing.assert_close(tuple(got), tuple(want))
