"""What a run looks like: images, use of the codebook, curves; each as the bytes of a PNG."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor


def tile(images: Tensor, columns: int, scale: int = 3, gap: int = 2) -> bytes:
    """Images [N, H, W] uint8, row by row on grey, every pixel ``scale`` wide."""
    count, height, width = images.shape
    rows = -(-count // columns)
    sheet = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap), 128, np.uint8)
    for i, image in enumerate(images.cpu().numpy()):
        top, left = i // columns * (height + gap), i % columns * (width + gap)
        sheet[top : top + height, left : left + width] = image
    png = io.BytesIO()
    Image.fromarray(sheet.repeat(scale, 0).repeat(scale, 1)).save(png, "PNG")
    return png.getvalue()


def usage_histogram(counts: Tensor) -> bytes:
    """How often each code is chosen, the commonest first; an even share for comparison."""
    share = (counts / counts.sum()).sort(descending=True).values.cpu().numpy()
    used = int((share > 0).sum())
    figure = Figure(figsize=(6, 3), layout="constrained")
    axes = figure.subplots()
    axes.bar(np.arange(used), share[:used], width=1)
    axes.axhline(1 / len(share), color="black", linestyle=":", label="even share")
    axes.set(xlim=(-0.5, len(share) - 0.5), yscale="log")
    axes.set(xlabel=f"code, commonest first ({used} of {len(share)} used)", ylabel="share")
    axes.legend()
    return _png(figure)


def training_curves(runs: dict[str, list[dict[str, Any]]], codebook_size: int) -> bytes:
    """Reconstruction term and batch perplexity over the steps, a line for each named run."""
    figure = Figure(figsize=(9, 3), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, curve in runs.items():
        steps = [point["step"] for point in curve]
        left.plot(steps, [point["reconstruction"] for point in curve], label=name)
        right.plot(steps, [point["perplexity"] for point in curve], label=name)
    right.axhline(codebook_size, color="black", linestyle=":")
    left.set(xlabel="step", ylabel="reconstruction, per pixel", yscale="log")
    right.set(xlabel="step", ylabel="perplexity of a batch", yscale="log")
    if len(runs) > 1:
        right.legend(fontsize="small")
    return _png(figure)


def _png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=100)
    return file.getvalue()
