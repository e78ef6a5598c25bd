"""The feature map of a layer's linear branch, with what it learns."""

from __future__ import annotations

from sla_kernels import Hedgehog, get_feature_map
from torch import nn

from sla.attention.interface import Float32Parameters


class FeatureMap(Float32Parameters):
    """phi: (..., D) -> (..., width), as the operators of `sla_kernels` take it.

    Args:
        name: `hedgehog` (learnable, width 2 D) or a name that `sla_kernels` knows (width D).
        head_dim: D.

    Raises:
        ValueError: unknown name.
    """

    def __init__(self, name: str, head_dim: int) -> None:
        super().__init__()
        self.name = name
        self.learnable: nn.Module | None = None
        self.width = head_dim
        if name == "hedgehog":
            self.learnable = Hedgehog(head_dim)
            self.width = 2 * head_dim
        else:
            get_feature_map(name)

    @property
    def argument(self) -> str | nn.Module:
        """What to pass as `feature_map`: fused kernels know fixed maps by name."""
        return self.name if self.learnable is None else self.learnable
