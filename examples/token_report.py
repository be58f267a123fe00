"""What encode_audio.py and tokenize_images.py print and write of a comparison."""

from __future__ import annotations

import startup  # isort: skip

import io
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from compare_tokens import BATCH, TURNS, Comparison, Side, compare
from run_files import write_atomically
from torch import Tensor
from watch_searches import Quantize, fill_codebooks

FILLED = (
    "The weights are random, so the figures say nothing about a trained model. Each codebook\n"
    "was filled with vectors that its level is given, plus noise of half their deviation."
)


def report(args: Namespace, model: Any, name: str, quantize: Quantize, latents: Tensor) -> None:
    """Compares the searches of the quantizer ``name``; prints, and writes what --out asks for."""
    if not latents.isfinite().all():
        raise SystemExit(f"{startup.SCRIPT}: in {args.dtype} the latents are not all finite")
    if args.model is None:
        fill_codebooks(model.get_submodule(name), quantize, latents)
        print(FILLED)
    print(describe(latents), flush=True)
    try:
        comparison = compare(model, name, quantize, latents)
    except ValueError as error:
        raise SystemExit(f"{startup.SCRIPT}: {error}") from error
    show(comparison)
    if args.out is not None:
        save(args.out, comparison)


def describe(latents: Tensor) -> str:
    """How hard the search is: a product of matrices has to cancel what all vectors share."""
    rows = latents.double().movedim(1, -1).flatten(0, -2)
    mean = rows.mean(0)
    ratio = (mean.square().sum() / (rows - mean).square().sum(1).mean()).sqrt().item()
    return (
        f"The mean of the latents is {ratio:.1f} times as long as their usual distance from it.\n"
        "The larger this number, the more tokens rounding can change."
    )


def show(comparison: Comparison) -> None:
    """Prints what was patched, and how the two searches compare."""
    patched, ours, own = comparison
    groups: dict[str, list[str]] = {}
    for module, what in patched.modules.items():
        groups.setdefault(what, []).append(module)
    for what, names in groups.items():
        ends = names[0] if len(names) == 1 else f"{len(names)} modules, {names[0]} to {names[-1]}"
        print(f"vqtriton.patch changed {ends}: {what}.")
    for module, why in patched.left.items():
        print(f"vqtriton.patch left {module or 'the model'}: {why}")
    total = ours.tokens.numel()
    print(f"\nTokens: int64 {list(ours.tokens.shape)}, which are items, levels and places.")
    sides = [own, ours]
    if isinstance(own, str):
        print(f"The model's own search cannot run here: {own}")
        sides = [None, ours]
    rows = [
        (f"time in ms, median of {TURNS} turns", _milliseconds),
        (f"peak memory in MiB, median of {TURNS} turns", _mebibytes),
        (f"tokens that differ in batches of 1 and {BATCH}", lambda side: side.changed),
        ("tokens that are not the nearest code", lambda side: int(side.wrong.sum())),
    ]
    print(f"\n{'':44}{'own search':>12}{'vqtriton':>12}")
    for text, value in rows:
        print(f"{text:44}" + "".join(f"{value(s) if s else '-':>12}" for s in sides))
    print(
        "Peak memory is what the whole program takes while the quantizer runs, above what it had.\n"
        f"The last two rows count tokens, of {total} in all. The nearest code is the one with the\n"
        "least float64 distance from the vector that the search was given."
    )
    if isinstance(own, Side):
        show_levels(own, ours)


def _milliseconds(side: Side) -> str:
    return f"{1e3 * side.seconds:.2f}"


def _mebibytes(side: Side) -> str:
    return "?" if side.memory is None else f"{side.memory / 2**20:.2f}"


def show_levels(own: Side, ours: Side) -> None:
    """Prints, level by level, how many tokens differ and which of the two is right."""
    differ = torch.stack(
        [a.indices != b.indices for a, b in zip(own.searches, ours.searches, strict=True)]
    )
    if not differ.any():
        print("\nThe two give the same tokens.")
        return
    # after a token that differs, the next level is given another residual
    same_input = torch.stack(
        [(a.rows == b.rows).all(1) for a, b in zip(own.searches, ours.searches, strict=True)]
    )
    print(f"\n{int(differ.sum())} of {differ.numel()} tokens differ between the two:")
    print("level   differ   same input   own search wrong   vqtriton wrong")
    columns = torch.stack([differ, differ & same_input, own.wrong, ours.wrong]).sum(2).T.tolist()
    for level, (a, b, c, d) in enumerate(columns, 1):
        print(f"{level:5}{a:9}{b:13}{c:19}{d:17}")
    first = differ & same_input
    neither = ~(own.wrong | ours.wrong)
    a, b, c = (int((first & which).sum()) for which in (own.wrong, ours.wrong, neither))
    print(
        f"Where both searches were given the same vector, {int(first.sum())} tokens differ.\n"
        f"The model's own search is wrong in {a} of them, and vqtriton in {b}.\n"
        f"In {c} of them, both codes are equally near."
    )
    if (differ & ~same_input).any():
        print(
            "The other tokens differ because an earlier level does, so that the two searches were\n"
            "given different residuals."
        )


def save(path: Path, comparison: Comparison) -> None:
    """Writes ``tokens``, and ``own_tokens`` if the model's own search can run."""
    tensors = {"tokens": comparison.ours.tokens}
    if isinstance(comparison.own, Side):
        tensors["own_tokens"] = comparison.own.tokens
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    if path.suffix == ".npz":
        file = io.BytesIO()
        np.savez(file, **{name: tensor.numpy() for name, tensor in tensors.items()})
        content = file.getvalue()
    else:
        content = safetensors.torch.save(tensors)
    write_atomically(path, content)
    print(f"\nWritten: {path}, with {' and '.join(tensors)}.")
