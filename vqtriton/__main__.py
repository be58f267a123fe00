"""``python -m vqtriton env``."""

from __future__ import annotations

import argparse

from vqtriton.environment import describe


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m vqtriton")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("env", help="print versions, devices, backends and tables in use")
    parser.parse_args()
    print(describe())


if __name__ == "__main__":
    main()
