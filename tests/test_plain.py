"""The plain-torch quantizer, in torch and in the runtimes that it is exported to."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import data
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import vqtriton
from vqtriton.screening import error_bound

Search = Callable[[vqtriton.PlainQuantizer, Tensor], tuple[Tensor, Tensor]]
# torch about torch, when it copies an exported program
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*isinstance.treespec, LeafSpec.*:FutureWarning",
)
LAYOUTS = {
    "vectors": ({}, (6, 5, 8)),
    "channels second": ({"channel_last": False}, (6, 8, 5)),
    "images": ({"accept_image_fmap": True}, (6, 8, 3, 4)),
}
BUFFERS = ("codebook", "codes", "half_sqnorm", "mean", "scale")


def quantizer_of(codebook: Tensor, **options: bool) -> vqtriton.VectorQuantize:
    vq = vqtriton.VectorQuantize(codebook.shape[1], codebook.shape[0], **options).eval()
    vq.codebook.copy_(codebook)
    return vq


def channels_last(x: Tensor, layout: str) -> Tensor:
    return x if layout == "vectors" else x.movedim(1, -1)


def well_separated(shape: tuple[int, ...], layout: str) -> tuple[Tensor, Tensor, Tensor]:
    """x in the layout, a codebook [50, 8], and the indices that are right beyond doubt."""
    codebook = torch.randn(50, 8)
    sizes = channels_last(torch.empty(shape), layout).shape[:-1]
    indices = torch.randint(50, sizes)
    x = codebook[indices] + 1e-3 * torch.randn(*sizes, 8)
    return x if layout == "vectors" else x.movedim(-1, 1), codebook, indices


def excess(plain: vqtriton.PlainQuantizer, x: Tensor, indices: Tensor) -> Tensor:
    """How far above the least each chosen distance is, in parts of the bound 4·B/scale².

    A chosen code's score is at most B too high and the best one's at most B too low. A distance is
    ‖y‖² − 2·score in units of 1/scale².
    """
    is_finite = x.isfinite().all(1)
    assert (indices[~is_finite] == 0).all()
    x, indices = x[is_finite], indices[is_finite]
    distances = vqtriton.reference.squared_distances(x, plain.codebook)
    distances = distances.nan_to_num(nan=torch.inf, posinf=torch.inf)
    if not plain.codebook.isfinite().all(1).any():
        assert (indices == 0).all()
        return torch.zeros(1).double()
    scale = plain.scale.double()
    gap = distances.gather(1, indices[:, None])[:, 0] - distances.amin(1)
    y = ((x.double() - plain.mean.double()) * scale).norm(dim=1)
    longest = plain.codes.double().norm(dim=1).amax()
    bound = error_bound(x.shape[1], torch.float32)
    error = bound.products * longest * (y + longest / 2) + bound.distances * y**2 + bound.tiny
    return gap * scale * scale / (4 * error)


def check_hard(search: Search, case: str, n: int, k: int, d: int) -> tuple[float, int]:
    """Largest excess, and how many indices differ from those of `vqtriton.nearest_code`."""
    x, codebook = data.HARD[case](n, k, d)
    plain = vqtriton.PlainQuantizer(quantizer_of(codebook))
    quantized, indices = search(plain, x)
    want = vqtriton.nearest_code(x, codebook)
    differs = indices != want
    parts = excess(plain, x, indices)
    assert parts.max() <= 1
    is_finite = x.isfinite().all(1)
    # bit for bit, NaN included
    assert np.array_equal(quantized[is_finite], codebook[indices[is_finite]], equal_nan=True)
    assert quantized[~is_finite].isnan().all()
    return float(parts.max()), int(differs.sum())


def run_without_vqtriton(load: str, inputs: tuple, folder: Path) -> tuple:
    """What the program gives in a Python that has not imported vqtriton."""
    torch.save(inputs, folder / "inputs.pt")
    script = (
        "import sys, torch\n"
        f"out = {load}(*torch.load('inputs.pt'))\n"
        "assert 'vqtriton' not in sys.modules\n"
        "torch.save(out, 'out.pt')\n"
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return torch.load(folder / "out.pt")


class WithBuffers(nn.Module):
    """The codebook as arguments, so that one export serves many of them."""

    def __init__(self, plain: vqtriton.PlainQuantizer) -> None:
        super().__init__()
        self.plain = plain

    def forward(self, x: Tensor, buffers: tuple) -> tuple[Tensor, Tensor]:
        named = dict(zip(BUFFERS, buffers, strict=True))
        return torch.func.functional_call(self.plain, named, (x,))


class RoundTrip(nn.Module):
    """A model that holds a quantizer, and decodes its indices again."""

    def __init__(self, plain: vqtriton.PlainQuantizer) -> None:
        super().__init__()
        self.plain = plain

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        quantized, indices = self.plain(x)
        return quantized, indices, self.plain.decode(indices)


class Decode(nn.Module):
    def __init__(self, plain: vqtriton.PlainQuantizer) -> None:
        super().__init__()
        self.plain = plain

    def forward(self, indices: Tensor) -> Tensor:
        return self.plain.decode(indices)


def buffers_of(plain: vqtriton.PlainQuantizer) -> tuple[Tensor, ...]:
    return tuple(getattr(plain, name) for name in BUFFERS)


def to_onnx(model: nn.Module, *inputs: Tensor | tuple) -> Callable[..., tuple[Tensor, ...]]:
    """The model in ONNX Runtime: a function of tensors. The first dim of the first is dynamic."""
    # not at the top: where the kernels are tested there may be none of these
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    fixed = torch.utils._pytree.tree_map(lambda _: None, inputs[1:])
    shapes = ({0: torch.export.Dim.DYNAMIC}, *fixed)
    program = torch.onnx.export(
        model.eval(), inputs, dynamo=True, dynamic_shapes=shapes, verbose=False
    )
    # the standard ops and no others
    assert {node.domain for node in program.model_proto.graph.node} == {""}
    assert not program.model_proto.functions
    session = onnxruntime.InferenceSession(
        program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"]
    )

    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        names = [argument.name for argument in session.get_inputs()]
        feed = {name: t.numpy() for name, t in zip(names, inputs, strict=True)}
        return tuple(torch.from_numpy(array) for array in session.run(None, feed))

    return run


def check_round_trip(run: Callable, model: RoundTrip, layout: str) -> None:
    """On several batch sizes: rows beyond doubt, a row that is not finite, close calls."""
    _, shape = LAYOUTS[layout]
    codebook = model.plain.codebook
    for n in (1, 2, 7):
        x, _, _ = well_separated((n, *shape[1:]), layout)
        vectors = channels_last(x, layout)
        want = torch.randint(len(codebook), vectors.shape[:-1])
        vectors.copy_(codebook[want] + 1e-3 * torch.randn(vectors.shape))
        quantized, indices, decoded = run(x)
        assert indices.dtype == torch.int64
        assert torch.equal(indices, want)
        assert torch.equal(indices, vqtriton.nearest_code(vectors, codebook))
        assert quantized.shape == decoded.shape == x.shape
        assert torch.equal(quantized, decoded)
        assert torch.equal(channels_last(quantized, layout), codebook[want])

        vectors[0, 1, ...] = torch.nan
        quantized, indices, decoded = run(x)
        is_finite = vectors.isfinite().all(-1)
        assert torch.equal(indices, want.where(is_finite, 0))
        assert torch.equal(channels_last(quantized, layout).isfinite().all(-1), is_finite)
        assert decoded.isfinite().all()

        # half way between two codes
        a, b = torch.randint(len(codebook), (2, *want.shape))
        vectors.copy_((codebook[a] + codebook[b]) / 2)
        _, indices, _ = run(x)
        assert excess(model.plain, vectors.reshape(-1, 8), indices.reshape(-1)).max() <= 1


@pytest.mark.parametrize("case", data.HARD)
def test_held_to_nearest_code(case):
    for n, k, d in ((200, 1, 3), (300, 70, 3), (300, 65, 16), (150, 130, 100)):
        check_hard(lambda plain, x: plain(x), case, n, k, d)


def test_the_bound_finds_coarse_arithmetic():
    x, codebook = data.near_ties(2000, 65, 16)
    plain = vqtriton.PlainQuantizer(quantizer_of(codebook))
    exact_scores = plain._scores
    plain._scores = lambda y: exact_scores(y.bfloat16().float())
    assert excess(plain, x, plain(x)[1]).max() > 1


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_well_separated_rows(layout, dtype):
    options, shape = LAYOUTS[layout]
    x, codebook, want = well_separated(shape, layout)
    vq = quantizer_of(codebook, **options)
    plain = vqtriton.PlainQuantizer(vq)
    x = x.to(dtype)
    quantized, indices = plain(x)
    assert torch.equal(indices, want)
    full = vq(x)
    assert torch.equal(indices, full.indices)
    assert quantized.dtype == dtype
    assert torch.equal(quantized, full.quantized)
    assert torch.equal(plain.decode(indices), vq.get_output_from_indices(indices))
    # the same values with other strides
    strided = x.mT.contiguous().mT
    assert torch.equal(plain(strided)[1], want)
    assert torch.equal(plain(x.flip(0))[1], want.flip(0))


def test_no_rows_and_single_vector():
    codebook = torch.randn(5, 8)
    plain = vqtriton.PlainQuantizer(quantizer_of(codebook))
    assert plain(torch.empty(0, 3, 8))[1].shape == (0, 3)
    quantized, index = plain(codebook[3])
    assert index.shape == ()
    assert index == 3
    assert torch.equal(quantized, codebook[3])


def test_rows_beyond_the_range_of_float32():
    """Products with them, and what they are when scaled, overflow float32."""
    n, k, d = 300, 70, 5
    for size in (1e-40, 1e-30, 1.0, 1e30):
        codebook = torch.randn(k, d) * size
        plain = vqtriton.PlainQuantizer(quantizer_of(codebook))
        for exponent in (30, 60, 100, 126):
            x = torch.randn(n, d).clamp(-3, 3) * 2.0**exponent
            quantized, indices = plain(x)
            assert quantized.isfinite().all()
            assert excess(plain, x, indices).max() <= 1
    # the coordinate that overflows is of no account
    codebook = torch.tensor([[3e38, 0], [3e38, 1]])
    plain = vqtriton.PlainQuantizer(quantizer_of(codebook))
    assert torch.equal(plain(codebook)[1], torch.arange(2))
    assert plain(-codebook)[0].isfinite().all()


def test_decode_masked():
    codebook = torch.randn(5, 3)
    plain = vqtriton.PlainQuantizer(quantizer_of(codebook, accept_image_fmap=True))
    indices = torch.tensor([[[0, -1], [4, 2]]])
    decoded = plain.decode(indices)
    assert decoded.shape == (1, 3, 2, 2)
    assert torch.equal(decoded[0, :, 0, 1], torch.zeros(3))
    assert torch.equal(decoded[0, :, 1, 0], codebook[4])
    assert torch.equal(plain.decode(indices.int()), decoded)


def test_copies_the_codebook():
    codebook = torch.randn(5, 3)
    for update in ("ema", "gradient"):
        vq = vqtriton.VectorQuantize(3, 5, codebook_update=update)
        vq.codebook.data.copy_(codebook)
        plain = vqtriton.PlainQuantizer(vq)
        vq.codebook.data.zero_()
        assert torch.equal(plain(codebook)[1], torch.arange(5))
        assert not any(t.requires_grad for t in plain.state_dict(keep_vars=True).values())
        other = vqtriton.PlainQuantizer(vq)
        other.load_state_dict(plain.state_dict())
        assert torch.equal(other(codebook)[0], codebook)


def test_stays_float32_when_cast():
    x, codebook = torch.randn(64, 16), torch.randn(70, 16)
    plain = vqtriton.PlainQuantizer(quantizer_of(codebook))
    want = plain(x.bfloat16())[1]
    model = nn.Sequential(plain).bfloat16()
    assert all(t.dtype == torch.float32 for t in model.state_dict().values())
    assert torch.equal(model(x.bfloat16())[1], want)


def test_autocast_changes_nothing():
    x, codebook = torch.randn(300, 16), torch.randn(70, 16)
    plain = vqtriton.PlainQuantizer(quantizer_of(codebook))
    want = plain(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = plain(x)
    assert torch.equal(got[1], want[1])
    assert torch.equal(got[0], want[0])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_refuses_what_does_not_fit(layout):
    options, shape = LAYOUTS[layout]
    plain = vqtriton.PlainQuantizer(vqtriton.VectorQuantize(8, 5, **options))
    for wrong in ((), (4, 7), (4, 7, 9, 7), (7,)):
        with pytest.raises(ValueError, match=r"x has shape .* with D = 8"):
            plain(torch.zeros(wrong))
    with pytest.raises(TypeError, match=r"x is torch\.float64; it must be float32"):
        plain(torch.zeros(shape, dtype=torch.float64))
    with pytest.raises(TypeError, match="x is a list"):
        plain([1.0])
    with pytest.raises(TypeError, match=r"indices is torch\.float32"):
        plain.decode(torch.zeros(3))
    with pytest.raises(TypeError, match="vq is a Linear; it must be a VectorQuantize"):
        vqtriton.PlainQuantizer(nn.Linear(2, 2))


def test_torch_export_of_x_that_requires_grad(tmp_path):
    x, codebook, want = well_separated((6, 5, 8), "vectors")
    plain = vqtriton.PlainQuantizer(quantizer_of(codebook))
    x.requires_grad_()
    batch = torch.export.Dim("batch")
    program = torch.export.export(plain, (x,), dynamic_shapes={"x": {0: batch}})
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert all(name.startswith("aten.") for name in names), names
    if torch.__version__.startswith("2.8."):
        # it saves no infinity, as in the comparison that finds rows that are not finite
        with pytest.raises(ValueError, match="Out of range float values"):
            torch.export.save(program, tmp_path / "program.pt2")
        return
    torch.export.save(program, tmp_path / "program.pt2")
    loaded = torch.export.load(tmp_path / "program.pt2").module()
    for module in (plain, program.module(), loaded):
        for n in (6, 3):
            quantized, indices = module(x[:n])
            assert not quantized.requires_grad
            assert torch.equal(indices, want[:n])
            assert torch.equal(quantized, codebook[want[:n]])
    load = "torch.export.load('program.pt2').module()"
    quantized, indices = run_without_vqtriton(load, (x.detach(),), tmp_path)
    assert torch.equal(indices, want)
    assert torch.equal(quantized, codebook[want])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_onnx_layouts(layout):
    options, shape = LAYOUTS[layout]
    x, codebook, _ = well_separated(shape, layout)
    model = RoundTrip(vqtriton.PlainQuantizer(quantizer_of(codebook, **options)))
    check_round_trip(to_onnx(model, x), model, layout)


def test_onnx_half():
    x, codebook, want = well_separated((6, 5, 8), "vectors")
    plain = vqtriton.PlainQuantizer(quantizer_of(codebook))
    quantized, indices = to_onnx(plain, x.half())(x.half()[:4])
    assert quantized.dtype == torch.float16
    assert torch.equal(indices, want[:4])
    assert torch.equal(quantized, codebook[want[:4]].half())


def test_onnx_decode():
    codebook = torch.randn(50, 8)
    plain = vqtriton.PlainQuantizer(quantizer_of(codebook, accept_image_fmap=True))
    indices = torch.randint(-1, 50, (4, 3, 5))
    run = to_onnx(Decode(plain), indices)
    for n in (1, 4, 9):
        indices = torch.randint(-1, 50, (n, 3, 5))
        assert torch.equal(run(indices)[0], plain.decode(indices))


def test_onnx_on_hard_data():
    n, k, d = 200, 65, 16
    plain = vqtriton.PlainQuantizer(quantizer_of(torch.randn(k, d)))
    run = to_onnx(WithBuffers(plain), torch.randn(n, d), buffers_of(plain))
    for case in data.HARD:
        check_hard(lambda plain, x: run(x, *buffers_of(plain)), case, n - 7, k, d)


class Everything(nn.Module):
    """All of it in one program, since it is compilers that take the time."""

    def __init__(self, rows: RoundTrip, images: RoundTrip, hard: WithBuffers) -> None:
        super().__init__()
        self.rows, self.images, self.hard = rows, images, hard

    def forward(self, rows: Tensor, images: Tensor, hard: Tensor, buffers: tuple) -> tuple:
        return self.rows(rows), self.images(images), self.hard(hard, buffers)


@pytest.mark.slow
def test_aot_inductor(tmp_path):
    k, d = 65, 16
    inputs, models = [], []
    for layout in ("vectors", "images"):
        options, shape = LAYOUTS[layout]
        x, codebook, _ = well_separated(shape, layout)
        inputs.append(x)
        models.append(RoundTrip(vqtriton.PlainQuantizer(quantizer_of(codebook, **options))))
    plain = vqtriton.PlainQuantizer(quantizer_of(torch.randn(k, d)))
    inputs += [torch.randn(200, d), buffers_of(plain)]
    dynamic = {0: torch.export.Dim.DYNAMIC}
    program = torch.export.export(
        Everything(*models, WithBuffers(plain)),
        tuple(inputs),
        dynamic_shapes=(dynamic, dynamic, dynamic, (None,) * len(BUFFERS)),
    )
    path = torch._inductor.aoti_compile_and_package(
        program, package_path=str(tmp_path / "model.pt2")
    )
    run = torch._inductor.aoti_load_package(path)

    check_round_trip(lambda x: run(x, *inputs[1:])[0], models[0], "vectors")
    check_round_trip(lambda x: run(inputs[0], x, *inputs[2:])[1], models[1], "images")
    for case in data.HARD:
        check_hard(lambda plain, x: run(*inputs[:2], x, buffers_of(plain))[2], case, 193, k, d)

    load = "torch._inductor.aoti_load_package('model.pt2')"
    got = run_without_vqtriton(load, tuple(inputs), tmp_path)
    for ours, theirs in zip(run(*inputs), got, strict=True):
        assert all(map(torch.equal, ours, theirs))
