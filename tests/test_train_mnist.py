"""examples/train_mnist.py: run as users run it, on few images but with the whole test set."""

from __future__ import annotations

import importlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

import vqtriton

EXAMPLES = Path(__file__).parents[1] / "examples"
# examples are scripts, not a package; there they import one another by their bare names
sys.path.insert(0, str(EXAMPLES))
mnist_data = importlib.import_module("mnist_data")
train_mnist = importlib.import_module("train_mnist")

# few steps, so statistics that are quick to forget
SMALL = (
    *("--epochs=1", "--limit=3000", "--batch-size=32", "--codebook-size=32", "--dim=8"),
    *("--decay=0.9", "--threshold-ema-dead-code=20"),
)
# the mean image of the training set as the only reconstruction
BCE_OF_THE_MEAN = 206.0


def run(*flags: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-W", "error", str(EXAMPLES / "train_mnist.py"), *flags]
    # threads of a small model wait for one another where other processes want the cores as well
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)


def small_run(out: Path, *flags: str) -> dict:
    done = run(*SMALL, f"--out={out}", *flags)
    assert done.returncode == 0, done.stderr
    return json.loads((out / "metrics.json").read_text()) | {"stdout": done.stdout}


def repeatable(metrics: dict) -> dict:
    """All but the times and the folder."""
    metrics = {name: metrics[name] for name in metrics.keys() - {"seconds", "stdout"}}
    return metrics | {"arguments": metrics["arguments"] | {"out": None}}


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    out = tmp_path_factory.mktemp("first") / "deep" / "run"
    return out, small_run(out, "--seed=3")


def test_metrics_are_complete_and_in_range(first):
    _, metrics = first
    # it has learned: codes that said nothing would leave it at the mean image
    assert metrics["test_bce_floor_nats"] == pytest.approx(45.5, abs=0.05)
    assert metrics["test_bce_floor_nats"] < metrics["test_bce_nats"] < 0.7 * BCE_OF_THE_MEAN
    assert 0 < metrics["test_mse"] < 0.05
    assert metrics["codes_used"] == 32 * metrics["usage"]
    assert 2 < metrics["perplexity"] <= metrics["codes_used"] <= 32
    assert metrics["quantization_error"] > 0
    assert 0 < metrics["quantization_error_relative"] < 1
    assert metrics["seconds"] > 0
    assert (metrics["epochs"], metrics["seed"]) == (1, 3)
    assert metrics["arguments"]["codebook_size"] == 32
    assert metrics["arguments"]["kmeans_init"] is True
    assert metrics["environment"]["vqtriton"] == vqtriton.__version__


def check_terms_add_up(epoch: dict[str, float]) -> None:
    terms = 10 * epoch["bce_nats"] / 784 + epoch["codebook_term"] + epoch["commitment_term"]
    assert epoch["loss"] == pytest.approx(terms, rel=1e-5)


def test_loss_terms(first):
    _, metrics = first
    (epoch,) = metrics["history"]
    check_terms_add_up(epoch)
    # moving averages stand in for the codebook term
    assert epoch["codebook_term"] == 0
    # large enough to be missed in the sum
    assert epoch["commitment_term"] > 1e-4 * epoch["loss"]
    assert "epoch 1/1" in metrics["stdout"]
    assert f"mse {metrics['test_mse']:.5f}" in metrics["stdout"]


def test_the_files_hold_what_was_measured(first):
    """The metrics once more, from the files alone and by other means."""
    out, metrics = first
    vq = vqtriton.load(out / "codebook.safetensors")
    assert vq.config["threshold_ema_dead_code"] == metrics["arguments"]["threshold_ema_dead_code"]
    model = train_mnist.VQVAE(vq).eval()
    model.load_state_dict(safetensors.torch.load_file(out / "model.safetensors"))
    images = mnist_data.load_mnist().test_images / 255
    with torch.no_grad():
        indices = vq(model.encoder(images[:, None])).indices
        pixels = model.decoder(vq.get_output_from_indices(indices))[:, 0].sigmoid().double()
    mse = (pixels - images).square().mean().item()
    assert metrics["test_mse"] == pytest.approx(mse, rel=1e-4)
    target = images.double()
    nats = -(target * pixels.log() + (1 - target) * (1 - pixels).log()).sum((1, 2)).mean().item()
    assert metrics["test_bce_nats"] == pytest.approx(nats, rel=1e-4)
    _, counts = indices.unique(return_counts=True)
    share = counts / counts.sum()
    assert metrics["codes_used"] == len(counts)
    assert metrics["perplexity"] == pytest.approx((-share * share.log()).sum().exp().item(), 1e-3)


def test_reconstructions_are_a_picture_of_both(first):
    out, _ = first
    with Image.open(out / "reconstructions.png") as image:
        assert image.format == "PNG"
        # 10 columns of 28 + 2 pixels; 3 rows of 2 · 28 + 6; less the last gap; three times
        assert image.size == (3 * (10 * 30 - 2), 3 * (3 * 62 - 6))
        pixels = np.asarray(image)[::3, ::3] / 255
    data = mnist_data.load_mnist()
    errors, errors_of_mean = [], []
    for digit in range(10):
        original = pixels[:28, 30 * digit : 30 * digit + 28]
        reconstruction = pixels[28:56, 30 * digit : 30 * digit + 28]
        of_digit = data.test_images[data.test_labels == digit] / 255
        assert np.allclose(original, of_digit[0], atol=1e-6)
        errors.append(np.square(reconstruction - original).mean())
        errors_of_mean.append(np.square(of_digit.mean(0).numpy() - original).mean())
    assert min(errors) > 0
    # of this image, not of any image of the digit
    assert sum(errors) < 0.8 * sum(errors_of_mean)


def test_a_seed_repeats_bit_for_bit_and_another_does_not(first, tmp_path):
    out, metrics = first
    again = small_run(tmp_path / "again", "--seed=3")
    assert repeatable(again) == repeatable(metrics)
    for name in ("model.safetensors", "codebook.safetensors", "reconstructions.png"):
        assert (tmp_path / "again" / name).read_bytes() == (out / name).read_bytes()
    assert len(list(out.iterdir())) == 4

    other = small_run(tmp_path / "other", "--seed=4")
    assert other["test_bce_nats"] != metrics["test_bce_nats"]


def test_a_codebook_that_learns_by_gradient(tmp_path):
    metrics = small_run(tmp_path, "--codebook-update=gradient", "--no-kmeans-init")
    (epoch,) = metrics["history"]
    check_terms_add_up(epoch)
    # the codebook term is the commitment term without β
    assert epoch["codebook_term"] == pytest.approx(epoch["commitment_term"] / 0.25)
    assert metrics["test_bce_nats"] < 0.9 * BCE_OF_THE_MEAN
    assert metrics["arguments"]["kmeans_init"] is False
    vq = vqtriton.load(tmp_path / "codebook.safetensors")
    assert isinstance(vq.codebook, torch.nn.Parameter)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--epochs=0", "argument --epochs: '0': it must be an integer of at least 1"),
        ("--batch-size=1.5", "argument --batch-size: '1.5': it must be an integer"),
        ("--codebook-size=-1", "argument --codebook-size"),
        ("--codebook-update=adam", "argument --codebook-update: invalid choice: 'adam'"),
        ("--decay=1.5", "argument --decay: '1.5': it must be a number of at least 0 and at most 1"),
        ("--commitment-weight=nan", "argument --commitment-weight: 'nan'"),
        ("--lr=0", "argument --lr: '0': it must be a number of at least 1e-09"),
        ("--lr=inf", "argument --lr: 'inf'"),
        ("--seed=-1", "argument --seed: '-1'"),
        ("--threshold-ema-dead-code=-1", "argument --threshold-ema-dead-code: '-1'"),
        ("--device=nonsense", "argument --device: 'nonsense'"),
        ("--device=meta", "argument --device: 'meta'"),
        ("--data-dir=/no/such/folder", "argument --data-dir: /no/such/folder is not a folder"),
        ("--epoch=1", "unrecognized arguments: --epoch=1"),
        ("--frobnicate", "unrecognized arguments: --frobnicate"),
    ],
)
def test_a_bad_flag_is_a_line_and_exit_status_2(capsys, tmp_path, flag, message):
    with pytest.raises(SystemExit) as caught:
        train_mnist.parse_args([f"--out={tmp_path}", flag])
    assert caught.value.code == 2
    usage, error = capsys.readouterr().err.splitlines()
    assert usage.startswith("usage: ")
    assert message in error


def test_errors_as_users_see_them(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    done = run(f"--out={tmp_path / 'file'}")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 2
    assert "error: argument --out: " in done.stderr

    # the test set under the name of the training set
    for name, content in {
        "train-images-idx3-ubyte": mnist_data.to_idx(np.zeros((60000, 28, 28), dtype=np.uint8)),
        "train-labels-idx1-ubyte": b"",
    }.items():
        (tmp_path / name).write_bytes(content)
    done = run(f"--out={tmp_path / 'out'}", f"--data-dir={tmp_path}")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert f"{tmp_path / 'train-images-idx3-ubyte'} has md5" in done.stderr


def test_help_names_the_defaults(capsys):
    with pytest.raises(SystemExit) as caught:
        train_mnist.parse_args(["--help"])
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "passes over the training set (default: 5)" in text
    assert "--kmeans-init, --no-kmeans-init" in text
    assert "until 80 % of training" in text


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path):
    done = run(*SMALL, f"--out={tmp_path}", "--lr=1e30")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "the loss is nan" in done.stderr or "the loss is inf" in done.stderr
    # nothing that could be taken for a result
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("limit", [1, 65])
def test_tiny_training_sets(tmp_path, limit):
    """A single step, and a last batch of one image: fewer vectors than codes."""
    args = train_mnist.parse_args(["--epochs=1", "--batch-size=64", "--dim=4", f"--out={tmp_path}"])
    vq = vqtriton.VectorQuantize(4, 512, kmeans_init=True, accept_image_fmap=True)
    model = train_mnist.VQVAE(vq)
    images = mnist_data.load_mnist().train_images[:limit]
    (epoch,) = train_mnist.train(model, images, args)
    assert math.isfinite(epoch["loss"])
    assert 1 <= epoch["codes_used"] <= 49 * limit
