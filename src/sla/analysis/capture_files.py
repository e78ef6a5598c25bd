"""Captured attention on disk: one folder a capture, one safetensors file a sample, timestep, layer.

`capture.json` says what is in the folder: the plan, fixed before anything is written, and the
provenance. Each file repeats them in its header, so that it can be read alone. Tokens are in raster
order whatever the order inside the model.

Shape letters: H chosen heads, N tokens, R captured query rows, D head_dim.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sla.analysis.capture_qkv import CaptureError
from sla.files import atomic_path, write_text

FORMAT = "sla-capture"
VERSION = 1
PLAN_FILE = "capture.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_HEADER_KEY = "sla"
_REQUIRED = ("rows", "query", "key", "error_l1", "error_l2")
_OPTIONAL = ("value", "labels")

Grid = tuple[int, int, int]


@dataclass(frozen=True)
class CapturePlan:
    """What a capture holds, fixed before its first forward.

    Attributes:
        samples: what each sample is: {"kind": "clip" or "prompt", "caption", "seed", ...}.
        timesteps: in [0, 1000], as the model is told them, highest first.
        layers, heads: indices, ascending.
        grid: token grid (frames, height, width).
        num_heads: heads of a layer, chosen or not.
        head_dim: D.
        query_blocks: whole query blocks kept of each of `orders`, evenly spaced; None: all queries.
        block: queries of such a block.
        orders: token orders (None raster, else a tile) whose query blocks are kept whole.
        dtype: of queries, keys and values in the files.
        values: whether values are kept.
        attention: config of the method in the model while it was captured.
        probe: config of the method whose labels and errors are kept.
        probe_is_model: the probe is the model's own method with its own parameters; else a fresh
            one that was given the model's queries, keys and values.
        weights, weights_sha256: where the weights were, and their digest.
        seed: of the noise (clips) or of the samples (prompts), and of what a fresh probe draws.
        config: the resolved experiment.
    """

    samples: tuple[dict[str, Any], ...]
    timesteps: tuple[float, ...]
    layers: tuple[int, ...]
    heads: tuple[int, ...]
    grid: Grid
    num_heads: int
    head_dim: int
    query_blocks: int | None
    block: int
    orders: tuple[Grid | None, ...]
    dtype: str
    values: bool
    attention: dict[str, Any]
    probe: dict[str, Any]
    probe_is_model: bool
    weights: str
    weights_sha256: str
    seed: int
    config: dict[str, Any]

    @property
    def tokens(self) -> int:
        """N."""
        frames, height, width = self.grid
        return frames * height * width

    @property
    def moments(self) -> list[Moment]:
        """Every file of the capture, in order."""
        return [
            Moment(sample, timestep, layer)
            for sample in range(len(self.samples))
            for timestep in self.timesteps
            for layer in self.layers
        ]

    @property
    def digest(self) -> str:
        """SHA-256 of the plan: files of another plan are not mixed in."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    def file_bytes(self, rows: int) -> int:
        """Size of one file with `rows` query rows.

        Its header counts with 4 KiB of provenance, its labels at the probe's blocks or the plan's.
        """
        width = DTYPES[self.dtype].itemsize * self.head_dim
        per_head = (rows + self.tokens * (2 if self.values else 1)) * width
        block_q = int(self.probe.get("block_q", self.block))
        block_kv = int(self.probe.get("block_kv", self.block))
        labels = -(-self.tokens // block_q) * -(-self.tokens // block_kv)
        header = 4096 + len(json.dumps(asdict(self)))
        return len(self.heads) * (per_head + labels + 8) + 8 * rows + header


@dataclass(frozen=True)
class Moment:
    """Which attention call a file is of."""

    sample: int
    timestep: float
    layer: int

    @property
    def file(self) -> str:
        """Its name in the folder."""
        return f"sample{self.sample:03d}-t{self.timestep:08.3f}-layer{self.layer:03d}.safetensors"


@dataclass(frozen=True, eq=False)
class Captured:
    """One attention call; tokens in raster order.

    Attributes:
        moment: which.
        heads: indices of the H heads.
        grid: token grid.
        rows: int64 (R,): the query tokens that were kept, ascending.
        query: (H, R, D). key: (H, N, D). value: (H, N, D), or None where not kept.
        labels: int8 (H, T_m, T_n), the probe's block map in its own order and blocks; None where
            the method does not route.
        error_l1, error_l2: float32 (H,): ||O - O_exact|| / ||O_exact|| of the probe's output over
            the kept rows.
        exact_fraction: share of the scores that the probe computes exactly, over all heads.
    """

    moment: Moment
    heads: tuple[int, ...]
    grid: Grid
    rows: Tensor
    query: Tensor
    key: Tensor
    value: Tensor | None
    labels: Tensor | None
    error_l1: Tensor
    error_l2: Tensor
    exact_fraction: float

    @property
    def whole(self) -> bool:
        """Whether all queries were kept."""
        return len(self.rows) == self.key.shape[1]


def start_folder(
    folder: str | os.PathLike[str], plan: CapturePlan, provenance: Mapping[str, Any]
) -> list[Moment]:
    """Begin a capture, or go on with one of the same plan.

    Returns:
        What is still to be captured.

    Raises:
        CaptureError: the folder holds a capture of another plan, or other files.
        OSError: it cannot be written.
    """
    target = Path(folder)
    if (target / PLAN_FILE).is_file():
        found = _read_plan(target)[0]
        if found.digest != plan.digest:
            old, new = (json.loads(json.dumps(asdict(each))) for each in (found, plan))
            changed = [name for name in new if old[name] != new[name]]
            raise CaptureError(
                f"{target} holds another capture (it differs in {', '.join(changed)}); give "
                "another --out, or remove that folder"
            )
    elif target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CaptureError(
            f"{target} is not an empty folder and holds no {PLAN_FILE}; give another --out"
        )
    else:
        head = _header(plan, provenance)
        write_text(target / PLAN_FILE, json.dumps(head, indent=1) + "\n")
    return [moment for moment in plan.moments if not (target / moment.file).is_file()]


def write_captured(
    folder: str | os.PathLike[str],
    captured: Captured,
    plan: CapturePlan,
    provenance: Mapping[str, Any],
) -> int:
    """Write one file, whole or not at all; returns its size in bytes.

    Raises:
        OSError: it cannot be written.
    """
    tensors = {
        name: tensor.contiguous()
        for name in (*_REQUIRED, *_OPTIONAL)
        if (tensor := getattr(captured, name)) is not None
    }
    own = {**asdict(captured.moment), "exact_fraction": captured.exact_fraction}
    header = {**_header(plan, provenance), "file": own}
    path = Path(folder) / captured.moment.file
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata={_HEADER_KEY: json.dumps(header)})
    return path.stat().st_size


class Capture:
    """A finished capture, read file by file.

    Args:
        folder: what `python -m sla.capture` wrote.

    Attributes:
        folder, plan: the folder and its plan.
        provenance: how, when and on what it was made.

    Raises:
        FileNotFoundError: no such capture.
        CaptureError: not a capture, of a newer version, damaged, or not finished.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self.plan, self.provenance = _read_plan(self.folder)
        self.moments = self.plan.moments
        missing = [m.file for m in self.moments if not (self.folder / m.file).is_file()]
        if missing:
            raise CaptureError(
                f"{self.folder} lacks {len(missing)} of {len(self.moments)} files (the first: "
                f"{missing[0]}); go on with `{self.provenance.get('command', 'the same command')}`"
            )

    def read(self, moment: Moment, heads: Collection[int] | None = None) -> Captured:
        """One attention call.

        Args:
            moment: one of `moments`.
            heads: some of the plan's heads; None for all.

        Raises:
            ValueError: a head that was not captured.
            CaptureError: the file is damaged or of another capture.
        """
        chosen = self.plan.heads if heads is None else tuple(heads)
        unknown = sorted(set(chosen) - set(self.plan.heads))
        if unknown:
            raise ValueError(f"heads holds {unknown}; captured were {list(self.plan.heads)}")
        places = [self.plan.heads.index(head) for head in chosen]
        path = self.folder / moment.file
        try:
            with safe_open(path, framework="pt") as file:
                text = (file.metadata() or {}).get(_HEADER_KEY, "{}")
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            own = self._own(path, json.loads(text), tensors, moment)
        except (SafetensorError, json.JSONDecodeError) as error:
            raise CaptureError(
                f"{path} is not readable ({error}): damaged? Remove it and run the capture again"
            ) from error

        def of_heads(name: str) -> Tensor:
            return tensors[name][places]

        return Captured(
            moment=moment,
            heads=chosen,
            grid=self.plan.grid,
            rows=tensors["rows"],
            query=of_heads("query"),
            key=of_heads("key"),
            value=of_heads("value") if "value" in tensors else None,
            labels=of_heads("labels") if "labels" in tensors else None,
            error_l1=of_heads("error_l1"),
            error_l2=of_heads("error_l2"),
            exact_fraction=own["exact_fraction"],
        )

    def _own(
        self, path: Path, header: Mapping[str, Any], tensors: Mapping[str, Tensor], moment: Moment
    ) -> dict[str, Any]:
        """What the header says of the file alone, after everything was compared with the plan."""
        plan, heads = self.plan, len(self.plan.heads)
        if header.get("digest") != plan.digest:
            raise CaptureError(
                f"{path} is of another capture than {PLAN_FILE} beside it; remove the file and run "
                "the capture again"
            )
        own: dict[str, Any] = header["file"]
        rows = tensors["rows"].shape[0] if "rows" in tensors else 0
        wanted = {
            "query": (heads, rows, plan.head_dim),
            "key": (heads, plan.tokens, plan.head_dim),
            **dict.fromkeys(("error_l1", "error_l2"), (heads,)),
            **({"value": (heads, plan.tokens, plan.head_dim)} if plan.values else {}),
        }
        wrong = [
            f"{name} is {tuple(tensors[name].shape) if name in tensors else 'absent'}, not {shape}"
            for name, shape in wanted.items()
            if name not in tensors or tuple(tensors[name].shape) != shape
        ]
        if {key: own[key] for key in asdict(moment)} != asdict(moment):
            wrong.append("it is of another sample, timestep or layer than its name says")
        if not rows or wrong:
            raise CaptureError(f"{path} does not fit its plan: {'; '.join(wrong) or 'rows'}")
        return own


def _header(plan: CapturePlan, provenance: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "version": VERSION,
        "digest": plan.digest,
        "plan": asdict(plan),
        "provenance": dict(provenance),
    }


def _read_plan(folder: Path) -> tuple[CapturePlan, dict[str, Any]]:
    path = folder / PLAN_FILE
    if not path.is_file():
        raise FileNotFoundError(f"no {path}; make a capture: make capture")
    try:
        header = json.loads(path.read_text(encoding="utf-8"))
        if header["format"] != FORMAT or header["version"] > VERSION:
            raise CaptureError(
                f"{path} has format {header['format']!r} version {header['version']}; this code "
                f"reads {FORMAT!r} up to version {VERSION}"
            )
        values = header["plan"]
        for name in ("samples", "timesteps", "layers", "heads", "grid"):
            values[name] = tuple(values[name])
        values["orders"] = tuple(None if o is None else tuple(o) for o in values["orders"])
        plan = CapturePlan(**values)
        provenance = header["provenance"]
    except (OSError, KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CaptureError(f"{path} cannot be read: {error!r}") from error
    if plan.digest != header["digest"]:
        raise CaptureError(f"{path} was changed after the capture: its digest differs")
    return plan, provenance


__all__ = [
    "DTYPES",
    "Capture",
    "CaptureError",
    "CapturePlan",
    "Captured",
    "Moment",
    "start_folder",
    "write_captured",
]
