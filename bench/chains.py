"""Whole residual quantizers on a CPU beside others: ``python -m bench.chains [NAME...]``.

Beside `vqtriton.ResidualVectorQuantize`: vector-quantize-pytorch's ``ResidualVQ`` with the same
codes, and a loop of addmm and argmin, as most codecs have it, without gradients. Time: turn by
turn, in an order that turns around each time. Memory: what torch's allocator hands out at most.
Tokens: how many of ours differ, and in how many of these float64 says that ours is farther, level
by level from our residuals. It prints a table of docs/residual.md.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import vqtriton
from bench.cases import CASES
from bench.devices import allocator_peak
from bench.measure import interleave, quantile

NAMES = ("encodec", "dac", "mimi", "rq-vae", "var")
# seconds for the turns of one size, and their least and largest number
BUDGET, LEAST, MOST = 8.0, 5, 101


@dataclass
class Chain:
    """One chain of codebooks that fit its data, as several projects run it."""

    x: Tensor
    codebooks: list[Tensor]

    @classmethod
    def of(cls, name: str, num_rows: int | None = None) -> Chain:
        case = CASES[name]
        g = torch.Generator().manual_seed(0)
        centers = torch.randn(case.codebook_size, case.dim, generator=g)

        def rows(number: int) -> Tensor:
            chosen = torch.randint(len(centers), (number,), generator=g)
            return centers[chosen] + torch.randn(number, case.dim, generator=g) / 2

        residual, codebooks = rows(2 * case.codebook_size), []
        for _ in range(case.codebooks):
            # shortened rows of the data: no k-means is needed for codes that are at home there, and
            # none of them leaves a residual of zero
            drawn = torch.randperm(len(residual), generator=g)[: case.codebook_size]
            codebook = 0.8 * residual[drawn]
            codebooks.append(codebook)
            residual = residual - codebook[vqtriton.nearest_code(residual, codebook)]
        return cls(rows(num_rows or case.num_rows), codebooks)

    def ours(self) -> nn.Module:
        size, dim = self.codebooks[0].shape
        rvq = vqtriton.ResidualVectorQuantize(dim, size, len(self.codebooks))
        for layer, codes in zip(rvq.layers, self.codebooks, strict=True):
            layer.set_codebook(codes, cluster_size=len(self.x) / size)
        return rvq

    def theirs(self) -> nn.Module:
        from vector_quantize_pytorch import ResidualVQ

        size, dim = self.codebooks[0].shape
        rvq = ResidualVQ(
            dim=dim, codebook_size=size, num_quantizers=len(self.codebooks), decay=0.99
        )
        for layer, codes in zip(rvq.layers, self.codebooks, strict=True):
            layer._codebook.embed.data[0] = codes
            layer._codebook.cluster_size.data.fill_(len(self.x) / size)
            layer._codebook.embed_avg.data[0] = codes * (len(self.x) / size)
        return rvq

    def loop(self) -> Callable[[Tensor], Tensor]:
        half_sqnorms = [codes.square().sum(1) / 2 for codes in self.codebooks]

        def encode(x: Tensor) -> Tensor:
            found = []
            for codes, half in zip(self.codebooks, half_sqnorms, strict=True):
                found.append(torch.addmm(half, x, codes.T, alpha=-1).argmin(1))
                x = x - codes[found[-1]]
            return torch.stack(found, 1)

        return encode

    def prepared(self) -> Callable[[Tensor], Tensor]:
        prepared = vqtriton.prepare_codebooks(self.codebooks)
        return lambda x: vqtriton.residual_quantize(x, prepared).indices

    def farther(self, ours: Tensor, theirs: Tensor) -> tuple[int, int]:
        """Tokens that differ where all before are equal, and those of ours that are farther."""
        differ = farther = 0
        residual = self.x
        is_same = torch.ones(len(residual), dtype=torch.bool)
        for q, codes in enumerate(self.codebooks):
            (rows,) = (is_same & (ours[:, q] != theirs[:, q])).nonzero(as_tuple=True)
            x, wide = residual[rows].double(), codes.double()
            mine, other = ((x - wide[t[rows, q]]).square().sum(1) for t in (ours, theirs))
            differ, farther = differ + len(rows), farther + int((mine > other).sum())
            is_same &= ours[:, q] == theirs[:, q]
            residual = residual - codes[ours[:, q]]
        return differ, farther


def seconds(step: Callable[[], object]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def compare(steps: list[Callable[[], object]]) -> list[tuple[float, float, float, int]]:
    """Seconds (20 %, median, 80 %) and peak bytes of each."""
    once = sum(seconds(step) + seconds(step) for step in steps)
    turns = min(MOST, max(LEAST, int(2 * BUDGET / once)))
    taken = interleave([lambda step=step: seconds(step) for step in steps], turns)
    return [
        (*(quantile(times, q) for q in (0.2, 0.5, 0.8)), allocator_peak(step))
        for times, step in zip(taken, steps, strict=True)
    ]


def training_step(module: nn.Module, x: Tensor) -> Callable[[], object]:
    module.train()
    rows = x[None].clone().requires_grad_()

    def step() -> object:
        quantized, _, loss = module(rows)
        return torch.autograd.grad(quantized.sum() + loss.sum(), rows)

    return step


def told(name: str, found: list[tuple[float, float, float, int]]) -> str:
    """A row of the table; the ratios are those to the first."""
    mine = found[0]
    cells = [f"{1e3 * mine[1]:.3g} ms ({1e3 * mine[0]:.3g} to {1e3 * mine[2]:.3g})"]
    cells += [f"{1e3 * other[1]:.3g} ms, {other[1] / mine[1]:.2f}×" for other in found[1:]]
    cells += [""] * (4 - len(cells))
    memory = " / ".join(f"{one[3] / 2**20:.3g}" for one in found)
    return f"| {name} | {' | '.join(cells)} | {memory} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=NAMES, help="default: all")
    names = parser.parse_args().names
    print(
        "| chain (K×D×Q), rows | vqtriton | ResidualVQ | addmm and argmin | prepared | peak MiB |"
    )
    print("|---|---|---|---|---|---|")
    for name in names:
        case = CASES[name]
        shape = f"{case.codebook_size}×{case.dim}×{case.codebooks}"
        chain = Chain.of(name)
        # modules of their own, as training moves codes
        module, peer = chain.ours().eval(), chain.theirs().eval()
        with torch.no_grad():
            ours, theirs = module(chain.x).indices, peer(chain.x[None])[1][0]
            differ, farther = chain.farther(ours, theirs)
            prepared = chain.prepared()
            assert torch.equal(ours, prepared(chain.x))
            for number in (1, len(chain.x)):
                x = chain.x[:number]
                searches = module, lambda x, peer=peer: peer(x[None]), chain.loop(), prepared
                found = compare([functools.partial(search, x) for search in searches])
                print(told(f"{name} {shape}, {number}", found), flush=True)
        steps = [training_step(module, chain.x) for module in (chain.ours(), chain.theirs())]
        print(told(f"{name} {shape}, {len(chain.x)}, training", compare(steps)), flush=True)
        print(f"{name}: {differ} of {ours.numel()} tokens differ; ours is farther in {farther}")


if __name__ == "__main__":
    main()
