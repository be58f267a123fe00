"""Runs vector-quantize-pytorch's own tests with its quantizers patched.

``python tests/their_tests.py FOLDER [--seeds 20] [PYTEST FLAGS...]``: FOLDER has the tests of a
checkout of that project. Each quantizer is patched as soon as it is made.
"""

from __future__ import annotations

import argparse
import functools
import sys
from typing import Any

import pytest
import torch
from vector_quantize_pytorch import VectorQuantize

import vqtriton


class PatchAll:
    """A plugin: patches each `VectorQuantize`, and seeds each test."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.patched = 0
        build = VectorQuantize.__init__

        @functools.wraps(build)
        def patched(module: VectorQuantize, *args: Any, **kwargs: Any) -> None:
            build(module, *args, **kwargs)
            self.patched += bool(vqtriton.patch(module).modules)

        self.original, VectorQuantize.__init__ = build, patched

    def pytest_runtest_setup(self) -> None:
        torch.manual_seed(self.seed)

    def pytest_unconfigure(self) -> None:
        VectorQuantize.__init__ = self.original


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="the tests folder of a checkout of vector-quantize-pytorch")
    parser.add_argument("--seeds", type=int, default=1)
    arguments, flags = parser.parse_known_args()
    status = 0
    for seed in range(arguments.seeds):
        plugin = PatchAll(seed)
        options = ["-q", "-p", "no:cacheprovider", "-c", "/dev/null", "--rootdir", arguments.folder]
        status |= pytest.main([*options, arguments.folder, *flags], plugins=[plugin])
        print(f"seed {seed}: {plugin.patched} quantizers were patched", flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
