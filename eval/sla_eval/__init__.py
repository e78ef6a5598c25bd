"""Scores of videos: a folder of videos in, metrics with confidence intervals out.

Usable alone: it knows files and metrics and nothing of the models that made the videos.

    python -m sla_eval --videos DIR [--reference DIR]
"""

from sla_eval.metrics import (
    MetricUnavailableError,
    VideoMetric,
    available_metrics,
    build_metric,
    metric_class,
    register_metric,
)
from sla_eval.report import bootstrap_interval, markdown_table, score_folder, write_json
from sla_eval.videos import VideoError, find_videos, read_video

__all__ = [
    "MetricUnavailableError",
    "VideoError",
    "VideoMetric",
    "available_metrics",
    "bootstrap_interval",
    "build_metric",
    "find_videos",
    "markdown_table",
    "metric_class",
    "read_video",
    "register_metric",
    "score_folder",
    "write_json",
]
