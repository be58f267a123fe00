"""How often each kernel is compiled for 50 batch sizes: ``python tests/count_programs.py``.

Prints a line of JSON for each function. Without a GPU nothing is launched: what would be is
compiled for an H100. A process of its own, since Triton has no way back from a driver that is not
there.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable

import stub_driver
import torch
import triton

from vqtriton import triton_backend

HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
# 1 and multiples of 16 are what Triton makes programs of their own for
SIZES = (1, 2, 15, 16, 17, 64, 256, 4096, 100_000, *(33 + 613 * i for i in range(41)))
CODEBOOK_SIZE = 600
# 12: a stride that 16 does not divide
DIMS = (12, 64) if HAS_GPU else (12,)
# the kernels of vector_quantize with other flags: programs are told apart by a kernel's arguments,
# and where all is compiled for the count alone, these took half of its time
SAME_KERNELS = ("nearest_code", "fast")


def functions(dim: int) -> dict[str, Callable[[int], object]]:
    codebook = torch.randn(CODEBOOK_SIZE, dim, device=DEVICE)

    def vectors(rows: int) -> torch.Tensor:
        return torch.zeros(rows, dim, device=DEVICE)

    def indices(rows: int) -> torch.Tensor:
        return torch.zeros(rows, dtype=torch.int64, device=DEVICE)

    def masked(rows: int) -> object:
        mask = torch.ones(rows, dtype=torch.bool, device=DEVICE)
        return triton_backend.run_kernels(
            vectors(rows), codebook, exact=True, mask=mask, gather=True
        )

    def sums(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        from vqtriton.kernels.code_sums import code_sums

        return code_sums(vectors(rows)[None], indices(rows)[None], CODEBOOK_SIZE)

    def gradients(rows: int) -> object:
        from vqtriton.kernels.arguments import Pull
        from vqtriton.kernels.vector_quantize_grad import grad_codebook, grad_x

        x, one_head = vectors(rows)[None], codebook[None]
        pull = Pull(torch.ones(1, rows, device=DEVICE), x, one_head, indices(rows)[None], 1.0)
        return grad_x(x, pull), grad_codebook(pull)

    def update(rows: int) -> None:
        from vqtriton.kernels.arguments import Update
        from vqtriton.kernels.ema_update import ema_update_

        (of_codes,), (counts,) = sums(rows)
        rows_per_code = counts.float()
        # what may stand for a dead code, all of it there
        drawn = codebook, torch.ones_like(rows_per_code)
        rates = torch.tensor([0.1, 0.5], device=DEVICE)
        state = (t.clone() for t in (rows_per_code, codebook))
        ema_update_(Update(*state, rows_per_code, of_codes, *drawn, rates))

    return {
        "nearest_code": lambda rows: triton_backend.run_kernels(
            vectors(rows), codebook, exact=True
        ),
        "vector_quantize": masked,
        "code_sums": sums,
        "gradients": gradients,
        "update": update,
        "fast": lambda rows: triton_backend.run_kernels(vectors(rows), codebook, exact=False),
    }


def main() -> None:
    programs: Counter[str] = Counter()
    # from disk or anew
    triton.knobs.runtime.jit_post_compile_hook = lambda **given: programs.update([given["fn"].name])
    if not HAS_GPU:
        stub_driver.install()
    for dim in DIMS:
        for name, function in functions(dim).items():
            if name in SAME_KERNELS and not HAS_GPU:
                continue
            programs.clear()
            for rows in SIZES:
                function(rows)
            print(json.dumps({"step": name, "dim": dim, "programs": programs}), flush=True)


if __name__ == "__main__":
    main()
