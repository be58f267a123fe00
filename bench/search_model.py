"""How long a whole exact search is predicted to take on an H200: ``python -m bench.search_model``.

No GPU is needed. The screen's own time is that of `vqtriton.tuning.machines`, which was fitted to
measured times. What follows the screen in its program is priced alike, by the instructions that
were counted, and by the loads that wait for one another. The launches before and after it are
priced by such waits, and by the float64 of the rescue. What a wait takes was not fitted: `TRIP`,
`LAUNCH` and `ADD` are assumptions.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch

from bench import cases
from bench.sass_kernels import codebook_of
from vqtriton.kernels import nearest_code, screen_codes, screen_tiles
from vqtriton.kernels.grids import cdiv
from vqtriton.planes import inner_size, prepare_planes, screen_bound
from vqtriton.screening import error_bound
from vqtriton.tiles.problems import Problem
from vqtriton.tuning.compiling import Launch, compile_launch, launches_of
from vqtriton.tuning.disassembly import Disassembly, Loop
from vqtriton.tuning.machines import (
    ARCHITECTURES,
    H100,
    SCREEN_COSTS,
    Shape,
    floors,
    predict_screen,
    screen_terms,
)
from vqtriton.tuning.tunables import TUNABLES, screen_work

TARGET = "sm_90"
# microseconds: a load from the L2 cache and what it takes to know the next address; a kernel in a
# graph that does nothing; an addition in float64 that waits for the one before
TRIP, LAUNCH, ADD = 0.5, 1.2, 0.01
# conversions to float64 in a clock of a multiprocessor
CONVERSIONS = 16
# at most so many rows in doubt, and rows that are searched again: see docs/design.md
DOUBT, SEARCHED = 0.037, 0.005


@dataclass(frozen=True)
class Case:
    """A search, what it took at commit 30cd9e3 in a graph or eagerly, and a goal, in µs."""

    name: str
    num_rows: int
    codebook_size: int
    dim: int
    dtype: torch.dtype
    before: float
    goal: float


def of_model(name: str, before: float, goal: float) -> Case:
    """A shape of `bench.cases`, in float32."""
    case = cases.CASES[name]
    return Case(name, case.num_rows, case.codebook_size, case.dim, torch.float32, before, goal)


F32, F16 = torch.float32, torch.float16
CASES = (
    of_model("encodec", 87, 30),
    of_model("taming", 130, 40),
    of_model("mimi", 127, 40),
    of_model("titok", 43, 28),
    of_model("llamagen", 147, 95),
    of_model("rotation-f8", 88, 50),
    of_model("vit-vqgan", 132, 85),
    Case("1M×1024×64", 2**20, 1024, 64, F16, 2850, 700),
    Case("1M×16384×128", 2**20, 16384, 128, F16, 11700, 9000),
    Case("64K×65536×256", 2**16, 65536, 256, F16, 7500, 5300),
    Case("256K×4096×512", 2**18, 4096, 512, F16, 6000, 3400),
)


def launches(case: Case) -> dict[str, Launch]:
    """By name of the kernel, with the tiles that the case gets."""
    x = torch.zeros(1, 48, case.dim, dtype=case.dtype)
    codebook = codebook_of(case.dim).repeat(16, 1)[None]
    planes = prepare_planes(codebook)
    is_few = cdiv(case.num_rows, 128) < 2 * H100.multiprocessors
    unit = screen_tiles.row_unit(x)
    config = nearest_code.nearest_code_config(TARGET, planes.codes.shape[2], unit, is_few=is_few)
    found = launches_of(
        (screen_codes, nearest_code),
        nearest_code.nearest_code,
        x,
        codebook,
        planes,
        screen_bound(planes, config.screen.block_k),
        error_bound(case.dim, torch.float32),
        exact=True,
        splits=1 if splits_of(case, config.screen) == 1 else 2,
        config=config,
    )
    return {launch.name: launch for launch in found}


def splits_of(case: Case, config: screen_tiles.ScreenCodesConfig) -> int:
    """Parts of the codes."""
    inner = inner_size(case.dim)[0]
    tiles = cdiv(case.codebook_size, config.block_k)
    programs = cdiv(case.num_rows, config.block_n)
    tile_bytes = 2 * inner * config.block_k
    return screen_tiles.choose_splits(programs, tiles, tile_bytes, H100.multiprocessors, inner)


def resident(launch: Launch) -> int:
    """CTAs that a multiprocessor holds."""
    compiled = compile_launch(launch, TARGET)
    architecture = ARCHITECTURES[TARGET]
    return architecture.resident_ctas(compiled.registers, compiled.shared, compiled.num_warps)


def finish_cost(launch: Launch) -> tuple[float, float]:
    """Instructions of a row after the screen's loop, by all its threads; trips that wait.

    Loops are told apart by their loads: a turn over some dimensions loads x and a group of codes,
    or x, a code and the mean. The loop around both runs once for each part of a tile of rows.
    """
    values = launch.values
    compiled = compile_launch(launch, TARGET)
    found = Disassembly(compiled.assembly)
    after = 0
    if launch.name == "screen_codes":
        blocks = enumerate(found.blocks)
        after = 1 + max(n for n, b in blocks if any(i.pipe == "mma" for i in b.instructions))

    def loads(loop: Loop) -> int:
        return sum(i.name == "LDG" for b in loop.blocks for i in found.blocks[b].instructions)

    own = [loop for loop in found.loops if min(loop.blocks) >= after]
    innermost = [a for a in own if not any(b.blocks < a.blocks for b in own)]
    turns = cdiv(values["D"], values["FINISH_D"])
    parts = values["BLOCK_N"] // values["FINISH_N"]
    group = values["GROUP"]
    trips_of: dict[frozenset[int], float] = {}
    waits = 0.0
    for loop in innermost:
        number = loads(loop)
        if number >= group + 1 and number % (group + 1) == 0:
            trips = turns / (number / (group + 1))
        elif number >= 3 and number % 3 == 0:
            trips = turns / (number / 3)
        else:
            # rows that are not finite
            trips = 0
        trips_of[loop.blocks] = trips
        waits += trips
    around = [a for a in own if a not in innermost and any(b.blocks < a.blocks for b in innermost)]
    total = 0.0
    for number, block in enumerate(found.blocks):
        if number < after:
            continue
        times = 1.0
        for blocks, trips in trips_of.items():
            times *= trips if number in blocks else 1
        if any(number in loop.blocks for loop in around):
            times *= parts
        total += times * len(block.instructions)
    threads = 32 * compiled.num_warps
    # its group and scale, what is passed on, the lists
    return total * threads / values["BLOCK_N"], parts * (waits + 4) + 6


def predict(case: Case) -> dict[str, float]:
    """Microseconds of each part."""
    of_kernels = launches(case)
    screen = of_kernels["screen_codes"]
    values = screen.values
    compiled = compile_launch(screen, TARGET)
    pairs = values["BLOCK_N"] * values["BLOCK_K"] / (32 * compiled.num_warps)
    work = screen_work(screen)
    loop = Disassembly(compiled.assembly).hot_loop(pairs, work.inner)
    if loop is None:
        raise ValueError("the loop of the screen cannot be counted")
    shape = Shape(case.num_rows, case.codebook_size, case.dim)
    least = floors(shape, work, loop.counts.get("alu", 0) / loop.pairs, loop.total / loop.pairs)
    dtype = str(case.dtype).removeprefix("torch.")
    problem = Problem("nearest_code", dtype, case.dim, case.codebook_size, case.num_rows)
    config = screen_tiles.ScreenCodesConfig(block_n=values["BLOCK_N"], block_k=values["BLOCK_K"])
    unevenness: Any = TUNABLES["nearest_code"].unevenness
    uneven = unevenness(problem, config, H100.multiprocessors)
    found = {
        "screen": 1e3 * predict_screen(screen_terms(least, work.inner, resident(screen), uneven))
    }

    finish = of_kernels.get("finish_parts", screen)
    instructions, waits = finish_cost(finish)
    clocks = H100.clock * H100.multiprocessors
    issue = case.num_rows * instructions / (H100.issue * clocks)
    programs = cdiv(case.num_rows, values["BLOCK_N"])
    # programs that share a multiprocessor wait at the same time; with several turns, while others
    # go on
    ctas = resident(finish)
    turns = cdiv(programs, ctas * H100.multiprocessors)
    in_turns = waits * TRIP * (turns / ctas if turns > 1 else 1)
    found["finish"] = max(1e6 * SCREEN_COSTS["issue"] * issue, in_turns)
    if finish is not screen:
        # the codes of a group, from the L2 cache
        group_bytes = 4 * case.dim * values["GROUP"]
        found["finish"] = LAUNCH + max(found["finish"], 1e6 * case.num_rows * group_bytes / H100.l2)

    found["rescue"] = LAUNCH + _rescue(case, of_kernels["rescue_rows"].values, found["screen"])
    # a launch, or two for a large codebook, each with a few waits
    elements = case.codebook_size * inner_size(case.dim)[0]
    found["planes"] = (LAUNCH + 5 * TRIP) * (1 + (elements > 2**18)) + 1e6 * 6 * elements / H100.l2
    return found


def _rescue(case: Case, values: dict[str, Any], screen_us: float) -> float:
    """Programs that settle known rows, and those that search, at the same time."""
    known = case.num_rows * DOUBT
    # lists, rows, counts, groups; 16 dimensions at a time; what is written; the counter
    programs = 2 * H100.multiprocessors
    rounds = max(1, cdiv(int(known), programs * values["KNOWN_N"]))
    of_round = (4 + case.dim / 16 + case.dim / values["GATHER_D"]) * TRIP + case.dim * ADD
    converted = known * 2 * values["GROUP"] * case.dim * 2
    clocks = H100.clock * H100.multiprocessors
    settle = max(rounds * of_round, 1e6 * converted / (CONVERSIONS * clocks)) + 2 * TRIP
    # lists, rows, planes; tiles of codes; the list; dimensions; merge, write, counter
    spans = cdiv(case.num_rows, 2048)
    splits = max(1, min(programs // spans, cdiv(case.codebook_size, values["BLOCK_K"])))
    tiles = cdiv(cdiv(case.codebook_size, values["BLOCK_K"]), splits)
    blocks = max(1, cdiv(int(case.num_rows * SEARCHED / spans), values["BLOCK_N"]))
    loads = case.dim / (4 * values["SEARCH_CHUNKS"])
    of_block = (6 + tiles * cdiv(case.dim, 128) + 3 + loads) * TRIP + case.dim * ADD
    search = cdiv(spans * splits, programs) * blocks * of_block + 6 * TRIP
    # as rows of a screen they cost as much as others, in tiles that are not full
    return max(settle, search, 4 * SEARCHED * screen_us)


def main() -> int:
    print("| search | at 30cd9e3 | screen | finish | rescue | planes | all | goal |")
    print("|---|---|---|---|---|---|---|---|")
    for case in CASES:
        found = predict(case)
        cells = [found[part] for part in ("screen", "finish", "rescue", "planes")]
        row = [case.before, *cells, sum(cells), case.goal]
        print(f"| {case.name} | " + " | ".join(f"{value:.4g}" for value in row) + " |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
