"""A small case of each kernel, for tools that look at every access.

``python tests/small_cases.py KERNEL``. With ragged tiles, strided rows, rows in doubt, ties, a NaN,
codes in two parts, masks. The results are compared with those of the torch backend.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch

from vqtriton import ops, torch_backend, triton_backend
from vqtriton.planes import (
    inner_size,
    prepare_planes,
    prepare_planes_with_kernels,
    screen_bound,
)
from vqtriton.residual import torch_backend as residual_torch
from vqtriton.residual import triton_backend as residual_triton
from vqtriton.screening import error_bound

ROWS, CODES, DIM = 77, 300, 12
Case = Callable[[torch.device | str], None]


def make_data(device: torch.device | str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, whose columns come one after the other; codebook; indices, -1 among them."""
    torch.manual_seed(0)
    codebook = torch.randn(CODES, DIM)
    # ties, and rows that are certain
    x = torch.cat([codebook[:40] + codebook[1:41], torch.randn(ROWS - 40, DIM)]) / 2
    x[3, 0] = torch.nan
    indices = torch.randint(-1, 20, (ROWS,))
    return x.T.contiguous().to(device).T, codebook.to(device), indices.to(device)


def expect(found: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(found.cpu(), want, equal_nan=True)


def planes(device: torch.device | str) -> None:
    from vqtriton.kernels import prepare_planes as kernels

    _, codebook, _ = make_data(device)
    kind = {"group": 8, "lanes": 4, "vec": 2}
    want = prepare_planes(codebook[None].cpu(), **kind)
    config = kernels.PreparePlanesConfig(most_elements=0)
    large = kernels.prepare_planes(codebook[None], *inner_size(DIM), **kind, config=config)
    expect(large[0], want.codes)
    for is_dot in (False, True):
        found = triton_backend._prepare_planes(codebook, is_dot=is_dot)
        kind = {name: getattr(found, name) for name in kind}
        want = prepare_planes(codebook[None].cpu(), **kind, is_dot=is_dot)
        for one, other in zip(found.tensors[:-1], want.tensors[:-1], strict=True):
            expect(one, other)
        # each program leaves the largest norms that it has seen
        expect(found.norms.amax(1), want.norms.amax(1))


def search(device: torch.device | str) -> None:
    from vqtriton.kernels.nearest_code import nearest_code, nearest_code_config
    from vqtriton.kernels.screen_tiles import architecture

    x, codebook, _ = make_data(device)
    prepared = triton_backend._prepare_planes(codebook)
    config = nearest_code_config(architecture(x.device), prepared.codes.shape[2], 0)
    mask = torch.arange(ROWS, device=device) % 5 > 0
    want = torch_backend.nearest_code(x.cpu(), codebook.cpu(), "exact")
    for splits, exact in ((1, True), (2, True), (1, False)):
        out = nearest_code(
            x[None],
            codebook[None],
            prepared,
            screen_bound(prepared, config.screen.block_k),
            error_bound(DIM, torch.float32),
            exact=exact,
            mask=mask[None],
            gather=True,
            reduction="mean",
            splits=splits,
            config=config,
        )
        if exact:
            expect(out.indices[0], want.where(mask.cpu(), -1))
        # a row that is not finite has a loss of NaN, and then the sum is NaN as well
        losses = out.losses[0].cpu()
        expect(out.loss[0], losses.sum() / (DIM * mask.sum().item()))
    of_dots = torch_backend.nearest_code(x.cpu(), codebook.cpu(), "exact", "dot")
    expect(triton_backend.nearest_code(x, codebook, "exact", "dot"), of_dots)


def rotated(device: torch.device | str) -> None:
    x, quantized, grad = torch.randn(3, 70, 20, device=device).unbind(0)
    for is_forward in (False, True):
        arguments = grad, x, quantized
        found = triton_backend.rotate_grad(*arguments, is_forward)
        expected = torch_backend.rotate_grad(*(t.cpu() for t in arguments), is_forward)
        torch.testing.assert_close(found.cpu(), expected)


def residuals(device: torch.device | str) -> None:
    x, codes, _ = make_data(device)
    codes = torch.cat([codes[:20], codes[:20] / 2])
    indices = torch.arange(2 * len(x), device=device).view(-1, 2) % 21 - 1
    given = x, torch.ones(len(x), 2, device=device), x, codes, [20, 20], indices
    on_cpu = [t.cpu() if isinstance(t, torch.Tensor) else t for t in given]
    found = residual_triton.residual_grad_x(*given)
    torch.testing.assert_close(found.cpu(), residual_torch.residual_grad_x(*on_cpu), equal_nan=True)


def residual(device: torch.device | str) -> None:
    """Of many rows and of few."""
    from vqtriton.kernels.residual_quantize import GROUP, config_for, residual_quantize
    from vqtriton.kernels.screen_tiles import ACCUMULATOR_ORDER, architecture

    x, codebook, _ = make_data(device)
    codebooks = torch.stack([codebook, codebook / 2, codebook / 4])
    lanes, vec = ACCUMULATOR_ORDER[architecture(x.device)]
    prepared = prepare_planes_with_kernels(codebooks, group=GROUP, lanes=lanes, vec=vec)
    config = config_for(x, prepared.codes.shape[2])
    mask = torch.arange(ROWS, device=device) % 5 > 0
    left, want = x.cpu(), []
    for codes in codebooks.cpu():
        want.append(torch_backend.nearest_code(left, codes, "exact"))
        left = left - codes[want[-1]]
    for rows in (ROWS, config.few.most_rows):
        out = residual_quantize(
            x[:rows],
            codebooks,
            prepared,
            screen_bound(prepared, config.chain.block_k),
            error_bound(DIM, torch.float32),
            depths=3 * mask[:rows],
            config=config,
        )
        expect(out.indices, torch.stack(want, 1).where(mask.cpu()[:, None], -1)[:rows])
        errors = left.square().sum(1).where(mask.cpu(), 0)
        expect(out.errors[:, 2], errors[:rows])


def normalized(device: torch.device | str) -> None:
    x, _, _ = make_data(device)
    expect(triton_backend.normalize_rows(x), torch_backend.normalize_rows(x.cpu()))


def draw(device: torch.device | str) -> None:
    from vqtriton.kernels.draw_rows import draw_rows

    x, codebook, indices = make_data(device)
    seed = torch.tensor([7], device=device)
    drawn = draw_rows(x, indices, codebook[:, 0], seed)
    is_drawn = (indices >= 0) & x.isfinite().all(1)
    first = drawn.order[: int(is_drawn.sum())].long()
    expect(first.sort().values, is_drawn.cpu().nonzero()[:, 0])
    expect(drawn.old_size, codebook[:, 0].cpu())
    counts = torch.bincount(indices[is_drawn], minlength=len(codebook))
    expect(drawn.counts, counts.cpu())


def sums(device: torch.device | str) -> None:
    x, _, indices = make_data(device)
    from vqtriton.kernels.code_sums import CodeSumsConfig, code_sums

    want = torch_backend.code_sums(x.cpu(), indices.cpu(), 20)
    many = {"most_elements": 0}
    for limits in ({}, many, many | {"most_counted": 0}):
        config = CodeSumsConfig(least_chunk=16, **limits)
        for one, other in zip(
            code_sums(x[None], indices[None], 20, config=config), want, strict=True
        ):
            expect(one[0], other)


def atomic_sums(device: torch.device | str) -> None:
    from vqtriton.kernels.atomic_sums import atomic_sums

    x, _, indices = make_data(device)
    found, counts = atomic_sums(x[None], indices[None], 20)
    want, want_counts = torch_backend.code_sums(x.cpu(), indices.cpu(), 20)
    expect(found[0], want)
    expect(counts[0], want_counts)


def gradient(device: torch.device | str) -> None:
    x, codebook, indices = make_data(device)
    of_loss = torch.ones(ROWS, device=device)
    given = (torch.ones_like(x), of_loss, x, codebook, indices, 0.5)
    on_cpu = [t.cpu() if isinstance(t, torch.Tensor) else t for t in given]
    expect(ops.grad_x(*given, "triton"), torch_backend.grad_x(*on_cpu))


def update(device: torch.device | str) -> None:
    x, codebook, indices = make_data(device)
    codebook, counts = codebook[:20].contiguous(), torch.ones(20, device=device)
    of_batch, of_codes = ops.code_sums(x, indices, 20, "torch")
    rates = torch.tensor([0.1, 0.5], device=device)
    given = [counts, codebook, of_codes.float(), of_batch, None, None, rates]
    on_cpu = [t.cpu().clone() if isinstance(t, torch.Tensor) else t for t in given]
    ops.ema_update_(*given, "triton")
    torch_backend.ema_update_(*on_cpu)
    expect(codebook, on_cpu[1])


# each kernel, and what launches it
CASES: dict[str, Case] = {
    **dict.fromkeys(("code_peaks", "planes"), planes),
    "draw_keys": draw,
    "count_rows": draw,
    **dict.fromkeys(("screen_codes", "finish_parts", "rescue_rows", "reduce_losses"), search),
    **dict.fromkeys(
        ("sum_codes", "place_rows", "segment_keys", "chunk_sums", "combine_chunks"),
        sums,
    ),
    "atomic_sums": atomic_sums,
    **dict.fromkeys(("residual_quantize", "residual_level"), residual),
    "normalize_rows": normalized,
    "rotate_grad": rotated,
    "residual_grad_x": residuals,
    "grad_x": gradient,
    "ema_update": update,
}


if __name__ == "__main__":
    CASES[sys.argv[1]]("cuda")
    torch.cuda.synchronize()
    print("right")
