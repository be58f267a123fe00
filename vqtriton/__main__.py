"""``python -m vqtriton env`` and ``python -m vqtriton tune``; ``vqtriton`` is the same command."""

from __future__ import annotations

import argparse
import sys

from vqtriton.environment import describe
from vqtriton.tuning import tune


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m vqtriton")
    commands = parser.add_subparsers(dest="command", required=True)
    env = commands.add_parser("env", help="print what a bug report needs")
    env.add_argument(
        "--shape",
        type=tune.shape,
        action="append",
        default=[],
        metavar="N,K,D[,DTYPE]",
        help="also print the tiles that the kernels use for this shape",
    )
    tuning = commands.add_parser("tune", help="find the fastest tiles; see docs/tuning.md")
    tune.add_arguments(tuning)
    asked = parser.parse_args()
    if asked.command == "tune":
        sys.exit(tune.run(asked, tuning))
    print(describe(asked.shape))


if __name__ == "__main__":
    main()
