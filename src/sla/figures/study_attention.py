"""What the attention of the study's model is like: why methods miss full attention. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sla.figures import claims
from sla.figures.markdown import markdown, origin
from sla.results import RESULTS, Results
from sla.study.records import read_records

Row = dict[str, Any]
_NONE = (
    "(no record yet: `python -m sla capture --config configs/study/pretrain.yaml --clips 6`, then "
    "`make analyse ARGS=--record`)"
)
# What O is replaced by: the name in the rows, and in the table.
_OUTPUTS = (
    ("sparse", "O^s"),
    ("proj_layer", "O^s + Proj(O^l), one Proj a layer"),
    ("proj_head", "the same, one a head"),
    ("proj_exact_layer", "O^s + Proj(exact marginal)"),
    ("scaled", "m O^s"),
    ("mixed", "m O^s + (1 - m) O^l"),
    ("mixed_proj_layer", "m O^s + (1 - m) Proj(O^l)"),
    ("mixed_exact", "m O^s + (1 - m) exact marginal"),
    ("pooled", "O^s and pooled others in one softmax"),
)


def attention(root: Path = RESULTS) -> str:
    """Recall of the routing, and how far two branches are from exact attention."""
    captures = claims.own_captures(read_records(root), root)
    if not captures:
        return _NONE
    found = captures[0]
    recall, branches = (_by_order(found, name) for name in ("recall", "branches"))
    body = []
    for order, row in recall.items():
        for point, fraction in enumerate(row["critical"]):
            numbers = (row[name][point] for name in ("pooled", "oracle", "agreement"))
            body.append([_name(order), f"{fraction:.1%}", *(f"{n:.1%}" for n in numbers)])
    head = ["blocks of", "critical", "attention on the chosen", "on the best", "chosen of the best"]
    parts = [markdown(head, body)]
    if branches:
        body = []
        for order, row in branches.items():
            for point, fraction in enumerate(row["critical"]):
                cells = [f"{row[name][point]:.3f}" if name in row else "-" for name, _ in _OUTPUTS]
                body.append([_name(order), f"{fraction:.1%}", f"{row['mass'][point]:.1%}", *cells])
        head = ["blocks of", "critical", "m", *(text for _, text in _OUTPUTS)]
        parts.append(markdown(head, body))
    return "\n\n".join([*parts, origin([found])])


def _by_order(found: Results, measure: str) -> dict[str, Row]:
    """Means over layers, heads, timesteps and samples, by order of tokens."""
    return {
        row["order"]: row
        for row in found.rows
        if row.get("measure") == measure
        and all(row.get(name) is None for name in ("layer", "head", "timestep"))
    }


def _name(order: str) -> str:
    return "consecutive tokens" if order == "raster" else f"{order} tokens"


__all__ = ["attention"]
