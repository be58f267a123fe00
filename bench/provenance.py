"""Where figures come from: device, versions, commit."""

from __future__ import annotations

import functools
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as version_of
from pathlib import Path

ROOT = Path(__file__).parents[1]


def processor() -> str:
    """Name of the processor."""
    try:
        info = Path("/proc/cpuinfo").read_text()
    except FileNotFoundError:
        return platform.processor() or platform.machine()
    models = [line.split(":", 1)[1].strip() for line in info.splitlines() if "model name" in line]
    return models[0] if models else platform.machine()


@functools.cache
def commit() -> str:
    """Short hash of the checkout, "-dirty" where files had changed when it was first asked for.

    It is asked for once, so a result file that is written later does not make it dirty. A copy
    without a repository of its own has no commit, unless the variable VQTRITON_COMMIT names one.
    """
    top = _output(["git", "rev-parse", "--show-toplevel"])
    if top is None or Path(top).resolve() != ROOT.resolve():
        return os.environ.get("VQTRITON_COMMIT", "no commit")
    command = ["git", "--no-optional-locks", "describe", "--always", "--dirty", "--exclude=*"]
    return _output(command) or "no commit"


def driver() -> str | None:
    """Version of NVIDIA's driver."""
    # a line for each GPU, all alike
    lines = _output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
    return lines.splitlines()[0] if lines else None


def version(package: str) -> str | None:
    """None where it is not installed."""
    try:
        return version_of(package)
    except PackageNotFoundError:
        return None


def _output(command: list[str]) -> str | None:
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=20
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
