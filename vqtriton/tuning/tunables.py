"""What can be tuned: for each op its tiles, how it is launched with them, and what is right."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vqtriton import reference, torch_backend, triton_backend
from vqtriton.kernels import (
    code_sums,
    ema_update,
    nearest_code,
    screen_codes,
    screen_tiles,
    vector_quantize_grad,
)
from vqtriton.kernels.arguments import Pull, Update
from vqtriton.planes import inner_size, prepare_planes, screen_bound
from vqtriton.screening import error_bound
from vqtriton.tiles.problems import DTYPES, Problem
from vqtriton.tuning.compiling import Launch, launches_of
from vqtriton.tuning.machines import Work

# rows that the float64 reference looks at
REFERENCE_ROWS = 64


class Inputs(NamedTuple):
    """Of one step."""

    x: Tensor  # [N, D]
    codebook: Tensor  # [K, D] float32
    indices: Tensor  # [N] int64
    grad: Tensor  # [N, D]


def make_inputs(problem: Problem, device: torch.device, seed: int = 0) -> Inputs:
    """Gaussian, with rows that are codes, ties between two codes, a NaN, and rows of no code."""
    generator = torch.Generator(device).manual_seed(seed)
    n, k, d = problem.num_rows, problem.codebook_size, problem.dim
    x, codebook, grad = (
        torch.randn(size, d, dtype=torch.float32, device=device, generator=generator)
        for size in (n, k, n)
    )
    hard = min(n, k, 16)
    x[:hard] = codebook[:hard]
    codebook[k // 2] = codebook[0]
    if n > 20:
        x[20, -1] = torch.nan
    indices = torch.randint(k, (n,), dtype=torch.int64, device=device, generator=generator)
    indices[3::7] = -1
    dtype = DTYPES[problem.dtype]
    return Inputs(x.to(dtype), codebook, indices, grad.to(dtype))


@dataclass(frozen=True)
class Tunable:
    """An op."""

    # what is done before the clock starts
    prepare: Callable[[Inputs], Any]
    # runs it, on what was prepared
    run: Callable[[Any, Any], tuple[Tensor, ...]]
    # whether results are right
    is_right: Callable[[Inputs, tuple[Tensor, ...]], bool]
    # what it would launch for a target with tiles
    launches: Callable[[Problem, str, Any], list[Launch]]
    # products and bytes of a launch, where the static model knows them
    work: Callable[[Launch], Work] | None = None
    # likewise, how many times as long the busiest multiprocessor of a number of them takes as it
    # would if rows and codes were evenly divided
    unevenness: Callable[[Problem, Any, int], float] | None = None


# --- the search ---


def prepare_screen(inputs: Inputs) -> tuple[Tensor, Tensor, Any]:
    x, codebook, *_ = inputs
    return x, codebook, _planes(codebook, screen_tiles.architecture(x.device))


def run_screen(prepared: tuple[Tensor, Tensor, Any], config: Any) -> tuple[Tensor, ...]:
    """The whole search, which is what the screen's tiles have to be good for."""
    x, codebook, planes = prepared
    rest = nearest_code.config_for(x[None], planes.codes.shape[2])
    out = nearest_code.nearest_code(
        x[None],
        codebook[None],
        planes,
        screen_bound(planes, config.block_k, triton_backend.tensor_core(x.device)),
        error_bound(x.shape[1], torch.float32),
        exact=True,
        config=nearest_code.NearestCodeConfig(config, rest.rescue),
    )
    return (out.indices[0],)


def screen_is_right(inputs: Inputs, results: tuple[Tensor, ...]) -> bool:
    """Every row beside the torch backend, some of them beside the reference."""
    (indices,) = results
    x, codebook, *_ = inputs
    few = torch.linspace(
        0, len(x) - 1, min(len(x), REFERENCE_ROWS), dtype=torch.float32, device=x.device
    ).long()
    truth = reference.nearest_code(x[few], codebook)
    return torch.equal(indices[few], truth) and torch.equal(
        indices, torch_backend.nearest_code(x, codebook, "exact")
    )


def screen_launches(problem: Problem, target: str, config: Any, splits: int = 1) -> list[Launch]:
    """In one part the screen finishes as well, for which it needs more registers."""
    x = torch.zeros(1, 48, problem.dim, dtype=DTYPES[problem.dtype])
    # two tiles at least
    generator = torch.Generator().manual_seed(0)
    codebook = torch.randn(512, problem.dim, dtype=torch.float32, generator=generator)
    planes = _planes(codebook, target)
    bound = screen_bound(planes, config.block_k)
    rest = nearest_code.config_for(x, planes.codes.shape[2])
    launched = launches_of(
        (screen_codes, nearest_code),
        nearest_code.nearest_code,
        x,
        codebook[None],
        planes,
        bound,
        error_bound(problem.dim, torch.float32),
        exact=True,
        splits=splits,
        config=nearest_code.NearestCodeConfig(config, rest.rescue),
    )
    return [launch for launch in launched if launch.name == "screen_codes"]


def screen_work(launch: Launch) -> Work:
    """Per (row, code) pair: see `vqtriton.tuning.machines.floors`."""
    values = launch.values
    offset_bytes = 0 if values["BIAS_COLUMNS"] else values["offset_ptr"].element_size()
    code_bytes = values["codes_ptr"].element_size() * values["INNER"] + offset_bytes
    # of 2 bytes an element, as the floor of the memory has it; once for each tile of codes
    row_bytes = 2 * values["BLOCK_N"] * values["D"] / values["BLOCK_K"]
    if values["HOLD_ROWS"]:
        row_bytes = 0.0
    return Work(values["BLOCK_N"], code_bytes, values["INNER"], uses_mma=True, row_bytes=row_bytes)


def of_few_rows(problem: Problem) -> Inputs:
    """What is launched does not follow N and K, but for the grid."""
    few = problem._replace(num_rows=48, codebook_size=40)
    return make_inputs(few, torch.device("cpu"))


def screen_unevenness(problem: Problem, config: Any, processors: int) -> float:
    """Of few rows: whole tiles are counted, and programs that do not go round."""
    rows = -(-problem.num_rows // config.block_n)
    tiles = -(-problem.codebook_size // config.block_k)
    inner = inner_size(problem.dim)[0]
    splits = screen_tiles.choose_splits(rows, tiles, 2 * inner * config.block_k, processors, inner)
    tiles_per_split = -(-tiles // min(splits, tiles))
    programs = rows * -(-tiles // tiles_per_split)
    of_program = config.block_n * config.block_k * tiles_per_split
    turns = -(-programs // processors)
    return turns * of_program * processors / (problem.num_rows * problem.codebook_size)


def _planes(codebook: Tensor, target: str) -> Any:
    lanes, vec = screen_tiles.ACCUMULATOR_ORDER[target]
    return prepare_planes(codebook[None], lanes=lanes, vec=vec)


def as_they_are(inputs: Inputs) -> Inputs:
    return inputs


# --- the rest of a step, of which the static model tells no tiles apart: they move the same bytes


def run_sums(inputs: Inputs, config: Any) -> tuple[Tensor, ...]:
    """Sums, and the codebook's gradient."""
    x, codebook, indices, _ = inputs
    sums, counts = code_sums.code_sums(x[None], indices[None], len(codebook), config=config)
    grad_loss = torch.ones(1, len(x), dtype=torch.float32, device=x.device)
    pull = Pull(grad_loss, x[None], codebook[None], indices[None], 0.5)
    return sums[0], counts[0], vector_quantize_grad.grad_codebook(pull, config=config)[0]


def sums_are_right(inputs: Inputs, results: tuple[Tensor, ...]) -> bool:
    x, codebook, indices, _ = inputs
    size = len(codebook)
    sums, counts, grad = results
    want, want_counts = torch_backend.code_sums(x.double(), indices, size)
    magnitude, _ = torch_backend.code_sums(x.double().abs(), indices, size)
    is_near = (sums - want).abs() <= 1.01 * 2.0**-24 * magnitude
    want_grad = 0.5 * (want_counts[:, None] * codebook.double() - want)
    terms = magnitude + want_counts[:, None] * codebook.double().abs()
    is_grad_near = (grad - want_grad).abs() <= 2.0**-22 * terms
    return torch.equal(counts, want_counts) and bool((is_near & is_grad_near).all())


def sums_launches(problem: Problem, target: str, config: Any) -> list[Launch]:
    """Sums, and the codebook's gradient, of few rows and of many."""
    x, codebook, indices, _ = of_few_rows(problem)
    grad_loss = torch.ones(1, len(x), dtype=torch.float32)
    many = replace(config, most_elements=0)
    pull = Pull(grad_loss, x[None], codebook[None], indices[None], 1.0)
    modules = (code_sums, vector_quantize_grad)
    launchers = (code_sums.code_sums, vector_quantize_grad.grad_codebook)
    arguments = ((x[None], indices[None], len(codebook)), (pull,))
    return [
        launch
        for launcher, given in zip(launchers, arguments, strict=True)
        for tiles in (config, many)
        for launch in launches_of(modules, launcher, *given, config=tiles)
    ]


def run_grad_x(inputs: Inputs, config: Any) -> tuple[Tensor, ...]:
    x, codebook, indices, grad = inputs
    grad_loss = torch.ones(1, len(x), dtype=torch.float32, device=x.device)
    pull = Pull(grad_loss, x[None], codebook[None], indices[None], 0.5)
    return (vector_quantize_grad.grad_x(grad[None], pull, config=config)[0],)


def grad_x_launches(problem: Problem, target: str, config: Any) -> list[Launch]:
    x, codebook, indices, grad = of_few_rows(problem)
    grad_loss = torch.ones(1, len(x), dtype=torch.float32)
    pull = Pull(grad_loss, x[None], codebook[None], indices[None], 1.0)
    launcher = vector_quantize_grad.grad_x
    return launches_of(vector_quantize_grad, launcher, grad[None], pull, config=config)


def grad_x_is_right(inputs: Inputs, results: tuple[Tensor, ...]) -> bool:
    x, codebook, indices, grad = inputs
    want = grad.double() + 0.5 * (x.double() - codebook.double()[indices])
    want[indices < 0] = 0
    eps = torch.finfo(x.dtype).eps
    return torch.allclose(results[0].double(), want, rtol=eps, atol=4 * 2.0**-24, equal_nan=True)


def run_ema_update(statistics: tuple[Tensor, ...], config: Any) -> tuple[Tensor, ...]:
    """In place: a step without samples for dead codes, and one with."""
    _step_twice(lambda update: ema_update.ema_update_(update, config=config), statistics)
    return statistics[:2]


def _step_twice(step: Callable[[Update], None], statistics: tuple[Tensor, ...]) -> None:
    size, codebook, counts, sums = statistics
    rates = torch.tensor([0.5, 1.6], dtype=torch.float32, device=size.device)
    step(Update(size, codebook, counts, sums, None, None, rates))
    # cluster sizes are quarters from 0.5 to 2.75: about half are dead
    step(Update(size, codebook, counts, sums, sums + 1, (counts > 0).float(), rates))


def ema_update_launches(problem: Problem, target: str, config: Any) -> list[Launch]:
    """With and without samples for dead codes."""
    statistics = prepare_ema_update(of_few_rows(problem))
    size, codebook, *_ = statistics
    rates = torch.ones(2, dtype=torch.float32)
    return [
        launch
        for drawn in ((None, None), (codebook, size))
        for launch in launches_of(
            ema_update, ema_update.ema_update_, Update(*statistics, *drawn, rates), config=config
        )
    ]


def ema_update_is_right(inputs: Inputs, results: tuple[Tensor, ...]) -> bool:
    statistics = prepare_ema_update(inputs)
    _step_twice(lambda update: torch_backend.ema_update_(*update), statistics)
    return all(
        torch.allclose(got, want, rtol=32 * 2.0**-24, atol=32 * 2.0**-24)
        for got, want in zip(results, statistics[:2], strict=True)
    )


def prepare_ema_update(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sizes and codes as they were; counts and sums of a batch."""
    codebook = inputs.codebook
    counts = torch.arange(len(codebook), dtype=torch.int64, device=codebook.device)
    counts = counts.remainder(5).float()
    sums = (codebook + 1) * counts[:, None]
    return torch.ones_like(counts), codebook.clone(), counts, sums


TUNABLES = {
    "nearest_code": Tunable(
        prepare_screen,
        run_screen,
        screen_is_right,
        screen_launches,
        screen_work,
        screen_unevenness,
    ),
    "code_sums": Tunable(
        as_they_are,
        run_sums,
        sums_are_right,
        sums_launches,
    ),
    "grad_x": Tunable(
        as_they_are,
        run_grad_x,
        grad_x_is_right,
        grad_x_launches,
    ),
    "ema_update": Tunable(
        prepare_ema_update,
        run_ema_update,
        ema_update_is_right,
        ema_update_launches,
    ),
}
