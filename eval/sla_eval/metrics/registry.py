"""Metrics by name."""

from __future__ import annotations

import difflib
from typing import Any, TypeVar

from sla_eval.metrics.base import EvalMetric, VideoMetric, VideoSetMetric

_METRICS: dict[str, type[VideoMetric] | type[VideoSetMetric]] = {}

M = TypeVar("M", bound=type[EvalMetric])


def register_metric(cls: M) -> M:
    """Class decorator: makes a metric known under its `name`.

    Raises:
        TypeError: not a subclass of `VideoMetric` or `VideoSetMetric`.
        ValueError: it has no `name`, or another class has it.
    """
    if not (isinstance(cls, type) and issubclass(cls, VideoMetric | VideoSetMetric)):
        raise TypeError(f"cls must be a subclass of VideoMetric or VideoSetMetric, got {cls!r}")
    name = getattr(cls, "name", "")
    if not name:
        raise ValueError(f"{cls.__name__}.name must be a non-empty string, got {name!r}")
    if _METRICS.get(name, cls) is not cls:
        raise ValueError(f"a metric named {name!r} is registered: {_METRICS[name].__name__}")
    if not cls.title:
        cls.title = name.replace("_", " ").capitalize()
    _METRICS[name] = cls
    return cls


def available_metrics() -> list[str]:
    """Names of all registered metrics, sorted; `availability` of each says if it can run here."""
    return sorted(_METRICS)


def metric_class(name: str) -> type[VideoMetric] | type[VideoSetMetric]:
    """The metric registered under `name`.

    Raises:
        ValueError: there is none; the message names the nearest.
    """
    if name not in _METRICS:
        near = difflib.get_close_matches(name, _METRICS, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        known = ", ".join(available_metrics())
        raise ValueError(f"unknown metric {name!r}{hint} (available: {known})")
    return _METRICS[name]


def build_metric(name: str, **kwargs: Any) -> VideoMetric | VideoSetMetric:
    """A fresh metric.

    Args:
        name: of a registered metric.
        kwargs: for its constructor; every metric takes `weights_dir`, and those with networks
            `load` (`EvalMetric`).

    Raises:
        ValueError: no metric has this name.
        MetricUnavailableError: it cannot run here (weights or a package are missing).
    """
    return metric_class(name)(**kwargs)
