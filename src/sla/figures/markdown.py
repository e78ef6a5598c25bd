"""Markdown of tables, and the line that says where their numbers are from."""

from __future__ import annotations

from collections.abc import Sequence

from sla.results import Results


def markdown(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A table; all columns but the first are right-aligned."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def origin(files: Sequence[Results]) -> str:
    """Device, versions, commit and commands of results files, each once."""
    commands: dict[str, dict[str, None]] = {}
    for file in files:
        head = file.provenance
        dirty = " with local changes" if head["dirty"] else ""
        place = (
            f"{head['device']}, torch {head['torch']}, {head['date'][:10]}, commit "
            f"{head['commit'][:8]}{dirty}"
        )
        commands.setdefault(place, {})[f"`{head['command']}`"] = None
    lines = [f"{place}, {', '.join(of_place)}" for place, of_place in commands.items()]
    return "<sub>" + "; ".join(lines) + "</sub>"
