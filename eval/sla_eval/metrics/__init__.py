"""Metrics of videos, one `torchmetrics.Metric` a file, looked up by name.

A new metric subclasses `VideoMetric` and is decorated with `@register_metric`; the report and
the command line then find it.
"""

from sla_eval.metrics.base import MetricUnavailableError, VideoMetric
from sla_eval.metrics.psnr import PSNR
from sla_eval.metrics.registry import (
    available_metrics,
    build_metric,
    metric_class,
    register_metric,
)
from sla_eval.metrics.ssim import SSIM
from sla_eval.metrics.temporal_flickering import TemporalFlickering

__all__ = [
    "PSNR",
    "SSIM",
    "MetricUnavailableError",
    "TemporalFlickering",
    "VideoMetric",
    "available_metrics",
    "build_metric",
    "metric_class",
    "register_metric",
]
