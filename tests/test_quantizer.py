from __future__ import annotations

import copy

import pytest
import torch
from backends import Backend, on_every_backend, on_every_real_backend
from conftest import INTERPRETED
from torch import Tensor

import vqtriton
from vqtriton import VectorQuantize

pytestmark = pytest.mark.kernel


class Paper:
    """Appendix A.1 of the paper in float64, with the averaged sums that we do not keep."""

    def __init__(self, vq: VectorQuantize) -> None:
        self.vq = vq
        self.cluster_size = vq.cluster_size.double().cpu()
        self.embed_sum = vq.codebook.double().cpu() * self.cluster_size[:, None]

    def step(self, x: Tensor, indices: Tensor) -> dict[str, Tensor]:
        decay, x = self.vq.decay, x.double().cpu().reshape(-1, self.vq.dim)
        one_hot = torch.nn.functional.one_hot(indices.cpu().reshape(-1), self.vq.codebook_size)
        one_hot = one_hot.double()
        self.cluster_size = decay * self.cluster_size + (1 - decay) * one_hot.sum(0)
        self.embed_sum = decay * self.embed_sum + (1 - decay) * one_hot.T @ x
        codebook = self.embed_sum / self.cluster_size[:, None]
        # with a decay of 0, the paper has no average for a code that was not chosen
        codebook = codebook.where(self.cluster_size[:, None] > 0, self.vq.codebook.double().cpu())
        return {"cluster_size": self.cluster_size, "codebook": codebook}


@on_every_backend
@pytest.mark.parametrize("decay", [0.0, 0.5, 0.99, 1.0])
def test_ema_is_that_of_the_paper(backend: Backend, decay: float) -> None:
    vq = VectorQuantize(6, 10, decay=decay, backend=backend.name).to(backend.device)
    paper = Paper(vq)
    for _ in range(5):
        x = torch.randn(4, 9, 6, device=backend.device)
        before = vq.codebook.clone()
        out = vq(x)
        assert torch.equal(out.indices, vqtriton.reference.nearest_code(x, before))
        for name, value in paper.step(x, out.indices).items():
            got = getattr(vq, name).double().cpu()
            torch.testing.assert_close(got, value, rtol=1e-5, atol=1e-6)


@on_every_backend
def test_ema_loss_is_the_commitment_and_moves_no_code_by_gradient(backend: Backend) -> None:
    vq = VectorQuantize(6, 10, backend=backend.name).to(backend.device)
    assert list(vq.parameters()) == []
    x = torch.randn(40, 6, device=backend.device, requires_grad=True)
    codebook = vq.codebook.clone()
    out = vq(x)
    want = 0.25 * (x.detach() - codebook[out.indices]).square().mean()
    torch.testing.assert_close(out.loss, want)
    # the update has moved the codes; the gradient is that of the codes chosen from
    out.loss.backward()
    torch.testing.assert_close(x.grad, 0.5 / x.numel() * (x.detach() - codebook[out.indices]))


@on_every_backend
def test_gradient_codebook_learns_as_the_function_does(backend: Backend) -> None:
    vq = VectorQuantize(
        6, 10, codebook_update="gradient", codebook_weight=0.7, backend=backend.name
    ).to(backend.device)
    x = torch.randn(40, 6, device=backend.device)
    leaf = vq.codebook.detach().clone().requires_grad_()
    vq(x).loss.backward()
    vqtriton.vector_quantize(x, leaf, codebook_weight=0.7, backend=backend.name).loss.backward()
    assert torch.equal(vq.codebook.grad, leaf.grad)
    assert torch.equal(vq.codebook, leaf)


@on_every_backend
def test_eval_and_frozen_leave_everything_as_it_is(backend: Backend) -> None:
    for update in ("ema", "gradient"):
        vq = VectorQuantize(
            6,
            10,
            codebook_update=update,
            kmeans_init=True,
            threshold_ema_dead_code=5,
            backend=backend.name,
        ).to(backend.device)
        before = copy.deepcopy(vq.state_dict())
        x = torch.randn(40, 6, device=backend.device, requires_grad=True)
        with pytest.warns(UserWarning, match="no codes yet"):
            out = vq(x, freeze_codebook=True)
        out.loss.backward()
        assert vq.codebook.grad is None
        vq.eval()(x)
        assert all(torch.equal(before[name], value) for name, value in vq.state_dict().items())


@on_every_backend
def test_masked_rows_do_not_count(backend: Backend) -> None:
    torch.manual_seed(3)
    masked = VectorQuantize(6, 10, backend=backend.name).to(backend.device)
    few = copy.deepcopy(masked)
    x = torch.randn(5, 8, 6, device=backend.device)
    mask = torch.rand(5, 8, device=backend.device) > 0.5
    x[~mask] = torch.nan
    out, want = masked(x, mask=mask), few(x[mask])
    assert torch.equal(out.indices[mask], want.indices)
    torch.testing.assert_close(out.loss, want.loss)
    torch.testing.assert_close(masked.state_dict(), few.state_dict())


@on_every_backend
@pytest.mark.parametrize("shape", [(0, 6), (8, 6)])
@pytest.mark.parametrize("decay", [0.0, 0.99])
def test_a_batch_without_rows_is_no_step(
    backend: Backend, shape: tuple[int, int], decay: float
) -> None:
    vq = VectorQuantize(6, 10, decay=decay, threshold_ema_dead_code=2, backend=backend.name)
    vq.to(backend.device)
    vq(torch.randn(50, 6, device=backend.device))
    before = copy.deepcopy(vq.state_dict())
    mask = torch.zeros(shape[0], dtype=torch.bool, device=backend.device)
    for _ in range(3):
        out = vq(torch.randn(shape, device=backend.device), mask=mask)
        assert out.loss == 0
    for name, value in vq.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=1e-6, atol=0)


@on_every_backend
@pytest.mark.parametrize("decay", [0.0, 0.99])
def test_an_unused_code_stays(backend: Backend, decay: float) -> None:
    """However long: bit for bit, whatever has become of its cluster size."""
    vq = VectorQuantize(6, 10, decay=decay, backend=backend.name).to(backend.device)
    before = vq.codebook.clone()
    x = torch.full((3, 6), 5.0, device=backend.device)
    used = vq(x).indices[0]
    for _ in range(5 if INTERPRETED else 2000):
        assert (vq(x).indices == used).all()
    unused = torch.arange(10, device=backend.device) != used
    assert torch.equal(vq.codebook[unused], before[unused])
    assert (vq.codebook[used] - x[0]).abs().max() < (4.5 if INTERPRETED else 1e-3)


@on_every_backend
@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_a_bad_row_never_reaches_the_codebook(backend: Backend, update: str) -> None:
    torch.manual_seed(5)
    vq = VectorQuantize(
        6, 10, codebook_update=update, threshold_ema_dead_code=0.5, backend=backend.name
    ).to(backend.device)
    without = copy.deepcopy(vq)
    for step in range(5):
        x = torch.randn(40, 6, device=backend.device)
        keep = torch.ones(40, dtype=torch.bool, device=backend.device)
        bad = {1: torch.nan, 3: torch.inf}.get(step)
        if bad:
            x[17, 2] = bad
            keep[17] = False
        # the same random draws for both
        torch.manual_seed(step)
        out = vq(x)
        torch.manual_seed(step)
        without(x, mask=keep)
        assert out.loss.isfinite() == (bad is None)
        for module in (vq, without):
            if module.codebook.requires_grad:
                loss = module(x, mask=keep, freeze_codebook=False).loss
                (grad,) = torch.autograd.grad(loss, module.codebook)
                assert grad.isfinite().all()
    for name, value in vq.state_dict().items():
        assert value.isfinite().all()
        torch.testing.assert_close(value, without.state_dict()[name], rtol=1e-5, atol=1e-6)


@on_every_backend
@pytest.mark.parametrize("cast", ["half", "bfloat16", *([] if INTERPRETED else ["double"])])
def test_statistics_stay_float32(backend: Backend, cast: str) -> None:
    if cast == "double" and backend.name == "triton":
        pytest.skip("the kernels take no float64")
    vq = VectorQuantize(6, 10, decay=0.9, backend=backend.name).to(backend.device)
    plain = copy.deepcopy(vq)
    # from inside a model as well as directly
    getattr(torch.nn.Sequential(vq), cast)()
    for _ in range(5 if INTERPRETED else 300):
        x = getattr(torch.randn(64, 6, device=backend.device), cast)()
        out = vq(x)
        plain(x)
        assert out.quantized.dtype == x.dtype
    for name, value in vq.state_dict().items():
        assert value.dtype in (torch.float32, torch.bool)
        assert torch.equal(value, plain.state_dict()[name])


@on_every_backend
def test_kmeans_init_starts_from_the_first_batch(backend: Backend) -> None:
    centres = 10 * torch.randn(7, 6)
    x = (centres[torch.arange(140) % 7] + 0.01 * torch.randn(140, 6)).to(backend.device)
    vq = VectorQuantize(6, 30, kmeans_init=True, decay=0.5, backend=backend.name)
    vq.to(backend.device)
    # a batch with nothing in it decides nothing
    vq(x, mask=torch.zeros(140, dtype=torch.bool, device=backend.device))
    assert not vq.is_initialized
    spoiled = x.clone()
    spoiled[0] = torch.nan
    vq(spoiled)
    assert vq.is_initialized
    assert vqtriton.metrics.quantization_error(x, vq.eval()(x).quantized) < 0.1
    # the second batch does not start again
    codebook = vq.codebook.clone()
    vq.train()(x + 100)
    assert (vq.codebook - codebook).abs().max() > 0
    assert (vq.codebook[vq.cluster_size > 0].mean() - x.mean()).abs() < 60


@on_every_backend
def test_averages_after_kmeans_are_those_of_the_clusters(backend: Backend) -> None:
    centres = 10 * torch.randn(7, 6)
    x = (centres[torch.arange(140) % 7 // 2] + 0.01 * torch.randn(140, 6)).to(backend.device)
    # a decay of 1 changes nothing of it in the step itself
    vq = VectorQuantize(6, 4, kmeans_init=True, kmeans_iters=30, decay=1.0, backend=backend.name)
    vq.to(backend.device)
    vq(x)
    counts = torch.bincount(vq.eval()(x).indices, minlength=4)
    assert torch.equal(vq.cluster_size, counts.float())


@on_every_backend
def test_an_overflow_leaves_no_average_infinite(backend: Backend) -> None:
    """Finite rows whose sum overflows."""
    vq = VectorQuantize(3, 4, decay=0.5, backend=backend.name).to(backend.device)
    x = torch.randn(20, 3, device=backend.device)
    spoiled = x.clone()
    spoiled[:4] = torch.tensor([3e38, -3e38, 1.0])
    vq(spoiled)
    for _ in range(8 if INTERPRETED else 200):
        assert all(value.isfinite().all() for value in vq.state_dict().values())
        vq(x)


@pytest.mark.once
def test_a_start_whose_sums_overflow_is_finite() -> None:
    vq = VectorQuantize(2, 2, kmeans_init=True)
    for _ in range(3):
        vq(torch.cat([torch.full((40, 2), 1e37), torch.full((40, 2), -1e37)]))
        assert all(value.isfinite().all() for value in vq.state_dict().values())


@on_every_backend
@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_dead_codes_come_back(backend: Backend, update: str) -> None:
    n, size, steps = (60, 12, 6) if INTERPRETED else (200, 32, 20)
    x = torch.randn(n, 6, device=backend.device) + 50
    used = {}
    for threshold in (0, 1):
        torch.manual_seed(0)
        vq = VectorQuantize(
            6,
            size,
            codebook_update=update,
            decay=0.8,
            threshold_ema_dead_code=threshold,
            backend=backend.name,
        ).to(backend.device)
        for _ in range(steps):
            vq(x)
        used[threshold] = vq.eval()(x).indices.unique().numel()
    assert used[0] < size / 4
    assert used[1] > size * 5 / 8


@on_every_backend
def test_a_threshold_that_is_not_below_the_even_share_is_said(backend: Backend) -> None:
    x = torch.randn(25, 6, device=backend.device)
    warned = r"threshold_ema_dead_code is 5, .* only 2.5 rows per code .* is 0.25 to 1"

    def quantizer(threshold: float) -> VectorQuantize:
        vq = VectorQuantize(6, 10, threshold_ema_dead_code=threshold, backend=backend.name)
        return vq.to(backend.device)

    # below it, without learning, and where more rows are to come, nothing is said
    quantizer(2.4)(x)
    with pytest.warns(UserWarning, match=r"threshold_ema_dead_code is 2.5, .* only 2.5 rows"):
        quantizer(2.5)(x)
    vq = quantizer(5)
    vq.eval()(x)
    vq.train()(x, freeze_codebook=True)
    with vq.accumulate():
        vq(x)
    vq(x)
    # once for a value
    with pytest.warns(UserWarning, match=warned) as caught:
        vq(x)
    assert caught[0].filename == __file__
    vq(x)
    vq(x[:3])
    vq.threshold_ema_dead_code = 2
    vq(x)
    vq.threshold_ema_dead_code = 5
    with pytest.warns(UserWarning, match=warned):
        vq(x)


@pytest.mark.filterwarnings("ignore:threshold_ema_dead_code is")
@on_every_backend
def test_revived_codes_are_rows_of_the_batch(backend: Backend) -> None:
    vq = VectorQuantize(6, 8, decay=0.0, threshold_ema_dead_code=1, backend=backend.name)
    vq.to(backend.device)
    x = torch.randn(5, 6, device=backend.device)
    x[3] = torch.nan
    mask = torch.tensor([True, True, True, True, False], device=backend.device)
    out = vq(x, mask=mask)
    dead = ~torch.isin(torch.arange(8, device=backend.device), out.indices[:3])
    is_row = (vq.codebook[:, None] == x[None, :3]).all(-1).any(1)
    assert is_row[dead].all()
    assert dead.sum() >= 5
    # and each of the rows is used before any is used twice
    assert vq.codebook[dead].unique(dim=0).shape[0] == 3


@on_every_backend
@pytest.mark.parametrize("layout", ["image", "channel first", "sequence"])
def test_layouts(backend: Backend, layout: str) -> None:
    options = {
        "image": {"accept_image_fmap": True},
        "channel first": {"channel_last": False},
        "sequence": {},
    }[layout]
    vq = VectorQuantize(6, 10, backend=backend.name, **options).to(backend.device).eval()
    last = torch.randn(2, 3, 5, 6) if layout == "image" else torch.randn(2, 15, 6)
    last = last.to(backend.device)
    x = last if layout == "sequence" else last.movedim(-1, 1)
    mask = torch.rand(last.shape[:-1], device=backend.device) > 0.3
    out = vq(x.contiguous(), mask=mask)
    want = vqtriton.vector_quantize(last, vq.codebook, mask=mask, codebook_weight=0.0)
    assert out.quantized.shape == x.shape
    assert torch.equal(out.indices, want.indices)
    moved = out.quantized if layout == "sequence" else out.quantized.movedim(1, -1)
    assert torch.equal(moved, want.quantized)
    assert torch.equal(vq.get_output_from_indices(out.indices), out.quantized)
    assert torch.equal(vq.get_codes_from_indices(out.indices), want.quantized)


@on_every_backend
def test_state_dict_round_trip(backend: Backend) -> None:
    x = torch.randn(40, 6, device=backend.device)
    vq = VectorQuantize(6, 10, kmeans_init=True, backend=backend.name).to(backend.device)
    vq(x)
    other = VectorQuantize(6, 10, kmeans_init=True, backend=backend.name).to(backend.device)
    other.load_state_dict(vq.state_dict())
    # what was loaded is not initialised again
    for module in (vq, other):
        module(x + 1)
    torch.testing.assert_close(other.state_dict(), vq.state_dict(), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:threshold_ema_dead_code is")
@on_every_real_backend
@pytest.mark.parametrize("threshold", [3] if INTERPRETED else [0, 3])
@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_a_training_step_compiles_as_one_graph(
    backend: Backend, update: str, threshold: float
) -> None:
    eager = VectorQuantize(
        6, 10, codebook_update=update, threshold_ema_dead_code=threshold, backend=backend.name
    ).to(backend.device)
    compiled = copy.deepcopy(eager)
    step = torch.compile(compiled, fullgraph=True)
    for n in (16, 24, 40):
        x = torch.randn(n, 6, device=backend.device)
        grads = []
        for function in (eager, step):
            leaf = x.clone().requires_grad_()
            out = function(leaf)
            (out.loss + out.quantized.square().sum()).backward()
            grads.append([leaf.grad])
            codebook = eager.codebook if function is eager else compiled.codebook
            if codebook.requires_grad:
                grads[-1].append(codebook.grad)
                codebook.grad = None
        torch.testing.assert_close(*grads)
        if threshold:
            # the compiler draws other random rows
            compiled.load_state_dict(eager.state_dict())
    torch.testing.assert_close(compiled.state_dict(), eager.state_dict())


@pytest.mark.once
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"dim": 0}, ValueError, "dim is 0"),
        ({"dim": 2.0}, TypeError, "dim is 2.0"),
        ({"codebook_size": -1}, ValueError, "codebook_size is -1"),
        ({"codebook_update": "adam"}, ValueError, "codebook_update is 'adam'"),
        ({"decay": 1.5}, ValueError, "decay is 1.5"),
        ({"decay": float("nan")}, ValueError, "decay is nan"),
        ({"kmeans_iters": -1}, ValueError, "kmeans_iters is -1"),
        ({"reduction": "avg"}, ValueError, "reduction is 'avg'"),
        ({"commitment_weight": -1}, ValueError, "commitment_weight is -1"),
        ({"precision": "half"}, ValueError, "precision is 'half'"),
        ({"backend": "gpu"}, ValueError, "backend is 'gpu'"),
        ({"codebook_weight": float("inf")}, ValueError, "codebook_weight is inf"),
        # more than float32 holds
        ({"codebook_weight": 1e39}, ValueError, "codebook_weight is 1e"),
        ({"threshold_ema_dead_code": 1e39}, ValueError, "threshold_ema_dead_code is 1e"),
        ({"commitment_weight": 1e300}, ValueError, "commitment_weight is 1e"),
        ({"kmeans_iters": 2.5}, TypeError, "kmeans_iters is 2.5"),
        ({"kmeans_init": "no"}, TypeError, "kmeans_init is 'no'"),
        ({"sync_codebook": 1}, TypeError, "sync_codebook is 1"),
    ],
)
def test_bad_options_are_named(options, error, message) -> None:
    with pytest.raises(error, match=message):
        VectorQuantize(**{"dim": 4, "codebook_size": 8, **options})


@on_every_backend
@pytest.mark.parametrize("iters", [0, 3])
def test_kmeans_init_waits_for_rows(backend: Backend, iters: int) -> None:
    vq = VectorQuantize(6, 10, kmeans_init=True, kmeans_iters=iters, backend=backend.name)
    vq.to(backend.device)
    vq(torch.full((5, 6), torch.nan, device=backend.device))
    assert not vq.is_initialized
    x = torch.randn(40, 6, device=backend.device)
    vq(x)
    assert vq.is_initialized
    assert (vq.codebook - x.mean(0)).abs().max() > 0.5


@pytest.mark.once
@pytest.mark.parametrize("mask", [torch.zeros(30).long(), torch.ones(29) > 0])
def test_a_refused_call_changes_nothing(mask) -> None:
    vq = VectorQuantize(4, 8, kmeans_init=True)
    before = copy.deepcopy(vq.state_dict())
    with pytest.raises((TypeError, ValueError), match="mask"):
        vq(torch.randn(30, 4), mask=mask)
    assert all(torch.equal(before[name], value) for name, value in vq.state_dict().items())


@pytest.mark.once
def test_can_be_subclassed(tmp_path) -> None:
    class Small(VectorQuantize):
        def __init__(self, dim: int, *, extra: int = 1) -> None:
            super().__init__(dim, 8)
            self.extra = extra

    small = Small(4, extra=2)
    assert small(torch.randn(5, 4)).indices.shape == (5,)
    assert small.config["codebook_size"] == 8
    with pytest.raises(TypeError, match="vq is a Small"):
        vqtriton.save(small, tmp_path / "small")


@pytest.mark.once
def test_bad_input_is_named() -> None:
    vq = VectorQuantize(4, 8, accept_image_fmap=True)
    with pytest.raises(ValueError, match=r"x has shape \(2, 5, 3, 3\); it must be \[B, D, H, W\]"):
        vq(torch.zeros(2, 5, 3, 3))
    with pytest.raises(ValueError, match=r"mask has shape \(2, 3\)"):
        vq(torch.zeros(2, 4, 3, 3), mask=torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(TypeError, match="x is a list"):
        vq([1.0])
    with pytest.raises(IndexError, match="indices has values from 0 to 8"):
        vq.get_codes_from_indices(torch.tensor([0, 8]))
    with pytest.raises(TypeError, match=r"indices is torch.float32"):
        vq.get_codes_from_indices(torch.zeros(3))


@pytest.mark.once
def test_config_names_every_option() -> None:
    import inspect

    vq = VectorQuantize(4, 8, decay=0.5, codebook_update="gradient", reduction="sum")
    assert vq.config.keys() == inspect.signature(VectorQuantize).parameters.keys()
    assert VectorQuantize(**vq.config).config == vq.config
    assert "decay=0.5" in repr(vq)


@on_every_backend
def test_a_step_that_revives_can_be_differentiated_twice(backend: Backend) -> None:
    """By the codes as they were, as where nothing is revived."""
    x, scale = torch.randn(40, 8), torch.tensor(1.5)
    first = VectorQuantize(8, 5, codebook_update="gradient", backend=backend.name)
    results = []
    for threshold in (0.0, 0.5):
        vq = copy.deepcopy(first).to(backend.device)
        vq.threshold_ema_dead_code = threshold
        leaves = [t.clone().to(backend.device).requires_grad_() for t in (x, scale)]
        leaves.append(vq.codebook)
        quantized, _, loss = vq(leaves[0])
        objective = loss * leaves[1] + quantized.square().sum()
        grads = torch.autograd.grad(objective, leaves, create_graph=True)
        penalty = sum(grad.square().sum() for grad in grads) + objective
        results.append(torch.autograd.grad(penalty, leaves))
    torch.testing.assert_close(*results)
    assert results[0][2].abs().max() > 0
