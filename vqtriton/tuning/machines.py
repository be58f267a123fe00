"""What the targets hold, and the least time that a kernel's instruction counts allow.

Sources: "Technical Specifications per Compute Capability" and "Arithmetic Instructions" in the CUDA
C++ Programming Guide; for gfx942 the CDNA3 instruction set manual and LLVM's AMDGPU backend.
"""

from __future__ import annotations

from dataclasses import dataclass

KIB = 1024


@dataclass(frozen=True)
class Architecture:
    """Limits of one multiprocessor (SM, or CU): four schedulers, each with registers of its own."""

    # 32-bit registers of a scheduler; warps get them in multiples of the unit
    registers: int
    register_unit: int
    warp_size: int
    # at most, of a scheduler
    warps: int
    # at most, of the multiprocessor
    ctas: int
    shared: int
    # of that, one CTA may use
    shared_limit: int
    # what a CTA takes beyond what it asks for, and the unit in which it gets it
    shared_reserved: int
    shared_unit: int
    # columns of tensor memory
    tensor_memory: int = 0

    def resident_ctas(
        self, registers: int, shared: int, num_warps: int, tensor_memory: int = 0
    ) -> int:
        """CTAs that one multiprocessor holds at a time; 0 if it cannot hold one.

        Args:
            registers: of a thread.
            shared: bytes of a CTA.
            num_warps: of a CTA.
            tensor_memory: columns of a CTA.
        """
        if shared > self.shared_limit:
            return 0
        of_warp = round_up(max(registers, 1) * self.warp_size, self.register_unit)
        warps = 4 * min(self.warps, self.registers // of_warp)
        of_cta = round_up(shared + self.shared_reserved, self.shared_unit)
        limits = [self.ctas, warps // num_warps]
        if of_cta:
            limits.append(self.shared // of_cta)
        if tensor_memory:
            limits.append(self.tensor_memory // tensor_memory)
        return min(limits)


def round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def nvidia(shared: int, warps: int = 16, ctas: int = 32, tensor_memory: int = 0) -> Architecture:
    """64 Ki registers; of shared memory 1 KiB goes to the system for each CTA."""
    return Architecture(
        registers=16 * KIB,
        register_unit=256,
        warp_size=32,
        warps=warps,
        ctas=ctas,
        shared=shared * KIB,
        shared_limit=(shared - 1) * KIB,
        shared_reserved=KIB,
        shared_unit=128,
        tensor_memory=tensor_memory,
    )


ARCHITECTURES = {
    "sm_80": nvidia(164),
    "sm_90": nvidia(228),
    "sm_100": nvidia(228, tensor_memory=512),
    "sm_120": nvidia(100, warps=12, ctas=24),
    # 512 registers of a lane, in eights; no more than 16 barriers
    "gfx942": Architecture(
        registers=512 * 64,
        register_unit=8 * 64,
        warp_size=64,
        warps=8,
        ctas=16,
        shared=64 * KIB,
        shared_limit=64 * KIB,
        shared_reserved=0,
        shared_unit=512,
    ),
}


@dataclass(frozen=True)
class Rates:
    """What a device reaches in a second."""

    # operations of a matmul
    dot: float
    # bytes
    memory: float

    def best(self, other: Rates) -> Rates:
        return Rates(max(self.dot, other.dot), max(self.memory, other.memory))

    def floors(self, num_bytes: float, num_products: float) -> dict[str, float]:
        """Least seconds, by what they would be spent on; no work is done faster than the larger."""
        return {"memory": num_bytes / self.memory, "dot": 2 * num_products / self.dot}


@dataclass(frozen=True, kw_only=True)
class Machine(Rates):
    """What a GPU can do in a second; dot is of float16 with float32 sums."""

    clock: float
    multiprocessors: int
    # per clock of a multiprocessor: lanes of the ALU pipe, and lanes of which a warp is issued
    alu: int
    issue: int
    # bytes
    l2: float


# an H100 SXM: dot and memory are what a matmul and a copy reach there, the clock is assumed, and L2
# is what a screen with tiles of 64 rows read on an H200, at D = 512
H100 = Machine(
    dot=798e12, memory=3.0e12, clock=1.755e9, multiprocessors=132, alu=64, issue=128, l2=7.1e12
)

# targets for which `predict_screen` was held to measured times
MACHINES = {"sm_90": H100}


@dataclass(frozen=True)
class Shape:
    """A search, and what flash-kmeans 0.3.1 publishes for it, in ms on an H100."""

    num_rows: int
    codebook_size: int
    dim: int
    flash_kmeans: float | None = None


MI = 2**20
SHAPES = (
    Shape(MI, 1024, 8),
    Shape(MI // 4, 16384, 8),
    Shape(MI, 1024, 64, 0.599),
    Shape(MI // 16, 1024, 128, 0.0635),
    Shape(MI, 16384, 128, 11.07),
    Shape(MI // 4, 65536, 256, 23.0),
    Shape(MI // 16, 200_000, 256, 16.9),
    Shape(MI // 4, 4096, 512, 2.79),
)


@dataclass(frozen=True)
class Work:
    """What a kernel does for a (row, code) pair, whatever the compiler makes of it."""

    # rows of a CTA: the codes are streamed through L2 once for each
    block_n: int
    # bytes of a code, as streamed
    code_bytes: int
    # products of a pair, padding included
    inner: int
    # whether tensor cores make the products
    uses_mma: bool
    # bytes of rows that are streamed with each code, where a CTA cannot hold its rows
    row_bytes: float = 0.0


def floors(
    shape: Shape, work: Work, alu_per_pair: float, total_per_pair: float, machine: Machine = H100
) -> dict[str, float]:
    """Least milliseconds of a search, by what it would wait for; the largest is the floor.

    memory: x in and quantized out, 2 bytes an element each, 4 bytes of index, the codes once.
    dot: the products on tensor cores. L2: the codes, once for each block of rows, and the rows that
    are read again.
    alu, issue: instructions per pair, over lanes per clock; the FMA pipe has as many lanes as are
    issued, so that issue is its floor too.
    """
    pairs = shape.num_rows * shape.codebook_size
    clocks = machine.clock * machine.multiprocessors
    codes = shape.codebook_size * work.code_bytes
    blocks = -(-shape.num_rows // work.block_n)
    num_bytes = shape.num_rows * (4 * shape.dim + 4) + codes
    seconds = {
        **machine.floors(num_bytes, pairs * work.inner if work.uses_mma else 0.0),
        "L2": blocks * (codes + shape.codebook_size * work.row_bytes) / machine.l2,
        "alu": pairs * alu_per_pair / (machine.alu * clocks),
        "issue": pairs * total_per_pair / (machine.issue * clocks),
    }
    return {name: 1e3 * value for name, value in seconds.items()}


# what each of `screen_terms` costs: least squares of measured times, by `python -m bench.fit`
SCREEN_COSTS = {"start": 3.15, "inner": 2.2, "memory": 0.793, "issue": 1.84, "lone_dot": 1.17}


def screen_terms(
    least: dict[str, float], inner: int, ctas: int, unevenness: float
) -> dict[str, float]:
    """What the time of a screen is the sum of, in milliseconds, each times its cost.

    start, inner: a launch, and until the first rows and codes are there. lone_dot: a CTA waits for
    its dot products, while another one on the multiprocessor may have work. L2 explains nothing
    that these leave open.

    Args:
        least: of `floors`.
        inner: products of a pair.
        ctas: that a multiprocessor holds at a time.
        unevenness: how many times as much the busiest multiprocessor has to do as all on average.
    """
    return {
        "start": 0.001,
        "inner": 0.001 * inner / 128,
        "memory": least["memory"],
        "issue": unevenness * least["issue"],
        "lone_dot": unevenness * least["dot"] / ctas,
    }


def predict_screen(terms: dict[str, float], costs: dict[str, float] = SCREEN_COSTS) -> float:
    """Milliseconds."""
    return sum(costs[name] * value for name, value in terms.items())
