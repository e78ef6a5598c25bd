"""Captures attention while a model runs, straight to files, a layer at a time.

Memory stays bounded: one layer's chosen rows and heads are on the way to disk at any time, and what
the disk gets is counted before the first forward.

Shape letters: B batch, H chosen heads, N tokens, R captured query rows, D head_dim.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from sla.analysis.capture_files import (
    DTYPES,
    Captured,
    CapturePlan,
    Moment,
    start_folder,
    write_captured,
)
from sla.analysis.capture_qkv import CaptureError
from sla.attention import AttentionConfig, AttentionContext, AttentionMethod, build_attention
from sla.attention.token_order import raster_order, tile_order
from sla.models.video_model import VideoModel
from sla.seeds import drawing

Grid = tuple[int, int, int]


def choose_rows(grid: Grid, block: int, orders: Sequence[Grid | None], count: int | None) -> Tensor:
    """Query tokens to keep, int64 (R,), raster indices in ascending order.

    Of each order `count` blocks of `block` tokens that are consecutive in it, evenly spaced and
    whole, so that pooled queries can be made of them; tokens of two orders are kept once.

    Args:
        count: blocks of each order, or None for all tokens.

    Raises:
        CaptureError: a count or block below 1, or a grid of less than one block.
    """
    frames, height, width = grid
    tokens = frames * height * width
    if block < 1 or block > tokens:
        raise CaptureError(f"block is {block}; it must be in [1, {tokens}], as there are {tokens}")
    if count is None:
        return torch.arange(tokens)
    if count < 1:
        raise CaptureError(f"query_blocks is {count}; it must be at least 1, or all")
    whole = tokens // block
    count = min(count, whole)
    blocks = [(2 * i + 1) * whole // (2 * count) for i in range(count)]
    kept = torch.zeros(tokens, dtype=torch.bool)
    for tile in orders:
        order = torch.arange(tokens) if tile is None else tile_order(grid, tile)
        for index in blocks:
            kept[order[index * block : (index + 1) * block]] = True
    return kept.nonzero().flatten()


def check_choice(model: VideoModel, name: str, chosen: Sequence[int] | None) -> tuple[int, ...]:
    """Layers or heads of a model that were asked for; all for None.

    Args:
        name: `layers` or `heads`.

    Raises:
        CaptureError: an index that the model does not have, or none.
    """
    methods = list(model.attention_modules())
    count = len(methods) if name == "layers" else methods[0].num_heads
    found = tuple(range(count)) if chosen is None else tuple(sorted(set(chosen)))
    if not found or found[0] < 0 or found[-1] >= count:
        raise CaptureError(f"{name} is {list(found)}; the model has {name} 0 to {count - 1}")
    return found


def check_size(plan: CapturePlan, rows: int, max_gib: float) -> int:
    """Bytes of the whole capture.

    Raises:
        CaptureError: more than `max_gib`; says what each choice costs.
    """
    each = plan.file_bytes(rows)
    total = each * len(plan.moments)
    if total > max_gib * 2**30:
        raise CaptureError(
            f"the capture would take {total / 2**30:.3g} GiB, more than --max-gib {max_gib:g}: "
            f"{len(plan.samples)} samples x {len(plan.timesteps)} timesteps x {len(plan.layers)} "
            f"layers, {each / 2**20:.3g} MiB each ({len(plan.heads)} heads, {rows} of "
            f"{plan.tokens} query rows, {plan.dtype}{', with values' if plan.values else ''}); "
            "choose fewer layers, heads, timesteps or query blocks, or --dtype bfloat16"
        )
    return total


def build_probes(
    model: VideoModel, config: AttentionConfig, layers: Sequence[int], seed: int
) -> dict[int, AttentionMethod]:
    """Fresh methods for some layers of a model, on its device; what they draw is the seed's."""
    device = next(model.parameters()).device
    probes: dict[int, AttentionMethod] = {}
    with drawing(seed):
        for own in model.attention_modules():
            probe = build_attention(config, own.num_heads, own.head_dim, own.dim, own.layer_index)
            if own.layer_index in layers:
                probes[own.layer_index] = probe.to(device).eval()
    return probes


class Recorder:
    """Writes attention calls of a model to a capture's folder, through hooks.

    Args:
        folder: what `start_folder` was given.
        plan: the plan.
        missing: what is still to be captured.
        provenance: kept in every file.
        probes: layer to a method whose labels and errors are kept; None for the model's own.
        max_bytes: the most that this run may write.

    Attributes:
        sample: index of the sample that the model is run on.
        written: files so far.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        plan: CapturePlan,
        missing: Sequence[Moment],
        provenance: Mapping[str, Any],
        probes: Mapping[int, AttentionMethod] | None,
        max_bytes: float,
    ) -> None:
        self.sample = 0
        self.written = 0
        self._folder = Path(folder)
        self._plan = plan
        self._missing = set(missing)
        self._provenance = provenance
        self._probes = probes
        self._bytes_left = max_bytes
        self._rows = choose_rows(plan.grid, plan.block, plan.orders, plan.query_blocks)

    def wants(self, sample: int) -> list[float]:
        """Timesteps of a sample of which something is missing, highest first."""
        return sorted({m.timestep for m in self._missing if m.sample == sample}, reverse=True)

    def hook(
        self,
        method: nn.Module,
        args: tuple[Tensor, Tensor, Tensor, AttentionContext],
        output: Tensor,
    ) -> None:
        """After a layer's attention. Of a batch (guidance doubles it) the first sample is kept, and
        of several calls at one timestep the first: both are the one with the text."""
        assert isinstance(method, AttentionMethod)
        query, key, value, context = args
        if context.timestep is None:
            raise CaptureError("the model tells its attention no timestep to capture at")
        moment = self._moment(method.layer_index, float(context.timestep.flatten()[0]))
        if moment is None:
            return
        if context.grid != self._plan.grid or context.always_critical:
            raise CaptureError(
                f"attention of layer {moment.layer} is of grid {context.grid} with "
                f"{context.always_critical} text tokens before it; a capture is of video tokens "
                f"alone, here of grid {self._plan.grid}"
            )
        with torch.no_grad():
            captured = self._take(method, moment, query, key, value, context, output)
        size = captured_bytes(captured)
        if size > self._bytes_left:
            raise CaptureError(
                f"file {self.written + 1} would exceed what --max-gib leaves; files before it stay"
            )
        self._bytes_left -= write_captured(self._folder, captured, self._plan, self._provenance)
        self._missing.discard(moment)
        self.written += 1

    def _moment(self, layer: int, timestep: float) -> Moment | None:
        # A model may be told the timestep in another dtype than the plan's float64.
        nearest = min(self._plan.timesteps, key=lambda planned: abs(planned - timestep))
        if abs(nearest - timestep) > 1e-3 * max(1.0, nearest):
            return None
        moment = Moment(self.sample, nearest, layer)
        return moment if moment in self._missing else None

    def _take(
        self,
        method: AttentionMethod,
        moment: Moment,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        context: AttentionContext,
        output: Tensor,
    ) -> Captured:
        plan = self._plan
        query, key, value, output = (t[:1] for t in (query, key, value, output))
        hidden = context.hidden_states
        context = replace(
            context,
            timestep=None if context.timestep is None else context.timestep[:1],
            hidden_states=None if hidden is None else hidden[:1],
        )
        probe = method
        if self._probes is not None:
            probe = self._probes[moment.layer]
            output = probe(query, key, value, context)
        block_map = probe.block_map(query, key, context)
        exact_fraction = probe.exact_fraction(query, key, context)

        heads = torch.tensor(plan.heads, device=query.device)
        rows = self._rows.to(query.device)
        tokens = torch.arange(plan.tokens, device=query.device)
        if context.tile is not None:
            tokens = raster_order(plan.grid, context.tile, query.device)

        def kept(tensor: Tensor, which: Tensor) -> Tensor:
            return tensor[0].index_select(0, heads).index_select(1, which)

        chosen = (kept(query, tokens[rows]), kept(key, tokens), kept(value, tokens))
        queries, keys, values = (t.float()[None] for t in chosen)
        with torch.autocast(queries.device.type, enabled=False):  # it would round to bf16
            exact = scaled_dot_product_attention(queries, keys, values)[0]
        difference = kept(output, tokens[rows]).float() - exact
        dtype = DTYPES[plan.dtype]
        # A copy: the model may go on to write to what it passed.
        kept_query, kept_key, kept_value = (t.to("cpu", dtype, copy=True) for t in chosen)
        labels = None if block_map is None else block_map.labels[0].index_select(0, heads).cpu()
        return Captured(
            moment=moment,
            heads=plan.heads,
            grid=plan.grid,
            rows=self._rows,
            query=kept_query,
            key=kept_key,
            value=kept_value if plan.values else None,
            labels=labels,
            error_l1=(difference.abs().sum((1, 2)) / exact.abs().sum((1, 2))).cpu(),
            error_l2=(difference.norm(dim=(1, 2)) / exact.norm(dim=(1, 2))).cpu(),
            exact_fraction=exact_fraction,
        )


@contextmanager
def record(
    model: VideoModel,
    folder: str | os.PathLike[str],
    plan: CapturePlan,
    *,
    provenance: Mapping[str, Any],
    probe: AttentionConfig | None = None,
    max_gib: float = 4.0,
) -> Iterator[Recorder]:
    """Capture what the model attends to inside the block.

    Set `sample` of what is yielded, then run the model on that sample at the plan's timesteps.
    What files of this plan hold already is not captured again.

    Args:
        model: on any device, in evaluation mode.
        folder: made if need be.
        plan: fixed before; `plan.probe` must be the config of the probe.
        provenance: kept in the files.
        probe: a method to try on the model's queries, keys and values; None for its own.
        max_gib: the most that all files may take.

    Raises:
        CaptureError: too large, or a folder of another capture. From the model's forward:
            attention that is not of the plan's grid.
        UnsupportedAttentionError: from the model's forward: the probe cannot take the inputs.
    """
    if json.loads(json.dumps(plan.probe)) != json.loads(
        json.dumps(asdict(probe or model.attention_config))
    ):
        raise ValueError(f"plan.probe is {plan.probe}; it must be the probe's config")
    rows = len(choose_rows(plan.grid, plan.block, plan.orders, plan.query_blocks))
    check_size(plan, rows, max_gib)
    missing = start_folder(folder, plan, provenance)
    probes = None if probe is None else build_probes(model, probe, plan.layers, plan.seed)
    there = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
    recorder = Recorder(folder, plan, missing, provenance, probes, max_gib * 2**30 - there)
    handles = [
        method.register_forward_hook(recorder.hook)
        for method in model.attention_modules()
        if method.layer_index in plan.layers
    ]
    try:
        yield recorder
    finally:
        for handle in handles:
            handle.remove()


def captured_bytes(captured: Captured) -> int:
    """Size of the tensors of one file."""
    parts = (getattr(captured, name) for name in ("rows", "query", "key", "value", "labels"))
    return sum(t.numel() * t.element_size() for t in parts if t is not None)


__all__ = ["Recorder", "build_probes", "check_choice", "check_size", "choose_rows", "record"]
