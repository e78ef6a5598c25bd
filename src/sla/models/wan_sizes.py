"""Sizes of Wan 2.1, apart from diffusers, so that reading a config does not load it."""

from __future__ import annotations

from typing import Any

_WAN_21: dict[str, Any] = {
    "patch_size": (1, 2, 2),
    "attention_head_dim": 128,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 4096,
    "freq_dim": 256,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "eps": 1e-6,
    "image_dim": None,
    "added_kv_proj_dim": None,
    "rope_max_seq_len": 1024,
}
# `transformer/config.json` of Wan-AI/Wan2.1-T2V-1.3B-Diffusers and Wan-AI/Wan2.1-T2V-14B-Diffusers,
# and one for tests.
WAN_CONFIGS: dict[str, dict[str, Any]] = {
    "1.3b": {**_WAN_21, "num_attention_heads": 12, "num_layers": 30, "ffn_dim": 8960},
    "14b": {**_WAN_21, "num_attention_heads": 40, "num_layers": 40, "ffn_dim": 13824},
    "tiny": {
        **_WAN_21,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_layers": 2,
        "ffn_dim": 64,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": 16,
        "freq_dim": 32,
        "rope_max_seq_len": 64,
    },
}

__all__ = ["WAN_CONFIGS"]
