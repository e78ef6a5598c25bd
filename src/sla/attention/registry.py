"""Names of attention methods, and the only factory."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from sla.attention.config import AttentionConfig
from sla.attention.interface import AttentionMethod

MethodT = TypeVar("MethodT", bound=type[AttentionMethod])

_METHODS: dict[str, tuple[type[AttentionMethod], type[AttentionConfig]]] = {}


def register_attention(
    name: str, config_class: type[AttentionConfig]
) -> Callable[[MethodT], MethodT]:
    """Class decorator that adds a method under `name`; works from outside the repository too.

    Args:
        name: the word that configs use.
        config_class: dataclass of the method's numbers; its `name` field defaults to `name`.

    Raises:
        ValueError: the name is taken by another class.
    """

    def add(method_class: MethodT) -> MethodT:
        known = _METHODS.get(name)
        if known is not None and known[0].__qualname__ != method_class.__qualname__:
            raise ValueError(f"attention name {name!r} is taken by {known[0].__qualname__}")
        _METHODS[name] = (method_class, config_class)
        return method_class

    return add


def available_attention() -> list[str]:
    """Names of the registered methods, sorted."""
    return sorted(_METHODS)


def _lookup(name: str) -> tuple[type[AttentionMethod], type[AttentionConfig]]:
    if name not in _METHODS:
        close = difflib.get_close_matches(str(name), _METHODS, n=1, cutoff=0.5)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(
            f"attention.name is {name!r}{hint} Available: {', '.join(available_attention())}"
        )
    return _METHODS[name]


def attention_config_class(name: str) -> type[AttentionConfig]:
    """Config dataclass of the method `name`.

    Raises:
        ValueError: no such method; names the nearest one and all.
    """
    return _lookup(name)[1]


def attention_config_from_dict(values: Mapping[str, Any]) -> AttentionConfig:
    """Config from plain values such as a checkpoint's header holds: `{"name": ..., numbers}`.

    Raises:
        ValueError: unknown method or unknown field; names the nearest valid one.
    """
    config_class = attention_config_class(values.get("name", AttentionConfig.name))
    fields = [field.name for field in dataclasses.fields(config_class)]
    for key in values:
        if key not in fields:
            close = difflib.get_close_matches(key, fields, n=1, cutoff=0.5)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise ValueError(
                f"attention.{key} is not a field of {config_class.__name__}; "
                f"{hint}Fields: {', '.join(fields)}"
            )
    return config_class(**values)


def build_attention(
    config: AttentionConfig, num_heads: int, head_dim: int, dim: int, layer_index: int
) -> AttentionMethod:
    """Build one layer's attention method.

    Args:
        config: config of a registered method.
        num_heads, head_dim: heads of the layer and their width.
        dim: width of the layer's hidden states.
        layer_index: index of the layer, from 0.

    Raises:
        ValueError: unknown method, or a number of the config out of its range.
        TypeError: the config is not of the method's config class.
    """
    method_class, config_class = _lookup(config.name)
    if not isinstance(config, config_class):
        raise TypeError(
            f"attention {config.name!r} takes a {config_class.__name__}, "
            f"got a {type(config).__name__}"
        )
    return method_class(config, num_heads, head_dim, dim, layer_index)
