"""Attention methods behind one interface.

`build_attention(config, num_heads, head_dim, dim, layer_index)` builds one layer's method,
`available_attention()` lists the names, `@register_attention(name, ConfigClass)` adds one.
"""

from sla.attention.config import (
    AttentionConfig,
    FullConfig,
    LinearOnlyConfig,
    SLAConfig,
    SparseOnlyConfig,
)
from sla.attention.full import FullAttention
from sla.attention.interface import (
    AttentionContext,
    AttentionMethod,
    UnsupportedAttentionError,
)
from sla.attention.linear_only import LinearOnlyAttention
from sla.attention.registry import (
    attention_config_class,
    attention_config_from_dict,
    available_attention,
    build_attention,
    register_attention,
)
from sla.attention.sla import SLAAttention
from sla.attention.sparse_only import SparseOnlyAttention

__all__ = [
    "AttentionConfig",
    "AttentionContext",
    "AttentionMethod",
    "FullAttention",
    "FullConfig",
    "LinearOnlyAttention",
    "LinearOnlyConfig",
    "SLAAttention",
    "SLAConfig",
    "SparseOnlyAttention",
    "SparseOnlyConfig",
    "UnsupportedAttentionError",
    "attention_config_class",
    "attention_config_from_dict",
    "available_attention",
    "build_attention",
    "register_attention",
]
