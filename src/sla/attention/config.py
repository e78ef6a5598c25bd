"""The numbers of every attention method: one dataclass a method, the only home of its defaults.

Paper sections and equations refer to arXiv 2509.24006. Fractions are of the key blocks of a row.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class AttentionConfig:
    """What every method's config has.

    Attributes:
        name: registered name of the method, see `available_attention()`.
    """

    name: str = "full"


@dataclass
class FullConfig(AttentionConfig):
    """Exact softmax attention over all keys."""

    name: str = "full"


@dataclass
class LinearOnlyConfig(AttentionConfig):
    """Linear attention over all keys (the "Linear only" row of Table 2).

    Attributes:
        feature_map: `softmax`, `elu+1`, `relu` or `hedgehog`.
    """

    name: str = "linear_only"
    feature_map: str = "softmax"


@dataclass
class BlockSparseConfig(AttentionConfig):
    """What the methods that route over blocks of consecutive tokens share (Section 4).

    Attributes:
        critical: fraction k_h of the key blocks of a row that get exact attention, in (0, 1].
        block_q: queries in a block, b_q.
        block_kv: keys in a block, b_kv.
        backend: backend of the operator; `auto` takes the fastest that supports the inputs.
    """

    critical: float = 0.05
    block_q: int = 64
    block_kv: int = 64
    backend: str = "auto"


@dataclass
class SparseOnlyConfig(BlockSparseConfig):
    """SLA's sparse branch alone (the "Sparse only" row of Table 2)."""

    name: str = "sparse_only"


@dataclass
class SLAConfig(BlockSparseConfig):
    """Sparse-Linear Attention (Section 4).

    Attributes:
        negligible: fraction k_l of the key blocks of a row that are skipped, in [0, 1].
        feature_map: feature map phi of the linear branch: `softmax`, `elu+1`, `relu` or `hedgehog`.
        proj_init: `zero` (a converted model starts as pure sparse attention) or `identity`.
    """

    name: str = "sla"
    negligible: float = 0.10
    feature_map: str = "softmax"
    proj_init: str = "zero"


__all__ = [
    "AttentionConfig",
    "BlockSparseConfig",
    "FullConfig",
    "LinearOnlyConfig",
    "SLAConfig",
    "SparseOnlyConfig",
]
