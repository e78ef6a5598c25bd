"""`python -m sla_eval`: scores a folder of videos and prints a Markdown table.

Exit codes: 0 scored; 1 nothing could be scored, the report could not be written, or, with
--require, a metric is not available; 2 bad arguments.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from sla_eval.metrics import available_metrics
from sla_eval.report import markdown_table, score_folder, write_json


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line `argv` (this process's own if None) and returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m sla_eval", description="Score a folder of videos."
    )
    parser.add_argument("--videos", required=True, metavar="DIR", help="folder of videos to score")
    parser.add_argument(
        "--reference", metavar="DIR", help="folder of reference videos with the same file names"
    )
    parser.add_argument(
        "--metrics",
        default="all",
        metavar="NAMES",
        help=f"all, or names with commas between: {', '.join(available_metrics())}",
    )
    parser.add_argument(
        "--require", action="store_true", help="fail (exit code 1) if a metric is not available"
    )
    parser.add_argument("--out", metavar="FILE", help="also write the report as JSON")
    arguments = parser.parse_args(argv)

    names: str | list[str] = "all"
    if arguments.metrics != "all":
        names = [name.strip() for name in arguments.metrics.split(",") if name.strip()]
    try:
        report = score_folder(arguments.videos, arguments.reference, names)
    except ValueError as error:
        parser.error(str(error))
    print(markdown_table(report), end="")
    if arguments.out is not None:
        try:
            write_json(arguments.out, report)
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
            print(f"required metric {name} is not available: {why}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
