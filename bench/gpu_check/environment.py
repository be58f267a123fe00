"""Where the figures come from."""

from __future__ import annotations

import subprocess
import sys

import torch

from bench import provenance
from bench.devices import make_device
from bench.gpu_check.check import Check
from vqtriton.environment import describe

QUERY = (
    "name,driver_version,memory.total,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,"
    "temperature.gpu,power.draw,utilization.gpu"
)


def run(check: Check) -> str:
    print(describe())
    device = make_device(check.device.type)
    # by its own name: CUDA_VISIBLE_DEVICES may have renumbered it
    gpu = None if check.is_dry else f"GPU-{torch.cuda.get_device_properties(0).uuid}"
    before = nvidia_smi(gpu)
    rates = device.rates()
    commit = provenance.commit()
    check.note(
        device=device.name,
        driver=device.driver,
        python=sys.version.split()[0],
        torch=str(torch.__version__),
        triton=provenance.version("triton"),
        commit=commit,
        copy_bytes_per_s=rates.memory,
        matmul_flop_per_s=rates.dot,
        nvidia_smi_before=before,
        # right after the matmuls: the clocks under load, nearly
        nvidia_smi_after=nvidia_smi(gpu),
    )
    return (
        f"{device.name}, driver {device.driver}, torch {torch.__version__}, "
        f"Triton {provenance.version('triton')}, {commit}; copy {rates.memory / 1e9:.3g} GB/s, "
        f"matmul {rates.dot / 1e12:.3g} TFLOP/s"
    )


def nvidia_smi(gpu: str | None) -> dict[str, str] | None:
    """What it reads, by name; None where there is none."""
    if gpu is None:
        return None
    command = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader", f"--id={gpu}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    values = [value.strip() for value in done.stdout.strip().split(",")]
    return dict(zip(QUERY.split(","), values, strict=False))
