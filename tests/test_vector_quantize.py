from __future__ import annotations

import data
import eager
import oracle
import pytest
import torch
from backends import BACKENDS, EXACT_DTYPES, Backend, on_every_backend
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import vqtriton

pytestmark = pytest.mark.kernel

SIZES = st.sampled_from([1, 2, 15, 17, 64, 65, 130])
DIMS = st.sampled_from([1, 2, 8, 17, 64, 65])
WEIGHTS = st.sampled_from([0.0, 0.25, 1.0, 1.7])


def leaves(*tensors: Tensor) -> list[Tensor]:
    return [t.detach().clone().requires_grad_() for t in tensors]


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.name)
@given(
    n=SIZES,
    k=SIZES,
    d=DIMS,
    dtype=st.sampled_from(EXACT_DTYPES),
    codebook_dtype=st.sampled_from(EXACT_DTYPES),
    layout=st.sampled_from(data.LAYOUTS),
    weights=st.tuples(WEIGHTS, WEIGHTS),
    seed=st.integers(0, 2**32 - 1),
)
def test_as_good_as_torch(
    backend: Backend, n, k, d, dtype, codebook_dtype, layout, weights, seed
) -> None:
    torch.manual_seed(seed)
    x, codebook = torch.randn(n, d).to(dtype), torch.randn(k, d).to(codebook_dtype)
    indices = oracle.nearest_code(x, codebook)
    upstream = torch.randn(n, d)

    def run(function, x: Tensor, codebook: Tensor) -> list[Tensor]:
        quantized, loss = function(x, codebook)
        objective = (quantized * upstream.to(quantized)).sum() + loss
        return [quantized, loss, *torch.autograd.grad(objective, (x, codebook))]

    def ours(x: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
        x = data.with_layout(x, layout)
        out = vqtriton.vector_quantize(
            x.to(backend.device),
            codebook.to(backend.device),
            commitment_weight=weights[0],
            codebook_weight=weights[1],
            backend=backend.name,
        )
        assert torch.equal(out.indices.cpu(), indices)
        return out.quantized.cpu(), out.loss.cpu()

    def torchs(x: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
        quantized, loss = eager.vector_quantize(x, codebook, indices, *weights)
        return quantized, loss.float()

    def right(x: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
        out = vqtriton.reference.vector_quantize(
            x, codebook, commitment_weight=weights[0], codebook_weight=weights[1]
        )
        return out.quantized, out.loss

    results = zip(
        run(ours, *leaves(x, codebook)),
        run(torchs, *leaves(x, codebook)),
        run(right, *leaves(x.double(), codebook.double())),
        strict=True,
    )
    for result in results:
        eager.assert_as_good_as_torch(*result)


@on_every_backend
def test_quantized_is_the_code(backend: Backend) -> None:
    x, codebook = torch.randn(70, 9), torch.randn(20, 9)
    out = vqtriton.vector_quantize(x.to(backend.device), codebook.to(backend.device))
    # not x + (code - x), which rounds
    assert torch.equal(out.quantized.cpu(), codebook[out.indices.cpu()])
    assert out.quantized is out[0]
    assert out.indices is out[1]
    assert out.loss is out[2]


class Model(nn.Module):
    """The smallest VQ-VAE."""

    def __init__(self, backend: Backend) -> None:
        super().__init__()
        self.backend = backend.name
        self.encoder = nn.Linear(6, 4)
        self.codebook = nn.Parameter(torch.randn(11, 4))
        self.decoder = nn.Linear(4, 6)
        self.to(backend.device)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        latents = self.encoder(x)
        quantized, indices, loss = vqtriton.vector_quantize(
            latents, self.codebook, commitment_weight=0.25, backend=self.backend
        )
        reconstruction = (self.decoder(quantized) - x).square().mean()
        return reconstruction, loss, latents, quantized, indices


@pytest.fixture(params=BACKENDS, ids=lambda b: b.name)
def model(request: pytest.FixtureRequest) -> Model:
    return Model(request.param)


@pytest.fixture
def batch(model: Model) -> Tensor:
    return torch.randn(40, 6, device=model.encoder.weight.device)


def test_the_decoder_learns_from_the_reconstruction_alone(model: Model, batch: Tensor) -> None:
    reconstruction, loss, *_ = model(batch)
    decoder = list(model.decoder.parameters())
    total = torch.autograd.grad(reconstruction + loss, decoder, retain_graph=True)
    alone = torch.autograd.grad(reconstruction, decoder)
    assert all(torch.equal(a, b) for a, b in zip(total, alone, strict=True))
    assert all(g.abs().sum() > 0 for g in total)


def test_the_encoder_learns_from_reconstruction_and_commitment(model: Model, batch: Tensor) -> None:
    reconstruction, loss, latents, _, indices = model(batch)
    encoder = list(model.encoder.parameters())
    total = torch.autograd.grad(reconstruction + loss, encoder, retain_graph=True)

    # by hand: the gradient at the codes goes to the latents as it is, plus that of the commitment
    codes = model.codebook.detach()[indices].requires_grad_()
    straight_through = torch.autograd.grad((model.decoder(codes) - batch).square().mean(), codes)[0]
    commitment = 0.25 * 2 / latents.numel() * (latents - codes).detach()
    by_hand = torch.autograd.grad(latents, encoder, straight_through + commitment)
    for got, want in zip(total, by_hand, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)
        assert got.abs().sum() > 0


def test_the_codebook_learns_from_its_own_term_alone(model: Model, batch: Tensor) -> None:
    reconstruction, loss, latents, _, indices = model(batch)
    (total,) = torch.autograd.grad(reconstruction + loss, model.codebook)
    # 2/numel · (n_k e_k − Σ x), whatever the reconstruction and β
    counts = torch.bincount(indices, minlength=11).to(latents)
    sums = torch.zeros_like(model.codebook).index_add_(0, indices, latents.detach())
    want = 2 / latents.numel() * (counts[:, None] * model.codebook.detach() - sums)
    torch.testing.assert_close(total, want, rtol=1e-4, atol=1e-6)
    assert total[counts > 0].abs().sum() > 0
    assert (total[counts == 0] == 0).all()


@on_every_backend
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("masked", [False, True])
def test_reductions_and_masks_equal_the_reference(
    backend: Backend, reduction: str, masked: bool
) -> None:
    x, codebook = torch.randn(3, 21, 5), torch.randn(13, 5)
    mask = torch.rand(3, 21) > 0.4 if masked else None
    results = []
    for function, device in (
        (vqtriton.vector_quantize, backend.device),
        (vqtriton.reference.vector_quantize, "cpu"),
    ):
        leaf_x, leaf_codebook = leaves(x, codebook)
        out = function(
            leaf_x.to(device),
            leaf_codebook.to(device),
            reduction=reduction,
            mask=None if mask is None else mask.to(device),
            backend=backend.name,
        )
        weights = torch.linspace(1, 2, out.loss.numel(), device=device).reshape(out.loss.shape)
        objective = (out.loss * weights).sum() + out.quantized.cos().sum()
        grads = torch.autograd.grad(objective, (leaf_x, leaf_codebook))
        results.append([t.cpu() for t in (*out, *grads)])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)
    if mask is not None:
        quantized, indices, loss, grad_x, _ = results[0]
        assert (indices[~mask] == -1).all()
        assert (quantized[~mask] == 0).all()
        assert (grad_x[~mask] == 0).all()
        assert reduction != "none" or (loss[~mask] == 0).all()


@on_every_backend
def test_masked_rows_might_as_well_not_be_there(backend: Backend) -> None:
    x, codebook = torch.randn(50, 5, device=backend.device), torch.randn(9, 5)
    codebook = codebook.to(backend.device)
    mask = torch.rand(50, device=backend.device) > 0.5
    x[~mask] = torch.nan
    # where one that counts is not finite either
    spoiled = x.clone()
    spoiled[mask.int().argmax(), 2] = torch.inf
    loss = vqtriton.vector_quantize(
        spoiled, codebook, mask=mask, reduction="none", backend=backend.name
    ).loss
    assert loss.isnan().sum() == 1
    assert (loss[~mask] == 0).all()
    masked_x, masked_codebook = leaves(x, codebook)
    few_x, few_codebook = leaves(x[mask], codebook)
    masked = vqtriton.vector_quantize(masked_x, masked_codebook, mask=mask, backend=backend.name)
    few = vqtriton.vector_quantize(few_x, few_codebook, backend=backend.name)
    masked.loss.backward()
    few.loss.backward()
    assert torch.equal(masked.indices[mask], few.indices)
    torch.testing.assert_close(masked.loss, few.loss)
    torch.testing.assert_close(masked_x.grad[mask], few_x.grad)
    torch.testing.assert_close(masked_codebook.grad, few_codebook.grad)
    assert (masked_x.grad[~mask] == 0).all()


@on_every_backend
def test_a_loss_beyond_float32_is_infinite(backend: Backend) -> None:
    x = torch.full((20, 1), 1.3e19, device=backend.device)
    codebook = torch.zeros(3, 1, device=backend.device)
    out = vqtriton.vector_quantize(x, codebook, reduction="sum", backend=backend.name)
    assert out.loss == torch.inf


@pytest.mark.once
@pytest.mark.parametrize("name", ["commitment_weight", "codebook_weight"])
@pytest.mark.parametrize("weight", [torch.nan, torch.inf, 1e39])
def test_weights_are_finite(name: str, weight: float) -> None:
    with pytest.raises(ValueError, match=f"{name} is .*finite"):
        vqtriton.vector_quantize(torch.randn(5, 2), torch.randn(3, 2), **{name: weight})


@pytest.mark.once
@pytest.mark.parametrize("enabled", [True, False])
def test_forward_derivatives_are_refused(enabled: bool) -> None:
    """And not left out, where gradients are off."""
    x, codebook = torch.randn(5, 2), torch.randn(3, 2)
    with torch.autograd.forward_ad.dual_level(), torch.set_grad_enabled(enabled):
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(RuntimeError, match="jvp"):
            vqtriton.vector_quantize(dual, codebook)


@pytest.mark.once
def test_sparse_tensors_are_named() -> None:
    dense = torch.randn(5, 2)
    with pytest.raises(TypeError, match="x has the layout"):
        vqtriton.nearest_code(dense.to_sparse(), dense)
    with pytest.raises(TypeError, match="codebook has the layout"):
        vqtriton.nearest_code(dense, dense.to_sparse())


@on_every_backend
@pytest.mark.parametrize("rows", [0, 7])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_nothing_to_quantize_costs_nothing(backend: Backend, rows: int, reduction: str) -> None:
    x, codebook = leaves(torch.randn(rows, 5), torch.randn(9, 5))
    out = vqtriton.vector_quantize(
        x.to(backend.device),
        codebook.to(backend.device),
        mask=torch.zeros(rows, dtype=torch.bool, device=backend.device),
        reduction=reduction,
        backend=backend.name,
    )
    out.loss.backward()
    assert out.loss == 0
    assert (x.grad == 0).all()
    assert (codebook.grad == 0).all()


@on_every_backend
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_one_bad_row_is_one_bad_row(backend: Backend, bad: float) -> None:
    clean, codebook = torch.randn(128, 16), torch.randn(9, 16)
    spoiled = clean.clone()
    spoiled[17, 3] = bad
    outs, grads = [], []
    for x in (clean, spoiled):
        leaf_x, leaf_codebook = leaves(x, codebook)
        out = vqtriton.vector_quantize(
            leaf_x.to(backend.device),
            leaf_codebook.to(backend.device),
            reduction="none",
            backend=backend.name,
        )
        outs.append([t.cpu() for t in out])
        grads.append(torch.autograd.grad(out.loss.sum(), (leaf_x, leaf_codebook)))
    others = torch.arange(128) != 17
    for got, want in zip(outs[1], outs[0], strict=True):
        assert torch.equal(got[others], want[others])
    assert outs[1][1][17] == 0
    assert outs[1][2][17].isnan()
    assert torch.equal(grads[1][0][others], grads[0][0][others])
    # the codebook's gradient is that of the other rows
    leaf_x, leaf_codebook = leaves(clean[others], codebook)
    out = vqtriton.reference.vector_quantize(leaf_x, leaf_codebook, reduction="sum")
    (want,) = torch.autograd.grad(out.loss, leaf_codebook)
    torch.testing.assert_close(grads[1][1], want)


@on_every_backend
def test_a_difference_of_halves_does_not_overflow(backend: Backend) -> None:
    x, codebook = leaves(torch.tensor([[40000.0]]).half(), torch.tensor([[-40000.0]]).half())
    out = vqtriton.vector_quantize(
        x.to(backend.device), codebook.to(backend.device), backend=backend.name
    )
    out.loss.backward()
    assert out.loss == 1.25 * 80000.0**2
    assert x.grad.item() == 0.5 * 80000
    # 2 · 80000 is more than a half holds, and shows
    assert codebook.grad.isinf().all()


@on_every_backend
def test_a_bad_gradient_is_not_hidden(backend: Backend) -> None:
    # a loss scaler looks for infinities in the gradients to tell that it must back off
    x, codebook = leaves(torch.randn(8, 4), torch.randn(3, 4))
    out = vqtriton.vector_quantize(
        x.to(backend.device), codebook.to(backend.device), backend=backend.name
    )
    (out.loss * torch.inf).backward()
    assert not x.grad.isfinite().all()
    assert not codebook.grad.isfinite().all()


@on_every_backend
def test_a_gradient_is_finite_where_its_parts_are(backend: Backend) -> None:
    # the sum of all of them would be beyond float32; of each code it is not
    codebook = torch.arange(40.0)[:, None] * 1e19
    leaf_x, leaf_codebook = leaves(codebook + 1e18, codebook)
    out = vqtriton.vector_quantize(
        leaf_x.to(backend.device),
        leaf_codebook.to(backend.device),
        reduction="sum",
        backend=backend.name,
    )
    (grad,) = torch.autograd.grad(out.loss * 3e19, leaf_codebook)
    want = 2 * 3e19 * (codebook.double() - leaf_x.detach().double())
    torch.testing.assert_close(grad.double(), want, rtol=1e-6, atol=0)


@on_every_backend
def test_double_backward_equals_the_reference(backend: Backend) -> None:
    x, codebook = torch.randn(20, 4), torch.randn(5, 4)
    v = torch.randn(20, 4), torch.randn(5, 4)
    results = []
    for function, device in (
        (vqtriton.vector_quantize, backend.device),
        (vqtriton.reference.vector_quantize, "cpu"),
    ):
        inputs = leaves(x, codebook)
        out = function(*(t.to(device) for t in inputs), backend=backend.name)
        objective = out.loss.square() + out.quantized.sin().sum()
        first = torch.autograd.grad(objective, inputs, create_graph=True)
        product = sum((g * u).sum() for g, u in zip(first, v, strict=True))
        results.append(torch.autograd.grad(product, inputs))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
    assert all(g.abs().sum() > 0 for g in results[0])


@pytest.mark.once
def test_gradcheck_in_float64() -> None:
    x, codebook = leaves(torch.randn(9, 3).double(), torch.randn(4, 3).double())
    # where the stop-gradients change nothing: β = 0 leaves the codebook's term, a constant x
    for vector_quantize in (vqtriton.vector_quantize, vqtriton.reference.vector_quantize):

        def codebook_term(codebook: Tensor, f=vector_quantize) -> Tensor:
            return f(x.detach(), codebook, commitment_weight=0.0).loss

        def commitment_term(x: Tensor, f=vector_quantize) -> Tensor:
            return f(x, codebook.detach(), codebook_weight=0.0, reduction="none").loss

        assert torch.autograd.gradcheck(codebook_term, codebook)
        assert torch.autograd.gradcheck(commitment_term, x)
        assert torch.autograd.gradgradcheck(codebook_term, codebook)
        assert torch.autograd.gradgradcheck(commitment_term, x)


@pytest.mark.once
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"mask": torch.ones(3, dtype=torch.bool)}, ValueError, r"mask has shape \(3,\)"),
        ({"mask": torch.ones(4)}, TypeError, "mask is a torch.float32 tensor"),
        ({"reduction": "avg"}, ValueError, "reduction is 'avg'"),
        ({"precision": None}, ValueError, "precision is None"),
        ({"commitment_weight": None}, TypeError, "commitment_weight is None"),
        ({"codebook_weight": "1"}, TypeError, "codebook_weight is '1'"),
    ],
)
def test_bad_input_is_named(options, error, message) -> None:
    with pytest.raises(error, match=message):
        vqtriton.vector_quantize(torch.zeros(4, 3), torch.zeros(2, 3), **options)
