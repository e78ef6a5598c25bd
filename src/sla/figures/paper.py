"""Shapes that the paper measures at, and the speeds that it publishes."""

from __future__ import annotations

# (batch, heads, tokens, head_dim) of one self-attention, 81 frames.
WAN_1_3B = (1, 12, 32760, 128)  # Wan2.1-1.3B at 480p
WAN_14B_720P = (1, 40, 75600, 128)  # Wan2.1-14B at 720p
# Fractions of the paper's kernel measurements (Section 5, Figure 6a).
SPARSITY = 0.95
NEGLIGIBLE = 0.10
PAPER_BLOCKS = (64, 64)
# Block sizes (queries, keys) that our benchmark takes on a GPU unless told otherwise.
GPU_BLOCKS = (128, 128)

PAPER_DEVICE = "RTX5090"
# Figure 6a: FLOPs of full attention over time, TFLOPS; method to (forward, backward).
PAPER_TFLOPS: dict[str, tuple[float, float]] = {
    "FlashAttention2": (219, 218),
    "VMoBA-85%": (228, 370),
    "VMoBA-95%": (348, 1032),
    "VSA-89%": (892, 620),
    "VSA-95%": (1553, 1011),
    "SLA-95%": (2996, 1479),
}
# Figure 6b and the text: seconds of a generation with Wan2.1-1.3B, (attention, the rest). SLA2's
# (arXiv 2602.12675) rest is SLA's, which gives the 2.30x that it reports.
PAPER_GENERATION: dict[str, tuple[float, float]] = {
    "full attention": (97, 62),
    "SLA": (11, 62),
    "SLA2": (7, 62),
}
# Figure 1 and Section 3, Wan2.1: shares of the weights above 1/N and below 1/(100 N); and, at these
# shares of the weights dropped, the L1 error of the output (the first "under 3 %").
PAPER_WEIGHTS_ABOVE = 0.081
PAPER_WEIGHTS_BELOW = 0.45
PAPER_DROP_ERRORS: dict[float, float] = {0.45: 0.03, 0.919: 0.33}
# Figure 3: stable ranks of one map: all weights, the top 8 %, the other 92 %.
PAPER_STABLE_RANKS = (6226, 6230, 9)
