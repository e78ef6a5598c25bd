"""Metrics of videos, one `torchmetrics.Metric` a file, looked up by name.

A new metric subclasses `VideoMetric` (a value a video) or `VideoSetMetric` (a value a set) and is
decorated with `@register_metric`; the report and the command line then find it.
"""

from sla_eval.metrics.aesthetic_quality import AestheticQuality
from sla_eval.metrics.background_consistency import BackgroundConsistency
from sla_eval.metrics.base import (
    EvalMetric,
    MetricUnavailableError,
    VideoMetric,
    VideoSetMetric,
)
from sla_eval.metrics.brisque import Brisque
from sla_eval.metrics.clip_score import ClipScore
from sla_eval.metrics.dover import DoverScore
from sla_eval.metrics.dynamic_degree import DynamicDegree
from sla_eval.metrics.fid import FID
from sla_eval.metrics.flow_magnitude import FlowMagnitude
from sla_eval.metrics.fvd import FVD
from sla_eval.metrics.imaging_quality import ImagingQuality
from sla_eval.metrics.lpips import LPIPS
from sla_eval.metrics.motion_smoothness import MotionSmoothness
from sla_eval.metrics.overall_consistency import OverallConsistency
from sla_eval.metrics.psnr import PSNR
from sla_eval.metrics.registry import (
    available_metrics,
    build_metric,
    metric_class,
    register_metric,
)
from sla_eval.metrics.ssim import SSIM
from sla_eval.metrics.subject_consistency import SubjectConsistency
from sla_eval.metrics.temporal_flickering import TemporalFlickering
from sla_eval.metrics.vision_reward import VisionRewardScore
from sla_eval.metrics.warping_error import WarpingError

__all__ = [
    "FID",
    "FVD",
    "LPIPS",
    "PSNR",
    "SSIM",
    "AestheticQuality",
    "BackgroundConsistency",
    "Brisque",
    "ClipScore",
    "DoverScore",
    "DynamicDegree",
    "EvalMetric",
    "FlowMagnitude",
    "ImagingQuality",
    "MetricUnavailableError",
    "MotionSmoothness",
    "OverallConsistency",
    "SubjectConsistency",
    "TemporalFlickering",
    "VideoMetric",
    "VideoSetMetric",
    "VisionRewardScore",
    "WarpingError",
    "available_metrics",
    "build_metric",
    "metric_class",
    "register_metric",
]
