"""`patch`: the quantizers of other projects, those that are installed, and small ones of the same
shape, which are written here."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import data
import oracle
import pytest
import torch
import torch.nn.functional as F
from conftest import INTERPRETED
from torch import Tensor, nn
from torch.utils import _pytree

import vqtriton
from bench.client_models import MODELS, ClientModel, foreign
from bench.devices import allocator_peak
from vqtriton.clients import methods, patching
from vqtriton.clients.search import ATTRIBUTE, Searches

# warnings of other projects are theirs
pytestmark = pytest.mark.filterwarnings("ignore")
SIZE, DIM, ROWS, LEVELS = 19, 6, 24, 3
BACKEND = "triton" if INTERPRETED else "torch"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


# --- small quantizers in the shape of others ---


class EuclideanCodebook(nn.Module):
    """As in EnCodec."""

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("embed", torch.randn(size, dim))

    def quantize(self, x: Tensor) -> Tensor:
        return (x @ self.embed.T - self.embed.square().sum(1) / 2).argmax(1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        indices = self.quantize(x.reshape(-1, x.shape[-1])).view(x.shape[:-1])
        return F.embedding(indices, self.embed), indices


class VectorQuantize(nn.Module):
    """As in DAC."""

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.codebook = nn.Embedding(size, dim)

    def decode_latents(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        scores = F.normalize(latents.mT, dim=-1) @ F.normalize(self.codebook.weight).T
        indices = scores.argmax(-1)
        return self.codebook(indices).mT, indices

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        codes, indices = self.decode_latents(latents)
        return latents + (codes - latents).detach(), indices


class VectorQuantizer2(nn.Module):
    """As in taming-transformers."""

    def __init__(self, size: int, dim: int, remap: Tensor | None = None, **options: Any) -> None:
        super().__init__()
        self.embedding = nn.Embedding(size, dim)
        self.beta, self.remap, self.legacy, self.sane_index_shape = 0.25, None, True, False
        vars(self).update(options)
        if remap is not None:
            self.remap = "a file"
            self.register_buffer("used", remap)

    def remap_to_used(self, indices: Tensor) -> Tensor:
        matches = indices[..., None] == self.used
        return torch.where(matches.any(-1), matches.long().argmax(-1), len(self.used))

    def forward(self, z, temp=None, rescale_logits=False, return_logits=False):
        z = z.movedim(1, -1)
        indices = torch.cdist(z.reshape(-1, z.shape[-1]), self.embedding.weight).argmin(1)
        codes = self.embedding(indices).view(z.shape)
        still, moving = F.mse_loss(codes.detach(), z), F.mse_loss(codes, z.detach())
        loss = still + self.beta * moving if self.legacy else self.beta * still + moving
        if self.remap is not None:
            indices = self.remap_to_used(indices.view(len(z), -1)).view(-1, 1)
        if self.sane_index_shape:
            indices = indices.view(z.shape[:-1])
        codes = (z + (codes - z).detach()).movedim(-1, 1).contiguous()
        return codes, loss, (None, None, indices)


class Example(NamedTuple):
    name: str
    build: Callable[[], nn.Module]
    x: Callable[[], Tensor]
    run: Callable[[nn.Module, Tensor], Any]
    num_searches: int = 1


def call(module: nn.Module, x: Tensor) -> Any:
    return module(x)


def example_of(model: ClientModel) -> Example:
    levels = LEVELS if model.levels > 1 else None
    return Example(
        model.name,
        lambda: model.module(SIZE, DIM, levels),
        lambda: model.x(ROWS, DIM),
        model.run,
        levels or 1,
    )


def rows() -> Tensor:
    return torch.randn(2, ROWS // 2, DIM)


def fmap() -> Tensor:
    return torch.randn(2, DIM, 3, 4)


def taming(**options: Any) -> Callable[[], nn.Module]:
    return lambda: VectorQuantizer2(SIZE, DIM, **options).eval()


OURS = [
    Example("an EuclideanCodebook", lambda: EuclideanCodebook(SIZE, DIM).eval(), rows, call),
    Example("a VectorQuantize", lambda: VectorQuantize(SIZE, DIM).eval(), lambda: rows().mT, call),
    Example("a VectorQuantizer2", taming(), fmap, call),
    Example(
        "a VectorQuantizer2 with remap",
        taming(remap=torch.arange(0, SIZE, 3), sane_index_shape=True, legacy=False),
        fmap,
        call,
    ),
]
INSTALLED = [model for model in MODELS if find_spec(model.project)]
EXAMPLES = OURS + [example_of(model) for model in INSTALLED]
on_every_example = pytest.mark.parametrize("example", EXAMPLES, ids=lambda e: e.name)


def built(example: Example) -> nn.Module:
    torch.manual_seed(0)
    return example.build()


def given(example: Example) -> Tensor:
    torch.manual_seed(1)
    return example.x()


def patched(module: nn.Module) -> nn.Module:
    report = vqtriton.patch(module, backend=BACKEND)
    assert report.modules, report
    assert not report.left, report
    return module


def tensors_of(results: Any) -> list[Tensor]:
    return [leaf for leaf in _pytree.tree_leaves(results) if isinstance(leaf, Tensor)]


@pytest.fixture
def searches(monkeypatch) -> list[tuple[Tensor, Tensor, str, Tensor]]:
    """What each search was given, and what it found."""
    seen = []
    search = methods.search

    def recorded(module: nn.Module, x: Tensor, codebook: Tensor, metric: str = "l2") -> Tensor:
        indices = search(module, x, codebook, metric)
        seen.append((x.detach(), codebook.detach(), metric, indices))
        return indices

    monkeypatch.setattr(methods, "search", recorded)
    return seen


def truth(x: Tensor, codebook: Tensor, metric: str) -> Tensor:
    return oracle.nearest_code(x, codebook, metric=metric)


# --- tokens ---


@on_every_example
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.kernel
def test_no_token_is_farther_than_the_nearest(example, dtype, searches) -> None:
    module = patched(built(example).to(dtype))
    # those of the trial
    searches.clear()
    with torch.no_grad():
        example.run(module, given(example).to(dtype))
    assert len(searches) == example.num_searches
    for x, codebook, metric, indices in searches:
        assert x.shape[0] == ROWS
        assert torch.equal(indices, truth(x, codebook, metric))


@pytest.mark.kernel
def test_near_ties_are_decided_exactly() -> None:
    x, codebook = data.near_ties(200, 30, 12)
    module = patched(EuclideanCodebook(30, 12).eval())
    module.embed.copy_(codebook)
    assert torch.equal(module.quantize(x), oracle.nearest_code(x, codebook))


@on_every_example
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_values_and_gradients_are_theirs(example, mode) -> None:
    theirs, ours = built(example), patched(built(example))
    results = []
    for one in (theirs, ours):
        one.train(mode == "train")
        x = given(example).requires_grad_()
        torch.manual_seed(1)
        found = example.run(one, x)
        tensors = tensors_of(found)
        floats = [t for t in tensors if t.requires_grad]
        torch.manual_seed(2)
        total = sum((t * torch.randn_like(t)).sum() for t in floats)
        wanted = [x, *(p for p in one.parameters() if p.requires_grad)]
        grads = torch.autograd.grad(total, wanted, allow_unused=True) if floats else ()
        results.append((found, grads, one.state_dict()))
    want, got = (_pytree.tree_flatten(result, is_leaf=lambda t: t is None) for result in results)
    # the same structure, and None where theirs is None
    assert got[1] == want[1]
    for w, g in zip(want[0], got[0], strict=True):
        if isinstance(w, Tensor):
            assert g.dtype == w.dtype
            assert g.requires_grad == w.requires_grad
            torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-6)
        else:
            assert g is w


@on_every_example
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shapes_and_dtypes_are_theirs(example, dtype) -> None:
    module = built(example).to(dtype)
    x = given(example).to(dtype)
    with torch.no_grad():
        try:
            want = tensors_of(example.run(module, x))
        except RuntimeError as error:
            pytest.skip(f"theirs does not run: {error}")
        got = tensors_of(example.run(patched(module), x))
    assert [(t.shape, t.dtype) for t in got] == [(t.shape, t.dtype) for t in want]


@on_every_example
@pytest.mark.once
def test_compiles_in_one_graph(example) -> None:
    module = patched(built(example))
    x = given(example)
    with torch.no_grad():
        want = example.run(module, x)

        def step(rows: Tensor) -> Any:
            return example.run(module, rows)

        torch._dynamo.reset()
        got = torch.compile(step, fullgraph=True, backend="aot_eager")(x)
    for w, g in zip(tensors_of(want), tensors_of(got), strict=True):
        torch.testing.assert_close(g, w)


@on_every_example
def test_an_empty_batch_is_theirs(example) -> None:
    module = built(example)
    x = given(example)[:0]
    try:
        want = tensors_of(example.run(module, x))
    except Exception:
        pytest.skip("theirs takes none")
    got = tensors_of(example.run(patched(module), x))
    assert [t.shape for t in got] == [t.shape for t in want]


# --- the module stays what it was ---


@on_every_example
def test_unpatch_gives_the_classes_back(example) -> None:
    module, other = built(example), built(example)
    kinds = [(type(m), dict(vars(type(m)))) for m in module.modules()]
    keys = [set(vars(m)) for m in module.modules()]
    state = module.state_dict()
    patched(module)
    # another model of the same classes is not touched
    assert [type(m) for m in other.modules()] == [kind for kind, _ in kinds]
    assert isinstance(module, kinds[0][0])
    assert list(module.state_dict()) == list(state)
    assert [type(m).__qualname__ for m in module.modules()] == [k.__qualname__ for k, _ in kinds]
    restored = vqtriton.unpatch(module)
    assert restored
    assert [type(m) for m in module.modules()] == [kind for kind, _ in kinds]
    assert [dict(vars(kind)) for kind, _ in kinds] == [attributes for _, attributes in kinds]
    assert [set(vars(m)) for m in module.modules()] == keys
    assert vqtriton.unpatch(module) == []


@on_every_example
def test_copies_and_files(example) -> None:
    module = patched(built(example))
    x = given(example)
    with torch.no_grad():
        want = tensors_of(example.run(module, x))
        twin = copy.deepcopy(module)
        assert [type(m) for m in twin.modules()] == [type(m) for m in module.modules()]
        for parameter in twin.parameters():
            parameter.zero_()
        buffer = io.BytesIO()
        torch.save(module, buffer)
        buffer.seek(0)
        for loaded in (
            pickle.loads(pickle.dumps(module)),
            torch.load(buffer, weights_only=False),
        ):
            assert not any(ATTRIBUTE in vars(m) for m in loaded.modules())
            assert all(
                "vqtriton" not in k.__module__ for m in loaded.modules() for k in type(m).__mro__
            )
            patched(loaded)
            for got, right in zip(tensors_of(example.run(loaded, x)), want, strict=True):
                assert torch.equal(got, right)
        # the first is as it was
        for got, right in zip(tensors_of(example.run(module, x)), want, strict=True):
            assert torch.equal(got, right)


@on_every_example
def test_a_patch_leaves_no_trace_in_the_module(example) -> None:
    module = built(example)
    modules = list(module.modules())
    before = [(dict(vars(m)), dict(m._buffers), dict(m._parameters)) for m in modules]
    patched(module)
    for m, (attributes, buffers, parameters) in zip(modules, before, strict=True):
        now = {name: value for name, value in vars(m).items() if name != ATTRIBUTE}
        assert now.keys() == attributes.keys()
        assert all(now[name] is attributes[name] for name in now)
        for held, was in ((m._buffers, buffers), (m._parameters, parameters)):
            assert held.keys() == was.keys()
            assert all(held[name] is was[name] for name in held)


@on_every_example
@pytest.mark.parametrize("way", ["load_state_dict", "in place", "data", "half"])
def test_new_codes_are_searched(example, way, searches) -> None:
    module = patched(built(example))
    x = given(example)
    with torch.no_grad():
        example.run(module, x)
        state = module.state_dict()
        other = {
            n: t.flip(0) * 1.5 if t.is_floating_point() and t.ndim > 1 else t
            for n, t in state.items()
        }
        if way == "load_state_dict":
            module.load_state_dict(copy.deepcopy(other))
        elif way == "half":
            module.half()
            x = x.half()
        else:
            for name, tensor in state.items():
                (tensor.data if way == "data" else tensor).copy_(other[name].clone())
        searches.clear()
        example.run(module, x)
    for rows_, codebook, metric, indices in searches:
        assert torch.equal(indices, truth(rows_, codebook, metric))
        assert way != "half" or rows_.dtype in (torch.float16, torch.float32)


@pytest.mark.once
def test_a_pickle_needs_no_vqtriton(tmp_path) -> None:
    (tmp_path / "theirs.py").write_text(
        "import torch\n"
        "class EuclideanCodebook(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.register_buffer('embed', torch.randn(5, 3))\n"
        "    def quantize(self, x):\n"
        "        return torch.cdist(x, self.embed).argmin(1)\n"
    )
    common = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import torch\n"
    write = common + (
        "import theirs, vqtriton\n"
        "model = torch.nn.Sequential(theirs.EuclideanCodebook())\n"
        "assert vqtriton.patch(model).modules\n"
        f"torch.save(model, {str(tmp_path / 'model.pt')!r})\n"
    )
    read = common + (
        "sys.modules['vqtriton'] = None\n"
        f"model = torch.load({str(tmp_path / 'model.pt')!r}, weights_only=False)\n"
        "print(model[0].quantize(torch.randn(4, 3)).shape)\n"
    )
    for script in (write, read):
        result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
    assert "[4]" in result.stdout


@pytest.mark.once
def test_all_projects_are_installed() -> None:
    missing = {model.project for model in MODELS} - {model.project for model in INSTALLED}
    if missing:
        pytest.skip(f"make test-clients installs {', '.join(sorted(missing))}")


# --- ways in which modules are used ---


@pytest.mark.once
def test_hooks_see_no_trial() -> None:
    module = VectorQuantizer2(SIZE, DIM)
    seen = []
    module.embedding.register_forward_hook(lambda *args: seen.append(args))
    module.embedding.register_forward_pre_hook(lambda *args: seen.append(args))
    patched(module)
    assert seen == []
    module(fmap())
    assert len(seen) == 2


@pytest.mark.once
def test_codes_that_are_elsewhere_are_brought_by_theirs(monkeypatch) -> None:
    """As accelerate's hooks do: the weight is on the meta device between calls."""
    module = patched(VectorQuantize(SIZE, DIM))
    x = rows().mT
    want = module(x)
    weight = module.codebook.weight
    brought = []

    def bring(self: nn.Module, latents: Tensor) -> tuple[Tensor, Tensor]:
        brought.append(self)
        self.codebook.weight = weight
        return original(self, latents)

    original = VectorQuantize.decode_latents
    monkeypatch.setattr(VectorQuantize, "decode_latents", bring)
    module.codebook.weight = nn.Parameter(torch.empty(SIZE, DIM, device="meta"))
    assert torch.equal(module(x)[1], want[1])
    assert brought == [module]


@pytest.mark.once
def test_a_class_that_is_changed_after_the_patch() -> None:
    module = patched(EuclideanCodebook(SIZE, DIM))
    x = rows()
    want = module(x)
    kind = type(module)
    module.__class__ = type("Sharded", (kind,), {})
    assert torch.equal(module(x)[1], want[1])
    both = nn.ModuleList([module, patched(EuclideanCodebook(SIZE, DIM))])
    with pytest.raises(RuntimeError, match="is now Sharded, which was made after the patch"):
        vqtriton.unpatch(both)
    # nothing was done
    assert ATTRIBUTE in vars(module)
    assert type(both[1]) is not EuclideanCodebook
    module.__class__ = kind
    assert vqtriton.unpatch(both) == ["0", "1"]


@pytest.mark.once
def test_a_parametrized_codebook() -> None:
    class Doubled(nn.Module):
        def forward(self, tensor: Tensor) -> Tensor:
            return 2 * tensor

    module = EuclideanCodebook(SIZE, DIM)
    module.embed = nn.Parameter(module.embed)
    before = copy.deepcopy(module)
    nn.utils.parametrize.register_parametrization(before, "embed", Doubled())
    assert vqtriton.patch(before).left[""] == "it is parametrized: patch it before that"
    nn.utils.parametrize.register_parametrization(patched(module), "embed", Doubled())
    x = rows()
    assert torch.equal(module(x)[1], before(x)[1])
    nn.utils.parametrize.remove_parametrizations(module, "embed")
    assert vqtriton.unpatch(module) == [""]
    assert type(module) is EuclideanCodebook


class BuildsItself(EuclideanCodebook):
    def __new__(cls, size: int, dim: int) -> BuildsItself:
        return super().__new__(cls)


@pytest.mark.once
def test_a_class_whose_new_takes_arguments() -> None:
    module = patched(BuildsItself(SIZE, DIM))
    assert type(copy.deepcopy(module)) is type(module)
    shallow = copy.copy(module)
    assert type(shallow) is type(module)
    assert shallow.embed is module.embed


@pytest.mark.once
def test_channels_that_are_not_d_are_regrouped_as_theirs() -> None:
    module = foreign_vector_quantizer()
    x = torch.randn(1, 2 * DIM, 2, 2)
    want = module(x)
    got = patched(module)(x)
    assert torch.equal(got[2][2], want[2][2])
    assert torch.equal(got[0], want[0])


def foreign_vector_quantizer() -> nn.Module:
    class VectorQuantizer(VectorQuantizer2):
        def forward(self, z: Tensor) -> Any:
            z = z.movedim(1, -1).contiguous()
            rows_ = z.view(-1, self.embedding.weight.shape[1])
            indices = torch.cdist(rows_, self.embedding.weight).argmin(1)
            codes = self.embedding(indices).view(z.shape)
            loss = F.mse_loss(codes.detach(), z) + self.beta * F.mse_loss(codes, z.detach())
            codes = (z + (codes - z).detach()).movedim(-1, 1).contiguous()
            return codes, loss, (None, None, indices)

    return VectorQuantizer(SIZE, DIM)


# --- what is left alone ---


class Cosine(EuclideanCodebook):
    def quantize(self, x: Tensor) -> Tensor:
        return (F.normalize(x) @ F.normalize(self.embed).T).argmax(1)


def named(name: str, base: type, **methods_: Any) -> nn.Module:
    return type(name, (base,), methods_)(SIZE, DIM)


def replaced() -> nn.Module:
    module = EuclideanCodebook(SIZE, DIM)
    module.quantize = lambda x: x
    return module


def raising(self: nn.Module, x: Tensor) -> Tensor:
    raise RuntimeError("no such thing")


@pytest.mark.once
@pytest.mark.parametrize(
    ("build", "why"),
    [
        (lambda: Cosine(SIZE, DIM), "its class replaces quantize of EuclideanCodebook"),
        (replaced, "its quantize was replaced on the module itself"),
        (
            lambda: named("EuclideanCodebook", EuclideanCodebook, quantize=Cosine.quantize),
            "its quantize gives other results than that of EnCodec",
        ),
        (
            lambda: named("EuclideanCodebook", EuclideanCodebook, quantize=raising),
            "its quantize raised RuntimeError in a trial: no such thing",
        ),
        (lambda: EuclideanCodebook(SIZE, DIM).to("meta"), "patch the model once it is loaded"),
        (
            lambda: named("LookupFreeQuantizer", nn.Linear),
            "LookupFreeQuantizer is not known",
        ),
    ],
)
def test_what_is_left_alone(build, why) -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "quantizer": build()})
    kind = type(model["quantizer"])
    before = copy.copy(vars(model["quantizer"]))
    report = vqtriton.patch(model)
    assert report.modules == {}
    assert list(report.left) == ["quantizer"]
    assert why in report.left["quantizer"]
    assert str(report) == f"nothing was patched\nquantizer: left, {report.left['quantizer']}"
    assert type(model["quantizer"]) is kind
    assert vars(model["quantizer"]).keys() == before.keys()


@pytest.mark.once
def test_a_trial_changes_nothing() -> None:
    module = EuclideanCodebook(SIZE, DIM).train()
    state, generator = copy.deepcopy(module.state_dict()), torch.random.get_rng_state()
    vqtriton.patch(module)
    assert module.training
    assert torch.equal(module.embed, state["embed"])
    assert torch.equal(torch.random.get_rng_state(), generator)


@pytest.mark.once
def test_the_report_and_the_block() -> None:
    model = nn.ModuleDict({"one": EuclideanCodebook(SIZE, DIM), "two": EuclideanCodebook(3, 2)})
    vqtriton.patch(model["two"])
    with vqtriton.patch(model) as report:
        assert report.modules == {"one": "EnCodec and its descendants"}
        assert report.left == {"two": "it is patched already"}
        assert "one: EnCodec and its descendants" in str(report)
        assert type(model["one"]) is not EuclideanCodebook
    # the block takes back what it did, and no more
    assert type(model["one"]) is EuclideanCodebook
    assert type(model["two"]) is not EuclideanCodebook
    assert vqtriton.unpatch(model) == ["two"]


@pytest.mark.once
def test_wrong_arguments() -> None:
    for function in (vqtriton.patch, vqtriton.unpatch):
        with pytest.raises(TypeError, match="model is a Tensor"):
            function(torch.zeros(2))
    with pytest.raises(ValueError, match="backend is 'cuda'"):
        vqtriton.patch(nn.Linear(2, 2), backend="cuda")
    module = EuclideanCodebook(SIZE, DIM)
    if find_spec("triton"):
        with pytest.raises(ValueError, match="backend='triton' cannot run on cpu tensors"):
            vqtriton.patch(module, backend="triton")
    assert type(module) is EuclideanCodebook


@pytest.mark.once
def test_a_patch_that_fails_changes_nothing(monkeypatch) -> None:
    model = nn.ModuleList([EuclideanCodebook(SIZE, DIM) for _ in range(2)])

    def second_is_refused(backend: str) -> Searches:
        if ATTRIBUTE in vars(model[0]):
            raise ValueError("no more")
        return Searches(backend)

    monkeypatch.setattr(patching, "Searches", second_is_refused)
    with pytest.raises(ValueError, match="no more"):
        vqtriton.patch(model)
    assert [type(module) for module in model] == 2 * [EuclideanCodebook]
    assert not any(ATTRIBUTE in vars(module) for module in model)


@pytest.mark.once
def test_autocast_does_not_change_tokens(searches) -> None:
    module = patched(EuclideanCodebook(SIZE, DIM).eval())
    searches.clear()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        module(rows())
    ((x, codebook, metric, indices),) = searches
    assert torch.equal(indices, truth(x, codebook, metric))


# --- vector-quantize-pytorch: training, with its options ---


needs_theirs = pytest.mark.skipif(
    not find_spec("vector_quantize_pytorch"), reason="vector_quantize_pytorch is not installed"
)


def lucid(seed: int = 0, **options: Any) -> nn.Module:
    torch.manual_seed(seed)
    kind = foreign("vector_quantize_pytorch").VectorQuantize
    return kind(**{"dim": 8, "codebook_size": 12, **options})


def trained(module: nn.Module, steps: int = 4, **given_: Any) -> list[Tensor]:
    """Results, gradients and state of some steps."""
    seen = []
    optimizer = torch.optim.SGD([*module.parameters(), nn.Parameter(torch.zeros(1))], lr=0.1)
    for step in range(steps):
        torch.manual_seed(step)
        x = torch.randn(2, 20, 8, requires_grad=True)
        torch.manual_seed(step)
        results = module(x, **given_)
        tensors = tensors_of(results)
        loss = sum(t.float().square().mean() for t in tensors if t.requires_grad)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen += [*tensors, x.grad]
    module.eval()
    with torch.no_grad():
        seen += tensors_of(module(torch.randn(2, 20, 8), **given_))
    return [*seen, *(t.detach().clone() for t in module.state_dict().values())]


def weights(sums: Tensor, sizes: Tensor) -> Tensor:
    return (sizes > 1).float()


MASK = torch.arange(20) < torch.tensor([[20], [13]])
OPTIONS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({"decay": 0.5, "threshold_ema_dead_code": 2}, {}),
    ({"threshold_ema_dead_code": 3}, {"mask": MASK}),
    ({"kmeans_init": True}, {}),
    ({"use_cosine_sim": True}, {}),
    ({"use_cosine_sim": True, "kmeans_init": True, "threshold_ema_dead_code": 2}, {}),
    ({"heads": 2, "codebook_dim": 4}, {}),
    # with a commitment loss theirs takes no mask beside heads
    ({"heads": 2, "codebook_dim": 4, "commitment_weight": 0.0}, {"mask": MASK}),
    (
        {
            **{"heads": 2, "codebook_dim": 4, "commitment_weight": 0.0},
            "separate_codebook_per_head": True,
        },
        {"mask": MASK},
    ),
    ({"heads": 2, "separate_codebook_per_head": True, "use_cosine_sim": True}, {}),
    ({"codebook_dim": 3, "layernorm_after_project_in": True}, {}),
    ({"learnable_codebook": True, "ema_update": False}, {}),
    ({"learnable_codebook": True, "ema_update": False, "sync_update_v": 0.3}, {}),
    ({"ema_update": False}, {}),
    ({"manual_ema_update": True}, {}),
    ({"affine_param": True}, {}),
    ({"affine_param": True}, {"mask": MASK}),
    ({"rotation_trick": True}, {}),
    ({"directional_reparam": True, "threshold_ema_dead_code": 2, "ema_update": False}, {}),
    ({"route_gradients_to_input": False}, {}),
    ({"orthogonal_reg_weight": 10, "orthogonal_reg_active_codes_only": True}, {}),
    ({"codebook_diversity_loss_weight": 1.0}, {}),
    ({"commitment_use_cross_entropy_loss": True}, {}),
    ({"commitment_use_cross_entropy_loss": True}, {"mask": MASK}),
    ({"stochastic_sample_codes": True, "sample_codebook_temp": 0.5}, {}),
    ({"stochastic_sample_codes": True}, {"sample_codebook_temp": 0.0}),
    ({"straight_through": True, "rotation_trick": False}, {}),
    (
        {
            **{"learnable_codebook": True, "ema_update": False, "threshold_ema_dead_code": 2},
            "in_place_codebook_optimizer": partial(torch.optim.SGD, lr=0.1),
        },
        {},
    ),
    ({}, {"freeze_codebook": True}),
    ({}, {"lens": torch.tensor([20, 13])}),
    ({}, {"topk": 3}),
    ({}, {"return_loss_breakdown": True}),
    ({}, {"ema_update_weight": weights}),
    ({}, {"indices": torch.zeros(2, 20, dtype=torch.long)}),
    ({"return_zeros_for_masked_padding": False}, {"mask": MASK}),
]


@needs_theirs
@pytest.mark.once
@pytest.mark.parametrize(("options", "call_options"), OPTIONS, ids=str)
def test_training_with_the_options_of_vector_quantize_pytorch(options, call_options) -> None:
    if "ema_update" not in options and "learnable_codebook" not in options:
        is_learned = "orthogonal_reg_weight" in options
        options = {**options, "ema_update": not is_learned}
    theirs, ours = lucid(**options), patched(lucid(**options))
    want, got = trained(theirs, **call_options), trained(ours, **call_options)
    assert len(got) == len(want)
    for w, g in zip(want, got, strict=True):
        assert g.dtype == w.dtype
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-5, equal_nan=True)


@needs_theirs
@pytest.mark.once
@pytest.mark.parametrize("options", [{}, {"heads": 2, "codebook_dim": 4}], ids=str)
def test_no_matrix_of_all_scores_is_made(options) -> None:
    size = 4096

    def peak(module: nn.Module) -> int:
        x = torch.randn(1, 2048, 8)
        return allocator_peak(lambda: module(x))

    options = {"codebook_size": size, "threshold_ema_dead_code": 0, **options}
    rows_ = 2048 * options.get("heads", 1)
    assert peak(lucid(**options)) > 4 * rows_ * size
    # their counts and sums, and a block of scores
    assert peak(patched(lucid(**options))) < 4 * rows_ * size


@needs_theirs
@pytest.mark.once
@pytest.mark.parametrize("size", [64, 65, 300])
@pytest.mark.parametrize("options", [{"kmeans_init": True}, {"affine_param": True}], ids=str)
def test_codebooks_of_any_size_are_patched(size, options) -> None:
    patched(lucid(codebook_size=size, dim=size, **options))


@needs_theirs
@pytest.mark.once
def test_a_codebook_that_levels_share() -> None:
    kind = foreign("vector_quantize_pytorch").ResidualVQ
    module = kind(dim=8, num_quantizers=3, codebook_size=40, shared_codebook=True)
    report = vqtriton.patch(module)
    assert report.left == {}
    assert list(report.modules) == ["layers.0._codebook", "layers.0", "layers.1", "layers.2"]


@needs_theirs
@pytest.mark.once
def test_threads_that_share_a_module() -> None:
    module = patched(lucid().eval())
    x, indices = torch.randn(1, 20, 8), torch.zeros(1, 20, dtype=torch.long)
    want = module(x)[1]
    # the codebook of one call runs while another call waits in its own
    forward, inside, done = type(module._codebook).forward, threading.Event(), threading.Event()

    def slow(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if threading.current_thread() is not threading.main_thread():
            inside.set()
            assert done.wait(10)
        return forward(self, *args, **kwargs)

    module._codebook.__class__ = type("Slow", (type(module._codebook),), {"forward": slow})
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(module, x)
        assert inside.wait(10)
        _, loss = module(x, indices=indices)
        done.set()
        assert torch.equal(other.result()[1], want)
    assert loss.isfinite()


@needs_theirs
@pytest.mark.once
def test_another_release_is_left_alone(monkeypatch) -> None:
    module = lucid()
    monkeypatch.setattr("vqtriton.clients.table.version", lambda package: "1.33.0")
    report = vqtriton.patch(module)
    assert report.modules == {}
    assert report.left["_codebook"] == "its release is 1.33.0; 1.32 is known"


@needs_theirs
@pytest.mark.once
def test_updates_by_indices_are_theirs() -> None:
    theirs, ours = lucid(), patched(lucid())
    x, indices = torch.randn(2, 20, 8), torch.randint(12, (2, 20))
    indices[0, 3] = -1
    for module in (theirs, ours):
        module.update_indices(x, indices, mask=MASK)
    for w, g in zip(theirs.state_dict().values(), ours.state_dict().values(), strict=True):
        torch.testing.assert_close(g, w)


@needs_theirs
@pytest.mark.once
def test_sums_of_ranks_are_added_up() -> None:
    theirs, ours = lucid(), patched(lucid())
    for module in (theirs, ours):
        # as two ranks with the same rows
        module._codebook.all_reduce_fn = lambda tensor: tensor.mul_(2)
    for w, g in zip(trained(theirs), trained(ours), strict=True):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-5)


@needs_theirs
@pytest.mark.once
def test_a_codebook_by_itself_gives_scores() -> None:
    module = patched(lucid())
    x = torch.randn(2, 20, 8)
    _, indices, scores = module._codebook(x)
    assert torch.equal(scores.argmax(-1), indices[None])


@needs_theirs
@pytest.mark.once
def test_compiled_before_kmeans_is_refused() -> None:
    module = patched(lucid(kmeans_init=True))
    torch._dynamo.reset()
    with pytest.raises(Exception, match="take the first step uncompiled"):
        torch.compile(module, fullgraph=True, backend="eager")(torch.randn(2, 20, 8))
