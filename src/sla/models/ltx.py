"""LTX-Video in diffusers: the adapter. Shape letters as in `sla.models.injection`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusers.models.transformers.transformer_ltx import apply_rotary_emb
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sla.attention import AttentionConfig, AttentionContext, UnsupportedAttentionError
from sla.models.injection import (
    MethodProcessor,
    ModelAdapter,
    RotaryHooks,
    per_sample,
    register_adapter,
)


class LTXProcessor(MethodProcessor):
    """diffusers' `LTXVideoAttnProcessor` for self-attention, with a method for attention."""

    def forward(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Tensor:
        """(B, N, dim) -> (B, N, dim).

        Raises:
            UnsupportedAttentionError: cross-attention, a mask, or what the method refuses.
        """
        if encoder_hidden_states is not None:
            raise UnsupportedAttentionError("only self-attention is replaced")
        self.refuse_mask(attention_mask)
        rotary, context = self.carried(image_rotary_emb)
        heads = (attn.heads, -1)
        # Rotary pairs go across all heads: before they are told apart.
        query = apply_rotary_emb(attn.norm_q(attn.to_q(hidden_states)), rotary).unflatten(2, heads)
        key = apply_rotary_emb(attn.norm_k(attn.to_k(hidden_states)), rotary).unflatten(2, heads)
        value = attn.to_v(hidden_states).unflatten(2, heads)
        output = self.attend(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            hidden_states,
            context,
        )
        output = attn.to_out[0](output)
        output = attn.to_out[1](output)
        return output


@register_adapter("LTXVideoTransformer3DModel")
class LTXAdapter(ModelAdapter):
    """LTX-Video: self-attention over the video alone, in `transformer_blocks.N.attn1`.

    The grid is what the caller gives as `num_frames`, `height` and `width`. A caller that gives
    `video_coords` alone has none, and methods that work on a grid then refuse the call.
    """

    processor = LTXProcessor

    def attention_layers(self, transformer: Any) -> list[nn.Module]:
        return [block.attn1 for block in transformer.transformer_blocks]

    def context(self, transformer: Any, arguments: Mapping[str, Any]) -> AttentionContext | None:
        tokens = arguments.get("hidden_states")
        if tokens is None:
            return None
        frames, height, width = (arguments.get(n) for n in ("num_frames", "height", "width"))
        grid = None
        if frames is not None and height is not None and width is not None:
            grid = (frames, height, width)
        timestep = per_sample(arguments.get("timestep"), tokens.shape[0], tokens.device)
        return AttentionContext(grid=grid, timestep=timestep)

    def connect(self, transformer: Any, config: AttentionConfig) -> list[RemovableHandle]:
        return RotaryHooks(self, transformer, config).connect(transformer, transformer.rope)


__all__ = ["LTXAdapter", "LTXProcessor"]
