"""examples/encode_audio.py and tokenize_images.py, on tiny models of transformers and diffusers."""

from __future__ import annotations

import importlib
import re
import sys
import wave
from pathlib import Path

import numpy as np
import oracle
import pytest
import safetensors.torch
import torch
from PIL import Image
from test_readme import ROOT

EXAMPLES = ROOT / "examples"
# examples are scripts, not a package; there they import one another by their bare names
sys.path.insert(0, str(EXAMPLES))
compare_tokens = importlib.import_module("compare_tokens")
encode_audio = importlib.import_module("encode_audio")
token_args = importlib.import_module("token_args")
token_report = importlib.import_module("token_report")
tokenize_images = importlib.import_module("tokenize_images")
sounds = importlib.import_module("sounds")
wav_file = importlib.import_module("wav_file")

TINY = {
    "encodec": {
        **{"num_filters": 4, "hidden_size": 8, "codebook_size": 32, "num_lstm_layers": 1},
        "target_bandwidths": [0.1, 1.5],
    },
    "mimi": {
        **{"num_filters": 4, "hidden_size": 16, "codebook_size": 32, "codebook_dim": 8},
        **{"vector_quantization_hidden_dimension": 8, "num_quantizers": 4},
        **{"num_hidden_layers": 1, "intermediate_size": 16, "num_attention_heads": 2},
        **{"num_key_value_heads": 2, "head_dim": 8, "upsample_groups": 1},
    },
    "dac": {"encoder_hidden_size": 4, "decoder_hidden_size": 64, "codebook_size": 32},
}
TINY_IMAGES = {
    "block_out_channels": (8, 8),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    **{"norm_num_groups": 4, "latent_channels": 4, "num_vq_embeddings": 64},
}
SUMMARY = re.compile(r"^(.*?)  +(\S+) +(\S+)$", re.MULTILINE)


@pytest.fixture(autouse=True)
def few_turns(monkeypatch):
    monkeypatch.setattr(compare_tokens, "TURNS", 1)
    # whose layers have no deterministic form of some operations
    torch.use_deterministic_algorithms(False)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)


@pytest.fixture
def tiny(monkeypatch):
    """Configurations of transformers with few channels by default."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    for name, values in TINY.items():
        config = getattr(transformers, f"{encode_audio.CODECS[name].name}Config")
        monkeypatch.setattr(
            transformers, config.__name__, lambda config=config, v=values: config(**v)
        )
    return transformers


@pytest.fixture
def tiny_images(monkeypatch):
    monkeypatch.setattr(tokenize_images, "CONFIG", TINY_IMAGES)
    return pytest.importorskip("diffusers", reason="diffusers is not installed")


def write_wav(path: Path, samples: np.ndarray, rate: int = 24000, width: int = 2) -> Path:
    """Samples [channels, T] in [-1, 1)."""
    ints = np.rint(samples.T.astype(np.float64) * 2 ** (8 * width - 1)).astype("<i4")
    content = ints[..., None].view(np.uint8)[..., :width]
    with wave.open(str(path), "wb") as file:
        file.setnchannels(len(samples))
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes((content + np.uint8(128) * (width == 1)).tobytes())
    return path


def table(out: str) -> dict[str, tuple[str, str]]:
    return {text: (own, ours) for text, own, ours in SUMMARY.findall(out)}


def is_right(rows: torch.Tensor, codebook: torch.Tensor, indices: torch.Tensor) -> bool:
    return torch.equal(oracle.nearest_code(rows, codebook), indices)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("codec", sorted(TINY))
def test_tokens_of_a_codec(tiny, codec, dtype, tmp_path, capsys):
    path = tmp_path / "tokens.safetensors"
    flags = [f"--codec={codec}", f"--dtype={dtype}", f"--out={path}", "--levels=3", "--seconds=2"]
    encode_audio.main(flags)
    out = capsys.readouterr().out
    assert f"with random weights, {dtype}, on cpu; 3 levels." in out
    assert "Audio: a generated chord; 2.0 s at " in out
    assert re.search(r"vqtriton.patch changed \d+ modules, quantizer\.\S+ to quantizer\.", out)
    tokens = safetensors.torch.load_file(path)
    assert tokens["tokens"].shape == tokens["own_tokens"].shape
    assert tokens["tokens"].shape[:2] == (8, 3)
    assert tokens["tokens"].max() < 32
    # random codes, and not always the same one
    assert all(len(level.unique()) > 2 for level in tokens["tokens"].transpose(0, 1))
    rows = table(out)
    assert rows["tokens that differ in batches of 1 and 8"][1] == "0"
    assert rows["tokens that are not the nearest code"][1] == "0"
    number = int((tokens["tokens"] != tokens["own_tokens"]).sum())
    total = tokens["tokens"].numel()
    expected = f"{number} of {total} tokens differ" if number else "The two give the same tokens."
    assert expected in out


def test_who_is_right_is_judged_by_what_each_search_was_given(tiny, capsys, monkeypatch):
    """In bfloat16 the own search errs; its later levels are given other residuals."""
    seen = []
    compare = compare_tokens.compare
    monkeypatch.setattr(
        token_report, "compare", lambda *args: seen.append(compare(*args)) or seen[-1]
    )
    encode_audio.main(["--dtype=bfloat16", "--levels=3", "--seconds=4"])
    [comparison] = seen
    for side in (comparison.own, comparison.ours):
        assert len(side.searches) == 3
        residual = side.searches[0].rows
        for level, search in enumerate(side.searches):
            assert torch.equal(search.rows, residual)
            places = oracle.distances(search.rows, search.codebook)
            chosen = places[np.arange(len(places)), search.indices]
            assert np.array_equal(chosen > places.min(1), side.wrong[level].numpy())
            residual = residual - search.codebook[search.indices]
    assert not comparison.ours.wrong.any()
    assert comparison.own.wrong.any()
    lines = capsys.readouterr().out.splitlines()
    start = lines.index("level   differ   same input   own search wrong   vqtriton wrong") + 1
    numbers = [list(map(int, line.split())) for line in lines[start : start + 3]]
    assert [row[3] for row in numbers] == comparison.own.wrong.sum(1).tolist()
    # all get the same vectors at first
    assert numbers[0][1] == numbers[0][2] <= numbers[0][3]


def test_audio_of_a_checkpoint_and_a_file(tiny, tmp_path, capsys):
    model = tiny.EncodecModel(tiny.EncodecConfig())
    for layer in model.quantizer.layers:
        layer.codebook.embed.normal_()
    model.save_pretrained(tmp_path / "model")
    # another rate and two channels
    samples = np.repeat(sounds.chord(1.5, 16000), 2, axis=0)
    path = write_wav(tmp_path / "a.wav", samples, 16000)
    flags = [f"--model={tmp_path / 'model'}", f"--wav={path}", f"--out={tmp_path / 'tokens.npz'}"]
    capsys.readouterr()
    encode_audio.main([*flags, "--levels=2"])
    out = capsys.readouterr().out
    assert f"Audio: {path}, resampled from 16000 Hz by a Fourier transform; 1.5 s at 24000" in out
    assert "random" not in out
    with np.load(tmp_path / "tokens.npz") as file:
        tokens = torch.from_numpy(file["tokens"])
    mono = wav_file.resample(wav_file.read_wav(path, 9)[0].mean(0, keepdims=True), 16000, 24000)
    audio = torch.from_numpy(np.stack(np.split(mono, 8, axis=1)))
    with torch.no_grad():
        rows = model.eval().encoder(audio).transpose(1, 2).flatten(0, 1)
    assert is_right(rows, model.quantizer.layers[0].codebook.embed, tokens[:, 0].flatten())
    # a checkpoint of another class, and one that lacks a weight
    with pytest.raises(SystemExit):
        encode_audio.main([*flags, "--codec=mimi"])
    text = f"argument --model: {tmp_path / 'model'}: its config.json is that of EncodecModel, not"
    assert text in capsys.readouterr().err
    weights = tmp_path / "model" / "model.safetensors"
    state = safetensors.torch.load_file(weights)
    del state["quantizer.layers.1.codebook.embed"]
    safetensors.torch.save_file(state, weights, {"format": "pt"})
    with pytest.raises(SystemExit):
        encode_audio.main(flags)
    assert "it has no weights for quantizer.layers.1.codebook.embed" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tokens_of_images(tiny_images, tmp_path, capsys, dtype):
    folder = tmp_path / "images"
    folder.mkdir()
    for i, image in enumerate(tokenize_images.patterns(9, 20)):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{i}.png")
    path = tmp_path / "tokens.npz"
    flags = [f"--images={folder}", f"--out={path}", f"--dtype={dtype}", "--size=16"]
    tokenize_images.main(flags)
    out = capsys.readouterr().out
    assert f"Images: {folder}; 9 of 16×16 pixels." in out
    assert "vqtriton.patch changed quantize: diffusers." in out
    with np.load(path) as file:
        assert file["tokens"].shape == (9, 1, 8, 8)
        assert len(np.unique(file["tokens"])) > 8
        number = int((file["tokens"] != file["own_tokens"]).sum())
    assert table(out)["tokens that are not the nearest code"][1] == "0"
    assert f"{number} of 576 tokens differ" in out or "The two give the same tokens." in out


def test_images_of_a_checkpoint_or_generated(tiny_images, tmp_path, capsys, monkeypatch):
    tiny_images.VQModel(**TINY_IMAGES).save_pretrained(tmp_path / "model")

    def none(*args: object) -> None:
        raise tokenize_images.mnist_data.DataUnavailableError("no source has it")

    monkeypatch.setattr(tokenize_images.mnist_data, "load", none)
    flags = [f"--model={tmp_path / 'model'}", "--count=3", "--size=16"]
    tokenize_images.main(flags)
    out = capsys.readouterr().out
    assert f"VQModel with the weights in {tmp_path / 'model'}, float32, on cpu." in out
    assert "Images: generated patterns, as MNIST cannot be had; 3 of 16×16 pixels." in out
    with pytest.raises(SystemExit):
        tokenize_images.main([*flags, f"--data-dir={tmp_path}"])
    assert "argument --data-dir: no source has it" in capsys.readouterr().err


def test_a_search_that_cannot_run_is_a_line(capsys):
    """Beside that of vqtriton, which can; the module is one that the examples know by its name."""

    class MimiEuclideanCodebook(torch.nn.Module):
        cluster_usage = torch.ones(8)

        def __init__(self) -> None:
            super().__init__()
            self.embed_sum = torch.nn.Buffer(torch.randn(8, 4))

        @property
        def embed(self) -> torch.Tensor:
            return self.embed_sum

        def quantize(self, x: torch.Tensor) -> torch.Tensor:
            if x.dtype == torch.float16:
                raise NotImplementedError("not for Half")
            return torch.cdist(x, self.embed).argmin(1)

    model = torch.nn.Sequential(MimiEuclideanCodebook())

    def quantize(quantizer: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        return quantizer.quantize(x.flatten(0, 1)).view(len(x), 1, -1)

    x = torch.randn(8, 5, 4).half()
    comparison = compare_tokens.compare(model, "0", quantize, x)
    token_report.show(comparison)
    out = capsys.readouterr().out
    assert "The model's own search cannot run here: NotImplementedError: not for Half" in out
    assert table(out)["tokens that are not the nearest code"] == ("-", "0")
    assert is_right(x.flatten(0, 1), model[0].embed, comparison.ours.tokens.flatten())
    # nothing is left behind
    assert "quantize" not in vars(model[0])
    with pytest.raises(ValueError, match="no quantizer of the model is known: nothing was patched"):
        compare_tokens.compare(torch.nn.Sequential(torch.nn.Linear(2, 2)), "0", quantize, x)


@pytest.mark.parametrize("width", [1, 2, 3, 4])
@pytest.mark.parametrize("channels", [1, 2])
def test_wav_files(tmp_path, width, channels):
    samples = np.random.default_rng(0).uniform(-1, 0.99, (channels, 500)).astype(np.float32)
    samples[:, 0] = -1
    found, rate = wav_file.read_wav(write_wav(tmp_path / "a.wav", samples, 8000, width), 1)
    assert rate == 8000
    assert found.dtype == np.float32
    assert found.shape == samples.shape
    assert np.abs(found - samples).max() <= 0.5 / 2 ** (8 * width - 1) + 1e-7
    first, _ = wav_file.read_wav(tmp_path / "a.wav", 0.01)
    assert np.array_equal(first, found[:, :80])


def float_wav() -> bytes:
    header = b"RIFF\x2c\0\0\0WAVEfmt \x10\0\0\0\x03\0\x01\0\x40\x1f\0\0\0\x7d\0\0\x04\0\x20\0"
    return header + b"data\x08\0\0\0" + bytes(8)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read as a WAV file of PCM samples: it ends too early"),
        (b"ID3 and so on", "cannot be read as a WAV file of PCM samples: file does not start with"),
        (float_wav(), "cannot be read as a WAV file of PCM samples: unknown format: 3"),
        (None, "is cut short: 800 bytes of samples are left"),
    ],
)
def test_a_bad_wav_file_is_an_error(tmp_path, content, message):
    path = write_wav(tmp_path / "a.wav", np.zeros((1, 1000)))
    path.write_bytes(path.read_bytes()[:844] if content is None else content)
    with pytest.raises(ValueError, match=f"{path} {message}"):
        wav_file.read_wav(path, 1)


def test_an_empty_wav_file_is_an_error(tmp_path):
    path = write_wav(tmp_path / "a.wav", np.zeros((1, 0)))
    with pytest.raises(ValueError, match="has no samples"):
        wav_file.read_wav(path, 1)


@pytest.mark.parametrize(("rate", "new_rate"), [(8000, 24000), (44100, 16000), (16000, 16000)])
def test_resampling_keeps_a_tone(rate, new_rate):
    """Of a whole number of periods; what the new rate cannot hold is gone."""
    time, new_time = np.arange(rate) / rate, np.arange(new_rate) / new_rate
    tone = np.sin(2 * np.pi * 440 * time)
    too_high = np.sin(2 * np.pi * 15000 * time) if rate > 2 * 15000 else 0
    found = wav_file.resample((tone + too_high)[None], rate, new_rate)
    assert found.shape == (1, new_rate)
    assert np.abs(found[0] - np.sin(2 * np.pi * 440 * new_time)).max() < 1e-6


def test_a_chord_is_audible_and_in_range():
    samples = sounds.chord(2.5, 8000)
    assert samples.shape == (1, 20000)
    assert np.abs(samples).max() < 1
    # no two pieces are alike
    pieces = np.split(samples[0], 8)
    assert all(piece.std() > 0.01 for piece in pieces)
    assert not np.allclose(pieces[0], pieces[4], atol=0.05)


@pytest.mark.parametrize(
    ("script", "flag", "message"),
    [
        (encode_audio, "--wav=none.wav", "argument --wav: none.wav is not a file"),
        (encode_audio, "--seconds=0.5", "argument --seconds: 0.5; it must be in [1, 3600)"),
        (encode_audio, "--seconds=nan", "argument --seconds: nan; it must be in [1, 3600)"),
        (encode_audio, "--levels=0", "argument --levels: 0; it must be in [1, 1024)"),
        (encode_audio, "--codec=mp3", "argument --codec: invalid choice: 'mp3'"),
        (encode_audio, "--dtype=float64", "argument --dtype: invalid choice: 'float64'"),
        (encode_audio, "--model=none", "argument --model: none is not a folder"),
        (encode_audio, "--out=a.txt", "argument --out: a.txt; its name must end in .npz or"),
        (encode_audio, "--out=none/a.npz", "argument --out: none/a.npz is not a file in a folder"),
        (tokenize_images, "--images=none", "argument --images: none is not a folder"),
        (tokenize_images, "--data-dir=none", "argument --data-dir: none is not a folder"),
        (tokenize_images, "--size=4", "argument --size: 4; it must be in [8, 8192)"),
        (tokenize_images, "--count=0", "argument --count: 0; it must be in [1, 1048576)"),
        (tokenize_images, "--model=none", "argument --model: none is not a folder"),
    ],
)
def test_a_bad_flag_is_a_line(capsys, tmp_path, monkeypatch, script, flag, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        script.main([flag])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[1]


def test_bad_input_that_needs_a_model(tiny, tmp_path, capsys):
    short = write_wav(tmp_path / "short.wav", np.zeros((1, 1000)))
    bad = tmp_path / "bad.wav"
    bad.write_bytes(float_wav())
    for flag, message in {
        "--levels=99": "argument --levels: 99; it must be in [1, ",
        f"--wav={short}": f"argument --wav: {short} lasts 0.04 s; it must be 1 s",
        f"--wav={bad}": f"argument --wav: {bad} cannot be read as a WAV file of PCM samples",
        f"--model={tmp_path}": f"argument --model: {tmp_path}: ",
    }.items():
        with pytest.raises(SystemExit) as caught:
            encode_audio.main([flag])
        assert caught.value.code == 2
        assert message in capsys.readouterr().err.splitlines()[1]


def test_a_package_that_is_missing_is_named():
    with pytest.raises(SystemExit, match="no_such_package is not installed"):
        token_args.need("no_such_package")
