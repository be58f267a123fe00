"""What was predicted of the roofline's searches, beside what they take; docs/design.md."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import vqtriton
from bench import provenance
from bench.devices import Cpu, Cuda, make_device
from bench.gpu_check.check import Check
from bench.measure import quantile
from vqtriton import ops
from vqtriton.planes import screen_bound
from vqtriton.tuning.machines import SHAPES, Shape, floors, predict_screen
from vqtriton.tuning.predict import usage_terms, usages
from vqtriton.tuning.tables import Problem
from vqtriton.tuning.tunables import TUNABLES

DRY_SHAPES = (Shape(48, 40, 8), Shape(48, 40, 64))
REPEATS, DRY_REPEATS = 9, 1
# beyond that a prediction has missed
MISS = 0.3


def run(check: Check) -> str:
    device = make_device(check.device.type)
    # what is written before each step is also the host's head start, about 0.2 ms of it
    device.cache_bytes = 1 << (10 if check.is_dry else 28)
    repeats = DRY_REPEATS if check.is_dry else REPEATS
    rows = []
    columns = ("predicted", "screen", "prepare", "finish", "rescue", "exact", "fast")
    print(f"{'N, K, D; ms':<24}" + "".join(f"{name:>9}" for name in columns) + "  exact/fast")
    for shape in DRY_SHAPES if check.is_dry else SHAPES:
        name = f"{shape.num_rows}, {shape.codebook_size}, {shape.dim}"
        with check.step(name):
            if check.time_left() < 0:
                check.expect(False, f"{name}: the time was up")
                continue
            row = predict(shape) | stages(shape, device, repeats)
            row["exact_over_fast"] = row["exact"] / row["fast"]
            # of an interpreter nothing was predicted
            missed = "" if check.is_dry else misses(row["predicted"], row["screen"])
            row["missed"] = missed
            rows.append(row)
            check.note(**row)
            cells = "".join(f"{row[column]:>9.3g}" for column in columns)
            print(f"{name:<24}{cells}{row['exact_over_fast']:>12.2f}  {row['missed']}", flush=True)
    if check.is_dry:
        return f"{len(rows)} searches predicted and timed; on a CPU the two have nothing in common"
    missed = [f"{row['N']},{row['K']},{row['D']} {row['missed']}" for row in rows if row["missed"]]
    # a miss is a finding, not a failure: the prediction may be what is wrong
    text = f"{len(rows) - len(missed)} of {len(rows)} within 30 %"
    return text + (f"; beyond: {'; '.join(missed)}" if missed else "")


def median(step: Callable[[], object], device: Cpu | Cuda, repeats: int) -> float:
    """Milliseconds."""
    step()
    return 1e3 * quantile([device.seconds(step) for _ in range(repeats)], 0.5)


def predict(shape: Shape) -> dict[str, Any]:
    """Milliseconds of the screen with its default tiles, and the floor of each resource."""
    problem = Problem("nearest_code", "float16", shape.dim, shape.codebook_size, shape.num_rows)
    config = TUNABLES[problem.op].default("sm_90", shape.dim)
    (usage,) = usages(problem, "sm_90", [config])
    if usage is None or usage.work is None:
        raise ValueError(f"the default tiles of D = {shape.dim} cannot be counted")
    least = floors(shape, usage.work, usage.alu, usage.total)
    return {
        "N": shape.num_rows,
        "K": shape.codebook_size,
        "D": shape.dim,
        "counted_with": provenance.version("triton"),
        **{f"least_{name}": value for name, value in least.items()},
        "floor": max(least.values()),
        "predicted": predict_screen(usage_terms(problem, "sm_90", config, usage)),
        "flash_kmeans_published": shape.flash_kmeans,
    }


def misses(predicted: float, measured: float) -> str:
    """How many times the prediction it took, if that is far from it; else nothing."""
    is_far = abs(measured / predicted - 1) > MISS
    return f"{measured / predicted:.2f}× the prediction" if is_far else ""


def stages(shape: Shape, device: Cpu | Cuda, repeats: int) -> dict[str, Any]:
    """Median milliseconds of the search and of its stages, on rows of float16."""
    torch.manual_seed(0)
    x, codebook = (
        torch.randn(rows, shape.dim, device=device.device).half()
        for rows in (shape.num_rows, shape.codebook_size)
    )
    prepared = vqtriton.prepare_codebook(codebook, backend="triton")

    def milliseconds(step: Callable[[], object]) -> float:
        return median(step, device, repeats)

    def search(codes: Any, precision: str) -> Callable[[], object]:
        return lambda: vqtriton.nearest_code(x, codes, precision=precision, backend="triton")

    found = {
        "screen": milliseconds(screen_step(x, codebook, prepared.tensors)),
        "prepare": milliseconds(lambda: vqtriton.prepare_codebook(codebook, backend="triton")),
        "exact": milliseconds(search(codebook, "exact")),
        "fast": milliseconds(search(codebook, "fast")),
    }
    exact, fast = (milliseconds(search(prepared, precision)) for precision in ("exact", "fast"))
    in_doubt = int(ops.run_kernels(x, codebook, exact=True).num_doubtful)
    return {
        **found,
        # what each adds; the certificate of the finish counts as rescue
        "finish": fast - found["screen"],
        "rescue": exact - fast,
        "exact_prepared": exact,
        "share_in_doubt": in_doubt / shape.num_rows,
        "device": device.name,
    }


def screen_step(x: Tensor, codebook: Tensor, prepared: tuple[Tensor, ...]) -> Callable[[], object]:
    """The screen alone, as `vqtriton.ops.run_kernels` launches it."""
    from vqtriton.kernels.screen_codes import (
        architecture,
        rows_are_aligned,
        screen_codes,
        screen_codes_config,
    )

    planes = ops._prepare_planes(codebook, prepared)
    config = screen_codes_config(
        architecture(x.device), planes.codes.shape[2], rows_are_aligned(x[None])
    )
    bound = screen_bound(planes, config.block_k)
    return lambda: screen_codes(x[None], planes, bound, config=config)
