"""examples/train_prior.py: run as users run it, on the VQ-VAE of a short run of train_mnist.py."""

from __future__ import annotations

import importlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

EXAMPLES = Path(__file__).parents[1] / "examples"
# examples are scripts, not a package; there they import one another by their bare names
sys.path.insert(0, str(EXAMPLES))
run_files = importlib.import_module("run_files")
mnist_data = importlib.import_module("mnist_data")
train_prior = importlib.import_module("train_prior")

K = 16
SMALL = ("--width=16", "--depth=1", "--heads=2", "--batch-size=16", "--limit=1000", "--epochs=2")


def run(script: str, *flags: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-W", "error", str(EXAMPLES / script), *flags]
    # threads of a small model wait for one another where other processes want the cores as well
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)


@pytest.fixture(scope="module")
def vqvae_run(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("vqvae")
    # so slow that the codes stay where k-means put them: in so few steps they would not settle
    flags = ("--lr=0.0001", "--limit=500", "--epochs=1", "--batch-size=64", "--channels=8")
    small = ("--dim=8", f"--codebook-size={K}")
    done = run("train_mnist.py", *small, *flags, f"--out={out}")
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def first(vqvae_run) -> dict:
    done = run("train_prior.py", f"--vqvae={vqvae_run}", *SMALL, "--seed=3")
    assert done.returncode == 0, done.stderr
    out = vqvae_run / "prior"
    files = ["checkpoint.safetensors", "log.jsonl", "metrics.json", "samples.png"]
    assert sorted(path.name for path in out.iterdir()) == files
    return json.loads((out / "metrics.json").read_text()) | {"stdout": done.stdout}


@pytest.fixture(scope="module")
def vqvae(vqvae_run) -> torch.nn.Module:
    return train_prior.VQVAE.from_checkpoint(vqvae_run / "checkpoint.safetensors")


def restored(vqvae: torch.nn.Module, out: Path) -> torch.nn.Module:
    tensors, _ = run_files.load_checkpoint(out / "checkpoint.safetensors")
    prior = train_prior.Prior(vqvae.vq.codebook, 10, width=16, depth=1, heads=2, dropout=0.0)
    prior.load_state_dict(run_files.with_prefix(tensors, "model."))
    return prior.eval()


@pytest.fixture(scope="module")
def prior(vqvae_run, vqvae, first) -> torch.nn.Module:
    return restored(vqvae, vqvae_run / "prior")


@pytest.fixture(scope="module")
def data() -> mnist_data.Data:
    return mnist_data.load("mnist")


@pytest.fixture
def main(monkeypatch, data, vqvae_run):
    """The script in this process, with the first 100 images of the test set as the test set."""
    small = data._replace(test_images=data.test_images[:100], test_labels=data.test_labels[:100])
    monkeypatch.setattr(train_prior, "load", lambda name, data_dir: small)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # the script turns it off; other tests count on it
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)

    def main(*flags: str) -> None:
        train_prior.main([f"--vqvae={vqvae_run}", *flags])

    return main


def random_prior(**options: float) -> torch.nn.Module:
    """Untrained, and with an output far from uniform."""
    options = {"width": 16, "depth": 2, "heads": 4, "dropout": 0.0} | options
    prior = train_prior.Prior(torch.randn(K, 8), 10, **options).eval()
    with torch.no_grad():
        prior.head.weight *= 3
    return prior


def error_of(capsys, *flags: str) -> str:
    """The line after the usage that the flags get."""
    with pytest.raises(SystemExit) as caught:
        train_prior.parse_args([*flags])
    assert caught.value.code == 2
    usage, error = capsys.readouterr().err.splitlines()
    assert usage.startswith("usage: ")
    return error


def test_the_results_of_the_vqvae_are_left_alone(vqvae_run, capsys):
    same = vqvae_run / ".." / vqvae_run.name
    message = "argument --out: the folder of --vqvae has results of its own"
    assert message in error_of(capsys, f"--vqvae={vqvae_run}", f"--out={same}")


def test_no_logit_knows_its_own_index_or_a_later_one():
    prior = random_prior()
    indices, labels = torch.randint(K, (5, 49)), torch.arange(5)
    with torch.no_grad():
        logits = prior(indices[:, :-1], labels)
        assert logits.shape == (5, 49, K)
        for t in range(48):
            changed = indices.clone()
            changed[:, t] = (changed[:, t] + 1 + torch.randint(K - 1, (5,))) % K
            difference = (prior(changed[:, :-1], labels) - logits).abs().amax((0, 2))
            assert difference[: t + 1].max() == 0
            # of the next on it is told
            assert difference[t + 1 :].min() > 1e-4
        other = prior(indices[:, :-1], labels + 1)
    assert (other - logits).abs().amax((0, 2)).min() > 1e-4


def test_a_prefix_has_the_logits_that_it_has_in_the_whole():
    """So what is drawn is drawn from the p that was measured."""
    prior = random_prior()
    indices, labels = torch.randint(K, (5, 49)), torch.arange(5)
    whole = prior(indices[:, :-1], labels)
    for length in (0, 1, 6, 7, 8, 30, 48):
        logits = prior(indices[:, :length], labels)
        torch.testing.assert_close(logits, whole[:, : length + 1], rtol=1e-4, atol=1e-4)


def test_metrics_once_more_by_other_means(first, vqvae, prior, data):
    def encode(images):
        return np.concatenate(
            [vqvae.encode(b).reshape(-1, 49) for b in images[:, None].split(1000)]
        )

    train, test = encode(data.train_images[:1000]), encode(data.test_images)
    bits = 0.0
    for label in range(10):
        z = test[data.test_labels == label]
        before = torch.from_numpy(z[:, :-1])
        # with gradients torch takes another path through the layers
        logits = prior(before, torch.full((len(z),), label)).detach().double().numpy()
        log2_sums = np.log2(np.exp(logits).sum(-1))
        bits += (log2_sums - np.take_along_axis(logits, z[..., None], -1)[..., 0] / np.log(2)).sum()
    assert first["test_bits_per_code"] == pytest.approx(bits / test.size, rel=1e-5)
    assert first["test_bits_per_dim"] == pytest.approx(bits / 10_000 / 784, rel=1e-5)

    assert first["uniform_bits_per_code"] == 4
    share = np.array([(test == code).mean() for code in range(K)])
    guess = np.array([((train == code).sum() + 1) / (train.size + K) for code in range(K)])
    used = share > 0
    entropy = -(share[used] * np.log2(share[used])).sum()
    assert first["entropy_bits_per_code"] == pytest.approx(entropy, rel=1e-9)
    assert first["marginal_bits_per_code"] == pytest.approx(-share @ np.log2(guess), rel=1e-9)
    # Gibbs
    assert first["entropy_bits_per_code"] <= first["marginal_bits_per_code"]
    # it has learned more than frequencies
    assert first["test_bits_per_code"] < 0.9 * first["entropy_bits_per_code"]


def test_baselines_where_a_code_is_missing():
    train, test = torch.tensor([[0, 0], [0, 1]]), torch.tensor([[0, 2], [2, 2]])
    baselines = train_prior.baselines(train, test, 4)
    assert baselines["uniform_bits_per_code"] == 2
    # frequencies 4/8, 2/8, 1/8, 1/8
    assert baselines["marginal_bits_per_code"] == pytest.approx(0.25 * 1 + 0.75 * 3)
    entropy = 0.25 * 2 + 0.75 * math.log2(4 / 3)
    assert baselines["entropy_bits_per_code"] == pytest.approx(entropy)


def test_the_log_has_a_line_an_epoch(first, vqvae_run):
    lines = (vqvae_run / "prior" / "log.jsonl").read_text().splitlines()
    one, two = map(json.loads, lines)
    assert (one["epoch"], two["epoch"]) == (1, 2)
    assert two["test_bits_per_code"] < one["test_bits_per_code"] < one["train_bits_per_code"]
    assert 0 < one["seconds"] < two["seconds"]
    assert {name: first[name] for name in two} == two
    assert f"Result: {two['test_bits_per_code']:.4g} bits a code on the test" in first["stdout"]
    arguments = {"limit": 1000, "width": 16, "depth": 1, "heads": 2, "dropout": 0.0, "epochs": 2}
    assert first["arguments"] == arguments | {"batch_size": 16, "lr": 0.003, "seed": 3}


def test_the_class_tells_something(main, monkeypatch, data, vqvae, tmp_path):
    # an image a class, again and again: the class tells all 49 indices
    chosen = [(data.train_labels == label).nonzero()[0, 0] for label in range(10)]
    images = data.train_images[torch.stack(chosen)].repeat(100, 1, 1)
    labels = torch.arange(10, dtype=torch.uint8).repeat(100)
    ten = mnist_data.Data(images, labels, images[:10], labels[:10])
    monkeypatch.setattr(train_prior, "load", lambda name, data_dir: ten)
    main(*SMALL, "--lr=0.02", f"--out={tmp_path}")
    prior = restored(vqvae, tmp_path)
    indices, labels = train_prior.encode(vqvae, images[:10], labels[:10])
    right = train_prior.bits_per_code(prior, indices, labels)
    wrong = train_prior.bits_per_code(prior, indices, labels.roll(1))
    assert right < 0.7 * wrong


def test_the_picture_is_samples_by_class(first, vqvae_run, vqvae, prior):
    with Image.open(vqvae_run / "prior" / "samples.png") as image:
        assert image.format == "PNG"
        # 10 columns and 8 rows of 28 + 2 pixels less the last gap, three times
        # below the names of the classes
        assert image.size == (3 * (10 * 30 - 2), 28 + 3 * (8 * 30 - 2))
        page = np.asarray(image)
        assert (page[:28] < 128).any()
        pixels = page[28::3, ::3]
    labels = torch.arange(80) % 10
    indices = prior.sample(labels, temperature=1.0, top_k=K, seed=3)
    expected = vqvae.decode(indices)[:, 0].numpy()
    for i, image in enumerate(expected):
        top, left = 30 * (i // 10), 30 * (i % 10)
        assert np.array_equal(pixels[top : top + 28, left : left + 28], image)
    # not one image eighty times
    assert len(np.unique(expected.reshape(80, -1), axis=0)) > 40


def test_a_seed_repeats_bit_for_bit_and_another_does_not(main, tmp_path):
    flags = (*SMALL, "--limit=100", "--dropout=0.1")
    for name, seed in {"one": 5, "again": 5, "other": 6}.items():
        main(*flags, f"--seed={seed}", f"--out={tmp_path / name}")
    one, again, other = (
        (tmp_path / run / "samples.png").read_bytes() for run in ("one", "again", "other")
    )
    assert one == again != other
    one, again, other = (
        json.loads((tmp_path / run / "metrics.json").read_text()) | {"seconds": None}
        for run in ("one", "again", "other")
    )
    assert one == again
    assert one["test_bits_per_code"] != other["test_bits_per_code"]
    main(*flags, "--seed=5", "--dropout=0", f"--out={tmp_path / 'plain'}")
    plain = json.loads((tmp_path / "plain" / "metrics.json").read_text())
    assert one["test_bits_per_code"] != plain["test_bits_per_code"]


def test_sample_only_draws_what_the_training_drew(first, main, vqvae_run, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(vqvae_run / "prior", out)
    drawn = (out / "samples.png").read_bytes()
    others = {path: path.read_bytes() for path in out.iterdir() if path.name != "samples.png"}

    def sample(*flags: str) -> bytes:
        (out / "samples.png").unlink()
        main("--sample-only", f"--out={out}", *flags)
        return (out / "samples.png").read_bytes()

    assert sample("--seed=3") == drawn
    # what is said again is no contradiction
    assert sample("--seed=3", *SMALL) == drawn
    assert sample("--seed=4") != drawn
    assert sample("--seed=3", "--temperature=0.5") != drawn
    assert sample("--seed=3", "--top-k=2") != drawn
    sample("--samples-per-class=2")
    with Image.open(out / "samples.png") as image:
        assert image.size == (3 * (10 * 30 - 2), 28 + 3 * (2 * 30 - 2))
    assert {path: path.read_bytes() for path in others} == others


def test_dropout_is_for_training_only():
    prior, labels = random_prior(dropout=0.5), torch.arange(10)
    indices = prior.sample(labels, temperature=1.0, top_k=K, seed=0)
    bits = train_prior.bits_per_code(prior, indices.flatten(1), labels)
    prior.train()
    assert torch.equal(prior.sample(labels, temperature=1.0, top_k=K, seed=0), indices)
    prior.train()
    assert train_prior.bits_per_code(prior, indices.flatten(1), labels) == bits


@torch.no_grad()
def test_the_likeliest_code_only():
    prior, labels = random_prior(), torch.arange(10)
    greedy = torch.empty(10, 0, dtype=torch.int64)
    for t in range(49):
        padded = torch.cat([greedy, torch.zeros(10, 48 - t, dtype=torch.int64)], 1)
        greedy = torch.cat([greedy, prior(padded, labels)[:, t].argmax(-1, keepdim=True)], 1)
    greedy = greedy.view(10, 7, 7)
    assert torch.equal(prior.sample(labels, temperature=5.0, top_k=1, seed=0), greedy)
    assert torch.equal(prior.sample(labels, temperature=1e-9, top_k=K, seed=1), greedy)
    assert not torch.equal(prior.sample(labels, temperature=1.0, top_k=K, seed=0), greedy)


@torch.no_grad()
@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, K), (0.5, K), (1e9, K), (1.0, 4)])
def test_codes_are_drawn_as_often_as_they_should(temperature, top_k):
    prior = random_prior(depth=1)
    labels = torch.full((600,), 7)
    indices = prior.sample(labels, temperature, top_k, seed=0)
    assert indices.shape == (600, 7, 7)
    assert 0 <= indices.min() <= indices.max() < K
    logits = prior(labels[:1, None][:, :0], labels[:1])[0, 0].double().numpy()
    weights = np.exp((logits - logits.max()) / temperature)
    weights[np.argsort(logits)[: K - top_k]] = 0
    expected = weights / weights.sum()
    share = indices[:, 0, 0].bincount(minlength=K).numpy() / 600
    assert np.all(share[weights == 0] == 0)
    # five standard deviations
    assert np.all(np.abs(share - expected) <= 5 * np.sqrt(expected / 600))
    # or the cases would not differ
    uneven = expected.max() / expected[expected > 0].min()
    assert (uneven > 1.5) == (temperature < 1e9)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--epochs=0", "argument --epochs: 0; it must be in [1, "),
        ("--batch-size=-1", "argument --batch-size: -1; it must be in [1, "),
        ("--batch-size=1.5", "argument --batch-size: invalid int value: '1.5'"),
        ("--width=0", "argument --width: 0; it must be in [1, "),
        ("--width=18", "argument --width: 18; not a multiple of 4 heads"),
        ("--heads=5", "argument --width: 96; not a multiple of 5 heads"),
        ("--heads=0", "argument --heads: 0; it must be in [1, "),
        ("--depth=0", "argument --depth: 0; it must be in [1, "),
        ("--dropout=1", "argument --dropout: 1.0; it must be in [0, 1)"),
        ("--dropout=-0.1", "argument --dropout: -0.1; it must be in [0, 1)"),
        ("--dropout=nan", "argument --dropout: nan; it must be in [0, 1)"),
        ("--lr=0", "argument --lr: 0.0; it must be in [1e-09, inf)"),
        ("--lr=nan", "argument --lr: nan; "),
        ("--lr=inf", "argument --lr: inf; "),
        ("--seed=-1", "argument --seed: -1; it must be in [0, "),
        ("--limit=0", "argument --limit: 0; it must be in [1, "),
        ("--temperature=0", "argument --temperature: 0.0; it must be in [1e-09, inf)"),
        ("--temperature=-1", "argument --temperature: -1.0; "),
        ("--temperature=nan", "argument --temperature: nan; "),
        ("--temperature=inf", "argument --temperature: inf; "),
        ("--top-k=0", f"argument --top-k: 0; it must be in [1, {K + 1})"),
        (f"--top-k={K + 1}", f"argument --top-k: {K + 1}; it must be in [1, {K + 1})"),
        ("--samples-per-class=0", "argument --samples-per-class: 0; "),
        ("--device=nonsense", "argument --device: "),
        ("--device=meta", "argument --device: "),
        ("--data-dir=/no/such/folder", "argument --data-dir: /no/such/folder is not a folder"),
        ("--out=/dev/null/folder", "argument --out: "),
        (
            "--vqvae=/no/such/folder",
            "argument --vqvae: /no/such/folder/checkpoint.safetensors does",
        ),
        ("--epoch=1", "unrecognized arguments: --epoch=1"),
    ],
)
def test_a_bad_flag_is_a_line_and_exit_status_2(capsys, vqvae_run, tmp_path, flag, message):
    assert message in error_of(capsys, f"--vqvae={vqvae_run}", f"--out={tmp_path}", flag)


def test_flags_at_the_ends_of_their_ranges(vqvae_run, tmp_path):
    flags = ("--temperature=1e-9", f"--top-k={K}", "--dropout=0", "--width=4", "--limit=1")
    args = train_prior.parse_args([f"--vqvae={vqvae_run}", f"--out={tmp_path / 'a' / 'b'}", *flags])
    assert (args.temperature, args.top_k, args.limit) == (1e-9, K, 1)
    # it is made when the training begins
    assert not (tmp_path / "a").exists()


def test_no_flag_that_names_the_vqvae(capsys):
    assert "the following arguments are required: --vqvae" in error_of(capsys)


@pytest.mark.parametrize("mode", ["--sample-only", "--resume"])
def test_the_prior_cannot_be_made_another(first, capsys, vqvae_run, mode):
    for flag, message in {
        # the default, and not what it was
        "--width=96": "argument --width: 96; it was 16 in ",
        "--lr=0.1": "argument --lr: 0.1; it was 0.003 in ",
        "--limit=7": "argument --limit: 7; it was 1000 in ",
    }.items():
        error = error_of(capsys, f"--vqvae={vqvae_run}", mode, flag)
        assert message in error
        assert error.endswith("and can be no other")


def contents(out: Path) -> dict[str, object]:
    """What must repeat: all but the times."""
    metrics = json.loads((out / "metrics.json").read_text())
    del metrics["seconds"]
    return metrics | {"picture": (out / "samples.png").read_bytes()}


@pytest.mark.parametrize("after", [1, 7, 10])
def test_stopped_and_resumed_it_is_the_same_prior(main, tmp_path, monkeypatch, capsys, after):
    flags = (*SMALL, "--limit=100", "--dropout=0.1")
    main(*flags, f"--out={tmp_path / 'whole'}")
    step = train_prior.PriorTrainer.train_on

    def interrupted(self, *args):
        if self.step + 1 == after:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, *args)

    out = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        patch.setattr(train_prior.PriorTrainer, "train_on", interrupted)
        with pytest.raises(SystemExit) as caught:
            main(*flags, f"--out={out}")
    assert caught.value.code == 128 + signal.SIGINT
    assert f"stopped at step {after}; --resume goes on" in capsys.readouterr().err
    main("--resume", f"--out={out}")
    assert contents(out) == contents(tmp_path / "whole")
    # complete: it is left as it is, and another one does not replace it
    with pytest.raises(SystemExit) as caught:
        main("--resume", f"--out={out}")
    assert caught.value.code == 0
    assert "already complete (2 of 2 epochs)" in capsys.readouterr().out
    kept = contents(out)
    main(*flags, "--epochs=1", f"--out={out}")
    assert contents(tmp_path / "stopped-1") == kept


def test_a_prior_of_another_vqvae(first, capsys, vqvae_run, tmp_path):
    tensors, info = run_files.load_checkpoint(vqvae_run / "checkpoint.safetensors")
    for name in ("model.vq.codebook", "model.decoder.0.bias"):
        changed = tensors | {name: tensors[name].clone()}
        changed[name].view(-1)[0] += 1e-3
        run_files.save_checkpoint(tmp_path / "checkpoint.safetensors", changed, info)
        out = vqvae_run / "prior"
        for mode in ("--resume", "--sample-only"):
            error = error_of(capsys, f"--vqvae={tmp_path}", f"--out={out}", mode)
            assert error.endswith(f"{out} is not a prior of the VQ-VAE in {tmp_path}")
    # unchanged it is the same wherever it lies
    run_files.save_checkpoint(tmp_path / "checkpoint.safetensors", tensors, info)
    args = train_prior.parse_args([f"--vqvae={tmp_path}", f"--out={out}", "--sample-only"])
    assert args.width == 16


def test_files_that_are_no_checkpoints(first, capsys, vqvae_run, tmp_path):
    whole = (vqvae_run / "checkpoint.safetensors").read_bytes()
    prior = (vqvae_run / "prior" / "checkpoint.safetensors").read_bytes()
    foreign = safetensors.torch.save({"x": torch.zeros(3)})
    for flags, name, contents in (
        (("--out=" + str(tmp_path / "out"),), "checkpoint", (whole[:-1], b"", foreign, prior)),
        (("--sample-only",), "prior/checkpoint", (prior[:-1], b"", foreign)),
    ):
        folder = tmp_path / name.replace("/", "-")
        path = folder / f"{name}.safetensors"
        path.parent.mkdir(parents=True)
        (folder / "checkpoint.safetensors").write_bytes(whole)
        for content in contents:
            path.write_bytes(content)
            assert str(path) in error_of(capsys, f"--vqvae={folder}", *flags)
        path.unlink()
        assert f"{path} does not exist" in error_of(capsys, f"--vqvae={folder}", *flags)


def test_errors_as_users_see_them(vqvae_run, tmp_path):
    done = run("train_prior.py", f"--vqvae={tmp_path}")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 2
    assert (
        f"error: argument --vqvae: {tmp_path / 'checkpoint.safetensors'} does not exist"
        in done.stderr
    )


def test_data_that_cannot_be_had(main, monkeypatch, tmp_path):
    monkeypatch.setattr(train_prior, "load", mnist_data.load)
    with pytest.raises(FileNotFoundError, match="train-images-idx3-ubyte"):
        main(f"--out={tmp_path}", f"--data-dir={tmp_path}")


def test_a_loss_that_is_not_finite_ends_the_run(main, tmp_path):
    with pytest.raises(SystemExit, match=r"step \d: the loss is (nan|inf); try a lower --lr"):
        main(*SMALL, f"--out={tmp_path}", "--lr=1e30")
    # nothing that could be taken for a result
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.safetensors"]


def test_a_training_of_ten_steps(main, tmp_path):
    """The rate would rise in a tenth of them: in one step."""
    main(*SMALL, "--limit=160", "--epochs=1", f"--out={tmp_path}")
    assert json.loads((tmp_path / "metrics.json").read_text())["epoch"] == 1


def test_a_training_set_of_one_image(main, tmp_path):
    main(*SMALL, "--limit=1", "--epochs=1", f"--out={tmp_path}")
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    # a single step, from near the uniform distribution
    assert 0.5 * 4 < metrics["test_bits_per_code"] < 2 * 4


def test_help_names_the_defaults(capsys):
    with pytest.raises(SystemExit) as caught:
        train_prior.parse_args(["--help"])
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "with --resume, more than before (default: 3)" in text
    assert "(default: prior in that of --vqvae)" in text
