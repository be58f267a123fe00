"""Checkpoints of other projects: what they decode to, and training that goes on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

import vqtriton
import vqtriton.vector_quantize_pytorch
from bench.client_models import foreign
from vqtriton import VectorQuantize, load_codebooks, to_vector_quantize_pytorch, weights

K, D, DIM, LEVELS = 7, 3, 5, 3


def chosen(*shape: int, size: int = K) -> Tensor:
    return torch.randint(size, shape or (4, 6))


def same(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs.detach(), rtol=1e-5, atol=1e-6)


def codes(*shape: int) -> Tensor:
    return torch.randn(*shape or (K, D))


# --- each layout, by hand: a state dict, and what some indices are decoded to ---


def vqp_heads(at: str) -> tuple[dict, list]:
    embed, sizes = codes(2, K, D), torch.rand(2, K)
    state = {f"{at}_codebook.embed": embed, f"{at}_codebook.cluster_size": sizes}
    indices = chosen(4, 6, 2)
    want = torch.cat([embed[0][indices[..., 0]], embed[1][indices[..., 1]]], -1)
    return state, [("", [indices], want)]


def vqp_shared_heads(at: str) -> tuple[dict, list]:
    embed, weight, bias = codes(1, K, D), torch.randn(DIM, 2 * D), torch.randn(DIM)
    state = {f"{at}_codebook.embed": embed}
    state |= {f"{at}project_out.weight": weight, f"{at}project_out.bias": bias}
    state |= {f"{at}project_in.weight": torch.randn(2 * D, DIM)}
    indices = chosen(4, 6, 2)
    want = embed[0][indices].flatten(-2) @ weight.T + bias
    return state, [("", [indices], want)]


def vqp_grouped(at: str) -> tuple[dict, list]:
    state, checks = {}, []
    for group in range(2):
        # more than ten, so that an order by name is not the order of the levels
        embeds = [codes(1, K, D) for _ in range(12)]
        start = f"{at}rvqs.{group}."
        state |= {f"{start}layers.{n}._codebook.embed": embeds[n] for n in reversed(range(12))}
        weight = torch.randn(DIM, D)
        state[f"{start}project_out.weight"] = weight
        indices = [chosen() for _ in embeds]
        total = sum(embed[0][chosen_] for embed, chosen_ in zip(embeds, indices, strict=True))
        checks.append((f"rvqs.{group}", indices, total @ weight.T))
    return state, checks


def simvq(at: str, names: tuple[str, str] = ("frozen_codebook", "code_transform")):
    frozen, weight, bias = codes(K, 4), torch.randn(D, 4), torch.randn(D)
    state = {f"{at}{names[0]}": frozen}
    state |= {f"{at}{names[1]}.weight": weight, f"{at}{names[1]}.bias": bias}
    indices = chosen()
    return state, [("", [indices], (frozen @ weight.T + bias)[indices])]


def encodec(at: str) -> tuple[dict, list]:
    embeds, indices = [codes() for _ in range(LEVELS)], [chosen() for _ in range(LEVELS)]
    state = {}
    for n, embed in enumerate(embeds):
        start = f"{at}quantizer.vq.layers.{n}._codebook."
        state |= {f"{start}embed": embed, f"{start}inited": torch.ones(1)}
        state |= {f"{start}cluster_size": torch.rand(K), f"{start}embed_avg": codes()}
    want = sum(embed[one] for embed, one in zip(embeds, indices, strict=True))
    return state, [("quantizer", indices, want)]


def averages(at: str, prefix: str, codes_name: str, flag: str) -> tuple[dict, list]:
    """Sums and sizes, as moshi and Mimi have them."""
    state, start = {}, f"{at}{prefix}"
    book = "_codebook" if codes_name == "embedding_sum" else "codebook"
    layers = "vq.layers" if codes_name == "embedding_sum" else "layers"
    total, indices = 0, []
    for n in range(LEVELS):
        sums, usage = codes(), torch.rand(K) + 0.5
        # clamped to 1e-5
        usage[0], sums[0] = 0, 1e-5
        level = f"{start}.{layers}.{n}.{book}."
        state |= {f"{level}{codes_name}": sums, f"{level}cluster_usage": usage}
        state[f"{level}{flag}"] = torch.ones(1)
        indices.append(chosen())
        rows = sums / usage[:, None]
        rows[0] = 1
        total = total + rows[indices[-1]]
    weight = torch.randn(DIM, D, 1)
    state[f"{start}.output_proj.weight"] = weight
    state[f"{start}.input_proj.weight"] = torch.randn(D, DIM, 1)
    return state, [(prefix, indices, total @ weight[..., 0].T)]


def dac(at: str, kind: str) -> tuple[dict, list]:
    state, total, indices = {}, 0, []
    for n in range(LEVELS):
        start = f"{at}quantizer.quantizers.{n}."
        table, direction, size = codes(), torch.randn(DIM, D, 1), torch.rand(DIM, 1, 1) + 0.5
        bias = torch.randn(DIM)
        weight = size * direction / direction.square().sum((1, 2), keepdim=True).sqrt()
        names = {
            "plain": {"weight": weight},
            "old": {"weight_g": size, "weight_v": direction},
            "new": {
                "parametrizations.weight.original0": size,
                "parametrizations.weight.original1": direction,
            },
        }
        state[f"{start}codebook.weight"] = table
        state |= {f"{start}out_proj.{name}": value for name, value in names[kind].items()}
        state[f"{start}out_proj.bias"] = bias
        state |= {f"{start}in_proj.weight": torch.randn(D, DIM, 1)}
        indices.append(chosen())
        total = total + table[indices[-1]] @ weight[..., 0].T + bias
    return state, [("quantizer", indices, total)]


def embedding(at: str, module: str) -> tuple[dict, list]:
    table, indices = codes(), chosen()
    # the embedding of the tokens has no codes
    state = {f"{at}{module}.embedding.weight": table, f"{at}model.embedding.weight": codes(2, 2)}
    return state, [(module, [indices], table[indices])]


def one_embed(at: str, book: str) -> tuple[dict, list]:
    embed, indices = codes(), chosen()
    return {f"{at}{book}.embed": embed}, [("", [indices], embed[indices])]


LAYOUTS: dict[str, Callable[[str], tuple[dict, list]]] = {
    "vector-quantize-pytorch": lambda at: one_embed(at, "_codebook"),
    "heads": vqp_heads,
    "shared heads": vqp_shared_heads,
    "grouped": vqp_grouped,
    "simvq": simvq,
    "simvq of its authors": lambda at: simvq(
        f"{at}quantize.", ("embedding.weight", "embedding_proj")
    ),
    "encodec": encodec,
    "codebook.embed": lambda at: one_embed(at, "codebook"),
    "moshi": lambda at: averages(at, "quantizer.rvq_first", "embedding_sum", "_initialized"),
    "mimi": lambda at: averages(
        at, "quantizer.semantic_residual_vector_quantizer", "embed_sum", "initialized"
    ),
    "dac": lambda at: dac(at, "plain"),
    "dac weight_norm": lambda at: dac(at, "old"),
    "dac parametrized": lambda at: dac(at, "new"),
    "taming": lambda at: embedding(at, "quantize"),
    "chameleon": lambda at: embedding(at, "model.vqmodel.quantize"),
}


def check(source, checks: list, at: str = "") -> dict[str, vqtriton.LoadedQuantizer]:
    found = load_codebooks(source)
    paths = [".".join(filter(None, (at.rstrip("."), path))) for path, _, _ in checks]
    assert sorted(found) == sorted(paths)
    for path, (_, indices, want) in zip(paths, checks, strict=True):
        quantizer = found[path]
        assert len(quantizer.levels) == len(indices)
        same(quantizer.decode(*indices), want)
        for level in quantizer.levels:
            assert level.codebook.dtype == torch.float32
            assert level.key.startswith(path)
    return found


@pytest.mark.parametrize("at", ["", "model.", "module.tokenizer.3."])
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout(name, at):
    state, checks = LAYOUTS[name](at)
    if name == "simvq of its authors":
        checks = [("quantize", *rest) for _, *rest in checks]
    found = check(state, checks, at)
    for quantizer in found.values():
        for level in quantizer.levels:
            sizes = next((k for k in state if k.endswith(("cluster_size", "cluster_usage"))), None)
            assert (level.cluster_size is None) == (sizes is None)
            if sizes:
                assert level.cluster_size.shape == level.codebook.shape[:-1]


def test_projections_before_the_search():
    weight, bias = torch.randn(D, DIM), torch.randn(D)
    state = {"a.codebook.weight": codes(), "a.in_proj.weight": weight[..., None]}
    state |= {"a.in_proj.bias": bias, "a.out_proj.weight": torch.randn(DIM, D, 1, 1)}
    (level,) = load_codebooks(state)["a"].levels
    x = torch.randn(10, DIM)
    same(F.linear(x, *level.project_in), x @ weight.T + bias)
    assert level.project_out.weight.shape == (DIM, D)
    assert level.project_out.bias is None


def test_masked_indices_and_fewer_levels():
    state, [(_, indices, _)] = encodec("")
    quantizer = load_codebooks(state)["quantizer"]
    assert torch.equal(quantizer.decode(indices[0]), quantizer.levels[0].decode(indices[0]))
    assert quantizer.levels[0].decode(torch.tensor([-1])).eq(0).all()
    heads = load_codebooks(vqp_heads("")[0])[""].levels[0]
    partly = heads.decode(torch.tensor([[-1, 2], [2, -1]]))
    assert torch.equal(partly[0], torch.cat([torch.zeros(D), heads.codebook[1, 2]]))
    assert torch.equal(partly[1], torch.cat([heads.codebook[0, 2], torch.zeros(D)]))
    for wrong in ([], indices + indices):
        with pytest.raises(ValueError, match=rf"indices are {len(wrong)} tensors; .* 1 to 3"):
            quantizer.decode(*wrong)


def test_a_list_of_other_layers_has_no_levels():
    state = {"layers.1._codebook.embed": codes(1, K, D), "layers.4.codebook.embed": codes()}
    assert sorted(load_codebooks(state)) == ["layers.1", "layers.4"]


def test_tensors_are_copies_in_float32():
    state = {"codebook.embed": codes().half(), "codebook.cluster_size": torch.ones(K)}
    (level,) = load_codebooks(state)[""].levels
    assert torch.equal(level.codebook, state["codebook.embed"].float())
    state["codebook.cluster_size"].fill_(3)
    assert level.cluster_size.eq(1).all()


# --- files ---


@pytest.fixture
def state() -> dict[str, Tensor]:
    others = {"encoder.weight": torch.randn(4, 4), "decoder.weight": torch.randn(4, 4)}
    return {name: tensor.contiguous() for name, tensor in (dac("", "old")[0] | others).items()}


def equal(found, state) -> bool:
    want = load_codebooks(state)
    return found.keys() == want.keys() and all(
        torch.equal(one.codebook, other.codebook)
        for path in want
        for one, other in zip(found[path].levels, want[path].levels, strict=True)
    )


def test_safetensors(state, tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    save_file(state, path)
    read = []
    original = weights._from_safetensors
    monkeypatch.setattr(
        weights, "_from_safetensors", lambda *args: read.append(args[1]) or original(*args)
    )
    for source in (path, str(path), tmp_path):
        assert equal(load_codebooks(source), state)
    # the other parts of the model are not read
    assert not [name for name in read if name.startswith(("encoder", "decoder"))]
    assert set(read) == {name for name in state if name.startswith("quantizer")}


def test_sharded(state, tmp_path):
    names, files = sorted(state), {}
    for n in range(2):
        part = names[n::2]
        files |= dict.fromkeys(part, f"model-{n}.safetensors")
        save_file({name: state[name] for name in part}, tmp_path / f"model-{n}.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": files}))
    for source in (index, tmp_path):
        assert equal(load_codebooks(source), state)
    (tmp_path / "model-1.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model-1.safetensors, which has "):
        load_codebooks(index)
    save_file({"a": torch.zeros(1)}, tmp_path / "model-1.safetensors")
    with pytest.raises(ValueError, match=r"model-1.safetensors has no tensor"):
        load_codebooks(index)
    for text in ("{", "[]", "{}", '{"weight_map": 3}'):
        index.write_text(text)
        with pytest.raises(ValueError, match="is not an index of safetensors files"):
            load_codebooks(index)


@pytest.mark.parametrize("keys", [[], ["state_dict"], ["best_state", "model"], ["model"]])
@pytest.mark.parametrize("name", ["weights.pt", "last.ckpt", "pytorch_model.bin"])
def test_torch_files(keys, name, state, tmp_path):
    saved = state
    for key in reversed(keys):
        saved = {"epoch": 3, key: saved}
    torch.save(saved, tmp_path / name)
    assert equal(load_codebooks(tmp_path / name), state)
    assert equal(load_codebooks(saved), state)
    if name == "pytorch_model.bin":
        assert equal(load_codebooks(tmp_path), state)


class Code:
    """A pickle of it would run what the file says."""

    def __reduce__(self):
        return (Path.cwd, ())


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such file: .*nothing.pt"):
        load_codebooks(tmp_path / "nothing.pt")
    with pytest.raises(FileNotFoundError, match=r"has none of the files model.safetensors, "):
        load_codebooks(tmp_path)
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(b"text")
    with pytest.raises(ValueError, match=r"bad.safetensors is not a whole safetensors file"):
        load_codebooks(bad)
    for content in (b"", b"text", b"PK\3\4text"):
        (tmp_path / "bad.pt").write_bytes(content)
        with pytest.raises(ValueError, match=r"bad.pt is not a file of torch.save"):
            load_codebooks(tmp_path / "bad.pt")
    torch.save({"codebook.weight": Code()}, tmp_path / "bad.pt")
    with pytest.raises(ValueError, match=r"bad.pt is not a file of torch.save"):
        load_codebooks(tmp_path / "bad.pt")
    torch.save([torch.zeros(1)], tmp_path / "bad.pt")
    with pytest.raises(ValueError, match=r"bad.pt holds a list"):
        load_codebooks(tmp_path / "bad.pt")


# --- errors ---


@pytest.mark.parametrize("wrong", [None, 3, [("codebook.embed", torch.zeros(2, 2))], b"file"])
def test_neither_mapping_nor_path(wrong):
    with pytest.raises(TypeError, match=f"state_dict_or_file is a {type(wrong).__name__};"):
        load_codebooks(wrong)


def test_a_module_is_not_its_state():
    with pytest.raises(TypeError, match=r"is a Linear; .* give its state_dict\(\)"):
        load_codebooks(nn.Linear(2, 2))


def test_nothing_known():
    with pytest.raises(ValueError, match="no codebook that is known") as raised:
        load_codebooks({f"encoder.{n}.weight": torch.zeros(1) for n in range(9)})
    for word in ("_codebook.embed,", "codebook.embed_sum", "9 names", "encoder.4.weight"):
        assert word in str(raised.value)
    assert "encoder.5" not in str(raised.value)
    with pytest.raises(ValueError, match="such as nothing"):
        load_codebooks({})
    # an embedding in another module is not a codebook
    with pytest.raises(ValueError, match="no codebook that is known"):
        load_codebooks({"decoder.embedding.weight": codes()})


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["dac weight_norm", "mimi", "simvq", "heads"])
def test_not_finite(name, bad):
    whole, _ = LAYOUTS[name]("a.")
    for key in whole:
        if key.endswith("initialized"):
            continue
        state = {other: tensor.clone() for other, tensor in whole.items()}
        state[key].view(-1)[-1] = bad
        with pytest.raises(ValueError, match=f"^{key} holds NaN or infinity"):
            load_codebooks(state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_codebook.embed": torch.zeros(3)}, r"_codebook.embed has shape \(3,\); it must be"),
        ({"_codebook.embed": torch.zeros(0, 3)}, r"has shape \(0, 3\); it must be \[K, D\]"),
        ({"_codebook.cluster_size": torch.zeros(3)}, r"cluster_size has shape \(3,\); with "),
        ({"project_in.0.weight": torch.zeros(3, 3)}, "project_in is not a linear map: .*in.0.w"),
        (
            {"project_in.weight": torch.zeros(3, 3), "project_in.scale": torch.zeros(3)},
            "project_in is not a linear map: .*project_in.scale",
        ),
        ({"project_in.bias": torch.zeros(3)}, "project_in is not a linear map: .*project_in.bias"),
        ({"project_in.weight_g": torch.zeros(3)}, "project_in is not a linear map: .*weight_g"),
        (
            {"project_out.weight": torch.zeros(3, 3, 3)},
            r"project_out.weight has shape \(3, 3, 3\); it must be \[out, in\]",
        ),
        ({"_codebook.codebook_mean": torch.zeros(1, 1, 3)}, "codebook_mean changes the codes"),
        ({"_codebook.vq_bridge.weight": torch.zeros(3, 3)}, "vq_bridge.weight changes the codes"),
    ],
)
def test_what_does_not_fit(change, message):
    state = {"_codebook.embed": codes(1, K, D), "_codebook.cluster_size": torch.ones(1, K)}
    with pytest.raises(ValueError, match=message):
        load_codebooks(state | change)


def test_other_errors():
    with pytest.raises(TypeError, match=r"a.codebook.embed is a list; it must be a tensor"):
        load_codebooks({"a.codebook.embed": [1.0]})
    with pytest.raises(ValueError, match=r"embed_sum is there, but not a.codebook.cluster_usage"):
        load_codebooks({"a.codebook.embed_sum": codes()})
    with pytest.raises(ValueError, match=r"is there, but not a.code_transform.weight"):
        load_codebooks({"a.frozen_codebook": codes()})
    deep = {"a.frozen_codebook": codes(), "a.code_transform.0.weight": torch.zeros(D, D)}
    with pytest.raises(ValueError, match=r"a.code_transform is not a linear map"):
        load_codebooks(deep)
    levels = {f"a.layers.{n}._codebook.embed": codes() for n in range(2)}
    with pytest.raises(ValueError, match=r"a.mlps.0.w changes the codes in each forward"):
        load_codebooks(levels | {"a.mlps.0.w": codes()})


@pytest.mark.parametrize(
    ("name", "flag"),
    [
        ("_codebook.embed", "_codebook.initted"),
        ("_codebook.embed", "_codebook.inited"),
        ("codebook.embed", "codebook.inited"),
    ],
)
def test_not_started(name, flag):
    with pytest.warns(UserWarning, match=f"a.{name} has not started: a.{flag} is false") as seen:
        load_codebooks({f"a.{name}": torch.zeros(1, K, D), f"a.{flag}": torch.zeros(1)})
    assert seen[0].filename == __file__
    load_codebooks({f"a.{name}": codes(), f"a.{flag}": torch.tensor(True)})


# --- the classes of the projects, where they are installed ---


def fill(module: nn.Module) -> nn.Module:
    """Random values in all tensors."""
    for name, tensor in module.state_dict().items():
        if name.endswith(("initted", "inited", "initialized")):
            continue
        if tensor.is_floating_point():
            tensor.normal_()
        if name.endswith(("cluster_size", "cluster_usage")):
            tensor.abs_()
            tensor.view(-1)[0] = 0
    return module.eval()


def vqp():
    return pytest.importorskip("vector_quantize_pytorch")


@pytest.mark.parametrize(
    ("options", "width"),
    [
        ({}, 0),
        ({"codebook_dim": 2}, 0),
        ({"use_cosine_sim": True}, 0),
        ({"learnable_codebook": True, "ema_update": False}, 0),
        ({"heads": 2, "codebook_dim": 3, "separate_codebook_per_head": True}, 2),
        ({"heads": 2, "codebook_dim": 2, "separate_codebook_per_head": True}, 2),
    ],
)
def test_vector_quantize_pytorch(options, width):
    module = fill(vqp().VectorQuantize(4, K, **options))
    indices = chosen(4, 6, width) if width else chosen()
    check(module.state_dict(), [("", [indices], module.get_output_from_indices(indices))])
    # and the search finds what theirs finds
    if not options:
        x = torch.randn(20, 4)
        (level,) = load_codebooks(module.state_dict())[""].levels
        assert torch.equal(vqtriton.nearest_code(x, level.codebook), module(x)[1])


def test_shared_heads_of_vector_quantize_pytorch():
    module = fill(vqp().VectorQuantize(4, K, heads=2, codebook_dim=3))
    # 1.32.0 cannot decode the indices of heads that share their codes, but forward does
    want, indices, _ = module(torch.randn(4, 6, 4))
    found = check(module.state_dict(), [("", [indices], want)])
    assert found[""].levels[0].heads == 2
    assert found[""].levels[0].codebook.shape == (K, 3)


@pytest.mark.parametrize("options", [{}, {"codebook_dim": 2}, {"shared_codebook": True}])
def test_residual_vector_quantize_pytorch(options):
    module = fill(vqp().ResidualVQ(dim=4, num_quantizers=LEVELS, codebook_size=K, **options))
    indices = chosen(4, 6, LEVELS)
    want = module.get_output_from_indices(indices)
    check(module.state_dict(prefix="a.b."), [("a.b", list(indices.unbind(-1)), want)])


def test_grouped_residual_vector_quantize_pytorch():
    module = fill(vqp().GroupedResidualVQ(dim=4, groups=2, num_quantizers=2, codebook_size=K))
    indices = chosen(2, 4, 6, 2)
    want = module.get_output_from_indices(indices).chunk(2, -1)
    checks = [(f"rvqs.{n}", list(indices[n].unbind(-1)), want[n]) for n in range(2)]
    check(module.state_dict(), checks)


@pytest.mark.parametrize("transform", [None, nn.Linear(6, 4), "residual"])
def test_simvq_of_vector_quantize_pytorch(transform):
    if transform == "residual":
        module = fill(vqp().ResidualSimVQ(dim=4, num_quantizers=2, codebook_size=K))
        indices = chosen(4, 6, 2)
        want = module.get_output_from_indices(indices)
        check(module.state_dict(), [("", list(indices.unbind(-1)), want)])
        return
    dims = {"codebook_transform": transform, "frozen_codebook_dim": 6}
    module = fill(vqp().SimVQ(4, K, **dims))
    indices = chosen()
    check(module.state_dict(), [("", [indices], module.indices_to_codes(indices))])


@pytest.mark.parametrize(
    "options", [{"affine_param": True}, {"codebook_dim": 2, "layernorm_after_project_in": True}]
)
def test_what_vector_quantize_pytorch_adds_is_refused(options):
    state = vqp().VectorQuantize(4, K, **options).state_dict()
    with pytest.raises(ValueError, match=r"codebook_mean|project_in is not a linear map"):
        load_codebooks(state)


def test_qinco_and_other_transforms_are_refused():
    qinco = vqp().ResidualVQ(
        dim=4, num_quantizers=2, codebook_size=K, implicit_neural_codebook=True
    )
    with pytest.raises(ValueError, match=r"mlps.0.* changes the codes"):
        load_codebooks(qinco.state_dict())
    deep = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    with pytest.raises(ValueError, match="code_transform is not a linear map"):
        load_codebooks(vqp().SimVQ(4, K, codebook_transform=deep).state_dict())


def real(name: str):
    """A module of a project; packages that only its other parts need may be absent."""
    try:
        return foreign(name)
    except ModuleNotFoundError as error:
        pytest.skip(f"{error.name} is not installed")


def modeling(name: str):
    """A module of transformers."""
    return real(f"transformers.models.{name}.modeling_{name}")


CONFIG = SimpleNamespace(
    **{"codebook_size": K, "codebook_dim": D, "hidden_size": DIM, "num_quantizers": LEVELS},
    **{"vector_quantization_hidden_dimension": D, "num_semantic_quantizers": 1},
    **{"frame_rate": 50, "n_codebooks": LEVELS, "quantizer_dropout": 0},
    **{"num_embeddings": K, "embed_dim": D, "num_patches": 2},
)
quiet = pytest.mark.filterwarnings("ignore")


@quiet
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("encodec", "EncodecResidualVectorQuantizer"),
        ("xcodec", "XcodecResidualVectorQuantization"),
        ("higgs_audio_v2_tokenizer", "HiggsAudioV2TokenizerResidualVectorQuantization"),
    ],
)
def test_residual_quantizers_of_transformers(name, kind):
    module = fill(getattr(modeling(name), kind)(CONFIG))
    indices = chosen(LEVELS, 2, 6)
    want = module.decode(indices).mT
    found = check(module.state_dict(prefix="quantizer."), [("quantizer", list(indices), want)])
    projects = found["quantizer"].levels[0].project_in is not None
    assert projects == (name == "higgs_audio_v2_tokenizer")


@quiet
def test_mimi_of_transformers():
    module = fill(modeling("mimi").MimiSplitResidualVectorQuantizer(CONFIG))
    indices = chosen(2, LEVELS, 6)
    found = load_codebooks(module.state_dict(prefix="quantizer."))
    semantic, acoustic = (
        found[f"quantizer.{name}_residual_vector_quantizer"] for name in ("semantic", "acoustic")
    )
    first, *others = indices.unbind(1)
    same(semantic.decode(first) + acoustic.decode(*others), module.decode(indices).mT)
    assert semantic.project_in.weight.shape == (D, DIM)


@quiet
@pytest.mark.parametrize("kind", ["plain", "weight_norm", "parametrized"])
def test_dac_of_transformers(kind):
    module = modeling("dac").DacResidualVectorQuantizer(CONFIG)
    norms = {
        "plain": lambda conv: conv,
        "weight_norm": lambda conv: old_weight_norm(conv),
        "parametrized": torch.nn.utils.parametrizations.weight_norm,
    }
    for level in module.quantizers:
        level.in_proj, level.out_proj = (norms[kind](m) for m in (level.in_proj, level.out_proj))
    fill(module)
    indices = chosen(2, LEVELS, 6)
    want = module.from_codes(indices)[0].mT
    state = module.state_dict(prefix="quantizer.")
    assert any("weight_g" in key for key in state) == (kind == "weight_norm")
    assert any("original0" in key for key in state) == (kind == "parametrized")
    found = check(state, [("quantizer", list(indices.unbind(1)), want)])
    x = torch.randn(2, DIM, 6)
    for ours, theirs in zip(found["quantizer"].levels, module.quantizers, strict=True):
        same(F.linear(x.mT, *ours.project_in), theirs.in_proj(x).mT)


def old_weight_norm(conv: nn.Module) -> nn.Module:
    return torch.nn.utils.weight_norm(conv)


@quiet
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("chameleon", "ChameleonVQVAEVectorQuantizer"),
        ("emu3", "Emu3VQVAEVectorQuantizer"),
        ("janus", "JanusVQVAEVectorQuantizer"),
        ("glm_image", "GlmImageVQVAEVectorQuantizer"),
    ],
)
def test_image_tokenizers_of_transformers(name, kind):
    module = fill(getattr(modeling(name), kind)(CONFIG))
    indices = chosen()
    state = module.state_dict(prefix="model.vqmodel.quantize.")
    found = check(state, [("model.vqmodel.quantize", [indices], module.embedding(indices))])
    codebook = found["model.vqmodel.quantize"].levels[0].codebook
    if name == "glm_image":
        # its tensors do not say so; the docstring of load_codebooks does
        codebook = F.normalize(codebook, dim=-1)
    # [B, D, H, W], Emu3 has frames as well
    x = torch.randn(2, D, 4, 4)
    given = x[:, None] if name == "emu3" else x
    theirs = module(given) if name == "emu3" else module(given)[2]
    rows = x.movedim(1, -1).reshape(-1, D)
    rows = F.normalize(rows, dim=-1) if name == "glm_image" else rows
    assert torch.equal(vqtriton.nearest_code(rows, codebook), theirs.reshape(-1))


@quiet
def test_diffusers():
    pytest.importorskip("diffusers")
    vae = pytest.importorskip("diffusers.models.autoencoders.vae")
    module = fill(vae.VectorQuantizer(K, D, beta=0.25))
    indices = chosen(2, 4, 4)
    want = module.get_codebook_entry(indices.reshape(-1), (2, 4, 4, D)).movedim(1, -1)
    check(module.state_dict(prefix="quantize."), [("quantize", [indices], want)])


@quiet
@pytest.mark.parametrize("dim", [DIM, D])
def test_encodec(dim):
    core = real("encodec.quantization.core_vq")
    options = {"codebook_dim": D, "codebook_size": K, "kmeans_init": False}
    module = fill(core.ResidualVectorQuantization(num_quantizers=LEVELS, dim=dim, **options))
    indices = chosen(LEVELS, 2, 6)
    want = module.decode(indices).mT
    check(module.state_dict(prefix="quantizer.vq."), [("quantizer", list(indices), want)])


@quiet
def test_moshi():
    quantization = real("moshi.quantization")
    options = {"dimension": D, "input_dimension": DIM, "output_dimension": DIM}
    module = quantization.SplitResidualVectorQuantizer(n_q=LEVELS, bins=K, **options)
    indices = chosen(2, LEVELS, 6)
    fill(module)
    for name, tensor in module.state_dict().items():
        if name.endswith("_initialized"):
            tensor.fill_(1)
    found = load_codebooks(module.state_dict(prefix="quantizer."))
    first, *others = indices.unbind(1)
    ours = found["quantizer.rvq_first"].decode(first) + found["quantizer.rvq_rest"].decode(*others)
    same(ours, module.decode(indices).mT)


@quiet
def test_descript_audio_codec():
    quantize = real("dac.nn.quantize")
    options = {"n_codebooks": LEVELS, "codebook_size": K, "codebook_dim": D}
    module = fill(quantize.ResidualVectorQuantize(input_dim=DIM, **options))
    indices = chosen(2, LEVELS, 6)
    want = module.from_codes(indices)[0].mT
    state = module.state_dict(prefix="quantizer.")
    check(state, [("quantizer", list(indices.unbind(1)), want)])


# --- the state of VectorQuantize in vector-quantize-pytorch ---

DECAY, EPS = 0.9, 1e-3


def their_state(size: int = K, dim: int = D, heads: int = 1, is_started: bool = True) -> dict:
    """As release 1.32.0 has it."""
    return {
        "_codebook.initted": torch.tensor(is_started),
        "_codebook.cluster_size": torch.rand(heads, size) + 0.1,
        "_codebook.embed_avg": torch.randn(heads, size, dim),
        "_codebook.embed": torch.randn(heads, size, dim),
    }


@pytest.mark.parametrize("update", ["ema", "gradient"])
@pytest.mark.parametrize("assign", [False, True])
def test_their_state_loads(update, assign):
    state = their_state()
    vq = VectorQuantize(D, K, codebook_update=update, kmeans_init=True)
    assert vq.load_state_dict(state, assign=assign) == ([], [])
    assert torch.equal(vq.codebook, state["_codebook.embed"][0])
    assert torch.equal(vq.cluster_size, state["_codebook.cluster_size"][0])
    assert isinstance(vq.codebook, nn.Parameter) == (update == "gradient")
    assert vq.is_initialized
    # the caller's dict is left as it was
    assert state.keys() == their_state().keys()
    # a step moves the codes from there
    before, sizes = vq.codebook.detach().clone(), vq.cluster_size.clone()
    x = torch.randn(50, D)
    indices = vq(x).indices
    assert torch.equal(indices, vqtriton.nearest_code(x, before))
    if update == "ema":
        counts = torch.bincount(indices, minlength=K)
        same(vq.cluster_size, 0.99 * sizes + 0.01 * counts)


def test_their_state_in_a_model():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Linear(2, D)
            self.parts = nn.ModuleList([VectorQuantize(D, K), VectorQuantize(D, K)])

    model = Model()
    state = {f"encoder.{n}": t for n, t in nn.Linear(2, D).state_dict().items()}
    for n in range(2):
        state |= {f"parts.{n}.{name}": tensor for name, tensor in their_state().items()}
    model.load_state_dict(state)
    for n, vq in enumerate(model.parts):
        assert torch.equal(vq.codebook, state[f"parts.{n}._codebook.embed"][0])


def test_their_state_without_sizes_or_in_half():
    vq = VectorQuantize(D, K)
    embed = torch.randn(1, K, D).half()
    found = vq.load_state_dict({"_codebook.embed": embed}, strict=False)
    assert found.missing_keys == ["cluster_size"]
    assert torch.equal(vq.codebook, embed[0].float())


def test_their_state_that_waits_for_kmeans():
    waiting = their_state(is_started=False)
    vq = VectorQuantize(D, K, kmeans_init=True)
    vq.set_codebook(torch.randn(K, D))
    vq.load_state_dict(waiting)
    assert not vq.is_initialized
    vq(torch.randn(50, D) + 100)
    assert vq.codebook.mean() > 50
    with pytest.raises(RuntimeError, match=r"_codebook.initted is false: .* kmeans_init=True"):
        VectorQuantize(D, K).load_state_dict(waiting)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (
            their_state(heads=2),
            r"_codebook.embed has .*it has 2 heads, see separate_codebook_per_head",
        ),
        (their_state(size=K + 1), rf"embed has shape \(1, 8, 3\); it must be \(1, {K}, {D}\)"),
        (
            their_state(dim=2) | {"project_in.weight": torch.zeros(2, D)},
            r"embed has shape \(1, 7, 2\); .*project_in is before it, see codebook_dim",
        ),
        (their_state() | {"_codebook.batch_mean": torch.zeros(1, 1, D)}, "batch_mean has no count"),
    ],
)
@pytest.mark.parametrize("strict", [False, True])
def test_their_state_that_does_not_fit(state, message, strict):
    vq = VectorQuantize(D, K)
    before = vq.codebook.clone()
    model = nn.Sequential(vq)
    with pytest.raises(RuntimeError, match=message):
        model.load_state_dict({f"0.{name}": t for name, t in state.items()}, strict=strict)
    assert torch.equal(vq.codebook, before)


def test_projections_are_not_dropped_unseen():
    state = their_state() | {"project_in.weight": torch.zeros(D, 9)}
    with pytest.raises(RuntimeError, match=r"Unexpected key.*project_in.weight"):
        VectorQuantize(D, K).load_state_dict(state)


@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_what_is_written_comes_back(update):
    vq = VectorQuantize(D, K, codebook_update=update)
    vq(torch.randn(50, D))
    state = to_vector_quantize_pytorch(vq)
    assert {name: tensor.shape for name, tensor in state.items()} == {
        name: tensor.shape for name, tensor in their_state().items()
    }
    other = VectorQuantize(D, K, codebook_update=update)
    other.load_state_dict(state)
    for name, tensor in vq.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor)
    (level,) = load_codebooks(state)[""].levels
    assert torch.equal(level.codebook, vq.codebook)
    # copies
    state["_codebook.embed"].zero_()
    state["_codebook.cluster_size"].zero_()
    assert vq.codebook.any()
    assert vq.cluster_size.all()


def test_what_waits_is_written():
    state = to_vector_quantize_pytorch(VectorQuantize(D, K, kmeans_init=True))
    assert type(state["_codebook.initted"]) is Tensor
    assert state["_codebook.initted"].dtype == torch.bool
    assert not state["_codebook.initted"]


def test_lengths_of_cosine_codes_are_in_the_averages():
    """Their embed has length 1; sum and size say how long the mean of unit vectors is."""
    sizes, means = torch.rand(1, K) + 0.5, 0.3 * torch.randn(1, K, D)
    sizes[0, 0] = 0
    state = their_state() | {"_codebook.cluster_size": sizes}
    state |= {"_codebook.embed": F.normalize(means, dim=-1)}
    state |= {"_codebook.embed_avg": means * sizes[..., None]}
    vq = VectorQuantize(D, K, use_cosine_sim=True)
    vq.load_state_dict(state)
    same(vq.codebook[1:], means[0, 1:])
    # one that nobody chose has no length
    same(vq.codebook[0], state["_codebook.embed"][0, 0])
    again = to_vector_quantize_pytorch(vq, eps=0.0)
    for name in ("embed", "cluster_size"):
        same(again[f"_codebook.{name}"], state[f"_codebook.{name}"])
    same(again["_codebook.embed_avg"], state["_codebook.embed_avg"])


RESIDUAL_OPTIONS = [{}, {"codebook_dim": 3}, {"shared_codebook": True}, {"use_cosine_sim": True}]


@pytest.mark.parametrize("options", RESIDUAL_OPTIONS)
@pytest.mark.parametrize("groups", [0, 2])
def test_residual_quantizers_are_written(options, groups):
    kind = vqtriton.GroupedResidualVectorQuantize if groups else vqtriton.ResidualVectorQuantize
    arguments = {"groups": groups} if groups else {}
    rvq = kind(4, K, LEVELS, **arguments, **options)
    rvq(torch.randn(50, 4))
    state = to_vector_quantize_pytorch(rvq)
    start = "rvqs.1." if groups else ""
    names = {name.removeprefix(start) for name in state if name.startswith(start)}
    want = {f"layers.{level}.{name}" for level in range(LEVELS) for name in their_state()}
    if "codebook_dim" in options:
        want |= {f"project_{way}.{name}" for way in ("in", "out") for name in ("weight", "bias")}
    assert names == want
    loaded = load_codebooks(state)[start.rstrip(".")]
    parts = rvq.rvqs[1] if groups else rvq
    indices = chosen(9, LEVELS)
    same(loaded.decode(*indices.unbind(-1)), parts.get_output_from_indices(indices).detach())
    # copies
    for tensor in state.values():
        tensor.zero_()
    assert all(codes.any() for codes in parts.codebooks)


def test_only_a_quantizer_is_written():
    with pytest.raises(TypeError, match="vq is a Linear; it must be a VectorQuantize"):
        to_vector_quantize_pytorch(nn.Linear(2, 2))


def theirs(**options):
    # its defaults that are not ours
    return vqp().VectorQuantize(D, K, decay=DECAY, eps=EPS, **options)


def steps(ours: VectorQuantize, other, number: int = 4) -> None:
    """Both take the same steps, and what differs is what smoothing explains.

    A step of theirs divides by (s + eps) / (1 + K·eps / N) in place of s, so it is off by the
    factor 1 + eps·(1/s + K/N), to first order, where it comes from and where it goes.
    """
    off = torch.zeros(K, 1)
    for _ in range(number):
        x = torch.randn(200, D) * torch.tensor([1.0, 2.0, 3.0])
        before, was = ours.codebook.clone(), ours.cluster_size.clone()
        indices, found = ours(x).indices, other(x)[1]
        assert torch.equal(indices, found)
        sizes = other._codebook.cluster_size[0]
        torch.testing.assert_close(ours.cluster_size, sizes)
        total = min(was.sum(), sizes.sum())
        factor = EPS * (1 / was + 1 / sizes + 2 * K / total)
        largest = torch.maximum(before.abs().amax(1), ours.codebook.abs().amax(1))
        off = off + (1.1 * factor * largest + 1e-6)[:, None]
        gap = (ours.codebook - other._codebook.embed[0]).abs()
        assert (gap <= off).all(), (gap / off).max()
        # far from the way that the codes went
        assert gap.max() < 0.05 * (ours.codebook - before).abs().max()


def test_ours_goes_on_from_theirs():
    torch.manual_seed(1)
    other = theirs()
    for _ in range(5):
        other(torch.randn(200, D))
    ours = VectorQuantize(D, K, decay=DECAY)
    ours.load_state_dict(other.state_dict())
    assert torch.equal(ours.codebook, other.codebook)
    steps(ours, other)


def test_theirs_goes_on_from_ours():
    torch.manual_seed(2)
    ours = VectorQuantize(D, K, decay=DECAY, kmeans_init=True)
    for _ in range(5):
        ours(torch.randn(200, D))
    other = theirs()
    other.load_state_dict(to_vector_quantize_pytorch(ours, eps=EPS), strict=True)
    assert torch.equal(ours.codebook, other.codebook)
    steps(ours, other)


def test_the_next_step_of_theirs_starts_from_our_codes():
    """Also where smoothing matters most: codes that almost no row chooses."""
    ours = VectorQuantize(D, K)
    sizes = torch.tensor([1e-4, 1e-3, 1e-2, 0.1, 1, 10, 100])
    ours.set_codebook(torch.randn(K, D), cluster_size=sizes)
    other = theirs()
    other.load_state_dict(to_vector_quantize_pytorch(ours, eps=EPS))
    # what a step does with its averages
    other._codebook.update_ema()
    same(other.codebook, ours.codebook)


def test_round_trip_through_theirs():
    ours = VectorQuantize(D, K, decay=DECAY)
    ours(torch.randn(200, D))
    other = theirs(kmeans_init=True)
    other.load_state_dict(to_vector_quantize_pytorch(ours))
    again = VectorQuantize(D, K, decay=DECAY, kmeans_init=True)
    again.load_state_dict(other.state_dict())
    for name, tensor in ours.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)


def test_learnable_codebooks_go_on():
    ours = VectorQuantize(D, K, codebook_update="gradient")
    other = theirs(learnable_codebook=True, ema_update=False, rotation_trick=False)
    other.load_state_dict(to_vector_quantize_pytorch(ours), strict=True)
    x, before = torch.randn(100, D), ours.codebook.detach().clone()
    for module in (ours, other):
        optimizer = torch.optim.SGD(module.parameters(), 0.1)
        module(x)[2].backward()
        optimizer.step()
    assert not torch.equal(ours.codebook, before)
    same(ours.codebook.detach(), other.codebook)
    again = VectorQuantize(D, K, codebook_update="gradient")
    again.load_state_dict(other.state_dict())
    assert torch.equal(again.codebook, other.codebook)
    assert again.codebook.requires_grad


def test_their_waiting_state():
    other = theirs(kmeans_init=True)
    ours = VectorQuantize(D, K, kmeans_init=True)
    ours.load_state_dict(other.state_dict())
    assert not ours.is_initialized
    fresh = theirs(kmeans_init=True)
    fresh.load_state_dict(to_vector_quantize_pytorch(ours))
    assert not fresh._codebook.initted


THEIR_PAIRS = {
    "heads": ("VectorQuantize", {"heads": 2, "codebook_dim": 3}),
    "separate heads": (
        "VectorQuantize",
        {"heads": 2, "codebook_dim": 3, "separate_codebook_per_head": True, "use_cosine_sim": True},
    ),
    "projected": ("VectorQuantize", {"codebook_dim": 2}),
    "layernorm": ("VectorQuantize", {"codebook_dim": 2, "layernorm_after_project_in": True}),
    "cosine": ("VectorQuantize", {"use_cosine_sim": True}),
    "levels": ("ResidualVQ", {}),
    "levels, projected": ("ResidualVQ", {"codebook_dim": 2}),
    "levels, shared": ("ResidualVQ", {"shared_codebook": True}),
    "levels, cosine": ("ResidualVQ", {"use_cosine_sim": True}),
    "levels, sizes": ("ResidualVQ", {"codebook_size": (5, 7, 6), "num_quantizers": 3}),
    "groups": ("GroupedResidualVQ", {"groups": 2}),
    "groups, projected": ("GroupedResidualVQ", {"groups": 2, "codebook_dim": 3}),
}


@pytest.mark.parametrize("name", THEIR_PAIRS)
def test_states_of_theirs_and_ours_both_ways(name):
    """Theirs into ours, ours into another of theirs: the same tokens and outputs, and steps."""
    torch.manual_seed(3)
    # so small that what it smooths does not show
    eps = 1e-8
    kind, options = THEIR_PAIRS[name]
    options = {"dim": 4, "codebook_size": K, **options}
    if kind != "VectorQuantize":
        options = {"num_quantizers": LEVELS, **options}
    build = getattr(vqp(), kind)
    theirs, fresh = build(decay=DECAY, eps=eps, **options), build(decay=DECAY, eps=eps, **options)
    for _ in range(4):
        theirs(torch.randn(2, 50, 4))
    core = {"VectorQuantize": VectorQuantize, "ResidualVQ": vqtriton.ResidualVQ}
    # theirs does not divide by the heads
    own = {"decay": DECAY, **options}
    ours = core.get(kind, vqtriton.GroupedResidualVQ)(**own)
    compatible = getattr(vqtriton.vector_quantize_pytorch, kind)(eps=eps, **own)
    for module in (ours, compatible):
        assert module.load_state_dict(theirs.state_dict()) == ([], [])
    fresh.load_state_dict(to_vector_quantize_pytorch(ours, eps=eps), strict=True)
    state, back = theirs.state_dict(), fresh.state_dict()
    assert state.keys() == back.keys()
    for key, tensor in state.items():
        # codes and projections as they were; averages to rounding, and so lengths
        if not key.endswith("embed_avg") and not (options.get("use_cosine_sim")):
            assert torch.equal(back[key], tensor), key
        else:
            same(back[key], tensor)
    x = torch.randn(2, 50, 4)
    results = [module.eval()(x) for module in (theirs, ours, compatible, fresh)]
    for quantized, indices, *_ in results[1:]:
        assert torch.equal(indices, results[0][1])
        same(quantized.detach(), results[0][0])
    # and the next step moves all of them alike
    for module in (theirs, compatible, fresh):
        module.train()(x)
    if "shared" in name:
        # one step there, as many as levels in theirs
        return
    after = [to_vector_quantize_pytorch(compatible, eps=eps), fresh.state_dict()]
    for key, tensor in theirs.state_dict().items():
        if key.endswith(("embed", "cluster_size")):
            for other in after:
                same(other[key], tensor)
