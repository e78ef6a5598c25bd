"""CogVideoX in diffusers: the adapter. Letters as in `sla.models.injection`; L text tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sla.attention import AttentionConfig, AttentionContext, UnsupportedAttentionError
from sla.models.injection import (
    ArgumentHooks,
    MethodProcessor,
    ModelAdapter,
    per_sample,
    register_adapter,
)


class CogVideoXProcessor(MethodProcessor):
    """diffusers' `CogVideoXAttnProcessor2_0`, with a method in place of attention."""

    # diffusers passes what this signature names and drops the rest.
    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> tuple[Tensor, Tensor]:
        """`forward`, with its arguments by name."""
        output: tuple[Tensor, Tensor] = super().__call__(
            attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb
        )
        return output

    def forward(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None,
        attention_mask: Tensor | None,
        image_rotary_emb: Any,
    ) -> tuple[Tensor, Tensor]:
        """Video (B, N - L, dim) and text (B, L, dim), both to the same shape.

        Raises:
            UnsupportedAttentionError: a mask, no text, or what the method refuses.
        """
        self.refuse_mask(attention_mask)
        rotary, context = self.carried(image_rotary_emb)
        if encoder_hidden_states is None:
            raise UnsupportedAttentionError("the layer got no text, which is part of its sequence")
        length = encoder_hidden_states.shape[1]
        joint = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        if attn.fused_projections:
            query, key, value = attn.to_qkv(joint).chunk(3, dim=-1)
        else:
            query, key, value = attn.to_q(joint), attn.to_k(joint), attn.to_v(joint)
        heads = (attn.heads, -1)
        query, key, value = (x.unflatten(2, heads).transpose(1, 2) for x in (query, key, value))
        if attn.norm_q is not None:
            query = attn.norm_q(query)
        if attn.norm_k is not None:
            key = attn.norm_k(key)
        if rotary is not None:
            query, key = (_rotate_video(x, length, rotary) for x in (query, key))
        output = self.attend(query, key, value, joint, context)
        output = attn.to_out[0](output)
        output = attn.to_out[1](output)
        return output[:, length:], output[:, :length]


def _rotate_video(x: Tensor, length: int, rotary: Any) -> Tensor:
    """(B, H, N, D) with rotary positions behind the first `length` tokens."""
    video = apply_rotary_emb(x[:, :, length:], rotary)
    assert isinstance(video, Tensor)
    return torch.cat([x[:, :, :length], video], dim=2)


@register_adapter("CogVideoXTransformer3DModel")
class CogVideoXAdapter(ModelAdapter):
    """CogVideoX: one sequence of text and video in `transformer_blocks.N.attn1`, text first.

    Text tokens are attended exactly by all and attend exactly to all.
    """

    processor = CogVideoXProcessor
    joint_text = True

    def attention_layers(self, transformer: Any) -> list[nn.Module]:
        return [block.attn1 for block in transformer.transformer_blocks]

    def context(self, transformer: Any, arguments: Mapping[str, Any]) -> AttentionContext | None:
        latents, text = arguments.get("hidden_states"), arguments.get("encoder_hidden_states")
        if latents is None or text is None:
            return None
        batch, frames, _, height, width = latents.shape  # frames before channels
        patch, patch_t = transformer.config.patch_size, transformer.config.patch_size_t or 1
        return AttentionContext(
            grid=((frames + patch_t - 1) // patch_t, height // patch, width // patch),
            timestep=per_sample(arguments.get("timestep"), batch, latents.device),
            always_critical=text.shape[1],
        )

    def connect(self, transformer: Any, config: AttentionConfig) -> list[RemovableHandle]:
        hooks = ArgumentHooks(self, transformer, config, "image_rotary_emb")
        return hooks.connect(transformer)


__all__ = ["CogVideoXAdapter", "CogVideoXProcessor"]
