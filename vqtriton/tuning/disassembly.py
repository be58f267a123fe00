"""Loops of a disassembled kernel, and what one iteration of them costs.

Reads what ``nvdisasm -c`` prints. A loop is a natural loop: found by its back edge in the graph of
basic blocks, so that it matters neither where the compiler laid its blocks nor which way it turned
the branches. All instructions of a loop count, on both sides of a branch inside it.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from dataclasses import dataclass

# Which pipe takes an instruction: "Pipelines" in the Nsight Compute documentation (ALU: bit
# manipulation, logic, compare, minimum, integers without IMAD and IMUL; FMA: float32 arithmetic,
# IMAD, IMUL, packed half; XU: transcendentals, conversions, POPC, FLO), and the instruction sets in
# "CUDA Binary Utilities" for what the names mean. The arithmetic throughput in the CUDA C++
# Programming Guide agrees: for 9.0 it has 64 a clock of comparisons and minima, 128 of FFMA.
PIPES = {
    "mma": """
        HMMA IMMA DMMA BMMA QMMA OMMA HGMMA IGMMA BGMMA QGMMA UTCHMMA UTCIMMA UTCQMMA UTCOMMA""",
    "fma": """
        FFMA FFMA2 FMUL FMUL2 FADD FADD2 FFMA32I FMUL32I FADD32I FHADD FHFMA FSWZADD
        IMAD IMUL IMAD32I IDP IDP4A HFMA2 HMUL2 HADD2 HFMA2_32I HMUL2_32I HADD2_32I""",
    "alu": """
        FMNMX FMNMX3 FSETP FSET FSEL FCHK SEL ISETP LOP3 LOP LOP32I PLOP3 IADD IADD3 IADD32I
        IMNMX VIMNMX VIMNMX3 VIADD VIADDMNMX IABS ISCADD LEA PRMT SHF SHL SHR BMSK SGXT MOV MOV32I
        VABSDIFF VABSDIFF4 F2FP I2FP I2IP P2R R2P VOTE HMNMX2 VHMNMX HSET2 HSETP2""",
    "fp64": """
        DADD DMUL DFMA DSETP DMNMX""",
    "memory": """
        LD LDG LDS LDL LDC LDSM LDGSTS LDGDEPBAR LDT LDTM LDCU ULDC ST STG STS STL STSM STT STTM
        ATOM ATOMG ATOMS RED REDG SHFL MATCH CCTL CCTLL CCTLT UBLKCP UBLKPF UBLKRED
        UTMALDG UTMASTG UTMAREDG UTMAPF UTMACMDFLUSH UTMACCTL SYNCS FENCE""",
    "control": """
        BRA BRX BRXU JMP JMX JMXU CALL RET EXIT BREAK BSSY BSYNC BMOV BAR B2R R2B CGABAR
        UCGABAR_ARV UCGABAR_WAIT WARPSYNC WARPGROUP WARPGROUPSET WARPGROUPARRIVE WARPGROUPDEPBAR
        DEPBAR ARRIVES MEMBAR ERRBAR CGAERRBAR YIELD NANOSLEEP NOP KILL BPT ELECT UTCBAR
        UTCATOMSWS ACQBULK""",
    "other": """
        MUFU POPC FLO BREV FRND F2F F2I I2F F2IP S2R S2UR CS2R CS2UR R2UR UR2UP VOTEU REDUX CREDUX
        GETLMEMBASE SETLMEMBASE LEPC PMTRIG RPCMOV SETMAXREG USETMAXREG USETSHMSZ PREEXIT
        ENDCOLLECTIVE""",
}
PIPE_OF = {name: pipe for pipe, names in PIPES.items() for name in names.split()}

LABEL = re.compile(r"^([.$\w]+):$")
INSTRUCTION = re.compile(r"^/\*[0-9a-f]+\*/\s+(@!?U?P\w+\s+)?([A-Z]\w*)((?:\.\w+)*)\s*(.*?)\s*;")
TARGET = re.compile(r"`\((\.L\w+)\)")
# instructions after which the next line is not reached, unless they are predicated
ENDS = ("EXIT", "RET", "KILL", "BRX", "JMX")


@dataclass(frozen=True)
class Instruction:
    name: str
    modifiers: str
    operands: str
    is_predicated: bool

    @property
    def pipe(self) -> str:
        """What takes it, a key of `PIPES`.

        Raises:
            ValueError: an instruction that `PIPES` does not know.
        """
        if self.name in PIPE_OF:
            return PIPE_OF[self.name]
        # the uniform datapath: one lane of its own for the whole warp
        if self.name.startswith("U"):
            return "other"
        raise ValueError(
            f"{self.name} is not in PIPES of vqtriton/tuning/disassembly.py: say what runs it"
        )

    @property
    def jump(self) -> str | None:
        """The label it may go to.

        For sm_80 ptxas ends loops with a CALL to the block behind them, from which nothing returns.
        What is really called has a name, not a label.
        """
        target = TARGET.search(self.operands)
        return target[1] if target and self.name in ("BRA", "JMP", "CALL", "WARPSYNC") else None

    @property
    def falls_through(self) -> bool:
        if self.is_predicated:
            return True
        if self.name in ("BRA", "JMP"):
            # `BRA.U !UP0, target`, `BRA P0, target`, `BRA.DIV UR4, target`
            return not self.operands.startswith("`")
        return self.name not in ENDS

    @property
    def multiply_adds(self) -> float:
        """Products that it adds up, per thread; 0 if it does not say.

        A tcgen05 MMA has its shape in a descriptor.
        """
        if self.name in ("FFMA", "DFMA", "DMUL"):
            return 1
        if self.name == "FFMA2":
            return 2
        # HMMA.16816.F32: m16n8k16 of a warp; HGMMA.64x128x16.F32: of a group of four warps
        if shape := re.match(r"\.(\d+)x(\d+)x(\d+)", self.modifiers):
            m, n, k = map(int, shape.groups())
            return m * n * k / 128
        if self.pipe == "mma" and (shape := re.match(r"\.(16)(8)(\d+)", self.modifiers)):
            m, n, k = map(int, shape.groups())
            return m * n * k / 32
        return 0


@dataclass(frozen=True)
class Block:
    """Instructions with one entry and one exit, and the blocks that may follow."""

    instructions: tuple[Instruction, ...]
    successors: tuple[int, ...]


@dataclass(frozen=True)
class Loop:
    """Numbers of its blocks, loops inside it included."""

    blocks: frozenset[int]


@dataclass(frozen=True)
class HotLoop:
    """One iteration of the loop over the codes, per thread: instructions by pipe, and pairs."""

    counts: dict[str, float]
    pairs: float

    @property
    def total(self) -> float:
        return sum(self.counts.values())


class Disassembly:
    """Blocks and loops of a kernel."""

    def __init__(self, text: str) -> None:
        self.blocks = parse(text)
        self.loops = find_loops(self.blocks)

    def count(self, blocks: frozenset[int]) -> Counter[str]:
        return Counter(i.pipe for b in blocks for i in self.blocks[b].instructions)

    def multiply_adds(self, blocks: frozenset[int], kind: frozenset[str]) -> float:
        instructions = (i for b in blocks for i in self.blocks[b].instructions)
        return sum(i.multiply_adds for i in instructions if i.name in kind)

    @functools.cached_property
    def kind(self) -> frozenset[str]:
        """The instructions that make the dot products: MMAs if there are any."""
        names = {i.name for block in self.blocks for i in block.instructions}
        for kind in (set(PIPES["mma"].split()), {"DFMA", "DMUL"}, {"FFMA", "FFMA2"}):
            if names & kind:
                return frozenset(kind)
        raise ValueError("there is no multiplication in this kernel")

    def hot_loop(self, pairs: float, inner: int) -> HotLoop | None:
        """The loop over the codes, with the loops inside it counted as often as they run.

        How often they run is not in the machine code, and a compiler may unroll either loop. But a
        pair costs ``inner`` products, so the products say it: the innermost loop with most of them
        is the loop over the codes, unrolled or not, if it has those of ``pairs``; otherwise it is a
        loop over dimensions, and its parent is the loop over the codes: a third loop between them
        would go unseen. A loop that multiplies nothing, such as a wait for a barrier, counts once.

        Args:
            pairs: of (row, code) that a thread deals with in one iteration, as written.
            inner: products of a pair, padding included.

        Returns:
            None if its products cannot be counted, as with tcgen05 (sm_100): the loop may hold
            parts of several tiles, and nothing says of how many.

        Raises:
            ValueError: no loop has the products, they do not come out even, or they are made in
                more than one loop over dimensions.
        """
        has_products = [
            loop
            for loop in self.loops
            if any(i.name in self.kind for b in loop.blocks for i in self.blocks[b].instructions)
        ]
        innermost = [
            loop
            for loop in has_products
            if not any(other.blocks < loop.blocks for other in has_products)
        ]
        if not innermost:
            raise ValueError("no loop multiplies")
        hot = max(
            innermost,
            key=lambda loop: (self.multiply_adds(loop.blocks, self.kind), len(loop.blocks)),
        )
        products = self.multiply_adds(hot.blocks, self.kind)
        counts: Counter[str] | dict[str, float] = self.count(hot.blocks)
        if products == 0:
            return None
        times = products / (pairs * inner)
        if times > 0.99:
            pairs *= round(times)
            return HotLoop(dict(counts), self.checked(pairs, products, inner))
        around = [loop for loop in self.loops if loop.blocks > hot.blocks]
        if not around:
            raise ValueError(
                f"the hot loop has {products:g} products a thread and is in no other, "
                f"but {pairs:g} pairs of {inner} each need {pairs * inner:g}"
            )
        parent = min(around, key=lambda loop: len(loop.blocks))
        if any(loop.blocks < parent.blocks for loop in has_products if loop != hot):
            raise ValueError("the loop over the codes has more than one loop that multiplies")
        own = parent.blocks - hot.blocks
        own_products = self.multiply_adds(own, self.kind)
        trips = round((pairs * inner - own_products) / products)
        inside, outside = self.count(hot.blocks), self.count(own)
        counts = {pipe: outside[pipe] + trips * inside[pipe] for pipe in inside | outside}
        return HotLoop(counts, self.checked(pairs, own_products + trips * products, inner))

    def checked(self, pairs: float, products: float, inner: int) -> float:
        # a float32 kernel multiplies elsewhere too, an MMA does nothing else
        excess = products / (pairs * inner) - 1
        limit = 1e-6 if self.kind & set(PIPES["mma"].split()) else 0.25
        if abs(excess) > limit:
            raise ValueError(
                f"{products:g} products a thread for {pairs:g} pairs of {inner} each: "
                "this is not the loop over the codes"
            )
        return pairs


def parse(text: str) -> list[Block]:
    """Basic blocks in the order of the text; the first is the entry."""
    groups: list[list[Instruction]] = [[]]
    block_of: dict[str, int] = {}
    for line in map(str.strip, text.splitlines()):
        if label := LABEL.match(line):
            if groups[-1]:
                groups.append([])
            block_of[label[1]] = len(groups) - 1
        elif found := INSTRUCTION.match(line):
            predicate, name, modifiers, operands = found.groups()
            is_predicated = predicate is not None
            instruction = Instruction(name, modifiers, operands, is_predicated)
            groups[-1].append(instruction)
            if instruction.jump or not instruction.falls_through:
                groups.append([])
    blocks = []
    for number, group in enumerate(groups):
        successors = [block_of[group[-1].jump]] if group and group[-1].jump else []
        if (not group or group[-1].falls_through) and number + 1 < len(groups):
            successors.append(number + 1)
        blocks.append(Block(tuple(group), tuple(dict.fromkeys(successors))))
    if not any(groups):
        raise ValueError("there is no instruction in the disassembly")
    return blocks


def find_loops(blocks: list[Block]) -> list[Loop]:
    """Natural loops, one for each header: what can go back to it without passing it."""
    reached, waiting = {0}, [0]
    while waiting:
        for successor in blocks[waiting.pop()].successors:
            if successor not in reached:
                reached.add(successor)
                waiting.append(successor)
    predecessors: dict[int, set[int]] = {number: set() for number in reached}
    for number in reached:
        for successor in blocks[number].successors:
            predecessors[successor].add(number)
    dominators = {number: set(reached) for number in reached}
    dominators[0] = {0}
    changed = True
    while changed:
        changed = False
        for number in sorted(reached - {0}):
            new = {number} | set.intersection(*(dominators[p] for p in predecessors[number]))
            changed |= new != dominators[number]
            dominators[number] = new
    bodies: dict[int, set[int]] = {}
    for number in reached:
        for header in set(blocks[number].successors) & dominators[number]:
            body = bodies.setdefault(header, {header})
            waiting = [number]
            while waiting:
                block = waiting.pop()
                if block not in body:
                    body.add(block)
                    waiting.extend(predecessors[block])
    return [Loop(frozenset(body)) for body in bodies.values()]
