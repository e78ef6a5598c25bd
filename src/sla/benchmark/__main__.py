"""`python -m sla.benchmark NAME [options]`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from sla.benchmark import attention, kernels


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one benchmark; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m sla.benchmark", description=__doc__)
    benchmarks = parser.add_subparsers(dest="benchmark", required=True, metavar="NAME")
    kernels.add_parser(benchmarks.add_parser("kernels", help=kernels.__doc__))
    attention.add_parser(benchmarks.add_parser("attention", help=attention.__doc__))
    options = parser.parse_args(arguments)
    return int(options.run(options))


if __name__ == "__main__":
    raise SystemExit(main())
