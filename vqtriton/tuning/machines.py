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


# an H100 SXM; dot and memory are what a matmul and a copy reach there, clock and L2 are assumed
H100 = Machine(
    dot=798e12, memory=3.0e12, clock=1.755e9, multiprocessors=132, alu=64, issue=128, l2=5.5e12
)

# an A100 SXM with 80 GB: the same parts of its data sheet's products and bytes that an H100 reaches
A100 = Machine(
    dot=252e12, memory=1.8e12, clock=1.41e9, multiprocessors=108, alu=64, issue=128, l2=3.6e12
)
# of the targets whose loops can be counted: sm_100 keeps the shape of its products in descriptors,
# and gfx942 has another assembly
MACHINES = {"sm_80": A100, "sm_90": H100}


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


def step_bytes(shape: Shape, element_size: int) -> dict[str, int]:
    """Bytes that each kernel of the rest of a training step has to move, once.

    sums: x, an order of 8 bytes a row, sums of 4 bytes. With the sort of the indices, whose radix
    passes read and write a key (of as many bytes as hold K) and a place of 8 bytes.
    grad_x: x, what comes back and what goes on, indices; the codes come out of L2.
    grad_codebook: as sums, and a gradient of 4 bytes a row.
    ema_update: codes (read and written), sums of the batch.
    """
    rows, size = shape.num_rows, shape.codebook_size
    vectors, codes = rows * shape.dim * element_size, 4 * size * shape.dim
    key = 1 if size < 2**8 else 2 if size < 2**15 else 4
    sort = 8 * rows + 2 * key * (key + 8) * rows
    return {
        "sums": sort + 8 * rows + vectors + codes,
        "grad_x": 3 * vectors + 8 * rows,
        "grad_codebook": sort + 12 * rows + vectors + 2 * codes,
        "ema_update": 3 * codes,
    }


def in_turns(least: dict[str, float]) -> float:
    """Milliseconds if dot and instructions take turns, because no other warps fill the gap."""
    return max(least["memory"], least["L2"], least["dot"] + max(least["alu"], least["issue"]))
