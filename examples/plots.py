"""What a run looks like: images, use of the codebook, curves; each as the bytes of a PNG."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor


def tile(images: Tensor, columns: int, scale: int = 3, gap: int = 2) -> Image.Image:
    """Images [N, H, W] or [N, C, H, W] uint8, row by row on grey, every pixel ``scale`` wide."""
    if images.dim() == 3:
        images = images[:, None]
    count, channels, height, width = images.shape
    rows = -(-count // columns)
    size = (rows * (height + gap) - gap, columns * (width + gap) - gap, channels)
    sheet = np.full(size, 128, np.uint8)
    for i, image in enumerate(images.cpu().permute(0, 2, 3, 1).numpy()):
        top, left = i // columns * (height + gap), i % columns * (width + gap)
        sheet[top : top + height, left : left + width] = image
    sheet = sheet.repeat(scale, 0).repeat(scale, 1)
    return Image.fromarray(sheet.squeeze(2) if channels == 1 else sheet)


def sheet(images: Tensor) -> bytes:
    """Images [N, H, W] or [N, C, H, W] uint8, as a page about as wide as high.

    Raises:
        ValueError: no images.
    """
    if len(images) == 0:
        raise ValueError("there are no images to draw")
    columns = math.ceil(math.sqrt(len(images) * images.shape[-2] / images.shape[-1]))
    # not much wider than a screen
    scale = max(1, min(3, 1500 // (columns * images.shape[-1])))
    return _png(tile(images, columns, scale))


def pairs(originals: Tensor, reconstructions: Tensor) -> bytes:
    """Images [rows, columns, C, H, W] uint8, each row of originals above its reconstructions."""
    rows, columns, *_, width = originals.shape
    both = torch.stack([originals, reconstructions], 1).flatten(0, 2)
    labels = ["original", "reconstruction"] * rows
    return _png(labelled(tile(both, columns, max(1, 84 // width)), labels, "Test images"))


def columns(images: Tensor, names: Sequence[str]) -> bytes:
    """Images [rows · columns, C, H, W] uint8, row by row; the name of each column above it."""
    picture = tile(images, len(names))
    font = ImageFont.load_default(14)
    page = Image.new(picture.mode, (picture.width, picture.height + 28), "white")
    page.paste(picture, (0, 28))
    for i, name in enumerate(names):
        middle = round((i + 0.5) * picture.width / len(names))
        ImageDraw.Draw(page).text((middle, 14), name, "black", font, anchor="mm")
    return _png(page)


def labelled(picture: Image.Image, rows: list[str], title: str) -> Image.Image:
    """The picture with a title above it, and at the left a label for each of its rows."""
    font = ImageFont.load_default(14)
    left, top = 12 + max(round(font.getlength(text)) for text in (*rows, "")), 28
    size = (left + max(picture.width, round(font.getlength(title))), top + picture.height)
    page = Image.new(picture.mode, size, "white")
    page.paste(picture, (left, top))
    draw = ImageDraw.Draw(page)
    draw.text((left, top // 2), title, "black", font, anchor="lm")
    for i, text in enumerate(rows):
        middle = top + round((i + 0.5) * picture.height / len(rows))
        draw.text((left - 6, middle), text, "black", font, anchor="rm")
    return page


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
    axes.set(title="How often each code is chosen on the test set")
    axes.legend()
    return _png(figure)


def training_curves(runs: dict[str, list[dict[str, Any]]], codebook_size: int) -> bytes:
    """Reconstruction term and batch perplexity over the steps, a line for each named run."""
    figure = Figure(figsize=(9, 3), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, curve in runs.items():
        steps = [point["step"] for point in curve]
        left.plot(steps, [point["reconstruction"] for point in curve])
        right.plot(steps, [point["perplexity"] for point in curve], label=name or "this run")
    label = f"all {codebook_size} codes equally often"
    right.axhline(codebook_size, color="black", linestyle=":", label=label)
    left.set(title="Training", xlabel="step", yscale="log")
    left.set(ylabel="reconstruction term, per pixel")
    right.set(title="Codes in use", xlabel="step", ylabel="perplexity of a batch", yscale="log")
    right.legend(fontsize="small")
    return _png(figure)


def snr_by_levels(rows: Sequence[dict[str, float]]) -> bytes:
    """Signal-to-noise ratio over the bitrate, a point for each number of levels."""
    figure = Figure(figsize=(6, 3), layout="constrained")
    axes = figure.subplots()
    axes.plot([row["kbps"] for row in rows], [row["snr_db"] for row in rows], marker="o")
    for row in rows:
        place = row["kbps"], row["snr_db"]
        axes.annotate(f"{row['levels']}", place, (0, 6), textcoords="offset points", ha="center")
    axes.margins(y=0.2)
    axes.set(xlabel="kbit/s; at each point the number of levels", ylabel="SNR, dB")
    axes.set(title="Test sounds from the first levels alone")
    return _png(figure)


def _png(picture: Figure | Image.Image) -> bytes:
    file = io.BytesIO()
    if isinstance(picture, Figure):
        picture.savefig(file, format="png", dpi=100)
    else:
        picture.save(file, "PNG")
    return file.getvalue()
