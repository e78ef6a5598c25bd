"""All measures of a capture, as rows of a results record.

A row is one measure of one layer, head and timestep, mean over samples; null stands for the mean
over all of them. Curves are lists, one number a point of the axis beside them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sla.analysis.branches import BranchErrors, branch_errors, held_out_errors
from sla.analysis.capture_files import Capture, Captured
from sla.analysis.capture_qkv import CaptureError
from sla.analysis.methods import Case, MethodError, method_cases, method_error
from sla.analysis.routing import evenly, routing_recall
from sla.analysis.weights import (
    attention_weights,
    drop_errors,
    split_top,
    stable_rank,
    weight_histogram,
    weight_ranks,
    weight_shares,
)
from sla.attention import UnsupportedAttentionError

Grid = tuple[int, int, int]
Row = dict[str, Any]
_DIGITS = 4


@dataclass(frozen=True)
class MeasureConfig:
    """What is measured.

    Attributes:
        rows: query rows of a head at which dense weights are computed, evenly spaced over those
            that were captured. R x N numbers are held at a time, a few copies of them.
        top: share of the weights of Figure 3's first part.
        sparsity: shares of the weights dropped, for the error against sparsity. 0.45 and 0.919 are
            where the paper gives numbers.
        critical: fractions k_h at which routing's recall is measured.
        branch_critical: those at which the two branches' errors are taken apart (`branches`).
        tiles: token orders of both; None is raster order.
        block: tokens of a block, queries and keys.
        method_critical: fractions that methods are swept over; empty: methods are left out.
        method_samples: samples that methods are run on, the first ones.
        method_timesteps: timesteps that they are run at, evenly spaced over the capture's.
    """

    rows: int = 512
    top: float = 0.08
    sparsity: tuple[float, ...] = (
        *(0.1, 0.25, 0.45, 0.6, 0.7, 0.8, 0.85, 0.9, 0.919, 0.95, 0.975, 0.99),
    )
    critical: tuple[float, ...] = (0.025, 0.05, 0.1, 0.2)
    branch_critical: tuple[float, ...] = (0.05, 0.15)
    tiles: tuple[Grid | None, ...] = (None, (4, 4, 4))
    block: int = 64
    method_critical: tuple[float, ...] = (0.05, 0.1, 0.2)
    method_samples: int = 1
    method_timesteps: int = 2

    def __post_init__(self) -> None:
        for name in ("rows", "block", "method_samples", "method_timesteps"):
            if getattr(self, name) < 1:
                raise CaptureError(f"{name} is {getattr(self, name)}; it must be at least 1")


# log10 of N times a weight: 1/N is 0, 1/(100 N) is -2.
HISTOGRAM_EDGES = tuple(round(-8.0 + 0.25 * i, 2) for i in range(49))


def measure(
    capture: Capture,
    config: MeasureConfig,
    *,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> list[Row]:
    """Every measure of a capture.

    Args:
        progress: called with (files done, files in all).

    Raises:
        CaptureError: the capture has not what a measure needs; says what to capture.
    """
    plan = capture.plan
    weights, curves, recalls = (_Means() for _ in range(3))
    branches: dict[tuple[Any, ...], list[BranchErrors]] = {}
    histograms: dict[int, list[tuple[Tensor, Tensor]]] = defaultdict(list)
    methods = _Means()
    cases = method_cases(config.method_critical) if config.method_critical else []
    unsupported: dict[str, str] = {}
    every = torch.tensor(plan.timesteps)
    with_methods = {plan.timesteps[i] for i in evenly(every, config.method_timesteps).tolist()}
    for done, moment in enumerate(capture.moments, start=1):
        captured = capture.read(moment)
        if captured.value is None:
            raise CaptureError(
                f"{capture.folder} holds no values, without which there is no error to measure; "
                "capture without --no-values"
            )
        for index, head in enumerate(plan.heads):
            place = (moment.layer, head, moment.timestep)
            found, histogram = _of_head(captured, index, config, device)
            weights.add(place, found["weights"])
            curves.add(place, found["drop_error"])
            for tile in config.tiles:
                recalls.add((*place, _order(tile)), _recall(captured, index, tile, config, device))
                branches[(*place, _order(tile), moment.sample)] = _branches(
                    captured, index, tile, config, device
                )
            histograms[moment.layer].append(histogram)
        if moment.sample < config.method_samples and moment.timestep in with_methods:
            known: dict[str, MethodError] = {}  # a method's defaults are a point of its sweep too
            for number, case in enumerate(cases):
                same = repr(case.config)
                try:
                    known[same] = known.get(same) or method_error(case, captured, device=device)
                except UnsupportedAttentionError as reason:
                    unsupported[case.label] = str(reason)
                    continue
                methods.add((number, moment.layer, moment.timestep), asdict(known[same]))
        if progress is not None:
            progress(done, len(capture.moments))

    sparsity = list(config.sparsity)
    fractions = list(config.critical)
    rows = [_describe(capture, config, unsupported)]
    rows += weights.rows("weights", ("layer", "head", "timestep"))
    rows += [{**r, "sparsity": sparsity} for r in curves.rows("drop_error", _PLACE)]
    rows += [{**r, "critical": fractions} for r in recalls.rows("recall", (*_PLACE, "order"))]
    rows += _branch_rows(branches, config.branch_critical)
    rows += _histogram_rows(histograms)
    rows += _method_rows(methods, cases)
    return [_rounded(row) for row in rows]


_PLACE = ("layer", "head", "timestep")


def _of_head(
    captured: Captured, index: int, config: MeasureConfig, device: torch.device | str
) -> tuple[dict[str, Row], tuple[Tensor, Tensor]]:
    assert captured.value is not None
    query, key, value = (t[index] for t in (captured.query, captured.key, captured.value))
    query = query[evenly(captured.rows, config.rows)]
    weights = attention_weights(query.to(device).float(), key.to(device).float())
    ranks = weight_ranks(weights)
    top, rest = split_top(weights, config.top, ranks)
    shares = {
        **asdict(weight_shares(weights)),
        "stable_rank": stable_rank(weights),
        "stable_rank_top": stable_rank(top),
        "stable_rank_rest": stable_rank(rest),
        "probe_error_l1": captured.error_l1[index].item(),
    }
    kept = [1.0 - s for s in config.sparsity]
    errors = drop_errors(weights, value.to(device).float(), kept, ranks)
    names = ("carried", "dropped", "renormalised")
    curve = {name: [getattr(e, name) for e in errors] for name in names}
    return (
        {"weights": shares, "drop_error": curve},
        weight_histogram(weights, HISTOGRAM_EDGES),
    )


def _recall(
    captured: Captured,
    index: int,
    tile: Grid | None,
    config: MeasureConfig,
    device: torch.device | str,
) -> Row:
    try:
        found = routing_recall(
            captured.query[index].to(device),
            captured.key[index].to(device),
            captured.rows,
            captured.grid,
            tile=tile,
            critical=config.critical,
            block_q=config.block,
            block_kv=config.block,
        )
    except ValueError as error:
        raise CaptureError(f"{captured.moment.file}: {error}") from error
    names = ("blocks", "key_blocks", "pooled", "oracle", "agreement")
    return {name: [getattr(recall, name) for recall in found] for name in names}


def _branches(
    captured: Captured,
    index: int,
    tile: Grid | None,
    config: MeasureConfig,
    device: torch.device | str,
) -> list[BranchErrors]:
    assert captured.value is not None
    return branch_errors(
        captured.query[index].to(device),
        captured.key[index].to(device),
        captured.value[index].to(device),
        captured.rows,
        captured.grid,
        tile=tile,
        critical=config.branch_critical,
        block=config.block,
    )


_SCALARS = ("mass", "sparse", "scaled", "mixed", "mixed_exact", "pooled")
_FITS = ("proj", "proj_exact", "mixed_proj")
_Call = tuple[Any, ...]  # layer, head, timestep, sample
# Which calls share a fitted Proj. SLA's is one a layer.
_SHARED: dict[str, Callable[[_Call], _Call]] = {
    "head": lambda call: call[:2],
    "layer": lambda call: call[:1],
}


def _branch_rows(
    found: Mapping[tuple[Any, ...], Sequence[BranchErrors]], fractions: Sequence[float]
) -> list[Row]:
    """By order of tokens: over everything, by layer, and by timestep."""
    rows: list[Row] = []
    for order in dict.fromkeys(key[3] for key in found):
        calls = {(*key[:3], key[4]): errors for key, errors in found.items() if key[3] == order}
        lists: dict[_Call, Row] = {
            call: {name: [getattr(error, name) for error in errors] for name in _SCALARS}
            for call, errors in calls.items()
        }
        if len({call[3] for call in calls}) > 1:  # a fit is measured on another sample
            for name in _FITS:
                for shared, group in _SHARED.items():
                    for point in range(len(fractions)):
                        fits = {
                            call: getattr(errors[point], name) for call, errors in calls.items()
                        }
                        held_out = held_out_errors(fits, group, lambda call: call[3])
                        for call, error in held_out.items():
                            lists[call].setdefault(f"{name}_{shared}", []).append(error)
        means = _Means()
        for call, values in lists.items():
            means.add(call, values)
        head = {"measure": "branches", "order": order, "critical": list(fractions)}
        rows += _whole_and_parts(head, means, list(calls), {"layer": 0, "timestep": 2})
    return rows


class _Means:
    """Means of numbers and lists of numbers by key."""

    def __init__(self) -> None:
        self._values: dict[tuple[Any, ...], dict[str, list[Any]]] = {}

    def add(self, key: tuple[Any, ...], values: Mapping[str, Any]) -> None:
        into = self._values.setdefault(key, {name: [] for name in values})
        for name, value in values.items():
            into[name].append(value)

    def keys(self) -> list[tuple[Any, ...]]:
        return list(self._values)

    def mean(self, keys: Iterable[tuple[Any, ...]]) -> Row:
        """Mean over everything that was added under these keys."""
        pooled: dict[str, list[Any]] = defaultdict(list)
        for key in keys:
            for name, values in self._values[key].items():
                pooled[name] += values
        return {name: np.mean(values, axis=0).tolist() for name, values in pooled.items()}

    def spread(self, keys: Sequence[tuple[Any, ...]]) -> Row:
        """Standard deviation over the keys' means."""
        means = [self.mean([key]) for key in keys]
        return {
            f"{name}_sd": np.std([mean[name] for mean in means], axis=0).tolist()
            for name in means[0]
        }

    def rows(self, measure: str, names: Sequence[str]) -> list[Row]:
        """A row a key; and before, for each value of what comes after layer, head and timestep, the
        mean over these three."""
        others: dict[tuple[Any, ...], list[tuple[Any, ...]]] = defaultdict(list)
        for key in self._values:
            others[key[len(_PLACE) :]].append(key)
        found: list[Row] = []
        for other, keys in others.items():
            place = dict(zip(names, (None, None, None, *other), strict=True))
            counts = {"maps": len(keys)}
            found.append(
                {"measure": measure, **place, **counts, **self.mean(keys), **self.spread(keys)}
            )
        for key in self._values:
            place = dict(zip(names, key, strict=True))
            found.append({"measure": measure, **place, **self.mean([key])})
        return found


def _histogram_rows(found: Mapping[int, Sequence[tuple[Tensor, Tensor]]]) -> list[Row]:
    def row(layer: int | None, parts: Sequence[tuple[Tensor, Tensor]]) -> Row:
        share, carried = (torch.stack([p[i] for p in parts]).mean(0).tolist() for i in (0, 1))
        return {"measure": "histogram", "layer": layer, "share": share, "carried": carried}

    everything = [part for parts in found.values() for part in parts]
    rows = [row(None, everything)]
    rows[0]["edges"] = list(HISTOGRAM_EDGES)  # log10 of N times the weight
    return rows + [row(layer, parts) for layer, parts in found.items()]


def _whole_and_parts(
    head: Row, means: _Means, keys: Sequence[tuple[Any, ...]], parts: Mapping[str, int]
) -> list[Row]:
    """Means over all keys, and by each of some of their parts: its name, and its place in a key."""
    nowhere = dict.fromkeys(parts)
    rows = [{**head, **nowhere, **means.mean(keys)}]
    for name, place in parts.items():
        for value in dict.fromkeys(key[place] for key in keys):
            mean = means.mean([key for key in keys if key[place] == value])
            rows.append({**head, **nowhere, name: value, **mean})
    return rows


def _method_rows(found: _Means, cases: Sequence[Case]) -> list[Row]:
    """By case: over everything, by layer, and by timestep."""
    rows = []
    for number, case in enumerate(cases):
        keys = [key for key in found.keys() if key[0] == number]  # noqa: SIM118
        if not keys:
            continue
        numbers = {"critical": getattr(case.config, "critical", None)}
        head = {"measure": "method", "method": case.label, "default": case.default, **numbers}
        rows += _whole_and_parts(head, found, keys, {"layer": 1, "timestep": 2})
    return rows


def _describe(capture: Capture, config: MeasureConfig, unsupported: Mapping[str, str]) -> Row:
    """What the capture was."""
    plan = capture.plan
    captured_rows = len(capture.read(capture.moments[0], heads=plan.heads[:1]).rows)
    kinds = {sample["kind"] for sample in plan.samples}
    return {
        "measure": "capture",
        "model": plan.config.get("model", {}).get("name"),
        "run": plan.config.get("run", {}).get("name"),
        "weights": plan.weights,
        "weights_sha256": plan.weights_sha256,
        "attention": plan.attention["name"],
        "probe": plan.probe,
        "probe_is_model": plan.probe_is_model,
        "grid": list(plan.grid),
        "tokens": plan.tokens,
        "head_dim": plan.head_dim,
        "samples": len(plan.samples),
        "kind": ", ".join(sorted(kinds)),
        "timesteps": list(plan.timesteps),
        "layers": list(plan.layers),
        "heads": list(plan.heads),
        "captured_rows": captured_rows,
        "dtype": plan.dtype,
        "seed": plan.seed,
        "capture_command": capture.provenance.get("command"),
        "capture_commit": capture.provenance.get("commit"),
        "capture_dirty": capture.provenance.get("dirty"),
        "settings": asdict(config),
        "rows": min(config.rows, captured_rows),
        "unsupported": dict(unsupported),
    }


def _order(tile: Grid | None) -> str:
    return "raster" if tile is None else "x".join(map(str, tile))


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return value


__all__ = ["HISTOGRAM_EDGES", "MeasureConfig", "evenly", "measure"]
