"""The line of a figure's caption that says what its data was measured on, and by which command."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sla.results import Results


def origin_line(data: str, provenance: Mapping[str, Any]) -> str:
    """Data, device, version, commit and command.

    Args:
        data: a file or folder.
        provenance: as `sla.results.provenance` gives it.
    """
    dirty = " with changes" if provenance.get("dirty") else ""
    return (
        f"Data: {data} ({provenance['device']}, torch {provenance['torch']}, commit "
        f"{provenance['commit'][:8]}{dirty}), `{provenance['command']}`"
    )


def origin_of(results: Results) -> str:
    """`origin_line` of a results file."""
    return origin_line(f"{results.path.parent.name}/{results.path.name}", results.provenance)


__all__ = ["origin_line", "origin_of"]
