"""`vqtriton.vector_quantize_pytorch`: conventions of that project, arguments that are refused."""

from __future__ import annotations

import copy
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import vqtriton
from vqtriton import vector_quantize_pytorch as compat
from vqtriton.vector_quantize_pytorch import GroupedResidualVQ, ResidualVQ, VectorQuantize

D, K, Q = 6, 10, 3
LEARNS = {"learnable_codebook": True, "ema_update": False}


def levels(**options: Any) -> ResidualVQ:
    return ResidualVQ(**{"dim": D, "codebook_size": K, "num_quantizers": Q, **options})


def groups(**options: Any) -> GroupedResidualVQ:
    sizes = {"dim": D, "codebook_size": K, "num_quantizers": Q, "groups": 2}
    return GroupedResidualVQ(**{**sizes, **options})


def one(**options: Any) -> VectorQuantize:
    return VectorQuantize(**{"dim": D, "codebook_size": K, **options})


MAKERS = [one, levels, groups]


# --- defaults and arguments ---


def test_defaults_are_theirs():
    vq = one()
    assert (vq.decay, vq.commitment_weight, vq.eps) == (0.8, 1.0, 1e-5)
    assert (vq.rotation_trick, VectorQuantize(1, K).rotation_trick) == (True, False)
    assert levels().rotation_trick
    assert not levels(codebook_dim=1).rotation_trick
    assert (vq.codebook_update, one(**LEARNS).codebook_update) == ("ema", "gradient")
    assert isinstance(vq, vqtriton.VectorQuantize)
    assert isinstance(levels(), vqtriton.ResidualVectorQuantize)
    assert isinstance(groups(), vqtriton.GroupedResidualVectorQuantize)


@pytest.mark.parametrize("cosine", [False, True])
def test_codes_start_as_theirs(cosine):
    """By kaiming_uniform_ of [1, K, D], and of length 1 with cosine similarity."""
    want = torch.empty(1, 200, 8)
    nn.init.kaiming_uniform_(want)
    bound = (6 / (200 * 8)) ** 0.5
    rvq = ResidualVQ(dim=8, codebook_size=200, num_quantizers=2, use_cosine_sim=cosine)
    vq = VectorQuantize(8, 200, use_cosine_sim=cosine)
    for codes in (vq.codebook, rvq.layers[0].codebook, rvq.layers[1].codebook):
        if cosine:
            torch.testing.assert_close(codes.norm(dim=-1), torch.ones(200))
        else:
            # 1600 of them come within a hundredth of the bound, but not past it
            assert bound * 0.99 < codes.abs().max() <= bound
            assert bound * 0.99 < want.abs().max() <= bound
    assert not torch.equal(rvq.layers[0].codebook, rvq.layers[1].codebook)


def test_arguments_by_their_places():
    names = list(inspect.signature(VectorQuantize).parameters)
    assert names[:9] == [
        *("dim", "codebook_size", "codebook_dim", "heads", "separate_codebook_per_head"),
        *("decay", "eps", "freeze_codebook", "kmeans_init"),
    ]
    vq = VectorQuantize(D, K, 4, 2, True, 0.5)
    assert vq.codebook.shape == (2, K, 4)
    assert vq.decay == 0.5
    # not divided by the heads
    assert one(heads=2).project_in.weight.shape == (2 * D, D)
    names = list(inspect.signature(VectorQuantize.forward).parameters)
    assert names[1:5] == ["x", "indices", "mask", "lens"]


def other_than(default: Any) -> Any:
    """A value that an argument with that default may have."""
    if default is None or default == {}:
        return 3
    return not default if isinstance(default, bool) else default + 1


@pytest.mark.parametrize("name", compat.NOT_HERE)
def test_an_argument_that_is_not_here_is_named(name):
    default, advice = compat.NOT_HERE[name]
    for make in MAKERS:
        make(**{name: default})
        with pytest.raises(ValueError, match=rf"^{name} is .*{re.escape(advice)}.*vqtriton.patch"):
            make(**{name: other_than(default)})


@pytest.mark.parametrize("name", compat.NOT_HERE_IN_RESIDUAL)
def test_an_argument_that_levels_do_not_have_is_named(name):
    default, advice = compat.NOT_HERE_IN_RESIDUAL[name]
    for make in (levels, groups):
        make(**{name: default})
        with pytest.raises(ValueError, match=rf"^{name} is .*{re.escape(advice)}"):
            make(**{name: other_than(default)})


def test_what_forward_does_not_have_is_named():
    x, found = torch.randn(2, 5, D), set()
    for make in MAKERS:
        module = make()
        names = inspect.signature(module.forward).parameters.keys()
        for name in names & compat.NOT_HERE_IN_FORWARD.keys():
            found.add(name)
            for value in (2, torch.zeros(2, 5, dtype=torch.int64)):
                with pytest.raises(ValueError, match=rf"^{name} is .*which is not here"):
                    module(x, **{name: value})
    assert found == set(compat.NOT_HERE_IN_FORWARD)


def test_every_argument_is_on_the_page():
    page = (Path(__file__).parents[1] / "docs" / "vector-quantize-pytorch.md").read_text("utf-8")
    tables = "".join(line for line in page.splitlines() if line.startswith("|"))
    names = {*compat.NOT_HERE, *compat.NOT_HERE_IN_RESIDUAL, *compat.NOT_HERE_IN_FORWARD}
    for make in MAKERS:
        kind = type(make())
        for function in (kind, kind.forward):
            names |= inspect.signature(function).parameters.keys()
    # an argument of vqtriton, or a name that stands for several
    names -= {"self", "precision", "backend", "not_here", "others", "options"}
    assert not [name for name in names if f"`{name}`" not in tables]


def test_other_arguments_are_refused():
    for make in MAKERS:
        with pytest.raises(TypeError, match="codebook_update is not an argument of vector-q"):
            make(codebook_update="ema")
        with pytest.raises(ValueError, match=r"sync_kmeans is False; .*sync_codebook=False"):
            make(sync_kmeans=False)
        with pytest.raises(ValueError, match="learnable_codebook is True; it needs ema_update=Fa"):
            make(learnable_codebook=True)
        with pytest.raises(ValueError, match=r"learnable_codebook is True; .*use_cosine_sim"):
            make(use_cosine_sim=True, **LEARNS)
        with pytest.raises(ValueError, match=r"ema_update is False.*threshold_ema_dead_code \(2\)"):
            make(ema_update=False, threshold_ema_dead_code=2)
        with pytest.raises(TypeError, match="decay is '0'"):
            make(decay="0")
    with pytest.raises(ValueError, match="ema_update is given"):
        one(**LEARNS)(torch.randn(5, D), ema_update=True)
    with pytest.raises(ValueError, match="ema_update_weight is given"):
        one(**LEARNS)(torch.randn(5, D), ema_update_weight=torch.ones(K))


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"codebook_dim": 2, "decay": 0.5, "eps": 1e-3, "freeze_codebook": True},
        {**LEARNS, "rotation_trick": False, "commitment_weight": 0.5, "channel_last": False},
        {"ema_update": False, "return_zeros_for_masked_padding": False, "backend": "torch"},
    ],
)
def test_the_configuration_builds_it_again(make, options):
    module = make(**options)
    again = type(module).from_config(module.config)
    assert again.config == module.config
    assert {**module.config, **options} == module.config
    again.load_state_dict(module.state_dict())
    assert (
        again.frozen
        == module.frozen
        == (options.get("ema_update") is False and not LEARNS.keys() <= options.keys())
    )
    assert repr(again) == repr(module)


# --- losses and gradients ---


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("options", [{}, LEARNS])
def test_eval_has_no_loss_and_no_gradient(make, options):
    module = make(**options).eval()
    x = torch.randn(2, 5, D, requires_grad=True)
    before = copy.deepcopy(module.state_dict())
    quantized, indices, loss = module(x)
    shape = {one: (), levels: (Q,), groups: (2, Q)}[make]
    assert loss.shape == shape
    assert not loss.any()
    assert not loss.requires_grad
    assert not quantized.requires_grad
    torch.testing.assert_close(quantized, module.get_output_from_indices(indices))
    assert all(torch.equal(t, before[name]) for name, t in module.state_dict().items())
    # in training mode there is one, of that shape
    loss = module.train()(x).loss
    assert loss.shape == shape
    assert (loss > 0).all()


def test_the_loss_of_learnable_codes_is_counted_once():
    """commitment_weight·mse(quantized, x), with gradients to both sides."""
    vq, x = one(**LEARNS, commitment_weight=0.5), torch.randn(40, D, requires_grad=True)
    indices, loss = vq(x)[1:]
    want = 0.5 * F.mse_loss(vq.codebook[indices], x)
    assert torch.equal(loss.detach(), vq.commitment_weight * loss.detach() / 0.5)
    torch.testing.assert_close(loss, want)
    mine = torch.autograd.grad(loss, [x, vq.codebook])
    for grad, wanted in zip(mine, torch.autograd.grad(want, [x, vq.codebook]), strict=True):
        torch.testing.assert_close(grad, wanted)
    held = vq(x, freeze_codebook=True)[2]
    torch.testing.assert_close(held, want)
    assert torch.autograd.grad(held, vq.codebook, allow_unused=True) == (None,)


def test_the_parts_of_the_loss():
    vq, x = one(commitment_weight=0.25), torch.randn(40, D)
    *_, loss, parts = vq(x, return_loss_breakdown=True)
    torch.testing.assert_close(parts.commitment, loss / 0.25)
    assert not any(parts[1:])
    *_, loss, parts = one(commitment_weight=0.0)(x, return_loss_breakdown=True)
    assert not loss.any()
    assert not parts.commitment.any()


@pytest.mark.parametrize("frac", [0.0, 0.25])
@pytest.mark.parametrize("options", [{}, {"use_cosine_sim": True}, LEARNS])
def test_each_level_passes_its_gradient_on(frac, options):
    """Straight through, x gets Σ_q (1 - quant_grad_frac)^q times the gradient of the output."""
    rvq = levels(rotation_trick=False, quant_grad_frac=frac, commitment_weight=0.0, **options)
    x, weights = torch.randn(2, 7, D, requires_grad=True), torch.randn(2, 7, D)
    mask = torch.rand(2, 7) < 0.7
    quantized = rvq(x, mask=mask).quantized
    grad = torch.autograd.grad((quantized * weights).sum(), x)[0]
    if not options.get("use_cosine_sim"):
        total = sum((1 - frac) ** level for level in range(Q))
        torch.testing.assert_close(grad, total * weights * mask[..., None])
    assert not grad[~mask].any()
    assert grad[mask].all()


def test_each_level_rotates():
    """What they compute, from the rotation of `vqtriton.VectorQuantize`."""
    rvq, x = levels(commitment_weight=0.0), torch.randn(9, D, requires_grad=True)
    weights, codebooks = torch.randn(9, D), rvq.codebooks.clone()
    quantized, indices, _ = rvq(x)
    (grad,) = torch.autograd.grad((quantized * weights).sum(), x)
    residual, want = x.detach(), torch.zeros(9, D)
    for level, codes in enumerate(codebooks):
        vq = vqtriton.VectorQuantize(D, K, rotation_trick=True, commitment_weight=0.0)
        vq.set_codebook(codes)
        given = residual.clone().requires_grad_()
        found = vq.eval()(given)
        assert torch.equal(found.indices, indices[:, level])
        want = want + torch.autograd.grad((found.quantized * weights).sum(), given)[0]
        residual = residual - found.quantized.detach()
    torch.testing.assert_close(grad, want)


# --- layouts, masks, frozen codes ---


def test_codes_come_in_the_layout_of_x():
    for options, shape in (
        ({"accept_image_fmap": True}, (2, D, 4, 5)),
        ({"accept_3d_fmap": True, "codebook_dim": 2}, (2, D, 2, 4, 5)),
        ({"channel_last": False, "heads": 2, "codebook_dim": 3}, (2, D, 7)),
        ({"heads": 2, "codebook_dim": 4, "separate_codebook_per_head": True}, (2, 7, D)),
    ):
        vq = one(**options).eval()
        quantized, indices, _ = vq(torch.randn(shape))
        codes = vq.get_codes_from_indices(indices)
        torch.testing.assert_close(vq.get_output_from_indices(indices), quantized)
        if vq.project_out is None and vq.heads == 1:
            assert torch.equal(codes, quantized)
        elif vq.heads == 1:
            assert codes.shape == (2, 2, *shape[2:])
        elif vq.separate_codebook_per_head:
            assert codes.shape == (2, 7, 8)
        else:
            # channels first, of each head
            assert codes.shape == (2, 3, 7, 2)


def test_codebooks_are_stacked_where_they_can_be():
    assert levels().codebooks.shape == (Q, K, D)
    assert [c.shape for c in levels(codebook_size=(4, 5), num_quantizers=None).codebooks] == [
        (4, D),
        (5, D),
    ]
    assert groups().codebooks.shape == (2, Q, K, D // 2)
    assert len(groups(codebook_size=(4, 5), num_quantizers=2).codebooks) == 2
    unit = levels(use_cosine_sim=True)
    unit(torch.randn(100, D))
    torch.testing.assert_close(unit.codebooks.norm(dim=-1), torch.ones(Q, K))


def test_codes_of_fewer_levels_are_padded():
    rvq, indices = levels(), torch.randint(K, (2, 5, 2))
    codes = rvq.get_codes_from_indices(indices)
    assert codes.shape == (Q, 2, 5, D)
    assert torch.equal(codes[1], rvq.codebooks[1][indices[..., 1]])
    assert not codes[2].any()
    assert torch.equal(rvq.get_output_from_indices(indices), codes.sum(0))
    *_, all_codes = rvq.eval()(torch.randn(2, 5, D), return_all_codes=True)
    assert all_codes.shape == (Q, 2, 5, D)
    with pytest.raises(ValueError, match="indices has shape"):
        rvq.get_codes_from_indices(torch.randint(K, (2, Q + 1)))


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("is_given_back", [False, True])
@pytest.mark.parametrize("channels", ["last", "second"])
def test_masked_vectors_are_zeros_or_come_back(make, is_given_back, channels):
    options = {"return_zeros_for_masked_padding": not is_given_back}
    module = make(**options, channel_last=channels == "last", codebook_dim=2)
    x, mask = torch.randn(2, 7, D), torch.rand(2, 7) < 0.5
    given = x if channels == "last" else x.mT.contiguous()
    quantized, indices, _ = module(given, mask=mask)
    quantized = quantized if channels == "last" else quantized.mT
    assert torch.equal(quantized[~mask], x[~mask] if is_given_back else torch.zeros_like(x[~mask]))
    assert not torch.equal(quantized[mask], x[mask])
    first = indices.movedim(-1, 0)[0] if make is levels else indices
    first = indices[0, ..., 0] if make is groups else first
    assert torch.equal(first == -1, ~mask)


def test_lens_give_masked_vectors_back_as_well():
    vq = one(return_zeros_for_masked_padding=False, heads=2)
    x = torch.randn(2, 7, D)
    quantized, indices, _ = vq(x, lens=torch.tensor([7, 3]))
    assert torch.equal(quantized[1, 3:], x[1, 3:])
    assert (indices[1, 3:] == -1).all()


@pytest.mark.parametrize("make", MAKERS)
def test_codes_stay_where_they_are_to_stay(make):
    x = torch.randn(50, D, requires_grad=True)

    def changes(module: nn.Module, **arguments: Any) -> bool:
        before = copy.deepcopy(module.state_dict())
        module(x, **arguments)
        return any(not torch.equal(t, before[name]) for name, t in module.state_dict().items())

    assert changes(make())
    assert not changes(make(), freeze_codebook=True)
    assert not changes(make(freeze_codebook=True))
    assert not changes(make(ema_update=False))
    if make is one:
        # the call decides
        assert changes(make(freeze_codebook=True), freeze_codebook=False)
        assert not changes(make(), ema_update=False)


# --- steps ---


def test_accumulated_statistics_make_one_step():
    vq = one()
    whole, parts = copy.deepcopy(vq), torch.randn(3, 20, D)
    before = vq.codebook.clone()
    for part in parts[:2]:
        vq(part, accum_ema_update=True)
        assert torch.equal(vq.codebook, before)
    vq(parts[2])
    whole(parts.flatten(0, 1))
    torch.testing.assert_close(vq.codebook, whole.codebook)
    torch.testing.assert_close(vq.cluster_size, whole.cluster_size)


@pytest.mark.parametrize("heads", [False, True])
def test_weights_of_a_step(heads):
    """0 keeps a code, 1 is the usual step, and between them the averages take a part of it."""
    options = {"heads": 2, "codebook_dim": 3, "separate_codebook_per_head": True} if heads else {}
    vq, x = one(**options), torch.randn(60, D)
    usual, codes, sizes = copy.deepcopy(vq), vq.codebook.clone(), vq.cluster_size.clone()
    usual(x)
    weights = torch.tensor([0.0, 1.0, 0.5]).repeat(4)[:K]
    vq(x, ema_update_weight=weights)
    wide = weights.expand(sizes.shape)
    assert torch.equal(vq.codebook[wide == 0], codes[wide == 0])
    torch.testing.assert_close(vq.codebook[wide == 1], usual.codebook[wide == 1])
    torch.testing.assert_close(vq.cluster_size, sizes.lerp(usual.cluster_size, wide))
    averages = (codes * sizes[..., None]).lerp(
        usual.codebook * usual.cluster_size[..., None], wide[..., None]
    )
    torch.testing.assert_close(vq.codebook * vq.cluster_size[..., None], averages)
    # the next step is the usual one
    again = copy.deepcopy(vq)
    assert torch.equal(vq(x)[1], again(x)[1])
    torch.testing.assert_close(vq.codebook, again.codebook)
    seen = []
    vq(x, ema_update_weight=lambda sums, counts: seen.append((sums, counts)) or weights)
    ((sums, counts),) = seen
    assert sums.shape == (1 + heads, K, 3 if heads else D)
    assert counts.shape == (1 + heads, K)
    assert counts.sum() == 60 * (1 + heads)


def test_weights_leave_dead_codes_to_be_replaced():
    torch.manual_seed(0)
    vq = one(threshold_ema_dead_code=1.0)
    codes = torch.full((K, D), 100.0)
    codes[0] = 0
    vq.set_codebook(codes, cluster_size=1.0)
    vq(torch.randn(60, D), ema_update_weight=torch.ones(K))
    assert (vq.codebook.abs() < 10).all()


def test_a_shared_codebook_makes_one_step_of_all_levels():
    rvq = levels(shared_codebook=True)
    x, before = torch.randn(40, D), rvq.layers[0].codebook.clone()
    indices = rvq(x).indices
    residual, sums, counts = x, torch.zeros(K, D), torch.zeros(K)
    for chosen in indices.unbind(-1):
        sums.index_add_(0, chosen, residual)
        counts += torch.bincount(chosen, minlength=K)
        residual = residual - before[chosen]
    sizes = 0.8 + 0.2 * counts
    want = (0.8 * before + 0.2 * sums) / sizes[:, None]
    torch.testing.assert_close(rvq.layers[0].cluster_size, sizes)
    torch.testing.assert_close(rvq.layers[0].codebook[counts > 0], want[counts > 0])


def test_dropped_levels():
    rvq = levels(quantize_dropout=True, quantize_dropout_cutoff_index=1)
    seen = set()
    for _ in range(20):
        _, indices, loss = rvq(torch.randn(5, D))
        used = int((indices[0] >= 0).sum())
        seen.add(used)
        assert (indices[:, used:] == -1).all()
        assert not loss[used:].any()
    assert seen == {2, 3}
    assert (rvq.eval()(torch.randn(5, D)).indices >= 0).all()
    assert rvq(torch.randn(5, D), num_quantizers=2).indices.shape == (5, 2)


# --- states ---


def tensors(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("options", [{}, {"codebook_dim": 2}, LEARNS, {"use_cosine_sim": True}])
def test_states_go_out_and_come_back(make, options):
    module = make(**options)
    module(torch.randn(60, D, requires_grad=True))
    state = vqtriton.to_vector_quantize_pytorch(module)
    assert all(tensor.dtype in (torch.float32, torch.bool) for tensor in state.values())
    again = make(**options)
    again.load_state_dict(state)
    for name, tensor in tensors(module).items():
        if options.get("use_cosine_sim"):
            # the smoothed size of theirs is in the lengths
            torch.testing.assert_close(again.state_dict()[name], tensor, rtol=1e-4, atol=1e-6)
        else:
            assert torch.equal(again.state_dict()[name], tensor), name


@pytest.mark.parametrize("make", MAKERS)
def test_a_pickle_goes_on(make, tmp_path):
    module = make()
    torch.save(module, tmp_path / "module.pt")
    loaded = torch.load(tmp_path / "module.pt", weights_only=False)
    x = torch.randn(30, D)
    torch.manual_seed(1)
    want = module(x)
    for mine, wanted in zip(loaded(x), want, strict=True):
        assert torch.equal(mine, wanted)


@pytest.mark.parametrize("make", MAKERS)
def test_it_is_not_saved_as_another_class(make, tmp_path):
    with pytest.raises(TypeError, match="it must be a VectorQuantize or a residual quantizer"):
        vqtriton.save(make(), tmp_path / "file")


@pytest.mark.parametrize("make", MAKERS)
def test_it_warms_up(make):
    module = make(quantize_dropout=True) if make is not one else make(heads=2)
    before = copy.deepcopy(module.state_dict())
    vqtriton.warmup(module, (2, 5, D), has_mask=True)
    assert all(torch.equal(t, before[name]) for name, t in module.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("options", [{}, LEARNS, {"use_cosine_sim": True}])
def test_it_compiles(make, options):
    results = []
    for is_compiled in (False, True):
        torch.manual_seed(0)
        module = make(**options)
        step = torch.compile(module, fullgraph=True, backend="aot_eager") if is_compiled else module
        x = torch.randn(30, D, requires_grad=True)
        quantized, indices, loss = step(x)
        (grad,) = torch.autograd.grad(quantized.square().sum() + loss.sum(), x)
        results.append([quantized, indices, loss, grad, *tensors(module).values()])
    for mine, wanted in zip(*results, strict=True):
        torch.testing.assert_close(mine, wanted)
