"""Feature maps phi of the linear branch (paper, Section 4 and Table 2).

A feature map takes (..., D) to (..., F) features that are not negative. Backends apply it in
float32 (float64 for float64 inputs).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

FeatureMap = Callable[[Tensor], Tensor]

_FEATURE_MAPS: dict[str, FeatureMap] = {}


def register_feature_map(name: str, feature_map: FeatureMap) -> None:
    """Make a feature map available by name to every function that takes one.

    Args:
        name: a new name.
        feature_map: (..., D) to (..., F), differentiable, without parameters of its own (pass a
            learnable map, such as `Hedgehog`, as the object itself).

    Raises:
        TypeError: `feature_map` cannot be called.
        ValueError: the name is empty or taken.
    """
    if not callable(feature_map):
        raise TypeError(f"feature_map is {feature_map!r}; it must be callable")
    if not name or name in _FEATURE_MAPS:
        raise ValueError(f"name is {name!r}; it must be new, these are taken: {_names()}")
    _FEATURE_MAPS[name] = feature_map


def available_feature_maps() -> tuple[str, ...]:
    """Registered names, in order of registration."""
    return tuple(_FEATURE_MAPS)


def get_feature_map(feature_map: str | FeatureMap) -> FeatureMap:
    """The function behind a name; a callable is returned as it is.

    Raises:
        ValueError: unknown name.
        TypeError: neither a name nor a callable.
    """
    if isinstance(feature_map, str):
        if feature_map not in _FEATURE_MAPS:
            raise ValueError(
                f"feature_map is {feature_map!r}; it must be one of {_names()} or a callable"
            )
        return _FEATURE_MAPS[feature_map]
    if not callable(feature_map):
        raise TypeError(
            f"feature_map is {feature_map!r}; it must be one of {_names()} or a callable"
        )
    return feature_map


class Hedgehog(nn.Module):
    """Learnable feature map phi(x) = softmax([x W, -x W]) over the 2 D features.

    After "The Hedgehog and the Porcupine" (arXiv 2402.04347); one W per layer, shared by heads.
    W starts as the identity, so that phi starts as a softmax of x and -x.

    Args:
        head_dim: D.

    Shape:
        (..., D) to (..., 2 D). The result has the wider dtype of input and W.
    """

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.weight = nn.Parameter(torch.eye(head_dim))

    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, self.weight.dtype)
        mapped = x.to(dtype) @ self.weight.to(dtype)
        return torch.cat([mapped, -mapped], dim=-1).softmax(dim=-1)

    def extra_repr(self) -> str:
        return f"head_dim={self.head_dim}"


def _names() -> str:
    return ", ".join(repr(name) for name in _FEATURE_MAPS)


register_feature_map("softmax", lambda x: torch.softmax(x, dim=-1))
register_feature_map("elu+1", lambda x: F.elu(x) + 1.0)
register_feature_map("relu", torch.relu)
