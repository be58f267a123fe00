"""The backends that this process can test."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from conftest import DEVICE, INTERPRETED, REAL_DEVICE


class Backend(NamedTuple):
    name: str
    device: str


BACKENDS = [] if INTERPRETED else [Backend("torch", "cpu")]
if INTERPRETED or torch.cuda.is_available():
    BACKENDS.append(Backend("triton", DEVICE))
REAL_BACKENDS = [
    backend._replace(device=REAL_DEVICE) if backend.device == DEVICE else backend
    for backend in BACKENDS
]


def on_each(backends: list[Backend]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("backend", backends, ids=lambda b: f"{b.name}-{b.device}")


on_every_backend = on_each(BACKENDS)
# where the stub cannot play the GPU: torch.compile, torch.export, autocast
on_every_real_backend = on_each(REAL_BACKENDS)
EXACT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
