"""Replays what a function has launched: what Python decides, it decides once for a signature.

A function that only allocates and launches kernels does the same in each call with tensors of the
same dtypes, shapes, strides, alignments and device: only addresses differ. The first such call is
recorded: programs, grids, numbers, and where in an input or in an allocation each pointer points.
Later calls allocate what is returned, and one block for all that is not, and launch.
"""

from __future__ import annotations

import functools
import itertools
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# signatures that are kept
MOST_PLANS = 1024
# between the beginnings of allocations that are made as one
ALIGNMENT = 256
ALLOCATIONS = {"aten::empty", "aten::empty_strided", "aten::empty_like", "aten::new_empty"}

_local = threading.local()
# by function and signature; None: it cannot be replayed
_plans: dict[tuple[Any, ...], Plan | None] = {}


class Pointer(NamedTuple):
    """An address: bytes from the beginning of an input, or of an allocation after these."""

    base: int
    offset: int


class Tape(TorchDispatchMode):
    """Records a call: launches, and what torch is asked for meanwhile."""

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.inputs = [(tensor.data_ptr(), _extent(tensor)) for tensor in inputs]
        self.allocations: list[Tensor] = []
        # what launches a program, and its arguments
        self.launches: list[tuple[Callable[..., None], list[Any]]] = []
        spans = sorted((start, start + size) for start, size in self.inputs if size)
        # where two inputs overlap, a pointer does not tell which one it belongs to
        self.can_be_replayed = all(a[1] <= b[0] for a, b in itertools.pairwise(spans))
        self.can_be_replayed &= all(type(t) in (Tensor, torch.nn.Parameter) for t in inputs)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name
        if name in ALLOCATIONS:
            self.allocations.append(result)
        # what is allocated is filled in this mode, in a replay as well
        elif name != "aten::fill_" or not torch.are_deterministic_algorithms_enabled():
            is_view = any(
                a.alias_info and not a.alias_info.is_write for a in func._schema.arguments
            )
            self.can_be_replayed &= is_view or name == "aten::detach"
        return result

    def note(self, launch: Callable[..., None] | None, args: Sequence[Any]) -> None:
        """A launch; None: one that only Triton itself can make."""
        if launch is None:
            self.can_be_replayed = False
        else:
            self.launches.append((launch, [self._found(arg) for arg in args]))

    def _found(self, arg: Any) -> Any:
        return self.place(arg) if isinstance(arg, Tensor) else arg

    def place(self, tensor: Tensor) -> Pointer | int:
        """Where a tensor begins; 0 if it is empty, or if it is nowhere that is known."""
        address = tensor.data_ptr()
        if tensor.numel() == 0:
            return 0
        storage = tensor.untyped_storage().data_ptr()
        for number, allocation in enumerate(self.allocations):
            if allocation.untyped_storage().data_ptr() == storage:
                return Pointer(len(self.inputs) + number, address - storage)
        for number, (start, size) in enumerate(self.inputs):
            if start <= address < start + size:
                return Pointer(number, address - start)
        self.can_be_replayed = False
        return 0


class Plan:
    """A call that was recorded."""

    def __init__(self, tape: Tape, results: Sequence[Tensor]) -> None:
        # only where there is a plan is Triton sure to be installed
        from triton.runtime import driver

        self.driver = driver
        first = len(tape.inputs)
        # arguments, and which of them are pointers
        self.launches = [
            (launch, args, [(i, *arg) for i, arg in enumerate(args) if isinstance(arg, Pointer)])
            for launch, args in tape.launches
        ]
        # shape, dtype and allocation of each tensor that is returned
        self.returned: list[tuple[tuple[int, ...], torch.dtype, int | None]] = []
        for result in results:
            place = tape.place(result)
            base = place.base if isinstance(place, Pointer) else None
            self.returned.append((tuple(result.shape), result.dtype, base))
            if result.numel() == 0:
                continue
            is_own = isinstance(place, Pointer) and place.base >= first
            if not (
                is_own
                and result.is_contiguous()
                and result.numel() == tape.allocations[place.base - first].numel()
            ):
                tape.can_be_replayed = False
        returned = [base for *_, base in self.returned if base is not None]
        if len(set(returned)) < len(returned):
            # the same one twice
            tape.can_be_replayed = False
        # the offset in the block of each allocation that is not returned
        self.offsets: list[tuple[int, int]] = []
        self.own_bases = [0] * len(tape.allocations)
        self.bytes = 0
        for number, allocation in enumerate(tape.allocations, first):
            if number not in returned:
                self.offsets.append((number, self.bytes))
                size = allocation.untyped_storage().nbytes()
                self.bytes += -(-size // ALIGNMENT) * ALIGNMENT

    def replay(self, device: torch.device, bases: list[int]) -> list[Tensor]:
        """Makes the launches for other inputs, which begin at ``bases``."""
        bases += self.own_bases
        results = []
        for shape, dtype, place in self.returned:
            result = torch.empty(shape, dtype=dtype, device=device)
            if place is not None:
                bases[place] = result.data_ptr()
            results.append(result)
        if self.bytes:
            block = torch.empty(self.bytes, dtype=torch.uint8, device=device)
            start = block.data_ptr()
            for place, offset in self.offsets:
                bases[place] = start + offset
        stream = None
        if self.launches:
            # else each launch asks for it
            active = self.driver.active
            stream = active.get_current_stream(active.get_current_device())
        for launch, args, pointers in self.launches:
            given = args.copy()
            for place, base, offset in pointers:
                given[place] = bases[base] + offset
            launch(*given, stream=stream)
        return results


def tape() -> Tape | None:
    """What records in this thread."""
    return getattr(_local, "tape", None)


def forget() -> None:
    """Records everything anew: something has changed that functions look at."""
    _plans.clear()


def replayed(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, recorded in its first call and replayed in later ones.

    It returns a tensor or a tuple of tensors, and never one of its inputs. Its arguments are
    tensors, tuples of tensors, and what a dictionary takes as a key. What else it depends on must
    not change before `forget` is called.
    """

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        if tape() is not None:
            # part of another's recording
            return function(*args)
        inputs: list[Tensor] = []
        # the address of each tensor
        bases: list[int] = []
        key: list[Any] = [function, torch.are_deterministic_algorithms_enabled()]
        for arg in args:
            if isinstance(arg, Tensor):
                tensors = (arg,)
            elif isinstance(arg, (tuple, list)):
                tensors = arg
                key.append(len(arg))
            else:
                key.append(arg)
                continue
            for t in tensors:
                address = t.data_ptr()
                bases.append(address)
                inputs.append(t)
                key += t.dtype, t.shape, t.stride(), address & 15 == 0, t.get_device()
        place = tuple(key)
        try:
            plan = _plans[place]
        except KeyError:
            return _record(place, function, args, inputs)
        if plan is None:
            return function(*args)
        with torch.cuda.device_of(inputs[0]):
            results = plan.replay(inputs[0].device, bases)
        return tuple(results) if len(results) > 1 else results[0]

    return call


def _record(
    key: tuple[Any, ...], function: Callable[..., Any], args: tuple, inputs: Sequence[Tensor]
) -> Any:
    _local.tape = Tape(inputs)
    try:
        with _local.tape as recording:
            results = function(*args)
    finally:
        _local.tape = None
    plan = None
    if recording.can_be_replayed:
        plan = Plan(recording, [results] if isinstance(results, Tensor) else results)
    if len(_plans) >= MOST_PLANS:
        _plans.clear()
    # what is returned may have shown that it cannot be
    _plans[key] = plan if recording.can_be_replayed else None
    return results


def _extent(tensor: Tensor) -> int:
    """Bytes from the first element to the end of the last."""
    if tensor.numel() == 0:
        return 0
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()
