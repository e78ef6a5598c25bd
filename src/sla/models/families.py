"""Families of video models: how a config becomes a model, and where its weights are kept.

`model.name` of an experiment's config chooses one: `dit`, the small transformer of `sla.models.dit`
with files of our own, or `wan`, diffusers' Wan 2.1 with diffusers' files. `register_family` adds
one, also from outside the repository.
"""

from __future__ import annotations

import abc
import difflib
import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from sla.attention import AttentionConfig, FullConfig
from sla.files import file_sha256
from sla.models import checkpoint
from sla.models.dit import DiTConfig, VideoDiT
from sla.models.identity import DTYPES
from sla.models.text import TrainedTextEncoder, TrainedTextEncoderConfig
from sla.models.video_model import ModelConfig, VideoModel
from sla.models.wan_sizes import WAN_CONFIGS

FamilyT = TypeVar("FamilyT", bound="type[ModelFamily]")
# In place of weights: draw them. For speed and memory they are as good as any.
RANDOM = "random"


@dataclass(frozen=True)
class Restored:
    """A model that was built from its files.

    Attributes:
        model: in evaluation mode, on the CPU.
        text_encoder: the one that was trained and stored with it, or None.
        config, text: their sizes; `text` is None without an encoder.
    """

    model: VideoModel
    text_encoder: TrainedTextEncoder | None
    config: ModelConfig
    text: TrainedTextEncoderConfig | None


class ModelFamily(abc.ABC):
    """One way to configure, build, store and find video models.

    Attributes:
        config_class: dataclass of its numbers; its `name` defaults to the family's.
    """

    config_class: type[ModelConfig]

    @abc.abstractmethod
    def create(
        self,
        config: Any,
        attention: AttentionConfig,
        weights: str = RANDOM,
        text_encoder: nn.Module | None = None,
    ) -> VideoModel:
        """A model to be trained.

        Args:
            config: of `config_class`.
            attention: its method, whose own parameters start fresh.
            weights: where its pretrained weights are, or `random`: drawn from PyTorch's generator.
            text_encoder: filled too, where the weights hold a text encoder.

        Raises:
            FileNotFoundError: no such weights; says what to fetch and where to put it.
            CheckpointError: they do not fit; says all that is wrong.
        """

    @abc.abstractmethod
    def locate(self, config: Any, weights: str) -> Path:
        """The local path of pretrained weights, fetched from a hub if need be.

        Raises:
            FileNotFoundError: as `create`.
        """

    @abc.abstractmethod
    def export(
        self,
        folder: Path,
        model: Any,
        text_encoder: nn.Module | None,
        metadata: Mapping[str, Any],
        dtype: torch.dtype | None,
    ) -> Path:
        """Write a trained model into a run's folder; returns its path, as `exported` does."""

    @abc.abstractmethod
    def exported(self, folder: Path) -> Path | None:
        """What `export` wrote into the folder, or None."""

    @abc.abstractmethod
    def restore(self, config: Any, path: Path, attention: AttentionConfig | None) -> Restored:
        """Build what is stored at a path.

        Args:
            config: of the experiment; what the files say themselves has precedence.
            path: from `exported` or `locate`.
            attention: another method than the stored one, its parameters fresh; None for that.

        Raises:
            FileNotFoundError, CheckpointError: as `create`.
        """

    @abc.abstractmethod
    def stored_attention(self, path: Path) -> AttentionConfig:
        """The method that weights were stored with.

        Raises:
            FileNotFoundError, CheckpointError: as `create`.
        """

    def for_inference(self, model: Any, device: torch.device) -> None:
        """Change a model that will not be trained to what is fastest on a device, in place.

        By default nothing.
        """
        del model, device

    def digest(self, path: Path) -> str:
        """SHA-256 of all weights at a path and of their headers."""
        if path.is_file():
            return file_sha256(path)
        total = hashlib.sha256()
        for file in sorted(path.glob("*")):
            if file.suffix in (".json", ".safetensors"):
                total.update(f"{file.name} {file_sha256(file)}\n".encode())
        return total.hexdigest()


_FAMILIES: dict[str, ModelFamily] = {}


def register_family(name: str) -> Callable[[FamilyT], FamilyT]:
    """Class decorator that adds a family under `name`.

    Raises:
        ValueError: the name is taken by another class.
    """

    def add(family: FamilyT) -> FamilyT:
        known = _FAMILIES.get(name)
        if known is not None and type(known).__qualname__ != family.__qualname__:
            raise ValueError(f"model name {name!r} is taken by {type(known).__qualname__}")
        _FAMILIES[name] = family()
        return family

    return add


def family(name: str) -> ModelFamily:
    """The family of that name.

    Raises:
        ValueError: there is none; names the nearest one and all.
    """
    if name not in _FAMILIES:
        close = difflib.get_close_matches(str(name), _FAMILIES, n=1, cutoff=0.5)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        known = ", ".join(sorted(_FAMILIES))
        raise ValueError(f"model.name is {name!r}{hint} Available: {known}")
    return _FAMILIES[name]


@register_family("dit")
class DiTFamily(ModelFamily):
    """`VideoDiT`, in one safetensors file with its text encoder (`sla.models.checkpoint`)."""

    config_class = DiTConfig

    def create(
        self,
        config: DiTConfig,
        attention: AttentionConfig,
        weights: str = RANDOM,
        text_encoder: nn.Module | None = None,
    ) -> VideoModel:
        if weights == RANDOM:
            return VideoDiT(config, attention)
        path = self.locate(config, weights)
        # What is not full attention has parameters, which another method would lose.
        swap = self.stored_attention(path).name == FullConfig.name != attention.name
        model = VideoDiT(config, FullConfig(tile=attention.tile) if swap else attention)
        checkpoint.load_weights(path, model, text_encoder)
        if swap:
            model.set_attention(attention)
        return model

    def locate(self, config: DiTConfig, weights: str) -> Path:
        path = Path(weights)
        if not path.is_file():
            raise FileNotFoundError(
                f"run.init_weights is {weights!r}, which is no file; give weights with "
                "CKPT=model.safetensors, or make some with `make pretrain`"
            )
        return path

    def export(
        self,
        folder: Path,
        model: Any,
        text_encoder: nn.Module | None,
        metadata: Mapping[str, Any],
        dtype: torch.dtype | None,
    ) -> Path:
        path = folder / checkpoint.DEFAULT_NAME
        return checkpoint.save_model(path, model, text_encoder, metadata=metadata, dtype=dtype).path

    def exported(self, folder: Path) -> Path | None:
        path = folder / checkpoint.DEFAULT_NAME
        return path if path.is_file() else None

    def restore(self, config: DiTConfig, path: Path, attention: AttentionConfig | None) -> Restored:
        loaded = checkpoint.load_model(path, attention=attention)
        header = loaded.header
        return Restored(loaded.model.eval(), loaded.text_encoder, header.model, header.text)

    def stored_attention(self, path: Path) -> AttentionConfig:
        return checkpoint.read_header(path).attention


@dataclass
class WanConfig(ModelConfig):
    """A Wan 2.1 text-to-video transformer.

    Attributes:
        name: `wan`.
        size: `1.3b` or `14b`, or `tiny` for tests; weights of another size are refused.
        revision: commit of the hub repository that `run.init_weights` names; empty for its newest.
        subfolder: where the transformer lies in the repository or folder.
        dtype: of the weights of a model to be trained: `float32`, or `bfloat16`, whose small
            updates are rounded away. Autocast (`trainer.precision`) computes in bf16 either way.
        text_tokens: length that text embeddings are padded to with zeros; 512 in Wan's pipeline.

    Raises:
        ValueError: a value that is not known; names the field and what would do.
    """

    name: str = "wan"
    size: str = "1.3b"
    revision: str = ""
    subfolder: str = "transformer"
    dtype: str = "float32"
    text_tokens: int = 512

    def __post_init__(self) -> None:
        if self.size not in WAN_CONFIGS:
            raise ValueError(
                f"model.size is {self.size!r}; it must be one of {', '.join(WAN_CONFIGS)}"
            )
        if self.dtype not in DTYPES:
            raise ValueError(
                f"model.dtype is {self.dtype!r}; it must be one of {', '.join(DTYPES)}"
            )
        if self.text_tokens < 1:
            raise ValueError(f"model.text_tokens is {self.text_tokens}; it must be at least 1")

    @property
    def in_channels(self) -> int:
        """C of the latents."""
        return int(WAN_CONFIGS[self.size]["in_channels"])

    @property
    def text_dim(self) -> int:
        """Width of the text embeddings."""
        return int(WAN_CONFIGS[self.size]["text_dim"])


@register_family("wan")
class WanFamily(ModelFamily):
    """diffusers' Wan, in diffusers' folders with our methods beside (`sla.models.pretrained`)."""

    config_class = WanConfig
    _FOLDER = "transformer"

    def create(
        self,
        config: WanConfig,
        attention: AttentionConfig,
        weights: str = RANDOM,
        text_encoder: nn.Module | None = None,
    ) -> VideoModel:
        from sla.models.wan import build_wan

        dtype = DTYPES[config.dtype]
        if weights == RANDOM:
            seed = int(torch.randint(2**31, ()).item())
            transformer = build_wan(config.size, dtype, seed=seed)
        else:
            path = self.locate(config, weights)
            transformer = self._load(config, path, dtype, attention)
        return self._wrap(config, transformer, attention).train()

    def locate(self, config: WanConfig, weights: str) -> Path:
        from sla.models.pretrained import local_folder

        return local_folder(weights, config.revision or None, config.subfolder)

    def export(
        self,
        folder: Path,
        model: Any,
        text_encoder: nn.Module | None,
        metadata: Mapping[str, Any],
        dtype: torch.dtype | None,
    ) -> Path:
        from sla.models.pretrained import save_model

        transformer = model.transformer
        if dtype is not None:
            transformer = transformer.to(dtype)
        save_model(transformer, folder / self._FOLDER)
        return folder / self._FOLDER

    def exported(self, folder: Path) -> Path | None:
        path = folder / self._FOLDER
        return path if (path / "config.json").is_file() else None

    def restore(self, config: WanConfig, path: Path, attention: AttentionConfig | None) -> Restored:
        transformer = self._load(config, path, None, attention)
        return Restored(self._wrap(config, transformer, attention).eval(), None, config, None)

    def stored_attention(self, path: Path) -> AttentionConfig:
        from sla.models.pretrained import HEADER_NAME, read_attention

        return read_attention(path)[0].attention if (path / HEADER_NAME).is_file() else FullConfig()

    def for_inference(self, model: Any, device: torch.device) -> None:
        from sla.models.fusion import fuse_feed_forward
        from sla.models.wan import cast_wan

        if device.type == "cuda":
            cast_wan(model.transformer, torch.bfloat16)
            fuse_feed_forward(model.transformer)

    def _wrap(
        self, config: WanConfig, transformer: Any, attention: AttentionConfig | None
    ) -> VideoModel:
        from sla.models.diffusers_model import DiffusersVideoModel
        from sla.models.injection import attention_config

        present = attention_config(transformer)
        if present == attention:
            attention = None  # it has its parameters already
        return DiffusersVideoModel(
            transformer, text_tokens=config.text_tokens, attention_config=attention
        )

    def _load(
        self,
        config: WanConfig,
        path: Path,
        dtype: torch.dtype | None,
        attention: AttentionConfig | None,
    ) -> Any:
        from sla.models.pretrained import load_model

        # Full attention has no parameters: it is replaced later. Any other must be the stored one.
        stored = self.stored_attention(path).name
        wanted = None if stored == FullConfig.name else attention
        transformer = load_model(path, subfolder="", dtype=dtype, attention=wanted)
        wrong = [
            f"  {name}: {transformer.config.get(name)!r} in the files, {wanted!r} for this size"
            for name, wanted in WAN_CONFIGS[config.size].items()
            if _plain(transformer.config.get(name)) != _plain(wanted)
        ]
        if wrong:
            listing = "\n".join(wrong)
            raise checkpoint.CheckpointError(
                f"{os.fspath(path)} is not of model.size={config.size}:\n{listing}"
            )
        return transformer


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


__all__ = [
    "RANDOM",
    "DiTFamily",
    "ModelFamily",
    "Restored",
    "WanConfig",
    "WanFamily",
    "family",
    "register_family",
]
