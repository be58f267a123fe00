"""examples/train_mnist.py: in this process on few images, and as users run it."""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import termios
import types
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from figures import leave_undrawn
from PIL import Image

import vqtriton

EXAMPLES = Path(__file__).parents[1] / "examples"
# examples are scripts, not a package; there they import one another by their bare names
sys.path.insert(0, str(EXAMPLES))
mnist_data = importlib.import_module("mnist_data")
progress = importlib.import_module("progress")
run_files = importlib.import_module("run_files")
train_args = importlib.import_module("train_args")
train_mnist = importlib.import_module("train_mnist")
trainer = importlib.import_module("trainer")
vqvae = importlib.import_module("vqvae")
vqvae_trainer = importlib.import_module("vqvae_trainer")

# few steps, so statistics that are quick to forget; 8 steps an epoch
TINY = (
    *("--epochs=2", "--limit=500", "--batch-size=64", "--codebook-size=32", "--dim=8"),
    *("--channels=8", "--decay=0.9", "--threshold-ema-dead-code=20", "--lr=0.01"),
)
# of a model that gives every image of the test set the mean image of the training set
BCE_OF_THE_MEAN = 206.0


def run(*flags: str, launcher: tuple[str, ...] = (sys.executable, "-W", "error")) -> list[str]:
    return [*launcher, str(EXAMPLES / "train_mnist.py"), *flags]


# threads of a small model wait for one another where other processes want the cores as well
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def finish(command: list[str]) -> subprocess.CompletedProcess:
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=280)


def metrics_of(out: Path) -> dict:
    """All that must repeat: all but the times."""
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics.pop("seconds") > 0
    return metrics


@functools.cache
def a_thousand_images() -> mnist_data.Data:
    data = mnist_data.load("mnist")
    return mnist_data.Data(
        data.train_images[:600],
        data.train_labels[:600],
        data.test_images[:400],
        data.test_labels[:400],
    )


def patched(patch: pytest.MonkeyPatch) -> Iterator[mnist_data.Data]:
    """A thousand real images in place of 70,000; and main leaves this process as it was."""
    few = a_thousand_images()
    patch.setattr(train_mnist, "load", lambda name, folder: few)
    leave_undrawn(patch)
    patch.setattr(trainer, "LOOK_EVERY", 3)
    was = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield few
    for number, handler in was.items():
        signal.signal(number, handler)
    # as conftest has it
    torch.utils.deterministic.fill_uninitialized_memory = True


@pytest.fixture
def few_images(monkeypatch):
    yield from patched(monkeypatch)


def train(out: Path, *flags: str) -> dict:
    train_mnist.main([*TINY, f"--out={out}", *flags])
    return metrics_of(out)


def log_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def as_users_run_it(tmp_path_factory) -> tuple[Path, dict, str]:
    """The whole test set, a process of its own, warnings are errors."""
    out = tmp_path_factory.mktemp("first") / "deep" / "run"
    flags = ("--epochs=1", "--limit=3000", "--batch-size=32", "--codebook-size=32", "--dim=8")
    flags += ("--decay=0.9", "--threshold-ema-dead-code=20", "--seed=3", f"--out={out}")
    done = finish(run(*flags))
    assert done.returncode == 0, done.stderr
    return out, metrics_of(out), done.stdout


def test_metrics_are_complete_and_in_range(as_users_run_it):
    out, metrics, stdout = as_users_run_it
    # it has learned: codes that said nothing would leave it at the mean image
    assert metrics["test_bce_floor_nats"] == pytest.approx(45.5, abs=0.05)
    assert metrics["test_bce_floor_nats"] < metrics["test_bce_nats"] < 0.7 * BCE_OF_THE_MEAN
    assert 0 < metrics["test_mse"] < 0.05
    assert metrics["codes_used"] == 32 * metrics["usage"]
    assert 2 < metrics["perplexity"] <= metrics["codes_used"] <= 32
    assert metrics["quantization_error"] > 0
    assert 0 < metrics["quantization_error_relative"] < 1
    assert metrics["arguments"]["codebook_size"] == 32
    assert metrics["arguments"]["kmeans_init"] is True
    assert metrics["environment"]["vqtriton"] == vqtriton.__version__
    assert f"Result: on the test set MSE {metrics['test_mse']:.4g}, BCE " in stdout
    names = {"metrics.json", "log.jsonl", "checkpoint.safetensors"}
    assert {path.name for path in out.iterdir()} == names | {
        *("reconstructions.png", "usage.png", "curves.png")
    }


def test_the_files_hold_what_was_measured(as_users_run_it):
    """The metrics once more, from the checkpoint alone and by other means."""
    out, metrics, _ = as_users_run_it
    model = vqvae.VQVAE.from_checkpoint(out / "checkpoint.safetensors")
    images = mnist_data.load("mnist").test_images / 255
    with torch.no_grad():
        x = model.encoder(images[:, None])
        indices = model.vq(x).indices
        codes = model.vq.get_output_from_indices(indices)
        pixels = model.decoder(codes)[:, 0].sigmoid().double()
    error = (x - codes).double().square().sum(1)
    assert metrics["quantization_error"] == pytest.approx(error.mean().item(), rel=1e-4)
    variance = x.double().var((0, 2, 3), correction=0).sum().item()
    relative = error.mean().item() / variance
    assert metrics["quantization_error_relative"] == pytest.approx(relative, rel=1e-4)
    mse = (pixels - images).square().mean().item()
    assert metrics["test_mse"] == pytest.approx(mse, rel=1e-4)
    target = images.double()
    nats = -(target * pixels.log() + (1 - target) * (1 - pixels).log()).sum((1, 2)).mean().item()
    assert metrics["test_bce_nats"] == pytest.approx(nats, rel=1e-4)
    _, counts = indices.unique(return_counts=True)
    share = counts / counts.sum()
    assert metrics["codes_used"] == len(counts)
    assert metrics["perplexity"] == pytest.approx((-share * share.log()).sum().exp().item(), 1e-3)


def test_reconstructions_are_a_picture_of_both(as_users_run_it):
    out, _, _ = as_users_run_it
    with Image.open(out / "reconstructions.png") as image:
        # 10 columns of 28 + 2 pixels, 6 rows likewise, less the last gap; three times
        width, height = 3 * (10 * 30 - 2), 3 * (6 * 30 - 2)
        # title and labels are above and at the left
        page = np.asarray(image)
        assert image.size > (width, height)
        assert (page[:-height] < 128).any()
        assert (page[-height:, :-width] < 128).any()
        pixels = page[-height::3, -width::3] / 255
    data = mnist_data.load("mnist")
    errors, errors_of_mean = [], []
    for digit in range(10):
        original = pixels[:28, 30 * digit : 30 * digit + 28]
        reconstruction = pixels[30:58, 30 * digit : 30 * digit + 28]
        of_digit = data.test_images[data.test_labels == digit] / 255
        assert np.allclose(original, of_digit[0], atol=1e-6)
        errors.append(np.square(reconstruction - original).mean())
        errors_of_mean.append(np.square(of_digit.mean(0).numpy() - original).mean())
    assert min(errors) > 0
    # of this image, not of any image of the digit
    assert sum(errors) < 0.8 * sum(errors_of_mean)


def test_pictures_are_pngs_of_some_size(as_users_run_it):
    out, _, _ = as_users_run_it
    for name in ("usage.png", "curves.png"):
        with Image.open(out / name) as image:
            assert image.format == "PNG"
            # something is drawn
            assert len(np.unique(np.asarray(image.convert("L")))) > 10


@pytest.mark.parametrize("update", ["ema", "gradient"])
@pytest.mark.parametrize("reconstruction", ["bce", "mse"])
def test_loss_terms_add_up(few_images, tmp_path, update, reconstruction):
    metrics = train(tmp_path, f"--codebook-update={update}", f"--reconstruction={reconstruction}")
    weight = train_args.RECONSTRUCTION_WEIGHT[reconstruction]
    assert metrics["arguments"]["reconstruction_weight"] == weight
    first, last = log_of(tmp_path)
    for epoch in (first, last):
        terms = weight * epoch["reconstruction"] + epoch["codebook_term"] + epoch["commitment_term"]
        assert epoch["loss"] == pytest.approx(terms, rel=1e-6)
        assert epoch["commitment_term"] > 0
        # moving averages stand in for the codebook term; else it is the other one without β
        expected = 0 if update == "ema" else epoch["commitment_term"] / 0.25
        assert epoch["codebook_term"] == pytest.approx(expected)
    assert last["reconstruction"] < first["reconstruction"]
    assert ("test_bce_nats" in metrics) == (reconstruction == "bce")
    assert last.keys() <= metrics.keys() | {"seconds"}


def test_squared_error_is_that_of_the_decoder_itself(few_images, tmp_path):
    metrics = train(tmp_path, "--reconstruction=mse")
    model = vqvae.VQVAE.from_checkpoint(tmp_path / "checkpoint.safetensors")
    images = few_images.test_images[:, None] / 255
    with torch.no_grad():
        pixels = model(images)[0].clamp(0, 1)
    assert metrics["test_mse"] == pytest.approx((pixels - images).square().mean().item(), 1e-4)
    decoded = model.decode(model.encode(few_images.test_images[:, None]))
    assert (decoded - pixels * 255).abs().max() <= 0.501


def test_a_seed_repeats_bit_for_bit_and_another_does_not(few_images, tmp_path):
    first = train(tmp_path / "first", "--seed=1")
    assert train(tmp_path / "again", "--seed=1") == first
    for name in ("reconstructions.png", "usage.png", "curves.png"):
        again = (tmp_path / "again" / name).read_bytes()
        assert again == (tmp_path / "first" / name).read_bytes()
    assert train(tmp_path / "other", "--seed=2")["test_mse"] != first["test_mse"]


def test_each_epoch_has_an_order_of_its_own():
    first, second = (trainer.shuffled(7, epoch, 100).tolist() for epoch in (0, 1))
    assert sorted(first) == sorted(second) == list(range(100))
    assert first != second
    assert trainer.shuffled(7, 0, 100).tolist() == first
    assert trainer.shuffled(8, 0, 100).tolist() != first


def test_codes_are_revived_until_80_percent(few_images, tmp_path, monkeypatch):
    thresholds = []
    step = vqvae_trainer.VQVAETrainer.train_on

    def spy(self, *args):
        values = step(self, *args)
        thresholds.append(self.model.vq.threshold_ema_dead_code)
        return values

    monkeypatch.setattr(vqvae_trainer.VQVAETrainer, "train_on", spy)
    train(tmp_path)
    # the default, of an even share of 64 · 49 / 32, is tested below
    assert thresholds == [20] * 13 + [0] * 3
    args = train_mnist.parse_args([f"--out={tmp_path}"])
    assert args.threshold_ema_dead_code == pytest.approx(0.4 * 64 * 49 / 512)


@pytest.mark.parametrize(
    "flags",
    [
        ("--amp",),
        pytest.param(("--compile", "--limit=512", "--epochs=1"), marks=pytest.mark.slow),
        ("--no-kmeans-init", "--kmeans-iters=1", "--codebook-weight=2"),
        ("--precision=fast", "--backend=torch", "--no-sync-codebook", "--commitment-weight=1"),
        ("--limit=1", "--epochs=1", "--threshold-ema-dead-code=0"),
        # a last batch of one image
        ("--limit=65", "--backend=auto", "--codebook-update=gradient", "--device=cpu"),
    ],
    ids=lambda flags: flags[0],
)
def test_flags_reach_the_training(few_images, tmp_path, flags):
    metrics = train(tmp_path, *flags)
    for flag in flags:
        name, _, value = flag.removeprefix("--").replace("-", "_").partition("=")
        if name == "device":
            continue
        expected = metrics["arguments"].get(name.removeprefix("no_"))
        if name != "compile":
            assert (
                str(expected) == value
                or expected is (not name.startswith("no_"))
                or (float(value) == expected)
            )
    # in the arguments of the quantizer, not only in the record
    _, info = run_files.load_checkpoint(tmp_path / "checkpoint.safetensors")
    vq = info["quantizer"] | {"threshold_ema_dead_code": None}
    of_vq = {name: metrics["arguments"][name] for name in train_args.QUANTIZER}
    assert vq.items() >= (of_vq | {"threshold_ema_dead_code": None}).items()


def test_where_the_images_come_from(few_images, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(train_mnist, "load", lambda *source: asked.append(source) or few_images)
    monkeypatch.chdir(tmp_path)
    train_mnist.main([*TINY, "--epochs=1", "--dataset=fashion-mnist", "--data-dir=."])
    assert asked == [("fashion-mnist", Path())]
    # a folder for each data set, unless one is named
    assert metrics_of(tmp_path / "runs" / "fashion-mnist")["arguments"]["epochs"] == 1


def test_amp_and_compile_do_something(few_images, tmp_path, monkeypatch):
    plain = train(tmp_path / "plain")
    assert train(tmp_path / "amp", "--amp")["test_mse"] != plain["test_mse"]
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda model: compiled.append(model) or model.forward)
    metrics = train(tmp_path / "compile", "--compile")
    assert len(compiled) == 1
    assert metrics.pop("environment")["compile"] is True
    assert plain.pop("environment")["compile"] is False
    assert metrics == plain


def test_every_option_of_the_quantizer_has_a_flag():
    names = set(inspect.signature(vqtriton.VectorQuantize).parameters)
    # layouts, and what gives indices or codes another shape
    names -= {"channel_last", "accept_image_fmap", "accept_3d_fmap", "reduction"}
    names -= {"codebook_dim", "layernorm_after_project_in", "heads", "separate_codebook_per_head"}
    assert set(train_args.QUANTIZER) == names


class Killed(BaseException):
    """Nothing in the trainer may catch it, as nothing can catch SIGKILL."""


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The folder of a run of 16 steps."""
    out = tmp_path_factory.mktemp("uninterrupted")
    with pytest.MonkeyPatch.context() as patch, contextlib.contextmanager(patched)(patch):
        train(out)
    return out


@pytest.mark.parametrize("killed_before", [0, 3, 8, 16])
def test_resumed_after_a_kill_is_the_same_run(
    few_images, uninterrupted, tmp_path, monkeypatch, killed_before
):
    """A checkpoint is written before the first step, and after the 8th and the last."""
    whole, out = metrics_of(uninterrupted), tmp_path / "killed"
    step, save = vqvae_trainer.VQVAETrainer.train_on, trainer.Trainer.save

    def die(self, *args):
        if self.step == killed_before:
            raise Killed
        return (step if args else save)(self, *args)

    with monkeypatch.context() as patch:
        # 16: when all is written but the checkpoint
        name = "save" if killed_before == 16 else "train_on"
        patch.setattr(vqvae_trainer.VQVAETrainer, name, die)
        with pytest.raises(Killed):
            train(out)
    # the arguments are in the checkpoint
    train_mnist.main(["--resume", f"--out={out}"])
    assert metrics_of(out) == whole
    for name in ("curves.png", "usage.png", "reconstructions.png"):
        assert (out / name).read_bytes() == (uninterrupted / name).read_bytes()
    drop = {"seconds": None}
    for line, other in zip(log_of(out), log_of(uninterrupted), strict=True):
        assert line | drop == other | drop


def content_of(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}


@pytest.fixture
def finished(uninterrupted, tmp_path) -> Path:
    """A copy of a run of 2 of 2 epochs."""
    return Path(shutil.copytree(uninterrupted, tmp_path / "run"))


def test_a_run_that_is_complete_says_so_and_stays_as_it_is(finished, few_images, capsys):
    before = content_of(finished)
    for flags in ((), ("--epochs=2",)):
        with pytest.raises(SystemExit) as caught:
            train_mnist.main(["--resume", f"--out={finished}", *flags])
        assert caught.value.code == 0
        output = capsys.readouterr().out
        assert "already complete (2 of 2 epochs)" in output
        assert "--epochs 4" in output
        assert f"Result: on the test set MSE {metrics_of(finished)['test_mse']:.4g}" in output
    assert content_of(finished) == before


@pytest.mark.parametrize("end", ["none", "Ctrl-C", "kill", "nan"])
def test_a_finished_run_survives_another_in_its_folder(
    finished, few_images, monkeypatch, capsys, end
):
    before = content_of(finished)
    step = vqvae_trainer.VQVAETrainer.train_on

    def interrupted(self, *args):
        if self.step == 3 and end == "kill":
            raise Killed
        if self.step == 3 and end == "Ctrl-C":
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, *args)

    flags = ("--seed=5", "--epochs=1", *(["--lr=1e30"] if end == "nan" else ()))
    with monkeypatch.context() as patch:
        patch.setattr(vqvae_trainer.VQVAETrainer, "train_on", interrupted)
        if end == "none":
            train(finished, *flags)
        else:
            with pytest.raises((SystemExit, Killed)):
                train(finished, *flags)
    kept = finished.with_name("run-1")
    assert content_of(kept) == before
    assert f"held a run of 2 of 2 epochs. It is kept: {kept}" in capsys.readouterr().out
    # nothing of the old one is left beside the new one
    names = before if end == "none" else ["checkpoint.safetensors"]
    assert sorted(content_of(finished)) == sorted(names)
    # a third one: those that have made a step are kept as well
    train(finished, "--epochs=1", "--seed=6")
    assert content_of(kept) == before
    kept_too = finished.with_name("run-2")
    assert kept_too.exists() == (end in ("none", "Ctrl-C"))


def test_more_epochs_are_a_second_cycle(finished, few_images, tmp_path, monkeypatch):
    rates, thresholds = [], []
    step = vqvae_trainer.VQVAETrainer.train_on

    def interrupted(self, *args):
        rates.append(self.optimizer.param_groups[0]["lr"])
        if self.step == 21 and len(rates) == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        values = step(self, *args)
        thresholds.append(self.vq.threshold_ema_dead_code)
        return values

    # asked for before the first two are done, and in between stopped: it is all the same
    with monkeypatch.context() as patch:
        patch.setattr(vqvae_trainer.VQVAETrainer, "train_on", interrupted)
        with pytest.raises(SystemExit):
            train_mnist.main(["--resume", "--epochs=3", f"--out={finished}"])
        train_mnist.main(["--resume", f"--out={finished}"])
    assert len(rates) == 8
    # it rises again, and comes down again
    assert rates[0] == pytest.approx(0.01 / 25)
    assert max(rates) == pytest.approx(0.01, rel=0.05)
    assert rates[-1] < 1e-4
    # codes are revived until 80 percent of it
    assert thresholds == [20] * 7 + [0]
    metrics = metrics_of(finished)
    assert (metrics["epoch"], metrics["arguments"]["epochs"]) == (3, 3)
    with pytest.raises(SystemExit) as caught:
        train_mnist.main(["--resume", "--epochs=2", f"--out={finished}"])
    assert caught.value.code == 2


def test_two_processes_cannot_train_in_one_folder(finished, few_images):
    before = content_of(finished)
    with run_files.claimed(finished, resume=True):
        for flags in ((), ("--resume", "--epochs=3")):
            with pytest.raises(OSError, match=f"another process is training in {finished}"):
                train(finished, *flags)
    assert content_of(finished) == before


def test_the_folder_that_one_is_in_is_not_renamed(finished, few_images, monkeypatch):
    monkeypatch.chdir(finished)
    before = content_of(finished)
    with pytest.raises(OSError, match="say --resume, or another --out"):
        train(Path())
    assert content_of(finished) == before


def test_a_folder_that_cannot_be_renamed_is_left_alone(finished, few_images, monkeypatch):
    def busy(*args):
        raise OSError(16, "Device or resource busy")

    monkeypatch.setattr(Path, "rename", busy)
    before = content_of(finished)
    with pytest.raises(OSError, match="holds a run of 2 of 2 epochs, and it cannot be renamed"):
        train(finished)
    assert content_of(finished) == before


def test_results_without_a_checkpoint_are_kept_too(few_images, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / "metrics.json").write_text("of an earlier run")
    train(out, "--resume", "--epochs=1")
    assert (tmp_path / "run-1" / "metrics.json").read_text() == "of an earlier run"
    assert metrics_of(out)["epoch"] == 1


@pytest.mark.parametrize(
    ("number", "after"), [(signal.SIGINT, 1), (signal.SIGTERM, 8), (signal.SIGINT, 13)]
)
def test_a_signal_leaves_a_checkpoint_of_that_step(
    few_images, uninterrupted, tmp_path, monkeypatch, capsys, number, after
):
    step = vqvae_trainer.VQVAETrainer.train_on

    def interrupted(self, *args):
        values = step(self, *args)
        if self.step + 1 == after:
            os.kill(os.getpid(), number)
        return values

    with monkeypatch.context() as patch:
        patch.setattr(vqvae_trainer.VQVAETrainer, "train_on", interrupted)
        with pytest.raises(SystemExit) as caught:
            train(tmp_path / "stopped")
    assert caught.value.code == 128 + number
    assert f"stopped at step {after}; --resume goes on" in capsys.readouterr().err
    _, info = run_files.load_checkpoint(tmp_path / "stopped" / "checkpoint.safetensors")
    assert info["step"] == after
    assert train(tmp_path / "stopped", "--resume") == metrics_of(uninterrupted)


def test_resume_without_a_checkpoint_starts(few_images, tmp_path, capsys):
    metrics = train(tmp_path / "resumed", "--resume")
    assert f"no checkpoint in {tmp_path / 'resumed'}: starting" in capsys.readouterr().err
    assert metrics == train(tmp_path / "started")


def test_resume_refuses_what_it_cannot_do(few_images, tmp_path, capsys):
    train(tmp_path)
    resume = ["--resume", f"--out={tmp_path}"]
    # the same once more is no contradiction
    train_mnist.parse_args([*resume, "--lr=0.01", "--compile"])
    for flag, message in {
        "--lr=0.1": "argument --lr: 0.1; it was 0.01 in",
        "--epochs=1": "argument --epochs: 1; it was 2 in",
        "--no-kmeans-init": "argument --kmeans-init: False; it was True in",
    }.items():
        assert message in error_of([*resume, flag], capsys)
    content = (tmp_path / "checkpoint.safetensors").read_bytes()
    for bad in (content[:-1], content[:100], b"", b"no checkpoint"):
        (tmp_path / "checkpoint.safetensors").write_bytes(bad)
        assert "argument --resume" in error_of(resume, capsys)
    vqtriton.save(vqtriton.VectorQuantize(2, 3), tmp_path / "checkpoint.safetensors")
    assert "is not a checkpoint of these examples" in error_of(resume, capsys)
    run_files.save_checkpoint(tmp_path / "checkpoint.safetensors", {}, {"arguments": []})
    assert "is not a checkpoint of these examples" in error_of(resume, capsys)
    # of another program
    info = {"arguments": train_mnist.parse_args([f"--out={tmp_path}"]).recorded}
    run_files.save_checkpoint(tmp_path / "checkpoint.safetensors", {}, info)
    with pytest.raises(SystemExit, match="cannot be resumed: "):
        train_mnist.main(resume)


def error_of(flags: list[str], capsys) -> str:
    """The one line after the usage."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        train_mnist.parse_args(flags)
    assert caught.value.code == 2
    usage, error = capsys.readouterr().err.splitlines()
    assert usage.startswith("usage: ")
    return error


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--epochs=0", "argument --epochs: 0; it must be in [1, 2**63)"),
        ("--epochs=99999999999999999999", "argument --epochs"),
        ("--batch-size=1.5", "argument --batch-size: invalid int value: '1.5'"),
        ("--batch-size=-1", "argument --batch-size: -1; it must be in [1, 2**63)"),
        ("--limit=0", "argument --limit: 0; it must be in [1, 2**63)"),
        ("--channels=0", "argument --channels: 0; it must be in [1, 2**63)"),
        ("--codebook-size=-1", "quantizer: codebook_size is -1"),
        ("--codebook-size=99999999999999", "quantizer: "),
        ("--dim=0", "quantizer: dim is 0; it must be finite and at least 1"),
        ("--codebook-update=adam", "quantizer: codebook_update is 'adam'; it must be one of ema"),
        ("--decay=1.5", "quantizer: decay is 1.5; it must be in [0, 1]"),
        ("--decay=nan", "quantizer: decay is nan"),
        ("--commitment-weight=nan", "quantizer: commitment_weight is nan"),
        ("--codebook-weight=-1", "quantizer: codebook_weight is -1"),
        ("--kmeans-iters=-1", "quantizer: kmeans_iters is -1"),
        ("--threshold-ema-dead-code=-1", "quantizer: threshold_ema_dead_code is -1"),
        ("--precision=half", "quantizer: precision is 'half'; it must be one of exact, fast"),
        ("--backend=cuda", "quantizer: backend is 'cuda'; it must be one of"),
        ("--reconstruction=l1", "argument --reconstruction: invalid choice: 'l1'"),
        ("--reconstruction-weight=0", "argument --reconstruction-weight: 0.0; it must be positive"),
        ("--dataset=cifar", "argument --dataset: invalid choice: 'cifar'"),
        ("--lr=0", "argument --lr: 0.0; it must be positive"),
        ("--lr=inf", "argument --lr: inf"),
        ("--seed=-1", "argument --seed: -1"),
        ("--device=nonsense", "argument --device: "),
        ("--device=meta", "argument --device: "),
        ("--log-to=paper", "argument --log-to: invalid choice: 'paper'"),
        ("--data-dir=/no/such/folder", "argument --data-dir: /no/such/folder is not a folder"),
        ("--epoch=1", "unrecognized arguments: --epoch=1"),
    ],
)
def test_a_bad_flag_is_a_line_and_exit_status_2(capsys, tmp_path, flag, message):
    assert message in error_of([f"--out={tmp_path}", flag], capsys)


def test_what_several_ranks_cannot_share(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert "not a multiple" in error_of([f"--out={tmp_path}"], capsys)
    assert "--limit: 2; it must be" in error_of(
        [f"--out={tmp_path}", "--batch-size=3", "--limit=2"], capsys
    )


def test_help_is_documentation(capsys):
    with pytest.raises(SystemExit) as caught:
        train_mnist.parse_args(["--help"])
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "with --resume, more than before (default: 5)" in text
    assert "--kmeans-init, --no-kmeans-init" in text
    assert "until 80 % of training" in text
    # every flag says what it is
    parser = train_mnist.build_parser()
    assert [action.dest for action in parser._actions if not action.help] == []


def test_errors_as_users_see_them(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    done = finish(run(f"--out={tmp_path / 'file'}"))
    assert done.returncode == 2
    assert done.stderr.count("\n") == 2
    assert "error: argument --out: " in done.stderr

    # black images under the name of the training set
    black = mnist_data.to_idx(np.zeros((60000, 28, 28), dtype=np.uint8))
    (tmp_path / "train-images-idx3-ubyte").write_bytes(black)
    done = finish(run(f"--out={tmp_path / 'out'}", f"--data-dir={tmp_path}"))
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert f"{tmp_path / 'train-images-idx3-ubyte'}" in done.stderr


def test_a_loss_that_is_not_finite_ends_the_run(few_images, tmp_path):
    with pytest.raises(SystemExit, match=r"the loss is (nan|inf); try a lower --lr"):
        train(tmp_path, "--lr=1e30")
    # nothing that could be taken for a result
    assert not (tmp_path / "metrics.json").exists()


def test_a_checkpoint_never_holds_nan(few_images, tmp_path, monkeypatch):
    """Not even where the loss is looked at for the first time at the end of an epoch, or after."""
    monkeypatch.setattr(trainer, "LOOK_EVERY", 20)
    for flag in ("--no-resume", "--resume"):
        with pytest.raises(SystemExit, match="step 8: the loss is"):
            train(tmp_path, "--lr=1e30", flag)
        tensors, info = run_files.load_checkpoint(tmp_path / "checkpoint.safetensors")
        assert info["step"] == 0
        assert all(tensor.isfinite().all() for tensor in tensors.values())


def test_a_signal_does_not_save_nan(few_images, tmp_path, monkeypatch):
    step = vqvae_trainer.VQVAETrainer.train_on

    def interrupted(self, *args):
        values = step(self, *args)
        self.sums["sums"][0] = float("nan")
        os.kill(os.getpid(), signal.SIGTERM)
        return values

    monkeypatch.setattr(vqvae_trainer.VQVAETrainer, "train_on", interrupted)
    with pytest.raises(SystemExit, match="step 1: the loss is nan"):
        train(tmp_path)
    assert run_files.load_checkpoint(tmp_path / "checkpoint.safetensors")[1]["step"] == 0


def test_signals_are_given_back(few_images, tmp_path):
    was = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    train(tmp_path, "--epochs=1")
    assert {number: signal.getsignal(number) for number in was} == was


def test_a_full_disk_is_a_line(tmp_path):
    flags = ("--limit=100", "--channels=8", f"--out={tmp_path}")
    done = finish(["bash", "-c", 'ulimit -f 150; exec "$@"', "bash", *run(*flags)])
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "train_mnist.py: [Errno 27] File too large" in done.stderr


def test_tensorboard_gets_every_value(few_images, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train(tmp_path, "--log-to=tensorboard")
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert {"loss", "perplexity", "test_mse"} <= set(events.Tags()["scalars"])
    values = [event.value for event in events.Scalars("test_mse")]
    assert values == pytest.approx([line["test_mse"] for line in log_of(tmp_path)])


def test_wandb_gets_every_value(few_images, tmp_path, monkeypatch):
    sent = []
    fake = types.ModuleType("wandb")
    fake.init = lambda **options: (
        sent.append(options)
        or types.SimpleNamespace(log=lambda values, step: sent.append((step, values)))
    )
    monkeypatch.setitem(sys.modules, "wandb", fake)
    train(tmp_path, "--log-to=wandb")
    options, *values = sent
    assert options["config"]["codebook_size"] == 32
    assert [line | {} for _, line in values if "test_mse" in line] == log_of(tmp_path)
    assert [step for step, line in values if "test_mse" in line] == [8, 16]


@pytest.mark.parametrize("package", ["tensorboard", "wandb"])
def test_an_extra_that_is_missing(few_images, tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    with pytest.raises(SystemExit, match=rf"--log-to {package}: .*\[logging\]"):
        train(tmp_path, f"--log-to={package}")


@pytest.mark.slow
def test_two_ranks_train_the_same_model(tmp_path):
    """Under torchrun, as its users run it; both learn, and a signal stops both."""
    launcher = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2")
    launcher += ("--standalone",)
    flags = ("--epochs=2", "--limit=2001", "--batch-size=32", "--codebook-size=32", "--dim=8")
    flags += ("--decay=0.9", "--threshold-ema-dead-code=20", "--device=cpu")
    done = finish(run(*flags, f"--out={tmp_path}", launcher=launcher))
    assert done.returncode == 0, done.stderr
    metrics = metrics_of(tmp_path)
    first, second = metrics["codebook_sha256"]
    assert first == second
    assert metrics["environment"]["ranks"] == 2
    assert metrics["test_bce_nats"] < 0.8 * BCE_OF_THE_MEAN
    assert "Warning" not in done.stderr
    # once, not once for each rank
    assert done.stdout.count("epoch 1 of 2: on the test set") == 1
    assert len(log_of(tmp_path)) == 2


def test_killed_ten_times_at_random_moments(few_images, uninterrupted, tmp_path, monkeypatch):
    """SIGKILL, whatever it is doing; in the end the run is the one that nobody killed."""
    out = tmp_path / "killed"
    # as a run of its own: no state of this process is in it
    context = multiprocessing.get_context("fork")
    rng, ends = random.Random(0), []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*use of fork", DeprecationWarning)
        for _ in range(10):
            process = context.Process(target=train, args=(out, "--resume"))
            process.start()
            process.join(rng.uniform(0, 0.3))
            process.kill()
            process.join()
            ends.append(process.exitcode)
    # what it was killed with, unless it was done before; never an error of its own
    assert set(ends) <= {-signal.SIGKILL, 0}
    assert -signal.SIGKILL in ends
    with contextlib.suppress(SystemExit):
        train(out, "--resume")
    assert metrics_of(out) == metrics_of(uninterrupted)
    # no partial file is left for good, apart from those of killed writers
    partial = [p.name for p in out.iterdir() if p.name.startswith(".")]
    assert all(re.match(r"\.(checkpoint|log|metrics|\w+)\.", name) for name in partial)


def test_a_sign_of_life_where_there_is_no_terminal(few_images, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(progress, "PAUSE", 0.0)
    train(tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Training a VQ-VAE on mnist."
    assert lines[1].startswith("Epochs: 2 of 8 steps, on 500 images, on cpu with ")
    assert lines[2] == f"Results: {tmp_path}. Ctrl-C stops, --resume goes on."
    steps = [line for line in lines if re.match(r"epoch \d of 2: \d+ %, .* left", line)]
    assert len(steps) == 16
    assert re.search(r" left, loss [\d.]+, perplexity [\d.]+$", steps[-1])
    assert lines[-2].startswith("Result: on the test set MSE ")
    assert lines[-1].startswith(f"{tmp_path}: checkpoint.safetensors, ")
    assert max(map(len, lines[3:-1])) < 120


def test_the_bar_has_room_in_80_columns(monkeypatch):
    """In a terminal, with the numbers of a training run."""
    main, other = os.openpty()
    termios.tcsetwinsize(other, (24, 80))
    with os.fdopen(other, "w") as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        with contextlib.closing(progress.Progress(300_000)) as bar:
            bar.show({"loss": 0.98765, "perplexity": 123.456})
            bar.advance(150_000, "epoch 3 of 5")
            bar.bar.refresh()
    shown = b""
    # an error, not an end, where nothing can write any more
    with contextlib.suppress(OSError):
        while part := os.read(main, 10_000):
            shown += part
    os.close(main)
    # it is wiped away at the end
    line = [text for text in shown.decode().split("\r") if text.startswith("epoch")][-1]
    assert line.startswith("epoch 3 of 5  50% |█")
    assert line.rstrip().endswith("left, loss 0.988, perplexity 123")
    assert len(line) <= 80
    assert line.count("█") >= 8


@pytest.mark.parametrize(
    ("seconds", "text"), [(3.2, "3 s"), (200, "3 min 20 s"), (7500, "2 h 5 min")]
)
def test_times_in_words(seconds, text):
    assert progress.minutes(seconds) == text


def test_ctrl_c_while_torch_is_imported_is_no_traceback(tmp_path):
    # as soon as Python is up: it has begun with the imports of the script
    process = subprocess.Popen(
        [sys.executable, "-v", *run("--limit=20", f"--out={tmp_path / 'out'}")[3:]],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    with process.stderr:
        for line in process.stderr:
            if "numpy" in line:
                process.send_signal(signal.SIGINT)
                break
        assert "Traceback" not in process.stderr.read()
    assert process.wait() == -signal.SIGINT
    assert not (tmp_path / "out").exists()


def test_ctrl_c_in_a_process_that_reads_images_is_left_to_its_parent(monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(EXAMPLES / "train_images.py")])
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        pool.apply(exec, ("import startup",))
        handler = pool.apply(eval, ("__import__('signal').getsignal(2)",))
    assert handler is signal.default_int_handler


def test_what_is_missing_is_named(tmp_path):
    """A Python that has none of the packages, as the one that a shell finds first often is."""
    # -I keeps the script's folder out of the path, so it is put there by hand
    code = f"import sys; sys.path[:0] = [{str(EXAMPLES)!r}]; sys.argv = ['train_mnist.py']; "
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code + "import startup"], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "train_mnist.py: torch, vqtriton, matplotlib, PIL, tqdm cannot" in done.stderr
    assert "pip install '.[examples]'" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("module", "folder"), [("startup", EXAMPLES), ("bench", EXAMPLES.parent)])
@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, {"GOMP_SPINCOUNT": "1000"}),
        ({"OMP_WAIT_POLICY": "active"}, {"OMP_WAIT_POLICY": "active"}),
        ({"GOMP_SPINCOUNT": "7"}, {"GOMP_SPINCOUNT": "7"}),
    ],
)
def test_openmp_waits_as_the_user_says(module, folder, before, after):
    """Set before torch is loaded, the same in the examples and in the bench."""
    names = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    environment = {k: v for k, v in os.environ.items() if k not in names} | before
    code = f"shown = {{n: os.environ[n] for n in {names} if n in os.environ}}"
    code = f"import os, sys, {module}; {code}; print(shown, 'torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=folder, capture_output=True, text=True
    )
    assert done.stdout.strip() == f"{after} False"
