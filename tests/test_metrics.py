"""vqtriton.metrics, held to plain formulas in Python's own floats."""

from __future__ import annotations

import math
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vqtriton import metrics

DTYPES = [torch.float16, torch.float32, torch.float64]
INTEGERS = [
    *(torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.uint8, torch.uint16, torch.uint32, torch.uint64),
]


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
    found = torch.tensor(counts, dtype=torch.float64)
    assert metrics.perplexity(found).item() == pytest.approx(plain_perplexity(counts), rel=1e-14)
    assert metrics.usage(found).item() == 1.0


def test_batched():
    """One row with no code chosen does not spoil the others."""
    counts = torch.tensor([[[1.0, 2, 3], [0, 0, 0]], [[4, 4, 4], [0, 9, 0]]])
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


@pytest.mark.parametrize("measure", [metrics.perplexity, metrics.usage])
@pytest.mark.parametrize(
    ("counts", "error", "message"),
    [
        (
            torch.arange(256),
            TypeError,
            "counts is a torch.int64 tensor.*may be indices: metrics.co",
        ),
        (torch.ones(3, dtype=torch.int32), TypeError, r"metrics.counts\(indices, codebook_size\)"),
        (torch.ones(3, dtype=torch.bool), TypeError, "counts is a torch.bool tensor"),
        (torch.ones(3, dtype=torch.complex64), TypeError, "counts is a torch.complex64 tensor"),
        ([1.0, 2.0], TypeError, "counts is a list; it must be a floating-point tensor"),
        (torch.tensor([1.0, -1.0]), ValueError, "counts has values from -1.0 to 1.0"),
        (torch.tensor([1.0, torch.nan]), ValueError, "counts has values from nan"),
        (torch.tensor([[1.0, 2.0], [0.0, torch.inf]]), ValueError, "counts has values from 0.0 to"),
    ],
)
def test_what_is_no_counts_is_named(measure, counts, error, message):
    with pytest.raises(error, match=message):
        measure(counts)


def plain_counts(indices: list[int], size: int) -> list[float]:
    return [float(sum(i == code for i in indices)) for code in range(size)]


@given(
    shape=st.sampled_from([(), (0,), (1,), (17,), (3, 0, 2), (2, 3, 5)]),
    size=st.sampled_from([1, 2, 5, 100]),
    dtype=st.sampled_from(INTEGERS),
    has_mask=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_counts(shape, size, dtype, has_mask, seed):
    torch.manual_seed(seed)
    least = 0 if str(dtype).startswith("torch.uint") else -1
    indices = torch.randint(least, size, shape)
    mask = torch.rand(shape) < 0.7 if has_mask else None
    if has_mask:
        # nobody looks at those that are left out
        indices = indices.where(mask, 120)
    kept = indices[mask] if has_mask else indices
    found = metrics.counts(indices.to(dtype), size, mask)
    assert found.dtype == torch.float64
    assert found.tolist() == plain_counts(kept.flatten().tolist(), size)
    strided = torch.stack([indices, indices], -1).to(dtype)[..., 0]
    assert torch.equal(metrics.counts(strided, size, mask), found)


@pytest.mark.parametrize("add", [metrics.counts, lambda i, k, *m: metrics.Meter(k).update(i, *m)])
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.tensor([0, 4]), 4), IndexError, r"indices has 1 values outside \[0, 4\)"),
        ((torch.tensor([-2, 4, -1]), 4), IndexError, "indices has 2 values"),
        ((torch.tensor([2**62, -(2**62)]), 4), IndexError, "indices has 2 values"),
        ((torch.tensor([2**64 - 1], dtype=torch.uint64), 4), IndexError, "indices has 1 values"),
        ((torch.zeros(3), 4), TypeError, "indices is a torch.float32 tensor"),
        ((torch.ones(3, dtype=torch.bool), 4), TypeError, "indices is a torch.bool tensor"),
        (([0, 1], 4), TypeError, "indices is a list"),
        ((torch.zeros(3).long(), 0), ValueError, "codebook_size is 0"),
        ((torch.zeros(3).long(), 4.0), TypeError, "codebook_size is 4.0"),
        ((torch.zeros(3).long(), True), TypeError, "codebook_size is True"),
        ((torch.zeros(3).long(), 4, torch.ones(3)), TypeError, "mask is a torch.float32 tensor"),
        ((torch.zeros(3).long(), 4, [True] * 3), TypeError, "mask is a list"),
        (
            (torch.zeros(3).long(), 4, torch.ones(3, 1, dtype=torch.bool)),
            ValueError,
            r"mask has shape \(3, 1\); it must be that of indices, \(3,\)",
        ),
    ],
)
def test_what_is_no_index_is_named(add, arguments, error, message):
    with pytest.raises(error, match=message):
        add(*arguments)


def test_a_meter_adds_up_batches():
    batches = [torch.randint(-1, 7, (5, n)) for n in (1, 9, 0, 4)]
    mask = torch.rand(5, 9) < 0.5
    meter = metrics.Meter(8)
    empty = meter.compute()
    assert (empty.counts.tolist(), empty.perplexity.item(), empty.usage.item()) == ([0.0] * 8, 0, 0)
    for place, batch in enumerate(batches):
        # what a batch in inference mode leaves can be added to
        with torch.inference_mode(place == 1):
            meter.update(batch.int(), mask if place == 1 else None)
    batches[1] = batches[1][mask]
    want = plain_counts(torch.cat([batch.flatten() for batch in batches]).tolist(), 8)
    for sync in (True, False, True):
        counts, perplexity, usage = meter.compute(sync=sync)
        assert counts.dtype == perplexity.dtype == usage.dtype == torch.float64
        assert counts.tolist() == want
        assert perplexity.item() == pytest.approx(plain_perplexity(want), rel=1e-14)
        assert usage.item() == sum(n > 0 for n in want) / 8
    again = pickle.loads(pickle.dumps(meter))
    assert torch.equal(again.compute().counts, meter.compute().counts)
    meter.reset()
    assert meter.compute().counts.tolist() == [0.0] * 8
    # an index that is refused is not counted
    with pytest.raises(IndexError):
        meter.update(torch.tensor([1, 8]))
    assert meter.compute().counts.tolist() == [0.0] * 8


def test_a_meter_tells_late_of_what_it_did_not_look_at(monkeypatch):
    """On a GPU `update` does not wait for the values."""
    meter = metrics.Meter(4)
    with monkeypatch.context() as patch:
        patch.setattr(metrics, "_check_tally", lambda found: None)
        meter.update(torch.tensor([0, 9, -5]))
    meter.update(torch.tensor([1]))
    with pytest.raises(IndexError, match="indices has 2 values outside"):
        meter.compute()


def test_without_float64_the_cpu_counts(monkeypatch):
    """As on MPS: a device that has none gets no float64; here the CPU plays its part as well."""
    asked = []
    monkeypatch.setattr(metrics, "has_float64", lambda device: asked.append(device) or False)
    found = metrics.counts(torch.tensor([0, 2, 2]), 3, torch.ones(3, dtype=torch.bool))
    assert found.tolist() == [1.0, 0.0, 2.0]
    assert metrics.usage(found.float()).item() == pytest.approx(2 / 3)
    assert metrics.quantization_error(torch.ones(2, 3), torch.zeros(2, 3)).item() == 3
    assert len(asked) >= 4


def test_compiles_as_one_graph():
    def measured(indices, mask):
        counts = metrics.counts(indices, 8, mask)
        return counts, metrics.perplexity(counts), metrics.usage(counts)

    indices, mask = torch.randint(-1, 8, (5, 9)), torch.rand(5, 9) < 0.5
    compiled = torch.compile(measured, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(indices, mask), measured(indices, mask), rtol=0, atol=1e-14)


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
