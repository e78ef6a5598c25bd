"""`python -m sla study-data`: make the study set."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

from sla.cli.data import DEMO_ROOT
from sla.config import ConfigError
from sla.data.demo import build_demo_set
from sla.data.study import StudyConfig, verify_study, write_study


def make(out: Path, numbers: Mapping[str, int], *, workers: int | None, real: bool) -> None:
    """Make or complete the set, and say what it holds.

    Args:
        out: folder of the set.
        numbers: fields of StudyConfig.
        workers: processes; None for one a core.
        real: add the demo set's clips; it is built if it is not there.

    Raises:
        ConfigError: numbers that cannot be used.
        StudyError, OSError: from `write_study`.
        DemoDataError: the demo set cannot be built.
    """
    try:
        config = StudyConfig(**numbers)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if real:
        build_demo_set(DEMO_ROOT)
    begin = time.monotonic()
    summary = write_study(out, config, workers=workers, real=DEMO_ROOT if real else None)
    print(f"{summary}, {time.monotonic() - begin:.0f} s")


def verify(out: Path) -> None:
    """Compare the set with its checksums. Raises StudyError."""
    print(verify_study(out))
