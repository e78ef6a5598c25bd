"""Our model files: safetensors with a JSON header, strict both ways.

A file holds the `VideoDiT` (keys `model.*`), the text encoder trained with it (`text_encoder.*`)
and, in the safetensors metadata, what is needed to build them. So one atomic write replaces
everything. A copy of the header lies beside it as JSON for people; nothing reads it.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from sla.attention import AttentionConfig, AttentionMethod, attention_config_from_dict
from sla.models.dit import DiTConfig, VideoDiT
from sla.models.text import TrainedTextEncoder, TrainedTextEncoderConfig

FORMAT = "sla-video-dit"
VERSION = 2
DEFAULT_NAME = "model.safetensors"
_HEADER_KEY = "sla"


class CheckpointError(ValueError):
    """A model file that cannot be used as asked; the message lists everything that is wrong."""


@dataclass(frozen=True)
class SavedModel:
    """What `save_model` wrote.

    Attributes:
        path: the safetensors file.
        header_path: the copy of the header.
        num_bytes: size of the safetensors file.
        num_parameters: numbers in it.
    """

    path: Path
    header_path: Path
    num_bytes: int
    num_parameters: int


@dataclass(frozen=True)
class ModelHeader:
    """What a file says about itself.

    Attributes:
        model: sizes of the network.
        text: sizes of the text encoder, or None when the file holds none.
        attention: the method it was saved with.
        dtype: dtype of the stored weights; a method's own parameters keep theirs.
        metadata: what the caller of `save_model` added.
    """

    model: DiTConfig
    text: TrainedTextEncoderConfig | None
    attention: AttentionConfig
    dtype: str
    metadata: dict[str, Any]


@dataclass(frozen=True)
class LoadReport:
    """What `load_weights` did.

    Attributes:
        header: the file's header.
        initialised: parameters of the attention method that the file does not have; they keep
            their initial values. Empty unless `new_attention` allowed it.
    """

    header: ModelHeader
    initialised: list[str]


@dataclass(frozen=True)
class LoadedModel:
    """What `load_model` built; fields as in `LoadReport`."""

    model: VideoDiT
    text_encoder: TrainedTextEncoder | None
    header: ModelHeader
    initialised: list[str]


def save_model(
    path: str | os.PathLike[str],
    model: nn.Module,
    text_encoder: nn.Module | None = None,
    *,
    metadata: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
) -> SavedModel:
    """Write a model file, whole or not at all.

    Args:
        path: a `.safetensors` file, or a folder, which gets `model.safetensors`. Folders are made.
        model: a `VideoDiT`, possibly compiled.
        text_encoder: the `TrainedTextEncoder` of the model; None for a frozen one from elsewhere.
        metadata: JSON-able extras for the header.
        dtype: store floating-point weights in this dtype (`torch.bfloat16` halves the file); None
            keeps theirs. An attention method's own parameters are few and keep theirs always.

    Raises:
        TypeError: other modules, or metadata that is not JSON.
        ValueError: the two modules do not fit together.
        OSError: the file cannot be written (no space, no permission); an older file stays intact.
    """
    model, text_encoder = _unwrap(model), _unwrap_text(text_encoder)
    if text_encoder is not None and text_encoder.text_dim != model.config.text_dim:
        raise ValueError(
            f"text_encoder gives embeddings of {text_encoder.text_dim}; "
            f"it must be the model's text_dim, {model.config.text_dim}"
        )
    tensors = dict(_stored_tensors(model, text_encoder, dtype))
    weights_dtype = dtype or model.patch_embedding.weight.dtype
    num_parameters = sum(tensor.numel() for tensor in tensors.values())
    header = {
        "format": FORMAT,
        "version": VERSION,
        "dtype": str(weights_dtype).removeprefix("torch."),
        "num_parameters": num_parameters,
        "model": asdict(model.config),
        "text": None if text_encoder is None else asdict(text_encoder.config),
        "attention": asdict(model.attention_config),
        "metadata": dict(metadata or {}),
    }
    try:
        text = json.dumps(header)
    except (TypeError, ValueError) as error:
        raise TypeError(f"metadata is not JSON: {error}") from error

    path = _weights_path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    data = save(tensors, metadata={_HEADER_KEY: text})
    _write_atomically(path, data)
    header_path = path.with_suffix(".json")
    _write_atomically(header_path, (json.dumps(header, indent=2) + "\n").encode())
    return SavedModel(path, header_path, len(data), num_parameters)


def load_model(
    path: str | os.PathLike[str],
    *,
    attention: AttentionConfig | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> LoadedModel:
    """Build the model that a file describes and load its weights.

    Args:
        path: a `.safetensors` file, or the folder with `model.safetensors`.
        attention: another attention method than the file's; see `load_weights`.
        device, dtype: of the modules built; a method may keep its own parameters in float32.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: not one of our files, damaged, of a newer version, or weights that do not
            fit.
    """
    header = read_header(path)
    model = VideoDiT(header.model, attention or header.attention)
    text_encoder = None if header.text is None else TrainedTextEncoder(header.text)
    report = load_weights(path, model, text_encoder, new_attention=attention is not None)
    model.to(device=device, dtype=dtype)
    if text_encoder is not None:
        text_encoder.to(device=device, dtype=dtype)
    return LoadedModel(model, text_encoder, header, report.initialised)


def load_weights(
    path: str | os.PathLike[str],
    model: nn.Module,
    text_encoder: nn.Module | None = None,
    *,
    new_attention: bool = False,
) -> LoadReport:
    """Load a file into modules that exist. Either everything fits or nothing is changed.

    Args:
        path: a `.safetensors` file, or the folder with `model.safetensors`.
        model: a `VideoDiT`, possibly compiled.
        text_encoder: the `TrainedTextEncoder` that belongs to it, if the file holds one.
        new_attention: the model may have another attention method than the file. Parameters of
            its own that the file lacks keep their values and are listed in the report. Parameters
            in the file that the model lacks are an error all the same: nothing is dropped.
            (Another number of the same method, such as its critical fraction, needs no leave.)

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: what `load_model` says; lists every unknown, missing and mis-shaped key,
            and where the two architectures differ. Architectures that differ are refused even
            when every tensor fits.
    """
    model, text_encoder = _unwrap(model), _unwrap_text(text_encoder)
    header, tensors = _read(path)
    expected = _state(model, text_encoder)
    own = _attention_keys(model)

    missing = [key for key in expected if key not in tensors]
    same_attention = header.attention == model.attention_config
    may_miss = own if new_attention and not same_attention else set()
    initialised = [key for key in missing if key in may_miss]
    missing = [key for key in missing if key not in may_miss]
    unknown = [key for key in tensors if key not in expected]
    misshaped = [
        f"{key}: {tuple(tensors[key].shape)} in the file, {tuple(expected[key].shape)} in the model"
        for key in expected
        if key in tensors and tensors[key].shape != expected[key].shape
    ]
    other_method = header.attention.name != model.attention_config.name and not new_attention
    # Number of heads, rotary base: sizes that change the function and no tensor's shape.
    text_config = None if text_encoder is None else text_encoder.config
    other_sizes = header.model != model.config or header.text != text_config
    if missing or unknown or misshaped or other_method or other_sizes:
        lines = [f"{_weights_path(path)} does not fit the model."]
        lines += _differences(header, model.config, text_config, model.attention_config)
        for title, keys in (
            ("missing in the file", missing),
            ("unknown to the model", unknown),
            ("of another shape", misshaped),
        ):
            if keys:
                lines += [f"{len(keys)} {title}:", *(f"  {key}" for key in keys)]
        if other_method:
            lines.append("Allow another attention method with new_attention=True.")
        raise CheckpointError("\n".join(lines))

    with torch.no_grad():
        for key, tensor in tensors.items():
            expected[key].copy_(tensor)
    return LoadReport(header, initialised)


def read_header(path: str | os.PathLike[str]) -> ModelHeader:
    """What a file says about itself; reads no weights.

    Raises:
        FileNotFoundError, CheckpointError: as `load_model`.
    """
    with _open(path) as file:
        return _parse_header(_weights_path(path), file.metadata())


def _read(path: str | os.PathLike[str]) -> tuple[ModelHeader, dict[str, Tensor]]:
    with _open(path) as file:
        header = _parse_header(_weights_path(path), file.metadata())
        return header, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


@contextlib.contextmanager
def _open(path: str | os.PathLike[str]) -> Iterator[Any]:
    path = _weights_path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no model file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise CheckpointError(
            f"{path} is not a readable safetensors file ({error}): damaged or cut short?"
        ) from error


def _text_config(values: dict[str, Any]) -> TrainedTextEncoderConfig:
    if "max_bytes" in values:  # its name in version 1
        values = {**values, "max_tokens": values["max_bytes"]}
        del values["max_bytes"]
    return TrainedTextEncoderConfig(**values)


def _parse_header(path: Path, stored: Mapping[str, str] | None) -> ModelHeader:
    text = (stored or {}).get(_HEADER_KEY)
    if text is None:
        raise CheckpointError(
            f"{path} has no {_HEADER_KEY!r} header: it was not written by save_model"
        )
    try:
        values = json.loads(text)
        if values["format"] != FORMAT or values["version"] > VERSION:
            raise CheckpointError(
                f"{path} has format {values['format']!r} version {values['version']}; "
                f"this code reads {FORMAT!r} up to version {VERSION}"
            )
        return ModelHeader(
            model=DiTConfig(**values["model"]),
            text=None if values["text"] is None else _text_config(values["text"]),
            attention=attention_config_from_dict(values["attention"]),
            dtype=values["dtype"],
            metadata=values["metadata"],
        )
    except CheckpointError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: bad header: {type(error).__name__}: {error}") from error


def _differences(
    header: ModelHeader,
    model: DiTConfig,
    text: TrainedTextEncoderConfig | None,
    attention: AttentionConfig,
) -> list[str]:
    """Both architectures, where they differ."""
    pairs = (
        ("model", header.model, model),
        ("text encoder", header.text, text),
        ("attention", header.attention, attention),
    )
    return [
        f"{name} of the file:  {theirs}\n{name} of the model: {ours}"
        for name, theirs, ours in pairs
        if theirs != ours
    ]


def _state(model: VideoDiT, text_encoder: TrainedTextEncoder | None) -> dict[str, Tensor]:
    """Tensors of both modules by their keys in a file; they share memory with the modules."""
    state = {f"model.{key}": value for key, value in model.state_dict().items()}
    if text_encoder is not None:
        state |= {f"text_encoder.{key}": v for key, v in text_encoder.state_dict().items()}
    return state


def _attention_keys(model: VideoDiT) -> set[str]:
    """Keys of the attention methods' own parameters."""
    return {
        f"model.{prefix}.{key}"
        for prefix, module in model.named_modules()
        if isinstance(module, AttentionMethod)
        for key in module.state_dict()
    }


def _stored_tensors(
    model: VideoDiT, text_encoder: TrainedTextEncoder | None, dtype: torch.dtype | None
) -> Iterator[tuple[str, Tensor]]:
    own = _attention_keys(model)
    for key, tensor in _state(model, text_encoder).items():
        cast = dtype is not None and tensor.is_floating_point() and key not in own
        stored = tensor.detach().to("cpu", dtype if cast else tensor.dtype)
        yield key, stored.contiguous()


def _unwrap(model: nn.Module) -> VideoDiT:
    model = getattr(model, "_orig_mod", model)  # torch.compile's wrapper
    if not isinstance(model, VideoDiT):
        raise TypeError(f"model is a {type(model).__name__}; it must be a VideoDiT")
    return model


def _unwrap_text(text_encoder: nn.Module | None) -> TrainedTextEncoder | None:
    text_encoder = getattr(text_encoder, "_orig_mod", text_encoder)
    if text_encoder is not None and not isinstance(text_encoder, TrainedTextEncoder):
        raise TypeError(
            f"text_encoder is a {type(text_encoder).__name__}; it must be a TrainedTextEncoder, "
            "or None: frozen encoders are not part of our files"
        )
    return text_encoder


def _weights_path(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    return path if path.suffix == ".safetensors" else path / DEFAULT_NAME


def _write_atomically(path: Path, data: bytes) -> None:
    """Write beside, then replace: a reader sees the old file or the new one, never half of one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise OSError(
            error.errno,
            f"cannot write {path} ({len(data) / 2**20:.1f} MiB): {error.strerror}; "
            "nothing was replaced",
        ) from error
