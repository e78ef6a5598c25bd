"""Attention methods behind one interface.

`build_attention(config, num_heads, head_dim, dim, layer_index)` builds one layer's method,
`available_attention()` lists the names, `@register_attention(name, ConfigClass)` adds one.
"""

from sla.attention.config import (
    AttentionConfig,
    FullConfig,
    LinearOnlyConfig,
    LinearPlusSparseConfig,
    SLA2Config,
    SLAConfig,
    SpargeConfig,
    SparseOnlyConfig,
    SparsePooledConfig,
    VMoBAConfig,
    VSAConfig,
)
from sla.attention.full import FullAttention
from sla.attention.interface import (
    AttentionContext,
    AttentionMethod,
    UnsupportedAttentionError,
)
from sla.attention.linear_only import LinearOnlyAttention
from sla.attention.linear_plus_sparse import LinearPlusSparseAttention
from sla.attention.registry import (
    attention_config_class,
    attention_config_from_dict,
    available_attention,
    build_attention,
    register_attention,
)
from sla.attention.sla import SLAAttention
from sla.attention.sla2 import SLA2Attention
from sla.attention.sparge import SpargeAttention
from sla.attention.sparse_only import SparseOnlyAttention
from sla.attention.sparse_pooled import SparsePooledAttention
from sla.attention.vmoba import VMoBAAttention
from sla.attention.vsa import VSAAttention

__all__ = [
    "AttentionConfig",
    "AttentionContext",
    "AttentionMethod",
    "FullAttention",
    "FullConfig",
    "LinearOnlyAttention",
    "LinearOnlyConfig",
    "LinearPlusSparseAttention",
    "LinearPlusSparseConfig",
    "SLA2Attention",
    "SLA2Config",
    "SLAAttention",
    "SLAConfig",
    "SpargeAttention",
    "SpargeConfig",
    "SparseOnlyAttention",
    "SparseOnlyConfig",
    "SparsePooledAttention",
    "SparsePooledConfig",
    "UnsupportedAttentionError",
    "VMoBAAttention",
    "VMoBAConfig",
    "VSAAttention",
    "VSAConfig",
    "attention_config_class",
    "attention_config_from_dict",
    "available_attention",
    "build_attention",
    "register_attention",
]
