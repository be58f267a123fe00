"""Heads, projections, cosine similarity, the rotation trick and maps of `VectorQuantize`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from backends import Backend, on_every_backend
from torch import Tensor, nn
from torch.nn import functional as F

import vqtriton
from vqtriton import VectorQuantize, functional, reference

pytestmark = [pytest.mark.kernel, pytest.mark.once]


def rows(*shape: int, seed: int = 0, **options: Any) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), **options)


def test_projections_are_those_around_a_codebook() -> None:
    torch.manual_seed(0)
    vq = VectorQuantize(16, 32, codebook_dim=4, layernorm_after_project_in=True).eval()
    x = rows(3, 5, 16)
    quantized, indices, loss = vq(x)
    inside = vq.project_in(x)
    assert [type(part) for part in vq.project_in] == [nn.Linear, nn.LayerNorm]
    assert torch.equal(indices, reference.nearest_code(inside, vq.codebook))
    torch.testing.assert_close(quantized, vq.project_out(vq.codebook[indices]))
    # the loss is of what the codebook quantizes
    torch.testing.assert_close(loss, 0.25 * (inside - vq.codebook[indices]).square().mean())
    assert torch.equal(vq.get_output_from_indices(indices), quantized)
    assert vq.get_codes_from_indices(indices).shape == (3, 5, 4)


def test_projections_learn_and_keep_their_dtype_apart() -> None:
    vq = VectorQuantize(16, 32, codebook_dim=4).bfloat16()
    x = rows(8, 16).bfloat16()
    quantized, _, loss = vq(x)
    assert quantized.dtype == torch.bfloat16
    assert vq.codebook.dtype == vq.cluster_size.dtype == torch.float32
    assert vq.project_in.weight.dtype == torch.bfloat16
    (quantized.float().square().mean() + loss).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in vq.parameters())


def test_masked_vectors_are_zeros_behind_a_projection() -> None:
    vq, x = VectorQuantize(6, 8, codebook_dim=3), rows(2, 5, 6)
    quantized, indices, _ = vq(x, lens=torch.tensor([2, 5]))
    assert (quantized[0, 2:] == 0).all()
    assert (indices[0, 2:] == -1).all()
    assert torch.equal(vq.eval().get_output_from_indices(indices)[0, 2:], torch.zeros(3, 6))


@pytest.mark.parametrize("is_separate", [False, True])
@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_heads_are_codebooks_for_parts_of_a_vector(is_separate: bool, update: str) -> None:
    options = {"codebook_update": update, "threshold_ema_dead_code": 0.01, "decay": 0.9}
    torch.manual_seed(0)
    vq = VectorQuantize(
        12, 8, heads=3, separate_codebook_per_head=is_separate, kmeans_init=True, **options
    )
    x = rows(2, 40, 12, requires_grad=True)
    mask = rows(2, 40, seed=1) < 1
    vq(x, mask=mask)
    assert vq.codebook.shape == ((3, 8, 4) if is_separate else (8, 4))
    assert vq.is_initialized
    # the same rows, head by head, or all with one codebook
    others = [VectorQuantize(4, 8, **options) for _ in range(3 if is_separate else 1)]
    for other, codes, size in zip(
        others,
        vq.codebook if is_separate else [vq.codebook],
        vq.cluster_size if is_separate else [vq.cluster_size],
        strict=True,
    ):
        other.set_codebook(codes, size)
    parts = [x.unflatten(-1, (3, 4))]
    masks = mask[..., None].expand(2, 40, 3)
    if is_separate:
        parts, masks = parts[0].unbind(-2), mask
    found = [other(part, mask=masks) for other, part in zip(others, parts, strict=True)]
    quantized, indices, loss = vq(x, mask=mask)
    assert indices.shape == (2, 40, 3)
    dim = -2 if is_separate else 0
    want = torch.stack([each.quantized for each in found], dim).reshape(2, 40, 12)
    assert torch.equal(quantized, want)
    torch.testing.assert_close(loss, torch.stack([each.loss for each in found]).mean())
    if is_separate:
        assert torch.equal(indices, torch.stack([each.indices for each in found], -1))
    learned = torch.stack([other.codebook for other in others])
    assert torch.equal(vq.codebook, learned if is_separate else learned[0])
    codes = vq.get_codes_from_indices(indices)
    assert codes.shape == (2, 40, 12)
    assert (codes[~mask] == 0).all()
    weights = rows(2, 40, 12, seed=2)
    (grad,) = torch.autograd.grad((quantized * weights).sum() + loss, x)
    # straight through, and the pull of the commitment term
    pull = 2 * 0.25 * (x - want).detach() / (12 * mask.sum())
    torch.testing.assert_close(grad, (weights + pull) * mask[..., None])


def test_separate_heads_are_revived_with_their_own_rows() -> None:
    torch.manual_seed(0)
    vq = VectorQuantize(
        2, 4, heads=2, separate_codebook_per_head=True, threshold_ema_dead_code=0.5, decay=0.0
    )
    # the first head sees values near 5, the second near -5
    x = torch.tensor([5.0, -5.0]) + 0.1 * rows(50, 2)
    for _ in range(3):
        vq(x)
    assert (vq.codebook[0] > 4).all()
    assert (vq.codebook[1] < -4).all()
    vq.reset_codes(torch.ones(2, 4, dtype=torch.bool), x)
    assert (vq.codebook[0] > 4).all()
    assert (vq.codebook[1] < -4).all()


def test_cosine_codes_have_length_one_wherever_they_are_used() -> None:
    torch.manual_seed(0)
    vq, x = VectorQuantize(8, 16, use_cosine_sim=True), rows(64, 8)
    for _ in range(3):
        vq(x)
    quantized, indices, loss = vq.eval()(x)
    assert torch.equal(indices, vqtriton.nearest_code(x, vq.codebook, metric="cosine"))
    unit = reference.normalized(vq.codebook)
    assert torch.equal(quantized, unit[indices])
    assert torch.equal(vq.get_codes_from_indices(indices), unit[indices])
    torch.testing.assert_close(
        loss, 0.25 * (reference.normalized(x) - unit[indices]).square().mean()
    )


@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_a_training_step_looks_for_the_code_of_the_same_direction(update: str) -> None:
    vq, x = VectorQuantize(8, 16, use_cosine_sim=True, codebook_update=update), rows(64, 8)
    # lengths differ so much that a search by distance would choose other codes
    codes = rows(16, 8, seed=1) * torch.logspace(-1, 1, 16)[:, None]
    vq.set_codebook(codes)
    quantized, indices, loss = vq(x)
    assert torch.equal(indices, vqtriton.nearest_code(x, codes, metric="cosine"))
    unit = reference.normalized(codes)[indices]
    assert torch.equal(quantized, unit)
    weight = 0.25 if update == "ema" else 1.25
    torch.testing.assert_close(loss, weight * (reference.normalized(x) - unit).square().mean())


def test_cosine_levels_average_unit_vectors() -> None:
    rvq = vqtriton.ResidualVectorQuantize(4, 3, 2, use_cosine_sim=True, decay=0.5)
    before = [rows(3, 4, seed=5), rows(3, 4, seed=6)]
    for layer, codes in zip(rvq.layers, before, strict=True):
        layer.set_codebook(codes, cluster_size=2.0)
    residual = rows(30, 4, seed=7)
    _, indices, loss = rvq(residual)
    for level, codes in enumerate(before):
        unit, chosen = reference.normalized(residual), indices[:, level]
        assert torch.equal(chosen, vqtriton.nearest_code(residual, codes, metric="cosine"))
        of_codes = reference.normalized(codes)
        want = 0.25 * (unit - of_codes[chosen]).square().mean()
        torch.testing.assert_close(loss[level], want)
        for code in range(3):
            mine = unit[chosen == code]
            mean = (codes[code] + 0.5 * mine.sum(0)) / (1 + 0.5 * len(mine))
            torch.testing.assert_close(rvq.layers[level].codebook[code], mean)
        residual = residual - of_codes[chosen]


def test_cosine_codes_that_are_parameters_are_revived() -> None:
    vq = VectorQuantize(
        4, 8, use_cosine_sim=True, codebook_update="gradient", threshold_ema_dead_code=0.5
    )
    x = rows(60, 4, requires_grad=True)
    vq(x).loss.backward()
    assert vq.codebook.grad.isfinite().all()


def test_one_head_is_no_heads() -> None:
    vq = VectorQuantize(4, 8, separate_codebook_per_head=True)
    x = rows(60, 4)
    assert vq.codebook.shape == (8, 4)
    indices = vq(x).indices
    assert indices.shape == (60,)
    assert vq.get_codes_from_indices(indices).shape == (60, 4)


def test_cosine_codes_follow_the_means_of_unit_vectors() -> None:
    vq = VectorQuantize(3, 2, use_cosine_sim=True, decay=0.5)
    before = rows(2, 3, seed=3)
    vq.set_codebook(before, cluster_size=4.0)
    x = rows(10, 3, seed=4)
    indices = vq(x).indices
    unit = reference.normalized(x)
    for code in range(2):
        chosen = unit[indices == code]
        size = 0.5 * 4 + 0.5 * len(chosen)
        want = (0.5 * 4 * before[code] + 0.5 * chosen.sum(0)) / size
        torch.testing.assert_close(vq.codebook[code], want)


@pytest.mark.parametrize("options", [{}, {"use_cosine_sim": True}, {"heads": 2}])
def test_a_frozen_quantizer_stays_as_it_is(options: dict[str, Any]) -> None:
    vq = VectorQuantize(8, 16, **options)
    vq.frozen = True
    before = {name: t.clone() for name, t in vq.state_dict().items()}
    vq(rows(64, 8))
    assert all(torch.equal(before[name], t) for name, t in vq.state_dict().items())


def test_videos_are_maps_with_a_time() -> None:
    vq = VectorQuantize(4, 8, accept_3d_fmap=True).eval()
    x = rows(2, 4, 3, 5, 6)
    quantized, indices, _ = vq(x)
    assert indices.shape == (2, 3, 5, 6)
    assert torch.equal(quantized, vq.get_output_from_indices(indices))
    assert torch.equal(quantized.movedim(1, -1), vq.codebook[indices])
    with pytest.raises(ValueError, match=r"x has shape .*must be \[B, D, T, H, W\] with D = 4"):
        vq(x[0])


def by_the_paper(x: Tensor, codes: Tensor) -> Tensor:
    """Equation 4 and section 4.2 of arXiv:2410.06424, with autograd."""
    e, q = F.normalize(x, dim=-1).detach(), F.normalize(codes, dim=-1).detach()
    r = F.normalize(e + q, dim=-1)
    scale = (codes.norm(dim=-1) / x.norm(dim=-1)).detach()[..., None]

    def along(a: Tensor, b: Tensor) -> Tensor:
        return a * (b * x).sum(-1, keepdim=True)

    return scale * (x - 2 * along(r, r) + 2 * along(q, e))


@pytest.mark.parametrize("is_prescribed", [False, True])
def test_the_rotation_trick_has_the_gradient_of_its_paper(is_prescribed: bool) -> None:
    x = rows(40, 6, dtype=torch.float64, requires_grad=True)
    codes = rows(40, 6, seed=1, dtype=torch.float64)
    if is_prescribed:
        # a code in the direction of x, one of its length, one that is x
        with torch.no_grad():
            codes[0] = 3 * x[0]
            codes[1] *= x[1].norm() / codes[1].norm()
            codes[2] = x[2]
    want = by_the_paper(x, codes)
    torch.testing.assert_close(want, codes)
    found = functional.rotate(x, codes)
    assert torch.equal(found, codes)
    weights = rows(40, 6, seed=2, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad((found * weights).sum(), x, create_graph=True)
    (want_grad,) = torch.autograd.grad((want * weights).sum(), x, create_graph=True)
    torch.testing.assert_close(grad, want_grad)
    # and again
    again, want_again = (
        torch.autograd.grad((g * codes).sum(), weights)[0] for g in (grad, want_grad)
    )
    torch.testing.assert_close(again, want_again)


@pytest.mark.parametrize("options", [{}, {"use_cosine_sim": True}, {"codebook_dim": 3}])
def test_rotated_gradients_of_a_quantizer(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    vq = VectorQuantize(6, 16, rotation_trick=True, commitment_weight=0.0, **options)
    vq.frozen = True
    x = rows(30, 6, requires_grad=True)
    quantized, indices, _ = vq(x)
    weights = rows(30, 6, seed=2)
    found = torch.autograd.grad((quantized * weights).sum(), x)[0]
    inside = vq.project_in(x) if vq.project_in else x
    if vq.use_cosine_sim:
        inside = F.normalize(inside, dim=-1)
    want = by_the_paper(inside, vq.get_codes_from_indices(indices).detach())
    want = vq.project_out(want) if vq.project_out else want
    torch.testing.assert_close(quantized, want)
    torch.testing.assert_close(found, torch.autograd.grad((want * weights).sum(), x)[0])


def test_a_row_of_zeros_and_a_masked_row_have_finite_rotations() -> None:
    vq = VectorQuantize(4, 8, rotation_trick=True)
    x = torch.zeros(3, 4, requires_grad=True)
    quantized, _, loss = vq(x, mask=torch.tensor([True, False, True]))
    (quantized.sum() + loss).backward()
    assert x.grad.isfinite().all()
    assert (x.grad[1] == 0).all()


@on_every_backend
def test_normalized_rows_have_the_gradient_of_torch(backend: Backend) -> None:
    x = rows(20, 5, dtype=torch.float32).to(backend.device).requires_grad_()
    with torch.no_grad():
        x[0] *= 1e25
        x[1] *= 1e-25
        x[2] = 0
    found = functional.normalize(x, backend.name)
    wide = x.double()
    want = wide / wide.norm(dim=1, keepdim=True).clamp(min=1e-12)
    torch.testing.assert_close(found.double(), want)
    weights = rows(20, 5, seed=1).to(backend.device)
    (grad,) = torch.autograd.grad((found * weights).sum(), x)
    (want_grad,) = torch.autograd.grad((want * weights.double()).sum(), x)
    torch.testing.assert_close(grad[1:], want_grad[1:], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(grad[0], want_grad[0], rtol=1e-3, atol=1e-30)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"heads": 3}, ValueError, "dim is 8; .*heads"),
        ({"heads": 0}, ValueError, "heads is 0"),
        ({"codebook_dim": 0}, ValueError, "codebook_dim is 0"),
        ({"codebook_dim": 2.5}, TypeError, "codebook_dim is 2.5"),
        ({"use_cosine_sim": 1}, TypeError, "use_cosine_sim is 1"),
        ({"rotation_trick": "yes"}, TypeError, "rotation_trick is 'yes'"),
    ],
)
def test_arguments_that_do_not_fit(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        VectorQuantize(8, 4, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"codebook_dim": 3},
        {"heads": 2, "separate_codebook_per_head": True},
        {"heads": 2, "codebook_dim": 3, "layernorm_after_project_in": True},
        {"use_cosine_sim": True, "rotation_trick": True},
    ],
)
def test_a_saved_quantizer_comes_back(options: dict[str, Any], tmp_path: Any) -> None:
    torch.manual_seed(0)
    vq = VectorQuantize(8, 4, **options)
    vq(rows(30, 8))
    vqtriton.save(vq, tmp_path / "vq.safetensors")
    loaded = vqtriton.load(tmp_path / "vq.safetensors")
    assert loaded.config == vq.config
    x = rows(10, 8, seed=1)
    for one, other in zip(loaded(x), vq.eval()(x), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    "options",
    [
        {"heads": 2, "separate_codebook_per_head": True},
        {"codebook_dim": 3, "rotation_trick": True},
        {"use_cosine_sim": True},
    ],
)
def test_a_compiled_step_is_that_of_eager(options: dict[str, Any]) -> None:
    torch._dynamo.reset()
    results = []
    for compiled in (False, True):
        torch.manual_seed(0)
        vq = VectorQuantize(8, 4, **options)
        step = torch.compile(vq, fullgraph=True, backend="aot_eager") if compiled else vq
        x = rows(30, 8, requires_grad=True)
        for _ in range(2):
            quantized, indices, loss = step(x)
        grad = torch.autograd.grad(quantized.square().sum() + loss, x)[0]
        results.append((quantized, indices, loss, grad, vq.codebook))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    "options",
    [{"codebook_dim": 3}, {"use_cosine_sim": True}, {"rotation_trick": True}, {"heads": 2}],
)
def test_a_mask_of_another_shape_is_refused(options: dict[str, Any]) -> None:
    x = rows(2, 5, 8)
    for module in (
        VectorQuantize(8, 4, **options),
        *([] if "heads" in options else [vqtriton.ResidualVectorQuantize(8, 4, 2, **options)]),
    ):
        with pytest.raises(ValueError, match="mask has shape"):
            module(x, mask=torch.ones(1, 5, dtype=torch.bool))
        with pytest.raises(TypeError, match=r"mask is a torch\.int64 tensor"):
            module(x, mask=torch.ones(2, 5, dtype=torch.int64))
