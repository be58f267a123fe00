"""Launches a kernel in many ways on a stub of a driver, and says which programs were chosen."""

from __future__ import annotations

import json

import stub_driver
import torch
import triton
import triton.language as tl
from triton.runtime.jit import JITFunction

from vqtriton.kernels import launch as module

launched: list[tuple] = []


class Driver(stub_driver.StubDriver):
    def launcher_cls(self, source, metadata):
        return lambda *args: launched.append(args)


@triton.jit(do_not_specialize=["plain"])
def kernel(first_ptr, second_ptr, number, stride, plain, D: tl.constexpr, FLAG: tl.constexpr):
    offs = tl.arange(0, D)
    value = tl.load(first_ptr + offs * stride) * number + plain
    if FLAG:
        tl.store(second_ptr + offs, value)


def cases() -> dict[str, tuple[tuple, dict]]:
    x, y = torch.zeros(64), torch.zeros(65)
    constants = {"D": 16, "FLAG": True, "num_warps": 4}
    plain = (x, y, 0.5, 16, 16)
    found = {"plain": (plain, constants)}
    for place, values in enumerate(
        (
            (x.half(), x.double(), x[1:], y[4:], x.bfloat16(), x.int()),
            (x, x.half(), None, y[1:], x.long()),
            (1.0, 0.0, 2, 1, 16, 17, 1 << 31, -(1 << 31), -(1 << 31) - 1, 1 << 40),
            (1, 2, 15, 32, 0, -16, 1 << 31, (1 << 31) - 1, 1 << 35, (1 << 35) + 1),
            (1, 2, 15, 32, 0, 1 << 31, 1 << 35, -1),
        )
    ):
        for value in values:
            given = (*plain[:place], value, *plain[place + 1 :])
            flag = constants | {"FLAG": given[1] is not None}
            about = value.dtype if isinstance(value, torch.Tensor) else value
            aligned = isinstance(value, torch.Tensor) and value.data_ptr() % 16
            found[f"{place}: {about} {aligned}"] = given, flag
    for name, value in (("D", 32), ("FLAG", False), ("num_warps", 8)):
        found[name] = plain, constants | {name: value}
    return found


def main() -> None:
    triton.runtime.driver.set_active(Driver())
    same = {}
    programs = set()
    of_jit = set()
    for name, (args, given) in cases().items():
        # what the JIT chooses
        want = kernel[(3,)](*args, **given)
        of_jit.add(id(want))
        for _ in range(2):
            module.launch(kernel, (3,), *args, **given)
        variant = module._variant(kernel, tuple(given.items()))
        chosen = {id(program): program for program in variant.compiled.values()}
        programs |= chosen.keys()
        # the function and metadata of the program that was launched last
        same[name] = launched[-1][4] is want.function
    asked = []
    run = JITFunction.run
    JITFunction.run = lambda self, *args, **given: asked.append(1) or run(self, *args, **given)
    args, given = cases()["plain"]
    fresh = given | {"num_warps": 2}
    del launched[:]
    for _ in range(2):
        module.launch(kernel, (3,), *args, **fresh)
    first, second = launched
    print(
        json.dumps(
            {
                "cases": same,
                "programs": len(programs),
                "programs_of_jit": len(of_jit),
                "arguments_are_the_same": [id(a) for a in first[9:]] == [id(a) for a in second[9:]],
                "grids": [launch[:3] for launch in launched],
                "asked_jit": len(asked),
            }
        )
    )


if __name__ == "__main__":
    main()
