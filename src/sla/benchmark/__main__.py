"""`python -m sla.benchmark NAME [options]`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

# Each is a module of this package. Only the one that is asked for is imported: a machine need not
# have what the others use.
BENCHMARKS = {
    "kernels": "the operator against exact attention: time, memory, FLOPs over time",
    "attention": "the attention methods: time against what their exact work predicts",
    "data": "the data pipeline: samples and frames per second",
    "eval": "video metrics: videos per second, each metric and all of them",
    "e2e": "Wan2.1 from end to end: denoising step, training step, generation",
    "layers": "what stands beside attention in Wan's layers, each piece in several ways",
    "multigpu": "Wan2.1 on several GPUs: losses, scaling, checkpoints, a killed rank",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one benchmark; returns the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(prog="python -m sla.benchmark", description=__doc__)
    benchmarks = parser.add_subparsers(dest="benchmark", required=True, metavar="NAME")
    for name, what in BENCHMARKS.items():
        own = benchmarks.add_parser(name, help=what)
        if given[:1] == [name]:
            import_module(f"sla.benchmark.{name}").add_parser(own)
    options = parser.parse_args(given)
    return int(options.run(options))


if __name__ == "__main__":
    raise SystemExit(main())
