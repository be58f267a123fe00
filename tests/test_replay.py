"""Calls that are replayed do what they did when they were recorded, with other tensors."""

from __future__ import annotations

import ctypes
import importlib
import threading
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from vqtriton import torch_backend
from vqtriton.kernels import replay

pytest.importorskip("triton")
triton_backend = importlib.import_module("vqtriton.triton_backend")
LAUNCHERS = ("atomic_sums", "code_sums", "draw_rows", "ema_update", "nearest_code")
LAUNCHERS += ("normalize_rows", "prepare_planes", "screen_codes", "vector_quantize_grad")

pytestmark = [pytest.mark.kernel, pytest.mark.real_device]


@pytest.fixture(autouse=True)
def fresh_plans(monkeypatch):
    if not torch.cuda.is_available():
        driver = importlib.import_module("stub_driver").StubDriver()
        monkeypatch.setattr("triton.runtime.driver", SimpleNamespace(active=driver))
    replay.forget()
    yield
    replay.forget()


def at(address: int, dtype: torch.dtype, size: int) -> Tensor:
    """A tensor of so many bytes that begins there."""
    return torch.frombuffer((ctypes.c_char * size).from_address(address), dtype=dtype)


def to_the_end(tensor: Tensor) -> tuple[torch.dtype, int]:
    """dtype, and bytes from the beginning of a tensor to the end of its storage."""
    before = tensor.storage_offset() * tensor.element_size()
    return tensor.dtype, tensor.untyped_storage().nbytes() - before


@pytest.fixture
def interpreted_replays(monkeypatch) -> list[str]:
    """What is recorded of an interpreted kernel can be replayed: addresses become tensors again.

    Gives the names of the kernels that were replayed.
    """
    replayed = []

    def launch(kernel, grid, *args, **given) -> None:
        kinds = [to_the_end(arg) if isinstance(arg, Tensor) else None for arg in args]

        def run(*addresses, stream) -> None:
            replayed.append(kernel.__name__)
            pairs = zip(addresses, kinds, strict=True)
            kernel[grid](*(at(a, *kind) if kind and a else a for a, kind in pairs), **given)

        # the interpreter asks torch for much
        with _disable_current_modes():
            kernel[grid](*args, **given)
        if replay.tape() is not None:
            replay.tape().note(run, args)

    for name in LAUNCHERS:
        module = importlib.import_module(f"vqtriton.kernels.{name}")
        monkeypatch.setattr(module, "launch", launch)
    return replayed


N, K, D = 40, 70, 12


def example(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    x, codebook = normal(N, D), normal(K, D)
    # rows in doubt, and one that is not finite
    codebook[K // 2 :] = codebook[: K // 2]
    x[5, 3] = torch.nan
    return {
        "x": x,
        "codebook": codebook,
        "mask": torch.rand(N, generator=generator) < 0.8,
        "indices": torch.randint(-1, K, (N,), generator=generator),
        "grad": normal(N, D),
        "grad_loss": normal(N),
        "size": torch.rand(K, generator=generator),
        "rates": torch.tensor([0.3, 0.1]),
    }


Call = Callable[..., object]
CALLS: dict[str, Call] = {
    "nearest_code": lambda b, x, codebook, **_: b.nearest_code(x, codebook, "exact"),
    "fast": lambda b, x, codebook, mask, **_: b.vector_quantize(
        x, codebook, mask, 0.5, 0.0, "mean", "fast"
    )[1:2],
    "prepared": lambda b, x, codebook, **_: b.nearest_code(
        x, codebook, "exact", "l2", b.prepare_codebook(codebook)
    ),
    "dot": lambda b, x, codebook, **_: b.nearest_code(x, codebook, "exact", "dot"),
    "normalize_rows": lambda b, x, **_: b.normalize_rows(x),
    **{
        f"vector_quantize {reduction}": lambda b, x, codebook, mask, reduction=reduction, **_: (
            b.vector_quantize(x, codebook, mask, 0.25, 1.0, reduction, "exact")
        )
        for reduction in ("mean", "sum", "none")
    },
    "vector_quantize_update_": lambda b, x, codebook, mask, size, rates, **_: (
        *b.vector_quantize_update_(
            *(x, codebook, mask, size, rates, 0.25, 0.0, "mean", True, False, "exact")
        ),
        codebook,
        size,
    ),
    "code_sums": lambda b, x, indices, **_: b.code_sums(x, indices, K),
    "grad_x": lambda b, grad, grad_loss, x, codebook, indices, **_: b.grad_x(
        grad, grad_loss, x, codebook, indices, 0.5
    ),
    "grad_codebook": lambda b, grad_loss, x, codebook, indices, **_: b.grad_codebook(
        grad_loss, x, codebook, indices, 0.5
    ),
}


@pytest.mark.needs_interpreter
@pytest.mark.needs_kernels
@pytest.mark.parametrize("name", CALLS)
def test_a_replay_does_the_same_with_other_tensors(name: str, interpreted_replays) -> None:
    call = CALLS[name]
    for seed in range(3):
        del interpreted_replays[:]
        found, want = (
            call(backend, **example(seed)) for backend in (triton_backend, torch_backend)
        )
        # the first is recorded
        assert bool(interpreted_replays) == (seed > 0)
        found, want = ([r] if isinstance(r, Tensor) else r for r in (found, want))
        if name == "fast":
            # its codes may be others, which are hardly farther
            torch.testing.assert_close(found[0], want[0], equal_nan=True, rtol=1e-2, atol=0)
            continue
        for one, other in zip(found, want, strict=True):
            assert one.shape == other.shape
            torch.testing.assert_close(one, other, equal_nan=True, rtol=1e-5, atol=1e-5)
    assert len([plan for plan in replay._plans.values() if plan is not None]) == 1


@pytest.mark.needs_interpreter
@pytest.mark.needs_kernels
def test_what_is_returned_stays_when_the_call_is_made_again(interpreted_replays) -> None:
    kept = []
    for seed in range(4):
        inputs = example(seed)
        kept.append((triton_backend.nearest_code(inputs["x"], inputs["codebook"], "exact"), inputs))
    for indices, inputs in kept:
        want = torch_backend.nearest_code(inputs["x"], inputs["codebook"], "exact")
        assert torch.equal(indices, want)


@pytest.mark.needs_interpreter
@pytest.mark.needs_kernels
@pytest.mark.parametrize("averages", [True, False])
def test_revival_draws_anew_in_each_replay(averages: bool, interpreted_replays) -> None:
    drawn = []
    for _ in range(3):
        given = example(0)
        given["rates"] = torch.tensor([0.0, 100.0])
        arguments = [given[n] for n in ("x", "codebook", "mask", "size", "rates")]
        options = 0.25, 1.0, "mean", averages, True, "exact"
        triton_backend.vector_quantize_update_(*arguments, *options)
        drawn.append(given["codebook"])
        rows = given["x"][given["mask"] & given["x"].isfinite().all(1)]
        # every code is dead: each is a row that counts, and none is used twice before all were
        assert ((drawn[-1][:, None] == rows).all(2).any(1)).all()
        assert len(drawn[-1].unique(dim=0)) == min(K, len(rows))
    assert interpreted_replays
    assert not torch.equal(drawn[1], drawn[2])


@pytest.mark.needs_interpreter
@pytest.mark.needs_kernels
def test_no_rows_need_no_device(monkeypatch) -> None:
    monkeypatch.setattr("triton.runtime.driver", None)
    for _ in range(3):
        indices = triton_backend.nearest_code(torch.zeros(0, 8), torch.randn(4, 8), "exact")
        assert indices.shape == (0,)


# --- what is recorded ---


def counted(function: Callable[..., Tensor]) -> tuple[Callable[..., Tensor], list[int]]:
    """The function under `replayed`, and a list that grows when its body runs."""
    runs: list[int] = []

    def body(*args) -> Tensor:
        runs.append(1)
        return function(*args)

    return replay.replayed(body), runs


def allocate(x: Tensor, *others: object) -> Tensor:
    """What has no launch: a replay leaves the result as it was allocated."""
    return torch.empty(x.shape)


@pytest.mark.once
def test_each_signature_is_recorded_once() -> None:
    call, runs = counted(allocate)
    x = torch.randn(8, 6)
    variants = (
        (x,),
        (x[:7],),
        (x.T.contiguous().T,),
        (x.half(),),
        # four bytes on
        (torch.randn(8 * 6 + 1)[1:].view(8, 6),),
        (x, "exact"),
        (x, 0.5),
        (x, (x.clone(),)),
        (x, None),
    )
    for number, variant in enumerate(variants, 1):
        for _ in range(3):
            assert call(*variant).shape == variant[0].shape
        assert len(runs) == number
    # what it looks at has changed
    replay.forget()
    call(x)
    assert len(runs) == len(variants) + 1
    torch.use_deterministic_algorithms(False)
    call(x)
    assert len(runs) == len(variants) + 2


@pytest.mark.once
@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.sort().values,
        lambda x: torch.empty(3).random_(),
        lambda x: torch.zeros(3),
        # an input
        lambda x: x,
        lambda x: x[1:],
        # a part of an allocation, and the same one twice
        lambda x: torch.empty(2, 3)[0],
        lambda x: (torch.empty(3),) * 2,
    ],
)
def test_what_a_replay_would_not_do_is_not_replayed(function) -> None:
    call, runs = counted(function)
    for _ in range(3):
        call(torch.randn(4))
    assert len(runs) == 3


@pytest.mark.once
def test_inputs_that_overlap_are_not_replayed() -> None:
    """A pointer into one of them would not tell which it is of."""
    call, runs = counted(allocate)
    x = torch.randn(8, 6)
    for other, is_replayed in ((x, False), (x[2:], False), (x.clone(), True)):
        replay.forget()
        del runs[:]
        for _ in range(3):
            call(x, other)
        assert (len(runs) == 1) == is_replayed


@pytest.mark.once
def test_plans_are_not_kept_for_ever(monkeypatch) -> None:
    monkeypatch.setattr(replay, "MOST_PLANS", 4)
    call, _ = counted(allocate)
    for size in range(1, 20):
        call(torch.randn(size))
        assert len(replay._plans) <= 4


@pytest.mark.once
def test_an_error_in_a_recording_is_none_of_the_next_call() -> None:
    def fail(x: Tensor) -> Tensor:
        if len(fails) < 1:
            fails.append(1)
            raise ValueError("once")
        return torch.empty(3)

    fails: list[int] = []
    call, runs = counted(fail)
    with pytest.raises(ValueError, match="once"):
        call(torch.randn(4))
    assert replay.tape() is None
    for _ in range(3):
        call(torch.randn(4))
    assert len(runs) == 2


@pytest.mark.once
def test_threads_record_by_themselves() -> None:
    barrier = threading.Barrier(4)

    def slow(x: Tensor) -> Tensor:
        barrier.wait(10)
        return torch.empty(x.shape)

    call, runs = counted(slow)
    shapes = []
    threads = [
        threading.Thread(target=lambda n=n: shapes.append(call(torch.randn(n)).shape[0]))
        for n in (3, 4, 5, 6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(shapes) == [3, 4, 5, 6]
    assert len(runs) == 4
