"""A default dtype that somebody else has set changes nothing."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch

import vqtriton
import vqtriton.kernels

# the folder of the package under test, installed or in the checkout
FOLDERS = [Path(vqtriton.__file__).parent, *map(Path, vqtriton.kernels.__path__)]
FILES = sorted({file for folder in FOLDERS for file in folder.glob("**/*.py")})
# those of torch that give a tensor of the default dtype, or of one that follows from the values
FACTORIES = {
    *("arange", "as_tensor", "asarray", "empty", "empty_permuted", "empty_strided", "eye"),
    *("full", "linspace", "logspace", "ones", "rand", "randint", "randn", "range", "scalar_tensor"),
    *("tensor", "tril_indices", "triu_indices", "zeros", "bartlett_window", "hann_window"),
    *("normal", "randperm", "from_file", "complex", "Tensor", "FloatTensor"),
}


def without_dtype(source: str) -> list[int]:
    """Lines with a call of torch that makes a tensor and names no dtype."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        is_torch = isinstance(node.func.value, ast.Name) and node.func.value.id == "torch"
        has_dtype = any(keyword.arg == "dtype" for keyword in node.keywords)
        if is_torch and node.func.attr in FACTORIES and not has_dtype:
            lines.append(node.lineno)
    return lines


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_whoever_makes_a_tensor_names_its_dtype(path: Path) -> None:
    assert without_dtype(path.read_text()) == []


def test_what_names_none_is_found() -> None:
    source = (
        "import torch\na = torch.zeros(3)\nb = torch.rand(3, dtype=x.dtype)\nc = torch.ones(\n2)"
    )
    assert without_dtype(source) == [2, 4]
    # what is there already has a dtype
    assert without_dtype("a = torch.zeros_like(x); b = x.new_zeros(3); c = tl.zeros(3)") == []
    assert len(FILES) > 20


@pytest.fixture(params=[torch.float16, torch.bfloat16, torch.float64], ids=str)
def default_dtype(request):
    """To be set in a test, and what it was afterwards."""
    before = torch.get_default_dtype()
    yield request.param
    torch.set_default_dtype(before)


def clusterings(x: torch.Tensor) -> dict[str, torch.Tensor]:
    found = {}
    for init in ("random", "k-means++"):
        for iters in (0, 4):
            source = torch.Generator().manual_seed(3)
            seen = []
            found[f"{init}, {iters}"] = vqtriton.kmeans(
                x, 40, iters, source, init=init, callback=lambda *row, seen=seen: seen.append(row)
            )
            found[f"{init}, {iters}: progress"] = torch.tensor(seen, dtype=torch.float64)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_kmeans_gives_the_same_bits(default_dtype, dtype) -> None:
    x = torch.randn(3000, 5).to(dtype)
    # so that some codes are empty at first
    x[:1500] = x[0]
    want = clusterings(x)
    torch.set_default_dtype(default_dtype)
    found = clusterings(x)
    for name, value in want.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value), name


def test_the_ops_give_the_same_bits(default_dtype) -> None:
    x, codebook = torch.randn(300, 5), torch.randn(40, 5)
    # equal codes: the search must choose the lower index
    codebook[20:] = codebook[:20]

    def results() -> list[torch.Tensor]:
        indices = vqtriton.nearest_code(x, codebook)
        counts = vqtriton.metrics.counts(indices, 40)
        return [
            indices,
            *vqtriton.code_sums(x, indices, 40),
            *vqtriton.vector_quantize(x, codebook),
            *(counts, vqtriton.metrics.perplexity(counts), vqtriton.metrics.usage(counts)),
        ]

    want = results()
    torch.set_default_dtype(default_dtype)
    for found, expected in zip(results(), want, strict=True):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)


def test_rows_are_drawn_from_all_of_many(default_dtype) -> None:
    """With keys of halves, of many rows the first would be drawn again and again."""
    x = torch.arange(100_000, dtype=torch.float32)[:, None]
    keep = torch.ones(len(x), dtype=torch.bool)
    torch.set_default_dtype(default_dtype)
    rows, is_filled = vqtriton.distributed.sample_rows(x, 1000, keep=keep)
    assert rows.dtype == is_filled.dtype == torch.float32
    assert is_filled.all()
    tenths = rows[:, 0].histc(10, 0, len(x))
    assert tenths.min() > 60
    assert tenths.max() < 150
