"""Semantic IDs of items, as generative recommenders use them: seconds for 20,000 items.

    .venv/bin/python examples/semantic_ids.py
    .venv/bin/python examples/semantic_ids.py --embeddings items.npy --out ids.npy

An item's embedding becomes a few indices, each a code of what the codes before it have left, so
that similar items share their first indices (TIGER, Rajput et al. 2023, arXiv:2305.05065). Codes
start by k-means, level by level, and then all levels learn together by moving averages. Items that
share all indices collide; one digit more, a count, tells them apart.

Without ``--embeddings``, the items are made: groups of groups of groups of items.
"""

from __future__ import annotations

import startup  # isort: skip

import io
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch
from run_files import write_atomically
from torch import Tensor
from train_args import REVIVE_BELOW, Parser
from trainer import REVIVE_UNTIL, shuffled

import vqtriton

# standard deviations: groups at each depth around the middle of their outer group, and items
SPREADS = (1.0, 0.5, 0.25, 0.125)
# groups in a group, and the dimensions in which they differ
FANOUT, INNER_DIM = 16, 8


def make_items(count: int, dim: int, seed: int) -> tuple[Tensor, Tensor]:
    """Embeddings [count, dim] float32, and the outermost group of each, [count] int64."""
    generator = torch.Generator().manual_seed(seed)
    path = torch.randint(FANOUT, (count, len(SPREADS) - 1), generator=generator)
    group = torch.zeros(count, dtype=torch.int64)
    x = SPREADS[-1] * torch.randn(count, INNER_DIM, generator=generator)
    for depth, spread in enumerate(SPREADS[:-1]):
        group = FANOUT * group + path[:, depth]
        middles = torch.randn(FANOUT ** (depth + 1), INNER_DIM, generator=generator)
        x += spread * middles[group]
    return x @ torch.randn(INNER_DIM, dim, generator=generator), path[:, 0]


def read_items(path: Path, codebook_size: int) -> Tensor:
    """Embeddings [N, D] float32.

    Raises:
        ValueError: the file does not hold them.
    """
    try:
        array = np.load(path)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} is not a whole .npy file of numbers") from error
    if not isinstance(array, np.ndarray) or array.ndim != 2 or array.dtype.kind != "f":
        what = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else "archive"
        raise ValueError(f"{path} holds {what}; it must be floats [items, dim]")
    if len(array) < codebook_size or array.shape[1] == 0:
        raise ValueError(
            f"{path} has shape {array.shape}; it must have at least as many items as a level has "
            f"codes ({codebook_size}), of dim 1 or more"
        )
    x = torch.from_numpy(array.astype(np.float32))
    if not x.isfinite().all():
        raise ValueError(f"{path} has values that are NaN or infinite")
    return x


def train(x: Tensor, args: Namespace) -> vqtriton.ResidualVectorQuantize:
    """Codes of all levels, in evaluation mode."""
    rvq = vqtriton.ResidualVectorQuantize(
        x.shape[1], args.codebook_size, args.levels, kmeans_init=True, decay=args.decay
    )
    # the first step starts the codes from what it is given, so it is given all items
    rvq(x)
    threshold = REVIVE_BELOW * min(args.batch_size, len(x)) / args.codebook_size
    for epoch in range(args.epochs):
        for layer in rvq.layers:
            # what is revived last needs some time to settle
            layer.threshold_ema_dead_code = threshold if epoch < REVIVE_UNTIL * args.epochs else 0
        for batch in shuffled(args.seed, epoch, len(x)).split(args.batch_size):
            rvq(x[batch])
    return rvq.eval()


def collisions(ids: Tensor) -> float:
    """Share of the items [N, digits] that have all digits in common with another."""
    _, counts = ids.unique(dim=0, return_counts=True)
    return counts[counts > 1].sum().item() / len(ids)


def count_digit(ids: Tensor) -> Tensor:
    """[N], how many items before each one have the same digits."""
    _, group, sizes = ids.unique(dim=0, return_inverse=True, return_counts=True)
    order = group.argsort(stable=True)
    begins = sizes.cumsum(0) - sizes
    digit = torch.empty_like(group)
    digit[order] = torch.arange(len(ids)) - begins[group[order]]
    return digit


def show(x: Tensor, ids: Tensor, rvq: vqtriton.ResidualVectorQuantize) -> None:
    """Prints what each level adds."""
    variance = vqtriton.metrics.quantization_error(x, x.mean(0).expand_as(x)).item()
    print("\nlevels   error   usage   perplexity   collisions")
    for level, size in enumerate(rvq.codebook_sizes, 1):
        first = ids[:, :level]
        error = vqtriton.metrics.quantization_error(x, rvq.get_output_from_indices(first))
        counts = vqtriton.metrics.counts(first[:, -1], size)
        usage, perplexity = vqtriton.metrics.usage(counts), vqtriton.metrics.perplexity(counts)
        print(
            f"{level:6}{error.item() / variance:8.4f}{usage.item():8.0%}{perplexity.item():13.1f}"
            f"{collisions(first):13.2%}"
        )
    print(
        "Error: mean squared distance, as part of the variance of the embeddings. Usage and\n"
        "perplexity are those of the last level. Collisions: items that share all their indices."
    )


def build_parser() -> Parser:
    parser = Parser("Make semantic IDs of items from their embeddings.")
    text = "file of floats [items, dim], .npy; without it, items are made"
    parser.add("embeddings", text, type=Path)
    parser.add("items", "how many items to make", 20000)
    parser.add("dim", "of the items that are made", 64)
    parser.begin("quantizer, see vqtriton.ResidualVectorQuantize")
    parser.add("levels", "indices of an item", 3)
    parser.add("codebook_size", "K, number of codes of each level", 256)
    parser.add("decay", "of the moving averages that the codes are", 0.9)
    parser.begin("training")
    parser.add("epochs", "passes over the items, after k-means", 10)
    parser.add("batch_size", "items a step", 2048)
    parser.add("seed", "of everything random", 0)
    parser.begin("results")
    text = "file for the IDs, int64 [items, levels + 1]; one that is there is replaced"
    parser.add("out", text, Path("semantic_ids.npy"))
    return parser


def parse_args(parser: Parser, argv: list[str] | None) -> Namespace:
    args = parser.parse_args(argv)
    for name in ("dim", "levels", "codebook_size", "batch_size"):
        parser.check(args, name, 1, 2**20)
    parser.check(args, "items", args.codebook_size, 2**31)
    parser.check(args, "epochs", 0, 2**20)
    parser.check(args, "decay", 0, 1)
    parser.check(args, "seed", 0, 2**63)
    if args.out.suffix != ".npy" or not args.out.parent.is_dir() or args.out.is_dir():
        parser.fail("out", f"{args.out} is not a file *.npy in a folder that exists")
    return args


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    parser = build_parser()
    args = parse_args(parser, argv)
    torch.manual_seed(args.seed)
    groups = None
    if args.embeddings is None:
        x, groups = make_items(args.items, args.dim, args.seed)
    else:
        try:
            x = read_items(args.embeddings, args.codebook_size)
        except (OSError, ValueError) as error:
            parser.fail("embeddings", error)
    what = "made items" if args.embeddings is None else f"items of {args.embeddings}"
    print(f"{len(x)} {what}, {x.shape[1]} numbers each; {args.levels} levels.", flush=True)
    rvq = train(x, args)
    ids = rvq(x).indices
    show(x, ids, rvq)
    if groups is not None:
        # an index stands for the group that is commonest among its items
        table = torch.zeros(args.codebook_size, FANOUT, dtype=torch.int64)
        table.index_put_((ids[:, 0], groups), torch.ones_like(groups), accumulate=True)
        share = table.amax(1).sum().item() / len(x)
        print(f"The first index tells the outermost group of {share:.1%} of the items.")
    digit = count_digit(ids)
    unique = torch.cat([ids, digit[:, None]], 1)
    print(
        f"\nCollisions: {collisions(ids):.2%} of the items before the last digit, "
        f"{collisions(unique):.2%} after it. It goes up to {digit.max().item()}."
    )
    file = io.BytesIO()
    np.save(file, unique.numpy())
    write_atomically(args.out, file.getvalue())
    print(f"Written: {args.out}, int64 {list(unique.shape)}.")


if __name__ == "__main__":
    startup.run(main)
