"""examples/semantic_ids.py: IDs of items that it makes, and of a file."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"
# examples are scripts, not a package; there they import one another by their bare names
sys.path.insert(0, str(EXAMPLES))
semantic_ids = importlib.import_module("semantic_ids")

K = 16
TINY = (f"--codebook-size={K}", "--epochs=3", "--batch-size=256")


def shared(ids: np.ndarray) -> float:
    """The share of the rows that are not the only one of their kind, by counting pairs."""
    same = (ids[:, None] == ids).all(2)
    return (same.sum(1) > 1).mean()


def table(printed: str) -> list[list[float]]:
    rows = re.findall(r"^ +(\d+) +([\d.]+) +(\d+)% +([\d.]+) +([\d.]+)%$", printed, re.MULTILINE)
    return [[float(value) for value in row] for row in rows]


def test_ids_of_made_items(tmp_path, capsys):
    out = tmp_path / "ids.npy"
    semantic_ids.main([*TINY, "--items=1000", "--dim=12", f"--out={out}"])
    printed = capsys.readouterr().out
    ids = np.load(out)
    assert ids.dtype == np.int64
    assert ids.shape == (1000, 4)
    assert ids.min() >= 0
    assert ids[:, :3].max() < K
    # each level says more
    rows = table(printed)
    assert [row[0] for row in rows] == [1, 2, 3]
    assert 1 > rows[0][1] > rows[1][1] > rows[2][1] > 0
    for level, row in enumerate(rows):
        share = np.bincount(ids[:, level], minlength=K) / 1000
        assert row[2] == pytest.approx(100 * (share > 0).mean(), abs=0.5)
        entropy = -(share * np.log(np.maximum(share, 1e-9))).sum()
        assert row[3] == pytest.approx(np.exp(entropy), abs=0.051)
        assert row[4] == pytest.approx(100 * shared(ids[:, : level + 1]), abs=0.0051)
    # there are collisions to do away with, and then none is left
    before = shared(ids[:, :3])
    assert 0.05 < before < 0.9
    assert shared(ids) == 0
    assert f"Collisions: {before:.2%} of the items before the last digit, 0.00% after it" in printed
    assert f"It goes up to {ids[:, 3].max()}." in printed
    # items of a group are alike
    groups = semantic_ids.make_items(1000, 12, seed=0)[1].numpy()
    commonest = [np.bincount(groups[ids[:, 0] == first]).max() for first in np.unique(ids[:, 0])]
    assert f"outermost group of {sum(commonest) / 1000:.1%} of the items" in printed
    assert sum(commonest) > 700
    # a seed repeats; another does not
    for seed, is_same in ((0, True), (1, False)):
        again = tmp_path / f"{seed}.npy"
        flags = ("--items=1000", "--dim=12", f"--seed={seed}", f"--out={again}")
        semantic_ids.main([*TINY, *flags])
        assert np.array_equal(np.load(again), ids) == is_same


@pytest.mark.parametrize("dtype", ["float64", "float16"])
def test_ids_of_a_file(tmp_path, capsys, dtype):
    x = np.random.default_rng(0).normal(size=(300, 6)).astype(dtype)
    # equal items collide whatever the codes are
    x[200:] = x[:100]
    np.save(tmp_path / "x.npy", x)
    out = tmp_path / "ids.npy"
    flags = (f"--embeddings={tmp_path / 'x.npy'}", f"--out={out}", "--levels=4")
    semantic_ids.main([*TINY, *flags])
    ids = np.load(out)
    assert ids.shape == (300, 5)
    assert np.array_equal(ids[200:, :4], ids[:100, :4])
    assert (ids[200:, 4] > ids[:100, 4]).all()
    assert shared(ids) == 0
    assert "300 items of " in capsys.readouterr().out


def test_moving_averages_improve_on_k_means(tmp_path, capsys):
    errors = []
    for epochs in (0, 10):
        flags = ("--items=4000", f"--epochs={epochs}", f"--out={tmp_path / 'ids.npy'}")
        semantic_ids.main([f"--codebook-size={K}", "--batch-size=500", *flags])
        errors.append(table(capsys.readouterr().out)[-1][1])
    assert errors[1] < errors[0]


def test_the_last_digit_counts():
    ids = torch.tensor([[1, 2], [0, 5], [1, 2], [1, 3], [1, 2], [0, 5]])
    assert semantic_ids.count_digit(ids).tolist() == [0, 0, 1, 0, 2, 1]
    assert semantic_ids.collisions(ids) == pytest.approx(5 / 6)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (np.zeros(100), "holds float64 (100,); it must be floats [items, dim]"),
        (np.zeros((4, 5, 6)), "holds float64 (4, 5, 6); it must be floats [items, dim]"),
        (np.zeros((100, 3), np.int64), "holds int64 (100, 3); it must be floats [items, dim]"),
        (np.zeros((9, 3)), "has shape (9, 3); it must have at least as many items as a level has"),
        (np.zeros((100, 0)), "has shape (100, 0); it must have"),
        (np.full((100, 3), np.nan), "has values that are NaN or infinite"),
        (np.array([{}, None]), "is not a whole .npy file of numbers"),
        (b"", "is not a whole .npy file of numbers"),
        (None, "No such file"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_bad_file_is_an_error(tmp_path, capsys, content, message):
    path = tmp_path / "x.npy"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        np.save(path, content)
    out = tmp_path / "ids.npy"
    with pytest.raises(SystemExit) as caught:
        semantic_ids.main([*TINY, f"--embeddings={path}", f"--out={out}"])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert "argument --embeddings: " in error
    assert message in error
    assert not out.exists()


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--out=ids.csv", "argument --out: ids.csv is not a file *.npy in a folder that exists"),
        ("--out=none/ids.npy", "argument --out: none/ids.npy is not a file *.npy in a folder that"),
        ("--items=10", "argument --items: 10; it must be in [256, "),
        ("--decay=nan", "argument --decay: nan; it must be in [0, 1)"),
    ],
)
def test_a_bad_flag_is_an_error(flag, message, capsys):
    with pytest.raises(SystemExit) as caught:
        semantic_ids.main([flag])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err
