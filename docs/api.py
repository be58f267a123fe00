"""Writes docs/api.md from the docstrings: ``make api``. A test says when it is out of date."""

from __future__ import annotations

import doctest
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import vqtriton
import vqtriton.environment

PAGE = Path(__file__).with_name("api.md")
COMMAND = "make api"

# heading, and what stands under it, in the order of the page
METHODS = (
    *("forward", "get_output_from_indices", "get_codes_from_indices", "accumulate"),
    *("set_codebook", "reset_codes", "reset_parameters", "from_config"),
)
RESIDUAL = ("forward", "get_output_from_indices", "get_codes_from_indices", "from_config")
CHAPTERS: dict[str, tuple[str, ...]] = {
    "The module": ("VectorQuantize", *(f"VectorQuantize.{name}" for name in METHODS)),
    "Residual quantizers": (
        *("ResidualVectorQuantize", *(f"ResidualVectorQuantize.{name}" for name in RESIDUAL)),
        *("QuantizedLevels", "residual_quantize", "prepare_codebooks", "PreparedCodebooks"),
        *("GroupedResidualVectorQuantize", "GroupedResidualVectorQuantize.forward"),
    ),
    "Functions": (
        *("vector_quantize", "reference.Quantized", "nearest_code", "nearest_codes"),
        *("prepare_codebook", "PreparedCodebook", "code_sums", "kmeans"),
    ),
    "Saving and loading": ("save", "load"),
    "Models of other projects": ("patch", "unpatch", "Patched"),
    "Checkpoints of other projects": (
        *("load_codebooks", "LoadedQuantizer", "LoadedQuantizer.decode", "LoadedCodebook"),
        *("LoadedCodebook.decode", "Projection", "to_vector_quantize_pytorch"),
    ),
    "Metrics": (
        *("metrics.counts", "metrics.perplexity", "metrics.usage", "metrics.quantization_error"),
        *("metrics.Meter", "metrics.Meter.update", "metrics.Meter.compute"),
        *("metrics.Meter.reset", "metrics.Usage"),
    ),
    "Other runtimes": ("PlainQuantizer", "PlainQuantizer.forward", "PlainQuantizer.decode"),
    "Compiling and reporting": ("warmup", "environment.describe"),
    "The reference": (
        *("reference", "reference.nearest_code", "reference.nearest_codes"),
        *("reference.vector_quantize", "reference.code_sums", "reference.squared_distances"),
        *("reference.dot_products", "reference.normalized", "reference.residual_quantize"),
    ),
}
NAMES = [name for names in CHAPTERS.values() for name in names]
# what every example may use
GLOBALS = {"torch": torch, "vqtriton": vqtriton}
LISTS = ("Args", "Attributes", "Raises", "Warns")
INTRODUCTION = f"""\
# API

All names here are in the module `vqtriton`. The page is made from the docstrings by `{COMMAND}`;
`help(vqtriton.nearest_code)` shows the same in Python. There are two commands, with a `--help`
each: `python -m vqtriton env` prints what a bug report needs, and `python -m vqtriton tune` finds
the fastest tiles ([tuning.md](tuning.md)). The environment variables `VQTRITON_TRACE` and
`VQTRITON_CONFIG_DIR` are for tuning as well.

A test runs every example. The examples need these two lines first:

```python
import torch
import vqtriton
```

Sizes in shapes: N vectors of D dimensions, K codes, B images or sequences of a batch.
"""


def found(name: str) -> Any:
    """The function, class or module of a name on the page."""
    value: Any = vqtriton
    for part in name.split("."):
        value = getattr(value, part)
    return value


def page() -> str:
    parts = [INTRODUCTION]
    for chapter, names in CHAPTERS.items():
        parts.append(f"- [{chapter}](#{anchor(chapter)}): " + ", ".join(map(link, names)))
    text = "\n".join(parts) + "\n"
    for chapter, names in CHAPTERS.items():
        text += f"\n## {chapter}\n"
        for name in names:
            text += f"\n{entry(name)}"
    return text


def entry(name: str) -> str:
    value = found(name)
    lines = [f"### {name}", ""]
    if callable(value):
        lines += ["```python", signature(name, value), "```", ""]
    text = "\n".join([*lines, *body(name, inspect.getdoc(value) or "")])
    return re.sub(r"\n{3,}", "\n\n", text).rstrip() + "\n"


def signature(name: str, value: Callable[..., Any]) -> str:
    """On one line where it is short, else an argument a line."""
    shown = inspect.signature(value)
    arguments, starred = [], False
    for parameter in shown.parameters.values():
        if parameter.name in ("self", "cls", "_cls"):
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and not starred:
            arguments.append("*")
        starred |= parameter.kind in (parameter.KEYWORD_ONLY, parameter.VAR_POSITIONAL)
        if inspect.isclass(value) and issubclass(value, tuple):
            # what its fields are, the list says
            parameter = parameter.replace(annotation=parameter.empty)
        arguments.append(str(parameter).replace("'", ""))
        if isinstance(parameter.default, str):
            arguments[-1] = re.sub(r"=( ?).*", rf'=\1"{parameter.default}"', arguments[-1])
    result = shown.return_annotation
    after = "" if result is shown.empty or inspect.isclass(value) else f" -> {result}"
    line = f"{name}({', '.join(arguments)}){after}"
    if len(line) <= 80:
        return line
    return f"{name}(\n" + "".join(f"    {one},\n" for one in arguments) + f"){after}"


def body(name: str, doc: str) -> Iterator[str]:
    """The docstring in Markdown, section by section."""
    for block in re.split(r"\n\n(?=\S)", doc):
        first, _, rest = block.partition("\n")
        title, _, tail = first.partition(":")
        if title in LISTS and not tail:
            yield f"**{title}**\n"
            yield from items(name, textwrap.dedent(rest))
        elif title == "Returns" and not tail:
            yield "**Returns**\n"
            for part in textwrap.dedent(rest).split("\n\n"):
                # a list of what is in a tuple, or a text
                is_list = re.match(r"\w+: ", part)
                yield from items(name, part) if is_list else [prose(name, part)]
                yield ""
        elif title == "Example" and not tail:
            yield "**Example**\n\n```python"
            yield from code(textwrap.dedent(rest))
            yield "```"
        elif "::\n\n    " in block:
            before, _, listing = block.partition("::\n\n")
            # an equation is not Python
            language = "" if "‖" in listing else "python"
            yield f"{prose(name, before)}:\n\n```{language}\n{textwrap.dedent(listing)}\n```"
        else:
            yield prose(name, block)
        yield ""


def items(name: str, text: str) -> Iterator[str]:
    """A list of the entries ``name: text``."""
    for item in re.split(r"\n(?=\S)", text):
        names, _, about = item.partition(":")
        yield f"- `{names}`: " + prose(name, textwrap.dedent(about)).strip()


def code(text: str) -> Iterator[str]:
    """Statements without prompts; what they print as a comment."""
    was_import = False
    for example in doctest.DocTestParser().get_examples(text):
        is_import = example.source.startswith(("import ", "from "))
        if was_import and not is_import:
            yield ""
        was_import = is_import
        yield re.sub(r"  # doctest: .*", "", example.source).rstrip()
        yield from (f"# {line}" for line in example.want.splitlines())


def prose(name: str, text: str) -> str:
    """One line, with links where names of the page are meant."""
    text = re.sub(r"\s*\n\s*", " ", text.strip())

    def replace(match: re.Match[str]) -> str:
        said = match[1].removeprefix("vqtriton.")
        # a name that begins with the package is meant as it is
        parent = "." if match[1] != said else name
        while parent:
            parent = parent.rpartition(".")[0]
            if (full := f"{parent}.{said}".lstrip(".")) in NAMES and full != name:
                return f"[`{match[1]}`](#{anchor(full)})"
        of_class = [full for full in NAMES if full.endswith(f".{said}") and said[0].isupper()]
        return f"[`{match[1]}`](#{anchor(of_class[0])})" if of_class else f"`{match[1]}`"

    text = re.sub(r"(?<!`)`([^`]+)`(?!`)", replace, text)
    return re.sub(r"``(.+?)``", r"`\1`", text)


def link(name: str) -> str:
    return f"[`{name}`](#{anchor(name)})"


def anchor(heading: str) -> str:
    """As GitHub makes it of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def examples() -> list[doctest.DocTest]:
    """The example of each name that has one."""
    finder = doctest.DocTestFinder(recurse=False)
    tests = [finder.find(found(name), name, module=False, globs=GLOBALS) for name in NAMES]
    return [test for of_name in tests for test in of_name if test.examples]


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
