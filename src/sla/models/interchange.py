"""The public SLA checkpoints of TurboDiffusion, to our files and back.

Theirs is one state dict: Wan's original names, and SLA's projection inside self-attention. Ours is
a folder (`sla.models.pretrained`): diffusers' names, and the methods beside them.

    theirs                                            ours
    blocks.N.self_attn.q.weight                       blocks.N.attn1.to_q.weight
    blocks.N.cross_attn.o.bias                        blocks.N.attn2.to_out.0.bias
    blocks.N.norm3.weight                             blocks.N.norm2.weight
    blocks.N.modulation                               blocks.N.scale_shift_table
    blocks.N.self_attn.attn_op.local_attn.proj_l.*    blocks.N.attn1.processor.method.proj_l.*
    ... all of them: `key_table`

Only names change, and the shape of `patch_embedding.weight`: a linear layer's there (as in their
code) or a convolution's (as in Wan's), a convolution's here. Dtypes stay. Their text-to-video
models and Wan2.2's image-to-video ones (without image cross-attention) fit; quantised files and
those with image cross-attention have keys that are not in the table, and are refused by name.

Their linear branch runs over all keys and their query blocks have 128 tokens, so the method is
`SLAConfig(linear_scope="all", block_q=128)`.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sla.attention import SLAConfig
from sla.files import atomic_path
from sla.models.checkpoint import CheckpointError
from sla.models.pretrained import key_differences, read_attention, write_attention

_MODEL_CLASS = "WanTransformer3DModel"
_PATCH = (1, 2, 2)  # of every Wan; a linear patch embedding does not say
_PREFIX = "net."  # of their training checkpoints

# Layers with weight and bias, outside blocks and in each block.
_OUTSIDE = {
    "patch_embedding": "patch_embedding",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "head.head": "proj_out",
}
_IN_BLOCKS = {
    **{
        f"{theirs}.{letter}": f"{ours}.{layer}"
        for theirs, ours in (("self_attn", "attn1"), ("cross_attn", "attn2"))
        for letter, layer in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("o", "to_out.0"))
    },
    "norm3": "norm2",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
}
# What has a weight alone, and parameters by themselves.
_OTHERS_OUTSIDE = {"head.modulation": "scale_shift_table"}
_OTHERS_IN_BLOCKS = {
    "self_attn.norm_q.weight": "attn1.norm_q.weight",
    "self_attn.norm_k.weight": "attn1.norm_k.weight",
    "cross_attn.norm_q.weight": "attn2.norm_q.weight",
    "cross_attn.norm_k.weight": "attn2.norm_k.weight",
    "modulation": "scale_shift_table",
}
_PROJECTION = {"self_attn.attn_op.local_attn.proj_l": "attn1.processor.method.proj_l"}


@dataclass(frozen=True)
class Converted:
    """A checkpoint of theirs in our terms.

    Attributes:
        config: of diffusers' `WanTransformer3DModel`.
        base: its state dict.
        attention: parameters of the methods, by their names in the transformer.
        method: the methods' config.
    """

    config: dict[str, Any]
    base: dict[str, Tensor]
    attention: dict[str, Tensor]
    method: SLAConfig


def turbodiffusion_config(critical: float = 0.10) -> SLAConfig:
    """The method of their checkpoints.

    Args:
        critical: their top-k ratio, 0.10 in their commands (0.15 recommended for quality).
    """
    return SLAConfig(critical=critical, negligible=0.0, block_q=128, linear_scope="all")


def key_table(layers: int) -> dict[str, str]:
    """Every key of theirs, and the same tensor's key in a transformer with our processors."""
    table = dict(_both(_OUTSIDE)) | _OTHERS_OUTSIDE
    for index in range(layers):
        in_block = dict(_both(_IN_BLOCKS)) | _OTHERS_IN_BLOCKS | dict(_both(_PROJECTION))
        table |= {f"blocks.{index}.{k}": f"blocks.{index}.{v}" for k, v in in_block.items()}
    return table


def _both(layers: Mapping[str, str]) -> Iterable[tuple[str, str]]:
    return (
        (f"{theirs}.{part}", f"{ours}.{part}")
        for theirs, ours in layers.items()
        for part in ("weight", "bias")
    )


def from_turbodiffusion(state: Mapping[str, Tensor], *, critical: float = 0.10) -> Converted:
    """Their state dict in our terms. Tensors are shared, not copied.

    Args:
        state: theirs, with or without the prefix `net.`.
        critical: see `turbodiffusion_config`.

    Raises:
        CheckpointError: keys that are unknown or missing, or shapes that no such Wan has (lists
            them all); or `critical` out of range.
    """
    if not 0.0 < critical <= 1.0:
        raise CheckpointError(f"critical is {critical}; it must be in (0, 1]")
    if state and all(key.startswith(_PREFIX) for key in state):
        state = {key.removeprefix(_PREFIX): tensor for key, tensor in state.items()}
    blocks = [int(m[1]) for key in state if (m := re.match(r"blocks\.(\d+)\.", key))]
    layers = max(blocks, default=-1) + 1
    if layers == 0:
        raise CheckpointError(
            f"no key of the form blocks.N.*: not a Wan checkpoint in its original names "
            f"(its keys begin with {', '.join(sorted(state)[:3]) or 'nothing'})"
        )
    table = key_table(layers)
    _check_keys(set(table), set(state), "a TurboDiffusion SLA checkpoint")
    config = _config_of(state, layers)
    renamed = {table[key]: tensor for key, tensor in state.items()}
    embedding = "patch_embedding.weight"
    if renamed[embedding].ndim == 2:
        renamed[embedding] = renamed[embedding].unflatten(1, (config["in_channels"], *_PATCH))
    own = {table[key] for key in table if "proj_l" in key}
    converted = Converted(
        config,
        {key: tensor for key, tensor in renamed.items() if key not in own},
        {key: tensor for key, tensor in renamed.items() if key in own},
        turbodiffusion_config(critical),
    )
    _check_shapes(converted)
    return converted


def to_turbodiffusion(
    base: Mapping[str, Tensor], attention: Mapping[str, Tensor], *, linear_patches: bool = True
) -> dict[str, Tensor]:
    """The inverse: their state dict. Tensors are shared, not copied.

    Args:
        base: state dict of diffusers' transformer, without our processors.
        attention: parameters of the methods, by their names in the transformer.
        linear_patches: give `patch_embedding.weight` a linear layer's shape, as their code has it.

    Raises:
        CheckpointError: keys that are unknown or missing; lists them all.
    """
    state = {**base, **attention}
    blocks = [int(m[1]) for key in state if (m := re.match(r"blocks\.(\d+)\.", key))]
    table = {ours: theirs for theirs, ours in key_table(max(blocks, default=-1) + 1).items()}
    _check_keys(set(table), set(state), "a Wan transformer of diffusers with SLA")
    renamed = {table[key]: tensor for key, tensor in state.items()}
    if linear_patches:
        renamed["patch_embedding.weight"] = renamed["patch_embedding.weight"].flatten(1)
    return renamed


def convert_checkpoint(
    source: str | os.PathLike[str], target: str | os.PathLike[str], *, critical: float = 0.10
) -> list[Path]:
    """Convert a file of theirs to a folder of ours, or a folder of ours to a file of theirs.

    Args:
        source: `.safetensors` or `.pth` file of theirs; or folder that `save_model` wrote.
        target: folder to write; or `.safetensors` or `.pth` file.
        critical: see `turbodiffusion_config`; only for files of theirs.

    Returns:
        The files written.

    Raises:
        FileNotFoundError: no source, or a folder without all its files.
        CheckpointError: as the functions above; the folder's method is not theirs; or a file name
            with another ending.
        OSError: a file cannot be written.
    """
    source, target = Path(source), Path(target)
    if source.is_dir():
        return _export(source, target)
    if not source.exists():
        raise FileNotFoundError(f"no file or folder {source}")
    _check_ending("IN", source)
    if target.suffix in _ENDINGS or target.is_file():
        raise CheckpointError(
            f"OUT is {target}; for a file of TurboDiffusion's it must be a folder"
        )
    converted = from_turbodiffusion(_read(source), critical=critical)
    return _write_folder(converted, target)


_ENDINGS = (".safetensors", ".pth", ".pt")


def _check_ending(name: str, path: Path) -> None:
    if path.suffix not in _ENDINGS:
        raise CheckpointError(f"{name} is {path}; a file must end in {', '.join(_ENDINGS)}")


def _read(path: Path) -> dict[str, Tensor]:
    """A state dict from a file."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (SafetensorError, RuntimeError, EOFError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}): damaged or cut short?") from error
    except Exception as error:  # pickle's
        raise CheckpointError(f"{path} holds more than tensors ({error})") from error
    if isinstance(found, dict) and isinstance(found.get("state_dict"), dict):
        found = found["state_dict"]
    if not isinstance(found, dict) or not all(isinstance(t, Tensor) for t in found.values()):
        raise CheckpointError(f"{path} is no state dict: names and tensors")
    return dict(found)


def _write_folder(converted: Converted, folder: Path) -> list[Path]:
    from diffusers import WanTransformer3DModel

    with torch.device("meta"):
        model: Any = WanTransformer3DModel(**converted.config)
    model.load_state_dict(converted.base, strict=True, assign=True)
    config = converted.config
    tensors = {key: tensor.contiguous() for key, tensor in converted.attention.items()}
    write_attention(
        folder,
        converted.method,
        tensors,
        _MODEL_CLASS,
        config["num_layers"],
        config["num_attention_heads"],
        config["attention_head_dim"],
    )
    model.save_pretrained(folder)
    return sorted(path for path in folder.iterdir() if path.is_file())


def _export(folder: Path, target: Path) -> list[Path]:
    _check_ending("OUT", target)
    header, attention = read_attention(folder)
    method = header.attention
    if header.model_class != _MODEL_CLASS or not isinstance(method, SLAConfig):
        raise CheckpointError(
            f"{folder} holds attention {method.name!r} of a {header.model_class}; "
            f"TurboDiffusion's files hold 'sla' of a {_MODEL_CLASS}"
        )
    if method.linear_scope != "all":
        raise CheckpointError(
            f"{folder}: attention.linear_scope is {method.linear_scope!r}; TurboDiffusion's linear "
            "branch runs over all keys, so its code would compute something else with these weights"
        )
    shards = sorted(folder.glob("diffusion_pytorch_model*.safetensors"))
    if not shards:
        raise FileNotFoundError(f"no diffusion_pytorch_model*.safetensors in {folder}")
    base: dict[str, Tensor] = {}
    for shard in shards:
        base |= _read(shard)
    state = {key: t.contiguous() for key, t in to_turbodiffusion(base, attention).items()}
    with atomic_path(target) as path:
        if target.suffix == ".safetensors":
            save_file(state, path, metadata={"format": "pt"})
        else:
            torch.save(state, path)
    return [target]


def _config_of(state: Mapping[str, Tensor], layers: int) -> dict[str, Any]:
    """diffusers' config, read from shapes."""
    from sla.models.wan import WAN_CONFIGS

    embedding, head = state["patch_embedding.weight"], state["head.head.weight"]
    projection = state["blocks.0.self_attn.attn_op.local_attn.proj_l.weight"]
    pixels = math.prod(_PATCH)
    dim, head_dim = embedding.shape[0], projection.shape[-1]
    linear = embedding.ndim == 2
    channels = embedding.shape[1] // (pixels if linear else 1)
    fits = linear or tuple(embedding.shape[2:]) == _PATCH
    if not fits or dim % head_dim or (linear and embedding.shape[1] % pixels):
        raise CheckpointError(
            f"patch_embedding.weight has shape {tuple(embedding.shape)} and proj_l.weight "
            f"{tuple(projection.shape)}; they must be (dim, channels x {pixels}) or "
            f"(dim, channels, {', '.join(map(str, _PATCH))}), and (head_dim, head_dim), "
            "dim a multiple of head_dim"
        )
    return {
        **WAN_CONFIGS["1.3b"],
        "num_attention_heads": dim // head_dim,
        "attention_head_dim": head_dim,
        "in_channels": channels,
        "out_channels": head.shape[0] // pixels,
        "text_dim": state["text_embedding.0.weight"].shape[-1],
        "freq_dim": state["time_embedding.0.weight"].shape[-1],
        "ffn_dim": state["blocks.0.ffn.0.weight"].shape[0],
        "num_layers": layers,
    }


def _check_shapes(converted: Converted) -> None:
    from diffusers import WanTransformer3DModel

    with torch.device("meta"):
        model: Any = WanTransformer3DModel(**converted.config)
        expected = dict(model.state_dict())
        head_dim = converted.config["attention_head_dim"]
        for key in converted.attention:
            shape = (head_dim, head_dim) if key.endswith("weight") else (head_dim,)
            expected[key] = torch.empty(shape)
    lines = key_differences(expected, {**converted.base, **converted.attention})
    if lines:
        config = json.dumps({**converted.config, "patch_size": list(_PATCH)})
        raise CheckpointError(
            "\n".join([f"the tensors are not those of a Wan of {config}", *lines])
        )


def _check_keys(expected: set[str], found: set[str], what: str) -> None:
    lines: list[str] = []
    for title, keys in (("missing", expected - found), ("unknown", found - expected)):
        if keys:
            lines += [f"{len(keys)} {title}:", *(f"  {key}" for key in sorted(keys, key=_natural))]
    if lines:
        raise CheckpointError("\n".join([f"the keys are not those of {what}.", *lines]))


def _natural(key: str) -> list[tuple[int, str]]:
    """Block 2 before block 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in key.split(".")]


__all__ = [
    "Converted",
    "convert_checkpoint",
    "from_turbodiffusion",
    "key_table",
    "to_turbodiffusion",
    "turbodiffusion_config",
]
