"""Tables of tiles, one JSON file for each device, and which of their rows a kernel gets.

Looked for in this order: the folder that VQTRITON_CONFIG_DIR names, then those that come with the
package; in each the file of the device and then that of its architecture. What is found nowhere is
the default of `vqtriton.kernels`. A table never changes a result: whatever cannot be read or is not
among the tiles that tuning would try is left out, with a warning that names it.

Where the default is the best, a table has no tiles: such a row has no config. In the file these
rows are a list of their own, ``default_is_best``, so that tuning knows what it has done, and no row
of another shape is taken there.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import os
import re
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from vqtriton.kernels import replay
from vqtriton.tiles.problems import Problem, problem_fault, type_fault

SCHEMA = 1
VARIABLE = "VQTRITON_CONFIG_DIR"
BUNDLED = Path(__file__).parent / "tables"
# more than that is no table
MOST_BYTES = 4 << 20
# of its rows that are wrong, so many are named
MOST_NAMED = 5
# N, K and heads count by a quarter of a doubling
STEPS = 4
# doublings between a row's N, K or heads and what is asked for, beyond which it tells nothing
MOST_OCTAVES = 3
SOURCES = ("static", "measured")

log = logging.getLogger("vqtriton")
Row = dict[str, Any]


# what a row has, beside its problem and where it is from
KINDS: dict[str, type] = {"config": dict, "shared": int}


def file_name(device: str) -> str:
    """Of a device's table: its name, with nothing in it that a file system could mind."""
    return re.sub(r"[^A-Za-z0-9]+", "_", device).strip("_") + ".json"


def device_names(device: torch.device) -> list[str]:
    """Names of tables for a device, the best first."""
    from vqtriton.kernels.screen_tiles import architecture

    if device.type != "cuda":
        return ["interpreter", architecture(device)]
    major, minor = torch.cuda.get_device_capability(device)
    by_kind = architecture(device) if torch.version.hip else f"sm_{major}{minor}"
    return [torch.cuda.get_device_name(device), by_kind]


def user_folder() -> Path | None:
    """What VQTRITON_CONFIG_DIR names."""
    named = os.environ.get(VARIABLE)
    return Path(os.path.expanduser(named)) if named else None


def folders() -> list[Path]:
    """Where tables are looked for; a warning if the user's folder is none."""
    named = user_folder()
    if named is None:
        return [BUNDLED]
    if os.path.isdir(named):
        return [named, BUNDLED]
    if named not in _missing:
        _missing.add(named)
        warnings.warn(f"{VARIABLE} is {named}, which is no folder", stacklevel=2)
    return [BUNDLED]


def read_all(path: Path) -> list[Any]:
    """The rows of a table, whatever they are.

    Raises:
        ValueError: the file is no table.
        OSError: it cannot be read.
    """
    if not path.is_file():
        raise ValueError(f"{path} is no regular file")
    if path.stat().st_size > MOST_BYTES:
        raise ValueError(f"{path} has more than {MOST_BYTES >> 20} MiB")
    try:
        # some editors put a mark at the beginning
        table = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {str(error)[:200]}") from None
    if not isinstance(table, dict) or not isinstance(table.get("rows"), list):
        raise ValueError(f"{path} is no table of tiles")
    if type(table.get("schema")) is not int or table["schema"] != SCHEMA:
        raise ValueError(
            f"{path} has schema {table.get('schema')!r:.40}; this version reads {SCHEMA}"
        )
    defaults = table.get("default_is_best", [])
    if not isinstance(defaults, list):
        raise ValueError(f"{path} has a default_is_best that is no list")
    return table["rows"] + [
        {**row, "config": None} if isinstance(row, dict) else row for row in defaults
    ]


def read(path: Path) -> list[Row]:
    """The rows of a table that are right; a warning for each that is not.

    Raises:
        ValueError, OSError: see `read_all`.
    """
    rows, wrong = [], 0
    for place, row in enumerate(read_all(path)):
        reason = fault(row)
        if reason is None:
            rows.append(row)
            continue
        wrong += 1
        if wrong <= MOST_NAMED:
            warnings.warn(f"row {place} of {path} is left out: {reason}", stacklevel=2)
    if wrong > MOST_NAMED:
        warnings.warn(f"{wrong - MOST_NAMED} more rows of {path} are left out", stacklevel=2)
    return rows


def fault(row: Any) -> str | None:
    """What is wrong with a row; None if nothing is."""
    if not isinstance(row, dict):
        return "it is no object"
    kinds = dict(KINDS)
    if keeps_default(row):
        del kinds["config"]
    reason = problem_fault(row) or type_fault(row, kinds)
    if reason:
        return reason
    if row.get("source") not in SOURCES:
        return f"source is {row.get('source')!r:.40}; it must be one of {', '.join(SOURCES)}"
    if row["config"] is not None and _as_text(row["config"]) not in _known(row["op"], row["dim"]):
        return f"config is {row['config']!r:.200}, which is none that is tried for D={row['dim']}"
    return None


def keeps_default(row: Any) -> bool:
    """Whether it is a row without tiles."""
    return isinstance(row, dict) and "config" in row and row["config"] is None


@functools.lru_cache(maxsize=256)
def _known(op: str, dim: int) -> frozenset[str]:
    """The tiles that a table may hold."""
    from vqtriton.tiles.candidates import TILES

    return frozenset(_as_text(asdict(config)) for config in TILES[op].candidates(dim))


def _as_text(config: dict[str, Any]) -> str:
    # 64.0 equals 64 to Python, and True 1
    return json.dumps(config, sort_keys=True, default=repr)


# --- which row a kernel gets ---

# read once in a process; `forget` reads them anew
_tables: dict[str, list[Row]] = {}
_chosen: dict[tuple[Any, ...], Any] = {}
_rejected: list[Any] = []
_missing: set[Path] = set()


def forget() -> None:
    """Reads the tables anew when they are next needed."""
    _tables.clear()
    _chosen.clear()
    _rejected.clear()
    _missing.clear()
    replay.forget()


def choose(
    op: str,
    dtype: torch.dtype,
    dim: int,
    codebook_size: int,
    num_rows: int,
    device: torch.device,
    heads: int = 1,
) -> Any:
    """Tiles for an op from the tables, or None: the default.

    N, K and heads count by a quarter of a doubling; of rows with the same op, dtype and D the
    nearest in logarithms is taken, unless it is more than 2³ times away in one of them.
    """
    key = (op, dtype, dim, _steps(codebook_size), _steps(num_rows), heads, device)
    try:
        return _chosen[key]
    except KeyError:
        name = str(dtype).removeprefix("torch.")
        found = find(Problem(op, name, dim, codebook_size, num_rows, heads), device)
        config = _chosen[key] = None if found is None else found[1]
        return config


def find(problem: Problem, device: torch.device) -> tuple[Row, Any, Path] | None:
    """The row for a problem, its tiles (None: the default), and the table it is from."""
    from vqtriton.tiles.candidates import TILES

    limit = shared_limit(device)
    for folder in folders():
        for name in device_names(device):
            path = folder / file_name(name)
            fitting = [
                (distance, -SOURCES.index(row["source"]), place, row)
                for place, row in enumerate(rows_of(path))
                if (distance := _distance(problem, row)) is not None and row["shared"] <= limit
            ]
            for *_, row in sorted(fitting, key=lambda found: found[:3]):
                tiles = row["config"]
                config = None if tiles is None else TILES[row["op"]].config(**tiles)
                if config is None or config not in _rejected:
                    return row, config, path
    return None


def reject(config: Any) -> None:
    """Tiles that a launch has refused are not chosen again."""
    warnings.warn(f"{config} does not fit on this device; the default is used", stacklevel=3)
    _rejected.append(config)
    _chosen.clear()
    replay.forget()


def _steps(count: int) -> int:
    # a batch may be empty
    return round(STEPS * math.log2(max(count, 1)))


def _distance(problem: Problem, row: Row) -> int | None:
    if (row["op"], row["dtype"], row["dim"]) != problem[:3]:
        return None
    apart = [
        abs(_steps(row[name]) - _steps(getattr(problem, name)))
        for name in ("codebook_size", "num_rows", "heads")
    ]
    return None if max(apart) > STEPS * MOST_OCTAVES else sum(apart)


def rows_of(path: Path) -> list[Row]:
    """Rows of a table, read once; none where there is no file or it is wrong."""
    key = str(path)
    if key not in _tables:
        rows: list[Row] = []
        try:
            # not `exists`, to which a link that leads nowhere is none
            path.lstat()
            rows = read(path)
        except (FileNotFoundError, NotADirectoryError):
            if path.parent == BUNDLED:
                log.info("no table %s: the kernels have their default tiles", path.name)
        except (OSError, ValueError) as error:
            reason = str(error) if str(path) in str(error) else f"{path}: {error}"
            warnings.warn(f"{reason}; the defaults are used", stacklevel=2)
        _tables[key] = rows
    return _tables[key]


def shared_limit(device: torch.device) -> float:
    """Bytes of shared memory that a program may have."""
    if device.type != "cuda":
        return float("inf")
    properties = torch.cuda.get_device_properties(device)
    return getattr(properties, "shared_memory_per_block_optin", 0) or 64 << 10
