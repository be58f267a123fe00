"""A folder of images of any size, as squares of one size."""

from __future__ import annotations

import hashlib
import math
import random
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

# a part of the images is for testing only: one in ten, and no more than this
MAX_TEST = 500
# an epoch has at least as many squares: of few images, several of each
MIN_SQUARES = 2000
# these are the user's own files, however large
Image.MAX_IMAGE_PIXELS = None


class ImageFolder:
    """Images uint8 [B, 3, size, size] from the files in a folder and all folders below it.

    To train on: random squares of random size, scaled, half of them mirrored; which ones follows
    from seed and epoch alone. To test on: the largest square in the middle.

    Args:
        size: pixels of a side.
        limit: use the first so many files only.
        workers: processes that read files; 0 reads them in this one.
    Files that are not whole images are left out, and named on stderr.

    Raises:
        ValueError: fewer than two images.
    """

    unit = "squares"

    def __init__(
        self,
        folder: str | Path,
        size: int,
        limit: int | None = None,
        workers: int = 0,
        seed: int = 0,
    ) -> None:
        suffixes = Image.registered_extensions()
        readable = {suffix for suffix, kind in suffixes.items() if kind in Image.OPEN}
        files = sorted(
            path
            for path in Path(folder).rglob("*")
            if path.suffix.lower() in readable and path.is_file() and path.name[0] != "."
        )[:limit]
        files = [path for path in files if _can_be_read(path, _open)]
        if len(files) < 2:
            raise ValueError(f"{folder} has too few images: {len(files)}, where 2 are needed")
        # a run cannot go on with others: what was trained on could be tested on
        names = "\0".join(f"{path.relative_to(folder)} {path.stat().st_size}" for path in files)
        self.fingerprint = hashlib.sha256(names.encode()).hexdigest()
        random.Random(0).shuffle(files)
        number = min(max(len(files) // 10, 1), MAX_TEST)
        # no other image may take the place of one that is tested
        whole = Squares(files[:number], size)
        self.test_files = [path for path in files[:number] if _can_be_read(path, whole.square)]
        self.train_files = files[number:]
        # one that can be read is enough to begin with; the others are read when they are used
        while self.train_files and not _can_be_read(self.train_files[0], whole.square):
            del self.train_files[0]
        if not (self.test_files and self.train_files):
            raise ValueError(f"{folder} has too few images that can be read")
        number = len(self.test_files)
        self.size, self.workers, self.seed = size, workers, seed
        self.count = len(self.train_files) * math.ceil(MIN_SQUARES / len(self.train_files))
        columns = min(number, 8)
        rows = min(number // columns, 2)
        test = Squares(self.test_files, size)
        shown = torch.stack([test[i] for i in range(rows * columns)])
        self.shown = shown.unflatten(0, (rows, columns))

    def batches(self, places: Iterable[Tensor], epoch: int) -> Iterator[Tensor]:
        squares = Squares(self.train_files, self.size, (self.seed, epoch))
        places = [batch.tolist() for batch in places]
        return iter(self._loader(squares, batch_sampler=places))

    def test_batches(self) -> Iterable[Tensor]:
        squares = Squares(self.test_files, self.size)
        return self._loader(squares, batch_size=50)

    def _loader(self, squares: Squares, **options: Any) -> DataLoader[Tensor]:
        # without a generator of its own it would draw from that of the training, once per start
        options |= {"generator": torch.Generator(), "worker_init_fn": _leave_signals_to_parent}
        return DataLoader(squares, num_workers=self.workers, **options)


def _leave_signals_to_parent(worker: int) -> None:
    """Whoever stops a job sends its signal to all processes; the parent then stops the others."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _open(path: Path) -> None:
    with Image.open(path):
        pass


def _can_be_read(path: Path, read: Callable[[Path], object]) -> bool:
    """Whether a file can be read; one that cannot is named."""
    try:
        read(path)
    # what Pillow raises for a damaged file has no common class
    except Exception as error:
        print(f"{path} is left out: {error}", file=sys.stderr)
        return False
    return True


class Squares(Dataset[Tensor]):
    """A square of a file, uint8 [3, size, size].

    Without a seed it is always the same, and a damaged file is an error. With one, to train on, the
    next file that can be read takes the place of a damaged one.
    """

    def __init__(self, files: list[Path], size: int, seed: tuple[int, int] | None = None) -> None:
        self.files, self.size, self.seed = files, size, seed
        self.damaged: set[Path] = set()

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, place: int) -> Tensor:
        """
        Raises:
            ValueError: the file is damaged; with a seed, all files are.
        """
        if self.seed is None:
            try:
                return self.square(self.files[place])
            except Exception as error:
                raise ValueError(f"{self.files[place]} cannot be read: {error}") from error
        rng = np.random.default_rng((*self.seed, place))
        for i in range(len(self.files)):
            path = self.files[(place + i) % len(self.files)]
            if path in self.damaged:
                continue
            try:
                return self.square(path, rng)
            except Exception as error:
                self.damaged.add(path)
                print(f"{path} is left out: {error}", file=sys.stderr)
        raise ValueError("none of the files to train on can be read as an image")

    def square(self, path: Path, rng: np.random.Generator | None = None) -> Tensor:
        with Image.open(path) as image:
            # a JPEG is read at a fraction of its size where that is enough, which is much faster
            image.draft("RGB", (2 * self.size, 2 * self.size))
            # cameras write how they were held
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):
                # 16 bits of grey, which convert would cut off at 255
                grey = np.asarray(image).astype(np.float64) / 257
                image = Image.fromarray(grey.clip(0, 255).round().astype(np.uint8))
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            image = image.convert("RGB")
        short = min(image.size)
        side = short if rng is None else rng.uniform(min(self.size, short), short)
        # where the square begins, between 0 and the last place at which it is inside
        left, top = ((length - side) * (rng.random() if rng else 0.5) for length in image.size)
        box = (left, top, left + side, top + side)
        square = image.resize((self.size, self.size), Image.Resampling.BICUBIC, box, reducing_gap=2)
        pixels = torch.from_numpy(np.array(square)).permute(2, 0, 1)
        return pixels.flip(2) if rng and rng.random() < 0.5 else pixels.contiguous()
