from __future__ import annotations

import pytest
import torch

import vqtriton


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_is_lloyds_algorithm() -> None:
    x = torch.randn(500, 3, dtype=torch.float64).float()
    start = vqtriton.kmeans(x, 7, iters=0, generator=generator())
    # it starts from distinct rows
    assert (start[:, None] == x).all(-1).any(1).all()
    assert start.unique(dim=0).shape[0] == 7
    codes = start.double()
    for _ in range(5):
        nearest = torch.cdist(x.double(), codes).argmin(1)
        codes = torch.stack([x[nearest == k].double().mean(0) for k in range(7)])
    got = vqtriton.kmeans(x, 7, iters=5, generator=generator())
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), codes, rtol=1e-5, atol=1e-6)


def test_each_iteration_lowers_the_error() -> None:
    x = torch.randn(800, 4)
    errors = []
    for iters in range(6):
        codebook = vqtriton.kmeans(x, 30, iters=iters, generator=generator())
        codes = codebook[vqtriton.nearest_code(x, codebook)]
        errors.append(vqtriton.metrics.quantization_error(x, codes).item())
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.9 * errors[0]


def test_a_seed_decides() -> None:
    x = torch.randn(300, 4)
    first = vqtriton.kmeans(x, 20, generator=generator(1))
    assert torch.equal(vqtriton.kmeans(x, 20, generator=generator(1)), first)
    assert not torch.equal(vqtriton.kmeans(x, 20, generator=generator(2)), first)


def test_bad_rows_are_left_out() -> None:
    x = torch.randn(300, 4)
    x[::3, 0] = torch.nan
    x[1::3, 1] = torch.inf
    clean = vqtriton.kmeans(x[2::3], 20, generator=generator())
    assert torch.equal(vqtriton.kmeans(x, 20, generator=generator()), clean)


def test_fewer_rows_than_codes() -> None:
    x = torch.randn(3, 4)
    codebook = vqtriton.kmeans(x, 8)
    assert codebook.shape == (8, 4)
    assert vqtriton.metrics.quantization_error(x, codebook[vqtriton.nearest_code(x, codebook)]) == 0


def test_shape_of_the_batch_does_not_matter() -> None:
    x = torch.randn(4, 5, 6, 3)
    flat = vqtriton.kmeans(x.reshape(-1, 3), 9, generator=generator())
    assert torch.equal(vqtriton.kmeans(x, 9, generator=generator()), flat)


@pytest.mark.parametrize(
    ("x", "options", "message"),
    [
        (torch.zeros(0, 4), {}, "no finite row"),
        (torch.full((3, 4), torch.nan), {}, "no finite row"),
        (torch.zeros(3, 4), {"codebook_size": 0}, "codebook_size is 0"),
        (torch.zeros(3, 4), {"iters": -1}, "iters is -1"),
        (torch.zeros(3, 4), {"iters": 1.5}, "iters is 1.5"),
        (torch.zeros(3, 4), {"codebook_size": 2.5}, "codebook_size is 2.5"),
        ([[1.0]], {}, "x is a list"),
        (torch.zeros(3, 0), {}, r"x has shape \(3, 0\)"),
    ],
)
def test_bad_input_is_named(x, options, message) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        vqtriton.kmeans(x, **{"codebook_size": 2, **options})
