"""Figures of the examples, undrawn: to draw them takes longer than a training in a test."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from PIL import Image

# examples are scripts, not a package; there they import one another by their bare names
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
plots = importlib.import_module("plots")
as_png = plots._png


def undrawn(picture: Figure | Image.Image) -> bytes:
    """What the lines, bars and words of a figure are; two drawings differ where these do."""
    if not isinstance(picture, Figure):
        return as_png(picture)
    drawn = [
        [line.get_xydata().tolist() for line in axes.lines]
        + [bar.get_bbox().bounds for bar in axes.patches]
        + [axes.get_title(), axes.get_xlabel(), axes.get_ylabel(), axes.get_xlim()]
        for axes in picture.axes
    ]
    return repr(drawn).encode()


def leave_undrawn(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(plots, "_png", undrawn)
