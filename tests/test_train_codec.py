"""examples/train_codec.py: short runs on WAV files and on sounds that it makes."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import signal
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_readme import ROOT, blocks

import vqtriton

EXAMPLES = ROOT / "examples"
# examples are scripts, not a package; there they import one another by their bare names
sys.path.insert(0, str(EXAMPLES))
codec = importlib.import_module("codec")
sounds = importlib.import_module("sounds")
train_codec = importlib.import_module("train_codec")
trainer = importlib.import_module("trainer")
wav_file = importlib.import_module("wav_file")

RATE, LEVELS = 8000, 3
TINY = (
    *("--channels=8", "--dim=8", "--codebook-size=16", f"--levels={LEVELS}", "--epochs=2"),
    *("--batch-size=4", "--decay=0.9", "--lr=0.005", f"--rate={RATE}"),
)
SHORT = (*TINY, "--sounds=20", "--steps=6", "--channels=4")
PIECE = train_codec.PIECE * codec.FRAME


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    monkeypatch.setattr(trainer, "LOOK_EVERY", 3)
    monkeypatch.setattr(train_codec, "START_CLIPS", 16)
    # the trainer turns it off; other tests count on it
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)


def metrics_of(out: Path) -> dict:
    """All that must repeat: all but the times."""
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics.pop("seconds") > 0
    return metrics


def write_wav(path: Path, samples: np.ndarray, rate: int = RATE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(wav_file.to_wav(samples, rate))


@pytest.fixture(scope="module")
def tones() -> np.ndarray:
    """Four tones, each as loud as chance has it: easy to learn, and one code is not enough."""
    time = np.arange(20 * PIECE)[:, None] / RATE
    loudness = np.random.default_rng(0).uniform(0, 0.2, (20 * PIECE // 2048, 4)).repeat(2048, 0)
    waves = np.sin(2 * np.pi * time * [125, 250, 375, 625])
    return (loudness * waves).sum(1).astype(np.float32)


@pytest.fixture(scope="module")
def trained(tones, tmp_path_factory) -> tuple[Path, str]:
    """The folder of a run that has learned something, and what it printed."""
    folder, printed = tmp_path_factory.mktemp("codec"), io.StringIO()
    write_wav(folder / "wavs" / "tones.wav", tones)
    flags = ["--steps=30", f"--wavs={folder / 'wavs'}", f"--out={folder / 'run'}"]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(train_codec, "START_CLIPS", 16)
        patch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
        train_codec.main([*TINY, *flags])
    return folder / "run", printed.getvalue()


@pytest.fixture(scope="module")
def model(trained) -> codec.Codec:
    return codec.Codec.from_checkpoint(trained[0] / "checkpoint.safetensors")


def test_more_levels_are_less_noise(trained):
    out, printed = trained
    rows = metrics_of(out)["levels"]
    snrs = [row["snr_db"] for row in rows]
    # silence would have 0 dB
    assert 0.5 < snrs[0] < snrs[1] < snrs[2]
    bits = 4 * RATE / codec.FRAME / 1000
    assert [row["kbps"] for row in rows] == pytest.approx([bits, 2 * bits, 3 * bits])
    table = printed[printed.index("\nlevels ") :].splitlines()[2:]
    for line, row in zip(table, rows, strict=False):
        shown = [row["levels"], row["kbps"], row["snr_db"], row["perplexity"], 100 * row["usage"]]
        values = [float(value.rstrip("%")) for value in line.split()]
        assert values == pytest.approx(shown, abs=0.51)
    count = 2 * train_codec.PIECE * LEVELS
    assert table[3].startswith(f"Of {count} tokens, 0 differ")
    assert table[4].startswith("and 0 where")


def test_the_files_hold_what_was_measured(trained, tones, model):
    """The figures once more, from the checkpoint and the WAV files alone."""
    out, _ = trained
    names = {"checkpoint.safetensors", "log.jsonl", "metrics.json", "snr.png", "original.wav"}
    names |= {f"levels_{count}.wav" for count in (1, 2, LEVELS)}
    assert {path.name for path in out.iterdir()} == names
    # the test is the last tenth
    test = torch.from_numpy(tones[-2 * PIECE :]).view(2, PIECE)
    indices = model.encode(test)
    assert indices.shape == (2, train_codec.PIECE, LEVELS)
    heard = {path.stem: wav_file.read_wav(path, 99) for path in out.glob("*.wav")}
    assert {rate for _, rate in heard.values()} == {RATE}
    original = torch.from_numpy(heard["original"][0])
    assert torch.allclose(original, test.flatten()[None], atol=1e-4)
    for row in metrics_of(out)["levels"]:
        found = indices[..., row["levels"] - 1]
        share = found.flatten().bincount(minlength=16) / found.numel()
        assert row["usage"] == pytest.approx((share > 0).double().mean().item())
        assert row["perplexity"] == pytest.approx(torch.special.entr(share).sum().exp().item())
        samples = torch.from_numpy(heard[f"levels_{row['levels']}"][0])
        error = (original - samples).square().sum()
        ratio = 10 * (original.square().sum() / error).log10().item()
        assert row["snr_db"] == pytest.approx(ratio, abs=0.01)
    assert (out / "snr.png").read_bytes().startswith(b"\x89PNG")


def test_tokens_do_not_depend_on_how_they_are_computed(model):
    x = model.latents(torch.from_numpy(sounds.make_sounds(4, PIECE, RATE, seed=7)))
    whole = model.vq(x).indices
    for count in range(1, LEVELS + 1):
        assert torch.equal(model.vq(x, num_quantizers=count).indices, whole[..., :count])
    frames = [model.vq(x[:1, :, t : t + 1]).indices for t in range(x.shape[2])]
    assert torch.equal(torch.cat(frames, 1), whole[:1])


def test_tokens_that_do_depend_on_it_are_counted(model, monkeypatch):
    quantize = type(model.vq).forward

    def forward(self, x, **options):
        found = quantize(self, x, **options)
        is_part = x.shape[2] == 1 or options.get("num_quantizers") == 1
        return found._replace(indices=found.indices + is_part)

    monkeypatch.setattr(type(model.vq), "forward", forward)
    found = train_codec.check_tokens(model, torch.randn(2, 5 * codec.FRAME))
    tokens = 2 * 5 * LEVELS
    assert found == {
        "count": tokens,
        "differ_in_shorter_chains": tokens // LEVELS,
        "differ_frame_by_frame": tokens,
    }


def test_stopped_and_resumed_it_is_the_same_codec(tmp_path, monkeypatch, capsys):
    train_codec.main([*SHORT, f"--out={tmp_path / 'whole'}"])
    step = train_codec.CodecTrainer.train_on

    def interrupted(self, *args):
        if self.step == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *args)

    out = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        patch.setattr(train_codec.CodecTrainer, "train_on", interrupted)
        with pytest.raises(SystemExit):
            train_codec.main([*SHORT, f"--out={out}"])
    assert not (out / "levels_3.wav").exists() or metrics_of(out)["epoch"] == 1
    train_codec.main(["--resume", f"--out={out}"])
    assert metrics_of(out) == metrics_of(tmp_path / "whole")
    for name in ("levels_3.wav", "snr.png"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    # it is complete; other sounds would make it another run
    with pytest.raises(SystemExit) as caught:
        train_codec.main(["--resume", f"--out={out}"])
    assert caught.value.code == 0
    assert "already complete (2 of 2 epochs)" in capsys.readouterr().out
    write_wav(tmp_path / "wavs" / "a.wav", sounds.make_sounds(1, 3 * PIECE, RATE, 1)[0])
    with pytest.raises(SystemExit, match="it was trained on other sounds; say the same --wavs"):
        train_codec.main(["--resume", "--epochs=3", f"--out={out}", f"--wavs={tmp_path / 'wavs'}"])


def test_codes_of_all_levels_are_revived_until_80_percent(tmp_path, monkeypatch):
    thresholds = []
    step = train_codec.CodecTrainer.train_on

    def spy(self, *args):
        values = step(self, *args)
        thresholds.append([layer.threshold_ema_dead_code for layer in self.vq.layers])
        return values

    monkeypatch.setattr(train_codec.CodecTrainer, "train_on", spy)
    train_codec.main([*SHORT, "--epochs=1", "--steps=5", f"--out={tmp_path}"])
    rows = 4 * train_codec.CLIP
    assert thresholds == [[pytest.approx(0.4 * rows / 16)] * LEVELS] * 4 + [[0] * LEVELS]


def read(folder: Path) -> train_codec.Sounds:
    args = Namespace(wavs=folder, rate=RATE, seconds=60.0, device=torch.device("cpu"))
    return train_codec.Sounds(args)


def test_wav_files_of_any_kind_become_pieces(tmp_path):
    tone = np.sin(np.arange(2 * PIECE) * 0.05).astype(np.float32) / 2
    write_wav(tmp_path / "b" / "a.WAV", tone)
    # half the rate: twice the samples, resampled
    write_wav(tmp_path / "a.wav", tone[: PIECE // 4], RATE // 2)
    (tmp_path / "notes.txt").write_text("not a sound")
    found = read(tmp_path)
    # in the order of the names, the last piece is the test
    assert found.train.shape == (2 * PIECE,)
    assert (found.train[PIECE // 2 : PIECE] == 0).all()
    assert found.train[: PIECE // 2].std() == pytest.approx(tone.std(), rel=0.05)
    assert np.allclose(found.train[PIECE:], tone[:PIECE], atol=1e-4)
    assert np.allclose(found.test, tone[None, PIECE:], atol=1e-4)
    clips = found.clips(np.array([3, PIECE]))
    assert torch.equal(clips[1], found.train[PIECE : PIECE + train_codec.CLIP * codec.FRAME])


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (None, "has no WAV files"),
        (np.ones(PIECE // 2) / 2, "has less than two seconds of sound, or it is silent"),
        (np.zeros(3 * PIECE), "has less than two seconds of sound, or it is silent"),
        (np.zeros(0), r"a\.wav has no samples"),
    ],
)
def test_a_folder_without_sounds_is_an_error(tmp_path, samples, message):
    folder = tmp_path / "wavs"
    folder.mkdir()
    if samples is not None:
        write_wav(folder / "a.wav", samples)
    with pytest.raises(SystemExit, match=message):
        train_codec.main([*SHORT, f"--wavs={folder}", f"--out={tmp_path / 'run'}"])
    # nothing is left of it
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--wavs=none", "argument --wavs: none is not a folder"),
        ("--levels=0", "argument --levels: 0; it must be in [1, 1024)"),
        ("--steps=0", "argument --steps: 0; it must be in [1, "),
        ("--lr=nan", "argument --lr: nan; it must be in "),
    ],
)
def test_a_bad_flag_is_an_error(flag, message, capsys):
    with pytest.raises(SystemExit) as caught:
        train_codec.parse_args([flag])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_another_checkpoint_is_no_codec(trained, tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    run_files = importlib.import_module("run_files")
    run_files.save_checkpoint(path, {}, {"arguments": {}})
    with pytest.raises(ValueError, match="is not a checkpoint of a codec: 'quantizer'"):
        codec.Codec.from_checkpoint(path)


def test_sounds_follow_from_the_seed():
    made = sounds.make_sounds(8, 4000, RATE, seed=1)
    assert made.dtype == np.float32
    assert np.abs(made).max(1) == pytest.approx(0.5)
    assert np.array_equal(sounds.make_sounds(5, 4000, RATE, seed=1), made[:5])
    others = [*sounds.make_sounds(4, 4000, RATE, seed=2), *made[:4]]
    assert all(not np.allclose(made[i], other) for i in range(4, 8) for other in others)


def test_distances_are_those_of_sounds():
    clean = torch.from_numpy(sounds.make_sounds(2, 4096, RATE, seed=0))
    noise = torch.randn(clean.shape)
    assert codec.spectral_distance(clean, clean) == 0
    near, far = (codec.spectral_distance(clean + s * noise, clean) for s in (0.05, 0.5))
    assert 0 < near < far
    # an error of a tenth of the amplitude is 20 dB below
    assert codec.snr(clean, 0.9 * clean) == pytest.approx(20, abs=1e-4)


def test_the_page_about_it_runs(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(EXAMPLES)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "codec").symlink_to(trained[0])
    write_wav(tmp_path / "speech.wav", sounds.make_sounds(1, 3 * PIECE, 16000, 1)[0], 16000)
    code = blocks((ROOT / "docs" / "audio.md").read_text(encoding="utf-8"))
    assert code
    names = {"__name__": "__main__"}
    for line, block in code:
        exec(compile("\n" * (line - 1) + block, "docs/audio.md", "exec"), names)
    assert isinstance(names["model"].vq, vqtriton.ResidualVectorQuantize)
