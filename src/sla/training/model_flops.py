"""Operations of a model's forward, for a share of the GPU's peak."""

from __future__ import annotations

import math

from torch import nn

from sla.attention import AttentionMethod, FullConfig, build_attention
from sla.models.video_model import Grid, VideoModel

# Parts of a model by what the names of their parameters hold, first match first.
PARTS = {
    "self_attention": ("self_attention.", "attn1."),
    "cross_attention": ("cross_attention.", "attn2."),
    "mlp": ("mlp.", "ffn."),
    "text_encoder": ("text_encoder.",),
}
# A backward takes twice the products of its forward.
FORWARDS_OF_A_STEP = 3


def forward_flops(model: VideoModel, grid: Grid, text_tokens: int) -> float:
    """Operations of a forward of one sample, a multiply-add as two.

    Counted are the linear layers of the repeated blocks, cross-attention and the attention methods;
    a method whose work depends on its inputs counts as full attention.
    """
    tokens = math.prod(grid)
    total = sum(_attention_flops(method, grid) for method in model.attention_modules())
    for block in model.repeated_blocks():
        methods = [part for part in block.modules() if isinstance(part, AttentionMethod)]
        own = {part for method in methods for part in method.modules()}
        for name, part in block.named_modules():
            if not isinstance(part, nn.Linear) or part in own:
                continue
            side, layer = _side(name)
            rows = text_tokens if side == "text" else tokens
            total += 2.0 * rows * part.in_features * part.out_features
            if side and layer == "query":
                total += 4.0 * tokens * text_tokens * part.out_features
    return total


def _attention_flops(method: AttentionMethod, grid: Grid) -> float:
    try:
        return method.flops(grid)
    except ValueError:
        sizes = (method.num_heads, method.head_dim, method.dim, method.layer_index)
        return build_attention(FullConfig(), *sizes).flops(grid)


def _side(name: str) -> tuple[str, str]:
    """What a layer of cross-attention works on, `text` or `video`, else nothing; and its role."""
    last = name.rsplit(".", 1)[-1]
    role = {"to_q": "query", "to_k": "key", "to_v": "value"}.get(last, last)
    if not any(mark in f"{name}." for mark in PARTS["cross_attention"]):
        return "", role
    return "text" if role in ("key", "value") else "video", role


__all__ = ["FORWARDS_OF_A_STEP", "PARTS", "forward_flops"]
