"""examples/train_images.py: a folder of one's own images, as docs/your-data.md describes it."""

from __future__ import annotations

import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from figures import leave_undrawn
from PIL import Image
from test_readme import ROOT, blocks

import vqtriton

EXAMPLES = ROOT / "examples"
# examples are scripts, not a package; there they import one another by their bare names
sys.path.insert(0, str(EXAMPLES))
image_folder = importlib.import_module("image_folder")
train_images = importlib.import_module("train_images")
trainer = importlib.import_module("trainer")
vqvae_trainer = importlib.import_module("vqvae_trainer")
vqvae = importlib.import_module("vqvae")

TINY = ("--size=16", "--epochs=2", "--batch-size=8", "--codebook-size=16", "--dim=4", "--workers=0")
TINY += ("--channels=4", "--decay=0.9", "--threshold-ema-dead-code=2", "--lr=0.01")


def picture(seed: int, width: int, height: int) -> np.ndarray:
    """Smooth colours, [height, width, 3]; no two are alike."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width] / 32
    waves = [np.sin(rng.uniform(0, 3) * x + rng.uniform(0, 3) * y + rng.uniform(0, 6))]
    waves += [np.sin(rng.uniform(0, 3) * x + rng.uniform(0, 6)), np.cos(rng.uniform(0, 3) * y)]
    return (127.5 + 127 * np.stack(waves, -1)).astype(np.uint8)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Images of several sizes, kinds and depths, and what is not an image."""
    out = tmp_path / "photos"
    (out / "more").mkdir(parents=True)
    for i in range(12):
        image = Image.fromarray(picture(i, 20 + 5 * i, 60 - 3 * i))
        image.save(out / ("more" if i % 2 else ".") / f"{i:02}.{('png', 'JPG', 'webp')[i % 3]}")
    Image.fromarray(picture(20, 30, 30)).convert("L").save(out / "grey.png")
    Image.fromarray(picture(21, 30, 30)).convert("P").save(out / "palette.gif")
    Image.fromarray(picture(22, 30, 30)).convert("CMYK").save(out / "print.tiff")
    (out / "notes.txt").write_text("not an image")
    return out


@pytest.fixture(autouse=True)
def few_squares(monkeypatch):
    monkeypatch.setattr(image_folder, "MIN_SQUARES", 24)
    monkeypatch.setattr(trainer, "LOOK_EVERY", 3)
    leave_undrawn(monkeypatch)
    # the trainer turns it off; other tests count on it
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)


def train(folder: Path, out: Path, *flags: str) -> dict:
    train_images.main([str(folder), *TINY, f"--out={out}", *flags])
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics.pop("seconds") > 0
    return metrics


def test_a_folder_becomes_a_model(folder, tmp_path, capsys):
    out = tmp_path / "run"
    metrics = train(folder, out)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"Training a VQ-VAE on the images in {folder}."
    assert lines[1] == "14 images to train on, 1 to test on, each cut to squares of 16×16 pixels."
    assert lines[2].startswith("Epochs: 2 of 4 steps, on 28 squares, ")
    assert 0 < metrics["test_mse"] < 0.2
    assert "test_bce_nats" not in metrics
    model = vqvae.VQVAE.from_checkpoint(out / "checkpoint.safetensors")
    test = torch.cat(list(image_folder.ImageFolder(folder, 16).test_batches()))
    assert test.shape == (1, 3, 16, 16)
    indices = model.encode(test)
    assert indices.shape == (1, 4, 4)
    mse = ((model.decode(indices) - test.float()) / 255).square().mean().item()
    assert metrics["test_mse"] == pytest.approx(mse, rel=0.02, abs=1e-4)
    # the original above its reconstruction, at the right of the labels
    with Image.open(out / "reconstructions.png") as image:
        page = np.asarray(image)
    assert page.shape[-1] == 3
    original = test[0].permute(1, 2, 0).numpy()
    scale = 84 // 16
    top = page.shape[0] - 2 * 16 * scale - 2 * scale
    shown = page[top : top + 16 * scale : scale, page.shape[1] - 16 * scale :: scale]
    assert np.array_equal(shown, original)


@pytest.mark.parametrize("workers", [0, 2])
def test_stopped_and_resumed_it_is_the_same_model(folder, tmp_path, monkeypatch, workers):
    whole = train(folder, tmp_path / "whole")
    step = vqvae_trainer.VQVAETrainer.train_on

    def interrupted(self, *args):
        if self.step == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *args)

    out = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        patch.setattr(vqvae_trainer.VQVAETrainer, "train_on", interrupted)
        with pytest.raises(SystemExit):
            train(folder, out, f"--workers={workers}")
    train_images.main([str(folder), f"--out={out}", "--resume", f"--workers={workers}"])
    metrics = json.loads((out / "metrics.json").read_text())
    del metrics["seconds"]
    assert metrics == whole
    # an image that is gone makes it another training set
    (folder / "grey.png").unlink()
    (folder / "palette.gif").unlink()
    with pytest.raises(SystemExit, match="it was trained on other images"):
        train_images.main([str(folder), f"--out={out}", "--resume", "--epochs=3"])


def test_squares_follow_from_seed_and_epoch(folder):
    def first_batch(seed: int, epoch: int) -> torch.Tensor:
        images = image_folder.ImageFolder(folder, 16, seed=seed)
        [batch] = images.batches([torch.arange(images.count)], epoch)
        return batch

    one = first_batch(0, 0)
    assert one.dtype == torch.uint8
    assert one.shape == (28, 3, 16, 16)
    assert torch.equal(one, first_batch(0, 0))
    # almost all differ; a small image has few squares
    for other in (first_batch(1, 0), first_batch(0, 1)):
        assert (one != other).flatten(1).any(1).sum() > 20
    # the same file twice in an epoch is two squares
    assert not torch.equal(one[0], one[14])


def test_squares_are_parts_of_the_image(tmp_path):
    """Of an image whose colours say where it is; in the middle for the test set."""
    y, x = np.mgrid[0:64, 0:128]
    Image.fromarray(np.stack([x * 2, y * 4, 0 * x], -1).astype(np.uint8)).save(tmp_path / "a.png")
    test = image_folder.Squares([tmp_path / "a.png"], 32)[0].float()
    # the middle 64 of 128 columns
    assert test[0, :, 0].mean() == pytest.approx(2 * 32.5, abs=2)
    assert test[0, :, -1].mean() == pytest.approx(2 * 94.5, abs=2)
    lefts, mirrored = [], 0
    for place in range(40):
        square = image_folder.Squares([tmp_path / "a.png"], 32, (0, 0))[place].float()
        mirrored += bool(square[0, 0, 0] > square[0, 0, -1])
        low, high = square[0].amin() / 2, square[0].amax() / 2
        assert 31 <= high - low + 1 <= 65
        lefts.append(low)
    assert 10 < mirrored < 30
    assert min(lefts) < 10
    assert max(lefts) > 60


def test_how_a_camera_was_held_and_what_is_transparent(tmp_path):
    exif = Image.Exif()
    # turned by a quarter
    exif[0x0112] = 6
    left = np.zeros((32, 32, 3), np.uint8)
    left[:, :16] = 255
    Image.fromarray(left).save(tmp_path / "a.png", exif=exif)
    square = image_folder.Squares([tmp_path / "a.png"], 8)[0]
    # what was at the left is at the top
    assert square[:, :4].float().mean() > 250
    assert square[:, 4:].float().mean() < 5
    alpha = np.zeros((32, 32, 4), np.uint8)
    Image.fromarray(alpha).save(tmp_path / "b.png")
    assert (image_folder.Squares([tmp_path / "b.png"], 8)[0] == 255).all()


def test_sixteen_bits_of_grey_and_files_that_only_look_like_images(tmp_path):
    ramp = np.linspace(0, 65535, 32 * 32).reshape(32, 32).astype(np.uint16)
    Image.fromarray(ramp).save(tmp_path / "a.png")
    square = image_folder.Squares([tmp_path / "a.png"], 32)[0]
    assert (square[0].float() - torch.from_numpy(ramp / 257)).abs().max() <= 1
    (tmp_path / "._a.png").write_bytes(b"of another system")
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(ValueError, match="has too few images: 1, where 2 are needed"):
        image_folder.ImageFolder(tmp_path, 32)


def test_reading_images_draws_nothing_from_the_training(folder):
    """Or a run that is resumed inside of an epoch would draw other rows to revive codes."""
    images = image_folder.ImageFolder(folder, 16)
    before = torch.get_rng_state()
    next(images.batches([torch.arange(4)], 0))
    next(iter(images.test_batches()))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_broken_file_is_left_out(folder, tmp_path, capsys):
    whole = (folder / "more" / "01.JPG").read_bytes()
    for path in folder.rglob("*.JPG"):
        path.write_bytes(whole[: len(whole) * 9 // 10])
    train(folder, tmp_path / "run", "--epochs=1")
    assert re.search(r"\d\d.JPG is left out: .*[Tt]runcated", capsys.readouterr().err)
    for path in folder.rglob("*.*"):
        path.write_bytes(b"")
    with pytest.raises(SystemExit, match="has too few images: 0, where 2 are needed"):
        train(folder, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_damaged_file_never_becomes_another(folder, capsys):
    """Its header is whole, so that it is found only when it is read."""
    whole = (folder / "more" / "01.JPG").read_bytes()
    for name in ("zero.jpg", "text.png"):
        (folder / name).write_bytes(b"no image"[: 8 * (name == "text.png")])
    (folder / "cut.jpg").write_bytes(whole[: len(whole) * 9 // 10])
    images = image_folder.ImageFolder(folder, 16)
    files = sorted(images.train_files + images.test_files)
    assert not {"zero.jpg", "text.png"} & {path.name for path in files}
    assert "zero.jpg is left out" in capsys.readouterr().err
    squares = image_folder.Squares(files, 16)
    for place, path in enumerate(files):
        if path.name == "cut.jpg":
            with pytest.raises(ValueError, match=r"cut.jpg cannot be read"):
                squares[place]
        else:
            assert squares[place].shape == (3, 16, 16)
    # in training another takes its place, and it is named once
    training = image_folder.Squares(files, 16, (0, 0))
    for _ in range(3):
        assert training[files.index(folder / "cut.jpg")].shape == (3, 16, 16)
    assert capsys.readouterr().err.count("cut.jpg is left out") == 1


def test_a_folder_whose_images_cannot_be_trained_on_is_a_line(tmp_path, folder):
    few = tmp_path / "few"
    few.mkdir()
    whole = (folder / "more" / "01.JPG").read_bytes()
    for name in ("a.jpg", "b.jpg"):
        (few / name).write_bytes(whole[: len(whole) * 9 // 10])
    with pytest.raises(SystemExit, match="has too few images that can be read"):
        train(few, tmp_path / "out")
    (few / "a.jpg").write_bytes(whole)
    with pytest.raises(SystemExit, match="has too few images that can be read"):
        train(few, tmp_path / "out")


def test_an_image_of_any_size_is_opened(tmp_path):
    Image.new("1", (14_000, 14_000)).save(tmp_path / "large.png")
    image_folder._open(tmp_path / "large.png")


def test_pictures_that_were_exchanged_are_other_images(folder):
    before = image_folder.ImageFolder(folder, 16).fingerprint
    assert image_folder.ImageFolder(folder, 16).fingerprint == before
    Image.fromarray(picture(99, 50, 50)).save(folder / "grey.png")
    assert image_folder.ImageFolder(folder, 16).fingerprint != before


def test_a_signal_to_all_processes_leaves_a_checkpoint(folder, tmp_path):
    """As a scheduler sends it, to the workers that read images as well."""
    out = tmp_path / "out"
    flags = [flag for flag in TINY if not flag.startswith(("--epochs", "--workers"))]
    command = [sys.executable, str(EXAMPLES / "train_images.py"), str(folder), *flags]
    process = subprocess.Popen(
        [*command, "--epochs=500", "--workers=2", f"--out={out}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    with process.stdout:
        # it has trained for an epoch at least
        assert any(line.startswith("epoch 1 of 500: on") for line in process.stdout)
        time.sleep(1)
        os.killpg(process.pid, signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, errors
    assert "Traceback" not in errors
    assert re.search(r"stopped at step \d+; --resume goes on from there", errors)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--size=30", "argument --size: 30; not a multiple of --downsample 4"),
        ("--size=0", "argument --size: 0; it must be in [1, 8192)"),
        ("--downsample=3", "argument --downsample: 3; it must be a power of 2"),
        ("--downsample=1", "argument --downsample: 1; it must be in [2, 8192)"),
        ("--workers=-1", "argument --workers: -1; it must be in [0, 1024)"),
        ("--epochs=0", "argument --epochs: 0; "),
        ("--reconstruction=l1", "argument --reconstruction: invalid choice: 'l1'"),
    ],
)
def test_a_bad_flag_is_a_line(folder, tmp_path, capsys, flag, message):
    with pytest.raises(SystemExit) as caught:
        train_images.main([str(folder), f"--out={tmp_path / 'out'}", flag])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[1]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("downsample", [2, 4, 8])
def test_an_index_is_a_square_of_pixels(downsample):
    vq = vqtriton.VectorQuantize(4, 16, accept_image_fmap=True)
    model = vqvae.VQVAE(vq, 4, "mse", 3, downsample).eval()
    images = torch.randint(256, (2, 3, 16, 32), dtype=torch.uint8)
    indices = model.encode(images)
    assert indices.shape == (2, 16 // downsample, 32 // downsample)
    assert model.decode(indices).shape == images.shape


def test_a_bad_folder_is_a_line(tmp_path, capsys):
    with pytest.raises(SystemExit):
        train_images.main([str(tmp_path / "none")])
    assert f"argument FOLDER: {tmp_path / 'none'} is not a folder" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="has too few images: 0, where 2 are needed"):
        train_images.main([str(tmp_path), f"--out={tmp_path / 'out'}"])
    assert not (tmp_path / "out").exists()


def test_the_page_about_your_data_runs(folder, tmp_path, monkeypatch):
    """Each Python block of docs/your-data.md, one after another, in the folder of the clone."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(EXAMPLES)
    train(folder, tmp_path / "runs" / "photos", "--epochs=1")
    names = {"__name__": "__main__"}
    code = blocks((ROOT / "docs" / "your-data.md").read_text(encoding="utf-8"))
    assert len(code) >= 3
    for line, block in code:
        source = "\n" * (line - 1) + block
        exec(compile(source, "docs/your-data.md", "exec"), names)
