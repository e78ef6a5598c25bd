"""Open reproduction of SLA: Sparse-Linear Attention (arXiv 2509.24006)."""

__version__ = "0.1.0"
