"""`vqtriton.vector_quantize_pytorch` beside vector-quantize-pytorch: same weights, same data."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from vqtriton import vector_quantize_pytorch as ours_of
from vqtriton.reference import normalized

theirs_of = pytest.importorskip("vector_quantize_pytorch")

D, K, Q = 8, 12, 3
# rounding of float32
UNIT = 2.0**-24
LEARNS = {"learnable_codebook": True, "ema_update": False}
PLAIN = {"rotation_trick": False}


def pair(kind: str, **options: Any) -> tuple[Any, Any]:
    """Theirs, and ours with its state."""
    options = {"dim": D, "codebook_size": K, **options}
    if kind != "VectorQuantize" and not isinstance(options["codebook_size"], tuple):
        options = {"num_quantizers": Q, **options}
    theirs, ours = getattr(theirs_of, kind)(**options), getattr(ours_of, kind)(**options)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def same(ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


VQ, RVQ, GROUPED = "VectorQuantize", "ResidualVQ", "GroupedResidualVQ"
HEADS = {"heads": 2, "codebook_dim": 4}
FIRST_STEPS = {
    "ema": (VQ, {}, {}),
    "straight through": (VQ, PLAIN, {}),
    "no commitment": (VQ, {"commitment_weight": 0.0}, {}),
    "weight": (VQ, {"commitment_weight": 0.25}, {}),
    "one dim": (VQ, {"dim": 1}, {}),
    "cosine": (VQ, {"use_cosine_sim": True}, {}),
    "learnable": (VQ, LEARNS, {}),
    "learnable, frozen": (VQ, LEARNS, {"freeze_codebook": True}),
    "frozen": (VQ, {"freeze_codebook": True}, {}),
    "heads": (VQ, {**HEADS, "separate_codebook_per_head": True}, {}),
    "heads of all": (VQ, {"heads": 2, "codebook_dim": D}, {}),
    "one codebook for the heads": (VQ, HEADS, {}),
    "projected": (VQ, {"codebook_dim": 3}, {}),
    "projected, learnable": (VQ, {"codebook_dim": 3, **LEARNS}, {}),
    "layernorm": (VQ, {"codebook_dim": 3, "layernorm_after_project_in": True}, {}),
    "projected, cosine": (VQ, {"codebook_dim": 3, "use_cosine_sim": True}, {}),
    "channels first": (VQ, {"channel_last": False, "codebook_dim": 3}, {}),
    "image": (VQ, {"accept_image_fmap": True, **HEADS, "separate_codebook_per_head": True}, {}),
    "video": (VQ, {"accept_3d_fmap": True}, {}),
    "mask": (VQ, {}, {"mask": True}),
    "mask, as given": (VQ, {"return_zeros_for_masked_padding": False}, {"mask": True}),
    "lens": (VQ, LEARNS, {"lens": True}),
    "breakdown": (VQ, {"commitment_weight": 0.25}, {"return_loss_breakdown": True}),
    "levels": (RVQ, {}, {}),
    "levels, straight through": (RVQ, PLAIN, {}),
    "levels, frac": (RVQ, {**PLAIN, "quant_grad_frac": 0.3}, {}),
    "levels, frac and rotation": (RVQ, {"quant_grad_frac": 0.3}, {}),
    "levels, cosine": (RVQ, {"use_cosine_sim": True}, {}),
    "levels, cosine, frac": (RVQ, {"use_cosine_sim": True, "quant_grad_frac": 0.3}, {}),
    "levels, shared": (RVQ, {"shared_codebook": True}, {}),
    "levels, sizes": (RVQ, {"codebook_size": (5, 12, 7)}, {}),
    "levels, learnable": (RVQ, LEARNS, {}),
    "levels, learnable, frac": (RVQ, {**LEARNS, "quant_grad_frac": 0.3}, {}),
    "levels, projected": (RVQ, {"codebook_dim": 3}, {}),
    "levels, mask": (RVQ, {}, {"mask": True}),
    "levels, mask, frac": (RVQ, {"quant_grad_frac": 0.5}, {"mask": True}),
    "levels, mask, as given": (
        RVQ,
        {**PLAIN, "return_zeros_for_masked_padding": False},
        {"mask": True},
    ),
    "levels, all codes": (RVQ, {}, {"return_all_codes": True}),
    "groups": (GROUPED, {"groups": 2}, {}),
    "groups, learnable, mask": (GROUPED, {"groups": 2, **LEARNS}, {"mask": True}),
}


SHAPES = {"image": (3, D, 5, 4), "video": (3, D, 2, 3, 4), "channels first": (3, D, 7)}


def case(name: str) -> tuple[Any, Any, Tensor, dict[str, Any]]:
    """Theirs, ours, x and the arguments of forward."""
    kind, options, arguments = FIRST_STEPS[name]
    torch.manual_seed(1)
    theirs, ours = pair(kind, **options)
    x = torch.randn(SHAPES.get(name, (3, 20, options.get("dim", D))))
    if arguments.get("mask"):
        arguments = {**arguments, "mask": torch.rand(3, 20) < 0.7}
    if arguments.get("lens"):
        arguments = {"lens": torch.tensor([20, 0, 7])}
    return theirs, ours, x, arguments


@pytest.mark.parametrize("name", FIRST_STEPS)
def test_the_first_step(name):
    """Results, gradients of x, of the codes and of the projections."""
    theirs, ours, x, arguments = case(name)
    weights, found = torch.randn(x.shape), []
    for module in (ours, theirs):
        given = x.clone().requires_grad_()
        quantized, indices, loss, *more = module(given, **arguments)
        ((quantized * weights).sum() + 3 * loss.sum()).backward()
        grads = {n.replace("_codebook.embed", "codebook"): p for n, p in module.named_parameters()}
        results = [quantized, indices, loss, given.grad]
        results += [part for whole in more for part in whole]
        found.append((results, {n: p.grad for n, p in grads.items()}))
    (mine, our_grads), (other, their_grads) = found
    assert len(mine) == len(other)
    for one, two in zip(mine, other, strict=True):
        same(one.detach(), two.detach())
    assert our_grads.keys() == their_grads.keys()
    for key, grad in our_grads.items():
        want = their_grads[key]
        if grad is None or want is None:
            # a frozen codebook gets none from either
            assert not any(g is not None and g.any() for g in (grad, want)), key
        else:
            same(grad, want.view(grad.shape))


@pytest.mark.parametrize("name", FIRST_STEPS)
def test_eval(name):
    theirs, ours, x, arguments = case(name)
    theirs.eval()
    ours.eval()
    x.requires_grad_()
    (mine, indices, loss, *more), other = ours(x, **arguments), theirs(x, **arguments)
    for one, two in zip((mine, indices, loss), other, strict=False):
        same(one, two)
    assert len(more) == len(other) - 3
    assert not loss.requires_grad
    if mine.requires_grad:
        # what project_out gives, or an input that was returned unchanged
        mine.sum().backward()
        assert x.grad is None or not x.grad[indices_of(indices)].any()
    codes, want = ours.get_codes_from_indices(indices), theirs.get_codes_from_indices(indices)
    if indices.min() >= 0:
        same(codes, want)


def indices_of(indices: Tensor) -> Tensor:
    return indices[..., 0] >= 0 if indices.ndim == 3 else indices >= 0


@pytest.mark.parametrize("kind", [VQ, RVQ, GROUPED])
def test_all_their_arguments_are_known(kind):
    """Those of ours have their places and defaults."""
    theirs, ours = getattr(theirs_of, kind), getattr(ours_of, kind)
    for mine, other, refused in (
        (ours, theirs, ours_of.NOT_HERE | ours_of.NOT_HERE_IN_RESIDUAL),
        (ours.forward, theirs.forward, ours_of.NOT_HERE_IN_FORWARD),
    ):
        mine, other = inspect.signature(mine).parameters, inspect.signature(other).parameters
        shared = [name for name in other if name in mine and name not in refused]
        assert shared == [name for name in mine if name in shared]
        for name, parameter in other.items():
            if parameter.kind is parameter.VAR_KEYWORD:
                continue
            # a group passes on what it does not have itself
            known = mine.get(name) or inspect.signature(ours_of.ResidualVQ).parameters.get(name)
            default = refused[name][0] if name in refused else known.default
            assert default == parameter.default, name


def test_codebooks():
    for options in ({}, {"use_cosine_sim": True}, {"codebook_size": (4, 5)}):
        theirs, ours = pair(RVQ, **options)
        if isinstance(theirs.codebooks, tuple):
            assert isinstance(ours.codebooks, tuple)
        for one, two in zip(ours.codebooks, theirs.codebooks, strict=True):
            same(one, two)
    theirs, ours = pair(GROUPED, groups=2)
    same(ours.codebooks, theirs.codebooks)


def test_fewer_levels_are_padded():
    theirs, ours = pair(RVQ, quantize_dropout=True)
    indices = torch.randint(K, (2, 5, 2))
    same(ours.get_codes_from_indices(indices), theirs.get_codes_from_indices(indices))
    same(ours.get_output_from_indices(indices), theirs.get_output_from_indices(indices))


@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize("heads", [{}, {**HEADS, "separate_codebook_per_head": True}])
def test_weights_and_accumulation_of_the_averages(cosine, heads):
    theirs, ours = pair(VQ, use_cosine_sim=cosine, eps=1e-8, **heads)
    weights = torch.rand(2, K) if heads else torch.rand(K)
    torch.manual_seed(2)
    for arguments in (
        {"ema_update_weight": weights},
        {
            "ema_update_weight": lambda sums, counts: (
                (counts > 3) * sums.square().mean(-1).clamp(max=1)
            )
        },
        {"accum_ema_update": True},
        {"accum_ema_update": True},
        {},
        {"ema_update": False},
    ):
        x = torch.randn(4, 50, D)
        for module in (ours, theirs):
            module.indices = module(x, **arguments)[1]
        assert torch.equal(ours.indices, theirs.indices)
        same(ours.cluster_size, theirs._codebook.cluster_size.view(ours.cluster_size.shape))
        codes = F.normalize(ours.codebook, dim=-1) if cosine else ours.codebook
        same(codes, theirs.codebook)


# --- fifty steps ---

ROWS, STEPS, DECAY, RATE, WEIGHT = 256, 50, 0.8, 5.0, 0.5
TRAINED = {
    "ema": (VQ, {}),
    "ema, their eps": (VQ, {"eps": 1e-5}),
    "cosine": (VQ, {"use_cosine_sim": True}),
    "heads": (VQ, {**HEADS, "separate_codebook_per_head": True}),
    "one codebook for the heads": (VQ, HEADS),
    "projected": (VQ, {"codebook_dim": 4}),
    "gradient": (VQ, LEARNS),
    "levels": (RVQ, {}),
    "levels, projected, straight through": (RVQ, {"codebook_dim": 4, **PLAIN}),
}


class Side:
    """One of the two. Its tensors are [H, K, d] codes, [H, N, d] vectors and [H, N] tokens."""

    def __init__(self, module: Any, is_ours: bool) -> None:
        self.module, self.is_ours = module, is_ours
        self.levels = [*module.layers] if hasattr(module, "layers") else [module]
        self.is_cosine = self.levels[0].use_cosine_sim
        self.is_separate = getattr(module, "separate_codebook_per_head", False)
        self.heads = getattr(module, "heads", 1)

    def codes(self, level: int) -> Tensor:
        layer = self.levels[level]
        codes = layer.codebook if self.is_ours else layer._codebook.embed
        codes = codes.detach().clone().reshape(-1, K, codes.shape[-1])
        return normalized(codes) if self.is_ours and self.is_cosine else codes

    def vectors(self, x: Tensor) -> Tensor:
        """What the first level searches the codes for."""
        project = self.module.project_in
        rows = (x if project is None else project(x)).detach().unflatten(-1, (self.heads, -1))
        rows = rows.movedim(-2, 0) if self.is_separate else rows.flatten(0, 1)[None]
        unit = normalized if self.is_ours else theirs_of.vector_quantize_pytorch.l2norm
        return unit(rows) if self.is_cosine else rows

    def tokens(self, indices: Tensor) -> list[Tensor]:
        """Those of each level."""
        if len(self.levels) > 1:
            return [of_level[None] for of_level in indices.unbind(-1)]
        return [indices.T if self.is_separate else indices.reshape(1, -1)]

    def sizes(self, level: int) -> Tensor:
        return self.levels[level]._codebook.cluster_size.clone()


def distances(vectors: Tensor, codes: Tensor) -> Tensor:
    return (vectors.double()[..., None, :] - codes.double()[:, None]).norm(dim=-1)


def at(tensor: Tensor, tokens: Tensor) -> Tensor:
    return tensor.gather(-1, tokens[..., None])[..., 0]


def start(theirs: Side, ours: Side, x: Tensor) -> None:
    """Codes among the data, so that each is used."""
    for number, layer in enumerate(theirs.levels):
        vectors = theirs.vectors(x) / (3 if number else 1)
        codes = vectors[:, torch.randperm(vectors.shape[1])[:K]]
        layer._codebook.embed.data.copy_(codes)
        layer._codebook.embed_avg.copy_(codes)
    ours.module.load_state_dict(theirs.module.state_dict())


def meet(theirs: Side, ours: Side) -> None:
    """Ours goes on from their averages."""
    for mine, other in zip(ours.levels, theirs.levels, strict=True):
        book = other._codebook
        codes, sizes = book.embed.detach(), book.cluster_size
        if mine.codebook_update == "ema":
            codes = book.embed_avg / sizes[..., None]
        mine.set_codebook(codes.view(mine.codebook.shape), sizes.view(mine.cluster_size.shape))


@pytest.mark.parametrize("name", TRAINED)
def test_fifty_steps(name):
    """Tokens differ only for one of two reasons, and codes only as their smoothing explains.

    Theirs divides a sum by the smoothed size, (s + eps) / (S + K·eps)·S, with S the sum of the
    sizes s. The sum itself is not smoothed, so in any step its code is ours times s and over the
    smoothed size: the relative difference is about eps·(1/s - K/S). Rounding comes on top, of both
    sides, in units u of the largest element: n·u for a sum of n rows and 4·u for a step of the
    averages. Later steps keep of it what they keep of the averages. A later level also has what
    the codes of the levels before differ by, as that is in its vectors.
    """
    torch.manual_seed(3)
    kind, options = TRAINED[name]
    options = {"decay": DECAY, "eps": 1e-3, "commitment_weight": WEIGHT, **options}
    is_gradient = "learnable_codebook" in options
    theirs, ours = (Side(m, n == 1) for n, m in enumerate(pair(kind, **options)))
    centers = 2 * torch.randn(K, D)

    def draw(step: int = 0) -> Tensor:
        return centers[torch.randint(K, (ROWS,))] + 0.7 * torch.randn(ROWS, D) + 0.02 * step

    start(theirs, ours, draw())
    first = [ours.codes(level) for level in range(len(ours.levels))]
    # projections stay, so that both quantize the same vectors
    optimizers = [
        torch.optim.SGD(side.module.parameters(), RATE) for side in (ours, theirs) if is_gradient
    ]
    # elements of codes differ by so much, of each level: by rounding, and in all
    noise = [torch.zeros(1, 1) for _ in first]
    allowed = [torch.zeros(1, 1) for _ in first]
    num_tokens = num_split = 0
    for step in range(STEPS):
        x = draw(step)
        vectors = ours.vectors(x), theirs.vectors(x)
        codes = [(ours.codes(q), theirs.codes(q)) for q in range(len(first))]
        sizes = [theirs.sizes(q) for q in range(len(first))]
        chosen = []
        for side in (ours, theirs):
            _, indices, loss = side.module(x.clone().requires_grad_())
            chosen.append(side.tokens(indices))
            loss.sum().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

        is_same = torch.ones(chosen[0][0].shape, dtype=torch.bool)
        before = torch.zeros(())
        for level, (mine, other) in enumerate(zip(*chosen, strict=True)):
            by_ours, by_theirs = map(distances, vectors, codes[level])
            # ours is right by float64
            assert (at(by_ours, mine) <= by_ours.amin(-1) * (1 + 1e-12)).all()
            is_split = is_same & (mine != other)
            is_their_error = at(by_theirs, other) > at(by_theirs, mine)
            reach = D**0.5 * (allowed[level] + before).double()[:, None].expand(by_ours.shape)
            is_drift = at(by_ours, other) - at(by_ours, mine) <= at(reach, mine) + at(reach, other)
            assert (is_their_error | is_drift)[is_split].all()
            num_tokens += int(is_same.sum())
            num_split += int(is_split.sum())
            is_same &= mine == other

            largest = torch.stack([*(v.abs().max() for v in vectors), codes[level][0].abs().max()])
            counts = F.one_hot(other, K).sum(1)
            if is_gradient:
                # a step of the optimizer brings codes nearer to each other, as all rows pull
                pull = RATE * 2 * WEIGHT / x.numel() * counts
                assert pull.max() < 1
                grown = noise[level] + 2 * UNIT * largest.max() * (1 + 2 * pull * (counts + 4))
            else:
                kept = DECAY * sizes[level] / theirs.sizes(level)
                grown = 2 * UNIT * largest.max() * (counts * (1 - kept) + 4)
                grown = kept * noise[level] + grown
            noise[level] = grown
            vectors = tuple(
                v - c.gather(1, tokens[..., None].expand_as(v))
                for v, c, tokens in zip(vectors, codes[level], (mine, other), strict=True)
            )
            before = before + allowed[level].max()

        if not is_same.all():
            # from here on they would learn from different rows
            meet(theirs, ours)
        before = torch.zeros(())
        for level in range(len(first)):
            mine, other, after = ours.codes(level), theirs.codes(level), theirs.sizes(level)
            total = after.sum(-1, keepdim=True)
            smoothed = (after + options["eps"]) / (total + K * options["eps"]) * total
            factor = torch.ones_like(after) if is_gradient or ours.is_cosine else after / smoothed
            bound = noise[level]
            if ours.is_cosine:
                # a code is turned by more where the mean of its unit vectors is short
                bound = 2 * bound / ours.levels[level].codebook.norm(dim=-1).view(after.shape)
            bound = bound + before
            gap = (mine * factor[..., None] - other).abs().amax(-1)
            assert (gap <= bound).all(), (step, level, (gap / bound).max())
            smoothing = (factor - 1).abs() * mine.abs().amax(-1)
            allowed[level] = torch.maximum(allowed[level], bound + smoothing)
            before = before + allowed[level].max()
    # few differ, and the codes have gone much further than rounding takes them
    assert num_split <= 1e-3 * num_tokens
    for level, codes in enumerate(first):
        assert (ours.codes(level) - codes).abs().max() > 1e3 * noise[level].max()
