"""Compiles kernels without a GPU, exactly as their launchers launch them.

A recorder stands in for the kernel, the launcher runs on CPU tensors, and what it passed (types,
values, alignment, options) becomes the signature that the compiler gets.
"""

from __future__ import annotations

import contextlib
import functools
import re
import subprocess
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

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
OPTIONS = ("num_warps", "num_stages", "num_ctas", "enable_fp_fusion", "maxnreg")
POINTERS = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int16: "*i16",
    torch.uint8: "*u8",
    torch.bool: "*i1",
}

# Triton parses the source of a kernel, and of the functions that it calls, with `ast.parse`, which
# fails by chance where two threads of Python 3.11 call it at once
_parsing = threading.RLock()


@dataclass
class Launch:
    """One call of a kernel."""

    kernel: Any
    args: tuple
    kwargs: dict[str, Any]

    @property
    def name(self) -> str:
        """Of the kernel, short."""
        return self.kernel.__name__.removesuffix("_kernel")

    @property
    def values(self) -> dict[str, Any]:
        """What each parameter of the kernel gets."""
        given = {k: v for k, v in self.kwargs.items() if k not in OPTIONS}
        return dict(zip(self.kernel.arg_names, self.args, strict=False)) | given

    @property
    def options(self) -> dict[str, Any]:
        """What the compiler gets."""
        return {k: v for k, v in self.kwargs.items() if k in OPTIONS}


class Recorder:
    """Stands in for a kernel: `recorder[grid](*args, **kwargs)` is noted, not run."""

    def __init__(self, kernel: Any, launches: list[Launch]) -> None:
        self.kernel = kernel
        self.launches = launches

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *args, **kwargs: self.launches.append(Launch(self.kernel, args, kwargs))


def launches_of(
    modules: ModuleType | Sequence[ModuleType], launcher: Callable, *args: Any, **kwargs: Any
) -> list[Launch]:
    """What the launcher would launch by the names of kernels in ``modules``.

    Raises:
        ValueError: it launches nothing.
    """
    launches: list[Launch] = []
    with contextlib.ExitStack() as stack:
        for module in modules if isinstance(modules, Sequence) else [modules]:
            for name in [name for name in vars(module) if name.endswith("_kernel")]:
                recorder = Recorder(getattr(module, name), launches)
                stack.enter_context(mock.patch.object(module, name, recorder))
        launcher(*args, **kwargs)
    if not launches:
        raise ValueError(f"{launcher.__name__} launched nothing")
    return launches


@dataclass
class Compiled:
    """What the checks read."""

    ttir: str
    num_warps: int
    # bytes of a CTA
    shared: int
    # of a thread; on gfx942 both kinds of vector registers
    registers: int
    # of a thread
    spilled_bytes: int
    # columns of a CTA, on targets that have it
    tensor_memory: int
    binary: bytes | str

    @functools.cached_property
    def assembly(self) -> str:
        """SASS or AMD assembly."""
        if isinstance(self.binary, str):
            return self.binary
        return run_cuda_tool("nvdisasm", ["-c"], self.binary)


class Source(ASTSource):
    """A kernel that threads may compile: those steps that parse are taken by one at a time.

    They are Python, so threads take turns with them in any case. The passes, LLVM and ptxas, where
    most of the time goes, run side by side.
    """

    def hash(self) -> str:
        with _parsing:
            return super().hash()

    def make_ir(self, *args: Any, **kwargs: Any) -> Any:
        with _parsing:
            return super().make_ir(*args, **kwargs)


def compile_launch(launch: Launch, target: str) -> Compiled:
    """May be called by several threads at once."""
    kernel, hip = launch.kernel, TARGETS[target].backend == "hip"
    signature, constants, attributes = {}, {}, {}
    values = launch.values
    for position, param in enumerate(kernel.params):
        value = values[param.name]
        may_specialize = not param.do_not_specialize
        is_one = may_specialize and type(value) is int and value == 1
        if param.is_constexpr or value is None or is_one:
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
    options = launch.options
    if hip:
        options.pop("maxnreg", None)
    source = Source(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=TARGETS[target], options=options)
    binary = compiled.asm["amdgcn" if hip else "cubin"]
    registers, spilled_bytes = amd_usage(binary) if hip else nvidia_usage(binary)
    return Compiled(
        compiled.asm["ttir"],
        compiled.metadata.num_warps,
        compiled.metadata.shared,
        registers,
        spilled_bytes,
        getattr(compiled.metadata, "tmem_size", None) or 0,
        binary,
    )


def nvidia_usage(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread, and the bytes that it spills: a Triton kernel has no other stack."""
    usage = run_cuda_tool("cuobjdump", ["-res-usage"], cubin)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise ValueError(f"cuobjdump told no registers: {usage[:200]}")
    registers, stack = int(found[1]), int(found[2])
    # ptxas may reserve a few bytes that no instruction uses
    if stack and not re.search(r"\b(?:LDL|STL)\b", run_cuda_tool("nvdisasm", ["-c"], cubin)):
        stack = 0
    return registers, stack


def amd_usage(assembly: str) -> tuple[int, int]:
    """The same, from the metadata at the end of AMD assembly."""
    registers, spilled, scratch = (
        int(re.findall(rf"^\s*\.{name}:\s+(\d+)", assembly, re.M)[0])
        for name in ("vgpr_count", "vgpr_spill_count", "private_segment_fixed_size")
    )
    return registers, max(4 * spilled, scratch)


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
