"""examples/mnist_codec.py: the round trip is exact, the figures are true, bad input is refused."""

from __future__ import annotations

import collections
import gzip
import importlib
import io
import json
import math
import os
import re
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import vqtriton

EXAMPLES = Path(__file__).parents[1] / "examples"
# examples are scripts, not a package; there they import one another by their bare names
sys.path.insert(0, str(EXAMPLES))
run_files = importlib.import_module("run_files")
codec = importlib.import_module("mnist_codec")
mnist_data = importlib.import_module("mnist_data")

# not a power of two: with 7 bits an index can be too large
K, BITS = 100, 7


def run(script: str, *flags: str | Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-W", "error", str(EXAMPLES / script), *map(str, flags)]
    # threads of a small model wait for one another where other processes want the cores as well
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained")
    small = ("--limit=1000", "--epochs=1", f"--codebook-size={K}", "--dim=4", "--channels=8")
    # few steps, so large ones
    fast = ("--batch-size=8", "--decay=0.9", "--lr=0.005")
    done = run("train_mnist.py", *small, *fast, f"--out={out}")
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def test_images() -> np.ndarray:
    return mnist_data.load("mnist").test_images.numpy()


def main(*flags: str | Path) -> None:
    codec.main([str(flag) for flag in flags])


def write_idx(path: Path, images: np.ndarray) -> Path:
    path.write_bytes(mnist_data.to_idx(images))
    return path


def changed(
    run: Path, out: Path, change: Callable[[dict[str, torch.Tensor], dict[str, Any]], object]
) -> Path:
    """A run whose checkpoint is that of another after a change to its tensors or its info."""
    tensors, info = run_files.load_checkpoint(run / "checkpoint.safetensors")
    change(tensors, info)
    out.mkdir()
    run_files.save_checkpoint(out / "checkpoint.safetensors", tensors, info)
    return out


@given(
    codebook_size=st.sampled_from([1, 2, 3, 100, 512, 65536]),
    count=st.integers(0, 50),
    seed=st.integers(0, 2**32 - 1),
)
def test_pack_and_unpack(codebook_size, count, seed):
    indices = np.random.default_rng(seed).integers(0, codebook_size, count)
    packed = codec.pack(indices, codebook_size)
    # the same in strings of digits
    bits = math.ceil(math.log2(codebook_size))
    digits = "".join(f"{index:0{bits}b}" for index in indices) if bits else ""
    padded = digits + "0" * (-len(digits) % 8)
    expected = bytes(int(padded[i : i + 8], 2) for i in range(0, len(padded), 8))
    assert (packed.dtype, packed.tobytes()) == (np.uint8, expected)

    unpacked = codec.unpack(packed, count, codebook_size)
    assert unpacked.dtype == np.int64
    assert unpacked.tolist() == indices.tolist()
    for wrong in (np.append(packed, np.uint8(0)), packed[:-1]):
        if len(wrong) != len(packed):
            with pytest.raises(ValueError, match=f"{len(wrong)} bytes are not {count} indices"):
                codec.unpack(wrong, count, codebook_size)


def test_pack_keeps_the_order_of_any_shape_and_dtype():
    grid = np.arange(98).reshape(2, 7, 7)
    flat = codec.pack(grid.ravel(), 100)
    assert len(flat) == math.ceil(98 * 7 / 8)
    for same in (grid, grid.astype(np.int32), np.asfortranarray(grid)):
        assert codec.pack(same, 100).tobytes() == flat.tobytes()


@pytest.mark.parametrize("codebook_size", [1, 3, 100, 512])
def test_indices_out_of_range_are_refused(codebook_size):
    for bad in (-1, codebook_size):
        with pytest.raises(ValueError, match=rf"outside \[0, {codebook_size}\)"):
            codec.pack(np.array([0, bad]), codebook_size)
    if codebook_size.bit_count() > 1:
        packed = codec.pack(np.array([0, codebook_size]), codebook_size + 1)
        with pytest.raises(ValueError, match=f"index {codebook_size}; it must be below"):
            codec.unpack(packed, 2, codebook_size)


def test_the_whole_test_set(trained, test_images, tmp_path, capsys):
    """Without --images it is the test set, and what is printed is true."""
    codes = tmp_path / "codes.vq"
    main("encode", trained, "--out", codes)
    printed = capsys.readouterr().out
    main("decode", trained, "--codes", codes, "--out", tmp_path / "decoded.idx")
    images = write_idx(tmp_path / "images.idx", test_images)
    main("reconstruct", trained, "--images", images, "--out", tmp_path / "reconstructed.idx")
    decoded = (tmp_path / "decoded.idx").read_bytes()
    assert decoded == (tmp_path / "reconstructed.idx").read_bytes()
    assert len(list(tmp_path.iterdir())) == 4

    numbers = [float(text) for text in re.findall(r"(?<![\w.])\d+(?:\.\d+)?", printed)]
    count, raw, size, header, ratio, per_dim, alone, entropy, best, mse, *_ = numbers
    assert (count, raw) == (10000, 7840000)
    assert size == codes.stat().st_size
    num_packed = math.ceil(10000 * 49 * BITS / 8)
    assert header == size - num_packed
    # JSON and a sha256, rounded up to a multiple of 8
    assert 200 < header < 400
    assert ratio == pytest.approx(raw / size, abs=0.005)
    assert per_dim == pytest.approx(8 * size / raw, abs=5e-6)
    assert alone == pytest.approx(8 * num_packed / raw, abs=5e-6)

    packed = safetensors.numpy.load_file(codes)["packed"]
    counts = collections.Counter(codec.unpack(packed, 490000, K).tolist()).values()
    expected = -sum(n / 490000 * math.log2(n / 490000) for n in counts)
    assert 0 < expected < BITS
    assert entropy == pytest.approx(expected, abs=5e-5)
    assert best == pytest.approx(expected * 49 / 784, abs=5e-6)
    pixels = np.frombuffer(decoded, np.uint8, offset=16).reshape(-1, 28, 28)
    expected = np.square(pixels / 255 - test_images / 255).mean()
    assert mse == pytest.approx(expected, abs=5.1e-7)
    # pixels are rounded here and not there
    metrics = json.loads((trained / "metrics.json").read_text())
    assert mse == pytest.approx(metrics["test_mse"], abs=1e-5)


@pytest.mark.parametrize("count", [0, 1, 2, 499, 500, 501])
def test_the_round_trip_is_exact(trained, test_images, tmp_path, capsys, count):
    images = write_idx(tmp_path / "images.idx", test_images[:count])
    codes, decoded, direct = (tmp_path / name for name in ("c.vq", "decoded.idx", "direct.idx"))
    main("encode", trained, "--images", images, "--out", codes)
    main("decode", trained, "--codes", codes, "--out", decoded)
    main("reconstruct", trained, "--images", images, "--out", direct)
    assert decoded.read_bytes() == direct.read_bytes()
    result = mnist_data.read_images(decoded).numpy()
    assert result.shape == (count, 28, 28)
    assert capsys.readouterr().out.startswith(f"images    {count}, {784 * count} bytes\n")
    if count > 0:
        # of these images, not of any
        error = np.square(result / 255 - test_images[:count] / 255).mean()
        assert 0 < error < 0.7 * np.square(test_images[:count] / 255).mean()


def test_as_users_run_it(trained, test_images, tmp_path):
    images, codes = write_idx(tmp_path / "images.idx", test_images[:501]), tmp_path / "codes.vq"
    encoded = run("mnist_codec.py", "encode", trained, "--images", images, "--out", codes)
    assert (encoded.returncode, encoded.stderr) == (0, "")
    assert f"{codes.stat().st_size} bytes" in encoded.stdout

    (tmp_path / "cut.vq").write_bytes(codes.read_bytes()[:-1])
    with ThreadPoolExecutor(2) as pool:
        decode = ("mnist_codec.py", "decode", trained, "--codes")
        future = pool.submit(run, *decode, tmp_path / "cut.vq", "--out", tmp_path / "cut.idx")
        decoded = run(*decode, codes, "--out", tmp_path / "decoded.idx")
        refused = future.result()
    assert (decoded.returncode, decoded.stderr) == (0, "")
    assert decoded.stdout.splitlines() == [
        "images    501 of 28×28 pixels",
        f"written   {tmp_path / 'decoded.idx'}, {16 + 501 * 784} bytes",
    ]
    # in this process: nothing that matters is left behind in the other two
    main("reconstruct", trained, "--images", images, "--out", tmp_path / "direct.idx")
    assert (tmp_path / "decoded.idx").read_bytes() == (tmp_path / "direct.idx").read_bytes()

    assert (refused.returncode, refused.stdout) == (1, "")
    assert re.fullmatch(
        r"mnist_codec.py: .*/cut.vq is not a whole file of codes, .*\n", refused.stderr
    )
    assert not (tmp_path / "cut.idx").exists()


def test_every_kind_of_file_gives_the_same_codes(trained, test_images, tmp_path):
    plain = write_idx(tmp_path / "one.idx", test_images[:1])
    gzipped, png = tmp_path / "one.gz", tmp_path / "one.PNG"
    gzipped.write_bytes(gzip.compress(plain.read_bytes()))
    Image.fromarray(test_images[0]).save(png)
    contents = []
    for i, path in enumerate((plain, gzipped, png)):
        main("encode", trained, "--images", path, "--out", tmp_path / f"{i}.vq")
        contents.append((tmp_path / f"{i}.vq").read_bytes())
    assert contents[0] == contents[1] == contents[2]

    second = write_idx(tmp_path / "second.idx", test_images[1:2])
    main("encode", trained, "--images", second, "--out", tmp_path / "second.vq")
    assert (tmp_path / "second.vq").read_bytes() != contents[0]


def test_a_picture_of_all_images(trained, test_images, tmp_path):
    images, codes = write_idx(tmp_path / "images.idx", test_images[:23]), tmp_path / "codes.vq"
    main("encode", trained, "--images", images, "--out", codes)
    main("decode", trained, "--codes", codes, "--out", tmp_path / "decoded.idx")
    main("decode", trained, "--codes", codes, "--out", tmp_path / "decoded.png")
    main("reconstruct", trained, "--images", images, "--out", tmp_path / "direct.png")
    assert (tmp_path / "decoded.png").read_bytes() == (tmp_path / "direct.png").read_bytes()
    with Image.open(tmp_path / "decoded.png") as image:
        # 5 columns and 5 rows of 28 + 2 pixels, less the last gap, three times
        assert (image.format, image.size) == ("PNG", (3 * (5 * 30 - 2), 3 * (5 * 30 - 2)))
        pixels = np.asarray(image)[::3, ::3]
    expected = mnist_data.read_images(tmp_path / "decoded.idx").numpy()
    assert np.array_equal(pixels[:28, 30:58], expected[1])
    assert np.array_equal(pixels[120:, 60:88], expected[22])


def test_the_test_set_is_that_of_the_data_the_model_knows(trained, tmp_path, monkeypatch):
    dressed = changed(
        trained, tmp_path / "run", lambda _, info: info["arguments"].update(dataset="fashion-mnist")
    )
    empty = torch.zeros(0, 28, 28, dtype=torch.uint8)
    asked = []

    def load(name: str) -> mnist_data.Data:
        asked.append(name)
        return mnist_data.Data(empty, empty[:, 0, 0], empty, empty[:, 0, 0])

    monkeypatch.setattr(codec, "load", load)
    main("encode", trained, "--out", tmp_path / "codes.vq")
    main("reconstruct", dressed, "--out", tmp_path / "images.idx")
    assert asked == ["mnist", "fashion-mnist"]
    assert (tmp_path / "images.idx").read_bytes() == mnist_data.to_idx(empty.numpy())


def test_a_model_from_another_device(trained, test_images, tmp_path):
    far = changed(
        trained, tmp_path / "run", lambda _, info: info["quantizer"].update(backend="triton")
    )
    images = write_idx(tmp_path / "images.idx", test_images[:3])
    main("encode", far, "--images", images, "--out", tmp_path / "far.vq")
    main("encode", trained, "--images", images, "--out", tmp_path / "near.vq")
    assert (tmp_path / "far.vq").read_bytes() == (tmp_path / "near.vq").read_bytes()


@pytest.mark.parametrize("count", [0, 5])
def test_a_codebook_of_one_code(tmp_path, count):
    """No bits at all."""
    vq = vqtriton.VectorQuantize(2, 1, accept_image_fmap=True)
    state = codec.VQVAE(vq, channels=2).state_dict()
    arguments = {"channels": 2, "reconstruction": "bce", "dataset": "mnist"}
    info = {"quantizer": vq.config, "arguments": arguments}
    tensors = {f"model.{name}": tensor for name, tensor in state.items()}
    run_files.save_checkpoint(tmp_path / "checkpoint.safetensors", tensors, info)
    images = write_idx(tmp_path / "images.idx", np.zeros((count, 28, 28), np.uint8))
    main("encode", tmp_path, "--images", images, "--out", tmp_path / "codes.vq")
    assert safetensors.numpy.load_file(tmp_path / "codes.vq")["packed"].shape == (0,)
    main("decode", tmp_path, "--codes", tmp_path / "codes.vq", "--out", tmp_path / "decoded.idx")
    main("reconstruct", tmp_path, "--images", images, "--out", tmp_path / "direct.idx")
    assert (tmp_path / "decoded.idx").read_bytes() == (tmp_path / "direct.idx").read_bytes()
    assert len(mnist_data.read_images(tmp_path / "decoded.idx")) == count


def refused(capsys: pytest.CaptureFixture, folder: Path, *flags: str | Path) -> str:
    """The one line of a command that fails, and leaves every file of the folder as it was."""
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(SystemExit) as caught:
        main(*flags)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    # a string: Python prints it and exits with status 1
    assert isinstance(caught.value.code, str)
    assert re.fullmatch("mnist_codec.py: .+", caught.value.code)
    assert capsys.readouterr().err == ""
    return caught.value.code


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (Path.unlink, "does not exist"),
        (truncate, "is not a whole safetensors file"),
        (lambda path: path.write_bytes(b""), "is not a whole safetensors file"),
        (
            lambda path: safetensors.numpy.save_file({"model.x": np.zeros(3)}, path),
            "is not a checkpoint of these examples",
        ),
        (
            lambda path: run_files.save_checkpoint(path, {}, {}),
            "is not a checkpoint of these examples",
        ),
        (
            lambda path: run_files.save_checkpoint(path, {}, {"arguments": {}, "quantizer": {}}),
            "missing 2 required positional arguments",
        ),
    ],
)
def test_a_bad_checkpoint(trained, tmp_path, capsys, spoil, message):
    run = changed(trained, tmp_path / "run", lambda tensors, info: None)
    spoil(run / "checkpoint.safetensors")
    images = write_idx(tmp_path / "images.idx", np.zeros((1, 28, 28), np.uint8))
    for command, flag in (
        ("encode", "--images"),
        ("decode", "--codes"),
        ("reconstruct", "--images"),
    ):
        line = refused(capsys, tmp_path, command, run, flag, images, "--out", tmp_path / "out")
        assert message in line
        assert str(run / "checkpoint.safetensors") in line


def test_what_is_read_is_not_written(trained, tmp_path, capsys):
    run = changed(trained, tmp_path / "run", lambda tensors, info: None)
    images = write_idx(tmp_path / "images", np.zeros((1, 28, 28), np.uint8))
    main("encode", run, "--images", images, "--out", tmp_path / "codes")
    capsys.readouterr()
    for command, flag, source in (
        ("encode", "--images", images),
        ("reconstruct", "--images", images),
        ("decode", "--codes", tmp_path / "codes"),
    ):
        for out in (source, run / ".." / "run" / "checkpoint.safetensors"):
            line = refused(capsys, tmp_path, command, run, flag, source, "--out", out)
            assert f"{out} is read; it cannot be written as well" in line


def test_a_checkpoint_whose_tensors_do_not_fit(trained, tmp_path, capsys):
    def widen(tensors: dict[str, torch.Tensor], info: dict[str, Any]) -> None:
        info["model"]["channels"] += 1

    run = changed(trained, tmp_path / "run", widen)
    line = refused(capsys, tmp_path, "encode", run, "--out", tmp_path / "out")
    assert f"{run / 'checkpoint.safetensors'} is not a checkpoint" in line


@pytest.fixture
def codes(trained: Path, test_images: np.ndarray, tmp_path: Path) -> Path:
    """A codes file of three images."""
    images = write_idx(tmp_path / "three.idx", test_images[:3])
    main("encode", trained, "--images", images, "--out", tmp_path / "codes.vq")
    return tmp_path / "codes.vq"


def read_codes(path: Path) -> tuple[np.ndarray, dict[str, Any]]:
    with safetensors.safe_open(path, framework="np") as file:
        return file.get_tensor("packed"), json.loads(file.metadata()[codec.FORMAT])


def write_codes(path: Path, packed: np.ndarray, header: object) -> None:
    safetensors.numpy.save_file({"packed": packed}, path, {codec.FORMAT: json.dumps(header)})


def test_the_header_says_what_it_must(trained, codes):
    packed, header = read_codes(codes)
    digest = header.pop("model")
    assert re.fullmatch("[0-9a-f]{64}", digest)
    assert header == {"shape": [3, 7, 7], "codebook_size": K, "bits": BITS}
    assert packed.shape == (math.ceil(3 * 49 * BITS / 8),)


@pytest.mark.parametrize(
    "spoil",
    [
        truncate,
        lambda path: path.write_bytes(path.read_bytes() + b"\0"),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"\x89PNG\r\n" * 20),
        lambda path: write_idx(path, np.zeros((3, 28, 28), np.uint8)),
        lambda path: safetensors.numpy.save_file({"packed": np.zeros(129, np.uint8)}, path),
        lambda path: safetensors.numpy.save_file({}, path, {codec.FORMAT: "{"}),
    ],
)
def test_files_that_hold_no_codes(trained, codes, tmp_path, capsys, spoil):
    spoil(codes)
    line = refused(capsys, tmp_path, "decode", trained, "--codes", codes, "--out", tmp_path / "out")
    assert f"{codes} is not a whole file of codes" in line


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda header: [], "not a whole file of codes"),
        (lambda header: None, "not a whole file of codes"),
        (lambda header: header | {"shape": []}, "not a whole file of codes"),
        (lambda header: header | {"shape": [2, 7, 7]}, "damaged: 129 bytes are not 98 indices"),
        (lambda header: header | {"shape": [3, 7, 8]}, "made by another model"),
        (lambda header: header | {"shape": [3.0, 7, 7]}, "not a whole file of codes"),
        (lambda header: header | {"shape": ["3", 7, 7]}, "not a whole file of codes"),
        (lambda header: header | {"shape": [-3, 7, 7]}, "not a whole file of codes"),
        (lambda header: header | {"shape": [10**30, 7, 7]}, "damaged: 129 bytes are not "),
        (lambda header: header | {"codebook_size": 128}, "with 128 codes, not 100"),
        (lambda header: header | {"bits": 8}, "made by another model"),
        (lambda header: header | {"model": None}, "but other weights"),
    ],
)
def test_headers_that_do_not_fit(trained, codes, tmp_path, capsys, change, message):
    packed, header = read_codes(codes)
    write_codes(codes, packed, change(header))
    line = refused(capsys, tmp_path, "decode", trained, "--codes", codes, "--out", tmp_path / "out")
    assert str(codes) in line
    assert message in line


def test_packed_bytes_that_do_not_fit(trained, codes, tmp_path, capsys):
    packed, header = read_codes(codes)
    indices = codec.unpack(packed, 147, K)
    indices[77] = K
    flags = ("decode", trained, "--codes", codes, "--out", tmp_path / "out")
    for bad, message in (
        (codec.pack(indices, 2**BITS), f"index {K}; it must be below codebook_size, {K}"),
        (packed[1:], "128 bytes are not 147 indices of 7 bits"),
        (packed.astype(np.int64), "unsigned byte"),
    ):
        write_codes(codes, bad, header)
        assert message in refused(capsys, tmp_path, *flags)
    # what was wrong were the bytes
    write_codes(codes, packed, header)
    main(*flags)
    assert len(mnist_data.read_images(tmp_path / "out")) == 3


def nudge(name: str) -> Callable[[dict[str, torch.Tensor], dict[str, Any]], None]:
    def change(tensors: dict[str, torch.Tensor], info: dict[str, Any]) -> None:
        flat = tensors[f"model.{name}"].view(-1)
        flat[0] = torch.nextafter(flat[0], torch.tensor(torch.inf))

    return change


@pytest.mark.parametrize(
    "change",
    [
        nudge("vq.codebook"),
        nudge("decoder.0.weight"),
        nudge("decoder.7.bias"),
        lambda _, info: info["model"].update(reconstruction="mse"),
    ],
)
def test_codes_of_another_model(trained, codes, tmp_path, capsys, change):
    """The last bit of one weight is enough."""
    other = changed(trained, tmp_path / "other", change)
    line = refused(capsys, tmp_path, "decode", other, "--codes", codes, "--out", tmp_path / "out")
    assert f"{codes} was made by another model, with the same number of codes, but other" in line


def test_another_encoder_is_no_other_codec(trained, codes, tmp_path):
    other = changed(trained, tmp_path / "other", nudge("encoder.0.weight"))
    contents = []
    for run in (trained, other):
        main("decode", run, "--codes", codes, "--out", tmp_path / "out")
        contents.append((tmp_path / "out").read_bytes())
    assert contents[0] == contents[1]


def grey_png() -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.arange(784, dtype=np.uint8).reshape(28, 28)).save(file, "PNG")
    return file.getvalue()


def png(path: Path, mode: str = "L", size: tuple[int, int] = (28, 28)) -> None:
    Image.new(mode, size).save(path, "PNG")


def png_of_chunks(path: Path, *chunks: tuple[bytes, bytes]) -> None:
    """Each with its length and its right checksum."""
    parts = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    ]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


HEADER = (b"IHDR", struct.pack(">IIBBBBB", 28, 28, 8, 0, 0, 0, 0))


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("missing.idx", lambda path: None, "No such file"),
        ("missing.png", lambda path: None, "No such file"),
        ("folder", Path.mkdir, "is not a file"),
        # of no length: it would be read for ever
        ("device", lambda path: path.symlink_to("/dev/zero"), "is not a file"),
        ("folder.png", Path.mkdir, "Is a directory"),
        ("labels", lambda path: write_idx(path, np.zeros(9, np.uint8)), r"\(9,\)"),
        ("wide", lambda path: write_idx(path, np.zeros((2, 28, 29), np.uint8)), "28, 29"),
        (
            "cut",
            lambda path: path.write_bytes(mnist_data.to_idx(np.ones((2, 28, 28), np.uint8))[:99]),
            "",
        ),
        ("empty", Path.touch, ""),
        ("cut.gz", lambda path: path.write_bytes(gzip.compress(b"x" * 99)[:-5]), ""),
        ("text", lambda path: path.write_text("not images"), ""),
        ("text.png", lambda path: path.write_text("not a picture"), "cannot identify"),
        ("small.png", lambda path: png(path, size=(27, 28)), r"\(27, 28\), mode L; it must be"),
        ("rgb.png", lambda path: png(path, "RGB"), "mode RGB; it must be 28×28, 8 bits grey"),
        ("palette.png", lambda path: png(path, "P"), "mode P; "),
        ("alpha.png", lambda path: png(path, "LA"), "mode LA; "),
        ("bilevel.png", lambda path: png(path, "1"), "mode 1; "),
        ("deep.png", lambda path: png(path, "I;16"), "mode I;16; "),
        ("cut.png", lambda path: path.write_bytes(grey_png()[:60]), ""),
        # Pillow raises a SyntaxError, and for the other a DecompressionBombError
        ("chunks.png", lambda path: png_of_chunks(path, HEADER, (b"IDAT", b""), (b"1", b"")), ""),
        (
            "huge.png",
            lambda path: png_of_chunks(path, (b"IHDR", HEADER[1].replace(b"\0\x1c", b"\xff\0"))),
            "",
        ),
    ],
)
def test_bad_images(trained, tmp_path, capsys, name, write, message):
    path = tmp_path / name
    write(path)
    for command in ("encode", "reconstruct"):
        out = tmp_path / "out"
        line = refused(capsys, tmp_path, command, trained, "--images", path, "--out", out)
        assert str(path) in line
        assert re.search(message, line)


def test_a_model_of_other_images_is_named(trained, tmp_path, capsys, monkeypatch):
    """That of train_images.py has no name of a data set."""
    tensors, info = codec.load_checkpoint(trained / "checkpoint.safetensors")
    del info["arguments"]["dataset"]
    monkeypatch.setattr(codec, "load_checkpoint", lambda path: (tensors, info))
    line = refused(capsys, tmp_path, "encode", trained, "--out", tmp_path / "out")
    assert "is not of train_mnist.py (for others: docs/your-data.md)" in line


def test_bad_outputs(trained, codes, tmp_path, capsys):
    (tmp_path / "folder").mkdir()
    for out in ("folder", "none/out", "three.idx/out"):
        for source in (
            ("encode", trained, "--images", tmp_path / "three.idx"),
            ("decode", trained, "--codes", codes),
        ):
            line = refused(capsys, tmp_path, *source, "--out", tmp_path / out)
            assert f"{tmp_path / out} is not a file in a folder that exists" in line
    empty = write_idx(tmp_path / "empty.idx", np.zeros((0, 28, 28), np.uint8))
    out = tmp_path / "empty.png"
    line = refused(capsys, tmp_path, "reconstruct", trained, "--images", empty, "--out", out)
    assert "there are no images to draw" in line
    for name in ("x.jpg", "x.JPEG", "x.webp"):
        flags = ("decode", trained, "--codes", codes, "--out", tmp_path / name)
        assert f"{name} must end in .png for a picture" in refused(capsys, tmp_path, *flags)


def test_an_output_is_replaced_as_a_whole_or_not_at_all(
    trained, codes, tmp_path, capsys, monkeypatch
):
    out = tmp_path / "images.idx"
    out.write_bytes(b"of old")
    flags = ("decode", trained, "--codes", codes, "--out", out)
    replace = os.replace

    def fail(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    assert "No space left" in refused(capsys, tmp_path, *flags)
    monkeypatch.setattr(os, "replace", replace)
    main(*flags)
    assert len(mnist_data.read_images(out)) == 3


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "the following arguments are required: encode|decode|reconstruct"),
        (["zip", "run"], "invalid choice: 'zip'"),
        (["encode", "run"], "the following arguments are required: --out"),
        (["decode", "run", "--out=x"], "the following arguments are required: --codes"),
        (["decode", "run", "--codes=x", "--out=x", "--images=x"], "unrecognized arguments"),
        (["reconstruct", "run", "--image=x", "--out=x"], "unrecognized arguments: --image=x"),
    ],
)
def test_bad_flags_are_exit_status_2(capsys, flags, message):
    with pytest.raises(SystemExit) as caught:
        codec.main(flags)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err
