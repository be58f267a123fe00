"""Instructions per (row, code) pair of the screen's hot loop, from the machine code; no GPU needed.

python tests/screen_counts.py [--target sm_90 ...] [--dim 64 ...] [--set block_k=128 group=16 ...]

prints one line per case: Triton version, target, D, instructions on the ALU (compare, min, max,
select, integer, logic, and moves that are not IMAD.MOV) and in all per pair, registers, bytes
spilled, bytes of shared memory. The hot loop is the largest loop with an MMA in it; the tiles that
it holds are counted from its MMAs. Streamed rows (D > 256) have the epilogue inside the loop over
parts of D, so that no number per pair can be read off; nor can it for gfx942.
"""

from __future__ import annotations

import argparse
import collections
import re

import torch
import triton
from compiling import TARGETS, Compiled, Launch, Recorder, compile_launch

from vqtriton.kernels import screen_codes as module
from vqtriton.planes import inner_size, prepare_planes, screen_bound

ALU = re.compile(
    r"(FMNMX|IMNMX|VIMNMX|FSETP|ISETP|SEL|FSEL|LOP3|IADD|LEA|SHF|PRMT|PLOP3|MOV$|VIADD|SGXT|BMSK"
    r"|IABS|R2P|P2R|CS2R)"
)
DIMS = (4, 8, 12, 32, 64, 128, 256, 512, 1024)


def launches_of(
    target: str,
    dim: int,
    layout: str = "contiguous",
    group: int = 8,
    splits: int = 1,
    dtype: torch.dtype = torch.float32,
    **changes,
) -> list[Launch]:
    """What is launched for ``target``, of `kernels/screen_codes.py`'s own choosing."""
    # consumer Blackwell multiplies as Ampere does
    kind = {"sm_120": "sm_80"}.get(target, target)
    lanes, vec = module.ACCUMULATOR_ORDER[kind]
    planes = prepare_planes(torch.randn(1, 300, dim), group=group, lanes=lanes, vec=vec)
    x = torch.zeros(1, 256, dim, dtype=dtype)
    if layout == "strided":
        x = torch.zeros(1, dim, 255, dtype=dtype).transpose(1, 2)
    config = module.screen_codes_config(kind, inner_size(dim)[0], module.rows_are_aligned(x))
    fields = {k: getattr(config, k) for k in config.__dataclass_fields__} | changes
    config = module.ScreenCodesConfig(**fields)
    launches: list[Launch] = []
    kernels = module.screen_codes_kernel, module.merge_splits_kernel
    module.screen_codes_kernel, module.merge_splits_kernel = (
        Recorder(kernel, launches) for kernel in kernels
    )
    try:
        bound = screen_bound(planes, config.block_k)
        module.screen_codes(x, planes, bound, splits=splits, config=config)
    finally:
        module.screen_codes_kernel, module.merge_splits_kernel = kernels
    return launches


def hot_loop(sass: str) -> collections.Counter:
    """Instructions of the largest loop with an MMA, by name."""
    lines = sass.splitlines()
    labels, best = {}, collections.Counter()
    for number, line in enumerate(lines):
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = number
        branch = re.search(r"BRA\S*\s.*`\((\.L_x_\d+)\)", line)
        if not branch or branch[1] not in labels:
            continue
        body = "\n".join(lines[labels[branch[1]] : number + 1])
        names = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+\s+)?([A-Z][\w.]*)", body)
        # ptxas moves with either pipe
        names = [n if n.startswith("IMAD.MOV") else n.split(".")[0] for n in names]
        if any("MMA" in n for n in names) and len(names) > best.total():
            best = collections.Counter(names)
    return best


def counts(launch: Launch, result: Compiled, target: str) -> tuple[float, float] | None:
    """ALU instructions and all instructions per pair of row and code."""
    options = launch.kwargs
    if target == "gfx942" or not options["HOLD_ROWS"]:
        return None
    loop = hot_loop(result.assembly)
    block_n, block_k, warps = options["BLOCK_N"], options["BLOCK_K"], options["num_warps"]
    steps = options["INNER"] / 16
    mma_per_tile = {
        "sm_80": block_n / 16 * block_k / 8 * steps / warps,
        "sm_90": block_n / 64 * steps / (warps / 4),
        "sm_100": block_n / 128 * steps,
    }[target]
    mma = sum(number for name, number in loop.items() if name in ("HMMA", "HGMMA", "UTCHMMA"))
    # scores tell tiles apart where the MMAs of a tile run apart from its epilogue
    tiles = mma / mma_per_tile
    adds = loop["FADD"] + 2 * loop["FADD2"]
    if adds and not options["BIAS_COLUMNS"]:
        tiles = adds / (block_n * block_k / (warps * 32))
    pairs = tiles * block_n * block_k / (warps * 32)
    alu = sum(number for name, number in loop.items() if ALU.match(name))
    return alu / pairs, loop.total() / pairs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", nargs="+", default=["sm_90"], choices=list(TARGETS))
    parser.add_argument("--dim", nargs="+", type=int, default=DIMS)
    parser.add_argument("--layout", nargs="+", default=["contiguous"])
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE")
    arguments = parser.parse_args()
    changes = {name: int(value) for name, value in (item.split("=") for item in arguments.set)}
    for target in arguments.target:
        for layout in arguments.layout:
            for dim in arguments.dim:
                launch = launches_of(target, dim, layout, **changes)[0]
                result = compile_launch(launch, target)
                per_pair = counts(launch, result, target)
                text = "ALU {:.2f} all {:.2f}".format(*per_pair) if per_pair else "-"
                print(
                    f"triton {triton.__version__} {target} D={dim} {layout} {text} "
                    f"registers {result.registers} spilled {result.spilled_bytes} "
                    f"shared {result.shared}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
