"""One suite, three ways: blocked torch code, the kernels on a GPU, the kernels interpreted.

Interpreted kernels work on a stub of a GPU (`stub_gpu`), which refuses what a GPU would refuse.

The tests marked ``kernel`` run on every backend that the process has. Triton decides at import
whether its kernels are interpreted, so that is a process of its own: ``TRITON_INTERPRET=1 pytest
-m kernel``.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from importlib.util import find_spec

import pytest
import torch
from hypothesis import HealthCheck, settings

# the tensors are small: on a busy machine threads cost more than they give
torch.set_num_threads(1)
# deterministic algorithms need it for matmuls on a GPU, before the first of them
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# a shell that starts pytest in the background lets it ignore SIGINT, and so its children, to which
# tests send one
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# where tests put what they hand to the kernels, and where those do that a stub cannot play
REAL_DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
DEVICE = "lazy" if INTERPRETED else REAL_DEVICE

settings.register_profile(
    "default",
    # the same examples on every run: a failure can be repeated, a pass means the same everywhere
    derandomize=True,
    deadline=None,
    max_examples=10 if INTERPRETED else 60,
    suppress_health_check=[HealthCheck.too_slow],
)
# where each new shape is compiled first: `make gpu-check`
settings.register_profile("few", settings.get_profile("default"), max_examples=8)
settings.register_profile("search", deadline=None, max_examples=2000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def pytest_configure(config: pytest.Config) -> None:
    if INTERPRETED:
        # numpy remarks on the NaNs and infinities that the kernels are given on purpose
        config.addinivalue_line("filterwarnings", "ignore:.*encountered in:RuntimeWarning")
    if INTERPRETED and find_spec("triton"):
        from quick_interpreter import quick_interpreter

        stack = contextlib.ExitStack()
        stack.enter_context(quick_interpreter())
        config.add_cleanup(stack.close)


def is_for_another_process(item: pytest.Item) -> bool:
    """Whether a run with TRITON_INTERPRET the other way has it."""
    if INTERPRETED:
        return item.get_closest_marker("once") is not None
    if item.get_closest_marker("needs_interpreter"):
        return True
    return bool(item.get_closest_marker("needs_kernels")) and not torch.cuda.is_available()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    ours: list[pytest.Item] = []
    others: list[pytest.Item] = []
    for item in items:
        (others if is_for_another_process(item) else ours).append(item)
    config.hook.pytest_deselected(items=others)
    items[:] = ours
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


def is_on_stub(item: pytest.Item) -> bool:
    """Whether it is to show that it puts its tensors where a GPU needs them."""
    if not INTERPRETED or item.get_closest_marker("real_device"):
        return False
    values = item.callspec.params.values() if hasattr(item, "callspec") else ()
    is_parametrized = any(getattr(value, "device", None) == DEVICE for value in values)
    return is_parametrized or item.get_closest_marker("needs_kernels") is not None


@pytest.fixture(autouse=True)
def stub_device(request: pytest.FixtureRequest):
    if not is_on_stub(request.node):
        yield
        return
    from stub_gpu import stub_gpu

    with stub_gpu():
        yield


@pytest.fixture(autouse=True)
def poisoned_memory():
    """In this mode `torch.empty` is filled with NaN: whatever is left unwritten shows."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    if "torch._dynamo" in sys.modules:
        # what a test has compiled does not count against the limit of the next
        sys.modules["torch._dynamo"].reset()
