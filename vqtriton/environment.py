"""What a bug report needs to say about where the library runs."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from vqtriton import blocked, ops
from vqtriton._version import __version__


def describe() -> str:
    """Versions, devices, backends and tables in use, a line each."""
    lines = [("vqtriton", __version__), ("python", platform.python_version())]
    lines.append(("platform", platform.platform()))
    for package in ("torch", "triton", "einops", "safetensors", "numpy"):
        try:
            lines.append((package, version(package)))
        except PackageNotFoundError:
            lines.append((package, "not installed"))
    lines.append(("cuda / hip", f"{torch.version.cuda} / {torch.version.hip}"))
    devices = ["cpu"]
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(i)
            devices.append(
                f"cuda:{i} {gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, "
                f"{gpu.multi_processor_count} SMs"
            )
    lines += [("device", device) for device in devices]
    lines.append(("cpu threads", str(torch.get_num_threads())))
    lines.append(("triton interpreter", "on" if ops.interpreter_is_on() else "off"))
    for device_type in ("cpu", "cuda"):
        lines.append((f"backend on {device_type}", _backend(device_type)))
    rounds = blocked.matmul_input_roundoff(torch.device("cpu"), torch.float32) > 0
    lines.append(("float32 matmul", "inputs rounded" if rounds else "float32"))
    lines.append(("tables", "none: the defaults in vqtriton.kernels"))
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in lines)


def _backend(device_type: str) -> str:
    if device_type == "cuda" and not torch.cuda.is_available():
        return "no such device"
    device = torch.device(device_type)
    automatic = ops.resolve_backend("auto", device)
    try:
        ops.resolve_backend("triton", device)
    except (ValueError, ModuleNotFoundError):
        return f"{automatic} (auto); no kernels"
    return f"{automatic} (auto); kernels can run"
