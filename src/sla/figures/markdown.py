"""Markdown of tables, and the line that says where their numbers are from."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from sla.results import Results

# Which part of the work a process does and until when, not how.
_PART = re.compile(r" --(?:share|begin-within) \S+")


def markdown(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A table; all columns but the first are right-aligned."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def origin(files: Sequence[Results]) -> str:
    """Device, versions, commit and commands of results files, each once.

    Commands that differ only in the share of the work that they do are one, with their number; the
    files have each as it was given.
    """
    commands: dict[str, dict[str, dict[str, None]]] = {}
    for file in files:
        head = file.provenance
        dirty = " with local changes" if head["dirty"] else ""
        place = (
            f"{head['device']}, torch {head['torch']}, {head['date'][:10]}, commit "
            f"{head['commit'][:8]}{dirty}"
        )
        command = head["command"]
        commands.setdefault(place, {}).setdefault(_PART.sub("", command), {})[command] = None
    lines = [
        f"{place}, {', '.join(_together(*item) for item in of_place.items())}"
        for place, of_place in commands.items()
    ]
    return "<sub>" + "; ".join(lines) + "</sub>"


def _together(common: str, commands: Collection[str]) -> str:
    if len(commands) == 1:
        return f"`{next(iter(commands))}`"
    return f"`{common}` in {len(commands)} parts"
