"""As much of a driver as Triton needs to compile for an H100 that is not there.

Triton cannot go back to another driver, so the process should do nothing else with it.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.runtime import driver


class StubDriver:
    utils = SimpleNamespace(
        get_device_properties=lambda device: {"max_shared_mem": 232_448},
        load_binary=lambda name, binary, shared, device: (object(), 0, 255, 0, 1024),
    )

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        return lambda *args: None

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def install() -> None:
    """Launches compile what they would launch, and end there: outputs stay unwritten."""
    driver.set_active(StubDriver())
