"""What attention does inside a model: errors against exact attention, and block classes."""

from sla.analysis.capture_files import Capture
from sla.analysis.probe import LayerStatistics, mean_statistics, observe_attention

__all__ = ["Capture", "LayerStatistics", "mean_statistics", "observe_attention"]
