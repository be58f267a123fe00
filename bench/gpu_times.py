"""Times on a quiet GPU, beside peers: ``python -m bench.gpu_times --out DIR``, in `make gpu-check`.

Wall time is what a caller waits for. The time in a CUDA graph has no work of the host in it, and
the kernels are those that a profiler sees. Each kind of result has a file of its own in DIR, as in
bench/results/h200: `python -m bench --docs` makes tables of them. Every row is written at once.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import vqtriton
from bench import provenance, report
from bench.cases import CASES, Case
from bench.check import nearest_codes
from bench.devices import make_device
from bench.measure import GIB, Options, measure
from bench.subjects import SUBJECTS, Run, make_inputs
from vqtriton import environment, ops
from vqtriton.tuning.measure import captured, one_ms, wall_ms

Step = Callable[[], object]
REPEATS = 20
TINY = Case("tiny", 48, 40, 8)
MODELS = ("rq-vae", "dac", "encodec", "mimi", "taming", "titok", "llamagen", "rotation-f8")
LATENCY = (*MODELS, "vit-vqgan", "simvq", "roofline-1M-1024-64", "roofline-1M-16384-128")
# compiled for many seconds each
COMPILED = ("encodec", "vit-vqgan")
DTYPES = (torch.float32, torch.bfloat16)
WEIGHED = ("vit-vqgan", "llamagen", "encodec", "roofline-1M-1024-64")
# N, K, D
SUMS = ((1 << 20, 1024, 64), (1 << 20, 16384, 128), (32768, 16384, 8), (4096, 256, 32))
CLUSTERED = ((1 << 20, 1024, 64), (1 << 18, 8192, 128), (1 << 16, 256, 16))
ITERS = 10


@dataclass
class Context:
    """Where it runs, and where results go."""

    out: Path
    device: str
    end: float

    @property
    def is_dry(self) -> bool:
        return self.device == "cpu"

    def write(self, name: str, row: dict[str, Any]) -> None:
        line = json.dumps(row)
        print(f"{name}: {line:.300}", flush=True)
        with (self.out / f"{name}.jsonl").open("a") as file:
            file.write(line + "\n")

    def cases(self, names: tuple[str, ...]) -> list[Case]:
        return [TINY] if self.is_dry else [CASES[name] for name in names]

    def is_late(self, what: str) -> bool:
        """Whether no more is to be begun; what is left out is said."""
        late = time.monotonic() > self.end
        if late:
            print(f"left out, the time is up: {what}", flush=True)
        return late


# --- how a step is timed ---


def times(step: Step, device: str) -> dict[str, Any]:
    """Microseconds of a step: wall, host, in a CUDA graph; its kernels, and how many there are."""
    for _ in range(3):
        step()
    wall_us = 1e3 * wall_ms(step, torch.device(device), REPEATS)
    found: dict[str, Any] = {"wall_us": round(wall_us, 1)}
    if device == "cpu":
        return found
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(REPEATS):
        step()
    found["host_us"] = round(1e6 * (time.perf_counter() - start) / REPEATS, 1)
    torch.cuda.synchronize()
    found["kernels"] = kernels(step)
    found["launches"] = sum(count for _, count, _ in found["kernels"])
    try:
        found["graph_us"] = in_graph(step)
    except Exception as error:
        # a peer may wait for the device, which no graph can hold
        found["no_graph"] = f"{type(error).__name__}: {error}"[:200]
        torch.cuda.synchronize()
    return found


def kernels(step: Step) -> list[tuple[str, int, float]]:
    """Name, launches and microseconds of what the device does in a step, the longest first."""
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CPU, activity.CUDA]) as profile:
        for _ in range(5):
            step()
        torch.cuda.synchronize()
    counts: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            counts[event.name[:60]] += 1
            total[event.name[:60]] += event.device_time_total
    return [(name, counts[name] // 5, round(us / 5, 1)) for name, us in total.most_common()]


def in_graph(step: Step) -> float:
    """Microseconds of a replay, the mean of many in a row."""
    replay = captured(step)
    replay()
    ms = one_ms(lambda: [replay() for _ in range(REPEATS)], torch.device("cuda"))
    return round(1e3 * ms / REPEATS, 1)


# --- what is timed ---


def describe(context: Context) -> None:
    """Where the figures come from."""
    print(environment.describe())
    device = make_device(context.device)
    rates = device.rates()
    row = {"part": "environment", "device": device.name, "driver": device.driver}
    row |= {"python": sys.version.split()[0], "torch": str(torch.__version__)}
    row |= {"triton": provenance.version("triton"), "commit": provenance.commit()}
    row |= {"copy_bytes_per_s": rates.memory, "matmul_flop_per_s": rates.dot}
    context.write("correctness", row)


def latency(context: Context) -> None:
    """Searches and training steps of real models: wall beside GPU time, and launches."""
    for dtype in DTYPES[:1] if context.is_dry else DTYPES:
        for case in context.cases(LATENCY):
            inputs = make_inputs(case, dtype, context.device)
            for (what, subject), step in steps(case, inputs, context).items():
                name = f"{case}, {what}, {subject}, {dtype}"
                if context.is_late(name):
                    continue
                about = {"case": case.name, "N": case.num_rows, "K": case.codebook_size}
                about |= {"D": case.dim, "dtype": str(dtype).removeprefix("torch.")}
                about |= {"what": what, "subject": subject}
                try:
                    context.write("latency", about | times(step, context.device))
                except Exception as error:
                    # what is measured of the others is not lost with it
                    context.write("latency", about | {"error": f"{error}"[:300]})


def steps(case: Case, inputs: Any, context: Context) -> dict[tuple[str, str], Step]:
    x, codebook = inputs.x.detach(), inputs.codebook
    backend = "torch" if context.is_dry else "triton"
    prepared = vqtriton.prepare_codebook(codebook, backend=backend)

    def start(subject: str, scope: str) -> Run:
        run = Run(SUBJECTS[subject], scope, inputs)
        with torch.no_grad():
            run.reset()
        return run

    def run(subject: str, scope: str) -> Step:
        return start(subject, scope).step

    found: dict[tuple[str, str], Step] = {
        ("assign", "ours exact"): run("vqtriton exact", "assign"),
        ("assign", "ours exact, prepared"): lambda: vqtriton.nearest_code(x, prepared),
        ("assign", "ours fast"): run("vqtriton fast", "assign"),
        ("train", "ours"): run("vqtriton exact", "training"),
    }
    if case.matrix_bytes < 8 * GIB:
        found["assign", "addmm+argmin"] = run("torch addmm+argmin", "assign")
        if SUBJECTS["vector-quantize-pytorch"].is_installed():
            found["train", "vqp"] = run("vector-quantize-pytorch", "training")
    if SUBJECTS["flash-kmeans"].is_installed() and not context.is_dry:
        found["assign", "flash-kmeans"] = run("flash-kmeans", "assign")
    if case.name in (*COMPILED, TINY.name):
        search = torch.compile(vqtriton.nearest_code, mode="reduce-overhead")
        found["assign", "ours exact, reduce-overhead"] = lambda: search(x, codebook)
        compiled = start("vqtriton exact", "training")
        compiled._module = torch.compile(compiled._module, mode="reduce-overhead")
        found["train", "ours, reduce-overhead"] = compiled.step
    return found


def sums(context: Context) -> None:
    """Sums per code, beside other ways to add, and what uneven codes cost."""
    sys.path.insert(0, str(provenance.ROOT / "tests"))
    from data import SKEWS

    backend = "torch" if context.is_dry else "triton"
    for n, k, d in ((48, 7, 8),) if context.is_dry else SUMS:
        for skew, make in SKEWS.items():
            name = f"N={n} K={k} D={d} float32, {skew}"
            if context.is_late(name):
                continue
            torch.manual_seed(0)
            x = torch.randn(n, d, device=context.device)
            indices = make(n, k).to(context.device)
            ways: dict[str, Step] = {
                "code_sums": lambda x=x, i=indices, k=k: ops.code_sums(x, i, k, backend),
                "index_add_": lambda x=x, i=indices, k=k: index_add(x, i, k),
            }
            if not context.is_dry:
                ways["code_sums, atomics"] = lambda x=x, i=indices, k=k: atomic_sums(x, i, k)
                if provenance.version("flash-kmeans"):
                    ways["flash-kmeans sorted"] = lambda x=x, i=indices, k=k: sorted_sums(x, i, k)
            found = {way: times(step, context.device) for way, step in ways.items()}
            key = "wall_us" if context.is_dry else "graph_us"
            ms = {way: row[key] / 1e3 for way, row in found.items() if key in row}
            context.write("sums", {"part": "sums", "case": name, "ms": ms})


def index_add(x: Tensor, indices: Tensor, k: int) -> Tensor:
    """What most write; an index that is left out goes to a code of its own."""
    total = torch.zeros(k + 1, x.shape[1], device=x.device)
    return total.index_add_(0, indices.where(indices >= 0, k), x)[:-1]


def atomic_sums(x: Tensor, indices: Tensor, k: int) -> Tensor:
    from vqtriton.kernels.atomic_sums import atomic_sums

    return atomic_sums(x[None], indices[None], k)[0]


def sorted_sums(x: Tensor, indices: Tensor, k: int) -> Tensor:
    from flash_kmeans.centroid_update_triton import triton_centroid_update_sorted_euclid

    # it takes no index that is left out
    total = torch.zeros(1, k + 1, x.shape[1], device=x.device)
    triton_centroid_update_sorted_euclid(
        x[None],
        indices.where(indices >= 0, k)[None],
        total,
        centroid_sums=total,
        calculate_new=False,
    )
    return total[0, :-1]


def kmeans(context: Context) -> None:
    """Ten iterations and their start, beside flash-kmeans."""
    for n, k, d in ((200, 7, 8),) if context.is_dry else CLUSTERED:
        torch.manual_seed(0)
        x = torch.randn(n, d, device=context.device)
        ways: dict[str, Callable[[], Tensor]] = {
            f"vqtriton, {init}": lambda x=x, k=k, init=init: vqtriton.kmeans(
                x, k, ITERS, torch.Generator(context.device).manual_seed(0), init=init
            )
            for init in ("random", "k-means++")
        }
        if provenance.version("flash-kmeans") and not context.is_dry:
            from flash_kmeans import batch_kmeans_Euclid

            ways["flash-kmeans, random"] = lambda x=x, k=k: batch_kmeans_Euclid(
                x[None], k, max_iters=ITERS, tol=-1.0
            )[1][0]
        for subject, fit in ways.items():
            if context.is_late(f"k-means, {n}, {k}, {d}, {subject}"):
                continue
            codebook = fit().to(x)
            ms = wall_ms(fit, torch.device(context.device), 3)
            inertia = (x - codebook[nearest_codes(x, codebook)]).double().square().sum().item() / n
            row = {"N": n, "K": k, "D": d, "iters": ITERS, "subject": subject}
            row |= {"ms": ms, "inertia_per_row": round(inertia, 4)}
            context.write("kmeans", row)


def peers(context: Context) -> None:
    """Wrong rows and memory of searches; `bench.measure` has the rows of ``python -m bench``."""
    names = [name for name, subject in SUBJECTS.items() if not subject.is_compiled]
    device = make_device(context.device)
    for case in ("rq-vae",) if context.is_dry else WEIGHED:
        for dtype in (torch.float16, torch.float32):
            if context.is_late(f"peers, {case}, {dtype}"):
                continue
            found = measure(
                ["assign"],
                lambda _, case=case: [case],
                lambda _: [n for n in names if n != "vqtriton.reference"],
                device,
                Options(dtype, 3, 16 * GIB, command="make gpu-check"),
            )
            for row in found.rows:
                context.write("peers", row)
            print(report.table(found.rows), *found.left_out, *found.refused, sep="\n  ")


def training(context: Context) -> None:
    """The whole VQ-VAE, for an epoch on MNIST."""
    folder = context.out / "mnist"
    flags = [f"--device={context.device}", "--epochs=1", f"--out={folder}"]
    if context.is_dry:
        flags += ["--limit=64", "--codebook-size=16"]
    program = provenance.ROOT / "examples" / "train_mnist.py"
    subprocess.run([sys.executable, str(program), *flags], check=True, timeout=120)
    metrics = json.loads((folder / "metrics.json").read_text())
    images = 64 if context.is_dry else 60_000
    row = {"images_per_s": round(images / metrics["seconds"], 1)}
    context.write("training", row | {name: metrics[name] for name in ("seconds", "test_mse")})


# the most valuable first
STAGES: tuple[Callable[[Context], None], ...] = (describe, latency, kmeans, sums, training, peers)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--seconds", type=float, default=170.0, help="then nothing new is begun")
    parser.add_argument("--dry", action="store_true", help="tiny sizes on a CPU")
    args = parser.parse_args()
    if not args.dry and not torch.cuda.is_available():
        parser.error("torch sees no GPU; --dry walks through all of it on a CPU")
    args.out.mkdir(parents=True, exist_ok=True)
    device = "cpu" if args.dry else "cuda"
    context = Context(args.out, device, time.monotonic() + args.seconds)
    failed = []
    for stage in STAGES:
        start = time.monotonic()
        try:
            stage(context)
        except Exception:
            # the other stages are worth having
            traceback.print_exc()
            failed.append(stage.__name__)
        print(f"=== {stage.__name__}: {time.monotonic() - start:.0f} s", flush=True)
    print(f"failed: {', '.join(failed)}" if failed else f"all of it is in {args.out}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
