"""What was predicted of the roofline's searches, beside what they take; docs/design.md."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import vqtriton
from bench import provenance
from bench.devices import Cpu, Cuda, make_device
from bench.gpu_check.check import Check
from bench.measure import quantile
from bench.sass import STORED
from bench.sass_kernels import NUM_ROWS, record_nearest_code
from vqtriton import ops
from vqtriton.planes import screen_bound
from vqtriton.tuning.machines import H100, SHAPES, Shape, floors, in_turns, step_bytes
from vqtriton.tuning.tunables import screen_work

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
    columns = ("floor", "sum", "screen", "prepare", "finish", "rescue", "exact", "fast")
    print(f"{'N, K, D; ms':<24}" + "".join(f"{name:>9}" for name in columns) + "  exact/fast")
    for shape in DRY_SHAPES if check.is_dry else SHAPES:
        name = f"{shape.num_rows}, {shape.codebook_size}, {shape.dim}"
        with check.step(name):
            if check.time_left() < 0:
                check.expect(False, f"{name}: the time was up")
                continue
            row = predict(shape) | stages(shape, device, repeats)
            row["exact_over_fast"] = row["exact"] / row["fast"]
            row["screen_over_sum"] = row["screen"] / row["sum"]
            # of an interpreter nothing was predicted
            missed = "" if check.is_dry else misses(row["floor"], row["sum"], row["screen"])
            row["missed"] = missed
            rows.append(row)
            check.note(**row)
            cells = "".join(f"{row[column]:>9.3g}" for column in columns)
            print(f"{name:<24}{cells}{row['exact_over_fast']:>12.2f}  {row['missed']}", flush=True)
    steps = compare_steps(check, device, repeats)
    if check.is_dry:
        return f"{len(rows)} searches predicted and timed; on a CPU the two have nothing in common"
    missed = [f"{row['N']},{row['K']},{row['D']} {row['missed']}" for row in rows if row["missed"]]
    # a miss is a finding, not a failure: the prediction may be what is wrong
    text = f"{len(rows) - len(missed)} of {len(rows)} as predicted"
    text += f"; {steps}"
    if "H100" not in device.name:
        text += f" of an H100, which {device.name} is not"
    return text + (f", beyond 30 %: {'; '.join(missed)}" if missed else "")


def compare_steps(check: Check, device: Cpu | Cuda, repeats: int) -> str:
    """The kernels of the rest of a step: bytes over the H100's memory rate, beside their time."""
    late = []
    for shape in DRY_SHAPES if check.is_dry else SHAPES:
        name = f"{shape.num_rows}, {shape.codebook_size}, {shape.dim}"
        with check.step(f"step of {name}"):
            if check.time_left() < 0:
                check.expect(False, f"step of {name}: the time was up")
                continue
            moved = step_bytes(shape, element_size=2)
            predicted = {kernel: 1e3 * count / H100.memory for kernel, count in moved.items()}
            measured = step_stages(shape, device, repeats)
            check.note(step=name, predicted_ms=predicted, measured_ms=measured)
            cells = (f"{k} {predicted[k]:.3g} / {measured[k]:.3g}" for k in predicted)
            print(f"{name:<24}{', '.join(cells)} ms predicted / measured", flush=True)
            late += [
                f"{name} {kernel} {measured[kernel] / predicted[kernel]:.1f}×"
                for kernel in predicted
                if measured[kernel] > (1 + MISS) * predicted[kernel]
            ]
    return (
        f"of the other kernels, beyond their bytes by more than 30 %: {'; '.join(late) or 'none'}"
    )


def step_stages(shape: Shape, device: Cpu | Cuda, repeats: int) -> dict[str, float]:
    """Median milliseconds of each kernel of the rest of a step, on rows of float16."""
    torch.manual_seed(0)
    rows, size, dim = shape.num_rows, shape.codebook_size, shape.dim
    x = torch.randn(rows, dim, device=device.device).half()
    codebook = torch.randn(size, dim, device=device.device)
    indices = torch.randint(size, (rows,), device=device.device)
    grad_loss, counts = (torch.ones(n, device=device.device) for n in (rows, size))
    of_loss = (grad_loss, x, codebook, indices, 1.0, "triton")
    rates = torch.tensor([0.01, 0.0], device=device.device)
    update = (counts.clone(), codebook.clone(), counts, codebook, None, None, rates)
    steps: dict[str, Callable[[], object]] = {
        "sums": lambda: ops.code_sums(x, indices, size, "triton"),
        "grad_x": lambda: ops.grad_x(x, *of_loss),
        "grad_codebook": lambda: ops.grad_codebook(*of_loss),
        "ema_update": lambda: ops.ema_update_(*update, "triton"),
    }
    return {name: median(step, device, repeats) for name, step in steps.items()}


def median(step: Callable[[], object], device: Cpu | Cuda, repeats: int) -> float:
    """Milliseconds."""
    step()
    return 1e3 * quantile([device.seconds(step) for _ in range(repeats)], 0.5)


def predict(shape: Shape) -> dict[str, Any]:
    """Milliseconds of the screen on an H100, as `make sass` has them for the Triton in use."""
    counts = {
        row["triton"]: row
        for row in json.loads(STORED.read_text())
        if (row["kernel"], row["D"], row["target"]) == ("screen_codes", shape.dim, "sm_90")
    }
    # of another version: the nearest that was counted
    version = provenance.version("triton")
    counted = counts.get(version or "") or counts[max(counts)]
    launches = record_nearest_code(torch.zeros(NUM_ROWS, shape.dim), "sm_90")
    (screen,) = (launch for launch in launches if launch.name == "screen_codes")
    work = screen_work(screen)
    least = floors(shape, work, counted["alu_per_pair"], counted["total_per_pair"])
    return {
        "N": shape.num_rows,
        "K": shape.codebook_size,
        "D": shape.dim,
        "counted_with": counted["triton"],
        **{f"least_{name}": value for name, value in least.items()},
        "floor": max(least.values()),
        "sum": in_turns(least),
        "flash_kmeans_published": shape.flash_kmeans,
    }


def misses(floor: float, turns: float, measured: float) -> str:
    """What is outside of floor to sum by more than is allowed, in words; else nothing."""
    if measured > (1 + MISS) * turns:
        return f"{measured / turns:.2f}× the sum"
    if measured < (1 - MISS) * floor:
        return f"{measured / floor:.2f}× the floor"
    return ""


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
