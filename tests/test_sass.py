"""The gate on what the compiler makes of the kernels, and that it sees what it is there to see."""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

# bench is not installed, and plain `pytest` does not look for modules in the root
ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
compiling = importlib.import_module("vqtriton.tuning.compiling")
disassembly = importlib.import_module("vqtriton.tuning.disassembly")
machines = importlib.import_module("vqtriton.tuning.machines")
kernels = importlib.import_module("bench.sass_kernels")
sass = importlib.import_module("bench.sass")

Disassembly, Instruction = disassembly.Disassembly, disassembly.Instruction
ARCHITECTURES = machines.ARCHITECTURES
STORED = json.loads(sass.STORED.read_text())
SCREEN = kernels.KERNELS[0]

# A loop over codes (.L_x_1) around one over dimensions (.L_x_2), then a wait for a barrier.
# As ptxas does it for sm_80, the outer loop is left by a call; part of it lies behind the exit.
NESTED = """
	.section	.text.f,"ax",@progbits
.text.f:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @P1 BRA `(.L_x_0) ;
.L_x_1:
        /*0020*/                   IMAD.MOV.U32 R2, RZ, RZ, RZ ;
.L_x_2:
        /*0030*/                   LDS.128 R4, [R2] ;
        /*0040*/                   FFMA R8, R4, R5, R8 ;
        /*0050*/                   FFMA R9, R4.reuse, R6, R9 ;
        /*0060*/                   IADD3 R2, R2, 0x10, RZ ;
        /*0070*/                   ISETP.GE.AND P0, PT, R2, 0x40, PT ;
        /*0080*/              @!P0 BRA `(.L_x_2) ;
        /*0090*/              @P2 BRA `(.L_x_5) ;
.L_x_3:
        /*00a0*/                   FMNMX R10, R8, R9, !PT ;
        /*00b0*/                   UIADD3 UR4, UR4, 0x1, URZ ;
        /*00c0*/              @P3 CALL.REL.NOINC `(.L_x_0) ;
        /*00d0*/                   BRA `(.L_x_1) ;
.L_x_0:
        /*00e0*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R2 ;
        /*00f0*/                   BRA.U !UP0, `(.L_x_0) ;
        /*0100*/                   STG.E desc[UR4][R2.64], R10 ;
        /*0110*/                   EXIT ;
.L_x_5:
        /*0120*/                   FSEL R8, R8, RZ, P0 ;
        /*0130*/                   BRA `(.L_x_3) ;
.L_x_6:
        /*0140*/                   BRA `(.L_x_6);
"""
# both loops: FFMA 2, LDS 1, IADD3 and ISETP, BRA 1; IMAD, two more jumps, FMNMX and FSEL, UIADD3
INNER = {"memory": 1, "fma": 2, "alu": 2, "control": 1}
OWN = {"fma": 1, "control": 4, "alu": 2, "other": 1}


def test_loops_are_found_wherever_their_blocks_lie() -> None:
    found = Disassembly(NESTED)
    counts = sorted((found.count(loop.blocks) for loop in found.loops), key=Counter.total)
    assert counts == [Counter(memory=1, control=1), Counter(INNER), Counter(INNER) + Counter(OWN)]


# 2 products an iteration: 8 dimensions are 4 iterations of one pair, or 2 of them unrolled by two
@pytest.mark.parametrize(("pairs", "inner", "trips"), [(1, 8, 4), (2, 4, 4), (1, 6, 3)])
def test_inner_loop_counts_as_often_as_it_runs(pairs, inner, trips) -> None:
    loop = Disassembly(NESTED).hot_loop(pairs, inner)
    expected = {p: OWN.get(p, 0) + trips * INNER.get(p, 0) for p in INNER | OWN}
    assert (loop.counts, loop.pairs, loop.total) == (expected, pairs, sum(expected.values()))


def test_unrolled_loop_has_more_pairs() -> None:
    # as written one product an iteration: the two are of two iterations
    loop = Disassembly(NESTED).hot_loop(1, 1)
    assert (loop.counts, loop.pairs) == (INNER, 2)


@pytest.mark.parametrize(
    ("old", "new", "inner", "message"),
    [
        # an MMA of 64 products beside them: nothing is even
        ("FSEL R8, R8, RZ, P0", "HMMA.16816.F32 R8, R4, R6, R8", 9, "not the loop over the codes"),
        ("BRA `(.L_x_1)", "EXIT", 8, "is in no other"),
        ("FFMA", "FADD", 8, "no multiplication"),
        # .L_x_3 becomes a loop that multiplies too
        (
            "UIADD3",
            "FFMA R8, R8, R9, R8 ;\n /*00b8*/ @P4 BRA `(.L_x_3) ;\n /*00bc*/ UIADD3",
            8,
            "one",
        ),
        ("FSEL", "FNEW", 8, "FNEW is not in PIPES"),
    ],
)
def test_refuses_what_it_cannot_count(old: str, new: str, inner: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Disassembly(NESTED.replace(old, new)).hot_loop(1, inner)


def test_refuses_an_empty_disassembly() -> None:
    with pytest.raises(ValueError, match="no instruction"):
        Disassembly("")


@pytest.mark.parametrize(
    ("name", "modifiers", "products"),
    [
        ("FFMA", "", 1),
        ("FFMA2", "", 2),
        ("FADD", "", 0),
        ("HMMA", ".16816.F32", 16 * 8 * 16 / 32),
        ("HMMA", ".1688.F32.TF32", 16 * 8 * 8 / 32),
        ("HGMMA", ".64x128x16.F32", 64 * 128 * 16 / 128),
        # its shape is in a descriptor
        ("UTCHMMA", "", 0),
    ],
)
def test_products_of_an_instruction(name: str, modifiers: str, products: float) -> None:
    assert Instruction(name, modifiers, "", False).multiply_adds == products


@triton.jit(do_not_specialize=["K"])
def best_score_kernel(
    x_ptr,              # [BLOCK, D] fp16
    codes_ptr,          # [K, D] fp16
    best_ptr,           # [BLOCK] fp32, out
    K,
    D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    offs, offs_d = tl.arange(0, BLOCK), tl.arange(0, D)
    x = tl.load(x_ptr + offs[:, None] * D + offs_d[None, :])
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    for start in range(0, K, BLOCK):
        codes = tl.load(codes_ptr + (start + offs)[None, :] * D + offs_d[:, None])
        best = tl.maximum(best, tl.max(tl.dot(x, codes), 1))
    tl.store(best_ptr + offs, best)


def tensor_core_launch() -> compiling.Launch:
    x = torch.zeros(128, 64, dtype=torch.float16)
    options = {"num_warps": 4, "num_stages": 2, "enable_fp_fusion": True}
    arguments = (x, x, torch.zeros(128), 256)
    return compiling.Launch(best_score_kernel, arguments, {"D": 64, "BLOCK": 128, **options})


@pytest.mark.parametrize(("target", "mmas"), [("sm_80", 128), ("sm_90", 4)])
def test_loop_of_a_tensor_core_kernel(target: str, mmas: int) -> None:
    found = Disassembly(compiling.compile_launch(tensor_core_launch(), target).assembly)
    loop = found.hot_loop(128, 64)
    # HMMA is of a warp, 16 x 8 x 16; HGMMA multiplies 16 dimensions of all rows at once
    assert loop.pairs == 128
    assert loop.counts["mma"] % mmas == 0
    # a maximum of two or three values per pair, and little else
    assert 0.5 < loop.counts["alu"] / loop.pairs < 2


def test_mmas_that_do_not_tell_their_shape_are_not_counted() -> None:
    found = Disassembly(compiling.compile_launch(tensor_core_launch(), "sm_100").assembly)
    assert found.hot_loop(128, 64) is None


@pytest.mark.parametrize(
    ("target", "registers", "shared", "num_warps", "ctas"),
    [
        # 65536 registers: 3 CTAs of 128 threads with 168 each, not 4 with 136
        ("sm_90", 168, 0, 4, 3),
        ("sm_90", 128, 0, 4, 4),
        ("sm_90", 129, 0, 4, 3),
        ("sm_90", 255, 0, 4, 2),
        ("sm_90", 32, 0, 4, 16),
        ("sm_90", 16, 0, 1, 32),
        # 228 KiB, 1 KiB of each CTA reserved
        ("sm_90", 32, 75 * 1024, 4, 3),
        ("sm_90", 32, 75 * 1024 + 1, 4, 2),
        ("sm_90", 32, 227 * 1024, 4, 1),
        ("sm_90", 32, 227 * 1024 + 1, 4, 0),
        ("sm_80", 32, 81 * 1024, 4, 2),
        ("sm_120", 40, 0, 4, 12),
        ("gfx942", 128, 0, 4, 4),
        ("gfx942", 129, 0, 4, 3),
        ("gfx942", 16, 32 * 1024, 4, 2),
    ],
)
def test_resident_ctas(target, registers, shared, num_warps, ctas) -> None:
    assert ARCHITECTURES[target].resident_ctas(registers, shared, num_warps) == ctas


def test_tensor_memory_limits_residents() -> None:
    assert ARCHITECTURES["sm_100"].resident_ctas(32, 0, 4, tensor_memory=256) == 2


def test_residents_agree_with_the_amd_compiler() -> None:
    launch = next(iter(SCREEN.launches("gfx942").values()))
    compiled = compiling.compile_launch(launch, "gfx942")
    waves = int(re.search(r"; Occupancy: (\d+)", compiled.assembly)[1])
    # four warps are one of each scheduler; LLVM does not see the shared memory
    assert ARCHITECTURES["gfx942"].resident_ctas(compiled.registers, 0, 4) == waves


# what the design asks of an H100, with a block of 128 rows and 1.91 ALU instructions per pair
DESIGN = (
    (".013", ".043", ".038", ".14"),
    (".003", ".17", ".15", ".56"),
    (".091", ".17", ".15", ".14"),
    (".011", ".022", ".019", ".009"),
    (".18", "5.5", "4.8", "2.2"),
    (".10", "11.0", "9.7", "2.2"),
    (".057", "8.4", "7.4", "1.7"),
    (".18", "1.4", "1.2", ".14"),
)


@pytest.mark.parametrize(("shape", "expected"), list(zip(machines.SHAPES, DESIGN, strict=True)))
def test_floors_are_those_of_the_design(shape, expected) -> None:
    inner = max(16, shape.dim)
    work = machines.Work(block_n=128, code_bytes=2 * inner, inner=inner, uses_mma=True)
    least = machines.floors(shape, work, alu_per_pair=1.91, total_per_pair=3.5)
    for name, text in zip(("memory", "dot", "L2", "alu"), expected, strict=True):
        last_digit = 10.0 ** -len(text.split(".")[1])
        assert least[name] == pytest.approx(float(text), abs=last_digit)
    # twice as many lanes are issued as compare
    assert least["issue"] == pytest.approx(least["alu"] * 3.5 / 1.91 / 2)


def test_streamed_rows_are_read_for_each_tile_of_codes() -> None:
    kernel = next(kernel for kernel in kernels.KERNELS if kernel.name == "screen_codes")
    works = {dim: kernel.work(launch) for (dim, _), launch in kernel.launches("sm_90").items()}
    # of 128 rows, 2 bytes an element, for 256 codes
    assert works[512].row_bytes == 128 * 512 * 2 / 256
    assert works[64].row_bytes == 0
    shape = machines.Shape(128, 256, 512)
    least = machines.floors(shape, works[512], alu_per_pair=1, total_per_pair=1)
    codes, rows = 256 * (512 * 2 + 4), 128 * 512 * 2
    assert least["L2"] == pytest.approx(1e3 * (codes + rows) / machines.H100.l2)


def test_stored_figures_pass() -> None:
    assert {row["triton"] for row in STORED} == set(sass.VERSIONS)
    assert {row["target"] for row in STORED} == set(sass.TARGETS)
    assert sass.failures(STORED) == []
    # each kernel and version alike
    keys = [{tuple(row[k] for k in sass.KEY[:-1]) for row in STORED if row["triton"] == version}
            for version in sass.VERSIONS]  # fmt: skip
    assert keys[0] == keys[1] == keys[2]
    assert sass.dumped(STORED) + "\n" == sass.STORED.read_text()


def test_makefile_installs_the_same_versions() -> None:
    listed = re.search(r"^TRITONS := (.*)$", (ROOT / "Makefile").read_text(), re.M)
    assert tuple(listed[1].split()) == sass.VERSIONS


# nearly every kernel has it
DIM = 64


def test_kernels_are_what_they_were() -> None:
    """Compiled again, a part of them: `make sass` has all. A change that is meant: --store."""
    rows = sass.rows_of(triton.__version__, "", ["sm_90"], [DIM])
    have_dim = [k.name for k in kernels.KERNELS if DIM in dict(k.inputs)]
    assert {row["kernel"] for row in rows} == set(have_dim)
    assert len(have_dim) > 15
    assert sass.failures(rows) == []
    stored = [row for row in STORED if row["triton"] == triton.__version__]
    if not stored:
        pytest.skip(f"there are no figures of Triton {triton.__version__} to compare with")
    stored = [row for row in stored if row["target"] == "sm_90" and row["D"] == DIM]
    assert sass.changes(stored, rows) == []


def spilling(launch: compiling.Launch, **constants) -> compiling.Launch:
    return dataclasses.replace(launch, kwargs=launch.kwargs | constants)


@pytest.mark.parametrize(
    ("target", "planted"),
    [
        ("sm_90", {"maxnreg": 104}),
        # this target takes no limit, but a thread cannot hold so many scores either
        ("gfx942", {"BLOCK_N": 512, "num_warps": 1}),
    ],
)
def test_spills_are_seen(target: str, planted: dict) -> None:
    kernel = next(kernel for kernel in kernels.KERNELS if kernel.name == "screen_codes")
    (dim, config), launch = next(iter(kernel.launches(target).items()))
    row = sass.compile_row(kernel, dim, config, spilling(launch, **planted), target)
    assert row["spills"] > 0
    assert any("spills" in line for line in sass.failures([row]))


def test_limits_hold() -> None:
    limit = kernels.Limit("sm_90", 64, kernels.TENSOR_CORE_SCREEN)
    kernel = dataclasses.replace(SCREEN, limits=(limit,))
    row = next(row for row in STORED if (row["kernel"], row["D"]) == ("screen_codes", 64))
    row = row | {"target": "sm_90", "alu_per_pair": 2.0, "total_per_pair": 3.6}
    assert sass.failures([row], [kernel]) == []
    for name, value in (("total_per_pair", 3.61), ("alu_per_pair", 2.01), ("total_per_pair", None)):
        (line,) = sass.failures([row | {name: value}], [kernel])
        assert f"{name} is {value}" in line
        # another target is not held to it
        assert sass.failures([row | {name: value, "target": "sm_80"}], [kernel]) == []
    (line,) = sass.failures([row | {"ctas": 0}], [kernel])
    assert "does not fit" in line


def test_changes_are_named() -> None:
    first, second, *rest = STORED
    assert sass.changes(STORED, STORED) == []
    (line,) = sass.changes(STORED, [first | {"registers": 1}, second, *rest])
    assert line == f"{sass.named(first)}: registers was {first['registers']}, is 1"
    (line,) = sass.changes(STORED, [second, *rest])
    assert line == f"{sass.named(first)}: stored, but not compiled"
    (line,) = sass.changes([second, *rest], STORED)
    assert line == f"{sass.named(first)}: not stored"


def test_missing_version_is_skipped_aloud(capsys) -> None:
    assert sass.main(["--triton", "0.0.1"]) == 1
    assert "SKIPPED: Triton 0.0.1" in capsys.readouterr().out


def test_tables_have_a_line_for_each_row() -> None:
    rows = [row for row in STORED if row["triton"] == sass.VERSIONS[0]]
    text = sass.table(rows)
    assert len(re.findall(r"^  (sm_|gfx)", text, re.M)) == len(rows)
    lines = sass.floor_table(rows).splitlines()
    # a line for each shape, below the configurations
    shapes = [re.findall(r"\d+", line)[:3] for line in lines if re.match(r"  \d", line)]
    expected = {(s.num_rows, s.codebook_size, s.dim) for s in machines.SHAPES}
    assert {tuple(map(int, shape)) for shape in shapes} == expected
