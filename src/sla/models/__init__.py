"""The small video DiT, text encoders and model files."""

from sla.models.checkpoint import (
    CheckpointError,
    LoadedModel,
    LoadReport,
    ModelHeader,
    SavedModel,
    load_model,
    load_weights,
    read_header,
    save_model,
)
from sla.models.dit import DiTConfig, VideoDiT
from sla.models.text import ByteTextEncoder, ByteTextEncoderConfig, TextEncoder, UMT5TextEncoder

__all__ = [
    "ByteTextEncoder",
    "ByteTextEncoderConfig",
    "CheckpointError",
    "DiTConfig",
    "LoadReport",
    "LoadedModel",
    "ModelHeader",
    "SavedModel",
    "TextEncoder",
    "UMT5TextEncoder",
    "VideoDiT",
    "load_model",
    "load_weights",
    "read_header",
    "save_model",
]
