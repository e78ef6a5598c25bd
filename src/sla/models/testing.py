"""Small models for tests."""

from __future__ import annotations

import torch
from torch import nn

from sla.models.dit import DiTConfig
from sla.models.text import ByteTextEncoderConfig


def tiny_dit_config() -> DiTConfig:
    """Two layers of two heads of 16."""
    return DiTConfig(
        in_channels=3,
        patch_size=(1, 2, 2),
        hidden_size=32,
        num_heads=2,
        depth=2,
        mlp_ratio=2.0,
        text_dim=16,
        time_frequencies=32,
    )


def tiny_text_config() -> ByteTextEncoderConfig:
    """One layer of width 16, fitting `tiny_dit_config`."""
    return ByteTextEncoderConfig(text_dim=16, depth=1, num_heads=2, mlp_ratio=2.0, max_bytes=23)


def open_branches(module: nn.Module, seed: int = 0, std: float = 0.1) -> None:
    """Add noise to every parameter, so that nothing that starts at zero hides an error."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator) * std
            parameter.add_(noise.to(parameter))
