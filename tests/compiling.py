"""Compiles kernels without a GPU, exactly as their launchers launch them.

A recorder stands in for the kernel, the launcher runs on CPU tensors, and what it passed (types,
values, alignment, options) becomes the signature that the compiler gets.
"""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# bytes of shared memory that one program may use
SHARED_LIMIT = {
    "sm_80": 166_912,
    "sm_90": 232_448,
    "sm_100": 232_448,
    "sm_120": 101_376,
    "gfx942": 65_536,
}
OPTIONS = ("num_warps", "num_stages", "num_ctas", "enable_fp_fusion", "maxnreg")
POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.int32: "*i32",
}


@dataclass
class Launch:
    """One call of a kernel."""

    kernel: Any
    args: tuple
    kwargs: dict[str, Any]


class Recorder:
    """Stands in for a kernel: `recorder[grid](*args, **kwargs)` is noted, not run."""

    def __init__(self, kernel: Any, launches: list[Launch]) -> None:
        self.kernel = kernel
        self.launches = launches

    def __getitem__(self, grid: Any):
        return lambda *args, **kwargs: self.launches.append(Launch(self.kernel, args, kwargs))


@dataclass
class Compiled:
    """What the checks read."""

    ttir: str
    shared: int
    registers: int
    spilled_bytes: int
    binary: bytes | str

    @functools.cached_property
    def assembly(self) -> str:
        """SASS or AMD assembly."""
        if isinstance(self.binary, str):
            return self.binary
        return run_cuda_tool("nvdisasm", ["-c"], self.binary)


def compile_launch(launch: Launch, target: str) -> Compiled:
    kernel, hip = launch.kernel, TARGETS[target].backend == "hip"
    signature, constants, attributes = {}, {}, {}
    values = dict(zip(kernel.arg_names, launch.args, strict=False))
    values |= {k: v for k, v in launch.kwargs.items() if k not in OPTIONS}
    for position, param in enumerate(kernel.params):
        value = values[param.name]
        may_specialize = not param.do_not_specialize
        if param.is_constexpr or (may_specialize and type(value) is int and value == 1):
            signature[param.name] = "constexpr"
            constants[param.name] = value
            continue
        if isinstance(value, torch.Tensor):
            signature[param.name] = POINTERS[value.dtype]
            is_aligned = value.data_ptr() % 16 == 0
        elif isinstance(value, float):
            signature[param.name] = "fp32"
            is_aligned = False
        else:
            signature[param.name] = "i32" if abs(value) < 2**31 else "i64"
            is_aligned = may_specialize and value % 16 == 0
        if is_aligned:
            attributes[(position,)] = [["tt.divisibility", 16]]
    options = {k: v for k, v in launch.kwargs.items() if k in OPTIONS}
    if hip:
        options.pop("maxnreg", None)
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=TARGETS[target], options=options)
    ttir, shared = compiled.asm["ttir"], compiled.metadata.shared
    if hip:
        text = compiled.asm["amdgcn"]
        registers = int(re.search(r"NumVgprs: (\d+)", text)[1])
        return Compiled(
            ttir, shared, registers, int(re.search(r"ScratchSize: (\d+)", text)[1]), text
        )
    usage = run_cuda_tool("cuobjdump", ["-res-usage"], compiled.asm["cubin"])
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    return Compiled(ttir, shared, int(registers), int(stack), compiled.asm["cubin"])


def run_cuda_tool(name: str, flags: list[str], cubin: bytes) -> str:
    """Runs a tool that comes with Triton."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run(
            [tool, *flags, file.name], capture_output=True, text=True, check=True, timeout=60
        )
    return done.stdout
