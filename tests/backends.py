"""The backends that this process can test."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from conftest import INTERPRETED


class Backend(NamedTuple):
    name: str
    device: str


BACKENDS = [] if INTERPRETED else [Backend("torch", "cpu")]
if INTERPRETED:
    BACKENDS.append(Backend("triton", "cpu"))
elif torch.cuda.is_available():
    BACKENDS.append(Backend("triton", "cuda"))

on_every_backend = pytest.mark.parametrize(
    "backend", BACKENDS, ids=lambda b: f"{b.name}-{b.device}"
)
EXACT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
