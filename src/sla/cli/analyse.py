"""`python -m sla analyse`: the measures of a capture, printed and recorded."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from sla.analysis.capture_files import Capture
from sla.analysis.measure import MeasureConfig, measure
from sla.results import RESULTS, ResultsFile

BENCHMARK = "analysis"


def analyse(
    folder: Path,
    *,
    rows: int = MeasureConfig.rows,
    block: int = MeasureConfig.block,
    methods: bool = True,
    device: str = "auto",
    record: bool = False,
    stage: str | None = None,
    root: Path = RESULTS,
) -> Path | None:
    """Measure a capture.

    Args:
        folder: of the capture.
        rows: query rows of each map at which dense weights are computed.
        block: tokens of a block, queries and keys, at which routing is measured.
        methods: run every registered method on it too; needs all queries.
        device: `auto`, or a device of PyTorch.
        record: keep the rows under `root`/analysis.
        stage: where in training the model is, if that is what the record is for; it is kept in the
            row `capture`.

    Returns:
        The results file, if recorded.

    Raises:
        FileNotFoundError, CaptureError: no capture, or not what a measure needs.
    """
    capture = Capture(folder)
    config = MeasureConfig(rows=rows, block=block)
    if not methods:
        config = replace(config, method_critical=())
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    with tqdm(total=len(capture.moments), unit="file", file=sys.stderr) as bar:
        found = measure(capture, config, device=device, progress=lambda *_: bar.update())
    print(summary(found))
    if not record:
        return None
    file = ResultsFile(BENCHMARK, seed=capture.plan.seed, root=root)
    for row in found:
        file.append({**row, "stage": stage} if stage and row["measure"] == "capture" else row)
    print(f"recorded in {file.path}; draw it: python -m sla figures --capture {folder}")
    return file.path


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """The means, as text."""
    whole = [row for row in rows if row.get("layer", 0) is None and row.get("timestep") is None]
    lines: list[str] = []
    for row in whole:
        if row["measure"] == "weights":
            lines += [
                f"mean over {row['maps']} maps (layer, head, timestep):",
                f"  above 1/N: {row['above']:.1%} of the weights, with {row['sum_above']:.1%} of "
                f"the attention; below 1/(100 N): {row['below']:.1%}, with {row['sum_below']:.2%}",
                f"  stable rank: all {row['stable_rank']:.1f}, top {row['stable_rank_top']:.1f}, "
                f"rest {row['stable_rank_rest']:.1f}",
            ]
        elif row["measure"] == "drop_error":
            lines.append("  dropped: L1 error (rows normalised again)")
            lines += [
                f"  {s:7.1%}: {error:.3f} ({again:.3f})"
                for s, error, again in zip(
                    row["sparsity"], row["dropped"], row["renormalised"], strict=True
                )
            ]
        elif row["measure"] == "recall":
            lines.append(f"  {row['order']} order: mass on the chosen blocks (the best blocks')")
            lines += [
                f"  {k:7.1%}: {pooled:.3f} ({oracle:.3f})"
                for k, pooled, oracle in zip(
                    row["critical"], row["pooled"], row["oracle"], strict=True
                )
            ]
        elif row["measure"] == "branches":
            lines.append(f"  {row['order']} order, two branches: error of O^s, with Proj, as SLA2")
            fitted = row.get("proj_layer", [float("nan")] * len(row["critical"]))
            lines += [
                f"  {k:7.1%}: {sparse:.3f} {proj:.3f} {mixed:.3f}"
                for k, sparse, proj, mixed in zip(
                    row["critical"], row["sparse"], fitted, row["mixed"], strict=True
                )
            ]
    methods = [row for row in whole if row["measure"] == "method"]
    if methods:
        lines.append("  method, not fine-tuned: exact share, L1 error")
        for row in methods:
            at = "defaults" if row["default"] else f"critical {row['critical']:g}"
            error = f"{row['exact_fraction']:6.1%} {row['error_l1']:.3f}"
            lines.append(f"  {row['method']:<28}{at:<15}{error}")
    return "\n".join(lines)
