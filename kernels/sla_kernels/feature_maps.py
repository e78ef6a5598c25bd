"""Feature maps phi of the linear branch: (..., D) -> (..., D_phi), non-negative (Section 4.2)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FeatureMap = Callable[[Tensor], Tensor]

_FEATURE_MAPS: dict[str, FeatureMap] = {}


def register_feature_map(name: str, function: FeatureMap) -> None:
    """Add a feature map under a name.

    Raises:
        ValueError: the name is taken.
    """
    if name in _FEATURE_MAPS:
        raise ValueError(f"feature map {name!r} is registered already")
    _FEATURE_MAPS[name] = function


def available_feature_maps() -> list[str]:
    """Names that `feature_map` arguments take, sorted."""
    return sorted(_FEATURE_MAPS)


def get_feature_map(feature_map: str | FeatureMap) -> FeatureMap:
    """A feature map by name; a callable is returned as it is.

    Raises:
        ValueError: unknown name.
        TypeError: neither a name nor a callable.
    """
    if isinstance(feature_map, str):
        if feature_map not in _FEATURE_MAPS:
            known = ", ".join(available_feature_maps())
            raise ValueError(
                f"feature_map is {feature_map!r}; it must be one of {known}, or a callable"
            )
        return _FEATURE_MAPS[feature_map]
    if not callable(feature_map):
        raise TypeError(f"feature_map is a {type(feature_map).__name__}; a name or a callable")
    return feature_map


def softmax(features: Tensor) -> Tensor:
    """Softmax over the feature axis, the paper's default."""
    return torch.softmax(features, dim=-1)


def elu_plus_one(features: Tensor) -> Tensor:
    """elu(x) + 1 (Katharopoulos et al., arXiv 2006.16236)."""
    return F.elu(features) + 1


register_feature_map("softmax", softmax)
register_feature_map("elu+1", elu_plus_one)
register_feature_map("relu", torch.relu)


class Hedgehog(nn.Module):
    """The learnable map of Hedgehog (Zhang et al., arXiv 2402.04347).

    phi(x) = [softmax(x W), softmax(-x W)] / 2 over features, W shared by the heads of a layer and
    initialised to the identity, so that the weights of a token sum to one as softmax's do.

    Args:
        head_dim: D; the output has 2 D features.
    """

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(head_dim))

    def forward(self, features: Tensor) -> Tensor:
        mixed = features @ self.weight.to(features.dtype)
        both = torch.cat([torch.softmax(mixed, dim=-1), torch.softmax(-mixed, dim=-1)], dim=-1)
        return both / 2
