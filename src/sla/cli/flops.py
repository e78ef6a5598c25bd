"""`python -m sla flops`."""

from __future__ import annotations

from collections.abc import Sequence

from sla.flops import WAN_1_3B, Shape, markdown, table, to_csv


def show(
    grid: Sequence[int] | None,
    num_heads: int | None,
    head_dim: int | None,
    num_layers: int | None,
    form: str,
) -> None:
    """Print the table; what is None is Wan2.1-1.3B's. `form` is `markdown` or `csv`."""
    frames, height, width = grid or WAN_1_3B.grid
    shape = Shape(
        (frames, height, width),
        num_heads or WAN_1_3B.num_heads,
        head_dim or WAN_1_3B.head_dim,
        num_layers or WAN_1_3B.num_layers,
    )
    costs = table(shape)
    print(to_csv(costs, shape).rstrip() if form == "csv" else markdown(costs, shape))
