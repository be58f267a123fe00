"""The architecture: what imports what, as docs/design.md says."""

from __future__ import annotations

import ast
import inspect
import re
from graphlib import TopologicalSorter
from importlib import import_module
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
# the one that names every other
FACADE = "vqtriton"


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    package = ("vqtriton", *parts) if parts[0] == "kernels" else parts
    return ".".join(package).removesuffix(".__init__")


FILES = {
    name_of(path): path
    for folder in ("vqtriton", "kernels", "bench")
    for path in sorted((ROOT / folder).rglob("*.py"))
}


def imports_of(path: Path) -> set[str]:
    """Modules of ours, wherever in the file they are imported."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return (found & FILES.keys()) - {FACADE}


GRAPH = {name: imports_of(path) for name, path in FILES.items()}


def layers() -> list[str]:
    """Of docs/design.md, from the top."""
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    section = text.split("## Layers\n")[1].split("\n## ")[0]
    return re.findall(r"^    (\w+/?)(?=[, ])", section, re.MULTILINE)


def layer_of(module: str) -> str:
    _, _, rest = module.partition(".")
    return f"{rest.partition('.')[0]}/" if "." in rest or rest == "kernels" else rest


def test_no_module_imports_one_that_imports_it() -> None:
    # raises CycleError, which names the circle
    assert len(list(TopologicalSorter(GRAPH).static_order())) == len(FILES)


def test_each_module_imports_only_from_layers_below_it() -> None:
    order = layers()
    assert len(order) == len(set(order))
    modules = [name for name in FILES if name.startswith("vqtriton.") and name[-8:] != "_version"]
    packages = {f"vqtriton.{name}" for name in ("clients", "residual", "tiles", "tuning")}
    names = {layer_of(name) for name in modules if name not in packages}
    assert names == set(order) - {"examples/"}
    wrong = [
        (name, imported)
        for name in modules
        for imported in GRAPH[name] - packages - {"vqtriton._version"}
        if name not in packages
        and layer_of(name) != layer_of(imported)
        and order.index(layer_of(name)) >= order.index(layer_of(imported))
    ]
    assert wrong == []


def test_the_backends_have_the_ops_as_functions() -> None:
    pytest.importorskip("triton")
    import_module("vqtriton.residual.ops")
    packets = {name.split(".")[0] for name in import_module("vqtriton.ops").IMPLEMENTATIONS}
    for packet in packets - {"snapshot"}:
        schemas = [
            getattr(getattr(torch.ops.vqtriton, packet), overload)._schema
            for overload in getattr(torch.ops.vqtriton, packet).overloads()
        ]
        longest = max(schemas, key=lambda schema: len(schema.arguments))
        want = [argument.name for argument in longest.arguments if argument.name != "backend"]
        folder = "vqtriton.residual" if packet.startswith("residual") else "vqtriton"
        for name in ("torch_backend", "triton_backend"):
            function = getattr(import_module(f"{folder}.{name}"), packet)
            assert list(inspect.signature(function).parameters) == want, function
