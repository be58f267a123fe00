"""vqtriton.metrics, held to plain formulas in Python's own floats."""

from __future__ import annotations

import math

import pytest
import torch

from vqtriton import metrics

DTYPES = [torch.int64, torch.int32, torch.uint8, torch.float16, torch.float32, torch.float64]


def plain_perplexity(counts: list[float]) -> float:
    total = sum(counts)
    if total == 0:
        return 0.0
    return math.exp(-sum(n / total * math.log(n / total) for n in counts if n > 0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "counts",
    [
        [1, 2, 3, 4],
        [0, 5, 0, 1, 7],
        [3],
        [100, 1],
        [0, 0, 2],
        [0, 0, 0],
        [0],
        [2, 2, 2],
        [200, 255],
    ],
    ids=str,
)
def test_perplexity(counts, dtype):
    result = metrics.perplexity(torch.tensor(counts, dtype=dtype))
    assert result.dtype == torch.float64
    assert result.shape == ()
    assert result.item() == pytest.approx(plain_perplexity(counts), rel=1e-14)


def test_perplexity_of_fractions():
    """Moving averages are no integers; nor does their scale matter, however small."""
    counts = torch.rand(40, dtype=torch.float64) + 0.01
    expected = plain_perplexity(counts.tolist())
    for scale in (1.0, 1e-3, 1e9, 1e-290):
        assert metrics.perplexity(counts * scale).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("size", [1, 2, 3, 512, 65536])
def test_perplexity_counts_the_codes_in_use(size):
    assert metrics.perplexity(torch.ones(size)).item() == pytest.approx(size, rel=1e-12)
    one_hot = torch.zeros(size)
    one_hot[size // 2] = 3.0
    assert metrics.perplexity(one_hot).item() == 1.0
    # codes that were never chosen change nothing
    padded = torch.cat([torch.ones(size), torch.zeros(7)])
    assert metrics.perplexity(padded).item() == pytest.approx(size, rel=1e-12)


def test_perplexity_of_many_rows():
    """The first two counts are the same number in float32."""
    counts = [2**44, 2**44 + 2**20, 1]
    result = metrics.perplexity(torch.tensor(counts)).item()
    assert result == pytest.approx(plain_perplexity(counts), rel=1e-14)
    assert metrics.usage(torch.tensor(counts)).item() == 1.0


def test_batched():
    """One row with no code chosen does not spoil the others."""
    counts = torch.tensor([[[1, 2, 3], [0, 0, 0]], [[4, 4, 4], [0, 9, 0]]])
    perplexity, usage = metrics.perplexity(counts), metrics.usage(counts)
    assert perplexity.shape == usage.shape == (2, 2)
    for i in range(2):
        for j in range(2):
            row = counts[i, j].tolist()
            assert perplexity[i, j].item() == pytest.approx(plain_perplexity(row), rel=1e-14)
            assert usage[i, j].item() == pytest.approx(sum(n > 0 for n in row) / 3, rel=1e-15)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("counts", "expected"),
    [([1, 2, 3], 1.0), ([0, 5, 0, 1], 0.5), ([0, 0, 0], 0.0), ([0, 0, 9], 1 / 3), ([4], 1.0)],
)
def test_usage(counts, expected, dtype):
    result = metrics.usage(torch.tensor(counts, dtype=dtype))
    assert result.dtype == torch.float64
    assert result.item() == pytest.approx(expected, rel=1e-15)


def test_usage_counts_a_thousandth_of_a_row():
    assert metrics.usage(torch.tensor([1e-3, 0.0])).item() == 0.5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(4,), (5, 3), (2, 3, 4, 6)])
def test_quantization_error(shape, dtype):
    x, quantized = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    result = metrics.quantization_error(x, quantized)
    rows = zip(
        x.reshape(-1, shape[-1]).tolist(), quantized.reshape(-1, shape[-1]).tolist(), strict=True
    )
    squares = [sum((a - b) ** 2 for a, b in zip(*row, strict=True)) for row in rows]
    assert result.dtype == torch.float64
    assert result.item() == pytest.approx(sum(squares) / len(squares), rel=1e-13)


def test_quantization_error_is_per_vector_not_per_element():
    assert metrics.quantization_error(torch.ones(7, 4), torch.zeros(7, 4)).item() == 4.0
    assert metrics.quantization_error(torch.ones(7, 4), torch.ones(7, 4)).item() == 0.0


def test_quantization_error_of_half_precision_does_not_overflow():
    x = torch.full((3, 64), 60000.0, dtype=torch.float16)
    assert metrics.quantization_error(x, -x).item() == 64 * (2 * x[0, 0].item()) ** 2


def test_quantization_error_of_mixed_dtypes():
    x, quantized = torch.randn(5, 3), torch.randn(5, 3).bfloat16()
    expected = metrics.quantization_error(x, quantized.float())
    assert torch.equal(metrics.quantization_error(x, quantized), expected)


def test_quantization_error_without_vectors():
    assert metrics.quantization_error(torch.zeros(0, 3), torch.zeros(0, 3)).isnan()


@pytest.mark.parametrize("shape", [(5, 4), (5,), (1, 3), (5, 1), (3, 5)])
def test_quantization_error_of_other_shapes(shape):
    """Those that would broadcast as well."""
    with pytest.raises(ValueError, match=r"quantized has shape .*, x has \(5, 3\)") as raised:
        metrics.quantization_error(torch.zeros(5, 3), torch.zeros(shape))
    assert str(shape) in str(raised.value)
