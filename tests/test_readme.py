"""Every Python block of README.md and of some pages of docs/ runs."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = (
    *("README.md", "docs/codebook.md", "docs/export.md", "docs/residual.md"),
    "docs/vector-quantize-pytorch.md",
)
# a fence may be indented, in a list
FENCE = re.compile(r"^( *)```(.*)$")


def blocks(text: str) -> list[tuple[int, str]]:
    """Line number of the first line, and code, of each block that says it is Python."""
    found, lines = [], text.splitlines()
    language, start = None, 0
    for number, line in enumerate(lines, 1):
        fence = FENCE.match(line)
        if not fence:
            continue
        if language is None:
            language, start = (fence[2].split() or [""])[0], number
        else:
            if language.lower() in ("python", "python3", "py"):
                code = textwrap.dedent("\n".join(lines[start : number - 1]))
                found.append((start + 1, code))
            language = None
    if language is not None:
        raise ValueError(f"the block that starts in line {start} has no end")
    return found


BLOCKS = [
    pytest.param(page, *block, id=f"{page}, line {block[0]}")
    for page in PAGES
    if (ROOT / page).exists()
    for block in blocks((ROOT / page).read_text(encoding="utf-8"))
]


@pytest.mark.parametrize("page", PAGES)
def test_there_are_blocks(page):
    assert any(block.values[0] == page for block in BLOCKS), f"{page} is missing or has no Python"


@pytest.mark.parametrize(("page", "line", "code"), BLOCKS)
# torch about torch, when it copies an exported program
@pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*:FutureWarning")
def test_block_runs(page, line, code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # so many empty lines that a traceback names the line of the file
    source = "\n" * (line - 1) + code
    exec(compile(source, str(ROOT / page), "exec"), {"__name__": "__main__"})


def test_finds_every_block():
    text = (
        "```python\na = 1\n```\n"
        "```\nplain\n```\n"
        "- item\n  ```python\n  b = 1\n  if b:\n      b = 2\n  ```\n"
        "```bash\n# ```python in a comment\n```\n"
        "```py title\nc = 1\n```"
    )
    assert blocks(text) == [(2, "a = 1"), (9, "b = 1\nif b:\n    b = 2"), (17, "c = 1")]
    with pytest.raises(ValueError, match="line 1 has no end"):
        blocks("```python\na = 1\n")
