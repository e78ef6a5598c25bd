"""A transformer of diffusers as a `VideoModel`: trained, sampled and measured like any other.

So far Wan's, whose forward takes latents, timestep and text and nothing more.

Shapes as in `sla.models.video_model`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from sla.attention import AttentionConfig, AttentionMethod, FullConfig
from sla.models import injection
from sla.models.video_model import Grid, VideoModel, check_grid, check_inputs


class DiffusersVideoModel(VideoModel):
    """A Wan transformer.

    Its self-attention is one of our methods always, full attention to begin with if it has none.

    Args:
        transformer: diffusers' `WanTransformer3DModel`, weights loaded.
        text_tokens: length that text is padded to. Padding is zeros that cross-attention reads, as
            in diffusers' pipeline; there is no mask.
        attention_config: method to apply; None keeps what is there.
    """

    def __init__(
        self,
        transformer: Any,
        *,
        text_tokens: int = 512,
        attention_config: AttentionConfig | None = None,
    ) -> None:
        super().__init__()
        self.transformer = transformer
        self.text_tokens = text_tokens
        self._checkpointing = False
        if attention_config is not None or injection.attention_config(transformer) is None:
            self.set_attention(attention_config or FullConfig())

    def forward(self, latents: Tensor, timestep: Tensor, text: Tensor, text_mask: Tensor) -> Tensor:
        """As `VideoModel`; at most `text_tokens` tokens of text.

        Works in the dtype of the weights, or under autocast.
        """
        config = self.transformer.config
        if text.ndim == 3 and text.shape[1] > self.text_tokens:
            raise ValueError(
                f"text has {text.shape[1]} tokens; it may have at most {self.text_tokens} "
                "(model.text_tokens)"
            )
        check_inputs(self, config.in_channels, config.text_dim, latents, timestep, text, text_mask)
        dtype = self.transformer.patch_embedding.weight.dtype
        text = text.masked_fill(~text_mask.unsqueeze(-1), 0.0)
        text = F.pad(text, (0, 0, 0, self.text_tokens - text.shape[1]))
        velocity: Tensor = self.transformer(
            hidden_states=latents.to(dtype),
            timestep=timestep,
            encoder_hidden_states=text.to(dtype),
            return_dict=False,
        )[0]
        return velocity.to(latents.dtype)

    def grid(self, size: Sequence[int]) -> Grid:
        return check_grid(size, tuple(self.transformer.config.patch_size))

    @property
    def attention_config(self) -> AttentionConfig:
        config = injection.attention_config(self.transformer)
        assert config is not None  # applied in __init__
        return config

    def attention_modules(self) -> Iterator[AttentionMethod]:
        return injection.attention_modules(self.transformer)

    def set_attention(self, attention_config: AttentionConfig) -> None:
        injection.apply_attention(self.transformer, attention_config, discard=True)

    def repeated_blocks(self) -> Sequence[nn.Module]:
        return list(self.transformer.blocks)

    @property
    def lora_targets(self) -> tuple[str, ...]:
        return ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")

    @property
    def activation_checkpointing(self) -> bool:  # type: ignore[override]
        return self._checkpointing

    @activation_checkpointing.setter
    def activation_checkpointing(self, on: bool) -> None:
        self._checkpointing = on
        if on:
            self.transformer.enable_gradient_checkpointing()
        else:
            self.transformer.disable_gradient_checkpointing()


__all__ = ["DiffusersVideoModel"]
