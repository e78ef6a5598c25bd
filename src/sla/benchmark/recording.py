"""Where a benchmark's rows go: nowhere, under results/, or under another folder."""

from __future__ import annotations

import argparse
from pathlib import Path

from sla.results import RESULTS, ResultsFile


def add_options(parser: argparse.ArgumentParser) -> None:
    """`--record` and `--out`."""
    parser.add_argument("--record", action="store_true", help="keep the rows under results/")
    parser.add_argument("--out", type=Path, help="keep the rows under this folder instead")


def results_file(
    options: argparse.Namespace, benchmark: str, *, seed: int, label: str = ""
) -> ResultsFile | None:
    """The file that `add_options` asks for, or None. Arguments as of `ResultsFile`."""
    if not (options.record or options.out):
        return None
    return ResultsFile(benchmark, root=options.out or RESULTS, seed=seed, label=label)
