"""The small video DiT, text encoders, video autoencoders and model files."""

from sla.models.autoencoders import (
    AutoencoderConfig,
    PixelAutoencoder,
    VideoAutoencoder,
    WanAutoencoder,
    build_autoencoder,
)
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
from sla.models.text import (
    FrozenTextEncoder,
    TextEncoder,
    TextEncoderConfig,
    TrainedTextEncoder,
    TrainedTextEncoderConfig,
    UMT5TextEncoder,
    build_text_encoder,
)

__all__ = [
    "AutoencoderConfig",
    "CheckpointError",
    "DiTConfig",
    "FrozenTextEncoder",
    "LoadReport",
    "LoadedModel",
    "ModelHeader",
    "PixelAutoencoder",
    "SavedModel",
    "TextEncoder",
    "TextEncoderConfig",
    "TrainedTextEncoder",
    "TrainedTextEncoderConfig",
    "UMT5TextEncoder",
    "VideoAutoencoder",
    "VideoDiT",
    "WanAutoencoder",
    "build_autoencoder",
    "build_text_encoder",
    "load_model",
    "load_weights",
    "read_header",
    "save_model",
]
