"""What the attention of the study's model is like: why methods miss full attention. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sla.figures import claims
from sla.figures.markdown import markdown, origin
from sla.results import RESULTS, Results, read_all
from sla.study.records import read_records

Row = dict[str, Any]
_FRACTION = 0.05  # of the blocks, in the table of stages
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


def stages(root: Path = RESULTS) -> str:
    """How attention moves with training: means over layers, heads, timesteps and clips."""
    own = claims.own_captures(read_records(root), root)[:1]
    if not own:
        return _NONE
    (ours,) = (row for row in own[0].rows if row.get("measure") == "capture")
    lines: list[tuple[int, str, Results, Row]] = []
    seen: set[str] = set()
    for found in read_all("analysis", root):  # the newest first
        for row in found.rows:
            if row.get("measure") != "capture" or row["grid"] != ours["grid"]:
                continue
            stage, weights = row.get("stage"), str(row["weights_sha256"])
            if weights in seen or not (stage or row["run"] == ours["run"]):
                continue
            seen.add(weights)
            place = 1  # between what was before training and after it
            if stage:
                place = 0 if stage.startswith("before") else 2
            elif weights == ours["weights_sha256"]:
                stage = "pretrained"
            else:
                stage = "pretrained too little (superseded)"
            lines.append((place, stage, found, row))
    lines.reverse()
    lines.sort(key=lambda line: line[0])
    body = [[stage, str(row["samples"]), *_stage_cells(found)] for _, stage, found, row in lines]
    head = ["model", "clips", "weights over 1/N", "their attention", "weights under 1/(100 N)"]
    head += ["stable rank", "of the top 8 %", "of the rest", "attention on the chosen 5 %"]
    head += ["on the best 5 %", "error of O^s", "error of O^s and pooled others in one softmax"]
    return f"{markdown(head, body)}\n\n{origin([found for _, _, found, _ in lines])}"


def _stage_cells(found: Results) -> list[str]:
    """Numbers of one record, of blocks of consecutive tokens at 5 %."""
    weights = _whole(found, "weights")[0]
    cells = [f"{weights[name]:.1%}" for name in ("above", "sum_above", "below")]
    ranks = ("stable_rank", "stable_rank_top", "stable_rank_rest")
    cells += [f"{weights[name]:.1f}" for name in ranks]
    for measure, names, form in (
        ("recall", ("pooled", "oracle"), "{:.1%}"),
        ("branches", ("sparse", "pooled"), "{:.3f}"),
    ):
        row = _by_order(found, measure).get("raster", {})
        fractions = row.get("critical", [])
        for name in names:
            known = _FRACTION in fractions and name in row
            cells.append(form.format(row[name][fractions.index(_FRACTION)]) if known else "-")
    return cells


def _whole(found: Results, measure: str) -> list[Row]:
    """Means over layers, heads, timesteps and samples."""
    return [
        row
        for row in found.rows
        if row.get("measure") == measure
        and all(row.get(name) is None for name in ("layer", "head", "timestep"))
    ]


def _by_order(found: Results, measure: str) -> dict[str, Row]:
    """The same, by order of tokens."""
    return {row["order"]: row for row in _whole(found, measure)}


def _name(order: str) -> str:
    return "consecutive tokens" if order == "raster" else f"{order} tokens"


__all__ = ["attention", "stages"]
