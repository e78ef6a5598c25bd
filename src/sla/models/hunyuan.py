"""HunyuanVideo in diffusers: the adapter. Letters as in `sla.models.injection`; L text tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models.embeddings import apply_rotary_emb
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


class HunyuanVideoProcessor(MethodProcessor):
    """diffusers' `HunyuanVideoAttnProcessor2_0`, with a method in place of attention.

    The model has its text at the end of the sequence; the method sees it in front.
    """

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
            attn, hidden_states, encoder_hidden_states, image_rotary_emb
        )
        return output

    def forward(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None,
        image_rotary_emb: Any,
    ) -> tuple[Tensor, Tensor]:
        """Video (B, N - L, dim) and text (B, L, dim), both to the same shape.

        The mask is not looked at: `HunyuanVideoAdapter` has left no text that it hides.

        Raises:
            UnsupportedAttentionError: no text, or what the method refuses.
        """
        rotary, context = self.carried(image_rotary_emb)
        if encoder_hidden_states is None:
            raise UnsupportedAttentionError("the layer got no text, which is part of its sequence")
        text, length = encoder_hidden_states, encoder_hidden_states.shape[1]
        heads = (attn.heads, -1)
        # Blocks of two streams project and normalise their text by weights of its own.
        two = attn.add_q_proj is not None
        text_layers = (
            (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
            if two
            else (attn.to_q, attn.to_k, attn.to_v)
        )
        text_norms = (attn.norm_added_q, attn.norm_added_k) if two else (attn.norm_q, attn.norm_k)
        query, key, value = (
            layer(hidden_states).unflatten(2, heads) for layer in (attn.to_q, attn.to_k, attn.to_v)
        )
        text_query, text_key, text_value = (
            layer(text).unflatten(2, heads) for layer in text_layers
        )
        query = _rotate(_normed(attn.norm_q, query), rotary)
        key = _rotate(_normed(attn.norm_k, key), rotary)
        text_query, text_key = _normed(text_norms[0], text_query), _normed(text_norms[1], text_key)
        output = self.attend(
            torch.cat([text_query, query], dim=1).transpose(1, 2),
            torch.cat([text_key, key], dim=1).transpose(1, 2),
            torch.cat([text_value, value], dim=1).transpose(1, 2),
            torch.cat([text, hidden_states], dim=1),
            context,
        )
        video, text = output[:, length:], output[:, :length]
        if getattr(attn, "to_out", None) is not None:
            video = attn.to_out[1](attn.to_out[0](video))
        if getattr(attn, "to_add_out", None) is not None:
            text = attn.to_add_out(text)
        return video, text


def _normed(norm: Any, x: Tensor) -> Tensor:
    normed: Tensor = x if norm is None else norm(x)
    return normed


def _rotate(x: Tensor, rotary: Any) -> Tensor:
    """(B, N, H, D) with rotary positions."""
    rotated = apply_rotary_emb(x, rotary, sequence_dim=1)
    assert isinstance(rotated, Tensor)
    return rotated


@register_adapter("HunyuanVideoTransformer3DModel")
class HunyuanVideoAdapter(ModelAdapter):
    """HunyuanVideo: one sequence of video and text in both kinds of blocks.

    Text tokens are attended exactly by all and attend exactly to all. No method has a mask, so the
    text's padding is cut off before the transformer sees it; with it hidden, the output is the
    same. Samples of a batch must then have equally many text tokens. Counting them waits for the
    device once a call, and a graph of the whole transformer cannot hold that: compile its blocks.
    """

    processor = HunyuanVideoProcessor
    joint_text = True

    def attention_layers(self, transformer: Any) -> list[nn.Module]:
        blocks = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
        return [block.attn for block in blocks]

    def context(self, transformer: Any, arguments: Mapping[str, Any]) -> AttentionContext | None:
        latents, text = arguments.get("hidden_states"), arguments.get("encoder_hidden_states")
        if latents is None or text is None:
            return None
        batch, _, frames, height, width = latents.shape
        patch, patch_t = transformer.config.patch_size, transformer.config.patch_size_t
        return AttentionContext(
            grid=(frames // patch_t, height // patch, width // patch),
            timestep=per_sample(arguments.get("timestep"), batch, latents.device),
            always_critical=text.shape[1],
        )

    def connect(self, transformer: Any, config: AttentionConfig) -> list[RemovableHandle]:
        return _TrimmingHooks(self, transformer, config).connect(transformer, transformer.rope)


class _TrimmingHooks(RotaryHooks):
    """`RotaryHooks` that cut the text's padding off."""

    def before(
        self, transformer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        arguments = self.arguments(args, kwargs)
        text, mask = (arguments.get(n) for n in ("encoder_hidden_states", "encoder_attention_mask"))
        if text is not None and mask is not None:
            lengths = mask.sum(dim=1).tolist()
            if len(set(lengths)) > 1:
                raise UnsupportedAttentionError(
                    f"the samples of the batch have {lengths} text tokens; they must have equally "
                    "many, as no attention method has a mask: one prompt a call"
                )
            arguments["encoder_hidden_states"] = text[:, : int(lengths[0])]
            arguments["encoder_attention_mask"] = mask[:, : int(lengths[0])]
        super().before(transformer, (), arguments)
        return (), arguments


__all__ = ["HunyuanVideoAdapter", "HunyuanVideoProcessor"]
