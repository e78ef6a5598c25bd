"""Small models for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from sla.models.dit import DiTConfig
from sla.models.text import TrainedTextEncoderConfig
from sla.seeds import drawing


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


def tiny_text_config() -> TrainedTextEncoderConfig:
    """One layer of width 16, fitting `tiny_dit_config`."""
    return TrainedTextEncoderConfig(text_dim=16, depth=1, num_heads=2, mlp_ratio=2.0, max_tokens=23)


def open_branches(module: nn.Module, seed: int = 0, std: float = 0.1) -> None:
    """Add noise to every parameter, so that nothing that starts at zero hides an error."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator) * std
            parameter.add_(noise.to(parameter))


def tiny_wan_autoencoder(seed: int = 0, **changes: Any) -> Any:
    """diffusers' AutoencoderKLWan with random weights: 4 channels, 4 times fewer frames, 8 times
    smaller.

    Args:
        changes: of its config.
    """
    from diffusers import AutoencoderKLWan

    config: dict[str, Any] = {
        "base_dim": 8,
        "z_dim": 4,
        "dim_mult": [1, 1, 1, 1],
        "num_res_blocks": 1,
        "latents_mean": [0.1, -0.2, 0.3, 0.0],
        "latents_std": [2.0, 1.5, 0.5, 1.0],
    }
    with drawing(seed):
        return AutoencoderKLWan(**{**config, **changes})


def write_tiny_umt5(folder: Path, width: int = 24) -> None:
    """A UMT5 encoder with random weights and a tokenizer of seven words, laid out as Wan's
    repository."""
    import tokenizers
    import transformers

    words = ["<pad>", "</s>", "<unk>", "a", "red", "ball", "rolls"]
    model = tokenizers.models.WordLevel(
        {word: number for number, word in enumerate(words)}, unk_token="<unk>"
    )
    core = tokenizers.Tokenizer(model)
    core.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    core.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    config = transformers.UMT5Config(
        vocab_size=len(words),
        d_model=width,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=3,
        is_encoder_decoder=False,
    )
    with drawing(0):
        transformers.UMT5EncoderModel(config).save_pretrained(folder / "text_encoder")
    tokenizer.save_pretrained(folder / "tokenizer")
