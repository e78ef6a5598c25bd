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
from sla_eval.prompts import Prompt, PromptError, assign_prompts, read_prompts
from sla_eval.report import (
    bootstrap_interval,
    markdown_table,
    paired_differences,
    read_report,
    score_files,
    score_folder,
    write_json,
    write_table,
)
from sla_eval.videos import VideoError, find_videos, read_video

__all__ = [
    "MetricUnavailableError",
    "Prompt",
    "PromptError",
    "VideoError",
    "VideoMetric",
    "assign_prompts",
    "available_metrics",
    "bootstrap_interval",
    "build_metric",
    "find_videos",
    "markdown_table",
    "metric_class",
    "paired_differences",
    "read_prompts",
    "read_report",
    "read_video",
    "register_metric",
    "score_files",
    "score_folder",
    "write_json",
    "write_table",
]
