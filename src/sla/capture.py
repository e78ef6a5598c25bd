"""`python -m sla.capture`: the same as `python -m sla capture`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from sla.cli.main import main as sla


def main(arguments: Sequence[str] | None = None) -> int:
    """Capture; returns the exit status."""
    return sla(["capture", *(sys.argv[1:] if arguments is None else arguments)])


if __name__ == "__main__":
    raise SystemExit(main())
