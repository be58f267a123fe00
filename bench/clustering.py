"""k-means beside scikit-learn and faiss: inertia and time, from one run; see docs/benchmarks.md.

All start from k-means++ or from drawn rows, take the same number of iterations, and are asked for
one trial, with float32 and as many threads. The inertia is that of the codebook which each
returns, evaluated in float64. Turn by turn; every turn has another seed, the same for all.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import vqtriton
from bench import provenance, report
from bench.check import nearest_codes
from bench.measure import Row, interleave

ITERS = 20
TURNS = 5


@dataclass(frozen=True)
class Data:
    """Rows to cluster."""

    name: str
    num_rows: int
    codebook_size: int
    dim: int
    # clusters that they are drawn from, so far apart that they do not overlap; 0 for none
    num_blobs: int = 0

    def make(self) -> Tensor:
        source = torch.Generator().manual_seed(0)
        x = torch.randn(self.num_rows, self.dim, generator=source)
        if self.num_blobs:
            centers = 4 * torch.randn(self.num_blobs, self.dim, generator=source)
            x += centers[torch.randint(self.num_blobs, (self.num_rows,), generator=source)]
        return x


DATA = (
    Data("gaussian", 65536, 256, 16),
    Data("gaussian, many codes", 65536, 1024, 64),
    Data("clusters", 65536, 512, 32, num_blobs=512),
    Data("semantic IDs", 16384, 256, 128, num_blobs=64),
)


def ours(init: str) -> Callable[[Tensor, int, int], Tensor]:
    def fit(x: Tensor, codebook_size: int, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return vqtriton.kmeans(x, codebook_size, ITERS, generator, init=init)

    return fit


def scikit_learn(init: str) -> Callable[[Tensor, int, int], Tensor]:
    from sklearn.cluster import KMeans

    def fit(x: Tensor, codebook_size: int, seed: int) -> Tensor:
        # ends, as ours, after the iterations or where nothing changes
        model = KMeans(codebook_size, init=init, n_init=1, max_iter=ITERS, tol=0, random_state=seed)
        return torch.from_numpy(model.fit(x.numpy()).cluster_centers_)

    return fit


def faiss() -> Callable[[Tensor, int, int], Tensor]:
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())

    def fit(x: Tensor, codebook_size: int, seed: int) -> Tensor:
        model = faiss.Kmeans(
            x.shape[1],
            codebook_size,
            niter=ITERS,
            seed=seed,
            # of all rows, as the others
            max_points_per_centroid=x.shape[0],
            min_points_per_centroid=1,
        )
        model.train(x.numpy())
        return torch.from_numpy(model.centroids)

    return fit


# package, start, and what makes the function
SUBJECTS = {
    "vqtriton, k-means++": ("vqtriton", "k-means++", lambda: ours("k-means++")),
    "vqtriton, random": ("vqtriton", "random", lambda: ours("random")),
    "scikit-learn, k-means++": ("scikit-learn", "k-means++", lambda: scikit_learn("k-means++")),
    "scikit-learn, random": ("scikit-learn", "random", lambda: scikit_learn("random")),
    "faiss": ("faiss-cpu", "random", faiss),
}


def inertia(x: Tensor, codebook: Tensor) -> float:
    """Sum of squared distances to the nearest codes, in float64."""
    codes = codebook.double()[nearest_codes(x, codebook)]
    return (x.double() - codes).square().sum().item()


def measure(data: Data, turns: int, command: str) -> list[Row]:
    x = data.make()
    fits = {
        name: make()
        for name, (package, _, make) in SUBJECTS.items()
        if package == "vqtriton" or provenance.version(package)
    }
    found: dict[str, list[float]] = {name: [] for name in fits}

    def step(name: str) -> float:
        start = time.perf_counter()
        codebook = fits[name](x, data.codebook_size, len(found[name]))
        seconds = time.perf_counter() - start
        found[name].append(inertia(x, codebook))
        return seconds

    # thread pools and lazy imports are paid for once
    for fit in fits.values():
        fit(x[: 4 * data.codebook_size], data.codebook_size, 0)
    seconds = interleave([lambda name=name: step(name) for name in fits], turns)
    return [
        {
            "data": data.name,
            "shape": {"N": data.num_rows, "K": data.codebook_size, "D": data.dim},
            "subject": name,
            "init": SUBJECTS[name][1],
            "version": provenance.version(SUBJECTS[name][0]),
            "iters": ITERS,
            "inertia": found[name],
            "seconds": of_subject,
            "device": provenance.processor(),
            "threads": torch.get_num_threads(),
            "torch": str(torch.__version__),
            "commit": provenance.commit(),
            "command": command,
        }
        for name, of_subject in zip(fits, seconds, strict=True)
    ]


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="python -m bench.clustering", description=__doc__)
    parser.add_argument("--turns", type=int, default=TURNS, help="seeds of each")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    asked = parser.parse_args(arguments)
    if asked.turns < 1:
        parser.error(f"--turns is {asked.turns}; it must be at least 1")
    if asked.json and not asked.json.parent.is_dir():
        parser.error(f"--json is {asked.json}; there is no folder {asked.json.parent}")
    command = shlex.join(["python", "-m", "bench.clustering", *arguments])
    rows: list[Row] = []
    for data in DATA:
        found = measure(data, asked.turns, command)
        print(report.clustering_table(found), flush=True)
        rows += found
        if asked.json:
            report.write_rows(asked.json, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
