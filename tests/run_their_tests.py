"""Runs vector-quantize-pytorch's own tests against `vqtriton.vector_quantize_pytorch`.

``python tests/run_their_tests.py FOLDER [PYTEST FLAGS...]``: FOLDER has the tests of a checkout of
that project, which need not be installed. Each test is listed as passed, failed or not ours: it
imports a class or gives an argument that is not here.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Iterator
from types import ModuleType
from typing import NoReturn

import pytest
import torch

from vqtriton import vector_quantize_pytorch as ours

CLASSES = ("VectorQuantize", "ResidualVQ", "GroupedResidualVQ")
NOT_HERE = "which is not here"


class Shim(ModuleType):
    """What the tests import in place of theirs."""

    VectorQuantize, ResidualVQ, GroupedResidualVQ = (getattr(ours, name) for name in CLASSES)

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)
        pytest.skip(f"{name} is not here")


class Listing:
    """A plugin: the tests by what became of them."""

    def __init__(self) -> None:
        self.found: dict[str, list[str]] = defaultdict(list)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self) -> Iterator[None]:
        torch.manual_seed(0)
        try:
            return (yield)
        except ValueError as error:
            if NOT_HERE not in str(error):
                raise
            pytest.skip(str(error).partition(",")[0])
        except ModuleNotFoundError as error:
            pytest.skip(f"{error.name} is not installed")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and not report.failed:
            return
        name, outcome = report.nodeid.rpartition("/")[2], report.outcome
        if report.skipped:
            name += f": {report.longrepr[2].removeprefix('Skipped: ')}"
            outcome = "not ours"
        self.found[outcome].append(name)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="the tests folder of a checkout of vector-quantize-pytorch")
    arguments, flags = parser.parse_known_args()
    sys.modules["vector_quantize_pytorch"] = Shim("vector_quantize_pytorch")
    listing = Listing()
    options = ["-q", "-p", "no:cacheprovider", "-c", "/dev/null", "--rootdir", arguments.folder]
    status = pytest.main([*options, arguments.folder, *flags], plugins=[listing])
    for outcome in ("passed", "failed", "not ours"):
        names = listing.found[outcome]
        print(f"\n{len(names)} {outcome}", *names, sep="\n  ", flush=True)
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
