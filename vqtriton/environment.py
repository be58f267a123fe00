"""What a bug report needs to say about where the library runs."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

import torch

from vqtriton import dispatch
from vqtriton._version import __version__
from vqtriton.screening import matmul_input_roundoff
from vqtriton.tiles import tables
from vqtriton.tiles.problems import problem_for


def describe(shapes: Sequence[tuple[int, int, int, str]] = ()) -> str:
    """Versions, devices, backends and tables of tiles in use, a line each, for a bug report.

    ``python -m vqtriton env`` prints it.

    Args:
        shapes: ``(N, K, D, dtype)`` of searches, dtype as a string. For each, the tiles that the
            kernels use are added.

    Returns:
        The lines, joined.

    Example:
        >>> from vqtriton.environment import describe
        >>> print(describe())  # doctest: +ELLIPSIS
        vqtriton ...
    """
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
    lines.append(("triton interpreter", "on" if dispatch.interpreter_is_on() else "off"))
    for device_type in ("cpu", "cuda"):
        lines.append((f"backend on {device_type}", _backend(device_type)))
    rounds = matmul_input_roundoff(torch.device("cpu"), torch.float32) > 0
    lines.append(("float32 matmul", "inputs rounded" if rounds else "float32"))
    lines += _tables(shapes)
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in lines)


def _tables(shapes: Sequence[tuple[int, int, int, str]]) -> list[tuple[str, str]]:
    """Which tables there are, and the tiles for some shapes."""
    if not dispatch.triton_is_installed():
        return [("tables", "none: no Triton")]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    paths = [
        folder / tables.file_name(name)
        for folder in tables.folders()
        for name in tables.device_names(device)
    ]
    found = [f"{path}, {len(tables.rows_of(path))} shapes" for path in paths if path.exists()]
    lines = [("tables", path) for path in found or ["none: the defaults in vqtriton.kernels"]]
    if shapes:
        from vqtriton.kernels.screen_tiles import architecture
        from vqtriton.tiles.candidates import TILES

        for n, k, d, dtype in shapes:
            for op, tiles in TILES.items():
                problem = problem_for(op, n, k, d, dtype)
                try:
                    row = tables.find(problem, device)
                    default = tiles.default(architecture(device), d)
                except ValueError as error:
                    lines.append((f"{problem}", f"not for the kernels: {error}"))
                    continue
                config = (row and row[1]) or default
                origin = f"{row[0]['source']}, {row[2].name}" if row else "default"
                lines.append((f"{problem}", f"{config} ({origin})"))
    return lines


def _backend(device_type: str) -> str:
    if device_type == "cuda" and not torch.cuda.is_available():
        return "no such device"
    device = torch.device(device_type)
    automatic = dispatch.resolve_backend("auto", device)
    try:
        dispatch.resolve_backend("triton", device)
    except (ValueError, ModuleNotFoundError):
        return f"{automatic} (auto); no kernels"
    return f"{automatic} (auto); kernels can run"
