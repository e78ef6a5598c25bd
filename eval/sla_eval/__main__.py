"""`python -m sla_eval`: score a folder of videos.

Exit status: 0 scored, 1 nothing could be scored, a file could not be written, or with --require a
metric is not available, 2 the call was wrong.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from sla_eval.prompts import read_prompts
from sla_eval.report import (
    paired_differences,
    read_report,
    score_folder,
    write_json,
    write_table,
)
from sla_eval.runner import NO_REFERENCES
from sla_eval.tables import difference_table, score_table


def build_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(prog="python -m sla_eval", description=__doc__)
    parser.add_argument("--videos", required=True, type=Path, metavar="DIR", help="what to score")
    parser.add_argument(
        "--reference", type=Path, metavar="DIR", help="videos of the same names to compare with"
    )
    parser.add_argument(
        "--prompts",
        metavar="FILE",
        help="the prompts: a text file with one a line, VBench's JSON, 'vbench' (of the installed "
        "package) or 'builtin'; default: the JSON files beside the videos",
    )
    parser.add_argument(
        "--metrics", default="all", metavar="NAMES", help="'all', or names separated by commas"
    )
    parser.add_argument(
        "--baseline", type=Path, metavar="FILE", help="report of other videos of the same prompts "
        "and seeds: print the paired differences to it too",
    )  # fmt: skip
    parser.add_argument(
        "--require", action="store_true", help="fail if a metric asked for is not available"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="JSON report to write; the table goes beside it as .md, .csv and .tex",
    )
    parser.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="processes that decode and score, 0 for this one alone; on a GPU, threads that decode "
        "(default: one a core where there are videos enough)",
    )
    parser.add_argument(
        "--processes",
        type=int,
        default=0,
        metavar="N",
        help="on a GPU: processes that decode and score in place of this one, each with networks "
        "of its own on it",
    )
    parser.add_argument(
        "--device", help="where metrics compute; default: cuda if there is one, else cpu"
    )
    parser.add_argument(
        "--weights", type=Path, metavar="DIR", help="folder of the networks' weights"
    )
    parser.add_argument("--quiet", action="store_true", help="print the table alone")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = build_parser()
    arguments = parser.parse_args(argv)
    names = [name.strip() for name in arguments.metrics.split(",") if name.strip()]
    if arguments.out is not None and arguments.out.suffix != ".json":
        parser.error(f"--out must end in .json, got {str(arguments.out)!r}")
    try:
        device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        parser.error(
            f"--device must be one of torch's, such as cpu or cuda:0, got {arguments.device!r}"
        )
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device is {arguments.device!r}, and torch finds no GPU here")

    def show(done: int, total: int, name: str) -> None:
        if sys.stderr.isatty() and not arguments.quiet:
            print(f"\r{done}/{total} ", end="\n" if done == total else "", file=sys.stderr)

    differences = {}
    try:
        baseline = None if arguments.baseline is None else read_report(arguments.baseline)
        report = score_folder(
            arguments.videos,
            arguments.reference,
            names,
            prompts=None if arguments.prompts is None else read_prompts(arguments.prompts),
            workers=arguments.workers,
            processes=arguments.processes,
            device=device,
            weights_dir=arguments.weights,
            progress=show,
        )
        if baseline is not None:
            differences = paired_differences(report, baseline)
            report["differences"] = {str(arguments.baseline): differences}
    except ValueError as error:
        parser.error(str(error))
    table = score_table(report, f"Scores of {arguments.videos}")
    print(table.markdown(), end="")
    if arguments.baseline is not None:
        print(f"\nDifference to {arguments.baseline}:\n")
        print(difference_table({"these": differences}, str(arguments.baseline)).markdown(), end="")
    if arguments.out is not None:
        try:
            write_json(arguments.out, report)
            write_table(arguments.out.with_suffix(""), table)
        except OSError as error:
            print(f"cannot write {arguments.out}: {error.strerror or error}", file=sys.stderr)
            return 1
    missing = {
        name: entry["not_available"]
        for name, entry in report["metrics"].items()
        if "not_available" in entry
    }
    if len(missing) == len(report["metrics"]):
        print("nothing could be scored", file=sys.stderr)
        return 1
    if arguments.require and missing:
        for name, why in missing.items():
            hint = " (give them with --reference DIR)" if why == NO_REFERENCES else ""
            print(f"required metric {name} is not available: {why}{hint}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
