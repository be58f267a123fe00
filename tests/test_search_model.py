"""The predicted times of whole searches: what they are made of, and that the docs have them."""

from __future__ import annotations

import functools
import importlib
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
# bench is not installed, and plain `pytest` does not look for modules in the root
ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
model = importlib.import_module("bench.search_model")
CASES = {case.name: case for case in model.CASES}


@pytest.fixture(autouse=True, scope="module")
def compiled_once():
    """A case has the same launches in all tests, and a launch one program."""
    programs, compile_launch = {}, model.compile_launch

    def compile_once(launch, target):
        if id(launch) not in programs:
            # with the launch, so that no other gets its id
            programs[id(launch)] = launch, compile_launch(launch, target)
        return programs[id(launch)][1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "launches", functools.cache(model.launches))
        patch.setattr(model, "compile_launch", compile_once)
        yield


@pytest.mark.parametrize("name", ["encodec", "256K×4096×512"])
def test_the_table_has_what_is_predicted(name: str) -> None:
    if not triton.__version__.startswith("3.7.1"):
        pytest.skip("the table was made with Triton 3.7.1")
    found = model.predict(CASES[name])
    text = (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")
    (row,) = [line for line in text.splitlines() if line.startswith(f"| {name} | ")]
    cells = [float(cell) for cell in row.split("|")[3:8]]
    assert cells == pytest.approx([*found.values(), sum(found.values())], rel=1e-3)


@pytest.mark.parametrize("name", ["encodec", "1M×1024×64"])
def test_a_finish_costs_its_distances_at_least(name: str) -> None:
    case = CASES[name]
    screen = model.launches(case)["screen_codes"]
    instructions, waits = model.finish_cost(screen)
    # a difference and a square for each element of the group, and a load for four of them
    least = screen.values["GROUP"] * case.dim * (2 + 1 / 4)
    assert least < instructions < 6 * least + 2500
    assert 6 < waits < 100


def test_more_rows_and_codes_take_longer() -> None:
    case = CASES["1M×1024×64"]
    few, many = (model.predict(replace(case, num_rows=n)) for n in (2**17, 2**19))
    assert 3 < many["screen"] / few["screen"] < 5
    assert 3 < many["finish"] / few["finish"] < 5
    assert many["rescue"] > few["rescue"]


# instructions of a row in the finish, by all its threads, as they were counted and a little more
MOST_INSTRUCTIONS = {"llamagen": 3150, "1M×1024×64": 4100, "encodec": 6700, "taming": 8000}


@pytest.mark.parametrize("name", MOST_INSTRUCTIONS)
def test_loops_of_finish_and_rescue_are_lean(name: str) -> None:
    """16 bytes a load and thread in the loops over dimensions, and few instructions."""
    found = model.launches(CASES[name])
    finish = found.get("finish_parts", found["screen_codes"])
    assert model.finish_cost(finish)[0] <= MOST_INSTRUCTIONS[name]
    for launch in (finish, found["rescue_rows"]):
        compiled = model.compile_launch(launch, model.TARGET)
        assert model.resident(launch) >= 1
        assembly = model.Disassembly(compiled.assembly)
        innermost = [
            [i for b in loop.blocks for i in assembly.blocks[b].instructions]
            for loop in assembly.loops
            if not any(other.blocks < loop.blocks for other in assembly.loops)
        ]
        innermost = [loop for loop in innermost if not any(i.pipe == "mma" for i in loop)]
        # in float32 or, converted, in float64
        of_dimensions = [
            loop
            for loop in innermost
            if sum(i.name == "FFMA" for i in loop) >= 16 or sum(i.name == "F2F" for i in loop) >= 8
        ]
        assert of_dimensions
        width = 8 * 4 * launch.args[0].element_size()
        for loop in of_dimensions:
            widths = [re.search(r"\.(\d+)", i.modifiers) for i in loop if i.name == "LDG"]
            assert all(found and int(found[1]) >= width for found in widths)


@pytest.mark.parametrize(
    ("name", "most"), [("1M×1024×64", 3), ("llamagen", 3), ("vit-vqgan", 2), ("1M×16384×128", 2)]
)
def test_screens_share_a_multiprocessor(name: str, most: int) -> None:
    """So that one can multiply while another compares."""
    assert model.resident(model.launches(CASES[name])["screen_codes"]) == most
