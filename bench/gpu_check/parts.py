"""The parts of a check: functions that return a line, raise `Skipped`, or fail.

python -m bench.gpu_check.parts PART FOLDER [--dry]
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

import vqtriton
from bench import provenance, report
from bench.check import find_truth
from bench.devices import make_device
from bench.gpu_check.__main__ import RESULT, ROOT, SKIPPED
from bench.machines import Shape
from bench.measure import Options, measure
from bench.subjects import default_subjects
from vqtriton import ops, reference

DIMS = (1, 2, 3, 4, 8, 12, 16, 32, 64, 100, 128, 256, 512, 1024)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Skipped(Exception):
    """Why a part cannot run here."""


class Wrong(Exception):
    """What a part found."""


@dataclass(frozen=True)
class Setting:
    """Where the parts run, and how large."""

    out: Path
    is_dry: bool

    @property
    def device(self) -> str:
        return "cpu" if self.is_dry else "cuda"

    def size(self, on_gpu: int, dry: int) -> int:
        return dry if self.is_dry else on_gpu


def environment(at: Setting) -> str:
    lines = [f"commit {provenance.commit()}, Python {sys.version.split()[0]}"]
    packages = ("torch", "triton", "numpy", "flash-kmeans", "vector-quantize-pytorch")
    lines += [f"{package} {provenance.version(package)}" for package in packages]
    if not at.is_dry:
        lines.append(str(torch.cuda.get_device_properties(0)))
    if shutil.which("nvidia-smi"):
        lines.append(subprocess.run(["nvidia-smi", "-q", "-d", "CLOCK,POWER"], text=True,
                                    capture_output=True, check=False).stdout)  # fmt: skip
    print("\n".join(lines))
    device = make_device(at.device)
    if at.is_dry:
        return f"{device.name}; rates are not measured in a dry run"
    rates = device.rates()
    return (
        f"{device.name}, driver {device.driver}: {rates.dot / 1e12:.0f} TFLOP/s in float16, "
        f"{rates.memory / 1e12:.2f} TB/s"
    )


def exact(at: Setting) -> str:
    """Every index beside float64: hard cases by the definition, the many by `find_truth`."""
    rows = mismatches = in_doubt = 0
    for name, x, codebook, truth in _exact_cases(at):
        out = ops.run_kernels(x, codebook, exact=True)
        wrong = int((out.indices[0] != truth()).sum())
        print(f"{name}: {x.shape[0]} rows, {wrong} wrong, {int(out.num_doubtful)} in doubt")
        rows, mismatches = rows + x.shape[0], mismatches + wrong
        in_doubt += int(out.num_doubtful)
    line = f"{rows} rows, {mismatches} wrong, {in_doubt / rows:.2%} in doubt"
    if mismatches:
        raise Wrong(line)
    return line


def _exact_cases(at: Setting) -> Iterator[tuple[str, Tensor, Tensor, Callable[[], Tensor]]]:
    """Hard cases in every dimension, then many rows."""
    sys.path.insert(0, str(ROOT / "tests"))
    data = importlib.import_module("data")
    dims = DIMS[1:10:4] if at.is_dry else DIMS
    names = list(data.HARD)[:: 8 if at.is_dry else 1]
    for name in names:
        for dim in dims:
            torch.manual_seed(dim)
            x, codebook = data.HARD[name](at.size(500, 20), at.size(999, 33), dim)
            if torch.float64 in (x.dtype, codebook.dtype):
                continue
            x, codebook = x.to(at.device), codebook.to(at.device)
            yield (
                f"{name}, D={dim}",
                x,
                codebook,
                lambda x=x, c=codebook: reference.nearest_code(x, c),
            )
    block, blocks = at.size(1 << 21, 64), at.size(56, 3)
    for turn in range(blocks):
        dim, dtype = DIMS[turn % len(DIMS)], DTYPES[turn % 3]
        torch.manual_seed(turn)
        # what x takes stays the same
        num_rows = max(at.size(1 << 17, 16), block if dim <= 64 else block * 64 // dim)
        size = at.size((257, 1024, 999)[turn % 3], 40)
        codebook = torch.randn(size, dim, device=at.device)
        x = torch.randn(num_rows, dim, device=at.device)
        if turn % 4 == 1:
            # between two codes, give or take a rounding
            pair = torch.randint(size, (2, num_rows), device=at.device)
            x = (codebook[pair[0]] + codebook[pair[1]]) / 2
        if turn % 4 == 2:
            x, codebook = x + 1000, codebook + 1000
        if turn % 4 == 3:
            x = torch.nn.functional.normalize(x)
            codebook = torch.nn.functional.normalize(codebook)
        x, codebook = x.to(dtype), codebook.to(dtype)
        inputs = SimpleNamespace(x=x, codebook=codebook)
        name = f"{str(dtype).removeprefix('torch.')}, K={size}, D={dim}, kind {turn % 4}"
        yield name, x, codebook, lambda i=inputs: find_truth(i, float("inf")).nearest


def _module(at: Setting, update: str, dim: int, size: int) -> vqtriton.VectorQuantize:
    torch.manual_seed(0)
    module = vqtriton.VectorQuantize(dim, size, codebook_update=update, backend="triton")
    with torch.no_grad():
        module.codebook.normal_()
    if update == "ema":
        module.embed_sum.copy_(module.codebook)
    return module.to(at.device)


def _step(module: vqtriton.VectorQuantize, x: Tensor) -> list[Tensor]:
    """A training step: outputs and gradients."""
    wanted = [x, *module.parameters()]
    out = module(x)
    grads = torch.autograd.grad(out.loss + out.quantized.square().sum(), wanted)
    return [*out, *grads]


def determinism(at: Setting) -> str:
    repeats = at.size(50, 3)
    x = torch.randn(at.size(100_003, 40), at.size(64, 8), device=at.device, requires_grad=True)
    load = torch.randn(at.size(4096, 8), at.size(4096, 8), device=at.device)
    for update in ("ema", "gradient"):
        first = None
        for repeat in range(repeats):
            module = _module(at, update, x.shape[1], at.size(1024, 17))
            if repeat % 2 and not at.is_dry:
                # something else on the device, so that programs run in another order
                with torch.cuda.stream(torch.cuda.Stream()):
                    _ = load @ load
            found = [t.detach().clone() for t in (*_step(module, x), *module.state_dict().values())]
            first = first or found
            for place, (a, b) in enumerate(zip(first, found, strict=True)):
                if not torch.equal(a, b):
                    raise Wrong(f"{update}: tensor {place} of repeat {repeat} differs in its bits")
    return f"{repeats} training steps, twice: the same bits"


def graph(at: Setting) -> str:
    if at.is_dry:
        raise Skipped("CUDA graphs need a GPU")
    results = []
    for update in ("ema", "gradient"):
        eager, captured = (_module(at, update, 64, 1024) for _ in range(2))
        batches = [torch.randn(20_000, 64, device="cuda") for _ in range(4)]
        static = batches[0].clone().requires_grad_()
        # steps before capture compile the kernels
        for module in (eager, captured):
            for _ in range(2):
                _step(module, batches[0].clone().requires_grad_())
        torch.cuda.synchronize()
        recorded = torch.cuda.CUDAGraph()
        with torch.cuda.graph(recorded):
            outputs = _step(captured, static)
        for number, batch in enumerate(batches):
            with torch.no_grad():
                static.copy_(batch)
            recorded.replay()
            want = _step(eager, batch.clone().requires_grad_())
            state = zip(captured.state_dict().values(), eager.state_dict().values(), strict=True)
            for a, b in (*zip(outputs, want, strict=True), *state):
                if not torch.equal(a, b):
                    raise Wrong(f"{update}: replay {number} differs from the eager step")
        results.append(f"{len(batches)} replays")
    return f"ema {results[0]}, gradient {results[1]}: the bits of eager steps"


def compile(at: Setting) -> str:
    x = torch.randn(at.size(20_000, 24), at.size(64, 5), device=at.device, requires_grad=True)
    for update in ("ema",) if at.is_dry else ("ema", "gradient"):
        eager, other = (_module(at, update, x.shape[1], at.size(1024, 7)) for _ in range(2))
        compiled = torch.compile(other, fullgraph=True)
        for _ in range(2):
            wanted = [x, *other.parameters()]
            out = compiled(x)
            got = [*out, *torch.autograd.grad(out.loss + out.quantized.square().sum(), wanted)]
            want = _step(eager, x)
            if not torch.equal(got[1], want[1]):
                raise Wrong(f"{update}: indices differ from the eager step's")
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    return "one graph, equal to eager steps"


def recompilation(at: Setting) -> str:
    if at.is_dry:
        raise Skipped("the interpreter compiles nothing; tests/test_compile.py reads the arguments")
    module = _module(at, "ema", 64, 1024)

    def compiled() -> int:
        kernels = {
            value
            for name, loaded in list(sys.modules.items())
            if name.startswith("vqtriton.kernels.")
            for value in vars(loaded).values()
            if hasattr(value, "device_caches")
        }
        return sum(len(entry[0]) for k in kernels for entry in k.device_caches.values())

    def step(num_rows: int) -> None:
        _step(module, torch.randn(num_rows, 64, device="cuda", requires_grad=True))

    # few rows split the codes; a single row may have strides of 1
    for num_rows in (2, 1000, 100_000):
        step(num_rows)
    before = compiled()
    if before == 0:
        raise Wrong("no compiled kernel was found to count")
    for num_rows in range(3, 100_000, 2000):
        step(num_rows)
    if compiled() != before:
        raise Wrong(f"{compiled() - before} kernels were compiled for other batch sizes")
    return f"{before} kernels for 50 batch sizes"


def large(at: Setting) -> str:
    """More than 2³¹ elements; rows here and there beside the same rows by themselves."""
    num_rows, dim, size = at.size((1 << 25) + 77, 400), at.size(64, 3), at.size(512, 9)
    x = torch.empty(num_rows, dim, dtype=torch.float16, device=at.device).normal_()
    codebook = torch.randn(size, dim, device=at.device)
    out = ops.run_kernels(x, codebook, exact=True, gather=True)
    for start in (0, num_rows // 2, num_rows - 100):
        some = slice(start, start + 100)
        alone = ops.run_kernels(x[some], codebook, exact=True, gather=True)
        assert out.quantized is not None
        assert alone.quantized is not None
        if not torch.equal(out.indices[0, some], alone.indices[0]):
            raise Wrong(f"indices from row {start} on differ from those of the rows alone")
        if not torch.equal(out.quantized[0, some], alone.quantized[0]):
            raise Wrong(f"codes from row {start} on differ from those of the rows alone")
    sums, counts = ops.code_sums(x, out.indices[0], size, "triton")
    if not torch.equal(counts, torch.bincount(out.indices[0], minlength=size)):
        raise Wrong("counts are wrong")
    total = sum(part.double().sum(0) for part in x.split(1 << 22))
    weight = sum(part.double().abs().sum(0) for part in x.split(1 << 22))
    if not ((sums.double().sum(0) - total).abs() <= 3 * 2**-24 * weight).all():
        raise Wrong("the sums of all codes are not the sum of all rows")
    return f"{x.numel()} elements, {x.numel() / 2**31:.3f} times 2³¹"


def predictions(at: Setting) -> str:
    """Milliseconds of the whole search beside what the instruction counts of the screen allow."""
    # in a process that does not interpret the kernels, since launches are recorded for it
    environ = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.sass", "--predictions"]
    done = subprocess.run(
        command, cwd=ROOT, env=environ, text=True, capture_output=True, check=True
    )
    device, lines, missed = make_device(at.device), [], 0
    for fields, floor, total in json.loads(done.stdout):
        shape = Shape(**fields)
        rows, size = at.size(shape.num_rows, 16), at.size(shape.codebook_size, 40)
        x = torch.randn(rows, shape.dim, device=at.device, dtype=torch.float16)
        codebook = torch.randn(size, shape.dim, device=at.device, dtype=torch.float16)
        prepared = vqtriton.prepare_codebook(codebook, backend="triton")
        times = {}
        for precision in ("fast", "exact"):

            def step(p: str = precision, x: Tensor = x, c=prepared) -> Tensor:
                return vqtriton.nearest_code(x, c, precision=p)

            step()
            repeats = at.size(9, 1)
            times[precision] = 1e3 * statistics.median(device.seconds(step) for _ in range(repeats))
        ratio = times["exact"] / total
        missed += not 0.7 <= ratio <= 1.3
        lines.append(
            f"N={shape.num_rows} K={shape.codebook_size} D={shape.dim}: floor {floor:.3g}, "
            f"predicted {total:.3g}, fast {times['fast']:.3g}, exact {times['exact']:.3g} ms, "
            f"exact is {ratio:.2f} of it, {times['exact'] / times['fast']:.2f} of fast"
        )
        if at.is_dry and len(lines) == 2:
            break
    print("\n".join(lines))
    (at.out / "predictions.txt").write_text("\n".join(lines) + "\n")
    if at.is_dry:
        return "tiny shapes on the interpreter: the times mean nothing"
    return f"{missed} of {len(lines)} searches are more than 30 % off the prediction"


def peers(at: Setting) -> str:
    device = make_device(at.device)
    scopes = ("assign",) if at.is_dry else ("assign", "training")
    roofline = tuple(f"roofline-{name}" for name in ("1M-1024-8", "1M-1024-64", "64K-1024-128"))
    models = ("vit-vqgan", "llamagen", "titok", "encodec", "rq-vae", "simvq")
    cases = ("rq-vae",) if at.is_dry else (*roofline, *models)
    dtype = torch.float32 if at.is_dry else torch.float16
    found = measure(
        scopes,
        lambda scope: cases,
        lambda scope: default_subjects(scope, at.device, dtype)[: 2 if at.is_dry else None],
        device,
        Options(dtype=dtype, repeats=at.size(7, 1), budget=70, command="make gpu-check"),
        lambda rows: print(report.table(rows) if rows else "", flush=True),
    )
    report.write_rows(at.out / "peers.jsonl", found.rows)
    print("left out:", *found.left_out, sep="\n  ")
    if found.refused:
        raise Wrong("; ".join(found.refused))
    return f"{len(found.rows)} rows, {len(found.left_out)} left out"


def tests(at: Setting) -> str:
    command = [sys.executable, "-m", "pytest", "-q", "-x" if at.is_dry else "--maxfail=20"]
    if at.is_dry:
        command += ["-m", "kernel", "tests/test_code_sums.py", "-k", "drift or gather"]
    else:
        command += ["-m", "(gpu or kernel) and not slow"]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=False)
    print(done.stdout[-8000:], done.stderr[-2000:])
    last = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else "no output"
    if done.returncode:
        raise Wrong(last)
    return last


def sanitizer(at: Setting) -> str:
    program = shutil.which("compute-sanitizer")
    if program is None:
        raise Skipped("compute-sanitizer is not installed")
    if at.is_dry:
        raise Skipped("compute-sanitizer needs a GPU")
    # a part of the hard cases is all that it looks at
    command = [program, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, "-c",
               "from bench.gpu_check.parts import small; small()"]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=False)
    print(done.stdout[-4000:], done.stderr[-2000:])
    if done.returncode:
        raise Wrong(f"memcheck ended with exit status {done.returncode}")
    return "memcheck of a small training step: no error"


def small() -> None:
    """What the sanitizer runs."""
    at = Setting(Path(), is_dry=False)
    for update in ("ema", "gradient"):
        _step(_module(at, update, 20, 300), torch.randn(333, 20, device="cuda", requires_grad=True))
    torch.cuda.synchronize()


FUNCTIONS: dict[str, Callable[[Setting], str]] = {
    function.__name__: function
    for function in (
        environment, exact, determinism, graph, recompilation, large, compile, predictions,
        peers, tests, sanitizer,
    )
}  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_check.parts", description=__doc__)
    parser.add_argument("part", choices=FUNCTIONS)
    parser.add_argument("out", type=Path)
    parser.add_argument("--dry", action="store_true")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    try:
        line = FUNCTIONS[options.part](Setting(options.out, options.dry))
    except Skipped as reason:
        print(f"{RESULT}{reason}")
        return SKIPPED
    except Exception as error:
        # the summary has one line for it, the log all of it
        traceback.print_exc(file=sys.stdout)
        message = str(error).strip().splitlines()
        print(f"{RESULT}{type(error).__name__}: {message[0] if message else ''}")
        return 1
    print(f"{RESULT}{line}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
