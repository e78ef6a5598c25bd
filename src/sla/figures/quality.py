"""The quality columns of the paper's Tables 1 and 2, as printed; FLOPs are in `sla.flops`."""

from __future__ import annotations

SOURCE = "arXiv 2509.24006, Tables 1 and 2"
SETTING = "Wan2.1-1.3B at 480p, 2,000 steps of fine-tuning"
# DOVER's aesthetic and technical scores, four dimensions of VBench in percent, VisionReward.
COLUMNS = ("VA", "VT", "IQ", "OC", "AQ", "SC", "VR")
COLUMN_TITLES = {
    "VA": "DOVER, aesthetic",
    "VT": "DOVER, technical",
    "IQ": "VBench imaging quality",
    "OC": "VBench overall consistency",
    "AQ": "VBench aesthetic quality",
    "SC": "VBench subject consistency",
    "VR": "VisionReward",
}
# Method, by the label that `sla.flops.CASES` has too, to the numbers of the columns.
_PRINTED = {
    "Full attention": "76.78 82.88 62.5 23.3 56.1 93.0 0.059",
    "Sparge-F": "0.002 0.026 26.0 4.6 35.7 85.1 -0.216",
    "Sparge-T": "73.83 77.87 61.9 22.7 55.4 93.1 0.014",
    "VMoBA": "32.33 35.79 58.0 18.8 46.2 89.9 -0.175",
    "VSA": "55.37 64.61 60.6 22.4 51.9 83.6 -0.069",
    "SLA (top 5 %)": "76.96 83.92 62.2 23.6 55.9 93.1 0.048",
    "Linear only": "0.042 0.099 39.5 3.6 28.8 90.7 -0.213",
    "Sparse only": "64.00 70.50 57.2 21.8 51.7 88.7 -0.073",
    "L+S": "29.65 41.15 58.6 18.8 45.3 87.1 -0.105",
    "SLA (elu+1)": "75.50 81.01 62.8 23.5 55.3 92.9 0.034",
    "SLA (hedgehog)": "74.59 82.62 61.9 22.5 54.3 93.2 0.035",
    "SLA (top 10 %)": "75.29 82.20 62.5 22.6 55.8 93.5 0.057",
    "SLA (top 20 %)": "75.81 83.82 62.7 22.4 54.5 92.6 0.059",
}
QUALITY: dict[str, tuple[str, ...]] = {
    label: tuple(numbers.split()) for label, numbers in _PRINTED.items()
}
