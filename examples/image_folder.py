"""A folder of images of any size, as squares of one size."""

from __future__ import annotations

import hashlib
import math
import random
import sys
from collections.abc import Iterable, Iterator
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


class ImageFolder:
    """Images uint8 [B, 3, size, size] from the files in a folder and all folders below it.

    To train on: random squares of random size, scaled, half of them mirrored; which ones follows
    from seed and epoch alone. To test on: the largest square in the middle.

    Args:
        size: pixels of a side.
        limit: use the first so many files only.
        workers: processes that read files; 0 reads them in this one.
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
        if len(files) < 2:
            raise ValueError(f"{folder} has {len(files)} images; it must have at least 2")
        # a run cannot go on with others: what was trained on could be tested on
        names = "\0".join(str(path.relative_to(folder)) for path in files)
        self.fingerprint = hashlib.sha256(names.encode()).hexdigest()
        random.Random(0).shuffle(files)
        number = min(max(len(files) // 10, 1), MAX_TEST)
        self.test_files, self.train_files = files[:number], files[number:]
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
        generator = torch.Generator()
        return DataLoader(squares, num_workers=self.workers, generator=generator, **options)


class Squares(Dataset[Tensor]):
    """A square of a file, uint8 [3, size, size]; without a seed always the same."""

    def __init__(self, files: list[Path], size: int, seed: tuple[int, int] | None = None) -> None:
        self.files, self.size, self.seed = files, size, seed

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, place: int) -> Tensor:
        rng = np.random.default_rng((*self.seed, place)) if self.seed else None
        for i in range(len(self.files)):
            path = self.files[(place + i) % len(self.files)]
            try:
                return self._square(path, rng)
            # what Pillow raises for a damaged file has no common class
            except Exception as error:
                print(f"{path} is left out: {error}", file=sys.stderr)
        raise ValueError("none of the files can be read as an image")

    def _square(self, path: Path, rng: np.random.Generator | None) -> Tensor:
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
