"""Files of diffusers' transformers that have our attention.

A folder holds what diffusers writes for the model (`config.json`, safetensors), which plain
diffusers loads without our methods, and beside it the methods:

    attention.safetensors   their parameters, by their names in the transformer's state dict
    attention.json          format and version, the method with all its numbers, the model's class
                            and sizes, and the checksum of the first file

A plain `from_pretrained` would drop parameters of processors without a word, hence files of our
own, strict both ways.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sla.attention import AttentionConfig, attention_config_from_dict
from sla.files import atomic_path, file_sha256, write_text
from sla.models.checkpoint import CheckpointError
from sla.models.injection import (
    adapter_of,
    apply_attention,
    attention_config,
    attention_modules,
    layer_sizes,
    original_processors,
    remove_attention,
    unwrap,
)

FORMAT = "sla-attention"
VERSION = 1
WEIGHTS_NAME = "attention.safetensors"
HEADER_NAME = "attention.json"
_INDEX_NAME = "diffusion_pytorch_model.safetensors.index.json"

Folder = str | os.PathLike[str]


@dataclass(frozen=True)
class AttentionHeader:
    """What `attention.json` says.

    Attributes:
        attention: the method, with all its numbers.
        model_class: class of the transformer.
        layers, heads, head_dim: of its self-attention.
        sha256: of `attention.safetensors`.
    """

    attention: AttentionConfig
    model_class: str
    layers: int
    heads: int
    head_dim: int
    sha256: str


def save_attention(transformer: nn.Module, folder: Folder) -> AttentionHeader:
    """Write a transformer's attention methods, each of the two files whole or not at all.

    Args:
        transformer: what `apply_attention` was given, possibly compiled.
        folder: gets `attention.safetensors` and `attention.json`; made if need be.

    Raises:
        ValueError: the transformer has none of our methods.
        OSError: a file cannot be written.
    """
    module = unwrap(transformer)
    config = _require_config(module)
    tensors = {name: t.detach().cpu().contiguous() for name, t in _own_state(module).items()}
    adapter = adapter_of(module)
    layers = adapter.attention_layers(module)
    heads, head_dim, _ = layer_sizes(layers[0])
    return write_attention(
        folder, config, tensors, _class_name(module), len(layers), heads, head_dim
    )


def write_attention(
    folder: Folder,
    config: AttentionConfig,
    tensors: dict[str, Tensor],
    model_class: str,
    layers: int,
    heads: int,
    head_dim: int,
) -> AttentionHeader:
    """Write the two files from their parts; see `save_attention` and `AttentionHeader`."""
    folder = Path(folder)
    # A method without parameters has an empty file.
    with atomic_path(folder / WEIGHTS_NAME) as path:
        save_file(tensors, path, metadata={"format": "pt"})
    checksum = file_sha256(folder / WEIGHTS_NAME)
    header = AttentionHeader(config, model_class, layers, heads, head_dim, checksum)
    values = {"format": FORMAT, "version": VERSION, **asdict(header)}
    write_text(folder / HEADER_NAME, json.dumps(values, indent=2) + "\n")
    return header


def read_attention(folder: Folder) -> tuple[AttentionHeader, dict[str, Tensor]]:
    """The two files of a folder, checked against each other.

    Raises:
        FileNotFoundError: one is not there.
        CheckpointError: not of this format, of a newer version, or not written together.
    """
    path, weights = Path(folder) / HEADER_NAME, Path(folder) / WEIGHTS_NAME
    for file in (path, weights):
        if not file.is_file():
            raise FileNotFoundError(
                f"no {file.name} in {folder}; save_attention writes {HEADER_NAME} and "
                f"{WEIGHTS_NAME}"
            )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values.pop("format") != FORMAT or (version := values.pop("version")) > VERSION:
            raise CheckpointError(
                f"{path} is not of format {FORMAT!r} up to version {VERSION}, which this code reads"
            )
        del version
        attention = attention_config_from_dict(values.pop("attention"))
        header = AttentionHeader(attention, **values)
    except CheckpointError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: bad header: {type(error).__name__}: {error}") from error
    found = file_sha256(weights)
    if found != header.sha256:
        raise CheckpointError(
            f"{weights} has SHA-256 {found}, but {HEADER_NAME} was written for {header.sha256}: "
            "damaged, or from another save"
        )
    try:
        return header, load_file(weights)
    except SafetensorError as error:
        raise CheckpointError(f"{weights} is not a safetensors file ({error})") from error


def load_attention(transformer: nn.Module, folder: Folder) -> nn.Module:
    """Load what `save_attention` wrote. Either everything fits or nothing is changed.

    A transformer without our methods gets the saved one. One that has it already keeps its numbers
    (another critical fraction, say) and gets the parameters alone.

    Args:
        transformer: of the class and sizes it was saved from, base weights loaded.
        folder: with the two files.

    Returns:
        The transformer.

    Raises:
        FileNotFoundError, CheckpointError: as `read_attention`; and where the model is of another
            class or size, has another method, or a key is unknown, missing or of another shape:
            names both sides and lists all keys.
        TypeError, ValueError: as `apply_attention`.
    """
    header, tensors = read_attention(folder)
    module = unwrap(transformer)
    layers = adapter_of(module).attention_layers(module)
    heads, head_dim, _ = layer_sizes(layers[0])
    ours = (_class_name(module), len(layers), heads, head_dim)
    theirs = (header.model_class, header.layers, header.heads, header.head_dim)
    if ours != theirs:
        shown = "{} with {} layers of {} heads of {}"
        raise CheckpointError(
            f"{folder} holds attention of a {shown.format(*theirs)}; "
            f"the model is a {shown.format(*ours)}"
        )
    present = attention_config(module)
    if present is not None and present.name != header.attention.name:
        raise CheckpointError(
            f"{folder} holds attention {header.attention.name!r}, the model has {present.name!r}; "
            "remove_attention it first, or load a checkpoint of that method"
        )
    if present is None:
        apply_attention(module, header.attention)
    try:
        _fill(_own_state(module), tensors, f"{folder}: {WEIGHTS_NAME}")
    except CheckpointError:
        if present is None:
            remove_attention(module, discard=True)
        raise
    return transformer


def save_model(transformer: nn.Module, folder: Folder, **options: Any) -> None:
    """Write a transformer: base weights as diffusers does, and our methods beside them.

    `transformer.save_pretrained` does the same once `apply_attention` has been there, and so does
    the `save_pretrained` of a pipeline.

    Args:
        transformer: a model of diffusers, possibly compiled, with our methods or without.
        folder: folder of the model; a pipeline's is `FOLDER/transformer`.
        options: of diffusers' `ModelMixin.save_pretrained`, such as `max_shard_size`.

    Raises:
        OSError: a file cannot be written.
    """
    module: Any = unwrap(transformer)
    is_main = options.get("is_main_process", True)
    with_methods = attention_config(module) is not None
    if with_methods and is_main:
        save_attention(module, folder)
    if is_main:
        # Of an earlier save: methods, and the index of shards, which diffusers leaves lying and
        # then believes.
        stale = [_INDEX_NAME] if with_methods else [_INDEX_NAME, HEADER_NAME, WEIGHTS_NAME]
        for name in stale if options.get("variant") is None else stale[1:]:
            (Path(folder) / name).unlink(missing_ok=True)
    with original_processors(module):
        type(module).save_pretrained(module, folder, **options)


def save_pretrained(
    transformer: nn.Module,
    save_directory: Folder,
    is_main_process: bool = True,
    save_function: Callable[..., Any] | None = None,
    safe_serialization: bool = True,
    variant: str | None = None,
    max_shard_size: int | str = "10GB",
    push_to_hub: bool = False,
    **kwargs: Any,
) -> None:
    """`save_model` with the signature of diffusers' method, which pipelines look at."""
    save_model(
        transformer,
        save_directory,
        is_main_process=is_main_process,
        save_function=save_function,
        safe_serialization=safe_serialization,
        variant=variant,
        max_shard_size=max_shard_size,
        push_to_hub=push_to_hub,
        **kwargs,
    )


def load_model(
    source: Folder,
    *,
    revision: str | None = None,
    subfolder: str = "transformer",
    attention: AttentionConfig | Folder | None = None,
    dtype: torch.dtype | None = None,
) -> Any:
    """Load a transformer of diffusers, strictly, with our attention if it has some.

    Args:
        source: hub id (`Wan-AI/Wan2.1-T2V-1.3B-Diffusers`) or local folder.
        revision: branch, tag or commit on the hub; name a commit to be reproducible.
        subfolder: where in the source the transformer lies; a local folder may also be the
            transformer's own.
        attention: None for the methods that lie beside the weights, if any; a config to apply (its
            numbers hold, and parameters of that method beside the weights are loaded); or a folder
            that `save_attention` wrote.
        dtype: of the weights, as in diffusers (which keeps some parts of some models in float32);
            None keeps the file's.

    Returns:
        The model, in evaluation mode, on the CPU.

    Raises:
        FileNotFoundError: files are not there and could not be had; says what to fetch and where
            to put it.
        CheckpointError: weights that are missing, unknown or of another shape; an unknown class;
            attention that does not fit (see `load_attention`).
        TypeError, ValueError: as `apply_attention`.
    """
    folder = local_folder(source, revision, subfolder)
    model = _load_base(folder, dtype)
    if isinstance(attention, AttentionConfig):
        apply_attention(model, attention)
        if (folder / HEADER_NAME).is_file():
            load_attention(model, folder)
    elif attention is not None:
        load_attention(model, attention)
    elif (folder / HEADER_NAME).is_file() or (folder / WEIGHTS_NAME).is_file():
        load_attention(model, folder)
    return model


def _load_base(folder: Path, dtype: torch.dtype | None) -> Any:
    import diffusers

    try:
        name = json.loads((folder / "config.json").read_text(encoding="utf-8"))["_class_name"]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{folder / 'config.json'} is not a config of a diffusers model ({error!r})"
        ) from error
    model_class = getattr(diffusers, str(name), None)
    if model_class is None:
        raise CheckpointError(
            f"{folder / 'config.json'} names a {name}, which diffusers "
            f"{diffusers.__version__} does not have"
        )
    try:
        model, report = model_class.from_pretrained(
            folder,
            torch_dtype=dtype or _stored_dtype(folder),
            output_loading_info=True,
            local_files_only=True,
        )
    except OSError as error:
        raise FileNotFoundError(
            f"{folder} holds no complete weights: {_first_line(error)}"
        ) from error
    except (SafetensorError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{folder} does not fit a {name}: {error}") from error
    # diffusers fills what is missing with random numbers, drops what it does not know, and warns.
    lines = []
    for title, keys in (
        ("missing in the files", report["missing_keys"]),
        ("unknown to the model", report["unexpected_keys"]),
        ("of another shape", report["mismatched_keys"]),
    ):
        if keys:
            lines += [f"{len(keys)} {title}:", *(f"  {key}" for key in sorted(map(str, keys)))]
    if lines:
        raise CheckpointError("\n".join([f"{folder} does not fit a {name}.", *lines]))
    return model


def _stored_dtype(folder: Path) -> torch.dtype | None:
    """The dtype that most numbers in the folder's safetensors have, or None without such files."""
    from safetensors import safe_open

    counts: dict[torch.dtype, int] = {}
    for path in sorted(folder.glob("*.safetensors")):
        if path.name == WEIGHTS_NAME:
            continue
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118
                part = file.get_slice(key)
                dtype = _DTYPES.get(part.get_dtype())
                if dtype is not None:
                    numbers = 1
                    for size in part.get_shape():
                        numbers *= size
                    counts[dtype] = counts.get(dtype, 0) + numbers
    return max(counts, key=lambda dtype: counts[dtype]) if counts else None


_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def local_folder(source: Folder, revision: str | None, subfolder: str) -> Path:
    """The local folder of the transformer's files, from the hub if need be.

    Args:
        source: hub id or local folder.
        revision: branch, tag or commit on the hub.
        subfolder: where in the source the transformer lies; a local folder may also be its own.

    Raises:
        FileNotFoundError: as `load_model`.
    """
    name = os.fspath(source)
    path = Path(name)
    wanted = f"{subfolder}/" if subfolder else ""
    if path.is_dir():
        for folder in (path / subfolder, path):
            if (folder / "config.json").is_file():
                return folder
        raise FileNotFoundError(
            f"no transformer in {name}: the folder must hold {wanted}config.json and "
            f"{wanted}*.safetensors, as diffusers' save_pretrained writes them"
        )
    # A hub id is `owner/name`.
    if path.is_absolute() or name.startswith(".") or name.count("/") != 1:
        raise FileNotFoundError(f"no folder {name} (and it is no hub id, which is OWNER/NAME)")
    from huggingface_hub import snapshot_download

    reason = f"it has no {wanted}config.json"
    try:
        folder = Path(
            snapshot_download(
                name,
                revision=revision,
                allow_patterns=[f"{wanted}*.json", f"{wanted}*.safetensors"],
            )
        )
    except Exception as error:  # of the hub's client, of its HTTP library, of the network
        reason = _first_line(error)
        cause: Exception | None = error
    else:
        if (folder / subfolder / "config.json").is_file():
            return folder / subfolder
        cause = None
    at = f" --revision {revision}" if revision else ""
    include = f' --include "{wanted}*"' if subfolder else ""
    raise FileNotFoundError(
        f"cannot get {wanted or 'the files'} of {name} (revision {revision or 'main'}) from the "
        f"hub: {reason}. Where there is a network, fetch it with "
        f"`hf download {name}{at}{include} --local-dir FOLDER` (after `hf auth login` if the "
        "repository is gated or private) and give FOLDER as the source: it must hold "
        f"{wanted}config.json and {wanted}*.safetensors"
    ) from cause


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].rstrip('.')}" if lines else type(error).__name__


def _require_config(module: nn.Module) -> AttentionConfig:
    config = attention_config(module)
    if config is None:
        raise ValueError(
            f"the {type(module).__name__} has none of our attention methods; apply_attention first"
        )
    return config


def _class_name(module: nn.Module) -> str:
    """Name of the model's class in diffusers: sharding puts a subclass before it."""
    config: Any = module.config
    name: str = config.get("_class_name") or type(module).__name__
    return name


def _own_state(module: nn.Module) -> dict[str, Tensor]:
    """The methods' part of the transformer's state dict; shares memory with it."""
    methods = set(attention_modules(module))
    prefixes = [name for name, part in module.named_modules() if part in methods]
    return {
        f"{prefix}.{name}": tensor
        for prefix in prefixes
        for name, tensor in module.get_submodule(prefix).state_dict().items()
    }


def _fill(expected: dict[str, Tensor], tensors: dict[str, Tensor], source: str) -> None:
    lines = key_differences(expected, tensors)
    if lines:
        raise CheckpointError("\n".join([f"{source} does not fit the model.", *lines]))
    with torch.no_grad():
        for name, tensor in tensors.items():
            expected[name].copy_(tensor)


def key_differences(expected: dict[str, Tensor], tensors: dict[str, Tensor]) -> list[str]:
    """Where two state dicts differ in keys and shapes: lines for an error, none if nowhere."""
    misshaped = [
        f"{name}: {tuple(tensors[name].shape)} in the file, {tuple(tensor.shape)} in the model"
        for name, tensor in expected.items()
        if name in tensors and tensors[name].shape != tensor.shape
    ]
    lines: list[str] = []
    for title, names in (
        ("missing in the file", [name for name in expected if name not in tensors]),
        ("unknown to the model", [name for name in tensors if name not in expected]),
        ("of another shape", misshaped),
    ):
        if names:
            lines += [f"{len(names)} {title}:", *(f"  {name}" for name in names)]
    return lines


__all__ = [
    "AttentionHeader",
    "load_attention",
    "load_model",
    "local_folder",
    "read_attention",
    "save_attention",
    "save_model",
    "save_pretrained",
]
