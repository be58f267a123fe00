"""docs/api.md: whether it is what the docstrings make of it, and whether its examples run."""

from __future__ import annotations

import doctest
import importlib.util
import inspect
import re
from pathlib import Path

import pytest

import vqtriton

ROOT = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("api_page", ROOT / "docs" / "api.py")
api = importlib.util.module_from_spec(spec)
spec.loader.exec_module(api)
EXAMPLES = {test.name: test for test in api.examples()}


def test_the_page_is_up_to_date():
    assert api.PAGE.read_text(encoding="utf-8") == api.page(), (
        f"docs/api.md is out of date; run `{api.COMMAND}`"
    )


def test_every_public_name_is_on_the_page():
    public = {name for name in vqtriton.__all__ if not inspect.ismodule(getattr(vqtriton, name))}
    public -= {"__version__"}
    # an alias is told where its class is
    public = {name for name in public if getattr(vqtriton, name).__name__ == name}
    for module in ("metrics", "reference"):
        # what is defined there and has no underscore
        members = inspect.getmembers(getattr(vqtriton, module), callable)
        public |= {
            f"{module}.{name}"
            for name, value in members
            if not name.startswith("_") and value.__module__ == f"vqtriton.{module}"
        }
    assert public <= set(api.NAMES)


@pytest.mark.parametrize("name", [name for name in api.NAMES if callable(api.found(name))])
def test_an_example_runs_and_prints_what_it_says(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runner = doctest.DocTestRunner(verbose=False)
    said = []
    runner.run(EXAMPLES[name], out=said.append)
    assert not runner.failures, "".join(said)


def test_links_lead_somewhere():
    text = api.page()
    headings = {api.anchor(line.lstrip("# ")) for line in text.splitlines() if line[:1] == "#"}
    assert set(re.findall(r"\]\(#(.*?)\)", text)) <= headings


def test_what_becomes_of_a_docstring():
    doc = """Adds.

    See `nearest_code`, ``x`` and `unknown`. Equivalent to::

        a + b

    Args:
        a: one number,
            of two lines.
        b, c: others.

    Example:
        >>> 1 + 1
        2
    """
    assert "\n".join(api.body("kmeans", inspect.cleandoc(doc))).rstrip() == (
        "Adds.\n\n"
        "See [`nearest_code`](#nearest_code), `x` and `unknown`. Equivalent to:\n\n"
        "```python\na + b\n```\n\n"
        "**Args**\n\n- `a`: one number, of two lines.\n- `b, c`: others.\n\n"
        "**Example**\n\n```python\n1 + 1\n# 2\n```"
    )
