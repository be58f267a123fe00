"""The stub of a GPU refuses what a GPU refuses; otherwise the tests that run on it show nothing."""

from __future__ import annotations

import pytest
import torch
from conftest import DEVICE
from stub_device import Elsewhere, StubDevice

pytestmark = [pytest.mark.kernel, pytest.mark.needs_kernels, pytest.mark.needs_interpreter]


@pytest.mark.parametrize("place", [0, 1])
def test_a_kernel_refuses_a_tensor_of_the_cpu(place: int) -> None:
    from vqtriton.kernels.code_sums import code_sums

    tensors = [torch.ones(1, 4, 3), torch.zeros(1, 4, dtype=torch.int64)]
    sums, counts = code_sums(*(t.to(DEVICE) for t in tensors), 2)
    assert isinstance(sums, Elsewhere)
    assert sums.tolist() == [[[4.0] * 3, [0.0] * 3]]
    assert counts.tolist() == [[4, 0]]
    tensors[place] = tensors[place].to(DEVICE)
    with pytest.raises((RuntimeError, ValueError), match=r"of the CPU|the same device"):
        code_sums(*tensors, 2)


def test_an_operation_refuses_tensors_of_two_devices() -> None:
    here, there = torch.ones(2), torch.ones(2, device=DEVICE)
    with pytest.raises(RuntimeError, match="the same device"):
        here + there
    assert (there + here.to(DEVICE)).cpu().tolist() == [2, 2]
    # as on a GPU: a single number may be of the CPU, and so may an index
    assert (there + torch.tensor(1)).tolist() == [2, 2]
    assert there[torch.tensor([1])].device == there.device


def test_a_copy_shares_nothing_and_a_view_does() -> None:
    here = torch.zeros(2)
    there = here.to(DEVICE)
    there[0].add_(1)
    assert there.tolist() == [1, 0]
    assert here.tolist() == [0, 0]


def test_what_was_in_place_stays_the_same_tensor() -> None:
    there = torch.zeros(2, device=DEVICE)
    assert there.add_(1) is there
    out = torch.zeros(2, device=DEVICE)
    assert torch.add(there, there, out=out) is out
    assert out.tolist() == [2, 2]


def test_leaving_it_leaves_torch_as_it_was() -> None:
    before = torch._C._only_lift_cpu_tensors()
    with StubDevice() as stub, stub:
        assert torch._C._only_lift_cpu_tensors()
    assert torch._C._only_lift_cpu_tensors() == before
