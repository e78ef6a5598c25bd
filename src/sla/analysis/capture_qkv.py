"""Captures what the attention methods of a model are given: queries, keys and values.

For work on attention apart from its model, such as SLA2's stage 1 (`sla.training.router`). A file
of samples is safetensors with a JSON header, strict both ways.

Shape letters: H heads, N tokens, D head_dim of one sample.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from sla.attention import AttentionContext, AttentionMethod

FORMAT = "sla-captured-qkv"
VERSION = 1
_HEADER_KEY = "sla"
_PARTS = ("query", "key", "value")
# Of a sample's description, beside what its tensors say.
_FIELDS = ("layer", "timestep", "grid", "tile", "always_critical")

Grid = tuple[int, int, int]


class CaptureError(ValueError):
    """Captured samples that cannot be kept, written or read; the message says why."""


@dataclass(frozen=True, eq=False)
class QKVSample:
    """What one layer's attention was given for one sample.

    Attributes:
        layer: index of the layer.
        timestep: diffusion timestep in [0, 1000], or None where the model has none.
        query, key, value: (H, N, D), on the CPU, after normalisation and rotary embedding.
        grid, tile, always_critical: as in `AttentionContext`.
    """

    layer: int
    timestep: float | None
    query: Tensor
    key: Tensor
    value: Tensor
    grid: Grid | None = None
    tile: Grid | None = None
    always_critical: int = 0

    @property
    def num_bytes(self) -> int:
        """Size of the three tensors."""
        return sum(t.numel() * t.element_size() for t in (self.query, self.key, self.value))

    def context(self, device: torch.device | str = "cpu") -> AttentionContext:
        """The context to attend in, for a batch of this one sample; without hidden states."""
        timestep = None if self.timestep is None else torch.tensor([self.timestep], device=device)
        return AttentionContext(
            grid=self.grid,
            timestep=timestep,
            tile=self.tile,
            always_critical=self.always_critical,
        )


@contextmanager
def capture_qkv(
    model: nn.Module,
    *,
    per_layer: int,
    layers: Collection[int] | None = None,
    max_bytes: int = 4 * 2**30,
) -> Iterator[list[QKVSample]]:
    """Keep the queries, keys and values of every attention call inside the block.

    Samples are copied to the CPU in their own dtype; the model computes what it computes anyway.

    Args:
        model: a model whose self-attention layers are `AttentionMethod`s.
        per_layer: samples to keep of each layer: the first so many.
        layers: indices of the layers to capture; None for all.
        max_bytes: the most that all kept samples may take.

    Yields:
        A list that grows by a sample per layer and sample of a batch, in the order of the calls.

    Raises:
        ValueError: the model holds no attention method, or none of some layer; or a number out of
            range.
        CaptureError: from the model's forward: the next sample would exceed `max_bytes`.
    """
    if per_layer < 1:
        raise ValueError(f"per_layer is {per_layer}; it must be at least 1")
    methods = [module for module in model.modules() if isinstance(module, AttentionMethod)]
    if not methods:
        raise ValueError(f"{type(model).__name__} holds no attention method to capture from")
    known = {method.layer_index for method in methods}
    unknown = sorted(set(layers or ()) - known)
    if unknown:
        raise ValueError(f"layers holds {unknown}; the model has layers {sorted(known)}")

    captured: list[QKVSample] = []
    counts: dict[int, int] = {}
    size = 0

    def hook(module: nn.Module, args: tuple[Tensor, Tensor, Tensor, AttentionContext]) -> None:
        nonlocal size
        assert isinstance(module, AttentionMethod)
        query, key, value, context = args
        layer = module.layer_index
        for index in range(min(len(query), per_layer - counts.get(layer, 0))):
            tensors = [tensor[index].detach() for tensor in (query, key, value)]
            size += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
            if size > max_bytes:
                raise CaptureError(
                    f"sample {len(captured) + 1} makes the captured ones {size / 2**30:.2f} GiB, "
                    f"more than max_bytes = {max_bytes / 2**30:.2f} GiB; capture fewer samples of "
                    "each layer, or some layers at a time"
                )
            timestep = None if context.timestep is None else float(context.timestep[index])
            # A copy: the model may go on to write to what it passed, and a view holds the batch.
            kept_query, kept_key, kept_value = (
                tensor.to("cpu", copy=True, memory_format=torch.contiguous_format)
                for tensor in tensors
            )
            sample = QKVSample(
                layer,
                timestep,
                kept_query,
                kept_key,
                kept_value,
                grid=context.grid,
                tile=context.tile,
                always_critical=context.always_critical,
            )
            captured.append(sample)
            counts[layer] = counts.get(layer, 0) + 1

    handles = [
        method.register_forward_pre_hook(hook)
        for method in methods
        if layers is None or method.layer_index in layers
    ]
    try:
        yield captured
    finally:
        for handle in handles:
            handle.remove()


def save_qkv(path: str | os.PathLike[str], samples: Sequence[QKVSample]) -> None:
    """Write samples to a `.safetensors` file, whole or not at all; its folder is made.

    Raises:
        CaptureError: no samples.
        OSError: the file cannot be written.
    """
    if not samples:
        raise CaptureError("no samples to write; capture some first")
    target = Path(path)
    tensors = {
        _key(index, part): getattr(sample, part).contiguous()
        for index, sample in enumerate(samples)
        for part in _PARTS
    }
    header = {
        "format": FORMAT,
        "version": VERSION,
        "samples": [{name: getattr(sample, name) for name in _FIELDS} for sample in samples],
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        save_file(tensors, temporary, metadata={_HEADER_KEY: json.dumps(header)})
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def load_qkv(
    path: str | os.PathLike[str], *, layers: Collection[int] | None = None
) -> list[QKVSample]:
    """Read samples that `save_qkv` wrote.

    Args:
        path: the file.
        layers: read the samples of these layers only; None for all.

    Raises:
        FileNotFoundError: no such file.
        CaptureError: not such a file, damaged, of a newer version, or header and tensors do not
            belong together.
    """
    source = Path(path)
    if not source.is_file():
        raise FileNotFoundError(f"no file of captured samples {source}")
    try:
        with safe_open(source, framework="pt") as file:
            described = _parse(source, (file.metadata() or {}).get(_HEADER_KEY))
            wanted = {_key(i, part) for i in range(len(described)) for part in _PARTS}
            found = set(file.keys())
            if found != wanted:
                wrong = sorted(found ^ wanted)
                raise CaptureError(
                    f"{source} describes {len(described)} samples; tensors missing or unknown: "
                    f"{', '.join(wrong[:6])}{' ...' if len(wrong) > 6 else ''}"
                )
            samples = []
            for index, values in enumerate(described):
                if layers is not None and values["layer"] not in layers:
                    continue
                tensors = [file.get_tensor(_key(index, part)) for part in _PARTS]
                shapes = {tuple(tensor.shape) for tensor in tensors}
                if len(shapes) != 1 or tensors[0].ndim != 3:
                    raise CaptureError(
                        f"{source}: sample {index} has shapes {sorted(shapes)}; its query, key "
                        "and value must be (H, N, D) each"
                    )
                samples.append(_sample(values, tensors))
    except SafetensorError as error:
        raise CaptureError(
            f"{source} is not a readable safetensors file ({error}): damaged or cut short?"
        ) from error
    return samples


def _key(index: int, part: str) -> str:
    return f"{index:05d}.{part}"


def _parse(source: Path, text: str | None) -> list[dict[str, Any]]:
    if text is None:
        raise CaptureError(
            f"{source} has no {_HEADER_KEY!r} header: it was not written by save_qkv"
        )
    try:
        header = json.loads(text)
        known = header["format"] == FORMAT and header["version"] <= VERSION
        if not known:
            raise CaptureError(
                f"{source} has format {header['format']!r} version {header['version']}; this code "
                f"reads {FORMAT!r} up to version {VERSION}"
            )
        described = header["samples"]
        if any(set(values) != set(_FIELDS) for values in described):
            raise CaptureError(f"{source}: each sample must be described by {', '.join(_FIELDS)}")
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise CaptureError(f"{source} has a header that cannot be read: {error!r}") from error
    assert isinstance(described, list)
    return described


def _sample(values: dict[str, Any], tensors: Sequence[Tensor]) -> QKVSample:
    def grid(name: str) -> Grid | None:
        if values[name] is None:
            return None
        frames, height, width = values[name]
        return frames, height, width

    query, key, value = tensors
    return QKVSample(
        layer=values["layer"],
        timestep=values["timestep"],
        query=query,
        key=key,
        value=value,
        grid=grid("grid"),
        tile=grid("tile"),
        always_critical=values["always_critical"],
    )
